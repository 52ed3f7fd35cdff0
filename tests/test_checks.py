"""Values that the step computes and eager refuses: raised before anything is written."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import tracejit

X, EYE = torch.arange(12.0).reshape(3, 4) / 12, torch.eye(4)


def assigned(i):
    y = EYE.clone()
    y[i + 1] = 0.0
    return y


def divided_in_place(i):
    y = torch.full_like(i, 7)
    y //= i
    y.remainder_(i + 2)
    return y


# Each computes what it reads with; a few divide by what comes from outside.
STEPS = {
    "gather": lambda i: X.gather(1, (i + 1)[None]),
    "index_select": lambda i: X.index_select(1, i + 1),
    "embedding": lambda i: functional.embedding(i + 1, EYE),
    "take": lambda i: X.take(i * 3),
    "take_along_dim": lambda i: X.take_along_dim((i + 1)[None], 1),
    "take_along": lambda i: X.take_along_dim(i * 3),
    "columns": lambda i: X[:, i + 1],
    "two": lambda i: X[None, i * 1, i + 1],
    "assigned": assigned,
    "written": lambda i: functional.one_hot(i.clone().add_(1), 4),
    "cross_entropy": lambda i: functional.cross_entropy(X[:2], i + 1),
    "ignored": lambda i: functional.cross_entropy(X[:2], i + 1, ignore_index=-4),
    "nll_loss": lambda i: functional.nll_loss(X[:2], i + 1, reduction="sum"),
    "int32": lambda i: X.gather(1, (i + 1).int()[None].long()),
    "one_hot": lambda i: functional.one_hot(i + 1, 4),
    "from_floats": lambda i: functional.one_hot((i * 0.5).long(), 4),
    "floordiv": lambda i: i // (i + 1),
    "rfloordiv": lambda i: 7 // i,
    "mod": lambda i: 5 - i % (i - 1),
    "rmod": lambda i: 5 % i,
    "div": lambda i: torch.div(i, i, rounding_mode="floor"),
    "remainder": lambda i: torch.remainder(i.int(), i.to(torch.int8)),
    "byte": lambda i: torch.floor_divide(i, i.to(torch.uint8)),
    "in_place": divided_in_place,
    "bool": lambda i: i // (i > 0),
    "of_floats": lambda i: i.float() // i,
    "bce": lambda i: functional.binary_cross_entropy(i / 4, (i + 1) / 4),
    "bce_nan": lambda i: functional.binary_cross_entropy((i / 4).sqrt(), (i + 1) / 4),
    "bce_double": lambda i: functional.binary_cross_entropy(i.double() / 4, i.double().sigmoid()),
    "bce_target": lambda i: functional.binary_cross_entropy(i.float().sigmoid(), i * 0.5),
}
NUMBERS = ([0, 1], [1, 2], [2, 3], [0, 9], [-1, 0], [-5, 0], [3, -2], [2, 1])


def outcome(step, i):
    """What a call returns, or the error that it raises."""
    try:
        return step(i)
    except (IndexError, RuntimeError) as error:
        return error


@pytest.mark.parametrize("backend", ["c", "numpy"])
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.sweep(3)
def test_as_eager(name, backend):
    step = STEPS[name]
    compiled = tracejit.compile(step, backend=backend)
    refusals = 0
    for _ in range(3):  # traced twice, then replayed
        for numbers in NUMBERS:
            i = torch.tensor(numbers)
            expected, found = outcome(step, i), outcome(compiled, i)
            if isinstance(expected, Exception):
                refusals += 1
                assert isinstance(found, type(expected)), found
                said = str(expected) if name not in ("one_hot", "written", "from_floats") else ""
                assert said in str(found) and "test_checks.py" in str(found)
            else:
                torch.testing.assert_close(found, expected, equal_nan=True)
    assert compiled.stats.replays > 0
    assert refusals or name in ("take_along_dim", "of_floats")


PROVEN = {  # no plan of checks is needed: the values cannot be out of range
    "argmax": lambda x: functional.one_hot(x.argmax(1), 4),
    "max": lambda x: x.gather(1, x.max(1, keepdim=True)[1]),
    "comparison": lambda x: functional.cross_entropy(x, (x[:, 0] > x[:, 1]).long()),
    "clamped": lambda x: functional.one_hot((x.long() + 5).clamp(0, 3), 4),
    "modulo": lambda x: x[:, (torch.arange(9) * 7) % 4],
    "positions": lambda x: functional.embedding(torch.arange(3).flip(0)[None], x),
    "constants": lambda x: x[[2, 0, 1]],
    "divisor": lambda x: x.long() // (x.long().clamp(-1, 8) + 2),
    "literal": lambda x: x.long() // 3 + x.long() % -2,
    "sigmoid": lambda x: functional.binary_cross_entropy(x.sigmoid(), (x > 0).float()),
    "softmax": lambda x: functional.binary_cross_entropy(x.softmax(1), 1 - x.softmax(0)),
    "log_softmax": lambda x: functional.binary_cross_entropy(
        x.log_softmax(1).exp(), torch.full_like(x, 0.3)
    ),
    "smoothed": lambda x: functional.binary_cross_entropy(
        x.sigmoid() * 0.9 + 0.05, x.tanh() * 0.5 + 0.5
    ),
    "nothing": lambda x: functional.one_hot(x.long()[:0], 4),
}


@pytest.mark.parametrize("name", PROVEN)
def test_what_is_known_is_not_checked(name):
    step, x = PROVEN[name], torch.randn(3, 4)
    compiled = tracejit.compile(step, backend="numpy")
    torch.testing.assert_close(compiled(x), step(x))
    assert compiled.stats.compiles == 1


def test_integers_that_wrap_are_checked():
    """In range but for an overflow: 127 + 1 of int8 is -128."""

    @tracejit.compile
    def step(x):
        return functional.one_hot((x.to(torch.int8).clamp(0, 127) + 1).long(), 200)

    assert step(torch.tensor([5.0, 126.0])).argmax(1).tolist() == [6, 127]
    with pytest.raises(RuntimeError, match="-128"):
        step(torch.tensor([127.0]))


@pytest.mark.parametrize("zero", [0, torch.tensor(0)])
def test_nothing_is_divided(zero):
    """An integer division of no elements by zero is no error."""
    step = tracejit.compile(lambda x: (x // zero, x % zero))
    assert [y.tolist() for y in step(torch.arange(0))] == [[], []]
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        step(torch.arange(2))


def test_nothing_is_written():
    """Neither the parameters, nor gradients, optimizer and scheduler, nor a buffer before it."""
    torch.manual_seed(0)
    table, seen = torch.randn(5, 3, requires_grad=True), torch.zeros(3)
    optimizer = torch.optim.Adam([table], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    @tracejit.compile
    def step(tokens, rows):
        optimizer.zero_grad()
        seen.add_(1)
        x = functional.embedding(tokens + 1, table)
        functional.cross_entropy(x, rows // 2).backward()
        optimizer.step()
        scheduler.step()

    good = torch.tensor([0, 1, 3]), torch.tensor([0, 3, 5])
    for _ in range(4):
        step(*good)
    assert step.stats.replays > 0

    def state():
        kept = optimizer.state[table]
        tensors = table, table.grad, kept["step"], kept["exp_avg"], seen
        return [x.detach().clone() for x in tensors], scheduler.last_epoch

    before = state()
    for bad, says in (((good[0] + 1, good[1]), "in self"), ((good[0], good[1] + 1), "Target 3")):
        with pytest.raises(IndexError, match=rf"test_checks\.py.*{says}"):
            step(*bad)
    assert all(torch.equal(a, b) for a, b in zip(state()[0], before[0], strict=True))
    assert state()[1] == before[1]
    step(*good)
    assert not torch.equal(table.detach(), before[0][0]) and seen[0] == 5


def test_the_first_refusal_is_raised():
    @tracejit.compile
    def step(i, p):
        a = functional.one_hot(i * 2, 4)
        return a, functional.binary_cross_entropy(p * 2, p)

    good = torch.tensor([1]), torch.tensor([0.5])
    for _ in range(3):
        assert step(*good)[0].tolist() == [[0, 0, 1, 0]]
    for call in ((good[0] + 1, good[1] * 2), (good[0] + 1, good[1])):
        with pytest.raises(RuntimeError, match="Class values .* not 4"):
            step(*call)
    with pytest.raises(RuntimeError, match="elements of input should be between 0 and 1"):
        step(good[0], good[1] * 2)


def test_a_check_reads_a_scheduled_number():
    """The number of this call, not that of the call that was traced."""
    w = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.25)

    @tracejit.compile
    def step(p):
        return functional.binary_cross_entropy(p * optimizer.param_groups[0]["lr"], p)

    p = torch.tensor([0.5, 1.0])
    for rate in (0.25, 0.5, 0.75, 1.0):
        optimizer.param_groups[0]["lr"] = rate
        torch.testing.assert_close(step(p), functional.binary_cross_entropy(p * rate, p))
    optimizer.param_groups[0]["lr"] = 1.25
    with pytest.raises(RuntimeError, match="input should be between"):
        step(p)
