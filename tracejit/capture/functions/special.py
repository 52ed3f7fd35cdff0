"""Special functions: log Γ, its derivatives, inverses of the error function, Bessel's I0, I1; zeta.

Each is a range reduction by an identity of Abramowitz and Stegun (chapters 6, 7, 9 and 26), and a
Chebyshev series in the rest (`series.py`). Slopes are torch's own derivatives.
"""

from __future__ import annotations

import math
from functools import wraps

import torch

from tracejit.capture.functions import series, zeta
from tracejit.capture.functions.common import (
    as_float,
    in_place,
    operand,
    pointwise,
    register,
    result_dtype,
)
from tracejit.capture.functions.composites import in_torch
from tracejit.capture.functions.rows import elementwise, emitted, function_of, undefined
from tracejit.capture.trace.table import Formula, Row, rule
from tracejit.capture.trace.tensor import TO_TORCH, TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Value

Tensor = torch.Tensor


def chebyshev(t: Trace, u: Value, coefficients: tuple[float, ...]) -> Value:
    """The sum of c[k]·T[k](u), u within -1 … 1, by Clenshaw's recurrence."""
    b, twice = t.b, t.b.add(u, u)
    last = b.add(b.mul(u, 0.0), coefficients[-1])
    before = b.mul(u, 0.0)
    for c in reversed(coefficients[1:-1]):
        last, before = b.sub(b.add(b.mul(twice, last), c), before), last
    return b.add(b.sub(b.mul(u, last), before), coefficients[0])


def polynomial(t: Trace, x: Value, *coefficients: float) -> Value:
    """c[0] + c[1]·x + c[2]·x² + …, by Horner's rule."""
    total = t.b.mul(x, coefficients[-1])
    for c in reversed(coefficients[1:-1]):
        total = t.b.mul(t.b.add(total, c), x)
    return t.b.add(total, coefficients[0])


# ---- gamma


def stirling(t: Trace, x: Value) -> Value:
    """What Stirling's formula leaves of log Γ(x), for x from 3."""
    b = t.b
    over = b.div(1.0, x)
    rest = chebyshev(t, b.sub(b.mul(b.mul(over, over), 18.0), 1.0), series.LGAMMA_FAR)
    return b.mul(over, rest)


def _lgamma(t: Trace, x: Value) -> Value:
    """log|Γ(x)|: from 1 to 3 a series that has the zeros as factors, beyond what Stirling's formula
    leaves, and below 0 the reflection Γ(x)·Γ(1 - x) = π / sin(πx)."""
    b = t.b
    below = b.lt(x, 0.0)
    z = b.where(below, b.sub(1.0, x), x)
    small = b.lt(z, 1.0)
    near = b.where(small, b.add(z, 1.0), b.minimum(z, 3.0))
    zeros = b.mul(b.sub(near, 1.0), b.sub(near, 2.0))
    inner = b.mul(zeros, chebyshev(t, b.sub(near, 2.0), series.LGAMMA_NEAR))
    inner = b.add(inner, 0.0)  # the zeros at 1 and 2 are positive
    inner = b.where(small, b.sub(inner, b.log(z)), inner)
    far = b.maximum(z, 3.0)
    # (x - 1/2)·log(x) - x as one product, as both may be infinite
    outer = b.mul(b.sub(far, 0.5), b.sub(b.log(far), 1.0))
    outer = b.add(b.add(outer, stirling(t, far)), 0.5 * math.log(2 * math.pi) - 0.5)
    value = b.where(b.lt(z, 3.0), inner, outer)
    sine, _ = zeta.half_turns(t, x)
    mirrored = b.sub(b.sub(math.log(math.pi), b.log(b.abs(sine))), value)
    pole = b.or_(b.eq(x, -math.inf), b.eq(sine, 0.0))  # far down all numbers are whole
    mirrored = b.where(pole, math.inf, mirrored)
    return b.where(below, mirrored, value)


# B[2k] / 2k of the Bernoulli numbers
_DIGAMMA_TAIL = (1 / 12, -1 / 120, 1 / 252, -1 / 240, 1 / 132, -691 / 32760, 1 / 12)


def _digamma(t: Trace, x: Value) -> Value:
    """ψ(x): by the recurrence up to 10, then the asymptotic series; below 0 by the reflection
    ψ(1 - x) - ψ(x) = π / tan(πx)."""
    b = t.b
    below = b.lt(x, 0.0)
    z = b.where(below, b.sub(1.0, x), x)
    total = b.full(0.0, shape=x.type.shape, dtype=x.type.dtype, device=x.type.device)
    for _ in range(10):
        small = b.lt(z, 10.0)
        total = b.where(small, b.add(total, b.div(1.0, z)), total)
        z = b.where(small, b.add(z, 1.0), z)
    over = b.div(1.0, z)
    square = b.mul(over, over)
    tail = polynomial(t, square, *_DIGAMMA_TAIL)
    value = b.sub(b.sub(b.log(z), b.mul(over, 0.5)), b.mul(square, tail))
    value = b.where(b.eq(z, math.inf), z, b.sub(value, total))
    sine, cosine = zeta.half_turns(t, x)
    mirrored = b.sub(value, b.div(b.mul(cosine, math.pi), sine))
    mirrored = b.where(b.eq(sine, 0.0), math.nan, mirrored)
    value = b.where(below, mirrored, value)
    return b.where(b.eq(x, 0.0), b.copysign(math.inf, b.neg(x)), value)


def _trigamma(t: Trace, x: Value) -> Value:
    """ψ'(x), as torch computes it: six steps of the recurrence, then the asymptotic series; below
    1/2 by the reflection ψ'(x) + ψ'(1 - x) = π² / sin²(πx)."""
    b = t.b
    below = b.lt(x, 0.5)
    z = b.where(below, b.sub(1.0, x), x)
    total = b.full(0.0, shape=x.type.shape, dtype=x.type.dtype, device=x.type.device)
    for _ in range(6):
        total = b.add(total, b.div(1.0, b.mul(z, z)))
        z = b.add(z, 1.0)
    over = b.div(1.0, z)
    square = b.mul(over, over)
    tail = b.mul(square, polynomial(t, square, 1 / 6, -1 / 30, 1 / 42))
    total = b.add(total, b.mul(b.add(b.add(b.mul(over, 0.5), 1.0), tail), over))
    sine = b.sin(b.mul(x, math.pi))  # not the distance's: near poles as inexact as eager
    return b.where(below, b.sub(b.div(math.pi**2, b.mul(sine, sine)), total), total)


TRIGAMMA = Row(
    "polygamma",
    _trigamma,
    (lambda t, g, y, x: t.b.mul(g, zeta.polygamma(t, 2, x)),),
    dtypes="to_float",
)
DIGAMMA = Row(
    "digamma psi",
    _digamma,
    (lambda t, g, y, x: t.b.mul(g, emitted(t, TRIGAMMA, (x,))),),
    dtypes="to_float",
)
LGAMMA = Row(
    "lgamma gammaln",
    _lgamma,
    (lambda t, g, y, x: t.b.mul(g, emitted(t, DIGAMMA, (x,))),),
    dtypes="to_float",
)
_POLYGAMMA = tuple(function_of(row, __name__) for row in (DIGAMMA, TRIGAMMA))


def _polygamma(t: Trace, n: int, input: Tensor) -> TracedTensor:
    """The n-th derivative of ψ."""
    if n < 0:
        raise t.shape_error("polygamma(n, x) does not support negative n.")
    if n > 1:
        return pointwise(t, lambda x: zeta.polygamma(t, n, x), (input,), to=as_float)
    return _POLYGAMMA[n](t, input)


@rule(torch.polygamma, torch.special.polygamma)
def polygamma(t: Trace, n: int, input: Tensor) -> TracedTensor:
    return _polygamma(t, int(n), input)


@rule(Tensor.polygamma)
def _polygamma_method(t: Trace, input: Tensor, n: int) -> TracedTensor:
    return _polygamma(t, int(n), input)


rule(Tensor.polygamma_)(in_place(_polygamma_method))


def _mvlgamma(t: Trace, input: Tensor, p: int) -> Tensor:
    """log of the multivariate Γ: a constant, and lgamma(x - j/2) for j below p."""
    if p < 1:
        raise t.shape_error("p has to be greater than or equal to 1")
    if input.dtype is torch.bool:
        raise t.shape_error("The input tensor may not be a boolean tensor.")
    halves = torch.arange(p, dtype=input.dtype if input.is_floating_point() else None) * -0.5
    terms = torch.lgamma(input.unsqueeze(-1) + halves.to(input.device))
    return terms.sum(-1) + 0.25 * p * (p - 1) * math.log(math.pi)


register(("mvlgamma", "multigammaln"), in_torch(_mvlgamma))

# ---- inverses of the error function


def _tail(t: Trace, q: Value) -> Value:
    """x with erfc(x) = q, for q up to about 1: an approximation to three digits (26.2.23), and
    Newton's steps on the logarithm of erfc, which is almost a parabola."""
    b = t.b
    root = b.sqrt(b.mul(b.log(b.mul(q, 0.5)), -2.0))
    above = polynomial(t, root, 2.515517, 0.802853, 0.010328)
    below = polynomial(t, root, 1.0, 1.432788, 0.189269, 0.001308)
    x = b.mul(b.sub(root, b.div(above, below)), math.sqrt(0.5))
    for _ in range(3):
        here = b.erfc(x)
        slope = b.mul(b.mul(here, b.exp(b.mul(x, x))), math.sqrt(math.pi) / 2)
        x = b.add(x, b.mul(b.log(b.div(here, q)), slope))
    return b.where(b.eq(q, 0.0), math.inf, x)


def _center(t: Trace, y: Value) -> Value:
    """x with erf(x) = y, for |y| up to 1/2: the power series, and Newton's steps."""
    b, pi = t.b, math.pi
    rise = (1.0, pi / 12, 7 * pi**2 / 480, 127 * pi**3 / 40320)
    x = b.mul(b.mul(y, math.sqrt(pi) / 2), polynomial(t, b.mul(y, y), *rise))
    for _ in range(2):
        slope = b.mul(b.exp(b.mul(x, x)), math.sqrt(pi) / 2)
        x = b.sub(x, b.mul(b.sub(b.erf(x), y), slope))
    return x


def _erfinv(t: Trace, y: Value) -> Value:
    b, size = t.b, t.b.abs(y)
    far = b.copysign(_tail(t, b.sub(1.0, size)), y)
    value = b.where(b.lt(size, 0.5), _center(t, y), far)
    return b.where(b.gt(size, 1.0), math.nan, value)


def _ndtri(t: Trace, p: Value) -> Value:
    """The quantile of the normal distribution: √2·erfinv(2p - 1), from the nearer end."""
    b = t.b
    other = b.sub(1.0, p)
    far = _tail(t, b.mul(b.minimum(p, other), 2.0))
    far = b.where(b.lt(p, 0.5), b.neg(far), far)
    middle = b.lt(b.abs(b.sub(p, 0.5)), 0.25)
    value = b.mul(b.where(middle, _center(t, b.mul(b.sub(p, 0.5), 2.0)), far), math.sqrt(2.0))
    return b.where(b.or_(b.lt(p, 0.0), b.gt(p, 1.0)), math.nan, value)


def _erfcx(t: Trace, x: Value) -> Value:
    """exp(x²)·erfc(x)."""
    b = t.b
    size = b.abs(x)
    u = b.div(b.sub(size, 3.75), b.add(size, 3.75))
    value = b.div(chebyshev(t, u, series.ERFCX), b.add(b.add(size, size), 1.0))
    value = b.where(b.eq(x, math.inf), 0.0, value)
    mirrored = b.sub(b.mul(b.exp(b.mul(x, x)), 2.0), value)
    return b.where(b.lt(x, 0.0), mirrored, value)


def _log_ndtr(t: Trace, x: Value) -> Value:
    """log of the normal distribution, whose left tail is taken without the exponential."""
    b = t.b
    z = b.mul(x, math.sqrt(0.5))
    left = b.sub(b.log(b.mul(_erfcx(t, b.neg(z)), 0.5)), b.mul(z, z))
    right = b.log1p(b.mul(b.erfc(z), -0.5))
    return b.where(b.lt(x, -1.0), left, right)


def _d_erfinv(t: Trace, g: Value, y: Value, x: Value) -> Value:
    return t.b.mul(g, t.b.mul(t.b.exp(t.b.mul(y, y)), math.sqrt(math.pi) / 2))


def _d_ndtri(t: Trace, g: Value, y: Value, x: Value) -> Value:
    b = t.b
    return b.mul(g, b.mul(b.exp(b.mul(b.mul(y, y), 0.5)), math.sqrt(2 * math.pi)))


def _d_erfcx(t: Trace, g: Value, y: Value, x: Value) -> Value:
    b = t.b
    return b.mul(b.sub(b.mul(b.mul(x, y), 2.0), 2 / math.sqrt(math.pi)), g)


def _d_log_ndtr(t: Trace, g: Value, y: Value, x: Value) -> Value:
    b = t.b
    scaled = emitted(t, ERFCX, (b.mul(x, -math.sqrt(0.5)),))
    return b.mul(b.div(g, scaled), math.sqrt(2 / math.pi))


# ---- modified Bessel functions of the first kind


def _i0e(t: Trace, x: Value) -> Value:
    """exp(-|x|)·I0(x)."""
    return _bessel(t, t.b.abs(x), series.I0E_NEAR, series.I0E_FAR)


def _i1e(t: Trace, x: Value) -> Value:
    """exp(-|x|)·I1(x)."""
    size = t.b.abs(x)
    return t.b.copysign(_bessel(t, size, series.I1E_NEAR, series.I1E_FAR, odd=True), x)


def _bessel(
    t: Trace, size: Value, near: tuple[float, ...], far: tuple[float, ...], *, odd: bool = False
) -> Value:
    """A series of x up to 8, and one of 1 / x beyond."""
    b = t.b
    close = b.minimum(size, 8.0)
    inner = chebyshev(t, b.sub(b.mul(close, 0.25), 1.0), near)
    inner = b.mul(inner, close) if odd else inner
    distant = b.maximum(size, 8.0)
    over = b.div(1.0, distant)
    outer = b.div(chebyshev(t, b.sub(b.mul(over, 16.0), 1.0), far), b.sqrt(distant))
    return b.where(b.le(size, 8.0), inner, outer)


def _unscaled(scaled: Formula) -> Formula:
    return lambda t, x: t.b.mul(scaled(t, x), t.b.exp(t.b.abs(x)))


def _d_i0e(t: Trace, g: Value, y: Value, x: Value) -> Value:
    b = t.b
    return b.mul(g, b.sub(emitted(t, I1E, (x,)), b.mul(b.sign(x), y)))


def _d_i1(t: Trace, g: Value, y: Value, x: Value) -> Value:
    b = t.b
    slope = b.sub(emitted(t, I0, (x,)), b.div(y, x))
    return b.mul(g, b.where(b.eq(x, 0.0), 0.5, slope))


def _d_i1e(t: Trace, g: Value, y: Value, x: Value) -> Value:
    b = t.b
    slope = b.sub(emitted(t, I0E, (x,)), b.mul(y, b.add(b.sign(x), b.div(1.0, x))))
    return b.mul(g, b.where(b.eq(x, 0.0), 0.5, slope))


def _unary(names: str, value: Formula, slope: Formula) -> Row:
    return Row(names, value, (slope,), dtypes="to_float")


ERFCX = _unary("erfcx", _erfcx, _d_erfcx)
I0 = _unary("i0", _unscaled(_i0e), lambda t, g, y, x: t.b.mul(g, emitted(t, I1, (x,))))
I0E = _unary("i0e", _i0e, _d_i0e)
I1 = _unary("i1", _unscaled(_i1e), _d_i1)
I1E = _unary("i1e", _i1e, _d_i1e)
for _row in (LGAMMA, DIGAMMA, _unary("erfinv", _erfinv, _d_erfinv), I0, I0E):
    elementwise(_row, __name__)


def _wide_only(row: Row, *, gradient: bool) -> None:
    """Register a function that eager has not for bf16 and f16, or of which it has no `gradient`."""
    run = function_of(row, __name__)

    @wraps(run)
    def function(t: Trace, input: Tensor) -> TracedTensor:
        h = t.lift(input)
        if h.dtype.narrow and not gradient:
            raise t.not_implemented(row.name, h.dtype)
        if h.dtype.narrow and t.grad_on and t.requires_grad(h):
            raise t.unsupported(f"Eager has no derivative of {row.name} of {TO_TORCH[h.dtype]}")
        return run(t, input)

    register(row.names.split(), function, row=row)


for _row in (_unary("ndtri", _ndtri, _d_ndtri), _unary("log_ndtr", _log_ndtr, _d_log_ndtr), ERFCX):
    _wide_only(_row, gradient=False)
for _row in (I1, I1E):
    _wide_only(_row, gradient=True)


# ---- Hurwitz's zeta function


def _d_zeta(t: Trace, g: Value, y: Value, s: Value, q: Value) -> Value:
    b = t.b
    return b.mul(b.mul(g, b.neg(s)), emitted(t, ZETA, (b.add(s, 1.0), q)))


_slopes = undefined("zeta", "x"), _d_zeta
ZETA = Row("zeta", zeta.hurwitz, _slopes, arity=2, dtypes="to_float")
_of_pairs = function_of(ZETA, __name__)


def _zeta(t: Trace, input: object, other: object) -> TracedTensor:
    """The sum of (other + k)^-input; eager has it not for bf16 and f16."""
    dtype = result_dtype([operand(t, x) for x in (input, other)])
    if dtype.narrow:
        raise t.not_implemented("zeta_cpu", dtype)
    return _of_pairs(t, input, other)


register(("zeta",), _zeta, row=ZETA)
