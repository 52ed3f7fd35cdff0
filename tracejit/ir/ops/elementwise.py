"""Element-wise primitives: arithmetic, comparison, selection, casts.

Tensor operands have one shape, dtype and device; literals and host scalars broadcast. Ties and NaN
follow torch: `maximum` shares the gradient at a tie and propagates NaN, `sign(nan)` is 0.
"""

from __future__ import annotations

import math

import numpy as np

from tracejit.ir.ops.record import NO_GRAD, Op, Template, require
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


def same(*operands: Type) -> Type:
    """All tensor operands have one type, which is the result's."""
    found = _tensors("element-wise op", operands)
    require(all(t == found[0] for t in found), f"operands of several dtypes: {found}")
    return found[0]


def to_bool(*operands: Type) -> Type:
    """As `same`, with a bool result."""
    first = same(*operands)
    return Type(b1, first.shape, first.device)


def _infer_where(condition: Type, a: Type, b: Type) -> Type:
    _tensors("where", (condition, a, b))
    require(condition.dtype is b1, f"where: condition is {condition}, not bool")
    return same(a, b)


def _infer_cast(x: Type, *, dtype: DType) -> Type:
    return Type(dtype, x.shape, x.device)


def _eval_cast(x: np.ndarray, *, dtype: DType) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return round_to(x, dtype) if dtype.is_float else x.astype(dtype.compute)


def _sign(x: np.ndarray) -> np.ndarray:
    return ((x > 0).astype(np.int8) - (x < 0).astype(np.int8)).astype(x.dtype)


def _unary(name: str, eval, vjp, triton: Template, c: Template) -> Op:
    return Op(name, "elementwise", same, eval, (vjp,), triton, c)


def _binary(name: str, eval, vjp_a, vjp_b, triton: Template, c: Template) -> Op:
    return Op(name, "elementwise", same, eval, (vjp_a, vjp_b), triton, c)


def _compare(name: str, eval, sign: str) -> Op:
    text = f"({{0}} {sign} {{1}})"
    return Op(name, "elementwise", to_bool, eval, (NO_GRAD, NO_GRAD), text, text)


neg = _unary("neg", np.negative, lambda b, g, y, x: b.neg(g), "-{0}", "-{0}")
abs_ = _unary(
    "abs",
    np.abs,
    lambda b, g, y, x: b.mul(g, b.sign(x)),
    "tl.abs({0})",
    {"f": "fabs{f}({0})", "i": "({0} < 0 ? -{0} : {0})", "u": "{0}", "b": "{0}"},
)
sign = _unary("sign", _sign, NO_GRAD, "tj.sign({0})", "(({0} > 0) - ({0} < 0))")
exp = _unary("exp", np.exp, lambda b, g, y, x: b.mul(g, y), "tj.exp({0})", "exp{f}({0})")
log = _unary("log", np.log, lambda b, g, y, x: b.div(g, x), "tj.log({0})", "log{f}({0})")
sqrt = _unary(
    "sqrt",
    np.sqrt,
    lambda b, g, y, x: b.div(g, b.mul(y, 2.0)),
    "tj.sqrt({0})",
    "sqrt{f}({0})",
)
tanh = _unary(
    "tanh",
    np.tanh,
    lambda b, g, y, x: b.mul(g, b.sub(1.0, b.mul(y, y))),
    "tj.tanh({0})",
    "tanh{f}({0})",
)
sin = _unary("sin", np.sin, lambda b, g, y, x: b.mul(g, b.cos(x)), "tj.sin({0})", "sin{f}({0})")
cos = _unary(
    "cos", np.cos, lambda b, g, y, x: b.mul(g, b.neg(b.sin(x))), "tj.cos({0})", "cos{f}({0})"
)
floor = _unary("floor", np.floor, NO_GRAD, "tl.floor({0})", "floor{f}({0})")
trunc = _unary("trunc", np.trunc, NO_GRAD, "tj.trunc({0})", "trunc{f}({0})")
not_ = _unary("not", np.invert, NO_GRAD, "~{0}", {"i": "~{0}", "b": "!{0}"})

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
    lambda b, g, y, x, z: b.neg(b.mul(g, b.div(y, z))),
    "tj.div({0}, {1})",
    "({0} / {1})",
)
floordiv = _binary(
    "floordiv",
    np.floor_divide,
    NO_GRAD,
    NO_GRAD,
    {"f": "tj.floordiv_float({0}, {1})", "i": "tj.floordiv_int({0}, {1})"},
    {
        "f": "tj_floordiv{f}({0}, {1})",
        "i": "({0} / {1} - (({0} % {1} != 0) && (({0} < 0) != ({1} < 0))))",
    },
)
mod = _binary(
    "mod",
    np.remainder,
    lambda b, g, y, x, z: g,
    lambda b, g, y, x, z: b.neg(b.mul(g, b.floordiv(x, z))),
    {"f": "tj.mod_float({0}, {1})", "i": "tj.mod_int({0}, {1})"},
    {
        "f": "tj_mod{f}({0}, {1})",
        "i": "({0} % {1} + ((({0} % {1} != 0) && (({0} < 0) != ({1} < 0))) ? {1} : 0))",
    },
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
        return b.mul(g, b.mul(b.pow(x, z - 1), z)) if z != 0 else b.mul(g, 0.0)
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
    np.power,
    _pow_base,
    _pow_exponent,
    {"f": "tj.pow({0}, {1})", "i": "tj.pow_int({0}, {1})"},
    {"f": "pow{f}({0}, {1})", "i": "tj_pow_int({0}, {1})"},
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
    "({0} != {0} || {0} > {1} ? {0} : {1})",
)
minimum = _binary(
    "minimum",
    np.minimum,
    *_share("gt"),
    {"f": "tj.minimum({0}, {1})", "i": "tl.minimum({0}, {1})", "b": "({0} & {1})"},
    "({0} != {0} || {0} < {1} ? {0} : {1})",
)
and_ = _binary("and", np.bitwise_and, NO_GRAD, NO_GRAD, "({0} & {1})", "({0} & {1})")
or_ = _binary("or", np.bitwise_or, NO_GRAD, NO_GRAD, "({0} | {1})", "({0} | {1})")
xor = _binary("xor", np.bitwise_xor, NO_GRAD, NO_GRAD, "({0} ^ {1})", "({0} ^ {1})")
shl = _binary("shl", np.left_shift, NO_GRAD, NO_GRAD, "({0} << {1})", "({0} << {1})")
shr = _binary("shr", np.right_shift, NO_GRAD, NO_GRAD, "({0} >> {1})", "({0} >> {1})")

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
    "tj.cast({0}, {T})",
    {"f": "(({T}){0})", "b": "(({T}){0})"},
)


def _vjp_alias(b, g, y, x):
    return g


alias = Op("alias", "elementwise", same, lambda x: x, (_vjp_alias,), "{0}", "{0}")
