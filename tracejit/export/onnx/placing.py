"""Tensors that a step hands out, as views of what its graph computes.

In: the name of a value that lies in memory somehow, and how a tensor views that memory. Out: the
name of the view. ONNX has no strides, so a view that is neither a reshape nor a transpose is a
Gather, or a Slice of all elements in a row.
"""

from __future__ import annotations

import math

import numpy as np

from tracejit.export.onnx.writer import Writer
from tracejit.records import dataclass

Ints = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a tensor lies in its memory; all in elements."""

    shape: Ints
    strides: Ints
    offset: int = 0

    def places(self) -> np.ndarray:
        """Where each element lies."""
        found = np.full(self.shape, self.offset, np.int64)
        for axis, (n, stride) in enumerate(zip(self.shape, self.strides, strict=True)):
            row = [1] * len(self.shape)
            row[axis] = n
            found = found + np.arange(n).reshape(row) * stride
        return found


def viewed(w: Writer, x: str, of: Layout, view: Layout) -> str:
    """A view of the memory of a value. Raises ValueError if elements of it are not the value's."""
    if of == view:
        return x
    places, wanted = of.places().reshape(-1), view.places()
    if np.array_equal(places, wanted.reshape(-1)):
        return w.reshape(x, view.shape)
    order = np.argsort(places, kind="stable")
    at = np.searchsorted(places[order], wanted)
    if wanted.size and (not places.size or at.max() >= places.size):
        raise ValueError("a view of other memory")
    index = order[at] if wanted.size else np.zeros(view.shape, np.int64)
    if wanted.size and not np.array_equal(places[index], wanted):
        raise ValueError("a view of other memory")
    for axes in _swaps(len(of.shape)):
        if tuple(of.shape[a] for a in axes) == view.shape and np.array_equal(
            np.transpose(np.arange(math.prod(of.shape)).reshape(of.shape), axes), index
        ):
            return w.Transpose(x, perm=axes)
    flat, row = w.reshape(x, (places.size,)), index.reshape(-1)
    first = int(row[0]) if row.size else 0
    if np.array_equal(row, np.arange(first, first + row.size)):
        return w.reshape(w.part(flat, 0, first, first + row.size), view.shape)
    return w.Gather(flat, w.constant(index, np.int64), axis=0)


def _swaps(rank: int) -> list[list[int]]:
    """Orders of axes that views have often: two of them swapped."""
    found = []
    for a in range(rank):
        for b in range(a + 1, rank):
            axes = [*range(rank)]
            axes[a], axes[b] = b, a
            found.append(axes)
    return found
