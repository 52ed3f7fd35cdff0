"""Reruns of steps with custom autograd Functions: they go as earlier traces went, without rules.

The user's forward runs in each call; the backward only where it may do more than compute with
tensors. Each case is called in lockstep with eager, while what it reads changes.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import tracejit
from tracejit.errors import SideEffectError, TracejitWarning

FACTOR = 2.0
LOG: list[float] = []


class Masked(Function):
    """Draws in its forward."""

    @staticmethod
    def forward(ctx, x, p):
        mask = (torch.rand_like(x) < p).to(x.dtype)
        ctx.save_for_backward(mask)
        ctx.p = p
        return x * mask / p

    @staticmethod
    def backward(ctx, g):
        (mask,) = ctx.saved_tensors
        return g * mask / ctx.p, None


class Noisy(Function):
    """Draws in its backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.shape = x.shape
        return x * 1.5

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        noise = torch.randn(ctx.shape)
        with torch.no_grad():
            return g * 1.5 + 0.1 * noise.clamp(min=-1.0)


def scaled(g: torch.Tensor) -> torch.Tensor:
    return g * FACTOR


class ByGlobal(Function):
    """Its backward reads a global, by way of a helper."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return scaled(g)


class ByPython(Function):
    """Its backward draws from Python's generator, which has to run."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * random.random()


class Telling(Function):
    """Its backward appends to a list."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        LOG.append(1.0)
        return g * 2


class InPlace(Function):
    """Writes to its argument, and returns a number beside it."""

    @staticmethod
    def forward(ctx, x, by):
        ctx.mark_dirty(x)
        ctx.by = by
        x.mul_(by)
        return x, 3

    @staticmethod
    def backward(ctx, g, _):
        return g * ctx.by, None


class Two(Function):
    """Two results, one of which is not differentiated, and setup_context."""

    @staticmethod
    def forward(x, y):
        return x * y, (x > y)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, g, _):
        x, y = ctx.saved_tensors
        if g is None:
            return None, None
        gx = gy = None
        if ctx.needs_input_grad[0]:
            gx = g * y
        if ctx.needs_input_grad[1]:
            gy = sum([g * x for _ in range(2)]) / 2
        return gx, gy


class Deciding(Function):
    """Python's generator decides in its forward."""

    @staticmethod
    def forward(ctx, x):
        ctx.kind = "even" if random.random() < 0.5 else "odd"
        return x + 1 if ctx.kind == "even" else x - 1

    @staticmethod
    def backward(ctx, g):
        return g * (2.0 if ctx.kind == "even" else 3.0)


class OfAttribute(Function):
    """A number that differs in each call is kept on the context."""

    @staticmethod
    def forward(ctx, x, by):
        ctx.by = by
        return x * by

    @staticmethod
    def backward(ctx, g):
        return g * ctx.by, None


class InATuple(Function):
    """An intermediate is in a tuple on the context, as an object that holds it would be."""

    @staticmethod
    def forward(ctx, x, p):
        ctx.kept = (x * 2, 3)
        return x * p

    @staticmethod
    def backward(ctx, g):
        return g * ctx.kept[0] * ctx.kept[1], None


class World:
    def __init__(self):
        torch.manual_seed(0)
        self.w = torch.randn(4, 5, requires_grad=True)
        self.v = torch.randn(5, requires_grad=True)
        self.opt = torch.optim.SGD([self.w, self.v], lr=0.1)
        self.by, self.n = 1.5, 0

    def update(self, loss: torch.Tensor) -> torch.Tensor:
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()
        return loss.detach()


def masked(w: World, x: torch.Tensor) -> object:
    return w.update(Masked.apply(x @ w.w, 0.75).square().mean())


def noisy(w: World, x: torch.Tensor) -> object:
    return w.update(Noisy.apply(x @ w.w).square().mean())


def by_global(w: World, x: torch.Tensor) -> object:
    return w.update(ByGlobal.apply(x @ w.w).square().mean())


def by_python(w: World, x: torch.Tensor) -> object:
    return w.update(ByPython.apply(x @ w.w).square().mean())


def telling(w: World, x: torch.Tensor) -> object:
    return w.update(Telling.apply(x @ w.w).square().mean())


def in_place(w: World, x: torch.Tensor) -> object:
    y, n = InPlace.apply(x @ w.w, 1.25)
    return w.update((y + n).square().mean())


def two(w: World, x: torch.Tensor) -> object:
    y, larger = Two.apply(x @ w.w, w.v)
    return w.update(y.square().mean()), larger


def deciding(w: World, x: torch.Tensor) -> object:
    return w.update(Deciding.apply(x @ w.w).square().mean())


def of_attribute(w: World, x: torch.Tensor) -> object:
    return w.update(OfAttribute.apply(x @ w.w, w.by).square().mean())


def nested(w: World, x: torch.Tensor) -> object:
    class Outer(Function):
        @staticmethod
        def forward(ctx, x):
            with torch.enable_grad():
                y = Masked.apply(x, 0.5)
            return y * 2

        @staticmethod
        def backward(ctx, g):
            return Masked.apply(g, 0.5)

    return w.update(Outer.apply(x @ w.w).square().mean())


def kept(w: World, x: torch.Tensor) -> object:
    """What the forward has kept outlives the call."""
    y = Masked.apply(x @ w.w, 0.75)
    w.last = y.detach()
    return w.update(y.square().mean())


def returned(w: World, x: torch.Tensor) -> object:
    """A backward outside."""
    return Masked.apply(x @ w.w, 0.75).square().mean()


STEPS = (
    *(masked, noisy, by_global, by_python, telling, in_place, two, deciding, of_attribute, nested),
    *(kept, returned),
)
# what runs the rules in each call: a backward that may do anything; a class made in each call
NOT_FOLLOWED = (by_python, telling, nested)


def run(step: Callable, calls: int, change: Callable[[World, int], None]) -> list:
    """What eager and ours give, in lockstep, with generators that are the same."""
    ours, right = World(), World()
    compiled = tracejit.compile(lambda x: step(ours, x), mode="rerun", on_unsupported="raise")
    for i in range(calls):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(i))
        found = []
        for w, f in ((ours, compiled), (right, lambda x: step(right, x))):
            change(w, i)
            torch.manual_seed(i)
            random.seed(i)
            LOG.clear()
            loss = f(x)
            if step is returned:
                loss.backward()
            parts = [loss, w.w, w.v, w.w.grad, w.v.grad, getattr(w, "last", None)]
            found.append((parts, [*LOG], torch.rand(1), random.random()))
        torch.testing.assert_close(*found)
        right.w.data.copy_(ours.w.data)
        right.v.data.copy_(ours.v.data)
    return compiled


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_reruns_equal_eager(step):
    compiled = run(step, 10, lambda w, i: setattr(w, "by", 1.0 + i // 5))
    followed = compiled._recall.kept
    if step in NOT_FOLLOWED:
        assert followed == 0
    else:
        assert followed >= (3 if step is deciding else 6)


def test_a_global_of_the_backward_is_compared():
    def change(w: World, i: int) -> None:
        globals()["FACTOR"] = 2.0 if i < 4 else (5.0 if i < 8 else 2.0)

    try:
        assert run(by_global, 12, change)._recall.kept >= 6
    finally:
        globals()["FACTOR"] = 2.0


def test_another_backward_is_another_trace():
    other = staticmethod(lambda ctx, g: (g * 7, None))
    mine = Masked.__dict__["backward"]

    def change(w: World, i: int) -> None:
        Masked.backward = other if 4 <= i < 8 else mine

    try:
        assert run(masked, 12, change)._recall.kept >= 6
    finally:
        Masked.backward = mine


def test_a_function_of_torch_that_was_replaced_is_noticed(monkeypatch):
    """A name that the backward finds something else under."""
    exp = torch.exp

    class Exp(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.exp()

        @staticmethod
        def backward(ctx, g):
            return g * torch.exp(ctx.saved_tensors[0])

    def change(w: World, i: int) -> None:
        monkeypatch.setattr(torch, "exp", torch.sin if 4 <= i < 8 else exp)

    run(lambda w, x: w.update(Exp.apply(x @ w.w).mean()), 12, change)


def test_an_intermediate_in_a_tuple_of_the_context():
    """It becomes real after a followed call, and is not handed out again: where rules run late, the
    next call's backward would find the last one's."""
    torch.manual_seed(0)
    w, v = torch.randn(5, 5, requires_grad=True), torch.randn(5, 5, requires_grad=True)

    def step(x: torch.Tensor) -> torch.Tensor:
        h = InATuple.apply(torch.tanh(x @ w), 0.5)
        h = OfAttribute.apply(torch.tanh(h @ v), 0.5)
        return torch.autograd.grad(h.square().mean(), [w])[0]

    compiled = tracejit.compile(step, mode="rerun", on_unsupported="raise")
    for i in range(8):
        v.requires_grad_(i < 4)
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(i))
        torch.testing.assert_close(compiled(x), step(x))
    assert compiled._recall.kept >= 4 and compiled._recall.left >= 1


def test_a_backward_outside_that_draws_is_refused():
    """It would draw after the step, where eager does; the step would draw before."""

    def step(w: World, x: torch.Tensor) -> torch.Tensor:
        return Noisy.apply(x @ w.w).square().mean()

    ours, right = World(), World()
    x = torch.ones(3, 4)
    strict = tracejit.compile(lambda: step(ours, x), on_unsupported="raise")
    torch.manual_seed(3)
    with pytest.raises(SideEffectError, match="draws random numbers"):
        strict()
    compiled = tracejit.compile(lambda: step(ours, x), on_unsupported="eager")
    with pytest.warns(TracejitWarning, match="draws random numbers"):
        for i in range(6):
            found = []
            for w, f in ((ours, compiled), (right, lambda: step(right, x))):
                torch.manual_seed(i)
                w.w.grad, loss, between = None, f(), torch.rand(1)
                loss.backward()
                found.append((loss, between, w.w.grad, torch.rand(1)))
            torch.testing.assert_close(*found)
    assert compiled.stats.eager == 6


def test_traces_that_part_after_a_custom_function():
    """Rules run late, around the context and the proxies that the user's code has already."""

    def step(w: World, x: torch.Tensor) -> object:
        y = Masked.apply(x @ w.w, 0.75)
        y = Two.apply(y, w.v)[0]
        if w.n == 5:
            y = Noisy.apply(y * 3)
        return w.update(y.square().mean())

    compiled = run(step, 12, lambda w, i: setattr(w, "n", i))
    assert compiled._recall.kept >= 7 and compiled._recall.left >= 1
