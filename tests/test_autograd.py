"""Derivatives: the tape on its own, formulas at ties and NaN, finite differences, second order."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

import tracejit
from support.oracle import call
from tracejit.autodiff import Entry, Tape, backward, reaches, zeros
from tracejit.errors import AutogradError
from tracejit.ir.graph import Builder, Result, verify
from tracejit.ir.interp import evaluate
from tracejit.ir.types import Type, f64, i64

nan, inf = math.nan, math.inf
F = torch.nn.functional


# --- the tape ----------------------------------------------------------------------------------


class Recording:
    """A Builder whose nodes are recorded, as a tracer does it."""

    def __init__(self) -> None:
        self.b, self.tape = Builder(), Tape()
        self.on = True
        self.b.on_emit = lambda node: self.tape.record(node) if self.on else None
        self.entered: list[str] = []

    def leaf(self, *shape: int):
        value = self.b.param(Type(f64, shape))
        self.tape.watch(value)
        return value

    def backward(self, roots, wanted, *, retain_graph=False, create_graph=False):
        self.on = create_graph
        try:
            return backward(
                self.tape,
                self.b,
                roots,
                wanted,
                retain_graph=retain_graph,
                enter=lambda entry, cotangents: self.entered.append(entry.name),
            )
        finally:
            self.on = True

    def one(self, value):
        self.on = False
        seed = self.b.full(1.0, shape=value.type.shape, dtype=f64, device="cpu")
        self.on = True
        return seed

    def run(self, results, *inputs):
        graph = self.b.graph("t", tuple(Result(v) for v in results))
        verify(graph)
        return evaluate(graph, [np.asarray(x, np.float64) for x in inputs])[0]


def test_only_what_depends_on_a_leaf_is_recorded():
    r = Recording()
    w, x = r.leaf(3), r.b.param(Type(f64, (3,)))
    y = r.b.mul(x, x)
    z = r.b.mul(y, w)
    r.b.gt(z, 0.0)
    r.b.cast(z, dtype=i64)
    assert [e.name for e in r.tape.entries] == ["mul"]
    assert y not in r.tape.tracked and z in r.tape.tracked
    assert reaches(r.tape, [w]) == {w, z}


def test_a_value_used_twice_accumulates():
    r = Recording()
    w = r.leaf(2)
    y = r.b.add(r.b.mul(w, w), w)
    found = r.backward([(y, r.one(y))], [w])
    (grad,) = r.run([found[w]], [2.0, -1.0])
    assert grad.tolist() == [5.0, -1.0]


def test_only_wanted_branches_are_entered():
    r = Recording()
    a, b = r.leaf(2), r.leaf(2)
    left, right = r.b.exp(a), r.b.sin(b)
    y = r.b.mul(left, right)
    found = r.backward([(y, r.one(y))], [a])
    assert set(found) == {a} and r.entered == ["mul", "exp"]
    assert [e.freed for e in r.tape.entries] == [True, False, True]


def test_an_unreached_value_has_no_gradient():
    r = Recording()
    a, b = r.leaf(2), r.leaf(2)
    y = r.b.exp(a)
    assert r.backward([(y, r.one(y))], [b]) == {}


def test_retain_graph_keeps_entries():
    r = Recording()
    w = r.leaf(2)
    y = r.b.exp(w)
    r.backward([(y, r.one(y))], [w], retain_graph=True)
    assert not r.tape.entries[0].freed
    r.backward([(y, r.one(y))], [w])
    assert r.tape.entries[0].freed


def test_several_roots_and_a_root_that_is_wanted():
    r = Recording()
    w = r.leaf(2)
    y = r.b.mul(w, 3.0)
    found = r.backward([(y, r.one(y)), (w, r.one(w)), (y, r.one(y))], [w, y])
    grads = r.run([found[w], found[y]], [1.0, 1.0])
    assert [g.tolist() for g in grads] == [[7.0, 7.0], [2.0, 2.0]]


def test_gradients_are_recorded_under_create_graph():
    r = Recording()
    w = r.leaf(2)
    y = r.b.mul(r.b.mul(w, w), w)
    first = r.backward([(y, r.one(y))], [w], retain_graph=True, create_graph=True)[w]
    assert first in r.tape.tracked
    second = r.backward([(first, r.one(first))], [w])[w]
    assert r.run([first, second], [2.0, -1.0])[1].tolist() == [12.0, -6.0]


def test_an_entry_with_its_own_formula():
    r = Recording()
    w = r.leaf(2)
    r.on = False
    y = r.b.floor(w)
    r.on = True
    r.tape.add(Entry((w,), (y,), lambda b, cts, need: (b.mul(cts[0], 7.0),), "straight_through"))
    found = r.backward([(y, r.one(y))], [w])
    assert r.run([found[w]], [1.5, 2.5])[0].tolist() == [7.0, 7.0]


def test_an_entry_may_give_no_cotangent():
    r = Recording()
    w = r.leaf(2)
    r.on = False
    y = r.b.floor(w)
    r.on = True
    r.tape.add(Entry((w,), (y,), lambda b, cts, need: (None,), "none"))
    assert r.backward([(y, r.one(y))], [w]) == {}


def test_no_grad_arguments_get_zeros():
    r = Recording()
    w = r.leaf(2)
    y = r.b.floor(w)
    found = r.backward([(y, r.one(y))], [w])
    assert r.run([found[w]], [1.5, 2.5])[0].tolist() == [0.0, 0.0]
    assert zeros(r.b, w).type == w.type


# --- formulas at the points where they are easy to get wrong ---------------------------------


def vec(*xs: float) -> torch.Tensor:
    return torch.tensor(xs, dtype=torch.float32)


def gradients(function: Callable, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of the sum of function(*inputs), by capture; checked against torch autograd."""

    def step(*xs):
        function(*xs).sum().backward()

    ours = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.clone().requires_grad_() for x in inputs]
    call(step, *ours)
    step(*theirs)
    for mine, his in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, his.grad, equal_nan=True)
    return [x.grad for x in ours]


def test_ties():
    x = vec(-1, 0, 1, 2)
    assert gradients(lambda x: x.clamp(min=0), x)[0].tolist() == [0, 1, 1, 1]
    assert gradients(lambda x: x.clamp(-1, 1), x)[0].tolist() == [1, 1, 1, 0]
    assert gradients(torch.relu, x)[0].tolist() == [0, 0, 1, 1]
    assert gradients(F.relu, vec(-0.0, nan))[0].tolist()[0] == 0
    assert gradients(torch.abs, vec(-2, 0, -0.0, 3))[0].tolist() == [-1, 0, 0, 1]
    a, b = gradients(torch.maximum, vec(1, 2, 3), vec(1, 3, 2))
    assert (a.tolist(), b.tolist()) == ([0.5, 0, 1], [0.5, 1, 0])
    a, b = gradients(torch.minimum, vec(1, 2, 3), vec(1, 3, 2))
    assert (a.tolist(), b.tolist()) == ([0.5, 1, 0], [0.5, 0, 1])
    assert gradients(lambda x: x.amax(), vec(2, 1, 2, 2))[0].tolist() == pytest.approx(
        [1 / 3, 0, 1 / 3, 1 / 3]
    )
    assert gradients(lambda x: x.max(), vec(2, 1, 2, 1))[0].tolist() == [0.5, 0, 0.5, 0]
    assert gradients(lambda x: x.amin(0), vec(2, 1, 1, 2))[0].tolist() == [0, 0.5, 0.5, 0]
    assert gradients(torch.sign, x)[0].tolist() == [0, 0, 0, 0]


def test_the_ends_of_the_range():
    assert gradients(torch.sigmoid, vec(-100, 100, -1000, 0))[0].tolist() == [0, 0, 0, 0.25]
    assert gradients(torch.sqrt, vec(0, 4))[0].tolist() == [inf, 0.25]
    assert gradients(torch.rsqrt, vec(0, 4))[0].tolist() == [-inf, -0.0625]
    assert gradients(torch.log, vec(0, -0.0, 2))[0].tolist() == [inf, -inf, 0.5]
    assert gradients(torch.tanh, vec(-100, 100))[0].tolist() == [0, 0]
    assert gradients(torch.exp, vec(-inf, 0))[0].tolist() == [0, 1]


@pytest.mark.parametrize("exponent", [0, 1, 2, 3, 0.5, -1, 2.5, -0.5, 0.0, 1.0, nan])
def test_pow_at_zero_and_negative_bases(exponent):
    gradients(lambda x: x**exponent, vec(0, -0.0, -2, -0.5, 3, inf, nan))


def test_pow_of_tensors():
    gradients(torch.pow, vec(0, 0, 0, -2, -2, 2, 0), vec(0, 1, 2, 2, 1.5, 0, 0.5))
    gradients(lambda e: 2.0**e, vec(-1, 0, 3))
    gradients(lambda e: 0.0**e, vec(1, 0, 3))
    gradients(lambda e: (-2.0) ** e, vec(1, 0, 2))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.clamp(-1, 1),
        torch.relu,
        torch.abs,
        torch.sigmoid,
        torch.sqrt,
        lambda x: torch.maximum(x, x * 0 + 1),
        lambda x: x.amax(),
        lambda x: x.min(),
        lambda x: torch.where(x > 0, x, 0 * x),
        lambda x: x.clamp(min=x.detach() * 0, max=x.detach() * 0 + 1),
        lambda x: x.mean(),
        lambda x: 1 / x,
        lambda x: x % 2,
    ],
)
def test_nan_and_infinities(function):
    gradients(function, vec(nan, 1.0, -0.5))
    gradients(function, vec(inf, 1.0, -0.5))


# --- finite differences in random directions ---------------------------------------------------

SMOOTH = {
    "polynomial": lambda a, b: (a**3 - 2 * a * b + b.pow(2) / 3).sum(),
    "division": lambda a, b: (a / (b * b + 1) + 2 / (a.exp() + 1)).mean(),
    "logistic": lambda a, b: (torch.sigmoid(a @ b.t()) * torch.tanh(b @ a.t())).sum(),
    "log softmax": lambda a, b: (a - a.exp().sum(1, keepdim=True).log()).mul(b).mean(),
    "norm": lambda a, b: (
        (a - a.mean(0)) * torch.rsqrt((a - a.mean(0)).pow(2).mean(0) + 0.1) * b
    ).sum(),
    "views": lambda a, b: (a.t()[1:].reshape(-1) * b.view(-1)[:9].expand(2, 9).sum(0)).sum(),
    "layers": lambda a, b: F.mse_loss(F.linear(torch.tanh(a @ b.t()), b.t()), b),
    "powers": lambda a, b: ((a * a + 0.5) ** (b * 0.5)).sum() + (1.5**a).sum(),
    "trig": lambda a, b: (a.sin() * b.cos() + (a * a + 1).sqrt()).sum(),
    "select": lambda a, b: (torch.where(a > 0, a * b, b * b) + a.clamp(-0.5, 0.5) ** 2).sum(),
    "in place": lambda a, b: (a * 1).mul_(b).add_(a, alpha=0.5).exp_().sum(),
    "slices": lambda a, b: _assigned(a, b),
}


def _assigned(a, b):
    x = torch.zeros(6, 4, dtype=a.dtype)
    x[::2] = a * b
    x[1:, 1::2] *= 2.0
    x[1] = a[0].exp()
    return (x**3).sum()


def two_matrices() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return tuple(torch.randn(3, 4, generator=g, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("name", SMOOTH)
def test_against_finite_differences(name):
    function, (a, b), (u, w) = SMOOTH[name], two_matrices(), two_matrices()
    u, w = u.flip(0), w.flip(1)

    def step(a, b):
        return torch.autograd.grad(function(a, b), (a, b))

    ga, gb = call(step, a.clone().requires_grad_(), b.clone().requires_grad_())
    h = 1e-6
    slope = (function(a + h * u, b + h * w) - function(a - h * u, b - h * w)) / (2 * h)
    torch.testing.assert_close((ga * u).sum() + (gb * w).sum(), slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", SMOOTH)
def test_second_order(name):
    """Hessian-vector products, twice by reverse mode, against torch's."""
    function, (a, b) = SMOOTH[name], two_matrices()

    def step(a, b):
        grads = torch.autograd.grad(function(a, b), (a, b), create_graph=True)
        inner = sum((g * (i + 1.5 - g.detach())).sum() for i, g in enumerate(grads))
        return (*torch.autograd.grad(inner, (a, b)), *(g.detach() for g in grads))

    ours = call(step, a.clone().requires_grad_(), b.clone().requires_grad_())
    theirs = step(a.clone().requires_grad_(), b.clone().requires_grad_())
    for mine, his in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, his, rtol=1e-10, atol=1e-10)


def test_third_order():
    def step(x):
        y = (x.tanh() * x).sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(y, x, create_graph=True)
            y = (g * g).sum()
        y.backward()

    ours = torch.linspace(-1, 1, 5, dtype=torch.float64).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    call(step, ours)
    step(theirs)
    torch.testing.assert_close(ours.grad, theirs.grad)


# --- what backward refuses ---------------------------------------------------------------------


def leaf() -> torch.Tensor:
    return torch.linspace(0.5, 2, 4).requires_grad_()


def both_raise(step: Callable, message: str) -> None:
    """Eager and capture raise with the same words."""
    with pytest.raises(RuntimeError, match=message):
        step(leaf())
    with pytest.raises(AutogradError, match=message):
        call(step, leaf())


def both_run(step: Callable) -> None:
    ours, theirs = leaf(), leaf()
    call(step, ours)
    step(theirs)
    assert (ours.grad is None) == (theirs.grad is None)
    if theirs.grad is not None:
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_second_backward():
    def twice(w):
        loss = (w * w).exp().sum()
        loss.backward()
        loss.backward()

    def shared(w):
        h = w.exp()
        h.sum().backward()
        (h * 2).sum().backward()

    def linear_only(w):  # nothing saved: eager allows it
        loss = (w - 1 + w).sum()
        loss.backward()
        loss.backward()

    def separate(w):
        h = w + 1
        (h * h).sum().backward()
        (h * 3).sum().backward()

    both_raise(twice, "backward through the graph a second time")
    both_raise(shared, "backward through the graph a second time")
    both_run(linear_only)
    both_run(separate)


def test_saved_tensors_are_checked_by_version():
    message = "modified by an inplace operation"

    def result(w):
        y = w.exp()
        y.mul_(2)
        y.sum().backward()

    def operand(w):
        x = torch.ones(4)
        y = w * x
        x.add_(1)
        y.sum().backward()

    def view(w):
        x = torch.ones(2, 4)
        y = w * x[0]
        x[1] = 5.0
        y.sum().backward()

    def detached(w):
        y = w.exp()
        y.detach().zero_()
        y.sum().backward()

    def own_operand(w):
        y = w * 1
        y.mul_(y)
        y.sum().backward()

    def matrix(w):
        a = torch.ones(4, 4)
        y = w.view(1, 4) @ a
        a.zero_()
        y.sum().backward()

    for step in (result, operand, view, detached, own_operand, matrix):
        both_raise(step, message)

    def not_saved(w):
        x = torch.ones(4)
        y = w + x
        x.add_(1)
        y.add_(2)
        y.sum().backward()

    def own_saved_copy(w):
        y = w * 1
        y.pow_(2).clamp_(0.1, 3).tanh_()
        y.sum().backward()

    def not_needed(w):
        x = w.detach() * 1
        y = x * w
        z = torch.ones(4)
        (z * y).sum().backward()
        x.zero_()

    def after_backward(w):
        y = (w * w).sum()
        y.backward()
        with torch.no_grad():
            w.zero_()

    for step in (not_saved, own_saved_copy, not_needed, after_backward):
        both_run(step)


def test_roots():
    both_raise(
        lambda w: (w * 2).backward(), "grad can be implicitly created only for scalar outputs"
    )
    both_raise(lambda w: w.detach().sum().backward(), "does not require grad")
    both_run(lambda w: (w * 2).sum().reshape(1, 1).backward())
    both_run(lambda w: (w * w).backward(w.detach()))
    both_run(lambda w: w.sum().backward())
    both_run(lambda w: w.backward(torch.ones(4)))
    both_run(lambda w: torch.autograd.backward([w.sum(), w * 2], [None, torch.ones(4)]))
    both_run(lambda w: torch.autograd.backward((w.sum(), (w * w).sum())))


def test_mixed_dtypes_accumulate_in_the_leaf_dtype():
    def step(w):
        (w.double() * 2).sum().backward()
        (w.to(torch.bfloat16) * 3).sum().float().backward()
        assert w.grad.dtype is torch.float32

    both_run(step)


def test_backward_under_no_grad():
    """Views keep their history there: a root, what is asked for, and what retains its gradient."""

    def root(x):
        loss = (x * 2)[0]
        with torch.no_grad():
            loss.backward()
        return x.grad

    def retained(x):
        view = (x * 2)[1:]
        view.retain_grad()
        loss = (view * view).sum()
        with torch.no_grad():
            loss.backward()
        return view.grad, x.grad

    def asked_for(x):
        view = (x * 2)[1:]
        loss = (view * view).sum()
        with torch.no_grad():
            return torch.autograd.grad(loss, view)

    for step in (root, retained, asked_for):
        make = lambda: torch.linspace(0.5, 2, 4).requires_grad_()  # noqa: E731
        torch.testing.assert_close(tracejit.compile(step)(make()), step(make()))
