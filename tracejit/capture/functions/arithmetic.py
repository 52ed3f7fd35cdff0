"""Element-wise arithmetic, with reflected and in-place forms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps

import torch

from tracejit.autodiff import zeros
from tracejit.capture.functions.common import (
    Number,
    as_float,
    as_number,
    cast,
    common_shape,
    expand,
    is_tensor,
    literal,
    on_one_device,
    operand,
    pointwise,
    register,
    result_dtype,
    rounded,
)
from tracejit.capture.functions.derived import underived
from tracejit.capture.functions.rows import elementwise, emitted
from tracejit.capture.trace.bounds import nonzero
from tracejit.capture.trace.scalars import TracedFloat
from tracejit.capture.trace.table import Row
from tracejit.capture.trace.tensor import TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Arg, Value
from tracejit.ir.types import DType, b1, f32

Tensor = torch.Tensor


def _scaled(t: Trace, x: Arg, alpha: Number, dtype: DType) -> Arg:
    """alpha·x, exact when alpha is 1."""
    if not isinstance(alpha, TracedFloat) and alpha == 1:
        return x
    factor = alpha if isinstance(alpha, Value) else literal(alpha, dtype)
    if is_tensor(x):
        return t.b.and_(x, factor) if dtype is b1 else t.b.mul(x, factor)
    if is_tensor(factor):
        return t.b.mul(factor, x)
    return t.b.host_mul(x, factor) if isinstance(x, Value) else _host(t, x, factor)


def _host(t: Trace, x: Number, factor: Arg) -> Arg:
    return t.b.host_mul(x, factor) if isinstance(factor, Value) else x * factor


def _of_bools(emit: Callable, otherwise: Callable) -> Callable[[Arg, Arg], Value]:
    """Emit one thing of bools and another of numbers."""

    def emitted_of(x: Arg, y: Arg) -> Value:
        dtype = (x if is_tensor(x) else y).type.dtype
        return (emit if dtype is b1 else otherwise)(x, y)

    return emitted_of


def _linear(
    t: Trace,
    emit: Callable[[Arg, Arg], Value],
    input: object,
    other: object,
    alpha: Number,
    wrap: Callable,
) -> TracedTensor | Value:
    """emit(input, alpha·other), rounded once where the dtype is narrow."""
    if type(alpha) is int and alpha == 1:  # nearly always
        return wrap(t, emit, (input, other))
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
        return wrap(t, lambda x, y: emit(x, _scaled(t, y, alpha, dtype)), (input, other))

    def widened(x: Arg, y: Arg) -> Value:
        x, y = (cast(t, a, f32) if is_tensor(a) else a for a in (x, y))
        device = (x if is_tensor(x) else y).type.device
        factor = rounded(t, alpha, dtype, device)
        if isinstance(factor, Value):
            like = x if is_tensor(x) else y
            factor = expand(t, cast(t, factor, f32), like.type.shape)
        return t.b.cast(emit(x, _scaled(t, y, factor, f32)), dtype=dtype)

    return wrap(t, widened, (input, other))


def add(
    t: Trace, input: object, other: object, *, alpha: Number = 1, wrap: Callable = pointwise
) -> TracedTensor | Value:
    return _linear(t, _of_bools(t.b.or_, t.b.add), input, other, alpha, wrap)


def sub(
    t: Trace, input: object, other: object, *, alpha: Number = 1, wrap: Callable = pointwise
) -> TracedTensor | Value:
    for x in (operand(t, input), operand(t, other)):
        if isinstance(x.number, bool) or (x.handle is not None and x.handle.dtype is b1):
            raise t.shape_error(
                "Subtraction, the `-` operator, with a bool tensor is not supported. If you are "
                "trying to invert a mask, use the `~` or `logical_not()` operator instead"
            )
    return _linear(t, t.b.sub, input, other, alpha, wrap)


def rsub(t: Trace, input: object, other: object, *, alpha: Number = 1) -> TracedTensor:
    return sub(t, other, input, alpha=alpha)


def mul(
    t: Trace, input: object, other: object, *, wrap: Callable = pointwise
) -> TracedTensor | Value:
    return _product(t, input, other, _holding(t, t.b.mul), wrap)


def scaled(t: Trace, input: Tensor, factor: Number) -> TracedTensor:
    """A product with a number that torch keeps as a number, as alpha and beta."""
    return _product(t, input, factor, t.b.mul, pointwise)


def _product(
    t: Trace, input: object, other: object, emit: Callable, wrap: Callable
) -> TracedTensor | Value:
    return wrap(t, _of_bools(t.b.and_, emit), (input, other), wide=True)


def _holding(t: Trace, emit: Callable[[Arg, Arg], Value]) -> Callable[[Arg, Arg], Value]:
    """A product or quotient: torch saves a number among the operands as it saves a tensor."""

    def wrapped(x: Arg, y: Arg) -> Value:
        out = emit(x, y)
        return out if is_tensor(x) and is_tensor(y) else t.saves(out)

    return wrapped


def div(
    t: Trace,
    input: object,
    other: object,
    *,
    rounding_mode: str | None = None,
    wrap: Callable = pointwise,
) -> TracedTensor | Value:
    if rounding_mode == "floor":
        check_divisor(t, input, other)
        return wrap(t, _flat(t, "div", t.b.floordiv), (input, other), wide=True)
    if rounding_mode == "trunc":
        check_divisor(t, input, other)
        return wrap(t, _flat(t, "div", partial(_truncated, t)), (input, other), wide=True)
    if rounding_mode is not None:
        raise t.shape_error("div expected rounding_mode to be None, 'trunc' or 'floor'")
    return wrap(t, _holding(t, t.b.div), (input, other), to=as_float, wide=True)


def _truncated(t: Trace, x: Arg, y: Arg) -> Value:
    """The quotient rounded toward zero; of integers the floor, one more where that is less."""
    b, like = t.b, (x if is_tensor(x) else y).type
    if like.dtype is b1:
        raise t.not_implemented("div_trunc_cpu", b1)
    if like.dtype.is_float:
        return b.trunc(b.div(x, y))
    floor = b.floordiv(x, y)
    if like.dtype.kind == "u":
        return floor
    less = b.and_(b.lt(floor, 0), b.ne(b.mod(x, y), 0))
    return b.add(floor, b.cast(less, dtype=like.dtype))


def rdiv(t: Trace, input: object, other: object) -> TracedTensor:
    """number / tensor, which torch computes as reciprocal(tensor) · number."""

    def emit(x: Value, y: Arg) -> Value:
        return t.saves(t.b.mul(emitted(t, RECIPROCAL, (x,)), y))

    return pointwise(t, emit, (input, other), to=as_float, wide=True, as_tensors=False)


def _no_derivative(t: Trace, name: str, emit):
    """Emit a step that torch has no derivative for: backward through it raises."""

    def wrapped(x: Arg, y: Arg) -> Value:
        with t.untaped():
            out = emit(x, y)
        return underived(t, name, [v for v in (x, y) if isinstance(v, Value)], out)

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
    check_divisor(t, input, other)
    emit = _no_derivative(t, "floor_divide", t.b.floordiv)
    return pointwise(t, emit, (input, other), wide=True)


def check_divisor(t: Trace, input: object, other: object) -> None:
    """An integer division by 0 raises on the CPU; on a GPU it gives something."""
    operands = operand(t, input), operand(t, other)
    dtype = result_dtype(operands)
    if dtype.is_float or 0 in common_shape(t, on_one_device(t, operands)):
        return
    error = t.shape_error("ZeroDivisionError")
    if isinstance(other, Tensor):
        nonzero(t, other, error)
    elif literal(other, dtype) == 0 and operands[0].handle.device == "cpu":
        raise error


def remainder(t: Trace, input: object, other: object) -> TracedTensor:
    check_divisor(t, input, other)
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
        emit = partial(_power_literal, t)
        return pointwise(t, emit, (input, exponent), as_tensors=False)
    out = pointwise(t, t.b.pow, (input, exponent), as_tensors=False)
    value = t.read(out.handle)
    if isinstance(input, Tensor):
        operands = [t.read(t.lift(x)) for x in (input, exponent) if isinstance(x, Tensor)]
        t.saves(value, value, *operands)
        return out
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


def swapped(implementation: Callable) -> Callable:
    """The reflected operator: the number stands in front."""

    @wraps(implementation)
    def reflected(t: Trace, self: Tensor, other: object) -> TracedTensor:
        return implementation(t, other, self)

    return reflected


RECIPROCAL = Row(
    "reciprocal",
    lambda t, x: t.b.div(1.0, x),
    (lambda t, g, y, x: t.b.neg(t.b.mul(g, t.b.mul(y, y))),),
    dtypes="to_float",
    wide=False,
)
elementwise(RECIPROCAL, __name__)
for _names, _implementation in (
    (("add", "__add__", "__radd__"), add),
    (("sub", "subtract", "__sub__"), sub),
    (("rsub", "__rsub__"), rsub),
    (("mul", "multiply", "__mul__", "__rmul__"), mul),
    (("div", "divide", "true_divide", "__div__", "__truediv__"), div),
    (("__rdiv__", "__rtruediv__"), rdiv),
    (("floor_divide", "__floordiv__"), floor_divide),
    (("remainder", "__mod__"), remainder),
    (("pow", "__pow__"), power),
    (("__rpow__",), swapped(power)),
    (("__rfloordiv__",), swapped(floor_divide)),
    (("__rmod__",), swapped(remainder)),
):
    register(_names, _implementation)
