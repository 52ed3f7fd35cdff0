"""Element-wise arithmetic, comparison, logic and selection, with reflected and in-place forms."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tracejit.autodiff import zeros
from tracejit.capture.functions.common import (
    Number,
    as_float,
    as_number,
    cast,
    check_overlap,
    check_range,
    common_shape,
    expand,
    in_place,
    literal,
    moved,
    operand,
    operands_as,
    pointwise,
    register,
    result_dtype,
    result_strides,
    rounded,
    truth,
)
from tracejit.capture.trace.scalars import TracedFloat
from tracejit.capture.trace.table import RULES, rule
from tracejit.capture.trace.tensor import TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Arg, Builder, Value
from tracejit.ir.types import DType, b1, f32, u8

Tensor = torch.Tensor


def _scaled(t: Trace, x: Arg, alpha: Number, dtype: DType) -> Arg:
    """alpha·x, exact when alpha is 1."""
    if not isinstance(alpha, TracedFloat) and alpha == 1:
        return x
    factor = alpha if isinstance(alpha, Value) else literal(alpha, dtype)
    if _is_tensor(x):
        return t.b.and_(x, factor) if dtype is b1 else t.b.mul(x, factor)
    if _is_tensor(factor):
        return t.b.mul(factor, x)
    return t.b.host_mul(x, factor) if isinstance(x, Value) else _host(t, x, factor)


def _host(t: Trace, x: Number, factor: Arg) -> Arg:
    return t.b.host_mul(x, factor) if isinstance(factor, Value) else x * factor


def _linear(
    t: Trace, emit: Callable[[Arg, Arg], Value], input: object, other: object, alpha: Number
) -> TracedTensor:
    """emit(input, alpha·other), rounded once where the dtype is narrow."""
    alpha = as_number(t, alpha)
    if isinstance(alpha, Tensor):
        other, alpha = mul(t, other, alpha), 1
    dtype = result_dtype((operand(t, input), operand(t, other)))
    unscaled = not isinstance(alpha, TracedFloat) and alpha == 1
    if not dtype.is_float and isinstance(alpha, float):
        raise t.shape_error(
            "For integral input tensors, argument alpha must not be a floating point number"
        )
    if dtype is not b1 and isinstance(alpha, bool):
        raise t.shape_error("Boolean alpha only supported for Boolean results")
    if unscaled or not dtype.narrow:
        return pointwise(t, lambda x, y: emit(x, _scaled(t, y, alpha, dtype)), (input, other))

    def widened(x: Arg, y: Arg) -> Value:
        x, y = (cast(t, a, f32) if _is_tensor(a) else a for a in (x, y))
        device = (x if _is_tensor(x) else y).type.device
        factor = rounded(t, alpha, dtype, device)
        if isinstance(factor, Value):
            like = x if _is_tensor(x) else y
            factor = expand(t, cast(t, factor, f32), like.type.shape)
        return t.b.cast(emit(x, _scaled(t, y, factor, f32)), dtype=dtype)

    return pointwise(t, widened, (input, other))


def add(t: Trace, input: object, other: object, *, alpha: Number = 1) -> TracedTensor:
    def emit(x: Arg, y: Arg) -> Value:
        either = x if _is_tensor(x) else y
        return t.b.or_(x, y) if either.type.dtype is b1 else t.b.add(x, y)

    return _linear(t, emit, input, other, alpha)


def sub(t: Trace, input: object, other: object, *, alpha: Number = 1) -> TracedTensor:
    for x in (operand(t, input), operand(t, other)):
        if isinstance(x.number, bool) or (x.handle is not None and x.handle.dtype is b1):
            raise t.shape_error(
                "Subtraction, the `-` operator, with a bool tensor is not supported. If you are "
                "trying to invert a mask, use the `~` or `logical_not()` operator instead"
            )
    return _linear(t, t.b.sub, input, other, alpha)


def rsub(t: Trace, input: object, other: object, *, alpha: Number = 1) -> TracedTensor:
    return sub(t, other, input, alpha=alpha)


def mul(t: Trace, input: object, other: object) -> TracedTensor:
    return _product(t, input, other, _holding(t, t.b.mul))


def scaled(t: Trace, input: Tensor, factor: Number) -> TracedTensor:
    """A product with a number that torch keeps as a number, as alpha and beta."""
    return _product(t, input, factor, t.b.mul)


def _product(t: Trace, input: object, other: object, emit: Callable) -> TracedTensor:
    dtype = result_dtype((operand(t, input), operand(t, other)))
    return pointwise(t, t.b.and_ if dtype is b1 else emit, (input, other), wide=True)


def _holding(t: Trace, emit: Callable[[Arg, Arg], Value]) -> Callable[[Arg, Arg], Value]:
    """A product or quotient: torch saves a number among the operands as it saves a tensor."""

    def wrapped(x: Arg, y: Arg) -> Value:
        out = emit(x, y)
        return out if _is_tensor(x) and _is_tensor(y) else t.saves(out)

    return wrapped


def div(
    t: Trace, input: object, other: object, *, rounding_mode: str | None = None
) -> TracedTensor:
    if rounding_mode == "floor":
        _check_divisor(t, input, other)
        return pointwise(t, _flat(t, "div", t.b.floordiv), (input, other), wide=True)
    quotient = pointwise(t, _holding(t, t.b.div), (input, other), to=as_float, wide=True)
    if rounding_mode is None:
        return quotient
    if rounding_mode != "trunc":
        raise t.shape_error("div expected rounding_mode to be None, 'trunc' or 'floor'")
    raise t.unsupported("Use rounding_mode='floor', or torch.trunc of the quotient")


def rdiv(t: Trace, input: object, other: object) -> TracedTensor:
    """number / tensor, which torch computes as reciprocal(tensor) · number."""

    def emit(x: Value, y: Arg) -> Value:
        return t.saves(t.b.mul(_reciprocal(t, x), y))

    return pointwise(t, emit, (input, other), to=as_float, wide=True)


def reciprocal(t: Trace, input: object) -> TracedTensor:
    return pointwise(t, lambda x: _reciprocal(t, x), (input,), to=as_float)


def _reciprocal(t: Trace, x: Value) -> Value:
    with t.untaped():
        y = t.b.div(1.0, x)

    def vjp(b: Builder, cts: tuple, need: tuple) -> tuple:
        return (b.neg(b.mul(cts[0], b.mul(y, y))),)

    return t.derive("reciprocal", (x,), y, vjp)


def _no_derivative(t: Trace, name: str, emit):
    """Emit a step that torch has no derivative for: backward through it raises."""

    def wrapped(x: Arg, y: Arg) -> Value:
        with t.untaped():
            out = emit(x, y)

        def vjp(b, cts, need):
            raise t.autograd_error(f"derivative for {name} is not implemented")

        return t.derive(name, tuple(v for v in (x, y) if isinstance(v, Value)), out, vjp)

    return wrapped


def _flat(t: Trace, name: str, emit):
    """Emit a step whose derivative is zero."""

    def wrapped(x: Arg, y: Arg) -> Value:
        with t.untaped():
            out = emit(x, y)
        inputs = tuple(v for v in (x, y) if isinstance(v, Value))
        return t.derive(name, inputs, out, lambda b, cts, need: [zeros(b, v) for v in inputs])

    return wrapped


def floor_divide(t: Trace, input: object, other: object) -> TracedTensor:
    _check_divisor(t, input, other)
    emit = _no_derivative(t, "floor_divide", t.b.floordiv)
    return pointwise(t, emit, (input, other), wide=True)


def _check_divisor(t: Trace, input: object, other: object) -> None:
    """An integer division by the number 0 raises; by a zero in a tensor gives 0, as on a GPU."""
    if not isinstance(other, (Tensor, float)) and other == 0:
        handle = operand(t, input).handle
        if handle is not None and not handle.dtype.is_float and handle.device == "cpu":
            raise t.shape_error("ZeroDivisionError")


def remainder(t: Trace, input: object, other: object) -> TracedTensor:
    _check_divisor(t, input, other)
    emit = t.b.mod if isinstance(input, Tensor) else _no_derivative(t, "remainder", t.b.mod)
    return pointwise(t, emit, (input, other))


def power(t: Trace, input: object, exponent: object) -> TracedTensor:
    """torch.pow, with torch's exact special cases of a literal exponent and its own derivative.

    d/dx x^e = e·x^(e-1), zero where e is 0 (torch's pow_backward).
    """
    fixed = not isinstance(exponent, (Tensor, TracedFloat))
    if fixed and isinstance(input, Tensor) and isinstance(exponent, (int, float)):
        operands = (operand(t, input), operand(t, exponent))
        dtype = result_dtype(operands)
        if not dtype.is_float and exponent < 0 and not isinstance(exponent, float):
            raise t.shape_error("Integers to negative integer powers are not allowed")
        return pointwise(t, lambda x, e: _power_literal(t, x, e), (input, exponent))
    out = pointwise(t, t.b.pow, (input, exponent))
    if isinstance(input, Tensor):
        return out
    value = t.read(out.handle)
    result = t.fresh(value)  # row-major, whatever the exponent's strides
    t.saves(value, t.read(result.handle), t.read(t.lift(exponent)))
    return result


def _raise_to(b, x: Value, e: Number) -> Value:
    """x**e as torch computes it for a literal exponent."""
    if e == 2:
        return b.mul(x, x)
    if e == 3:
        return b.mul(b.mul(x, x), x)
    if e == 1:
        return b.alias(x)
    if e == 0:
        one = 1.0 if x.type.dtype.is_float else 1
        return b.full(one, shape=x.type.shape, dtype=x.type.dtype, device=x.type.device)
    if x.type.dtype.is_float:
        if e == 0.5:
            return b.sqrt(x)
        if e == -0.5:
            return b.div(1.0, b.sqrt(x))
        if e == -1:
            return b.div(1.0, x)
        if e == -2:
            return b.div(1.0, b.mul(x, x))
    return b.pow(x, e)


def _power_literal(t: Trace, x: Value, e: Number) -> Value:
    with t.untaped():
        out = _raise_to(t.b, x, e)

    def vjp(b, cts, need):
        (g,) = cts
        if e == 0:
            return (b.mul(g, 0.0),)
        return (b.mul(g, b.mul(_power_literal(t, x, e - 1), e)),)

    return t.saves(t.derive("pow", (x,), out, vjp), x)


def maximum(t: Trace, input: Tensor, other: Tensor) -> TracedTensor:
    return pointwise(t, t.b.maximum, (input, other))


def minimum(t: Trace, input: Tensor, other: Tensor) -> TracedTensor:
    return pointwise(t, t.b.minimum, (input, other))


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
            if low is not None and _is_tensor(low):
                lifted = b.lt(x, low)
                if high is not None:
                    lifted = b.and_(b.lt(low, high), lifted)
                given.append(b.where(lifted, g, 0.0))
            if high is not None and _is_tensor(high):
                cut = b.gt(x, high)
                if low is not None:
                    cut = b.or_(cut, b.lt(high, low))
                given.append(b.where(cut, g, 0.0))
            return given

        inputs = (x, *(v for v in limits if _is_tensor(v)))
        return t.derive("clamp", inputs, out, vjp)

    dtype = result_dtype([operand(t, v) for v in (input, *bounds)])
    if dtype is b1:
        raise t.shape_error("clamp is not implemented for 'Bool'")
    for bound in bounds:
        if not isinstance(bound, Tensor):
            check_range(t, bound, dtype)
    return pointwise(t, emit, (input, *bounds))


def clamp_min(t: Trace, input: Tensor, min: object) -> TracedTensor:
    return clamp(t, input, min=min)


def clamp_max(t: Trace, input: Tensor, max: object) -> TracedTensor:
    return clamp(t, input, max=max)


def where(t: Trace, condition: Tensor, input: object, other: object) -> TracedTensor:
    c, *xs = (operand(t, x) for x in (condition, input, other))
    if c.handle is None or c.handle.dtype not in (b1, u8):
        raise t.shape_error("where expected condition to be a boolean tensor")
    dtype = result_dtype(xs)
    shape = common_shape(t, (c, *xs))
    mask = expand(t, truth(t, t.read(c.handle)), shape)
    x, y = operands_as(t, xs, dtype, shape)
    if not _is_tensor(x) and not _is_tensor(y):
        x = t.b.full(x, shape=shape, dtype=dtype, device=c.handle.device)
    return t.fresh(t.b.where(mask, x, y), result_strides((c, *xs), shape))


def _is_tensor(x: Arg) -> bool:
    return isinstance(x, Value) and not x.type.is_host


def _where_method(t: Trace, input: Tensor, condition: Tensor, other: object) -> TracedTensor:
    return where(t, condition, input, other)


def masked_fill(t: Trace, input: Tensor, mask: Tensor, value: object) -> TracedTensor:
    if t.lift(mask).dtype is not b1:
        raise t.shape_error("masked_fill only supports boolean masks")
    x = operand(t, input)
    v = operand(t, value)
    if v.handle is not None and v.handle.shape:
        raise t.shape_error("masked_fill_ only supports a 0-dimensional value tensor")
    filled = where(t, mask, value, input)
    into = x.handle.dtype
    if filled.handle.dtype is into:
        return filled
    return t.fresh(t.b.cast(t.read(filled.handle), dtype=into), filled.handle.strides)


def _compare(name: str):
    def compare(t: Trace, input: object, other: object) -> TracedTensor:
        return pointwise(t, getattr(t.b, name), (input, other))

    return compare


def _bitwise(name: str):
    def bitwise(t: Trace, input: object, other: object) -> TracedTensor:
        if result_dtype((operand(t, input), operand(t, other))).is_float:
            raise t.shape_error(f"bitwise {name} is not implemented for floating-point tensors")
        return pointwise(t, getattr(t.b, name), (input, other))

    return bitwise


def _logical(name: str):
    def logical(t: Trace, input: Tensor, other: Tensor) -> TracedTensor:
        def emit(x: Value, y: Value) -> Value:
            return getattr(t.b, name)(truth(t, x), truth(t, y))

        return pointwise(t, emit, (input, other))

    return logical


def bitwise_not(t: Trace, input: Tensor) -> TracedTensor:
    if operand(t, input).handle.dtype.is_float:
        raise t.unsupported("It is only implemented on integer and bool tensors")
    return pointwise(t, t.b.not_, (input,))


def logical_not(t: Trace, input: Tensor) -> TracedTensor:
    return pointwise(t, lambda x: t.b.eq(x, literal(0, x.type.dtype)), (input,))


def _swapped(implementation):
    def reflected(t: Trace, self: Tensor, other: object) -> TracedTensor:
        return implementation(t, other, self)

    return reflected


for _names, _implementation in (
    (("add", "__add__", "__radd__"), add),
    (("sub", "subtract", "__sub__"), sub),
    (("rsub", "__rsub__"), rsub),
    (("mul", "multiply", "__mul__", "__rmul__"), mul),
    (("div", "divide", "true_divide", "__div__", "__truediv__"), div),
    (("__rdiv__", "__rtruediv__"), rdiv),
    (("reciprocal",), reciprocal),
    (("floor_divide", "__floordiv__"), floor_divide),
    (("remainder", "__mod__"), remainder),
    (("pow", "__pow__"), power),
    (("__rpow__",), _swapped(power)),
    (("__rfloordiv__",), _swapped(floor_divide)),
    (("__rmod__",), _swapped(remainder)),
    (("maximum",), maximum),
    (("minimum",), minimum),
    (("clamp", "clip"), clamp),
    (("clamp_min",), clamp_min),
    (("clamp_max",), clamp_max),
    (("masked_fill",), masked_fill),
    (("eq", "__eq__"), _compare("eq")),
    (("ne", "not_equal", "__ne__"), _compare("ne")),
    (("lt", "less", "__lt__"), _compare("lt")),
    (("le", "less_equal", "__le__"), _compare("le")),
    (("gt", "greater", "__gt__"), _compare("gt")),
    (("ge", "greater_equal", "__ge__"), _compare("ge")),
    (("bitwise_and", "__and__", "__rand__"), _bitwise("and")),
    (("bitwise_or", "__or__", "__ror__"), _bitwise("or")),
    (("bitwise_xor", "__xor__", "__rxor__"), _bitwise("xor")),
    (("bitwise_left_shift", "__lshift__"), _bitwise("shl")),
    (("bitwise_right_shift", "__rshift__"), _bitwise("shr")),
    (("__rlshift__",), _swapped(_bitwise("shl"))),
    (("__rrshift__",), _swapped(_bitwise("shr"))),
    (("logical_and",), _logical("and")),
    (("logical_or",), _logical("or")),
    (("logical_xor",), _logical("xor")),
    (("bitwise_not", "__invert__"), bitwise_not),
    (("logical_not",), logical_not),
):
    register(_names, _implementation)

RULES[torch.where] = where
RULES[Tensor.where] = _where_method
for _name, _implementation in (
    ("__iadd__", add),
    ("__isub__", sub),
    ("__imul__", mul),
    ("__itruediv__", div),  # torch's __idiv__ too
    ("__ifloordiv__", floor_divide),
    ("__imod__", remainder),
    ("__ipow__", power),
    ("__iand__", _bitwise("and")),
    ("__ior__", _bitwise("or")),
    ("__ixor__", _bitwise("xor")),
    ("__ilshift__", _bitwise("shl")),
    ("__irshift__", _bitwise("shr")),
):
    if hasattr(Tensor, _name):
        RULES[getattr(Tensor, _name)] = in_place(_implementation)


@rule(Tensor.copy_)
def copy_(t: Trace, self: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(src, Tensor):
        return fill_(t, self, src)
    into, source = t.lift(self), t.lift(src)
    if into.device != source.device:
        src = moved(t, source, into.device)
        source = src.handle
    if common_shape(t, (operand(t, self), operand(t, src))) != into.shape:
        raise t.shape_error(
            f"output with shape {list(into.shape)} doesn't match the shape {list(source.shape)}"
        )
    mine, its = ((h.storage, h.offset, h.shape, h.strides) for h in (into, source))
    if mine == its and 0 in into.strides:  # an expanded tensor may be copied to itself only
        return self
    check_overlap(t, into, source)
    (value,) = operands_as(t, (operand(t, src),), into.dtype, into.shape)
    new = t.b.alias(value)
    if t.grad_on and t.requires_grad(into):
        new = t.unread(new, t.read(into))
    t.write(into, new)
    return self


@rule(Tensor.fill_)
def fill_(t: Trace, self: Tensor, value: object) -> Tensor:
    into = t.lift(self)
    x = operand(t, value)
    if x.handle is not None:
        if x.handle.shape:
            raise t.shape_error("fill_ only supports a 0-dimensional value tensor")
        return copy_(t, self, value)
    check_range(t, x.number, into.dtype)
    filled = literal(x.number, into.dtype)
    t.write(into, t.b.full(filled, shape=into.shape, dtype=into.dtype, device=into.device))
    return self


@rule(Tensor.zero_, torch.zero_)
def zero_(t: Trace, self: Tensor) -> Tensor:
    h = t.lift(self)
    if any(st == 0 and n > 1 for st, n in zip(h.strides, h.shape, strict=True)):
        raise t.unsupported("Write to the tensor that was expanded")
    return fill_(t, self, 0)
