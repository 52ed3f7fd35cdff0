"""softmax, log_softmax, softmin and logsumexp, in rows along an axis."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps

import torch

from tracejit.capture.functions.common import (
    as_float,
    cast,
    normal_axes,
    normal_axis,
    register,
)
from tracejit.capture.functions.derived import derived, require_float, spread
from tracejit.capture.functions.reduction import keep
from tracejit.capture.functions.unary import FUNCTIONS
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import TO_IR, Ints, TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Value

Tensor = torch.Tensor


def _less_max(t: Trace, x: Value, axes: Ints) -> Value:
    top = t.b.reduce_max(x, axes=axes)
    return t.b.sub(x, spread(t, top, x.type.shape, axes))


def _sum(t: Trace, x: Value, axes: Ints) -> Value:
    """The sum over axes, spread over them again."""
    return spread(t, t.b.reduce_sum(x, axes=axes), x.type.shape, axes)


def softmax_value(t: Trace, x: Value, axis: int, *, masked: bool = False) -> Value:
    """exp(x - max) / sum(exp(x - max)); its gradient is y·(g - sum(g·y)).

    A row of nothing but -inf is NaN, or 0 where rows are `masked` scores.
    """
    b, axes = t.b, (axis,)

    def forward(x: Value) -> Value:
        top = b.reduce_max(x, axes=axes)
        if masked:
            top = b.where(b.eq(top, -math.inf), 0.0, top)
        power = b.exp(b.sub(x, spread(t, top, x.type.shape, axes)))
        total = b.reduce_sum(power, axes=axes)
        if masked:
            total = b.where(b.eq(total, 0.0), 1.0, total)
        return b.div(power, spread(t, total, x.type.shape, axes))

    def backward(g: Value, y: Value, x: Value) -> Value:
        gy = b.mul(g, y)
        return b.sub(gy, b.mul(y, _sum(t, gy, axes)))

    y = derived(t, "softmax", (x,), forward, (backward,))
    t.ranges[y] = 0.0, 1.0
    return y


def log_softmax_value(t: Trace, x: Value, axis: int) -> Value:
    """x - max - log(sum(exp(x - max))); its gradient is g - exp(y)·sum(g)."""
    b, axes = t.b, (axis,)

    def forward(x: Value) -> Value:
        less = _less_max(t, x, axes)
        return b.sub(less, b.log(_sum(t, b.exp(less), axes)))

    def backward(g: Value, y: Value, x: Value) -> Value:
        return b.sub(g, b.mul(b.exp(y), _sum(t, g, axes)))

    y = derived(t, "log_softmax", (x,), forward, (backward,))
    t.ranges[y] = -math.inf, 0.0
    return y


def _along(name: str, emit):
    """A function of rows: a cast first if a dtype is given; 0-d tensors are rows of one."""

    def function(
        t: Trace, input: Tensor, dim: int | None = None, dtype: torch.dtype | None = None
    ) -> TracedTensor:
        h = t.lift(input)
        if dim is None:
            rank = len(h.shape)  # what torch.nn.functional takes when it is not told
            dim = 0 if rank in (0, 1, 3) else 1
        axis = normal_axis(t, dim, len(h.shape))
        x = t.read(h)
        x = x if dtype is None else cast(t, x, TO_IR[dtype])
        require_float(t, name, x)
        if not h.numel:
            return t.fresh(t.b.alias(x))
        row = x if h.shape else t.b.reshape(x, shape=(1,))
        y = emit(t, row, axis)
        return t.fresh(y if h.shape else t.b.reshape(y, shape=()))

    return function


softmax = _along("softmax", softmax_value)
log_softmax = _along("log_softmax", log_softmax_value)


def logsumexp(t: Trace, input: Tensor, dim: object, keepdim: bool = False) -> TracedTensor:
    """log(sum(exp(x))), with the finite part of the maximum taken out; gradient g·exp(x - y)."""
    h, b = t.lift(input), t.b
    axes = normal_axes(t, dim, len(h.shape))
    x = cast(t, t.read(h), as_float(h.dtype))
    if not axes:
        x = b.reshape(x, shape=(1,))
        axes = (0,)
    empty = any(x.type.shape[a] == 0 for a in axes)

    def forward(x: Value) -> Value:
        if empty:
            return b.log(b.reduce_sum(b.exp(x), axes=axes))
        top = b.reduce_max(x, axes=axes)
        top = b.where(b.eq(b.abs(top), math.inf), 0.0, top)
        power = b.exp(b.sub(x, spread(t, top, x.type.shape, axes)))
        return b.add(b.log(b.reduce_sum(power, axes=axes)), top)

    def backward(g: Value, y: Value, x: Value) -> Value:
        shape = x.type.shape
        return b.mul(spread(t, g, shape, axes), b.exp(b.sub(x, spread(t, y, shape, axes))))

    y = derived(t, "logsumexp", (x,), forward, (backward,))
    return t.fresh(keep(t, y, h.shape, axes, keepdim and bool(h.shape)))


def _functional(implementation: Callable) -> Callable:
    """The signature of torch.nn.functional: a stack level stands before the dtype."""

    @wraps(implementation)
    def with_level(
        t: Trace,
        input: Tensor,
        dim: int | None = None,
        _stacklevel: int = 3,
        dtype: torch.dtype | None = None,
    ) -> TracedTensor:
        return implementation(t, input, dim, dtype)

    return with_level


def softmin(
    t: Trace, input: Tensor, dim: int | None = None, dtype: torch.dtype | None = None
) -> TracedTensor:
    """softmax(-x)."""
    return softmax(t, FUNCTIONS["neg"](t, input), dim, dtype)


for _name, _implementation in (("softmax", softmax), ("log_softmax", log_softmax)):
    _own = {getattr(torch.nn.functional, _name): _functional(_implementation)}
    register((_name,), _implementation, inplace=False, others=_own)
register(("logsumexp",), logsumexp, inplace=False)
rule(torch.nn.functional.softmin)(_functional(softmin))
