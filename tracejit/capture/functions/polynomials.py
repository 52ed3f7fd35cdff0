"""Orthogonal polynomials by degree: Chebyshev's, Hermite's, Laguerre's, Legendre's.

Torch has no derivative of them, so results have no history. Each is torch's own recurrence in the
degree (ATen/native/Math.h); between -1 and 1 Chebyshev's of high degree are sines and cosines. A
tensor of degrees runs it up to one of a few bounds, which the host decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from tracejit.capture.functions.common import as_float, is_tensor, operand, pointwise, result_dtype
from tracejit.capture.functions.composites import composed
from tracejit.capture.functions.transcendental import acos
from tracejit.capture.trace.cuts import is_true
from tracejit.capture.trace.scalars import pinned
from tracejit.capture.trace.tensor import TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Arg, Builder, Value
from tracejit.ir.types import f32
from tracejit.records import dataclass

Tensor = torch.Tensor
MOST = 128  # steps of a recurrence that are written out
BOUNDS = (8, 32, MOST)  # of the degrees of a tensor: decisions


@dataclass(frozen=True, slots=True)
class _Family:
    """`first(b, u)` is the polynomial of degree 1, `step(b, u, k, q, p)` that of degree k from
    those of degrees k - 1 and k - 2, `wave(t, u, n)` one above `limit` between -1 and 1."""

    first: Callable[[Builder, Value], Value]
    step: Callable[[Builder, Value, int, Value, Arg], Value]
    wave: Callable[[Trace, Value, Arg], Value] | None = None
    limit: int = 0
    shifted: bool = False  # u is 2x - 1, not x
    bounded: bool = False  # torch has NaN of a degree above 128, in float64 512


# ---- Chebyshev's


def _step(b: Builder, u: Value, k: int, q: Value, p: Arg) -> Value:
    return b.sub(b.mul(b.add(u, u), q), p)


def _plus(number: float) -> Callable[[Builder, Value], Value]:
    return lambda b, u: b.add(b.add(u, u), number)


def _sign(b: Builder, n: Arg) -> Arg:
    """(-1)^n"""
    if not is_tensor(n):
        return -1.0 if n % 2 else 1.0
    odd = b.sub(n, b.mul(b.floor(b.mul(n, 0.5)), 2.0))
    return b.sub(1.0, b.mul(odd, 2.0))


def _sum(b: Builder, x: Arg, y: Arg) -> Arg:
    return b.add(x, y) if is_tensor(x) or is_tensor(y) else x + y


def _wave_t(t: Trace, u: Value, n: Arg) -> Value:
    return t.b.cos(t.b.mul(acos(t, u), n))


def _wave_u(t: Trace, u: Value, n: Arg) -> Value:
    angle = acos(t, u)
    return t.b.div(t.b.sin(t.b.mul(angle, _sum(t.b, n, 1.0))), t.b.sin(angle))


def _wave_v(t: Trace, u: Value, n: Arg) -> Value:
    """±(2n + 1) where u rounds to -1."""
    b, angle = t.b, acos(t, u)
    half = b.mul(angle, 0.5)
    out = b.div(b.cos(b.mul(angle, _sum(b, n, 0.5))), b.cos(half))
    end = _sum(b, _sum(b, n, n), 1.0)
    end = b.mul(b.add(b.mul(u, 0.0), _sign(b, n)), end)
    return b.where(b.eq(b.sin(half), 1.0), end, out)


def _wave_w(*, shifted: bool) -> Callable[[Trace, Value, Arg], Value]:
    def wave(t: Trace, u: Value, n: Arg) -> Value:
        """Torch's own values where u rounds to 1."""
        b, angle = t.b, acos(t, u)
        half = b.mul(angle, 0.5)
        out = b.div(b.sin(b.mul(angle, _sum(b, n, 0.5))), b.sin(half))
        end = _sign(b, n) if shifted else _sum(b, _sum(b, n, n), 1.0)
        return b.where(b.eq(b.cos(half), 1.0), end, out)

    return wave


# ---- the others


def _hermite(b: Builder, u: Value, k: int, q: Value, p: Arg) -> Value:
    """The physicists'."""
    return b.sub(b.mul(b.add(u, u), q), _times(b, p, 2.0 * (k - 1)))


def _hermite_e(b: Builder, u: Value, k: int, q: Value, p: Arg) -> Value:
    """The probabilists'."""
    return b.sub(b.mul(u, q), _times(b, p, k - 1.0))


def _laguerre(b: Builder, u: Value, k: int, q: Value, p: Arg) -> Value:
    front = b.add(b.sub(1.0, u), 2.0 * (k - 1))
    return b.div(b.sub(b.mul(front, q), _times(b, p, k - 1.0)), float(k))


def _legendre(b: Builder, u: Value, k: int, q: Value, p: Arg) -> Value:
    front = b.mul(b.mul(u, 2.0 * k - 1.0), q)
    return b.div(b.sub(front, _times(b, p, k - 1.0)), float(k))


def _times(b: Builder, x: Arg, number: float) -> Arg:
    return b.mul(x, number) if is_tensor(x) else x * number


def _same(b: Builder, u: Value) -> Value:
    return b.alias(u)


FAMILIES: dict[str, _Family] = {
    "chebyshev_polynomial_t": _Family(_same, _step, _wave_t, 6),
    "chebyshev_polynomial_u": _Family(_plus(0.0), _step, _wave_u, 8),
    "chebyshev_polynomial_v": _Family(_plus(-1.0), _step, _wave_v, 8),
    "chebyshev_polynomial_w": _Family(_plus(1.0), _step, _wave_w(shifted=False), 8),
    "shifted_chebyshev_polynomial_t": _Family(_same, _step, _wave_t, 6, shifted=True),
    "shifted_chebyshev_polynomial_u": _Family(_plus(0.0), _step, _wave_u, 6, shifted=True),
    "shifted_chebyshev_polynomial_v": _Family(_plus(-1.0), _step, _wave_v, 6, shifted=True),
    "shifted_chebyshev_polynomial_w": _Family(
        _plus(1.0), _step, _wave_w(shifted=True), 4, shifted=True
    ),
    "hermite_polynomial_h": _Family(_plus(0.0), _hermite, bounded=True),
    "hermite_polynomial_he": _Family(_same, _hermite_e, bounded=True),
    "laguerre_polynomial_l": _Family(lambda b, u: b.sub(1.0, u), _laguerre),
    "legendre_polynomial_p": _Family(_same, _legendre),
}


# ---- of a degree, or of a tensor of degrees


def _by_degree(b: Builder, f: _Family, u: Value, top: int) -> Iterator[tuple[int, Arg]]:
    """The polynomials of degrees from 0 up."""
    before, now = 1.0, f.first(b, u)
    yield 0, before
    if top > 0:
        yield 1, now
    for k in range(2, top + 1):
        before, now = now, f.step(b, u, k, now, before)
        yield k, now


def _values(t: Trace, f: _Family, x: Arg, n: Arg, top: int) -> Value:
    """Of one degree, or of those of a tensor, none of which that counts is above `top`."""
    b, like = t.b, next(v for v in (x, n) if is_tensor(v)).type
    if not is_tensor(x):
        x = b.full(float(x), shape=like.shape, dtype=like.dtype, device=like.device)
    u = b.sub(b.add(x, x), 1.0) if f.shifted else x
    out = b.full(0.0, shape=like.shape, dtype=like.dtype, device=like.device)
    if not is_tensor(n):
        found = dict(_by_degree(b, f, u, top)).get(top, 0.0)
        out = b.add(out, found) if not is_tensor(found) else found
        if f.wave is not None and top > f.limit:
            out = b.where(b.lt(b.abs(u), 1.0), f.wave(t, u, float(top)), out)
        return out
    n = b.where(b.lt(n, 0.0), b.neg(b.floor(b.neg(n))), b.floor(n))  # towards 0
    for k, found in _by_degree(b, f, u, top):
        out = b.where(b.eq(n, float(k)), found, out)
    if f.wave is not None and top > f.limit:
        counts = b.and_(b.gt(n, float(f.limit)), b.le(n, float(top)))
        inside = b.and_(counts, b.lt(b.abs(u), 1.0))
        out = b.where(inside, f.wave(t, u, n), out)
    return out


def _register(name: str, f: _Family) -> None:
    @composed(getattr(torch.special, name), kernel=True)
    def function(t: Trace, input: object, n: object) -> TracedTensor:
        dtype = as_float(result_dtype([operand(t, x) for x in (input, n)]))
        if dtype.narrow:
            raise t.not_implemented(f"{name}_cpu", dtype)
        with t.untaped():
            top = _highest(t, n)
            if f.bounded and top > (128 if dtype is f32 else 512) and not isinstance(n, Tensor):
                of = (input, math.nan)  # its result has the shape and strides of the others
                return pointwise(t, lambda x, y: t.b.add(t.b.mul(x, 0.0), y), of, to=as_float)
            if top > MOST:
                raise t.unsupported(f"{name} has a rule for degrees up to {MOST}")
            return pointwise(t, lambda x, y: _values(t, f, x, y, top), (input, n), to=as_float)


def _highest(t: Trace, n: object) -> int:
    """A degree, or a bound of those of a tensor; -1 of what is none."""
    if not isinstance(n, Tensor):
        n = pinned(n)
        return int(n) if math.isfinite(n) else -1
    if not t.lift(n).numel:
        return 0
    n = torch.where(n.isfinite(), n, 0)
    found = (k for k in BOUNDS if not is_true(t, t.read(t.lift((n >= k + 1).any()))))
    return next(found, MOST + 1)


for _name, _family in FAMILIES.items():
    _register(_name, _family)
