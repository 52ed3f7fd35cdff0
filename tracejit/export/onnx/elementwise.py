"""Element-wise primitives as ONNX operators.

Each entry of `ELEMENTWISE` is a function `(w, kind, *operands) -> name`: the writer, the dtype of
the operands, and their names; all are held as `writer.held` says. Division of whole numbers is kept
off the two divisors at which a processor stops, 0 and -1.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tracejit.export.onnx.smooth import atan, erf, erfc, expm1, log1p
from tracejit.export.onnx.writer import Writer, held
from tracejit.ir.ops.philox import MULTIPLIER, ROUNDS, WEYL
from tracejit.ir.types import DType, b1, f64, i8, i16, u8

_LOW = 0xFFFFFFFF


def _plain(operator: str) -> Callable[..., str]:
    """An operator that has the same meaning."""

    def translated(w: Writer, kind: DType, *operands: str) -> str:
        return getattr(w, operator)(*operands)

    return translated


def _or_logical(operator: str, of_bools: str) -> Callable[..., str]:
    """An operator on numbers, another one on bools."""

    def translated(w: Writer, kind: DType, *operands: str) -> str:
        return getattr(w, of_bools if kind is b1 else operator)(*operands)

    return translated


def _compare(operator: str, negated: bool = False) -> Callable[..., str]:
    def translated(w: Writer, kind: DType, x: str, z: str) -> str:
        if kind is b1:
            x, z = w.cast(x, np.int32), w.cast(z, np.int32)
        found = getattr(w, operator)(x, z)
        return w.Not(found) if negated else found

    return translated


def number(w: Writer, kind: DType, value: float) -> str:
    """A literal beside operands of a dtype."""
    return w.constant(value, held(kind))


def _sign(w: Writer, kind: DType, x: str) -> str:
    """0 of NaN."""
    if kind is b1:
        return x
    to, zero = held(kind), number(w, kind, 0)
    return w.Sub(w.cast(w.Greater(x, zero), to), w.cast(w.Less(x, zero), to))


def trunc(w: Writer, kind: DType, x: str) -> str:
    """Toward zero; a zero keeps the sign."""
    return copysign(w, kind, w.Floor(w.Abs(x)), x)


def copysign(w: Writer, kind: DType, x: str, z: str) -> str:
    """The size of x with the sign of z; a NaN counts as positive. By a product, as onnxruntime's
    Where may lose the sign of a zero."""
    zero = number(w, kind, 0)
    of_zero = w.And(w.Equal(z, zero), w.Less(w.Reciprocal(z), zero))
    negative = w.Or(w.Less(z, zero), of_zero)
    return w.Mul(w.Abs(x), w.Where(negative, number(w, kind, -1), number(w, kind, 1)))


def _quotient(w: Writer, kind: DType, x: str, z: str) -> tuple[str, str, str, str]:
    """Of whole numbers, toward zero: the quotient, the rest, and where z is 0 and -1."""
    is_zero, is_minus = (w.Equal(z, number(w, kind, n)) for n in (0, -1))
    safe = w.Where(w.Or(is_zero, is_minus), number(w, kind, 1), z)
    quotient = w.Div(x, safe)
    return quotient, w.Sub(x, w.Mul(quotient, safe)), is_zero, is_minus


def _off(w: Writer, kind: DType, rest: str, z: str) -> str:
    """Whether a rest has another sign than the divisor."""
    zero = number(w, kind, 0)
    other = w.Xor(w.Less(rest, zero), w.Less(z, zero))
    return w.And(w.Not(w.Equal(rest, zero)), other)


def floordiv(w: Writer, kind: DType, x: str, z: str) -> str:
    """The quotient, down."""
    if kind.is_float:  # as numpy: from the exact rest, to the nearest whole number
        zero, one = number(w, kind, 0), number(w, kind, 1)
        rest = w.Mod(x, z, fmod=1)
        exact = w.Div(w.Sub(x, rest), z)
        exact = w.Where(_off(w, kind, rest, z), w.Sub(exact, one), exact)
        down = w.Floor(exact)
        up = w.Greater(w.Sub(exact, down), number(w, kind, 0.5))
        found = w.Where(up, w.Add(down, one), down)
        found = w.Where(w.Equal(exact, zero), copysign(w, kind, zero, w.Div(x, z)), found)
        return w.Where(w.Equal(z, zero), w.Div(x, z), found)
    quotient, rest, is_zero, is_minus = _quotient(w, kind, x, z)
    quotient = w.Where(_off(w, kind, rest, z), w.Sub(quotient, number(w, kind, 1)), quotient)
    return w.Where(is_zero, number(w, kind, 0), w.Where(is_minus, w.Neg(x), quotient))


def fmod(w: Writer, kind: DType, x: str, z: str) -> str:
    """The rest of a quotient toward zero."""
    if kind.is_float:
        return w.Mod(x, z, fmod=1)
    _, rest, is_zero, is_minus = _quotient(w, kind, x, z)
    return w.Where(w.Or(is_zero, is_minus), number(w, kind, 0), rest)


def mod(w: Writer, kind: DType, x: str, z: str) -> str:
    """The rest, with the sign of the divisor."""
    rest = fmod(w, kind, x, z)
    found = w.Where(_off(w, kind, rest, z), w.Add(rest, z), rest)
    if kind.is_float:
        return found
    return w.Where(w.Equal(z, number(w, kind, 0)), number(w, kind, 0), found)


def _pow(w: Writer, kind: DType, x: str, z: str) -> str:
    """Of whole numbers by squares, whose products wrap; of negative exponents 1/x^-z, toward 0."""
    if kind.is_float:
        return w.Pow(x, z)
    zero, one, two = (number(w, kind, n) for n in (0, 1, 2))
    negative = w.Less(z, zero)
    left, square, found = w.Max(z, zero), x, one
    for _ in range(8 * held(kind).itemsize - 1):
        odd = w.Equal(w.BitwiseAnd(left, one), one)
        found = w.Mul(found, w.Where(odd, square, one))
        square, left = w.Mul(square, square), w.Div(left, two)
    odd = w.Equal(w.BitwiseAnd(z, one), one)
    unit = w.Where(w.Equal(w.Abs(x), one), w.Where(odd, x, one), zero)
    return w.Where(negative, unit, found)


def _atan2(w: Writer, kind: DType, y: str, x: str) -> str:
    """The angle of a point, in float64: onnxruntime has float32 only for atan."""
    y, x = (w.cast(v, np.float64) for v in (y, x))
    zero, pi = number(w, f64, 0), number(w, f64, np.pi)
    half = number(w, f64, np.pi / 2)
    high, wide = w.Abs(y), w.Abs(x)
    infinite = w.And(w.IsInf(high), w.IsInf(wide))
    both = w.Or(infinite, w.And(w.Equal(high, zero), w.Equal(wide, zero)))
    steep = w.Greater(high, wide)
    ratio = w.Div(w.Where(steep, wide, high), w.Where(steep, high, wide))
    ratio = w.Where(both, w.cast(infinite, np.float64), ratio)
    angle = atan(w, ratio)
    angle = w.Where(steep, w.Sub(half, angle), angle)
    behind = w.Less(copysign(w, f64, number(w, f64, 1), x), zero)
    angle = w.Where(behind, w.Sub(pi, angle), angle)
    return w.cast(copysign(w, f64, angle, y), held(kind))


def _shift(w: Writer, kind: DType, x: str, z: str, right: bool) -> str:
    """By the width or more, everything goes out."""
    to, bits = held(kind), 8 * held(kind).itemsize
    info = np.iinfo(to)
    powers = [1 << n for n in range(bits - 1)]
    fits = w.And(
        w.GreaterOrEqual(z, number(w, kind, 0)), w.Less(z, number(w, kind, 8 * kind.itemsize))
    )
    place = w.cast(w.Where(fits, z, number(w, kind, bits)), np.int64)
    if not right:
        return w.Mul(x, w.Gather(w.constant([*powers, info.min, 0], to), place))
    gone = w.Where(w.Less(x, number(w, kind, 0)), number(w, kind, -1), number(w, kind, 0))
    power = w.Gather(w.constant([*powers, 1, 1], to), place)
    found = w.Div(w.BitwiseAnd(x, w.Neg(power)), power)
    return w.Where(w.Less(place, w.constant(bits - 1, np.int64)), found, gone)


def _high_word(w: Writer, x: str) -> str:
    """The upper 32 bits of int64, as a number that is not negative."""
    bits = w.BitwiseAnd(x, w.constant(~_LOW, np.int64))
    return w.BitwiseAnd(w.Div(bits, w.constant(1 << 32, np.int64)), w.constant(_LOW, np.int64))


def _philox(w: Writer, kind: DType, counter: str, key: str) -> str:
    """The same words as `ir/ops/philox.py` has, in int64, whose products wrap."""
    low = w.constant(_LOW, np.int64)
    counter, key = (w.Add(x, w.constant(0, np.int64)) for x in (counter, key))
    left = w.BitwiseAnd(counter, low)
    right = w.BitwiseXor(_high_word(w, counter), _high_word(w, key))
    key = w.BitwiseAnd(key, low)
    for _ in range(ROUNDS):
        product = w.Mul(left, w.constant(MULTIPLIER, np.int64))
        left = w.BitwiseXor(w.BitwiseXor(_high_word(w, product), key), right)
        right = w.BitwiseAnd(product, low)
        key = w.BitwiseAnd(w.Add(key, w.constant(WEYL, np.int64)), low)
    return w.Div(left, w.constant(2, np.int64))


def _gcd(w: Writer, kind: DType, x: str, z: str) -> str:
    """By Euclid's algorithm, until all are done."""
    from onnx import TensorProto, helper

    to = helper.np_dtype_to_tensor_dtype(held(kind))
    zero = number(w, kind, 0)
    shape = w.Shape(w.Add(x, z))
    x, z = (w.Expand(w.Abs(v), shape) for v in (x, z))

    def unfinished(w: Writer, z: str) -> str:
        count = w.ReduceSum(w.cast(w.Not(w.Equal(z, zero)), np.int64), keepdims=0)
        return w.Greater(count, w.constant(0, np.int64))

    body = Writer(w)
    step, go_on, a, b = (body.name(n) for n in ("step", "go_on", "gcd_x", "gcd_z"))
    done = body.Equal(b, zero)
    safe = body.Where(done, number(body, kind, 1), b)
    rest = body.Where(done, zero, body.Mod(a, safe, fmod=1))
    larger = body.Where(done, a, b)
    results = [unfinished(body, rest), larger, rest]

    def infos(names: list[str]) -> list:
        return [helper.make_tensor_value_info(n, to, None) for n in names]

    flags = [
        helper.make_tensor_value_info(n, kind, [])
        for n, kind in (
            (step, TensorProto.INT64),
            (go_on, TensorProto.BOOL),
            (results[0], TensorProto.BOOL),
        )
    ]
    inside = helper.make_graph(
        body.nodes, "gcd", [*flags[:2], *infos([a, b])], [flags[2], *infos(results[1:])]
    )
    return w.several("Loop", ["", unfinished(w, z), x, z], 2, body=inside)[0]


def _where(w: Writer, kind: DType, condition: str, x: str, z: str) -> str:
    return w.where(condition, x, z, held(kind))


def cast(w: Writer, x: str, source: DType, to: DType) -> str:
    """The elements in another dtype, held: floats to small whole numbers by way of larger ones."""
    if source.is_float and to in (u8, i8, i16):
        x = w.cast(x, np.int64 if to is u8 else np.int32)
    if source.is_float and to.narrow:
        x = w.cast(x, np.float32) if source is f64 else x
        return x if source is to else w.rounded(x, to)
    if to in (u8, i8, i16):
        return w.cast(w.cast(x, to), np.int32)
    if to.narrow:
        return w.rounded(w.cast(x, np.float32), to)
    return x if held(source) == held(to) and to is not b1 else w.cast(x, held(to))


def _alias(w: Writer, kind: DType, x: str) -> str:
    return x


def _by(formula: Callable[[Writer, str, np.dtype], str]) -> Callable[..., str]:
    def translated(w: Writer, kind: DType, x: str) -> str:
        return formula(w, x, held(kind))

    return translated


ELEMENTWISE: dict[str, Callable[..., str]] = {
    **{"neg": _plain("Neg"), "abs": _plain("Abs"), "sign": _sign, "exp": _plain("Exp")},
    **{"log": _plain("Log"), "sqrt": _plain("Sqrt"), "tanh": _plain("Tanh")},
    **{"sin": _plain("Sin"), "cos": _plain("Cos"), "floor": _plain("Floor")},
    **{"round": _plain("Round"), "trunc": trunc, "not": _or_logical("BitwiseNot", "Not")},
    **{"expm1": _by(expm1), "log1p": _by(log1p), "erf": _by(erf), "erfc": _by(erfc)},
    **{"add": _or_logical("Add", "Or"), "mul": _or_logical("Mul", "And")},
    **{"sub": _plain("Sub"), "div": _plain("Div"), "floordiv": floordiv, "mod": mod},
    **{"fmod": fmod, "copysign": copysign, "pow": _pow, "atan2": _atan2, "gcd": _gcd},
    **{"maximum": _or_logical("Max", "Or"), "minimum": _or_logical("Min", "And")},
    **{"and": _or_logical("BitwiseAnd", "And"), "or": _or_logical("BitwiseOr", "Or")},
    **{"xor": _or_logical("BitwiseXor", "Xor"), "philox": _philox, "where": _where},
    "shl": lambda w, kind, x, z: _shift(w, kind, x, z, right=False),
    "shr": lambda w, kind, x, z: _shift(w, kind, x, z, right=True),
    **{"eq": _compare("Equal"), "ne": _compare("Equal", negated=True), "lt": _compare("Less")},
    **{"le": _compare("LessOrEqual"), "gt": _compare("Greater")},
    **{"ge": _compare("GreaterOrEqual"), "alias": _alias},
}
