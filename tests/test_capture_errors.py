"""What capture refuses, or eager rejects: which error, where, and nothing is left changed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from support.capture_checks import leaf, loss_of, randn, same
from support.oracle import call
from tracejit.errors import (
    AutogradError,
    AxisError,
    LeakedTracer,
    ShapeError,
    TracejitError,
    UnsupportedOperation,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of eager

FILE = __file__


# --- errors ------------------------------------------------------------------------------------


def _if_tensor(w, x):
    if w.sum() > 0:
        return w


def _leaf_in_place(w, x):
    w += 1


def _view_of_leaf_in_place(w, x):
    w[0] = 1.0


def _leaf_in_place_under_enable(w, x):
    with torch.no_grad(), torch.enable_grad():
        w.mul_(2)


def _quiet_view_in_place(w, x):
    with torch.no_grad():
        v = w[0]
    v.mul_(2)


def _no_graph(w, x):
    x.sum().backward()


def _twice(w, x):
    loss = loss_of(w, x)
    loss.backward()
    loss.backward()


def _not_scalar(w, x):
    (w * x).backward()


def _saved_modified(w, x):
    h = w * x
    y = h.exp()
    y.add_(1)
    y.sum().backward()


def _saved_input_modified(w, x):
    h = w * 1
    y = h * h
    h.zero_()
    y.sum().backward()


def _unused_raises(w, x):
    torch.autograd.grad(loss_of(w, x), torch.ones(2, requires_grad=True))


def _not_requiring(w, x):
    torch.autograd.grad(loss_of(w, x), x)


def _wrong_gradient(w, x):
    (w * x).backward(torch.ones(4))


def _requires_grad_off(w, x):
    (w * 2).requires_grad_(False)


def _integers_require_grad(w, x):
    torch.zeros(2, dtype=torch.int64).requires_grad_()


def _overlapping_copy(w, x):
    x[1:] = x[:-1]


def _overlapping_sum(w, x):
    x[:-1].add_(x[1:])


def _transposed_sum(w, x):
    m = torch.ones(3, 3)
    m += m.t()


def _shapes(w, x):
    w + torch.ones(4)


def _matrix_shapes(w, x):
    torch.ones(2, 3) @ torch.ones(2, 3)


def _out_of_range(w, x):
    x[7]


def _axis(w, x):
    x.sum(3)


def _grad_shape(w, x):
    w.grad = torch.ones(5)


def _out_needs_grad(w, x):
    torch.add(w, x, out=x)


REJECTED = [
    (_out_needs_grad, AutogradError),
    (_leaf_in_place, AutogradError),
    (_view_of_leaf_in_place, AutogradError),
    (_leaf_in_place_under_enable, AutogradError),
    (_quiet_view_in_place, AutogradError),
    (_no_graph, AutogradError),
    (_twice, AutogradError),
    (_not_scalar, AutogradError),
    (_saved_modified, AutogradError),
    (_saved_input_modified, AutogradError),
    (_unused_raises, AutogradError),
    (_not_requiring, AutogradError),
    (_wrong_gradient, ShapeError),
    (_requires_grad_off, AutogradError),
    (_integers_require_grad, AutogradError),
    (_overlapping_copy, ShapeError),
    (_overlapping_sum, ShapeError),
    (_transposed_sum, ShapeError),
    (_shapes, ShapeError),
    (_matrix_shapes, ShapeError),
    (_out_of_range, AxisError),
    (_axis, AxisError),
    (_grad_shape, ShapeError),
]


def _unknown_function(w, x):
    torch.linalg.eig(x.view(3, 1))


def _hook_of_one_of_several(w, x):
    (w * x).split(1)[0].register_hook(print)


def _after_draws(w, x):
    torch.bernoulli(torch.rand(3).to_sparse(), out=torch.nn.functional.dropout(x[:3]))


def _out_overlaps(w, x):
    torch.sub(x[1:], x[:-1], out=x[1:])


def _out_argument(w, x):
    torch.add(x, x, out=x.new_empty(0))  # eager resizes it


def _cast_complex(w, x):
    x.to(torch.complex64)


def _other_device(w, x):
    x.to("meta")


def _lstm_under_autocast(w, x):
    states, weights = torch.zeros(1, 2, 3), [torch.zeros(12, 3)] * 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.lstm(states, (states, states), weights, False, 1, 0.0, True, False, False)


def _graph_of_intermediate(w, x):
    return (w * x).grad_fn


def _resize(w, x):
    x.resize_(7)


def _set_(w, x):
    x.set_(x + 1)


REFUSED = [
    *(
        (step, UnsupportedOperation)
        for step in (
            _unknown_function,
            _hook_of_one_of_several,
            _after_draws,
            _out_argument,
            _out_overlaps,
            _cast_complex,
            _other_device,
            _lstm_under_autocast,
            _graph_of_intermediate,
            _resize,
        )
    ),
    (_set_, LeakedTracer),
]


def after_some_effects(step: Callable) -> Callable:
    """The step after writes, a backward and a `.grad` of its own: all must be undone."""

    def started(w, x, buffer):
        buffer.add_(1.0)
        loss_of(w, x).backward()
        with torch.no_grad():
            w.mul_(2.0)
        return step(w, x)

    return started


@pytest.mark.parametrize(
    "step, error", REJECTED + REFUSED, ids=lambda p: getattr(p, "__name__", "")
)
@pytest.mark.sweep(0.34)
def test_errors_leave_everything_as_it_was(step, error):
    w, x, buffer = leaf(3), randn(3), randn(2)
    w.grad = torch.ones(3)
    kept, values = w.grad, [t.detach().clone() for t in (w, w.grad, x, buffer)]
    versions = [t._version for t in (w, w.grad, x, buffer)]
    with pytest.raises(error) as caught:
        call(after_some_effects(step), w, x, buffer)
    assert isinstance(caught.value, TracejitError)
    first = step.__code__.co_firstlineno
    lines = range(first, first + 12)
    assert any(f"{FILE}:{n}" in str(caught.value) for n in lines), caught.value
    assert w.grad is kept
    for tensor, value, version in zip((w, w.grad, x, buffer), values, versions, strict=True):
        assert torch.equal(tensor, value) and tensor._version == version
    assert torch.is_grad_enabled()
    call(lambda w, x: loss_of(w, x).backward(), w, x)  # and the next call works


@pytest.mark.parametrize("step, error", REJECTED, ids=lambda p: getattr(p, "__name__", ""))
def test_eager_rejects_it_too(step, error):
    builtin = IndexError if error is AxisError else RuntimeError
    with pytest.raises(builtin):
        step(leaf(3), randn(3))
    assert issubclass(error, builtin)


@pytest.mark.parametrize("step", [_shapes, _matrix_shapes, _unknown_function, _out_argument])
def test_errors_name_function_and_shapes(step):
    with pytest.raises(TracejitError, match=r"(float32|f32)\[\d+(, ?\d+)*\]"):
        call(step, leaf(3), randn(3))


# --- tensors that cannot take part -------------------------------------------------------------


class Sub(torch.Tensor):
    pass


def with_hook() -> torch.Tensor:
    y = leaf(3) * 2
    y.register_hook(lambda g: g)
    return y


@pytest.mark.parametrize(
    "make",
    [
        lambda: randn(3).as_subclass(Sub),
        lambda: torch.ones(3, dtype=torch.complex64, requires_grad=True),
        lambda: torch.ones(3).to_sparse(),
        lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
        lambda: torch.ones(3, device="meta"),
        lambda: torch.quantize_per_tensor(randn(3), 0.1, 0, torch.qint8),
        with_hook,
    ],
    ids=[
        "subclass",
        "complex",
        "sparse",
        "neg",
        "meta",
        "quantized",
        "hook",
    ],
)
def test_refused_inputs(make):
    with pytest.raises(UnsupportedOperation, match=rf"{FILE}:\d+"):
        call(lambda x: x + 1, make())


def test_gradients_do_not_leave_the_step_by_an_inner_backward():
    y = leaf(3) * 2
    with pytest.raises(UnsupportedOperation, match="outside the step"):
        call(lambda y: (y * 3).sum().backward(), y)


def test_a_result_of_autograd_is_fine_without_grad():
    y = leaf(3) * 2

    def step(y):
        with torch.no_grad():
            return y * 2

    with torch.no_grad():
        torch.testing.assert_close(call(step, y), y * 2)


def test_overlapping_views_are_refused_where_one_is_written():
    base = randn(4)
    torch.testing.assert_close(
        call(lambda a, b: a.sum() + b.sum(), base, base[1:]), base.sum() * 2 - base[0]
    )
    for step in (lambda a, b: [a.sum(), b.mul_(2)], lambda a, b: [a.mul_(2), b.sum()]):
        with pytest.raises(UnsupportedOperation, match="overlap"):
            call(step, base, base[1:])


def test_disjoint_views_are_fine():
    def step(a, b):
        a.mul_(b)
        return a

    base, twin = randn(4), randn(4)
    step(twin[:2], twin[2:])
    call(step, base[:2], base[2:])
    torch.testing.assert_close(base, twin)


class Scale:
    """A number-like object that handles tensors itself."""

    def __radd__(self, other):
        return other * 2 + 1


def test_operands_of_other_classes():
    def step(x):
        numbers = x * np.float32(2), x + np.int64(3), x * np.float64(2.5), np.bool_(True) == x
        return x == None, x != "s", x + Scale(), x == None, numbers  # noqa: E711

    same(step, randn(3))
    with pytest.raises(TypeError, match="unsupported operand"):
        call(lambda x: x + "s", randn(3))
