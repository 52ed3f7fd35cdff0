"""Whether two tensors share elements of the memory that they lie in."""

from __future__ import annotations

import math

import numpy as np

from tracejit.capture.trace.tensor import Handle, Ints, extent

_MOST = 1 << 26  # elements from the first to the last, of those that are looked at one by one


def shares(a: Handle, b: Handle) -> bool:
    """Whether two tensors have an element in common; so it is, too, where they are too large to
    tell."""
    if a.storage is not b.storage or not (a.numel and b.numel):
        return False
    first, last = max(a.offset, b.offset), min(_end(a), _end(b))
    if first >= last:
        return False
    step = math.gcd(*_steps(a), *_steps(b))
    if step and (a.offset - b.offset) % step:
        return False
    start = min(a.offset, b.offset)
    span = max(_end(a), _end(b)) - start
    if span > _MOST:
        return True
    mine = np.zeros(span, bool)
    mine[_places(a) - start] = True
    return bool(mine[_places(b) - start].any())


def _end(h: Handle) -> int:
    return h.offset + extent(h.shape, h.strides)


def _steps(h: Handle) -> Ints:
    return tuple(st for st, n in zip(h.strides, h.shape, strict=True) if n > 1)


def _places(h: Handle) -> np.ndarray:
    places = np.array(h.offset)
    for stride, n in zip(h.strides, h.shape, strict=True):
        places = places[..., None] + stride * np.arange(n if stride else 1)
    return places.reshape(-1)
