"""Images made larger or smaller along each axis: nearest, linear and cubic, with or without
antialiasing.

An axis is a linear map: an element of the result is the weighted sum of a few neighbours, which
arithmetic on its position tells. The gradient asks in the other direction: which elements of the
result have read this one? They are neighbours too. So both are gathers: no atomics, and what is not
finite stays where eager leaves it (a product with a matrix of weights would spread it over a line).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np

from tracejit.capture.functions.common import cast, expand
from tracejit.capture.functions.patterns import position
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Builder, Result, Value
from tracejit.ir.interp import evaluate
from tracejit.ir.types import DType, i64
from tracejit.records import dataclass

UNROLLED = 4  # terms that are written out; more are a reduction
FINE = 1 << 16  # parts of a position, in which readers are counted

CUBIC, CUBIC_ANTIALIAS = -0.75, -0.5  # slopes where a cubic leaves its first neighbours


def near_weight(b: Builder, away: Value, a: float) -> Value:
    """The cubic weight of an element up to 1 away."""
    return b.add(b.mul(b.mul(b.sub(b.mul(away, a + 2), a + 3), away), away), 1.0)


def far_weight(b: Builder, away: Value, a: float) -> Value:
    """The cubic weight of an element from 1 to 2 away, as a product, which loses no digits."""
    rest = b.sub(away, 2.0)
    return b.mul(b.mul(b.mul(rest, rest), b.sub(away, 1.0)), a)


Position = Value | int
# (positions in the result, number of the term) → (position in the operand, its factor, whether it
# counts); 1 and yes where there is None
Terms = Callable[[Value, Position], tuple[Value, Value | None, Value | None]]


@dataclass(frozen=True)
class Line:
    """How `n` elements of an axis become `m`.

    `scale` elements of the image are one of the result. `mode` is "nearest", "nearest-exact",
    "linear" or "cubic"; with `antialias` the weights reach over all that an element covers, and
    with `corners` the outermost elements stay where they are.
    """

    n: int
    m: int
    mode: str
    scale: float
    dtype: DType  # that positions and weights are computed in
    corners: bool = False
    antialias: bool = False

    @property
    def nearest(self) -> bool:
        return self.mode in ("nearest", "nearest-exact")

    @property
    def reach(self) -> float:
        """How far from its centre an element reads."""
        half = 2.0 if self.mode == "cubic" else 1.0
        return half * max(self.scale, 1.0) if self.antialias else half

    @property
    def terms(self) -> int:
        """How many elements of the image one of the result reads, at most."""
        if self.nearest:
            return 1
        return min(int(2 * self.reach) + 2, self.n) if self.antialias else int(2 * self.reach)

    # ---- what an element of the result reads

    def centre(self, b: Builder, o: Value) -> Value:
        """The place in the image of elements o of the result."""
        at = b.cast(o, dtype=self.dtype)
        if self.antialias:
            return b.mul(b.add(at, 0.5), self.scale)
        if self.corners or self.mode == "nearest":
            return b.mul(at, self.scale)
        at = b.mul(b.add(at, 0.5), self.scale)
        if self.mode == "nearest-exact":
            return at
        at = b.sub(at, 0.5)
        return b.maximum(at, 0.0) if self.mode == "linear" else at

    def first(self, b: Builder, o: Value, centre: Value) -> Value:
        """The first element that elements o of the result read; it may lie before the image."""
        if self.antialias:
            low = b.trunc(b.add(b.sub(centre, self.reach), 0.5))
            return b.cast(b.maximum(low, 0.0), dtype=i64)
        found = b.cast(b.floor(centre), dtype=i64)
        return b.sub(found, 1) if self.mode == "cubic" else found

    def weight(self, b: Builder, centre: Value, i: Value) -> Value:
        """The weight of elements i, before it is divided by the sum of all with `antialias`."""
        away = b.sub(b.cast(i, dtype=self.dtype), centre)
        if self.antialias:
            away = b.mul(b.add(away, 0.5), 1.0 / max(self.scale, 1.0))
        away = b.abs(away)
        if self.mode == "linear":
            return b.maximum(b.sub(1.0, away), 0.0)
        a = CUBIC_ANTIALIAS if self.antialias else CUBIC
        far = b.where(b.lt(away, 2.0), far_weight(b, away, a), 0.0)
        return b.where(b.lt(away, 1.0), near_weight(b, away, a), far)

    def counts(self, b: Builder, i: Value, first: Value, centre: Value) -> Value:
        """With `antialias`: whether elements i are in the image and covered."""
        last = b.cast(b.trunc(b.add(b.add(centre, self.reach), 0.5)), dtype=i64)
        return b.and_(b.ge(i, first), b.lt(i, b.minimum(last, self.n)))

    def total(self, b: Builder, o: Value) -> Value:
        """With `antialias`: the sum of the weights of elements o of the result."""
        shape = (*o.type.shape, self.terms)
        o = b.expand(b.reshape(o, shape=(*o.type.shape, 1)), shape=shape)
        k = b.iota(axis=len(shape) - 1, shape=shape, dtype=i64, device=o.type.device)
        centre = self.centre(b, o)
        first = self.first(b, o, centre)
        i = b.add(first, k)
        weight = self.weight(b, centre, i)
        weight = b.where(self.counts(b, i, first, centre), weight, 0.0)
        return b.reduce_sum(weight, axes=(len(shape) - 1,))

    def reads(self, b: Builder, o: Value, k: Position) -> tuple[Value, Value | None, Value | None]:
        """The k-th element that elements o of the result read."""
        centre = self.centre(b, o)
        first = self.first(b, o, centre)
        i = b.add(first, k)
        inside = b.minimum(b.maximum(i, 0), self.n - 1)
        if self.nearest:
            return inside, None, None
        weight = self.weight(b, centre, i)
        if not self.antialias:
            return inside, weight, None
        return inside, b.div(weight, self.total(b, o)), self.counts(b, i, first, centre)

    # ---- which elements of the result read one

    @cached_property
    def _readers(self) -> tuple[int, int, int]:
        """(a, c, count): the elements of the result that read element i are among the `count` from
        (i * a + c) // FINE on."""
        b = Builder()
        o = b.iota(axis=0, shape=(self.m,), dtype=i64, device="cpu")
        centre = self.centre(b, o)
        first = self.first(b, o, centre)
        ((found,), _) = evaluate(b.graph("first", (Result(first),)), ())
        low, high = (np.clip(found + k, 0, self.n - 1) for k in (0, self.terms - 1))
        a = round(FINE * self.m / self.n)
        order = np.arange(self.m)
        c = int((order * FINE - high * a).min())
        begin = (low * a + c) // FINE
        return a, c, int((order - begin).max()) + 1

    @property
    def readers(self) -> int:
        """How many elements of the result may read one."""
        return self._readers[2]

    def read_by(self, b: Builder, i: Value, k: Position) -> tuple[Value, Value, Value]:
        """The k-th element of the result that may read elements i."""
        a, c, _ = self._readers
        o = b.add(b.floordiv(b.add(b.mul(i, a), c), FINE), k)
        inside = b.minimum(b.maximum(o, 0), self.m - 1)
        centre = self.centre(b, inside)
        first = self.first(b, inside, centre)
        if self.antialias:
            counts = b.and_(b.eq(o, inside), self.counts(b, i, first, centre))
            return inside, b.div(self.weight(b, centre, i), self.total(b, inside)), counts
        total, counts = None, None
        for j in range(self.terms):
            at = b.add(first, j)
            here = b.eq(b.minimum(b.maximum(at, 0), self.n - 1), i)
            counts = here if counts is None else b.or_(counts, here)
            if not self.nearest:
                weight = b.where(here, self.weight(b, centre, at), 0.0)
                total = weight if total is None else b.add(total, weight)
        return inside, total, b.and_(b.eq(o, inside), counts)

    # ---- the map

    def made(self, t: Trace, x: Value, axis: int) -> Value:
        """x resampled along an axis."""
        if self.factor:
            shape = x.type.shape
            thin = (*shape[: axis + 1], 1, *shape[axis + 1 :])
            wide = (*shape[: axis + 1], self.factor, *shape[axis + 1 :])
            x = expand(t, t.b.reshape(x, shape=thin), wide)
            return t.b.reshape(x, shape=(*shape[:axis], self.m, *shape[axis + 1 :]))
        return _weighed(t, x, axis, self.m, self.terms, self.reads)

    def back(self, t: Trace, g: Value, axis: int) -> Value:
        """The gradient of what was resampled."""
        if self.factor:
            shape = g.type.shape
            apart = (*shape[:axis], self.n, self.factor, *shape[axis + 1 :])
            return t.b.reduce_sum(t.b.reshape(g, shape=apart), axes=(axis + 1,))
        return _weighed(t, g, axis, self.n, self.readers, self.read_by)

    @property
    def same(self) -> bool:
        """Whether all elements stay as they are."""
        return self.n == self.m and (self.factor == 1 or self.scale == 1 and not self.nearest)

    @cached_property
    def factor(self) -> int:
        """The number of copies that each element becomes; 0 where it is not so simple."""
        if not self.nearest or self.m % self.n:
            return 0
        b = Builder()
        o = b.iota(axis=0, shape=(self.m,), dtype=i64, device="cpu")
        ((found,), _) = evaluate(b.graph("at", (Result(self.reads(b, o, 0)[0]),)), ())
        times = self.m // self.n
        return times if (found == np.arange(self.m) // times).all() else 0


def _weighed(t: Trace, x: Value, axis: int, extent: int, count: int, terms: Terms) -> Value:
    """Sums of `count` terms along an axis, which gets another extent."""
    b, (*front,), (*rest,) = t.b, x.type.shape[:axis], x.type.shape[axis + 1 :]
    device, dtype = x.type.device, x.type.dtype
    if count > UNROLLED:
        shape = (*front, extent * count, *rest)
        o, k = (position(t, a, (extent, count), device) for a in (0, 1))
    else:
        shape = (*front, extent, *rest)
        o, k = position(t, 0, (extent,), device), None

    def spread(v: Value) -> Value:
        thin = (*(1,) * len(front), shape[axis], *(1,) * len(rest))
        return expand(t, b.reshape(v, shape=thin), shape)

    def term(k: Position) -> Value:
        at, weight, counts = terms(b, o, k)
        found = b.gather(x, spread(at), axis=axis)
        if weight is not None:
            found = b.mul(found, spread(cast(t, weight, dtype)))
        return found if counts is None else b.where(spread(counts), found, 0.0)

    if count > UNROLLED:
        apart = b.reshape(term(k), shape=(*front, extent, count, *rest))
        return b.reduce_sum(apart, axes=(axis + 1,))
    total = term(0)
    for k in range(1, count):
        total = b.add(total, term(k))
    return total
