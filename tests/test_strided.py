"""as_strided in whole steps: its views see what is written to the memory, and write to it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import tracejit
from tracejit.errors import ShapeError, UnsupportedOperation
from tracejit.testing import assert_equal_to_eager

WINDOW = torch.hann_window(6)


def frames(x):
    """Windows that overlap, of what is computed, multiplied by a window function."""
    windows = (x * 2).as_strided((5, 6), (3, 1))
    return (windows * WINDOW).square().sum(1)


def read_after_write(x):
    y = x * 2
    view = y.as_strided((2, 3), (4, 1), 1)
    y.mul_(x)
    return view.sum(0), y


def write_through(x):
    y = x * 2
    view = y.as_strided((2, 3), (4, 1), 1)
    view.mul_(3)
    view[0].add_(1)
    view.t()[2].zero_()
    return y, view


def of_a_view(x):
    y = x * 2
    return y[4:].as_strided((2, 3), (3, 1)).exp(), y


def of_a_view_in_other_places(x):
    y = x.detach() * 2
    y[9:].as_strided((2, 3), (3, 1), 1).add_(1)
    return (y * x).as_strided((3, 2, 2), (1, 6, 0))


def returned(x):
    y = x * 2
    return y, y.as_strided((3, 3), (2, 1), 2)


def of_the_outside(x):
    with torch.no_grad():
        x.as_strided((2, 2), (5, 2), 3).mul_(1.5)
    return x * 1


STEPS = {
    f.__name__.replace("_", " "): f
    for f in (
        frames,
        read_after_write,
        write_through,
        of_a_view,
        of_a_view_in_other_places,
        returned,
        of_the_outside,
    )
}


def differentiated(function: Callable) -> Callable:
    def step(x):
        out = function(x)
        outs = out if isinstance(out, tuple) else (out,)
        x.grad = None
        sum((o * torch.arange(float(o.numel())).view(o.shape)).sum() for o in outs).backward()
        return tuple(o.detach() for o in outs)

    return step


@pytest.mark.parametrize("backend", ["c", "numpy"])
@pytest.mark.parametrize("name", STEPS)
def test_steps(name: str, backend: str):
    def arguments():
        torch.manual_seed(4)
        return (torch.randn(18).requires_grad_(),)

    assert_equal_to_eager(differentiated(STEPS[name]), arguments, calls=3, backend=backend)


def test_results_share_memory_as_in_eager():
    y, view = tracejit.compile(returned)(torch.randn(18))
    assert view.stride() == (2, 1) and view.storage_offset() == 2
    y.zero_()
    assert not view.any()


REFUSED = {
    "a write where elements meet": lambda x: (x * 2).as_strided((3, 3), (2, 1)).mul_(x[0]),
    "a write to a view of such": lambda x: (x * 2).as_strided((3, 3), (2, 1))[0].mul_(x[0]),
    "elements of others": lambda x: (x * 2)[9:].as_strided((3,), (1,), 0),
    "gaps": lambda x: (x * 2)[::2].as_strided((3,), (1,), 0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str):
    with pytest.raises(UnsupportedOperation, match="as_strided"):
        tracejit.compile(REFUSED[name])(torch.randn(18).requires_grad_())


def test_elements_out_of_bounds():
    def step(x):
        return (x * 2).as_strided((4, 5), (5, 1))

    for run in (step, tracejit.compile(step)):
        with pytest.raises(RuntimeError, match="out of bounds"):
            run(torch.randn(18))
    with pytest.raises(ShapeError):
        tracejit.compile(step)(torch.randn(19))
