"""Smooth functions that ONNX, or onnxruntime in float64, lacks, by operators that both have.

Each takes the writer, a name and the dtype of its elements, float32 or float64, and gives a name;
`atan` takes float64 alone. All work in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np

from tracejit.export.onnx.writer import Writer

_F64 = np.dtype(np.float64)


def _wide(formula: Callable[[Writer, str], str]) -> Callable[[Writer, str, np.dtype], str]:
    """A formula in float64, for either dtype."""

    def applied(w: Writer, x: str, dtype: np.dtype) -> str:
        if dtype == _F64:
            return formula(w, x)
        return w.cast(formula(w, w.cast(x, _F64)), dtype)

    return applied


def f64(w: Writer, value: float) -> str:
    """A number."""
    return w.constant(value, _F64)


def _series(w: Writer, twice: str) -> str:
    """The series of `_of_erfc`, given 2y, by Clenshaw's recurrence."""
    last = before = None
    coefficients = _of_erfc()
    for c in coefficients[:0:-1]:
        found = f64(w, c)
        if last is not None:
            found = w.Add(found, w.Mul(twice, last))
        if before is not None:
            found = w.Sub(found, before)
        last, before = found, last
    half = w.Mul(twice, f64(w, 0.5))
    return w.Add(w.Sub(w.Mul(half, last), before), f64(w, coefficients[0]))


def _scaled_erfc(z: float) -> float:
    """exp(z²)·erfc(z): from 2 on by its continued fraction (Abramowitz and Stegun 7.1.14)."""
    if z < 2:
        return math.exp(z * z) * math.erfc(z)
    rest = z
    for k in range(200, 0, -1):
        rest = z + k / 2 / rest
    return 1 / (rest * math.sqrt(math.pi))


@cache
def _of_erfc() -> np.ndarray:
    """log(exp(z²)·erfc(z) / t) as a function of y = 2t - 1, where t = 2 / (2 + z)."""

    def at(y: float) -> float:
        t = (y + 1) / 2
        return math.log(_scaled_erfc(2 / t - 2) / t)

    return np.polynomial.chebyshev.chebinterpolate(np.vectorize(at), 30)


def _erfc(w: Writer, x: str) -> str:
    size, two = w.Abs(x), f64(w, 2)
    t = w.Div(two, w.Add(two, size))
    twice = w.Sub(w.Mul(t, f64(w, 4)), two)
    short = w.cast(w.cast(size, np.float32), _F64)  # whose square is exact
    rest = w.Mul(w.Sub(size, short), w.Add(size, short))
    found = w.Mul(w.Exp(w.Neg(w.Mul(short, short))), w.Exp(w.Sub(_series(w, twice), rest)))
    found = w.Mul(t, w.Where(w.Greater(size, f64(w, 40)), f64(w, 0), found))
    return w.Where(w.Less(x, f64(w, 0)), w.Sub(two, found), found)


def _erf(w: Writer, x: str) -> str:
    """Its power series below 1 (Abramowitz and Stegun 7.1.5)."""
    one, zero = f64(w, 1), f64(w, 0)
    near = w.Less(w.Abs(x), one)
    inner = w.Where(near, x, zero)
    square, series = w.Mul(inner, inner), zero
    for n in range(20, -1, -1):
        c = (-1) ** n * 2 / math.sqrt(math.pi) / math.factorial(n) / (2 * n + 1)
        series = w.Add(w.Mul(series, square), f64(w, c))
    return w.Where(near, w.Mul(inner, series), w.Sub(one, _erfc(w, x)))


def _expm1(w: Writer, x: str) -> str:
    """2t / (1 - t), where t = tanh(x / 2), and exp(x) - 1 far from 0."""
    one, two = f64(w, 1), f64(w, 2)
    t = w.Tanh(w.Div(x, two))
    near = w.Less(w.Abs(x), one)
    inner = w.Div(w.Mul(t, two), w.Sub(one, w.Where(near, t, f64(w, 0))))
    return w.Where(near, inner, w.Sub(w.Exp(x), one))


def _log1p(w: Writer, x: str) -> str:
    """log(u)·x / (u - 1), where u is 1 + x as rounded (HP-15C Advanced Functions Handbook)."""
    one = f64(w, 1)
    u = w.Add(x, one)
    above = w.Sub(u, one)
    plain = w.Or(w.Equal(above, f64(w, 0)), w.Equal(x, f64(w, math.inf)))
    found = w.Mul(w.Log(u), w.Div(x, w.Where(plain, one, above)))
    return w.Where(plain, x, found)


erfc, expm1, log1p = _wide(_erfc), _wide(_expm1), _wide(_log1p)


def erf(w: Writer, x: str, dtype: np.dtype) -> str:
    """The error function; the operator itself in float32."""
    return _erf(w, x) if dtype == _F64 else w.Erf(x)


def atan(w: Writer, x: str) -> str:
    """The inverse tangent, in float64: that of float32, and the angle from there to x."""
    first = w.cast(w.Atan(w.cast(x, np.float32)), _F64)
    sine, cosine = w.Sin(first), w.Cos(first)
    large = w.Greater(w.Abs(x), f64(w, 1e8))
    kept = w.Where(large, f64(w, 0), x)
    slope = w.Div(w.Sub(w.Mul(kept, cosine), sine), w.Add(cosine, w.Mul(kept, sine)))
    cubed = w.Mul(w.Mul(slope, slope), slope)
    found = w.Add(first, w.Sub(slope, w.Div(cubed, f64(w, 3))))
    quarter = w.Where(w.Less(x, f64(w, 0)), f64(w, -math.pi / 2), f64(w, math.pi / 2))
    tiny = w.Less(w.Abs(x), f64(w, 1e-8))
    return w.Where(tiny, x, w.Where(large, w.Sub(quarter, w.Div(f64(w, 1), x)), found))
