"""Element-wise primitives: arithmetic, comparison, selection, casts.

Tensor operands have one shape, dtype and device; literals and host scalars broadcast, the latter
and float literals next to floats only. Ties and NaN follow torch: `maximum` shares the gradient at
a tie and propagates NaN, `sign(nan)` is 0. So do integers: they wrap, x // 0 and x % 0 are 0 (eager
raises on a CPU), shifts by the width or more shift everything out. The sign of a zero that
`maximum` or `minimum` picks from two zeros is not fixed.

A C template's result is assigned to a variable of the result's C type (int8 to int32 operands are
promoted meanwhile), in a program of C_FLAGS; `tj_` names are functions of C_PRELUDE.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tracejit.ir.ops.record import NO_GRAD, Op, Template, require, require_tensor
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
    with np.errstate(invalid="ignore"):
        return round_to(x, dtype) if dtype.is_float else x.astype(dtype.compute)


def _eval_sign(x: np.ndarray) -> np.ndarray:
    return ((x > 0).astype(np.int8) - (x < 0).astype(np.int8)).astype(x.dtype)


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


def _unary(name: str, eval, vjp, triton: Template, c: Template, kinds: str = "fiub") -> Op:
    return Op(name, "elementwise", same(name, kinds), eval, (vjp,), triton, c)


def _binary(
    name: str, eval, vjp_a, vjp_b, triton: Template, c: Template, kinds: str = "fiub"
) -> Op:
    return Op(name, "elementwise", same(name, kinds), eval, (vjp_a, vjp_b), triton, c)


def _compare(name: str, eval, sign: str) -> Op:
    text = f"({{0}} {sign} {{1}})"
    return Op(name, "elementwise", to_bool(name), eval, (NO_GRAD, NO_GRAD), text, text)


neg = _unary(
    "neg",
    np.negative,
    lambda b, g, y, x: b.neg(g),
    {"f": "tj.neg({0})", "i": "-{0}"},
    "(-{0})",
    "fiu",
)
abs_ = _unary(
    "abs",
    np.abs,
    lambda b, g, y, x: b.mul(g, b.sign(x)),
    "tl.abs({0})",
    {"f": "fabs{f}({0})", "i": "({0} < 0 ? -{0} : {0})", "u": "{0}"},
    "fiu",
)
sign = _unary(
    "sign",
    _eval_sign,
    NO_GRAD,
    {"f": "tj.sign({0})", "b": "{0}"},
    {"f": "(({0} > 0) - ({0} < 0))", "b": "{0}"},
)
exp = _unary("exp", np.exp, lambda b, g, y, x: b.mul(g, y), "tj.exp({0})", "tj_exp{f}({0})", "f")
log = _unary("log", np.log, lambda b, g, y, x: b.div(g, x), "tj.log({0})", "tj_log{f}({0})", "f")
expm1 = _unary(
    "expm1",
    np.expm1,
    lambda b, g, y, x: b.mul(g, b.add(y, 1.0)),
    "tj.expm1({0})",
    "tj_expm1{f}({0})",
    "f",
)
log1p = _unary(
    "log1p",
    np.log1p,
    lambda b, g, y, x: b.div(g, b.add(x, 1.0)),
    "tj.log1p({0})",
    "tj_log1p{f}({0})",
    "f",
)
erf = _unary(
    "erf",
    _eval_erf,
    lambda b, g, y, x: b.mul(g, b.mul(b.exp(b.neg(b.mul(x, x))), 2 / math.sqrt(math.pi))),
    "tj.erf({0})",
    "tj_erf{f}({0})",
    "f",
)
sqrt = _unary(
    "sqrt",
    np.sqrt,
    lambda b, g, y, x: b.div(g, b.mul(y, 2.0)),
    "tj.sqrt({0})",
    "sqrt{f}({0})",
    "f",
)
tanh = _unary(
    "tanh",
    np.tanh,
    lambda b, g, y, x: b.mul(g, b.sub(1.0, b.mul(y, y))),
    "tj.tanh({0})",
    "tj_tanh{f}({0})",
    "f",
)
sin = _unary(
    "sin", np.sin, lambda b, g, y, x: b.mul(g, b.cos(x)), "tj.sin({0})", "tj_sin{f}({0})", "f"
)
cos = _unary(
    "cos",
    np.cos,
    lambda b, g, y, x: b.mul(g, b.neg(b.sin(x))),
    "tj.cos({0})",
    "tj_cos{f}({0})",
    "f",
)
floor = _unary("floor", np.floor, NO_GRAD, "tl.floor({0})", "floor{f}({0})", "f")
trunc = _unary(
    "trunc",
    np.trunc,
    NO_GRAD,
    "tl.where({0} < 0, tl.ceil({0}), tl.floor({0}))",
    "trunc{f}({0})",
    "f",
)
not_ = _unary(
    "not",
    np.invert,
    NO_GRAD,
    {"i": "~{0}", "u": "({0} ^ 255)"},
    {"i": "(~{0})", "b": "(!{0})"},
    "iub",
)

add = _binary(
    "add",
    np.add,
    lambda b, g, y, x, z: g,
    lambda b, g, y, x, z: g,
    {"f": "({0} + {1})", "b": "({0} | {1})"},
    {"f": "({0} + {1})", "b": "({0} | {1})"},
)
sub = _binary(
    "sub",
    np.subtract,
    lambda b, g, y, x, z: g,
    lambda b, g, y, x, z: b.neg(g),
    "({0} - {1})",
    "({0} - {1})",
    "fiu",
)
mul = _binary(
    "mul",
    np.multiply,
    lambda b, g, y, x, z: b.mul(g, z),
    lambda b, g, y, x, z: b.mul(g, x),
    {"f": "({0} * {1})", "b": "({0} & {1})"},
    {"f": "({0} * {1})", "b": "({0} & {1})"},
)
div = _binary(
    "div",
    np.divide,
    lambda b, g, y, x, z: b.div(g, z),
    lambda b, g, y, x, z: b.neg(b.mul(g, b.div(b.div(x, z), z))),  # y may be written to
    "tj.div({0}, {1})",
    "({0} / {1})",
    "f",
)
floordiv = _binary(
    "floordiv",
    np.floor_divide,
    NO_GRAD,
    NO_GRAD,
    "tj.floor_div({0}, {1})",
    {
        "f": "tj_floordiv{f}({0}, {1})",
        "i": "tj_floordiv_int({0}, {1})",
    },
    "fiu",
)
mod = _binary(
    "mod",
    _eval_mod,
    lambda b, g, y, x, z: g,
    lambda b, g, y, x, z: b.neg(b.mul(g, b.floordiv(x, z))),
    "tj.remainder({0}, {1})",
    {
        "f": "tj_mod{f}({0}, {1})",
        "i": "tj_mod_int({0}, {1})",
    },
    "fiu",
)


def _as_tensor(b, x, like):
    """A host scalar as a tensor of `like`'s type; tensors as they are."""
    kind = like.type
    if not x.type.is_host:
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
    {"f": "tj.pow({0}, {1})", "i": "tj.pow_int({0}, {1})"},
    {"f": "tj_pow{f}({0}, {1})", "i": "tj_pow_int({0}, {1})"},
    "fiu",
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
    {"f": "tj.maximum({0}, {1})", "i": "tl.maximum({0}, {1})", "b": "({0} | {1})"},
    "(({0} > {1}) | ({0} != {0}) ? {0} : {1})",
)
minimum = _binary(
    "minimum",
    np.minimum,
    *_share("gt"),
    {"f": "tj.minimum({0}, {1})", "i": "tl.minimum({0}, {1})", "b": "({0} & {1})"},
    "(({0} < {1}) | ({0} != {0}) ? {0} : {1})",
)


def _bitwise(name: str, eval, triton: Template, c: Template, kinds: str) -> Op:
    return _binary(name, eval, NO_GRAD, NO_GRAD, triton, c, kinds)


and_ = _bitwise("and", np.bitwise_and, "({0} & {1})", "({0} & {1})", "iub")
or_ = _bitwise("or", np.bitwise_or, "({0} | {1})", "({0} | {1})", "iub")
xor = _bitwise("xor", np.bitwise_xor, "({0} ^ {1})", "({0} ^ {1})", "iub")
shl = _bitwise("shl", np.left_shift, "({0} << {1})", "tj_shl({0}, {1})", "iu")
shr = _bitwise("shr", np.right_shift, "({0} >> {1})", "tj_shr({0}, {1})", "iu")

eq = _compare("eq", np.equal, "==")
ne = _compare("ne", np.not_equal, "!=")
lt = _compare("lt", np.less, "<")
le = _compare("le", np.less_equal, "<=")
gt = _compare("gt", np.greater, ">")
ge = _compare("ge", np.greater_equal, ">=")

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
    "tl.where({0}, {1}, {2})",
    "({0} ? {1} : {2})",
)


def _vjp_cast(b, g, y, x, *, dtype: DType):
    return b.cast(g, dtype=x.type.dtype)


cast = Op(
    "cast",
    "elementwise",
    _infer_cast,
    _eval_cast,
    (_vjp_cast,),
    "{0}.to({T})",
    {"f": "(({T}){0})", "b": "(({T}){0})"},
)


def _vjp_alias(b, g, y, x):
    return g


alias = Op("alias", "elementwise", same("alias", "fiub"), lambda x: x, (_vjp_alias,), "{0}", "{0}")

# Their results are representable when their operands are: printers round nothing afterwards.
UNROUNDED = frozenset(
    {"neg", "abs", "sign", "floor", "trunc", "where", "maximum", "minimum", "alias"}
)
