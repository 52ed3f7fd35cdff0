"""Element-wise functions that round numbers, take remainders, or look at their parts."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from tracejit.autodiff import zeros
from tracejit.capture.functions.arithmetic import check_divisor, power
from tracejit.capture.functions.common import (
    cast,
    kept_strides,
    literal,
    pointwise,
    register,
)
from tracejit.capture.functions.derived import derived, no_derivative, widen
from tracejit.capture.functions.rows import elementwise, function_of, primitive
from tracejit.capture.functions.unary import rounding
from tracejit.capture.trace.table import RULES, Row
from tracejit.capture.trace.tensor import TO_TORCH, TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.errors import InvalidGraph
from tracejit.ir.graph import Value
from tracejit.ir.types import b1, f64, i32

Tensor = torch.Tensor


def _none(t: Trace, g: Value, y: Value, x: Value, *_: object) -> Value:
    return zeros(t.b, x)


def _none_of_other(t: Trace, g: Value, y: Value, x: Value, z: Value) -> Value:
    return zeros(t.b, z)


def _ceil(t: Trace, x: Value) -> Value:
    """-floor(-x)"""
    if not x.type.dtype.is_float:
        return rounding("floor")(t, x)
    return t.b.neg(t.b.floor(t.b.neg(x)))


def _decimals(*, decimals: int | None = None) -> tuple:
    """torch's signature of round after the tensor."""
    return () if decimals is None else (int(decimals),)


def _round(t: Trace, x: Value, decimals: float | None = None) -> Value:
    """The nearest multiple of 10^-decimals, the even one at a tie."""
    if decimals is None:
        return rounding("round")(t, x)
    if not x.type.dtype.is_float:
        raise InvalidGraph(reason="round with decimals is not defined on integers")
    b, ten = t.b, 10.0 ** abs(decimals)
    if decimals == 0:
        return b.round(x)
    if decimals > 0:
        return b.div(b.round(b.mul(x, ten)), ten)
    return b.mul(b.round(b.div(x, ten)), ten)


def _is_negative(t: Trace, x: Value) -> Value:
    """Of floats the sign's bit, which zeros and NaNs have too."""
    if x.type.dtype is b1:
        return t.b.ne(x, x)
    if not x.type.dtype.is_float:
        return t.b.lt(x, 0)
    return t.b.lt(t.b.copysign(1.0, x), 0.0)


def _is(number: float):
    """Whether each element is this infinity; no integer is."""

    def value(t: Trace, x: Value) -> Value:
        return t.b.eq(x, number) if x.type.dtype.is_float else t.b.ne(x, x)

    return value


def _frac(t: Trace, x: Value) -> Value:
    return t.b.sub(x, t.b.trunc(x))


def _heaviside(t: Trace, x: Value, at_zero: Value) -> Value:
    zero = literal(0, x.type.dtype)
    step = cast(t, t.b.gt(x, zero), x.type.dtype)
    return t.b.where(t.b.eq(x, zero), at_zero, step)


def heaviside(t: Trace, input: Tensor, values: Tensor) -> TracedTensor:
    if t.lift(input).dtype is not t.lift(values).dtype:
        raise t.shape_error("heaviside is not implemented for tensors with different dtypes")

    def emit(x: Value, at_zero: Value) -> Value:
        with t.untaped():
            out = _heaviside(t, x, at_zero)
        refuse = no_derivative(t, "heaviside", "self")
        return t.derive("heaviside", (x, at_zero), out, lambda b, cts, need: refuse())

    return pointwise(t, emit, (input, values))


def fmod(t: Trace, input: object, other: object) -> TracedTensor:
    check_divisor(t, input, other)
    return pointwise(t, t.b.fmod, (input, other))


def nan_to_num(
    t: Trace,
    input: Tensor,
    nan: float | None = None,
    posinf: float | None = None,
    neginf: float | None = None,
) -> TracedTensor:
    """NaN, ∞ and -∞ replaced; by 0 and the dtype's largest and least numbers unless told."""
    handle = t.lift(input)
    dtype = handle.dtype
    if not dtype.is_float:
        return t.fresh(t.b.alias(t.read(handle)), kept_strides(handle))
    limits = torch.finfo(TO_TORCH[dtype])
    of_nan, high, low = (
        literal(t.number(default if given is None else given), dtype)
        for given, default in ((nan, 0.0), (posinf, limits.max), (neginf, limits.min))
    )

    def emit(x: Value) -> Value:
        b = t.b
        with t.untaped():
            out = b.where(b.eq(x, math.inf), high, b.where(b.eq(x, -math.inf), low, x))
            out = b.where(b.ne(x, x), of_nan, out)

        def vjp(b, cts, need):
            return (b.where(b.lt(b.abs(x), math.inf), cts[0], 0.0),)

        return t.derive("nan_to_num", (x,), out, vjp)

    return t.fresh(emit(t.read(handle)), kept_strides(handle))


def float_power(t: Trace, input: object, exponent: object) -> TracedTensor:
    """A power in float64."""
    convert = RULES[Tensor.to].run
    base, e = (
        convert(t, x, torch.float64) if isinstance(x, Tensor) else x for x in (input, exponent)
    )
    return power(t, base, e)


def _scaled(t: Trace, x: Value, steps: tuple[int, ...]) -> tuple[Value, Value]:
    """x = m·2^e with 1/2 <= |m| < 1, by exact steps; e in x's dtype."""
    b = t.b
    e = b.mul(x, 0.0)
    for k in (*steps, 0):  # down below 2^k, at last below 1
        large, by = b.ge(b.abs(x), 2.0**k), max(k, 1)
        x, e = b.where(large, b.mul(x, 2.0**-by), x), b.where(large, b.add(e, float(by)), e)
    for k in (steps[0], *steps):
        small = b.lt(b.abs(x), 2.0**-k)
        x, e = b.where(small, b.mul(x, 2.0**k), x), b.where(small, b.sub(e, float(k)), e)
    return x, e


def frexp(t: Trace, input: Tensor) -> object:
    """A number as m·2^e; what is not finite, and 0, is its own m."""
    h = t.lift(input)
    if not h.dtype.is_float:
        raise t.shape_error("torch.frexp() only supports floating-point dtypes")
    x, b = t.read(h), t.b
    steps = tuple(1 << k for k in reversed(range(10 if h.dtype is f64 else 7)))

    def parts(x: Value) -> tuple[Value, Value]:
        ordinary = b.and_(b.ne(x, 0.0), b.lt(b.abs(x), math.inf))
        m, e = _scaled(t, b.where(ordinary, x, 0.5), steps)
        return b.where(ordinary, m, x), b.where(ordinary, e, 0.0)

    with t.untaped():
        m, e = parts(widen(t, x))
        exponent = t.b.cast(e, dtype=i32)

    def slope(g: Value, y: Value, x: Value) -> Value:
        two = b.full(2.0, shape=e.type.shape, dtype=e.type.dtype, device=e.type.device)
        return b.div(g, b.pow(two, e))

    mantissa = derived(t, "frexp", (x,), lambda x: m, (slope,))
    strides = kept_strides(h)
    return torch.return_types.frexp((t.fresh(mantissa, strides), t.fresh(exponent, strides)))


def _next(t: Trace, x: Value, z: Value) -> Value:
    """The next number; of bf16 and f16 by 1.2 of their least relative steps, which rounds to one
    step, or by the least number."""
    dtype, b = x.type.dtype, t.b
    if not dtype.narrow:
        return b.nextafter(x, z)
    info = torch.finfo(TO_TORCH[dtype])
    least, relative = info.smallest_normal * info.eps, 0.6 * info.eps
    one, other = widen(t, x), widen(t, z)
    size = b.abs(one)
    outward = b.eq(b.gt(other, one), b.gt(one, 0.0))
    far = b.where(outward, b.mul(size, 1.0 + relative), b.mul(size, 1.0 - relative))
    near = b.where(outward, b.add(size, least), b.sub(size, least))
    found = b.where(b.lt(size, 2 * info.smallest_normal), near, far)
    found = b.where(b.and_(b.eq(size, math.inf), b.not_(outward)), info.max, found)
    found = b.where(b.eq(one, 0.0), b.copysign(least, other), b.copysign(found, one))
    found = b.where(b.eq(one, other), other, found)
    nan = b.or_(b.ne(one, one), b.ne(other, other))
    return cast(t, b.where(nan, math.nan, found), dtype)


def _divisors(name: str) -> Callable:
    """gcd and lcm, of integers."""

    def emit(t: Trace, x: Value, z: Value) -> Value:
        b = t.b
        if x.type.dtype.kind not in "iu":
            raise t.not_implemented(f"{name}_cpu", x.type.dtype)
        common = b.gcd(x, z)
        if name == "gcd":
            return common
        none = b.eq(common, 0)
        product = b.mul(b.floordiv(x, b.where(none, 1, common)), z)
        product = b.abs(product) if x.type.dtype.kind == "i" else product
        return b.where(none, 0, product)

    def rule(t: Trace, input: Tensor, other: Tensor) -> TracedTensor:
        return pointwise(t, lambda *xs: emit(t, *xs), (input, other))

    return rule


ROWS = (
    Row(
        "nextafter",
        _next,
        (lambda t, g, y, x, z: t.b.where(t.b.eq(x, z), 0.0, g), _none_of_other),
        arity=2,
        dtypes="floats",
        wide=False,
    ),
    Row("ceil", _ceil),
    Row("frac", _frac, (lambda t, g, y, x: g,), dtypes="floats", wide=False),
    Row("sgn", primitive("sign")),
    Row("signbit", _is_negative),
    Row("isposinf", _is(math.inf)),
    Row("isneginf", _is(-math.inf)),
)
for _row in ROWS:
    elementwise(_row, __name__)
ROUND = Row("round", _round, (_none,), numbers=_decimals)
_rule = function_of(ROUND, __name__)


def _special_round(t: Trace, input: Tensor, *, decimals: int = 0) -> TracedTensor:
    return _rule(t, input, decimals=decimals)


register(("round",), _rule, row=ROUND, others={torch.special.round: _special_round})
for _name, _implementation in (
    ("heaviside", heaviside),
    ("fmod", fmod),
    ("gcd", _divisors("gcd")),
    ("lcm", _divisors("lcm")),
    ("nan_to_num", nan_to_num),
):
    register((_name,), _implementation)
register(("frexp",), frexp, inplace=False)
register(("float_power",), float_power, inplace=False)
