"""Hurwitz's zeta function, and the polygamma functions of any order, which it gives.

By Euler's and Maclaurin's formula, as in Cephes: nine terms of the sum, and of the rest an integral
and derivatives. Below 0 the reflection ψⁿ(1 - x) + (-1)ⁿ⁺¹·ψⁿ(x) = (-1)ⁿ·π·dⁿ/dxⁿ cot(πx).
"""

from __future__ import annotations

import math

from tracejit.capture.functions.derived import derived
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Value

TERMS = 9
EPS = 2.0**-53  # of a sum, what is not seen
MOST = 30  # whose factorial a float32 holds
# (2k)! / B[2k] of the Bernoulli numbers
_REST = (12.0, -720.0, 30240.0, -1209600.0, 47900160.0, -1.8924375803183791606e9)
_REST += (7.47242496e10, -2.950130727918164224e12, 1.1646782814350067249e14)
_REST += (-4.5979787224074726105e15, 1.8152105401943546773e17, -7.1661652561756670113e18)


def _zeta(t: Trace, s: float | Value, q: Value) -> Value:
    """The sum of (q + k)^-s over k from 0, for s > 1 and q > 0. Terms too small to be seen end it,
    as in torch, before a large s makes factors infinite."""
    b, constant = t.b, isinstance(s, float)
    minus = -s if constant else b.neg(s)
    total = last = b.pow(q, minus)
    at, done = q, None

    def ended(before: Value | None) -> Value:
        seen = b.le(last, b.mul(total, EPS))
        return seen if before is None else b.or_(before, seen)

    def added(term: Value) -> Value:
        return b.add(total, term if done is None else b.where(done, 0.0, term))

    for _ in range(TERMS):
        at = b.add(at, 1.0)
        last = b.pow(at, minus)
        total = added(last)
        done = None if constant else ended(done)
    total = added(b.div(b.mul(last, at), s - 1.0 if constant else b.sub(s, 1.0)))
    total = added(b.mul(last, -0.5))
    factor, over = 1.0, b.div(last, at)
    square = b.mul(at, at)
    for k, divisor in enumerate(_REST):
        if constant:
            factor *= s + 2 * k
            total = added(b.mul(over, factor / divisor))
            factor *= s + 2 * k + 1
        else:
            factor = b.mul(b.add(s, 2.0 * k), factor)
            term = b.div(b.mul(over, factor), divisor)
            total = added(term)
            last = b.abs(term)
            done = ended(done)
            factor = b.mul(b.add(s, 2.0 * k + 1.0), factor)
        over = b.div(over, square)
    return total


def hurwitz(t: Trace, s: Value, q: Value) -> Value:
    """The sum of (q + k)^-s over k from 0. For q below 0, where s has to be whole, it is that from
    the first q + k above 0, and the terms below, mirrored: the difference of two other sums."""
    b = t.b
    below, whole = b.lt(q, 0.0), b.floor(q)
    value = _zeta(t, s, b.where(below, b.sub(q, whole), q))
    mirrored = _zeta(t, s, b.where(below, b.sub(b.add(whole, 1.0), q), 1.0))
    past = _zeta(t, s, b.where(below, b.sub(1.0, q), 1.0))
    past = b.where(b.eq(past, past), past, 0.0)
    odd = b.ne(b.mul(b.floor(b.mul(s, 0.5)), 2.0), s)
    both = b.where(odd, b.add(b.sub(value, mirrored), past), b.sub(b.add(value, mirrored), past))
    both = b.where(b.eq(s, math.inf), math.inf, both)
    value = b.where(below, b.where(b.eq(s, b.floor(s)), both, math.nan), value)
    endless = b.or_(b.eq(q, math.inf), b.and_(b.eq(s, math.inf), b.gt(q, 1.0)))
    value = b.where(endless, math.nan, value)  # as in torch
    value = b.where(b.and_(b.le(q, 0.0), b.eq(q, whole)), math.inf, value)
    return b.where(b.eq(s, 1.0), math.inf, b.where(b.lt(s, 1.0), math.nan, value))


def _cotangent(n: int) -> list[int]:
    """The coefficients of the n-th derivative of cot(x), as a polynomial in it: that of a
    polynomial p is -p'(cot)·(1 + cot²)."""
    found = [0, 1]
    for _ in range(n):
        slope = [k * c for k, c in enumerate(found)][1:]
        found = [-(a + b) for a, b in zip([*slope, 0, 0], [0, 0, *slope], strict=True)]
    return found


def half_turns(t: Trace, x: Value) -> tuple[Value, Value]:
    """sin(πx) and cos(πx) up to a common sign, of the distance to the nearest whole number."""
    part = t.b.sub(x, t.b.round(x))
    rest = t.b.sub(0.5, t.b.abs(part))  # whose sine is the cosine: exactly 0 of a half
    return t.b.sin(t.b.mul(part, math.pi)), t.b.sin(t.b.mul(rest, math.pi))


def _higher(t: Trace, n: int, x: Value) -> Value:
    """ψⁿ(x), for n above 1."""
    b, sign = t.b, 1.0 if n % 2 else -1.0
    below = b.lt(x, 0.0)
    value = b.mul(_zeta(t, n + 1.0, b.where(below, b.sub(1.0, x), x)), sign * math.factorial(n))
    sine, cosine = half_turns(t, x)
    cotangent = b.div(cosine, sine)
    slope = b.mul(cotangent, 0.0)
    for c in reversed(_cotangent(n)):
        slope = b.add(b.mul(slope, cotangent), float(c))
    mirrored = b.sub(b.mul(value, -sign), b.mul(slope, math.pi ** (n + 1)))
    value = b.where(below, mirrored, value)
    pole = b.and_(b.le(x, 0.0), b.eq(x, b.floor(x)))
    return b.where(pole, sign * math.inf, value)


def polygamma(t: Trace, n: int, x: Value) -> Value:
    """ψⁿ(x), for n above 1."""
    if n > MOST:
        raise t.unsupported(f"polygamma of an order above {MOST} has no rule")
    return derived(
        t,
        "polygamma",
        (x,),
        lambda x: _higher(t, n, x),
        (lambda g, y, x: t.b.mul(g, polygamma(t, n + 1, x)),),
    )
