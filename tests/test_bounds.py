"""Indices out of range raise as in eager, before anything is written."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import tracejit


def assigned(x, i):
    y = x.clone()
    y[i] = 0.0
    return y


STEPS = {
    "gather": lambda x, i: x.gather(1, i[None]),
    "index_select": lambda x, i: x.index_select(1, i),
    "embedding": lambda x, i: functional.embedding(i, x),
    "take": lambda x, i: x.take(i),
    "rows": lambda x, i: x[i],
    "columns": lambda x, i: x[:, i] * 2,
    "assigned": lambda x, i: assigned(x, i),
    "cross_entropy": lambda x, i: functional.cross_entropy(x[:2], i),
    "nll_loss": lambda x, i: functional.nll_loss(x[:2], i, reduction="sum"),
    "one_hot": lambda x, i: functional.one_hot(i, 4),
    "view_of_the_indices": lambda x, i: x[i.view(2, 1)],
    "ignored": lambda x, i: functional.cross_entropy(x[:2], i, ignore_index=-9),
}
INDICES = ([1, 2], [1, 99], [1, -1], [0, -9], [-9, 1], [2, 0])


@pytest.mark.parametrize("name", STEPS)
def test_as_eager(name):
    step, x = STEPS[name], torch.randn(3, 4)
    compiled = tracejit.compile(step, backend="numpy")
    for _ in range(3):  # traced twice, then replayed
        for numbers in INDICES:
            i = torch.tensor(numbers)
            try:
                expected, refused = step(x, i), None
            except (IndexError, RuntimeError) as error:
                refused = IndexError if isinstance(error, IndexError) else RuntimeError
            if refused is None:
                torch.testing.assert_close(compiled(x, i), expected)
            else:
                with pytest.raises(refused):
                    compiled(x, i)
    assert compiled.stats.replays > 0


def test_nothing_is_written():
    torch.manual_seed(0)
    table = torch.randn(5, 3, requires_grad=True)
    optimizer = torch.optim.Adam([table], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    @tracejit.compile
    def step(tokens):
        optimizer.zero_grad()
        functional.embedding(tokens, table).pow(2).sum().backward()
        optimizer.step()
        scheduler.step()

    for _ in range(4):
        step(torch.tensor([0, 1, 2]))
    assert step.stats.replays > 0
    before = table.detach().clone(), table.grad.clone(), optimizer.state[table]["step"].clone()
    epoch, rate = scheduler.last_epoch, optimizer.param_groups[0]["lr"]
    for bad in ([0, 1, 5], [-1, 0, 0]):
        with pytest.raises(IndexError, match=r"test_bounds\.py.*out of range in self"):
            step(torch.tensor(bad))
    after = table.detach(), table.grad, optimizer.state[table]["step"]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert (scheduler.last_epoch, optimizer.param_groups[0]["lr"]) == (epoch, rate)
    step(torch.tensor([4, 4, 4]))
    assert not torch.equal(table.detach(), before[0])


def test_the_values_of_a_noncontiguous_index():
    x, numbers = torch.arange(5.0), torch.tensor([[0, 9], [1, 9], [4, 9]])
    step = tracejit.compile(lambda: x[numbers[:, 0]])
    for _ in range(4):
        assert torch.equal(step(), x[[0, 1, 4]])
    numbers[1, 0] = 5
    with pytest.raises(IndexError):
        step()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_many_indices_are_looked_at_by_all_threads(dtype: torch.dtype):
    """One that is outside, wherever it is, is found, and nothing is added."""
    n, words = 3 * (1 << 16) + 7, 1000

    def step(table, index, rows):
        return table.index_add(0, index, rows)

    compiled = tracejit.compile(step, backend="c", on_unsupported="raise")
    table, rows = torch.zeros(words), torch.ones(n)
    index = torch.arange(n).remainder(words).to(dtype)
    for _ in range(4):
        assert torch.equal(compiled(table, index, rows), step(table, index, rows))
    for at in (0, 1 << 16, n - 1):
        for wrong in (-1, words, torch.iinfo(dtype).min, torch.iinfo(dtype).max):
            given = index.clone()
            given[at] = wrong
            with pytest.raises((IndexError, RuntimeError)):
                compiled(table, given, rows)
    assert torch.equal(compiled(table, index, rows), step(table, index, rows))
