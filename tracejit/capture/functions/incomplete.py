"""The incomplete gamma functions P(a, x) and Q(a, x) = 1 - P(a, x): igamma and igammac.

As in Cephes four ways, each where it is good, after the Digital Library of Mathematical Functions.
Where x is near a large a: Temme's uniform expansion (8.12). Else for x up to a, or a small x: the
power series (8.7.1), and beyond the continued fraction (8.9.2). Q of small a, x: by xᵃ / Γ(1 + a)
and a series (8.7.3). Sums have as many terms as the dtype needs where they converge most slowly.
"""

from __future__ import annotations

import math

from tracejit.capture.functions import series
from tracejit.capture.functions.rows import elementwise, emitted, undefined
from tracejit.capture.functions.special import LGAMMA, chebyshev, polynomial, stirling
from tracejit.capture.trace.table import Formula, Row
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Value
from tracejit.ir.types import f64

LARGE = 20.0  # from which the expansion near x = a serves, for |x - a| up to NEAR·a
NEAR = 0.3
SMALL = 1.1  # an x up to which power series serve whatever a is


class _Parts:
    """What the ways share: the numbers of terms, and xᵃ·exp(-x) / Γ(a + 1)."""

    def __init__(self, t: Trace, a: Value, x: Value):
        self.t, self.a, self.x = t, a, x
        b, exact = t.b, a.type.dtype is f64
        self.terms, self.steps, self.early = (106, 86, 20) if exact else (50, 26, 12)
        self.least = 1e-18 if exact else 1e-9
        away = b.div(b.sub(x, a), a)  # μ = x / a - 1
        self.near = b.le(b.abs(away), NEAR)
        self.uniform = b.and_(self.near, b.gt(a, LARGE))
        self.exponent = self._exponent(away)
        # η with η² / 2 = μ - log(1 + μ), and the sign of μ
        self.eta = b.copysign(b.sqrt(b.mul(self.exponent, 2.0)), away)
        root = b.mul(b.sqrt(a), math.sqrt(2 * math.pi))
        self.bell = b.div(b.exp(b.neg(b.mul(a, self.exponent))), root)
        far = b.mul(self.bell, b.exp(b.neg(stirling(t, b.maximum(a, 3.0)))))
        self.log_gamma = _lgamma_after(t, b.minimum(a, 3.0))
        direct = b.sub(b.sub(b.mul(a, b.log(x)), x), self.log_gamma)
        self.factor = b.where(b.lt(a, 3.0), b.exp(direct), far)

    def _exponent(self, away: Value) -> Value:
        """μ - log(1 + μ); for small μ by r = μ / (2 + μ), as log(1 + μ) is 2·atanh(r)."""
        b = self.t.b
        r = b.div(away, b.add(away, 2.0))
        square = b.mul(r, r)
        odd = polynomial(self.t, square, *(1 / k for k in range(3, 25, 2)))
        close = b.mul(r, b.sub(away, b.mul(b.mul(square, odd), 2.0)))
        return b.where(self.near, close, b.sub(away, b.log(b.div(self.x, self.a))))

    def series(self) -> Value:
        """P: the factor times 1 + x / (a + 1)·(1 + x / (a + 2)·(1 + …))."""
        b = self.t.b
        total = b.add(b.mul(self.x, 0.0), 1.0)
        for k in range(self.terms, 0, -1):
            total = b.add(b.mul(total, b.div(self.x, b.add(self.a, float(k)))), 1.0)
        return b.mul(self.factor, total)

    def fraction(self) -> Value:
        """Q: a times the factor over x + 1 - a - 1·(1 - a) / (x + 3 - a - 2·(2 - a) / …), from the
        inside, where the next two terms stand for all that follow."""
        b, n = self.t.b, self.steps + 1.0
        start = b.sub(self.x, self.a)
        part = b.add(start, 2 * n - 1)
        inner = b.sub(b.mul(part, part), b.mul(b.sub(n, self.a), 4 * n))
        total = b.mul(b.add(part, b.sqrt(b.maximum(inner, 0.0))), 0.5)
        for k in range(self.steps, 0, -1):
            over = b.div(b.mul(b.sub(float(k), self.a), float(k)), total)
            total = b.sub(b.add(start, 2.0 * k - 1), over)
        return b.div(b.mul(self.factor, self.a), total)

    def early_rest(self) -> Value:
        """Q of small a and x: 1 - xᵃ / Γ(1 + a), less a·xᵃ / Γ(1 + a)·(-x / (1 + a) + …)."""
        b = self.t.b
        power = b.sub(b.mul(self.a, b.log(self.x)), self.log_gamma)
        total = b.mul(self.x, 0.0)
        for k in range(self.early, 0, -1):  # (-1)ᵏ / k!·xᵏ / (a + k)
            term = b.div((-1.0) ** k / math.factorial(k), b.add(self.a, float(k)))
            total = b.mul(b.add(total, term), self.x)
        return b.sub(b.neg(b.expm1(power)), b.mul(b.mul(b.exp(power), self.a), total))

    def temme(self, sign: float) -> Value:
        """Q (sign 1) or P (sign -1) near x = a: half of erfc(±η·√(a/2)), ± a bell times a double
        series in η and 1 / a."""
        b = self.t.b
        half = b.mul(b.erfc(b.mul(b.mul(self.eta, b.sqrt(b.mul(self.a, 0.5))), sign)), 0.5)
        over, total = b.div(1.0, self.a), None
        for k, row in reversed(tuple(enumerate(series.TEMME))):
            least, reach = self.least * LARGE**k, 0.34  # of η
            kept = [c for n, c in enumerate(row) if abs(c) * reach**n > least]
            if not kept:
                continue
            rest = polynomial(self.t, self.eta, *row[: max(2, len(kept))])
            total = rest if total is None else b.add(b.mul(total, over), rest)
        return b.add(half, b.mul(b.mul(self.bell, total), sign))


def _lgamma_after(t: Trace, a: Value) -> Value:
    """log Γ(1 + a), for a from 0 to 3, with the zeros as factors."""
    b = t.b
    above = b.gt(a, 2.0)
    s = b.where(above, b.sub(a, 1.0), a)
    inner = chebyshev(t, b.sub(s, 1.0), series.LGAMMA_NEAR)
    inner = b.mul(b.mul(s, b.sub(s, 1.0)), inner)
    return b.where(above, b.add(inner, b.log(a)), inner)


def _with_edges(t: Trace, a: Value, x: Value, value: Value, first: float) -> Value:
    """The value, and at the edges what eager defines; `first` is that at x = 0."""
    b, kind = t.b, a.type
    start = b.full(first, shape=kind.shape, dtype=kind.dtype, device=kind.device)
    end, endless = b.sub(1.0, start), b.eq(x, math.inf)
    value = b.where(endless, end, value)
    value = b.where(b.eq(a, math.inf), b.where(endless, math.nan, start), value)
    value = b.where(b.eq(x, 0.0), start, value)
    value = b.where(b.eq(a, 0.0), b.where(b.gt(x, 0.0), end, math.nan), value)
    return b.where(b.or_(b.lt(x, 0.0), b.lt(a, 0.0)), math.nan, value)


def _igamma(t: Trace, a: Value, x: Value) -> Value:
    """P(a, x)."""
    b, parts = t.b, _Parts(t, a, x)
    beyond = b.and_(b.gt(x, SMALL), b.gt(x, a))
    value = b.where(beyond, b.sub(1.0, parts.fraction()), parts.series())
    return _with_edges(t, a, x, b.where(parts.uniform, parts.temme(-1.0), value), 0.0)


def _igammac(t: Trace, a: Value, x: Value) -> Value:
    """Q(a, x)."""
    b, parts = t.b, _Parts(t, a, x)
    # where P is the smaller one
    low = b.where(b.le(x, 0.5), b.div(-0.4, b.log(x)), b.mul(x, SMALL))
    below = b.lt(b.where(b.gt(x, SMALL), x, low), a)
    rest = b.where(b.gt(x, SMALL), parts.fraction(), parts.early_rest())
    value = b.where(below, b.sub(1.0, parts.series()), rest)
    return _with_edges(t, a, x, b.where(parts.uniform, parts.temme(1.0), value), 1.0)


def _slope(sign: float) -> Formula:
    """±xᵃ⁻¹·exp(-x) / Γ(a)."""

    def slope(t: Trace, g: Value, y: Value, a: Value, x: Value) -> Value:
        b = t.b
        power = b.mul(b.sub(a, 1.0), b.log(x))
        found = b.exp(b.sub(b.sub(power, x), emitted(t, LGAMMA, (a,))))
        return b.mul(g if sign > 0 else b.neg(g), found)

    return slope


for _names, _value, _sign in (
    ("igamma gammainc", _igamma, 1.0),
    ("igammac gammaincc", _igammac, -1.0),
):
    _slopes = undefined(_names.split()[0], "input"), _slope(_sign)
    elementwise(Row(_names, _value, _slopes, arity=2, dtypes="floats"), __name__)
