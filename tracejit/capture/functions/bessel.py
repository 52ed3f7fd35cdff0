"""Bessel's and Airy's functions, of which torch has no derivative: their results have no history.

Each is torch's own formula (ATen/native/Math.h, after Cephes): a rational function or a series near
0, an asymptotic form beyond. Values at 0 and at infinities are torch's as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from tracejit.capture.functions import cephes
from tracejit.capture.functions.common import as_float, pointwise
from tracejit.capture.functions.special import I0, I1, polynomial
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Value

Tensor = torch.Tensor
OVER_PI = 2 / math.pi


def forward_only(name: str, value: Callable[[Trace, Value], Value]) -> None:
    """Register a function whose result has no history; eager has it not for bf16 and f16."""

    def function(t: Trace, input: Tensor) -> TracedTensor:
        h = t.lift(input)
        if h.dtype.narrow:
            raise t.not_implemented(f"{name}_cpu", h.dtype)
        with t.untaped():
            return pointwise(t, lambda x: value(t, x), (input,), to=as_float)

    rule(getattr(torch.special, name))(function)


def _ratio(t: Trace, x: Value, above: Sequence[float], below: Sequence[float]) -> Value:
    return t.b.div(polynomial(t, x, *reversed(above)), polynomial(t, x, *reversed(below)))


def _between(t: Trace, z: Value, first: float, second: float) -> Value:
    """(z - first)·(z - second): a function without its zeros is smooth."""
    return t.b.mul(t.b.sub(z, first), t.b.sub(z, second))


# ---- of the first and second kind

_ZEROS_0 = 5.78318596294678452118, 30.4712623436620863991  # squares of the first two zeros of J0
_ZEROS_1 = 14.6819706421238932572, 49.2184563216946036703
_HANKEL_0 = cephes.PP_0, cephes.PQ_0, cephes.QP_0, cephes.QQ_0
_HANKEL_1 = cephes.PP_1, cephes.PQ_1, cephes.QP_1, cephes.QQ_1


def _hankel(t: Trace, x: Value, tables: tuple, phase: float, *, second: bool) -> Value:
    """√(2 / πx)·(P·cos(x - phase) - Q·sin(x - phase)), of the second kind (P·sin + Q·cos)."""
    b = t.b
    over = b.div(5.0, x)
    z = b.mul(over, over)
    p, q = _ratio(t, z, *tables[:2]), b.mul(over, _ratio(t, z, *tables[2:]))
    angle = b.sub(x, phase)
    cos, sin = b.cos(angle), b.sin(angle)
    if second:
        wave = b.add(b.mul(p, sin), b.mul(q, cos))
    else:
        wave = b.sub(b.mul(p, cos), b.mul(q, sin))
    return b.div(b.mul(wave, math.sqrt(OVER_PI)), b.sqrt(x))


def _j0(t: Trace, x: Value) -> Value:
    b, x = t.b, t.b.abs(x)
    z = b.mul(x, x)
    near = b.mul(_between(t, z, *_ZEROS_0), _ratio(t, z, cephes.J0_P, cephes.J0_Q))
    near = b.where(b.lt(x, 1e-5), b.sub(1.0, b.mul(z, 0.25)), near)
    return b.where(b.le(x, 5.0), near, _hankel(t, x, _HANKEL_0, math.pi / 4, second=False))


def _j1(t: Trace, x: Value) -> Value:
    b, z, size = t.b, t.b.mul(x, x), t.b.abs(x)
    near = b.mul(b.mul(_ratio(t, z, cephes.J1_P, cephes.J1_Q), x), _between(t, z, *_ZEROS_1))
    far = _hankel(t, size, _HANKEL_1, 0.75 * math.pi, second=False)
    return b.where(b.le(size, 5.0), near, b.where(b.lt(x, 0.0), b.neg(far), far))


def _y0(t: Trace, x: Value) -> Value:
    """-∞ at 0, and NaN below, by the logarithm."""
    b, z = t.b, t.b.mul(x, x)
    near = b.mul(b.mul(b.log(x), OVER_PI), _j0(t, x))
    near = b.add(_ratio(t, z, cephes.Y0_P, cephes.Y0_Q), near)
    return b.where(b.le(x, 5.0), near, _hankel(t, x, _HANKEL_0, math.pi / 4, second=True))


def _y1(t: Trace, x: Value) -> Value:
    b, z = t.b, t.b.mul(x, x)
    near = b.sub(b.mul(_j1(t, x), b.log(x)), b.div(1.0, x))
    near = b.add(b.mul(x, _ratio(t, z, cephes.Y1_P, cephes.Y1_Q)), b.mul(near, OVER_PI))
    near = b.where(b.eq(x, 0.0), -math.inf, near)
    return b.where(b.le(x, 5.0), near, _hankel(t, x, _HANKEL_1, 0.75 * math.pi, second=True))


def _spherical(t: Trace, x: Value) -> Value:
    """sin(x) / x, with its limits."""
    b = t.b
    limits = b.where(b.eq(x, 0.0), 1.0, b.div(b.sin(x), x))
    return b.where(b.eq(b.abs(x), math.inf), 0.0, limits)


# ---- modified


def _first(row: object) -> Callable[[Trace, Value], Value]:
    """I0 or I1, as torch computes it: NaN at infinities."""

    def value(t: Trace, x: Value) -> Value:
        return t.b.where(t.b.eq(t.b.abs(x), math.inf), math.nan, row.value(t, x))

    return value


def _clenshaw(t: Trace, y: Value, coefficients: Sequence[float]) -> Value:
    """Half of what Clenshaw's recurrence for y = 2u leaves: the sum of c[k]·T[k](u), the last term
    first and the constant one halved."""
    b = t.b
    last, before, further = coefficients[0], 0.0, 0.0
    for c in coefficients[1:]:
        before, further = last, before
        last = b.add(b.sub(b.mul(y, before), further), c)
    return b.mul(b.sub(last, further), 0.5)


def _k0(t: Trace, x: Value) -> Value:
    """Up to 2."""
    b = t.b
    near = _clenshaw(t, b.sub(b.mul(x, x), 2.0), cephes.K0_NEAR)
    return b.sub(near, b.mul(b.log(b.mul(x, 0.5)), I0.value(t, x)))


def _k1(t: Trace, x: Value) -> Value:
    """Up to 2."""
    b = t.b
    near = b.div(_clenshaw(t, b.sub(b.mul(x, x), 2.0), cephes.K1_NEAR), x)
    near = b.add(b.mul(b.log(b.mul(x, 0.5)), I1.value(t, x)), near)
    return b.where(b.eq(x, 0.0), math.inf, near)


def _second(
    near: Callable[[Trace, Value], Value], series: Sequence[float], *, scaled: bool
) -> Callable[[Trace, Value], Value]:
    """K0 or K1, or those times exp(x): ∞ at 0, and NaN below, by the logarithm."""

    def value(t: Trace, x: Value) -> Value:
        b = t.b
        close, far = near(t, x), _clenshaw(t, b.sub(b.div(8.0, x), 2.0), series)
        if scaled:
            close = b.mul(close, b.exp(x))
        else:
            far = b.mul(b.exp(b.neg(x)), far)
        return b.where(b.le(x, 2.0), close, b.div(far, b.sqrt(x)))

    return value


# ---- Airy's

_TERMS = 13  # of the series for |x| up to 2.09
_AT_0, _SLOPE_AT_0 = 0.355028053887817239260, 0.258819403792806798405


def _airy(t: Trace, x: Value) -> Value:
    """DLMF 9.4.1 around 0, 9.7.5 above and 9.7.9 below; NaN at infinities."""
    b, size = t.b, t.b.abs(x)
    cube = b.mul(b.mul(x, x), x)
    even, odd = [1.0], [1.0]
    for k in range(1, _TERMS):
        even.append(even[-1] / ((3 * k - 1) * 3 * k))
        odd.append(odd[-1] / (3 * k * (3 * k + 1)))
    near = b.mul(polynomial(t, cube, *even), _AT_0)
    near = b.sub(near, b.mul(b.mul(polynomial(t, cube, *odd), x), _SLOPE_AT_0))
    root = b.sqrt(size)
    zeta = b.div(b.mul(b.mul(size, 2.0), root), 3.0)
    over, scale = b.div(1.0, zeta), b.div(math.sqrt(1 / math.pi), b.sqrt(root))
    above = b.mul(scale, _ratio(t, over, cephes.AIRY_P, cephes.AIRY_Q))
    above = b.div(above, b.mul(b.exp(zeta), 2.0))
    above = b.where(b.gt(x, 103.892), 0.0, above)
    z, angle = b.mul(over, over), b.add(zeta, math.pi / 4)
    sines = b.add(b.mul(z, _ratio(t, z, cephes.AIRY_FP, cephes.AIRY_FQ)), 1.0)
    cosines = b.mul(over, _ratio(t, z, cephes.AIRY_GP, cephes.AIRY_GQ))
    below = b.sub(b.mul(b.sin(angle), sines), b.mul(b.cos(angle), cosines))
    below = b.mul(below, scale)
    out = b.where(b.lt(x, -2.09), below, b.where(b.ge(x, 2.09), above, near))
    return b.where(b.eq(size, math.inf), math.nan, out)


for _name, _value in (
    ("bessel_j0", _j0),
    ("bessel_j1", _j1),
    ("bessel_y0", _y0),
    ("bessel_y1", _y1),
    ("spherical_bessel_j0", _spherical),
    ("modified_bessel_i0", _first(I0)),
    ("modified_bessel_i1", _first(I1)),
    ("modified_bessel_k0", _second(_k0, cephes.K0_FAR, scaled=False)),
    ("modified_bessel_k1", _second(_k1, cephes.K1_FAR, scaled=False)),
    ("scaled_modified_bessel_k0", _second(_k0, cephes.K0_FAR, scaled=True)),
    ("scaled_modified_bessel_k1", _second(_k1, cephes.K1_FAR, scaled=True)),
    ("airy_ai", _airy),
):
    forward_only(_name, _value)
