"""Host primitives as ONNX operators: arithmetic on runtime scalars, which are float64 of no axes.

Each entry of `HOST` is a function `(w, *operands) -> name`. Where Python raises, as for 1 / 0,
these give what IEEE arithmetic has.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tracejit.export.onnx import elementwise, smooth
from tracejit.export.onnx.smooth import f64
from tracejit.export.onnx.writer import Writer
from tracejit.ir import types

_F64 = types.f64
_WIDE = np.dtype(np.float64)


def _operator(name: str) -> Callable[..., str]:
    return lambda w, *operands: getattr(w, name)(*operands)


def _translated(name: str) -> Callable[..., str]:
    """The primitive of tensors of the same name."""
    return lambda w, *operands: elementwise.ELEMENTWISE[name](w, _F64, *operands)


def _scaled(name: str, factor: float) -> Callable[..., str]:
    """A function, times a number."""
    return lambda w, x: w.Mul(FUNCTIONS[name](w, x), f64(w, factor))


def _asin(w: Writer, x: str) -> str:
    """atan2(x, sqrt((1 - x)(1 + x)))"""
    one = f64(w, 1)
    return _translated("atan2")(w, x, w.Sqrt(w.Mul(w.Sub(one, x), w.Add(one, x))))


def _acos(w: Writer, x: str) -> str:
    one = f64(w, 1)
    return _translated("atan2")(w, w.Sqrt(w.Mul(w.Sub(one, x), w.Add(one, x))), x)


def _sinh(w: Writer, x: str) -> str:
    """(e + e / (e + 1)) / 2, where e = exp(x) - 1, of the size of x."""
    e = smooth.expm1(w, w.Abs(x), _WIDE)
    size = w.Mul(w.Add(e, w.Div(e, w.Add(e, f64(w, 1)))), f64(w, 0.5))
    return elementwise.copysign(w, _F64, size, x)


def _cosh(w: Writer, x: str) -> str:
    e = w.Exp(w.Abs(x))
    return w.Mul(w.Add(e, w.Reciprocal(e)), f64(w, 0.5))


def _asinh(w: Writer, x: str) -> str:
    """log1p(x + x² / (1 + sqrt(1 + x²))), of the size of x."""
    one, size = f64(w, 1), w.Abs(x)
    square = w.Mul(size, size)
    more = w.Div(square, w.Add(one, w.Sqrt(w.Add(one, square))))
    return elementwise.copysign(w, _F64, smooth.log1p(w, w.Add(size, more), _WIDE), x)


def _acosh(w: Writer, x: str) -> str:
    """log1p(t + sqrt(2t + t²)), where t = x - 1."""
    t = w.Sub(x, f64(w, 1))
    root = w.Sqrt(w.Add(w.Mul(t, f64(w, 2)), w.Mul(t, t)))
    return smooth.log1p(w, w.Add(t, root), _WIDE)


def _atanh(w: Writer, x: str) -> str:
    ratio = w.Div(w.Mul(x, f64(w, 2)), w.Sub(f64(w, 1), x))
    return w.Mul(smooth.log1p(w, ratio, _WIDE), f64(w, 0.5))


def _cbrt(w: Writer, x: str) -> str:
    """A power, and a step of Newton's method, which makes up for 1/3 being rounded."""
    size = w.Abs(x)
    root = w.Pow(size, f64(w, 1 / 3))
    square = w.Mul(root, root)
    better = w.Sub(root, w.Div(w.Sub(w.Mul(square, root), size), w.Mul(square, f64(w, 3))))
    root = w.Where(w.Or(w.Equal(size, f64(w, 0)), w.IsInf(size)), size, better)
    return elementwise.copysign(w, _F64, root, x)


def _hypot(w: Writer, x: str, z: str) -> str:
    """By the larger of the two, so that no square is out of range."""
    x, z = w.Abs(x), w.Abs(z)
    large, small = w.Max(x, z), w.Min(x, z)
    known = w.Or(w.Equal(large, f64(w, 0)), w.IsInf(large))
    ratio = w.Div(small, w.Where(known, f64(w, 1), large))
    root = w.Mul(large, w.Sqrt(w.Add(w.Mul(ratio, ratio), f64(w, 1))))
    return w.Where(known, large, root)


def _log_of_sum(w: Writer, x: str, z: str, base: float | None) -> str:
    """log(exp(x) + exp(z)), also to the base 2."""
    scale = 1.0 if base is None else math.log(base)
    apart = w.Neg(w.Mul(w.Abs(w.Sub(x, z)), f64(w, scale)))
    more = w.Div(smooth.log1p(w, w.Exp(apart), _WIDE), f64(w, scale))
    large = w.Max(x, z)
    return w.Where(w.Equal(x, z), w.Add(x, f64(w, math.log(2) / scale)), w.Add(large, more))


def _remainder(w: Writer, x: str, z: str) -> str:
    return elementwise.mod(w, _F64, x, z)


def _ignoring_nan(name: str) -> Callable[..., str]:
    def translated(w: Writer, x: str, z: str) -> str:
        found = getattr(w, name)(x, z)
        return w.Where(w.IsNaN(x), z, w.Where(w.IsNaN(z), x, found))

    return translated


def _heaviside(w: Writer, x: str, z: str) -> str:
    step = w.cast(w.Greater(x, f64(w, 0)), np.float64)
    return w.Where(w.IsNaN(x), x, w.Where(w.Equal(x, f64(w, 0)), z, step))


def _sign(w: Writer, x: str) -> str:
    return w.Where(w.IsNaN(x), x, elementwise.ELEMENTWISE["sign"](w, _F64, x))


def _rounded(kind: types.DType) -> Callable[..., str]:
    return lambda w, x: w.cast(elementwise.cast(w, x, _F64, kind), np.float64)


def _pick(w: Writer, i: str, *table: str) -> str:
    """An entry of a table; one that is counted backward too."""
    rows = w.Concat(*(w.reshape(x, (1,)) for x in table), axis=0)
    return w.Gather(rows, w.cast(i, np.int64), axis=0)


def _find(w: Writer, x: str, *table: str) -> str:
    """The first place of a number in a table, or -1."""
    found = f64(w, -1)
    for k, entry in reversed([*enumerate(table)]):
        found = w.Where(w.Equal(x, entry), f64(w, k), found)
    return found


def _same(w: Writer, x: str) -> str:
    return x


FUNCTIONS: dict[str, Callable[..., str]] = {  # by their names in `math` and in numpy
    **{"sqrt": _operator("Sqrt"), "fabs": _operator("Abs"), "absolute": _operator("Abs")},
    **{"floor": _operator("Floor"), "ceil": _operator("Ceil"), "trunc": _translated("trunc")},
    **{"rint": _operator("Round"), "negative": _operator("Neg"), "positive": _same},
    **{"square": lambda w, x: w.Mul(x, x), "reciprocal": _operator("Reciprocal"), "sign": _sign},
    **{"exp": _operator("Exp"), "log": _operator("Log"), "tanh": _operator("Tanh")},
    **{"sin": _operator("Sin"), "cos": _operator("Cos")},
    **{name: _translated(name) for name in ("expm1", "log1p", "erf", "erfc")},
    "exp2": lambda w, x: w.Pow(f64(w, 2), x),
    **{"log2": _scaled("log", 1 / math.log(2)), "log10": _scaled("log", 1 / math.log(10))},
    **{"tan": lambda w, x: w.Div(w.Sin(x), w.Cos(x)), "cbrt": _cbrt, "hypot": _hypot},
    **{"asin": _asin, "arcsin": _asin, "acos": _acos, "arccos": _acos},
    **{"atan": smooth.atan, "arctan": smooth.atan, "sinh": _sinh, "cosh": _cosh},
    **{"asinh": _asinh, "arcsinh": _asinh, "acosh": _acosh, "arccosh": _acosh},
    **{"atanh": _atanh, "arctanh": _atanh},
    **{
        "degrees": _scaled("positive", 180 / math.pi),
        "radians": _scaled("positive", math.pi / 180),
    },
    **{
        "rad2deg": _scaled("positive", 180 / math.pi),
        "deg2rad": _scaled("positive", math.pi / 180),
    },
    **{"fmod": _translated("fmod"), "copysign": _translated("copysign"), "remainder": _remainder},
    **{"atan2": _translated("atan2"), "arctan2": _translated("atan2")},
    **{"add": _operator("Add"), "subtract": _operator("Sub"), "multiply": _operator("Mul")},
    **{"divide": _operator("Div"), "maximum": _operator("Max"), "minimum": _operator("Min")},
    **{"fmax": _ignoring_nan("Max"), "fmin": _ignoring_nan("Min"), "heaviside": _heaviside},
    **{"floor_divide": _translated("floordiv"), "power": _operator("Pow")},
    **{"float_power": _operator("Pow"), "pow": _operator("Pow")},
    "logaddexp": lambda w, x, z: _log_of_sum(w, x, z, None),
    "logaddexp2": lambda w, x, z: _log_of_sum(w, x, z, 2),
}
HOST: dict[str, Callable[..., str]] = {
    **{f"host_{name}": function for name, function in FUNCTIONS.items() if name != "pow"},
    **{f"host_np_{name}": function for name, function in FUNCTIONS.items()},
    **{"host_add": _operator("Add"), "host_sub": _operator("Sub"), "host_mul": _operator("Mul")},
    **{"host_div": _operator("Div"), "host_pow": _operator("Pow"), "host_neg": _operator("Neg")},
    **{"host_math_pow": _operator("Pow"), "host_abs": _operator("Abs")},
    **{"host_floordiv": _translated("floordiv"), "host_mod": _remainder},
    **{"host_round": _operator("Round"), "host_float": _same, "host_pick": _pick},
    **{"host_find": _find, "host_f32": _rounded(types.f32), "host_f16": _rounded(types.f16)},
    "host_bf16": _rounded(types.bf16),
}
