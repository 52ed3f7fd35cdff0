"""Selection, element by element: maximum, minimum, clamp, where, masked_fill."""

from __future__ import annotations

import torch

from tracejit.capture.functions.common import (
    check_range,
    common_shape,
    expand,
    is_tensor,
    operand,
    operands_as,
    pointwise,
    register,
    result_dtype,
    result_strides,
    truth,
)
from tracejit.capture.functions.masks import nonzero
from tracejit.capture.functions.rows import elementwise, primitive
from tracejit.capture.trace.table import Row
from tracejit.capture.trace.tensor import TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Arg, Value
from tracejit.ir.types import b1, u8

Tensor = torch.Tensor

maximum = elementwise(Row("maximum", primitive("maximum"), arity=2), __name__)
minimum = elementwise(Row("minimum", primitive("minimum"), arity=2), __name__)


def clamp(t: Trace, input: Tensor, min: object = None, max: object = None) -> TracedTensor:
    """torch.clamp; its gradient passes where min <= x <= max, 1 at a tie."""
    if min is None and max is None:
        raise t.shape_error("At least one of 'min' or 'max' must not be None")
    bounds = [v for v in (min, max) if v is not None]

    def emit(x: Value, *limits: Arg) -> Value:
        low = limits[0] if min is not None else None
        high = limits[-1] if max is not None else None
        with t.untaped():
            out = x
            if low is not None:
                out = t.b.maximum(out, low)
            if high is not None:
                out = t.b.minimum(out, high)

        def vjp(b, cts, need):
            (g,) = cts
            inside = None if low is None else b.ge(x, low)
            if high is not None:
                below = b.le(x, high)
                inside = below if inside is None else b.and_(inside, below)
            given = [b.where(inside, g, 0.0)]
            if low is not None and is_tensor(low):
                lifted = b.lt(x, low)
                if high is not None:
                    lifted = b.and_(b.lt(low, high), lifted)
                given.append(b.where(lifted, g, 0.0))
            if high is not None and is_tensor(high):
                cut = b.gt(x, high)
                if low is not None:
                    cut = b.or_(cut, b.lt(high, low))
                given.append(b.where(cut, g, 0.0))
            return given

        inputs = (x, *(v for v in limits if is_tensor(v)))
        return t.derive("clamp", inputs, out, vjp)

    dtype = result_dtype([operand(t, v) for v in (input, *bounds)])
    if dtype is b1:
        raise t.not_implemented("clamp", b1)
    for bound in bounds:
        if not isinstance(bound, Tensor):
            check_range(t, bound, dtype)
    return pointwise(t, emit, (input, *bounds), as_tensors=False)


def clamp_min(t: Trace, input: Tensor, min: object) -> TracedTensor:
    return clamp(t, input, min=min)


def clamp_max(t: Trace, input: Tensor, max: object) -> TracedTensor:
    return clamp(t, input, max=max)


_MISSING = object()


def where(
    t: Trace, condition: Tensor, input: object = _MISSING, other: object = _MISSING
) -> TracedTensor | tuple[TracedTensor, ...]:
    """Elements of one of two by a condition; of a condition alone, where it holds."""
    if input is _MISSING and other is _MISSING:
        return nonzero(t, condition, as_tuple=True)
    if input is _MISSING or other is _MISSING:
        raise t.unsupported("Pass both values that where chooses from, or neither")
    c, *xs = (operand(t, x) for x in (condition, input, other))
    if c.handle is None or c.handle.dtype not in (b1, u8):
        raise t.shape_error("where expected condition to be a boolean tensor")
    dtype = result_dtype(xs)
    shape = common_shape(t, (c, *xs))
    mask = expand(t, truth(t, t.read(c.handle)), shape)
    x, y = operands_as(t, xs, dtype, shape)
    if not is_tensor(x) and not is_tensor(y):
        x = t.b.full(x, shape=shape, dtype=dtype, device=c.handle.device)
    return t.fresh(t.b.where(mask, x, y), result_strides((c, *xs), shape))


def _where_method(t: Trace, input: Tensor, condition: Tensor, other: object) -> TracedTensor:
    return where(t, condition, input, other)


def masked_fill(t: Trace, input: Tensor, mask: Tensor, value: object) -> TracedTensor:
    if t.lift(mask).dtype is not b1:
        raise t.shape_error("masked_fill only supports boolean masks")
    x = operand(t, input)
    v = operand(t, value)
    if v.handle is not None and v.handle.shape:
        raise t.shape_error("masked_fill_ only supports a 0-dimensional value tensor")
    filled = t.read(where(t, mask, value, input).handle)
    into = x.handle.dtype  # laid out row-major, whatever the input is
    return t.fresh(filled if filled.type.dtype is into else t.b.cast(filled, dtype=into))


for _names, _implementation in (
    (("clamp", "clip"), clamp),
    (("clamp_min",), clamp_min),
    (("clamp_max",), clamp_max),
    (("masked_fill",), masked_fill),
):
    register(_names, _implementation)
register(("where",), where, inplace=False, others={Tensor.where: _where_method})
