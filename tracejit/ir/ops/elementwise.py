"""Element-wise primitives: arithmetic, comparison, selection, casts.

Tensor operands have one shape, dtype and device; literals and host scalars broadcast, the latter
and float literals next to floats only. Ties and NaN follow torch: `maximum` shares the gradient at
a tie and propagates NaN, `sign(nan)` is 0. So do integers: they wrap, x // 0 and x % 0 are 0 (eager
raises on a CPU), shifts by the width or more shift everything out. The sign of a zero that
`maximum` or `minimum` picks from two zeros is not fixed.

A new primitive is an Op here, an entry in each of codegen/c_table.py and codegen/triton_table.py,
and its samples and reference in tests/support/op_samples.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tracejit.ir.ops.philox import random_bits
from tracejit.ir.ops.record import (
    BITS,
    EDGES,
    NO_GRAD,
    ULPS,
    Exact,
    Op,
    require,
    require_tensor,
)
from tracejit.ir.types import DType, Type, b1, round_to


def _tensors(name: str, operands: tuple) -> list[Type]:
    found = [t for t in operands if isinstance(t, Type) and not t.is_host]
    require(bool(found), f"{name} needs a tensor operand")
    first = found[0]
    for other in found[1:]:
        require(
            (other.shape, other.device) == (first.shape, first.device),
            f"{name}: operands {first} and {other} differ (insert expand or cast)",
        )
    return found


def _check_literals(name: str, operands: tuple, dtype: DType) -> None:
    """Literals and host scalars stand next to a dtype that holds their kind of number."""
    for x in operands:
        if isinstance(x, bool) or (isinstance(x, Type) and not x.is_host):
            continue
        if isinstance(x, int):
            fits = dtype.kind == "f" or (dtype.kind in "iu" and _in_range(x, dtype))
        else:
            fits = dtype.kind == "f"
        require(fits, f"{name}: the scalar {x} next to a tensor of {dtype} (insert cast)")


def _in_range(x: int, dtype: DType) -> bool:
    low = -(1 << (8 * dtype.itemsize - 1)) if dtype.kind == "i" else 0
    return low <= x < low + (1 << 8 * dtype.itemsize)


def _infer_same(name: str, kinds: str, operands: tuple) -> Type:
    found = _tensors(name, operands)
    first = found[0]
    require(all(t == first for t in found), f"{name}: operands of several dtypes: {found}")
    require(first.dtype.kind in kinds, f"{name} is not defined on {first.dtype}")
    if len(found) != len(operands):
        _check_literals(name, operands, first.dtype)
    return first


def same(name: str, kinds: str) -> Callable[..., Type]:
    """The rule of ops whose tensor operands have one type, of these dtype kinds, the result's."""

    def infer(*operands: Type) -> Type:
        return _infer_same(name, kinds, operands)

    return infer


def to_bool(name: str) -> Callable[..., Type]:
    """As `same`, of any dtype, with a bool result."""

    def infer(*operands: Type) -> Type:
        first = _infer_same(name, "fiub", operands)
        return Type(b1, first.shape, first.device)

    return infer


def _infer_where(condition: Type, a: Type, b: Type) -> Type:
    require_tensor("where", condition)
    require(condition.dtype is b1, f"where: condition is {condition}, not bool")
    _tensors("where", (condition, a, b))
    return _infer_same("where", "fiub", (a, b))


def _infer_cast(x: Type, *, dtype: DType) -> Type:
    require_tensor("cast", x)
    require(isinstance(dtype, DType), f"cast to {dtype!r}, which is not a dtype")
    return Type(dtype, x.shape, x.device)


def _eval_cast(x: np.ndarray, *, dtype: DType) -> np.ndarray:
    """Floats become integers toward zero; what is out of range, or NaN, the least one. Narrow
    integers are the low bits of an int32, uint8 those of an int64, as in eager."""
    with np.errstate(invalid="ignore"):
        if dtype.is_float:
            return round_to(x, dtype)
        if np.asarray(x).dtype.kind == "f" and dtype.kind in "iu" and dtype.itemsize < 4:
            x = x.astype(np.int64 if dtype.kind == "u" else np.int32)
        return x.astype(dtype.compute)


def _eval_sign(x: np.ndarray) -> np.ndarray:
    return ((x > 0).astype(np.int8) - (x < 0).astype(np.int8)).astype(x.dtype)


_erfc_of_each = np.vectorize(math.erfc, otypes=[np.float64])


def _eval_erfc(x: np.ndarray) -> np.ndarray:
    """1 - erf(x) without cancellation, computed in float64."""
    return _erfc_of_each(x).astype(x.dtype)


_erf_of_each = np.vectorize(math.erf, otypes=[np.float64])


def _eval_erf(x: np.ndarray) -> np.ndarray:
    """The error function, computed in float64."""
    return _erf_of_each(x).astype(x.dtype)


def _eval_mod(x: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Remainder with the divisor's sign; a float zero keeps the dividend's sign, as in torch."""
    if np.result_type(x, z).kind != "f":
        return np.remainder(x, z)
    rest = np.fmod(x, z)
    return np.where((rest != 0) & (np.less(z, 0) != (rest < 0)), rest + z, rest)


def _eval_pow(x: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Power; an integer to a negative power is 1/x^-z truncated (0 for x = 0), as in torch."""
    if np.result_type(x, z).kind == "f" or not np.any(np.less(z, 0)):
        return np.power(x, z)
    odd = np.where(np.bitwise_and(z, 1) == 1, x, np.multiply(x, x))  # right where |x| == 1
    truncated = np.where(np.abs(x) == 1, odd, 0)
    return np.where(np.less(z, 0), truncated, np.power(x, np.maximum(z, 0)))


def _unary(
    name: str,
    eval,
    vjp,
    kinds: str = "fiub",
    *,
    cost: int,
    exact: Exact,
    rounds: bool,
    host: str | None,
) -> Op:
    rules = same(name, kinds), eval, (vjp,)
    return Op(name, "elementwise", *rules, cost=cost, exact=exact, rounds=rounds, host=host)


def _function(name: str, eval, vjp, *, cost: int) -> Op:
    """A transcendental function of floats."""
    return _unary(name, eval, vjp, "f", cost=cost, exact=ULPS, rounds=True, host=None)


def _binary(
    name: str,
    eval,
    vjp_a,
    vjp_b,
    kinds: str = "fiub",
    *,
    cost: int,
    exact: Exact,
    rounds: bool,
    host: str | None,
) -> Op:
    rules = same(name, kinds), eval, (vjp_a, vjp_b)
    return Op(name, "elementwise", *rules, cost=cost, exact=exact, rounds=rounds, host=host)


def _bitwise(name: str, eval, kinds: str, exact: Exact) -> Op:
    return _binary(
        name, eval, NO_GRAD, NO_GRAD, kinds, cost=1, exact=exact, rounds=False, host=None
    )


def _compare(name: str, eval) -> Op:
    rules = to_bool(name), eval, (NO_GRAD, NO_GRAD)
    return Op(name, "elementwise", *rules, cost=1, exact=BITS, rounds=False, host=None)


neg = _unary(
    "neg",
    np.negative,
    lambda b, g, y, x: b.neg(g),
    "fiu",
    cost=1,
    exact=BITS,
    rounds=False,
    host="-{0}",
)
abs_ = _unary(
    "abs",
    np.abs,
    lambda b, g, y, x: b.mul(g, b.sign(x)),
    "fiu",
    cost=1,
    exact=BITS,
    rounds=False,
    host="abs({0})",
)
sign = _unary("sign", _eval_sign, NO_GRAD, cost=1, exact=BITS, rounds=False, host=None)
exp = _function("exp", np.exp, lambda b, g, y, x: b.mul(g, y), cost=20)
log = _function("log", np.log, lambda b, g, y, x: b.div(g, x), cost=20)
expm1 = _function("expm1", np.expm1, lambda b, g, y, x: b.mul(g, b.add(y, 1.0)), cost=20)
log1p = _function("log1p", np.log1p, lambda b, g, y, x: b.div(g, b.add(x, 1.0)), cost=20)
erf = _function(
    "erf",
    _eval_erf,
    lambda b, g, y, x: b.mul(g, b.mul(b.exp(b.neg(b.mul(x, x))), 2 / math.sqrt(math.pi))),
    cost=40,
)
erfc = _function(
    "erfc",
    _eval_erfc,
    lambda b, g, y, x: b.mul(g, b.mul(b.exp(b.neg(b.mul(x, x))), -2 / math.sqrt(math.pi))),
    cost=40,
)
sqrt = _unary(
    "sqrt",
    np.sqrt,
    lambda b, g, y, x: b.div(g, b.mul(y, 2.0)),
    "f",
    cost=6,
    exact=BITS,
    rounds=True,
    host="{0} ** 0.5",
)
tanh = _function("tanh", np.tanh, lambda b, g, y, x: b.mul(g, b.sub(1.0, b.mul(y, y))), cost=24)
sin = _function("sin", np.sin, lambda b, g, y, x: b.mul(g, b.cos(x)), cost=24)
cos = _function("cos", np.cos, lambda b, g, y, x: b.mul(g, b.neg(b.sin(x))), cost=24)
floor = _unary("floor", np.floor, NO_GRAD, "f", cost=1, exact=BITS, rounds=False, host=None)
trunc = _unary("trunc", np.trunc, NO_GRAD, "f", cost=1, exact=BITS, rounds=False, host=None)
round_ = _unary("round", np.rint, NO_GRAD, "f", cost=1, exact=BITS, rounds=False, host=None)
not_ = _unary("not", np.invert, NO_GRAD, "iub", cost=1, exact=BITS, rounds=False, host=None)

add = _binary(
    "add",
    np.add,
    lambda b, g, y, x, z: g,
    lambda b, g, y, x, z: g,
    cost=1,
    exact=BITS,
    rounds=True,
    host="{0} + {1}",
)
sub = _binary(
    "sub",
    np.subtract,
    lambda b, g, y, x, z: g,
    lambda b, g, y, x, z: b.neg(g),
    "fiu",
    cost=1,
    exact=BITS,
    rounds=True,
    host="{0} - {1}",
)
mul = _binary(
    "mul",
    np.multiply,
    lambda b, g, y, x, z: b.mul(g, z),
    lambda b, g, y, x, z: b.mul(g, x),
    cost=1,
    exact=BITS,
    rounds=True,
    host="{0} * {1}",
)
div = _binary(
    "div",
    np.divide,
    lambda b, g, y, x, z: b.div(g, z),
    lambda b, g, y, x, z: b.neg(b.mul(g, b.div(b.div(x, z), z))),  # y may be written to
    "f",
    cost=6,
    exact=BITS,
    rounds=True,
    host="{0} / {1}",
)
floordiv = _binary(
    "floordiv",
    np.floor_divide,
    NO_GRAD,
    NO_GRAD,
    "fiu",
    cost=40,
    exact=EDGES,
    rounds=True,
    host=None,
)
mod = _binary(
    "mod",
    _eval_mod,
    lambda b, g, y, x, z: g,
    lambda b, g, y, x, z: b.neg(b.mul(g, b.floordiv(x, z))),
    "fiu",
    cost=40,
    exact=EDGES,
    rounds=True,
    host=None,
)
fmod = _binary(
    "fmod",
    np.fmod,
    lambda b, g, y, x, z: g,
    lambda b, g, y, x, z: b.neg(b.mul(g, b.trunc(b.div(x, z)))),
    "fiu",
    cost=40,
    exact=EDGES,
    rounds=False,
    host=None,
)
copysign = _binary(
    "copysign",
    np.copysign,
    lambda b, g, y, x, z: b.where(b.eq(y, 0.0), 0.0, b.mul(g, b.div(y, x))),
    lambda b, g, y, x, z: _as_tensor(b, 0.0, g),
    "f",
    cost=1,
    exact=BITS,
    rounds=False,
    host=None,
)


def _over_square(b, g, x, z, first: bool):
    """g · (x or z) / (x² + z²), and 0 where both are 0 (as torch)."""
    x, z = (_as_tensor(b, v, g) for v in (x, z))
    square = b.add(b.mul(x, x), b.mul(z, z))
    slope = b.mul(g, b.div(x if first else z, square))
    return b.where(b.eq(square, 0.0), 0.0, slope)


atan2 = _binary(
    "atan2",
    np.arctan2,
    lambda b, g, y, x, z: _over_square(b, g, x, z, False),
    lambda b, g, y, x, z: b.neg(_over_square(b, g, x, z, True)),
    "f",
    cost=40,
    exact=ULPS,
    rounds=True,
    host=None,
)


def _as_tensor(b, x, like):
    """A literal or host scalar as a tensor of `like`'s type; tensors as they are."""
    kind = like.type
    if not isinstance(x, (int, float)) and not x.type.is_host:
        return x
    return b.full(x, shape=kind.shape, dtype=kind.dtype, device=kind.device)


def _pow_base(b, g, y, x, z):
    """z·x^(z-1), and 0 where the exponent is 0 (as torch: no 0·inf = nan there)."""
    if isinstance(z, (int, float)):
        if z == 0:
            kind = g.type
            return b.full(0.0, shape=kind.shape, dtype=kind.dtype, device=kind.device)
        return b.mul(g, b.mul(b.pow(x, z - 1), z))
    z = _as_tensor(b, z, g)
    slope = b.mul(g, b.mul(b.pow(x, b.sub(z, 1.0)), z))
    return b.where(b.eq(z, 0.0), 0.0, slope)


def _pow_exponent(b, g, y, x, z):
    """x^z·log(x), and 0 where the base is 0 and the exponent is not negative (as torch)."""
    if isinstance(x, (int, float)):
        if x == 0:
            return b.where(b.ge(z, 0.0), 0.0, b.mul(g, b.mul(y, -math.inf)))
        return b.mul(g, b.mul(y, math.log(x) if x > 0 else math.nan))
    x = _as_tensor(b, x, g)
    at_zero = b.and_(b.eq(x, 0.0), b.ge(z, 0.0))
    return b.mul(g, b.where(at_zero, 0.0, b.mul(y, b.log(x))))


pow_ = _binary(
    "pow",
    _eval_pow,
    _pow_base,
    _pow_exponent,
    "fiu",
    cost=40,
    exact=ULPS,
    rounds=True,
    host="{0} ** {1}",
)


def _share(prefer):
    """The gradient of maximum/minimum: half at a tie, none to the loser, all where NaN."""

    def vjp(b, g, y, x, z, *, first: bool):
        mine, other = (x, z) if first else (z, x)
        lost = getattr(b, prefer)(mine, other)
        return b.where(lost, 0.0, b.where(b.eq(x, z), b.mul(g, 0.5), g))

    return (
        lambda b, g, y, x, z: vjp(b, g, y, x, z, first=True),
        lambda b, g, y, x, z: vjp(b, g, y, x, z, first=False),
    )


maximum = _binary(
    "maximum",
    np.maximum,
    *_share("lt"),
    cost=1,
    exact=EDGES,
    rounds=False,
    host=None,
)
minimum = _binary(
    "minimum",
    np.minimum,
    *_share("gt"),
    cost=1,
    exact=EDGES,
    rounds=False,
    host=None,
)


and_ = _bitwise("and", np.bitwise_and, "iub", BITS)
or_ = _bitwise("or", np.bitwise_or, "iub", BITS)
xor = _bitwise("xor", np.bitwise_xor, "iub", BITS)
shl = _bitwise("shl", np.left_shift, "iu", EDGES)
shr = _bitwise("shr", np.right_shift, "iu", EDGES)

# Random bits, 31 of them, of a counter and a key: see `philox`. Counted as one operation, so that
# masks are computed where they are read and never stored.
philox = _bitwise("philox", random_bits, "i", BITS)

eq = _compare("eq", np.equal)
ne = _compare("ne", np.not_equal)
lt = _compare("lt", np.less)
le = _compare("le", np.less_equal)
gt = _compare("gt", np.greater)
ge = _compare("ge", np.greater_equal)

where = Op(
    "where",
    "elementwise",
    _infer_where,
    np.where,
    (
        NO_GRAD,
        lambda b, g, y, c, x, z: b.where(c, g, 0.0),
        lambda b, g, y, c, x, z: b.where(c, 0.0, g),
    ),
    cost=1,
    exact=BITS,
    rounds=False,
    host=None,
)


def _vjp_cast(b, g, y, x, *, dtype: DType):
    return b.cast(g, dtype=x.type.dtype)


cast = Op(
    "cast",
    "elementwise",
    _infer_cast,
    _eval_cast,
    (_vjp_cast,),
    cost=1,
    exact=BITS,
    rounds=True,
    host="{0}",
)


def _vjp_alias(b, g, y, x):
    return g


alias = _unary("alias", lambda x: x, _vjp_alias, cost=1, exact=BITS, rounds=False, host="{0}")
