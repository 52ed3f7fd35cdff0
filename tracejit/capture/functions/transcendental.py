"""Element-wise functions composed of primitives: hyperbolic, inverse and logarithmic ones.

Each is written so that nothing cancels, overflows or loses a sign anywhere in its range; slopes
are torch's own derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from tracejit.capture.functions.common import as_float, cast, in_place, kept_strides, register
from tracejit.capture.functions.derived import underived
from tracejit.capture.functions.rows import elementwise, emitted, function_of, primitive
from tracejit.capture.trace.table import Formula, Row, rule, spellings
from tracejit.capture.trace.tensor import TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Arg, Value


def _where(t: Trace, condition: Value, x: Arg, otherwise: Arg) -> Value:
    return t.b.where(condition, x, otherwise)


def _quarter(t: Trace, x: Value) -> Value:
    """√(1 - x²), exact near ±1."""
    b = t.b
    return b.sqrt(b.mul(b.sub(1.0, x), b.add(x, 1.0)))


def _ones(t: Trace, x: Value) -> Value:
    return t.b.full(1.0, shape=x.type.shape, dtype=x.type.dtype, device=x.type.device)


def _tan(t: Trace, x: Value) -> Value:
    return t.b.div(t.b.sin(x), t.b.cos(x))


def _d_tan(t: Trace, g: Value, y: Value, x: Value) -> Value:
    return t.b.mul(g, t.b.add(t.b.mul(y, y), 1.0))


def _asin(t: Trace, x: Value) -> Value:
    return t.b.atan2(x, _quarter(t, x))


def acos(t: Trace, x: Value) -> Value:
    return t.b.atan2(_quarter(t, x), x)


def _d_asin(t: Trace, g: Value, y: Value, x: Value) -> Value:
    b = t.b
    return b.mul(g, b.div(1.0, b.sqrt(b.sub(1.0, b.mul(x, x)))))


def _d_acos(t: Trace, g: Value, y: Value, x: Value) -> Value:
    return t.b.neg(_d_asin(t, g, y, x))


def _atan(t: Trace, x: Value) -> Value:
    return t.b.atan2(x, _ones(t, x))


def _d_atan(t: Trace, g: Value, y: Value, x: Value) -> Value:
    return t.b.div(g, t.b.add(t.b.mul(x, x), 1.0))


def _sinh(t: Trace, x: Value) -> Value:
    """With e = exp(|x|) - 1 it is (e + e / (e + 1)) / 2; exp(|x|/2)²/2 where e may overflow."""
    b, size = t.b, t.b.abs(x)
    e, root = b.expm1(size), b.exp(b.mul(size, 0.5))
    near = b.mul(b.add(e, b.div(e, b.add(e, 1.0))), 0.5)
    far = b.mul(b.mul(root, 0.5), root)
    return b.copysign(_where(t, b.gt(size, 80.0), far, near), x)


def _cosh(t: Trace, x: Value) -> Value:
    b, size = t.b, t.b.abs(x)
    e, root = b.exp(size), b.exp(b.mul(size, 0.5))
    near = b.mul(b.add(e, b.div(1.0, e)), 0.5)
    far = b.mul(b.mul(root, 0.5), root)
    return _where(t, b.gt(size, 80.0), far, near)


# above it 1 + x² is x², and x² may overflow
_LARGE = 2.0**28


def _asinh(t: Trace, x: Value) -> Value:
    """log1p(|x| + x² / (1 + √(1 + x²)))."""
    b, size = t.b, t.b.abs(x)
    square = b.mul(size, size)
    near = b.log1p(b.add(size, b.div(square, b.add(b.sqrt(b.add(square, 1.0)), 1.0))))
    far = b.add(b.log(size), math.log(2.0))
    return b.copysign(_where(t, b.gt(size, _LARGE), far, near), x)


def _d_asinh(t: Trace, g: Value, y: Value, x: Value) -> Value:
    b = t.b
    return b.mul(g, b.div(1.0, b.sqrt(b.add(b.mul(x, x), 1.0))))


def _acosh(t: Trace, x: Value) -> Value:
    """log1p(z + √(2z + z²)) with z = x - 1."""
    b, z = t.b, t.b.sub(x, 1.0)
    near = b.log1p(b.add(z, b.sqrt(b.add(b.mul(z, 2.0), b.mul(z, z)))))
    near = _where(t, b.lt(x, 1.0), math.nan, near)
    return _where(t, b.gt(x, _LARGE), b.add(b.log(x), math.log(2.0)), near)


def _d_acosh(t: Trace, g: Value, y: Value, x: Value) -> Value:
    b = t.b
    return b.mul(g, b.div(1.0, b.sqrt(b.sub(b.mul(x, x), 1.0))))


def _atanh(t: Trace, x: Value) -> Value:
    """log1p(2|x| / (1 - |x|)) / 2."""
    b, size = t.b, t.b.abs(x)
    ratio = b.div(b.mul(size, 2.0), b.sub(1.0, size))
    return b.copysign(b.mul(b.log1p(ratio), 0.5), x)


def _d_atanh(t: Trace, g: Value, y: Value, x: Value) -> Value:
    b = t.b
    return b.mul(g, b.div(1.0, b.sub(1.0, b.mul(x, x))))


def _d_erfc(t: Trace, g: Value, y: Value, x: Value) -> Value:
    b = t.b
    return b.mul(b.mul(b.exp(b.neg(b.mul(x, x))), -2 / math.sqrt(math.pi)), g)


def _ndtr(t: Trace, x: Value) -> Value:
    """erfc(-x / √2) / 2: the tail on the left keeps its digits."""
    return t.b.mul(t.b.erfc(t.b.mul(x, -math.sqrt(0.5))), 0.5)


def _d_ndtr(t: Trace, g: Value, y: Value, x: Value) -> Value:
    b = t.b
    density = b.exp(b.mul(b.mul(x, x), -0.5))
    return b.mul(b.mul(density, 1 / math.sqrt(2 * math.pi)), g)


def _entr(t: Trace, x: Value) -> Value:
    """-x·log(x), 0 at 0, -inf below."""
    b = t.b
    inside = b.mul(b.neg(x), b.log(x))
    rest = _where(t, b.eq(x, 0.0), 0.0, _where(t, b.lt(x, 0.0), -math.inf, x))
    return _where(t, b.gt(x, 0.0), inside, rest)


def _d_entr(t: Trace, g: Value, y: Value, x: Value) -> Value:
    return t.b.mul(g, t.b.sub(t.b.neg(t.b.log(x)), 1.0))


def _eps(eps: float | None = None) -> tuple:
    """torch's signature of logit after the tensor."""
    return () if eps is None else (eps,)


def _logit(t: Trace, x: Value, *eps: Arg) -> Value:
    """log(x / (1 - x)) of x, kept from eps to 1 - eps."""
    b = t.b
    if eps:
        low, high = eps[0], _above(t, eps[0])
        x = _where(t, b.lt(x, low), low, _where(t, b.gt(x, high), high, x))
    return b.log(b.div(x, b.sub(1.0, x)))


def _d_logit(t: Trace, g: Value, y: Value, x: Value, *eps: Arg) -> Value:
    b = t.b
    low, beyond = (eps[0], 0.0) if eps else (0.0, math.nan)
    outside = b.or_(b.lt(x, low), b.gt(x, _above(t, low)))
    return _where(t, outside, beyond, b.div(g, b.mul(x, b.sub(1.0, x))))


def _above(t: Trace, eps: Arg) -> Arg:
    """1 - eps, on the host where eps is a runtime scalar."""
    return t.b.host_sub(1.0, eps) if isinstance(eps, Value) else 1.0 - eps


def _logaddexp(exp: Callable[[Trace, Value], Value], unit: float) -> Row:
    """The larger one + log(1 + exp(-distance)); infinities of one sign stay."""

    def value(t: Trace, x: Value, z: Value) -> Value:
        b = t.b
        distance = b.neg(b.abs(b.sub(x, z)))
        rest = b.log1p(exp(t, distance))
        total = b.add(b.maximum(x, z), rest if unit == 1 else b.mul(rest, 1 / unit))
        same = b.and_(b.eq(b.abs(x), math.inf), b.eq(x, z))
        return _where(t, same, x, total)

    def slope(t: Trace, g: Value, x: Value, z: Value) -> Value:
        return t.b.div(g, t.b.add(exp(t, t.b.sub(z, x)), 1.0))

    return Row(
        "logaddexp" if unit == 1 else "logaddexp2",
        value,
        (lambda t, g, y, x, z: slope(t, g, x, z), lambda t, g, y, x, z: slope(t, g, z, x)),
        arity=2,
        dtypes="floats",
    )


def _xlog(name: str, log: str, least: float, *, of_nan: bool = False) -> Row:
    """x·log(z), 0 where x is 0 and z a number. `of_nan`: z is NaN, and no tensor."""

    def value(t: Trace, x: Value, z: Value) -> Value:
        b = t.b
        product = b.mul(x, getattr(b, log)(z))
        return _where(t, b.ne(z, z), z, _where(t, b.eq(x, 0.0), 0.0, product))

    def d_first(t: Trace, g: Value, y: Value, x: Value, z: Value) -> Value:
        b = t.b
        hidden = b.eq(x, 0.0) if of_nan else b.and_(b.eq(x, 0.0), b.le(z, least))
        return b.mul(g, _where(t, hidden, 0.0, getattr(b, log)(z)))

    def d_second(t: Trace, g: Value, y: Value, x: Value, z: Value) -> Value:
        return t.b.div(t.b.mul(g, x), z if least == 0 else t.b.add(z, 1.0))

    return Row(name, value, (d_first, d_second), arity=2, dtypes="to_float")


def _register_xlog(*description: object) -> None:
    row = _xlog(*description)
    plain, of_nan = (function_of(r, __name__) for r in (row, _xlog(*description, of_nan=True)))

    def function(t: Trace, input: object, other: object) -> TracedTensor:
        is_nan = type(other) is float and other != other
        return (of_nan if is_nan else plain)(t, input, other)

    register((row.names,), function, row=row)


def _hypot(t: Trace, x: Value, z: Value) -> Value:
    """large·√(1 + (small / large)²), which neither overflows nor vanishes; ∞ wins over NaN."""
    b = t.b
    x, z = b.abs(x), b.abs(z)
    large, small = b.maximum(x, z), b.minimum(x, z)
    ratio = b.div(small, large)
    length = b.mul(large, b.sqrt(b.add(b.mul(ratio, ratio), 1.0)))
    length = _where(t, b.eq(large, 0.0), 0.0, length)
    return _where(t, b.or_(b.eq(x, math.inf), b.eq(z, math.inf)), math.inf, length)


def _over_square(t: Trace, side: Value, x: Value, z: Value) -> Value:
    """side / (x² + z²), and 0 where both are 0."""
    b = t.b
    square = b.add(b.mul(x, x), b.mul(z, z))
    return _where(t, b.eq(square, 0.0), 0.0, b.mul(side, b.div(1.0, square)))


def _in_other_units(name: str, factor: float) -> None:
    """Register a function that multiplies by a number; the layout stays, as in eager."""
    row = Row(
        name,
        lambda t, x: t.b.mul(x, factor),
        (lambda t, g, y, x: t.b.mul(g, factor),),
        dtypes="to_float",
    )

    def function(t: Trace, input: torch.Tensor) -> TracedTensor:
        h = t.lift(input)
        x = cast(t, t.read(h), as_float(h.dtype))
        return t.fresh(emitted(t, row, (x,)), kept_strides(h))

    register((name,), function, row=row)


def _unary(names: str, value: Formula, slope: Formula) -> Row:
    return Row(names, value, (slope,), dtypes="to_float")


def _underived_in_place(row: Row, function: Callable) -> None:
    """The in-place forms of a function, for which eager has no derivative."""

    def body(t: Trace, input: torch.Tensor) -> TracedTensor:
        with t.untaped():
            found = function(t, input).handle
        x = t.read(t.lift(input))
        value = underived(t, f"inplace version of {row.name}", (x,), t.read(found))
        return t.fresh(value, found.strides)

    forms = (f for name in row.names.split() for f in spellings(f"{name}_"))
    rule(*forms)(in_place(body))


ROWS = (
    _unary("tan", _tan, _d_tan),
    _unary("asin arcsin", _asin, _d_asin),
    _unary("acos arccos", acos, _d_acos),
    _unary("atan arctan", _atan, _d_atan),
    _unary("sinh", _sinh, lambda t, g, y, x: t.b.mul(g, _cosh(t, x))),
    _unary("cosh", _cosh, lambda t, g, y, x: t.b.mul(g, _sinh(t, x))),
    _unary("erfc", primitive("erfc"), _d_erfc),
    _unary("ndtr", _ndtr, _d_ndtr),
    _unary("entr", _entr, _d_entr),
    Row("logit", _logit, (_d_logit,), numbers=_eps, dtypes="to_float"),
    _logaddexp(lambda t, x: t.b.exp(x), 1),
    _logaddexp(lambda t, x: t.b.pow(2.0, x), math.log(2.0)),
    Row(
        "hypot",
        _hypot,
        (
            lambda t, g, y, x, z: t.b.mul(g, t.b.div(x, y)),
            lambda t, g, y, x, z: t.b.mul(g, t.b.div(z, y)),
        ),
        arity=2,
        dtypes="floats",
    ),
    Row(
        "atan2 arctan2",
        primitive("atan2"),
        (
            lambda t, g, y, x, z: _over_square(t, t.b.mul(g, z), x, z),
            lambda t, g, y, x, z: _over_square(t, t.b.mul(g, t.b.neg(x)), x, z),
        ),
        dtypes="to_float",
        arity=2,
    ),
    Row("copysign", primitive("copysign"), dtypes="to_float", arity=2),
)
for _row in ROWS:
    elementwise(_row, __name__)
for _row in (
    _unary("asinh arcsinh", _asinh, _d_asinh),
    _unary("acosh arccosh", _acosh, _d_acosh),
    _unary("atanh arctanh", _atanh, _d_atanh),
):
    _underived_in_place(_row, elementwise(_row, __name__, inplace=False))
_register_xlog("xlogy", "log", 0.0)
_register_xlog("xlog1py", "log1p", -1.0)
_in_other_units("deg2rad", math.pi / 180)
_in_other_units("rad2deg", 180 / math.pi)
