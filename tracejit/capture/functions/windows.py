"""What convolution and pooling share: sizes per axis, and sliding windows of values.

A geometry names the axes that windows slide over; they are always a value's last axes. Its windows
put one axis of taps per axis after all others.
"""

from __future__ import annotations

import math
from itertools import product

from tracejit.capture.functions.common import expand
from tracejit.capture.trace.tensor import Ints
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Value
from tracejit.records import dataclass


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows along several axes: tap k of window o reads o * stride + k * dilation - low of the
    `length` elements, and nothing where that is outside. `count` windows of `size` taps."""

    size: Ints
    stride: Ints
    low: Ints
    dilation: Ints
    length: Ints
    count: Ints

    @property
    def rank(self) -> int:
        return len(self.size)

    @property
    def apart(self) -> bool:
        """Whether no two windows meet, and each is one stretch of elements."""
        rows = zip(self.size, self.stride, self.dilation, strict=True)
        return all(k == 1 or (k <= s and d == 1) for k, s, d in rows)

    @property
    def span(self) -> Ints:
        """How many elements all windows reach over, from `low` before the first."""
        rows = zip(self.count, self.stride, self.dilation, self.size, strict=True)
        return tuple(max(n - 1, 0) * s + (k - 1) * d + 1 for n, s, d, k in rows)


@dataclass(frozen=True, slots=True)
class Phase:
    """The elements whose places leave `remainder` by the stride, and the taps that read them: a
    slice of all, which are windows of stride 1 over these elements."""

    remainder: Ints
    starts: Ints
    stops: Ints
    steps: Ints
    windows: Windows


def phases(w: Windows) -> list[Phase]:
    """The phases of strided windows that any tap reads; together they have each tap once."""
    rows = zip(w.size, w.stride, w.dilation, w.low, strict=True)
    read = [sorted({(k * d - low) % s for k in range(n)}) for n, s, d, low in rows]
    return [_phase(w, remainder) for remainder in product(*read)]


def _phase(w: Windows, remainder: Ints) -> Phase:
    starts, steps, size, lows, dilation = [], [], [], [], []
    rows = zip(w.size, w.stride, w.dilation, w.low, remainder, strict=True)
    for n, s, d, low, r in rows:
        read_by = [k for k in range(n) if (k * d - low) % s == r]
        starts.append(read_by[0])
        steps.append(s // math.gcd(s, d))
        size.append(len(read_by))
        lows.append(-((read_by[0] * d - low - r) // s))
        dilation.append(steps[-1] * d // s)
    one = (1,) * w.rank
    of_phase = Windows(tuple(size), one, tuple(lows), tuple(dilation), _lengths(w), w.count)
    return Phase(remainder, tuple(starts), w.size, tuple(steps), of_phase)


def _lengths(w: Windows) -> Ints:
    """How many elements the longest phase has."""
    return tuple(-(-n // s) for n, s in zip(w.length, w.stride, strict=True))


def in_turn(t: Trace, parts: list[tuple[Phase, Value]], w: Windows) -> Value:
    """The elements of all phases, each […, *its elements], in their places: […, *length]."""
    lead = len(parts[0][1].type.shape) - w.rank
    front, lengths, none = parts[0][1].type.shape[:lead], _lengths(w), (0,) * w.rank
    total: Value | None = None
    for phase, x in parts:
        x = t.b.reshape(x, shape=(*front, *_paired(lengths, (1,) * w.rank)))
        after = tuple(s - 1 - r for s, r in zip(w.stride, phase.remainder, strict=True))
        low = (*(0,) * lead, *_paired(none, phase.remainder))
        high = (*(0,) * lead, *_paired(none, after))
        x = t.b.pad(x, low=low, high=high, interior=(0,) * len(low), value=0)
        total = x if total is None else t.b.add(total, x)
    whole = tuple(n * s for n, s in zip(lengths, w.stride, strict=True))
    return fitted(t, t.b.reshape(total, shape=(*front, *whole)), none, w.length, 0)


def ints_of(t: Trace, given: object, rank: int, name: str) -> Ints:
    """A number for all axes, or one per axis; torch takes a sequence of one for all as well."""
    if isinstance(given, (tuple, list)):
        if len(given) not in (1, rank):
            raise t.shape_error(
                f"expected {name} to be a single integer value or a list of {rank} values to match "
                f"the convolution dimensions, but got {name}={list(given)}"
            )
        found = tuple(int(n) for n in given)
        return found * rank if len(found) == 1 else found
    if not isinstance(given, int):
        raise TypeError(f"{name} must be ints, not {type(given).__name__}")
    return (int(given),) * rank


def fitted(t: Trace, x: Value, low: Ints, length: Ints, fill: float) -> Value:
    """The last axes moved by `low` and cut or filled up to `length`; what was before is lost."""
    lead = len(x.type.shape) - len(low)
    high = [n - m - a for n, m, a in zip(length, x.type.shape[lead:], low, strict=True)]
    widths = [*([0] * lead), *low], [*([0] * lead), *high]
    if any(n < 0 for side in widths for n in side):
        starts = tuple(max(-n, 0) for n in widths[0])
        stops = tuple(n - max(-m, 0) for n, m in zip(x.type.shape, widths[1], strict=True))
        stops = tuple(map(max, starts, stops))
        x = t.b.slice(x, starts=starts, stops=stops, steps=(1,) * len(starts))
    low, high = (tuple(max(n, 0) for n in side) for side in widths)
    if not any(low) and not any(high):
        return x
    return t.b.pad(x, low=low, high=high, interior=(0,) * len(low), value=fill)


def taps(t: Trace, x: Value, w: Windows, fill: float) -> Value:
    """[…, *length] → […, *count, *size]: the elements of every window, `fill` outside."""
    lead, rank = len(x.type.shape) - w.rank, w.rank
    if w.apart:
        x = fitted(t, x, w.low, tuple(n * s for n, s in zip(w.count, w.stride, strict=True)), fill)
        front = x.type.shape[:lead]
        x = t.b.reshape(x, shape=(*front, *_paired(w.count, w.stride)))
        steps = (1,) * len(x.type.shape)
        stops = (*front, *_paired(w.count, w.size))
        x = t.b.slice(x, starts=(0,) * len(steps), stops=stops, steps=steps)
        return t.b.permute(x, axes=_apart(lead, rank))
    x = _layers(t, fitted(t, x, w.low, w.span, fill), w.size)
    for k in range(rank):
        axes = (lead + k, lead + rank + k)
        places = {"stride": w.stride[k], "dilation": w.dilation[k], "count": w.count[k]}
        x = t.b.window(x, axes=axes, **places)
    return x


def placed(t: Trace, x: Value, w: Windows) -> Value:
    """[…, *count, *size] → […, *length] for windows that do not meet: each tap where it reads, 0
    where none does."""
    lead, rank = len(x.type.shape) - 2 * w.rank, w.rank
    inverse = sorted(range(lead + 2 * rank), key=_apart(lead, rank).__getitem__)
    x = t.b.permute(x, axes=tuple(inverse))
    wide = _paired(w.count, w.stride)
    x = fitted(t, x, (0,) * (2 * rank), wide, 0)
    whole = tuple(n * s for n, s in zip(w.count, w.stride, strict=True))
    x = t.b.reshape(x, shape=(*x.type.shape[:lead], *whole))
    return fitted(t, x, tuple(-n for n in w.low), w.length, 0)


def summed(t: Trace, x: Value, w: Windows) -> Value:
    """[…, *count, *size] → […, *length]: of each element the sum of what the windows that read it
    have at its tap; the transpose of `taps`."""
    if w.apart:
        return placed(t, x, w)
    lead, rank = len(x.type.shape) - 2 * w.rank, w.rank
    for k in range(rank):
        axes = (lead + k, lead + rank + k)
        places = {"stride": w.stride[k], "dilation": w.dilation[k], "length": w.span[k]}
        x = t.b.unwindow(x, axes=axes, **places)
    x = t.b.reduce_sum(x, axes=tuple(range(lead + rank, lead + 2 * rank)))
    return fitted(t, x, tuple(-n for n in w.low), w.length, 0)


def readers(t: Trace, x: Value, w: Windows) -> Value:
    """[…, *count] → […, *length, *size]: for every element and tap, the value of the window that
    reads the element by that tap, 0 where there is none. Windows that do not meet give
    […, *length, 1, …]: the value of the one window that may read the element."""
    lead, rank = len(x.type.shape) - w.rank, w.rank
    x = _layers(t, x, w.size)
    if w.apart:
        x = placed(t, x, w)
        return t.b.reshape(x, shape=(*x.type.shape, *(1,) * rank))
    for k in range(rank):
        axes = (lead + k, lead + rank + k)
        places = {"stride": w.stride[k], "dilation": w.dilation[k], "length": w.span[k]}
        x = t.b.unwindow(x, axes=axes, **places)
    after = tuple(-n for n in w.low)
    return fitted(t, x, (*after, *(0,) * rank), (*w.length, *w.size), 0)


def _paired(a: Ints, b: Ints) -> Ints:
    """The sizes of two lists in turn."""
    return tuple(n for pair in zip(a, b, strict=True) for n in pair)


def _apart(lead: int, rank: int) -> Ints:
    """The axes of pairs (window, tap), in the order of all windows, then all taps."""
    last = lead + 2 * rank
    return (*range(lead), *range(lead, last, 2), *range(lead + 1, last, 2))


def _layers(t: Trace, x: Value, size: Ints) -> Value:
    """x with one more axis per axis of the windows, along which it does not vary."""
    shape = x.type.shape
    return expand(t, t.b.reshape(x, shape=(*shape, *(1,) * len(size))), (*shape, *size))
