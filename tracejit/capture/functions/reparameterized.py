"""How samples move with the parameters that they were drawn by: gamma, beta and Dirichlet.

A sample x of a distribution with the cumulative function F(x; α) has the derivative -∂F/∂α / f of
its density f (Figurnov et al. 2018, Implicit reparameterization gradients). F has no closed form;
torch has series near the ends, saddle point expansions for large parameters, and rational functions
between, and so have these. All is computed in float64, as in eager on the CPU.
"""

from __future__ import annotations

import numpy as np

from tracejit.capture.functions.common import cast
from tracejit.capture.functions.rows import elementwise, undefined
from tracejit.capture.functions.special import DIGAMMA, polynomial
from tracejit.capture.trace.table import Row
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Value
from tracejit.ir.types import f64


def _f32(x: float) -> float:
    """A threshold that eager has in float32."""
    return float(np.float32(x))


def _without_nan(t: Trace, x: Value) -> Value:
    return t.b.where(t.b.ne(x, x), 0.0, x)


# ---- gamma

# of log(x / α) to the powers 0, 1, 2; four of the numerator by powers of log(α), then four of the
# denominator
_GAMMA = (
    (0.16009398, -0.094634809, 0.025146376, -0.0030648343)
    + (1.0, 0.32668115, 0.10406089, 0.0014179084),
    (0.53487893, 0.1298071, 0.065735949, -0.0015649758)
    + (0.16639465, 0.020070113, -0.0035938915, -0.00058392623),
    (0.040121004, -0.0065914022, -0.0026286047, -0.0013441777)
    + (0.017050642, -0.0021309326, 0.00085092367, -1.5247877e-07),
)


def _gamma_near_zero(t: Trace, a: Value, x: Value) -> Value:
    """By the Taylor series of F."""
    b = t.b
    term, below = b.div(1.0, a), a
    first, second = term, b.mul(term, term)
    numerator = b.full(1.0, shape=x.type.shape, dtype=f64, device=x.type.device)
    for i in range(1, 6):
        numerator = b.mul(numerator, b.div(b.neg(x), float(i)))
        below = b.add(below, 1.0)
        term = b.div(numerator, below)
        first, second = b.add(first, term), b.add(second, b.div(term, below))
    # F = xᵃ·first; the density without Γ(α) is xᵃ⁻¹·exp(-x)
    slope = b.sub(b.mul(b.sub(b.log(x), DIGAMMA.value(t, a)), first), second)
    return _without_nan(t, b.neg(b.mul(b.mul(slope, x), b.exp(x))))


def _gamma_near_mean(t: Trace, a: Value, x: Value) -> Value:
    b, square = t.b, t.b.mul(a, a)
    first = b.add(b.mul(b.mul(a, 24.0), b.add(b.mul(a, 12.0), 1.0)), 1.0)
    second = b.add(b.mul(square, 1440.0), b.mul(b.mul(x, 6.0), b.sub(53.0, b.mul(x, 120.0))))
    second = b.sub(second, b.div(b.mul(b.mul(x, x), 65.0), a))
    second = b.add(second, b.mul(a, b.add(b.mul(x, 3600.0), 107.0)))
    return b.div(b.mul(first, second), b.mul(b.mul(square, square), 1244160.0))


def _gamma_large(t: Trace, a: Value, x: Value) -> Value:
    """Rice's saddle point expansion, away from the mean."""
    b = t.b
    root, away, log = b.sqrt(b.mul(a, 8.0)), b.sub(a, x), b.log(b.div(x, a))
    power = b.pow(b.sub(b.sub(x, a), b.mul(a, log)), -1.5)
    turned = b.where(b.lt(x, a), b.neg(power), power)
    inner = b.mul(log, b.add(b.div(root, away), turned))
    outer = b.div(b.mul(b.sqrt(b.div(2.0, a)), b.add(a, x)), b.mul(away, away))
    over = b.div(1.0, a)
    stirling = polynomial(t, over, 1.0, 1 / 12, 1 / 288)
    return b.neg(b.div(b.mul(b.mul(stirling, x), b.sub(inner, outer)), root))


def _gamma_between(t: Trace, a: Value, x: Value) -> Value:
    b = t.b
    u, v = b.log(b.div(x, a)), b.log(a)
    by_v = [polynomial(t, u, *(row[k] for row in _GAMMA)) for k in range(8)]
    return b.exp(b.div(_horner(t, v, by_v[:4]), _horner(t, v, by_v[4:])))


def _horner(t: Trace, v: Value, coefficients: list[Value]) -> Value:
    total = coefficients[-1]
    for c in reversed(coefficients[:-1]):
        total = t.b.add(t.b.mul(total, v), c)
    return total


def _gamma(t: Trace, alpha: Value, sample: Value) -> Value:
    """The derivative of a sample of the gamma distribution by its shape α."""
    b, dtype = t.b, alpha.type.dtype
    if dtype.narrow:
        raise t.not_implemented("_standard_gamma_grad_cpu", dtype)
    a, x = cast(t, alpha, f64), cast(t, sample, f64)
    low, high = b.mul(a, _f32(0.9)), b.mul(a, _f32(1.1))
    at_mean = b.and_(b.le(low, x), b.le(x, high))
    large = b.where(at_mean, _gamma_near_mean(t, a, x), _gamma_large(t, a, x))
    found = b.where(b.gt(a, 8.0), large, _gamma_between(t, a, x))
    return cast(t, b.where(b.lt(x, _f32(0.8)), _gamma_near_zero(t, a, x), found), dtype)


# ---- beta and Dirichlet

# numerator and denominator: by powers of log(x), of log(α / x), and four of log(total·x / α)
_BETA = (
    (
        (
            (1.003668233, -0.01061107488, -0.0657888334, 0.01201642863),
            (0.6336835991, -0.3557432599, 0.05486251648, -0.001465281033),
            (-0.03276231906, 0.004474107445, 0.002429354597, -0.0001557569013),
        ),
        (
            (0.221950385, -0.3187676331, 0.01799915743, 0.01074823814),
            (-0.2951249643, 0.06219954479, 0.01535556598, 0.001550077057),
            (0.02155310298, 0.004170831599, 0.001292462449, 6.976601077e-05),
        ),
        (
            (-0.05980841433, 0.008441916499, 0.01085618172, 0.002319392565),
            (0.02911413504, 0.01400243777, -0.002721828457, 0.000751041181),
            (0.005900514878, -0.001936558688, -9.495446725e-06, 5.385558597e-05),
        ),
    ),
    (
        (
            (1.0, -0.02924021934, -0.04438342661, 0.007285809825),
            (0.6357567472, -0.3473456711, 0.05454656494, -0.002407477521),
            (-0.03301322327, 0.004845219414, 0.00231480583, -0.0002307248149),
        ),
        (
            (0.5925320577, -0.1757678135, 0.01505928619, 0.000564515273),
            (0.1014815858, -0.06589186703, 0.01272886114, -0.0007316646956),
            (-0.007258481865, 0.001096195486, 0.0003934994223, -4.12701925e-05),
        ),
        (
            (0.06469649321, -0.0236701437, 0.002902096474, -5.896963079e-05),
            (0.001925008108, -0.002869809258, 0.0008000589141, -6.063713228e-05),
            (-0.0003477407336, 6.959756487e-05, 1.097287507e-05, -1.650964693e-06),
        ),
    ),
)


def _beta_near_zero(t: Trace, x: Value, a: Value, c: Value, of: tuple[Value, Value]) -> Value:
    """By α, for x near 0: a Taylor series; `of` are ψ(α) and ψ(α + β)."""
    b = t.b
    factor = b.sub(b.sub(*of), b.log(x))
    over = b.div(1.0, a)
    total = b.mul(over, b.add(factor, over))
    numerator = b.full(1.0, shape=x.type.shape, dtype=f64, device=x.type.device)
    for i in range(1, 11):
        numerator = b.div(b.mul(b.mul(numerator, b.sub(float(i), c)), x), float(i))
        over = b.div(1.0, b.add(a, float(i)))
        total = b.add(total, b.mul(b.mul(numerator, over), b.add(factor, over)))
    return _without_nan(t, b.mul(b.mul(x, b.pow(b.sub(1.0, x), b.neg(c))), total))


def _beta_near_one(t: Trace, x: Value, a: Value, c: Value, of: tuple[Value, Value]) -> Value:
    """By β, for x near 0: a Taylor series; `of` are ψ(α + β) and ψ(β)."""
    b = t.b
    factor = b.sub(*of)
    one = b.full(1.0, shape=x.type.shape, dtype=f64, device=x.type.device)
    numerator, product, slope = one, one, b.sub(one, 1.0)
    total = b.div(factor, a)
    for i in range(1, 9):
        numerator = b.mul(numerator, b.div(b.neg(x), float(i)))
        less = b.sub(c, float(i))
        slope = b.add(b.mul(slope, less), product)
        product = b.mul(product, less)
        term = b.div(numerator, b.add(a, float(i)))
        total = b.add(total, b.mul(term, b.add(slope, b.mul(factor, product))))
    return _without_nan(t, b.neg(b.mul(b.pow(b.sub(1.0, x), b.sub(1.0, c)), total)))


def _beta_large(t: Trace, x: Value, a: Value, c: Value) -> Value:
    """By α, where both parameters are large: Rice's saddle point expansion; at the mean, where that
    has a singularity, a polynomial."""
    b = t.b
    total, product = b.add(a, c), b.mul(a, c)
    mean, rest = b.div(a, total), b.sub(1.0, x)
    deviation = b.div(b.sqrt(b.div(product, b.add(total, 1.0))), total)
    reach = b.mul(deviation, 0.1)
    at_mean = b.and_(b.le(b.sub(mean, reach), x), b.le(x, b.add(mean, reach)))
    return b.where(
        at_mean,
        _beta_at_mean(t, x, a, c, total, rest),
        _beta_off_mean(t, x, a, c, total, rest, b.lt(x, mean)),
    )


def _beta_at_mean(t: Trace, x: Value, a: Value, c: Value, total: Value, rest: Value) -> Value:
    b = t.b
    c2 = b.mul(c, c)
    first = b.mul(b.mul(rest, b.sub(b.mul(c, 135.0), 11.0)), 8.0)
    second = b.sub(b.add(b.mul(b.mul(c, 1620.0), rest), 453.0), b.mul(x, 455.0))
    third = b.mul(b.sub(b.add(b.mul(c, 180.0), 59.0), b.mul(x, 90.0)), 3.0)
    fourth = b.add(b.mul(b.mul(b.add(b.mul(c, 27.0), 16.0), 20.0), x), 43.0)
    poly = b.add(b.mul(second, c), b.mul(a, first))
    poly = b.add(b.mul(third, c2), b.mul(a, poly))
    poly = b.add(b.mul(fourth, b.mul(c2, c)), b.mul(a, poly))
    poly = b.add(b.mul(b.mul(x, 47.0), b.mul(c2, c2)), b.mul(a, poly))
    over = b.mul(b.add(b.mul(a, 12.0), 1.0), b.add(b.mul(c, 12.0), 1.0))
    over = b.div(over, b.mul(total, total))
    cubed = b.mul(b.mul(a, a), a)
    under = b.mul(b.mul(cubed, c2), b.add(b.mul(total, 12.0), 1.0))
    return b.div(b.mul(b.div(over, rest), poly), b.mul(under, 12960.0))


def _beta_off_mean(
    t: Trace, x: Value, a: Value, c: Value, total: Value, rest: Value, below: Value
) -> Value:
    b = t.b
    share = b.div(b.mul(a, c), total)
    factor = b.neg(b.div(x, b.sqrt(b.mul(share, 2.0))))

    def stirling(v: Value) -> Value:
        return polynomial(t, b.div(1.0, v), 1.0, 1 / 12, 1 / 288)

    scale = b.div(b.mul(stirling(a), stirling(c)), stirling(total))
    over = b.add(b.mul(b.mul(b.mul(a, a), rest), 2.0), b.mul(b.mul(a, c), rest))
    over = b.neg(b.add(over, b.mul(x, b.mul(c, c))))
    away = b.sub(b.mul(c, x), b.mul(a, rest))
    under = b.mul(b.sqrt(b.mul(b.div(a, c), 2.0)), b.mul(total, b.sqrt(total)))
    first = b.div(over, b.mul(under, b.mul(away, away)))
    log_a = b.log(b.div(a, b.mul(total, x)))
    log_c = b.log(b.div(c, b.mul(total, rest)))
    third = b.div(b.sqrt(b.mul(share, 8.0)), away)
    fourth = b.pow(b.add(b.mul(c, log_c), b.mul(a, log_a)), -1.5)
    inner = b.add(third, b.where(below, fourth, b.neg(fourth)))
    found = b.add(first, b.mul(b.mul(log_a, 0.5), inner))
    return b.mul(b.mul(scale, factor), found)


def _beta_between(
    t: Trace, x: Value, a: Value, c: Value, total: Value, of: tuple[Value, Value]
) -> Value:
    """A rational function times x·(ψ(α + β) - ψ(α)) / β."""
    b = t.b
    u = b.log(x)
    v = b.sub(b.log(a), u)
    w = b.sub(b.log(total), v)
    p, q = (
        _horner(t, u, [_horner(t, v, [polynomial(t, w, *k) for k in row]) for row in part])
        for part in _BETA
    )
    approximate = b.div(b.mul(x, b.sub(*of)), c)
    return b.mul(b.div(p, q), approximate)


def _dirichlet(t: Trace, sample: Value, alpha: Value, total: Value) -> Value:
    """-∂F/∂α / f / (1 - x) of the beta distribution of α and total - α, at a sample x."""
    b, dtype = t.b, sample.type.dtype
    if dtype.narrow:
        raise t.not_implemented("_dirichlet_grad_cpu", dtype)
    # which way is taken, eager decides in the dtype of the sample
    boundary = b.mul(b.mul(total, sample), b.sub(1.0, sample))
    narrow_c = b.sub(total, alpha)
    low = b.and_(b.le(sample, 0.5), b.lt(boundary, 2.5))
    high = b.and_(b.ge(sample, 0.5), b.lt(boundary, 0.75))
    large = b.and_(b.gt(alpha, 6.0), b.gt(narrow_c, 6.0))
    x, a, s = (cast(t, v, f64) for v in (sample, alpha, total))
    c = b.sub(s, a)
    of_a, of_s = DIGAMMA.value(t, a), DIGAMMA.value(t, s)
    found = b.where(large, _beta_large(t, x, a, c), _beta_between(t, x, a, c, s, (of_s, of_a)))
    near_one = b.neg(_beta_near_one(t, b.sub(1.0, x), c, a, (of_s, of_a)))
    found = b.where(high, near_one, found)
    return cast(t, b.where(low, _beta_near_zero(t, x, a, c, (of_a, of_s)), found), dtype)


GAMMA = Row(
    "_standard_gamma_grad",
    _gamma,
    tuple(undefined("_standard_gamma_grad", name) for name in ("self", "output")),
    arity=2,
    dtypes="floats",
    wide=False,
)
DIRICHLET = Row(
    "_dirichlet_grad",
    _dirichlet,
    tuple(undefined("_dirichlet_grad", name) for name in ("x", "alpha", "total")),
    arity=3,
    dtypes="floats",
    wide=False,
)
for _row in (GAMMA, DIRICHLET):
    elementwise(_row, __name__, inplace=False)
