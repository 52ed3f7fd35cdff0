"""Views of the whole of a tensor (`w[:]`, `w.expand(same)`), and views of views: to autograd each
is a tensor of its own, with a gradient of its own, inside a step and outside of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import tracejit

grad = torch.autograd.grad


def leaf() -> torch.Tensor:
    return torch.arange(1.0, 9.0).requires_grad_()


VIEWS: dict[str, Callable] = {
    "slice": lambda x: x[:],
    "ellipsis": lambda x: x[...],
    "expand": lambda x: x.expand(8),
    "expand_as": lambda x: x.expand_as(x),
    "broadcast_to": lambda x: torch.broadcast_to(x, (8,)),
    "view": lambda x: x.view(8),
    "view_as": lambda x: x.view_as(x),
    "reshape": lambda x: x.reshape(8),
    "transposed twice": lambda x: x.unsqueeze(0).mT.mT.squeeze(0),
    "narrow": lambda x: x.narrow(0, 0, 8),
    "squeeze": lambda x: x.squeeze(),
    "flatten": lambda x: x.flatten(),
    "movedim": lambda x: x.movedim(0, 0),
    "chunk": lambda x: x.chunk(1)[0],
    "a view of a view": lambda x: x[:].expand(8)[:],
    "clone": lambda x: x.clone(),
}


def gradient_of_view(view: Callable) -> Callable:
    """Of a product of a tensor and its view, by each of them."""

    def step(w, y):
        z = view(y)
        return *grad((y * z * z).sum(), (z, y), retain_graph=True), grad((y + z).sum(), w)[0]

    return step


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("of", [lambda w: w, lambda w: w * 3], ids=["leaf", "intermediate"])
def test_a_gradient_of_its_own(view: Callable, of: Callable):
    def step(w):
        return gradient_of_view(view)(w, of(w))

    expected, w = step(leaf()), leaf()
    compiled = tracejit.compile(step, backend="numpy")
    for _ in range(3):
        torch.testing.assert_close(compiled(w), expected, rtol=0, atol=0)


def retained(w):
    y = w[:]
    y.retain_grad()
    z = y.view(2, 4)
    z.retain_grad()
    (y * w).sum().backward(retain_graph=True)
    z[0].sum().backward()
    return y.grad, z.grad, w.grad


def hooked(w):
    y = w * 3
    z, v = y[:], y.view(2, 4)
    q = v[1]
    z.register_hook(lambda g: g * 2)
    v.register_hook(lambda g: g * 3)
    q.register_hook(lambda g: g + 1)
    ((z * y).sum() + (q * q).sum()).backward()
    return w.grad


def looked_at_meanwhile(w):
    z = (w * 2).view(2, 4)
    loss = (z * z).sum()
    with torch.no_grad():
        mean = z.mean()
    return *grad(loss, z), mean


def written_meanwhile(w):
    """A view whose base was written to is one of the base, no longer of the view that made it."""
    y = w * 2
    z = y.view(2, 4)
    q = z[1]
    before = (q * 3).sum()
    y.mul_(w)
    return *grad(q.sum() + before, (z, w), allow_unused=True), q.detach()


def written_through(w):
    y = w * 3
    z = y[:]
    z.mul_(w)
    return *grad(y.sum(), w), z.detach()


@pytest.mark.parametrize(
    "step", [retained, hooked, looked_at_meanwhile, written_meanwhile, written_through]
)
def test_views_of_views(step: Callable):
    expected = step(leaf())
    compiled = tracejit.compile(step, backend="numpy")
    for _ in range(3):
        for ours, eager in zip(compiled(leaf()), expected, strict=True):
            assert (ours is None) == (eager is None)
            if eager is not None:
                torch.testing.assert_close(ours, eager, rtol=0, atol=0)


RETURNED: dict[str, Callable] = {
    **VIEWS,
    "two": lambda w: (w.view_as(w), w[:]),
    "halves": lambda w: (w[:4], w[4:]),
    "a view and a product": lambda w: (w[:], w * 2),
    "a view and what depends on it": lambda w: (lambda y: (y, (y * w).sum(), y[2:5].sum()))(w[:]),
    "a view, and a view of that": lambda w: (lambda y: (y, y[1:]))(w[:]),
    "with what has no history": lambda w: (w[:], w.detach(), w),
    "overlapping": lambda w: (w[:4], w[2:].sum(), w[:]),
}


def weighted(x: torch.Tensor) -> torch.Tensor:
    return (x * torch.linspace(1, 2, x.numel()).view(x.shape)).sum()


@pytest.mark.parametrize("step", RETURNED.values(), ids=RETURNED)
def test_backward_outside(step: Callable):
    eager, ours = leaf(), leaf()
    compiled = tracejit.compile(step, backend="numpy")
    for _ in range(3):
        for run, w in ((step, eager), (compiled, ours)):
            found = run(w)
            found = found if isinstance(found, tuple) else (found,)
            sum(weighted(x) for x in found if x.requires_grad).backward()
        torch.testing.assert_close(ours.grad, eager.grad)


def test_gradients_of_what_was_returned():
    """By a returned view, and by one whose gradient goes through another."""

    def step(w):
        y = w[:]
        return y, (y * w).sum(), y[2:5]

    def both(run):
        w = leaf()
        y, loss, part = run(w)
        return grad(loss, (y, w), retain_graph=True), grad(weighted(part), (y, w))

    compiled = tracejit.compile(step, backend="numpy")
    for _ in range(3):
        torch.testing.assert_close(both(compiled), both(step))
