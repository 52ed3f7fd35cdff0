"""Small steps that were once wrong, refused or slow, with the values that they have.

Each runs in mode "auto" and refuses rather than fall back. The values stand here, so that nothing
is right only because eager has changed too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tracejit

X = torch.arange(6.0).view(2, 3) / 4


def float_to_int():
    """Neighbours: torch.uint8 wraps around; the quotient of a rounded number has no sign of its
    own."""

    def step(x):
        return x.to(torch.uint8).float(), 1 / x.long().float(), x.to(torch.int8).double()

    wrapped = torch.tensor([255.0, 0.0, 44.0])
    quotients = torch.tensor([-1.0, math.inf, 1 / 300])
    return (
        step,
        lambda i: (torch.tensor([-1.2, -0.3, 300.0]),),
        lambda i: (
            wrapped,
            quotients,
            torch.tensor([-1.0, 0.0, 44.0], dtype=torch.float64),
        ),
    )


def integers_divided(operation: Callable):
    def build():
        def args(i):
            return torch.arange(4), torch.tensor([1, 2, 0 if i == 5 else 1, 3])

        def value(i):
            return (
                RuntimeError if i == 5 else operation(torch.arange(4), torch.tensor([1, 2, 1, 3]))
            )

        return operation, args, value

    return build


def probabilities_out_of_range():
    def args(i):
        return torch.full((4,), 0.5), torch.tensor([0.0, 1.0, 1.0, 1.5 if i == 5 else 0.0])

    return F.binary_cross_entropy, args, lambda i: RuntimeError if i == 5 else math.log(2)


def classes_made_in_the_step():
    rows = torch.tensor([[0, 1, 0], [0, 0, 1], [0, 0, 1]])
    return (
        lambda t: F.one_hot(t + 1, 3),
        lambda i: (torch.tensor([0, 1, 2 if i == 5 else 1]),),
        lambda i: RuntimeError if i == 5 else rows,
    )


def index_made_in_the_step():
    return (
        lambda x, t: x.gather(1, t * 2),
        lambda i: (X, torch.tensor([[1], [2 if i == 5 else 0]])),
        lambda i: RuntimeError if i == 5 else torch.tensor([[0.5], [0.75]]),
    )


def lazy_linear():
    layer = nn.LazyLinear(2, bias=False)

    def step(x):
        y = layer(x)
        return y.shape, (y - x @ layer.weight.T).abs().max()

    return step, lambda i: (X,), lambda i: (torch.Size((2, 2)), 0.0)


def type_of_an_intermediate():
    def step(x):
        y = x * 2
        if type(y) is not torch.Tensor or type(x) is not torch.Tensor:  # pytest rewrites `assert`
            raise TypeError
        return y

    return step, lambda i: (X,), lambda i: X * 2


def integer_counter_read():
    n, mean = torch.zeros((), dtype=torch.int64), torch.zeros(2, 3)

    def step(x):
        n.add_(1)
        decay = min(0.5, (1 + n.item()) / (3 + n.item()))
        mean.mul_(decay).add_(x, alpha=1 - decay)
        return mean.clone()

    return step, lambda i: (X,), lambda i: X * (1 - 0.5 ** (i + 1))


def number_of_the_loss():
    w = nn.Parameter(torch.ones(3))
    opt = torch.optim.SGD([w], lr=0.5)

    def step(x):
        loss = (w * x[0]).sum()
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss.item()

    return step, lambda i: (X,), lambda i: 0.75 - i * 0.5 * (0.0625 + 0.25)


def attention_over_a_root():
    def step(q):
        return F.softmax(q @ q.T / math.sqrt(q.size(1)) * 0, -1) @ q

    return step, lambda i: (X,), lambda i: X.mean(0).expand(2, 3)


def own_optimizer_with_a_counter():
    w = nn.Parameter(torch.zeros(3))

    class Mine(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"lr": 1.0})

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    if not state:
                        state["step"] = 0
                    state["step"] += 1
                    p.sub_(p.grad * state["step"], alpha=group["lr"])

    opt = Mine([w])

    def step(x):
        opt.zero_grad()
        (w * x[0]).sum().backward()
        opt.step()
        return w.detach().clone()

    return step, lambda i: (X,), lambda i: X[0] * -((i + 1) * (i + 2) / 2)


def a_named_tuple():
    values, indices = torch.tensor([0.5, 1.25]), torch.tensor([2, 2])
    return (lambda x: x.max(1)), lambda i: (X,), lambda i: (values, indices)


def long_recurrence():
    cell = nn.RNN(1, 1, nonlinearity="relu", bias=False)
    with torch.no_grad():
        for p in cell.parameters():
            p.fill_(0.5)

    def step(x):
        cell.zero_grad()
        y = cell(x)[0][-1].sum()
        y.backward()
        return y.detach(), cell.weight_ih_l0.grad.clone()

    return step, lambda i: (torch.ones(200, 1, 1),), lambda i: (1.0, torch.tensor([[2.0]]))


def batch_norm_of_images():
    norm = nn.BatchNorm2d(3)
    images = torch.arange(3.0 * 4 * 5 * 2).view(2, 3, 4, 5)

    def step(x):
        norm.zero_grad()
        y = norm(x)
        y.square().mean().backward()
        return y.mean((0, 2, 3)).abs().max() < 1e-5, y.square().mean(), norm.weight.grad.clone()

    wanted = torch.full((3,), 2 / 3)
    return step, lambda i: (images,), lambda i: (torch.tensor(True), 1.0, wanted)


def small_step_of(build: Callable) -> tuple[Callable, Callable, Callable]:
    torch.manual_seed(0)
    return build()


CASES = {
    f.__name__: f
    for f in (
        *(float_to_int, probabilities_out_of_range, classes_made_in_the_step),
        *(index_made_in_the_step, lazy_linear, type_of_an_intermediate, integer_counter_read),
        *(number_of_the_loss, attention_over_a_root, own_optimizer_with_a_counter),
        *(a_named_tuple, long_recurrence, batch_norm_of_images),
    )
} | {
    "integers_divided": integers_divided(lambda a, b: a // b),
    "remainders": integers_divided(lambda a, b: a % b),
    "integers_divided_and_rounded": integers_divided(lambda a, b: a.div(b, rounding_mode="trunc")),
    "an_integer_divided_by_them": integers_divided(lambda a, b: 5 // b),
}


def compare(mine: object, wanted: object, at: str) -> None:
    if isinstance(wanted, tuple) and not isinstance(wanted, torch.Size):
        assert len(mine) == len(wanted), at
        for k, (a, b) in enumerate(zip(mine, wanted, strict=True)):
            compare(a, b, f"{at}[{k}]")
    elif isinstance(wanted, torch.Tensor):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6, msg=at)
    elif isinstance(wanted, float):
        assert float(mine) == pytest.approx(wanted, rel=1e-4, abs=1e-5), at
    else:
        assert mine == wanted, at


@pytest.mark.parametrize("backend", ["numpy", "c"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.sweep(0.17)
def test_case(name, backend):
    step, args, value = small_step_of(CASES[name])
    compiled = tracejit.compile(step, on_unsupported="raise", backend=backend)
    for i in range(9):
        wanted = value(i)
        if isinstance(wanted, type):
            with pytest.raises(wanted):
                compiled(*args(i))
        else:
            compare(compiled(*args(i)), wanted, f"{name}, call {i}")
    assert compiled.explain_mode().startswith("replay"), compiled.explain_mode()
    assert compiled.stats.replays >= 3 and not compiled.stats.eager


@pytest.mark.parametrize("backend", ["numpy", "c"])
def test_backward_outside_through_results_that_share_memory(backend):
    w = nn.Parameter(torch.ones(3, 4))

    @tracejit.compile(on_unsupported="raise", backend=backend)
    def step(x):
        y = x @ w
        return y.mean(), *y.chunk(2, 1)

    for _ in range(6):
        mean, a, b = step(X)
        w.grad = None
        (a.sum() + 2 * b.sum()).backward()
        assert torch.equal(w.grad, X.sum(0)[:, None] * torch.tensor([1.0, 1.0, 2.0, 2.0]))
        assert float(mean) == pytest.approx(X.sum().item() / 2)
    assert step.stats.replays
