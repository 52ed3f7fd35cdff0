"""In-place views in whole steps: the tensor object lies otherwise in its memory, as in eager."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch

import tracejit
from support.capture_checks import sharing
from tracejit.errors import UnsupportedOperation


def seen(x: torch.Tensor) -> tuple:
    """What a tensor tells of its place in memory."""
    return tuple(x.shape), x.stride(), x.storage_offset(), x.is_contiguous(), x.dim(), len(x)


def transposed(x):
    y = x * 2
    first = seen(y)
    z = y.t_()
    assert z is y
    return y, first, seen(y), (y * torch.arange(24.0).reshape(8, 3)).sum()


def each(x):
    a, b, c, d, e, f = (x.detach() * k for k in range(1, 7))
    a.transpose_(0, 1)
    b.swapaxes_(-1, 0)
    c.swapdims_(0, 1).mul_(3)
    d.unsqueeze_(1).add_(x.detach()[:, None])
    e.unsqueeze_(0).unsqueeze_(-1).squeeze_(0).squeeze_()
    f.as_strided_((2, 5), (8, 1), 3)
    g = (x.detach()[:1] * 2).unsqueeze_(0).squeeze_((0, 1))
    return a, b, c, d, e, f, g, torch.as_strided_(x.detach() + 1, (4,), (6,))


def with_history(x):
    y = x * 2
    row = y[1:]
    y.t_()
    y.mul_(torch.arange(24.0).reshape(8, 3))
    row.transpose_(0, 1)
    return row * 3, y.exp(), seen(row)


def of_a_view(x):
    y = x * 2
    view = y[1:]
    view.t_()
    view.mul_(3)
    return y * torch.arange(24.0).reshape(3, 8), view


def of_one_element_more(x):
    y = x.sum(0)
    y.unsqueeze_(0)
    return torch.cat([y, x]), seen(y)


class Holder:
    """Any object."""


def in_an_object(x):
    holder = Holder()
    holder.y = x.tanh() + 1
    holder.y.t_()
    return (holder.y @ x).tanh(), len(holder.y), holder.y.shape[0]


def expanded(x):
    return x.sum(1, keepdim=True).expand(3, 8).t_() * 2


def without_autograd(x):
    with torch.no_grad():
        y = x * 2
        y.t_()
        y[0] = 7.0
    return y, y.t() * x, x.detach().conj_physical().conj_physical_()


def hooked(x):
    y = x * 2
    y.register_hook(lambda g: g * 3)
    y.t_()
    return (y * torch.arange(24.0).reshape(8, 3)).sum()


STEPS = {
    f.__name__.replace("_", " "): f
    for f in (
        *(transposed, each, with_history, of_a_view, of_one_element_more, in_an_object),
        *(expanded, without_autograd, hooked),
    )
}


def differentiated(function: Callable) -> Callable:
    """A step that calls a function, and differentiates what has a history."""

    def step(x):
        out = function(x)
        out = out if isinstance(out, tuple) else (out,)
        x.grad = None
        parts = [o for o in out if torch.is_tensor(o)]
        tracked = [o for o in parts if o.requires_grad]
        if tracked:
            sum(
                (o * torch.arange(1.0, o.numel() + 1).view(o.shape)).sum() for o in tracked
            ).backward()
        return [o.detach() for o in parts], [o for o in out if not torch.is_tensor(o)]

    return step


@pytest.mark.parametrize("mode", ["rerun", "auto"])
@pytest.mark.parametrize("backend", ["c", "numpy"])
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.sweep(0.34)
def test_steps(name: str, backend: str, mode: str):
    step = differentiated(STEPS[name])
    compiled = tracejit.compile(step, backend=backend, mode=mode, on_unsupported="raise")
    torch.manual_seed(4)
    for _ in range(4):
        x = torch.randn(3, 8)
        mine, theirs = (x.clone().requires_grad_() for _ in range(2))
        (ours, said), (eager, expected) = compiled(mine), step(theirs)
        assert said == expected
        assert sharing([*ours, mine]) == sharing([*eager, theirs])
        for a, b in zip((*ours, mine, mine.grad), (*eager, theirs, theirs.grad), strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert (a.stride(), a.storage_offset()) == (b.stride(), b.storage_offset())
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def saved_before(x):
    y = x * 2
    z = y * y
    y.t_()
    z.sum().backward()


def saved_itself(x):
    y = x.exp()
    y.t_()
    y.sum().backward()


REJECTED = {
    "a leaf": lambda x: x.t_(),
    "a view of a leaf": lambda x: x[1:].t_(),
    "one of several": lambda x: (x * 2).split(2, 1)[0].t_(),
    "saved before": saved_before,
    "saved itself": saved_itself,
    "three axes": lambda x: (x * 2)[None].t_(),
}


@pytest.mark.parametrize("name", REJECTED)
def test_what_eager_rejects(name: str):
    step = REJECTED[name]
    for run in (step, tracejit.compile(step)):
        with pytest.raises(RuntimeError):
            run(torch.randn(3, 8, requires_grad=True))


def without_grad(x):
    y = x * 2
    with torch.no_grad():
        y.t_()
    return y


def retained(x):
    y = x * 2
    y.retain_grad()
    y.t_()
    return y.sum()


REFUSED = {"under no_grad": (without_grad, "another shape"), "retained": (retained, "retain_grad")}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str):
    step, reason = REFUSED[name]
    with pytest.raises(UnsupportedOperation, match=reason):
        tracejit.compile(step, on_unsupported="raise")(torch.randn(3, 8, requires_grad=True))


def test_tensors_from_outside_keep_their_shape():
    """Such a step falls back, or is refused; it is never done by half."""

    def step(x):
        return x.t_() * 2

    with pytest.raises(UnsupportedOperation, match="from outside"):
        tracejit.compile(step, on_unsupported="raise")(torch.randn(3, 8))
    x, y = torch.randn(3, 8), torch.randn(3, 8)
    compiled = tracejit.compile(step, on_unsupported="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for given in (x, y, x):
            assert torch.equal(compiled(given), given * 2)
    assert (x.shape, y.shape) == ((3, 8), (8, 3))
