"""as_strided: a view of elements that are told by their places in memory.

What a tensor has its elements in is taken as a row, in the order of memory. The view picks from it:
a step of its chain (`trace/views.py`), by arithmetic on positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tracejit.capture.trace.scalars import is_runtime
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import Handle, Step, TracedTensor, by_memory, extent, is_dense
from tracejit.capture.trace.trace import Trace
from tracejit.capture.trace.views import pick, reads_bits

Tensor = torch.Tensor


@rule(torch.as_strided, Tensor.as_strided)
def as_strided(
    t: Trace,
    input: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
) -> TracedTensor:
    """The elements at storage_offset + Σ i·stride of the memory that `input` lies in."""
    h = t.lift(input)
    shape, strides = tuple(map(int, size)), tuple(map(int, stride))
    offset = h.offset if storage_offset is None else storage_offset
    if len(shape) != len(strides):
        raise t.shape_error("mismatch in length of strides and shape")
    if any(n < 0 for n in (*shape, *strides)) or (not is_runtime(offset) and offset < 0):
        raise t.shape_error("as_strided: sizes, strides and storage_offset must not be negative")
    if is_runtime(offset) or is_runtime(h.offset) or h.storage in t.copied:
        raise t.unsupported("as_strided from a place that depends on a value has no rule")
    source = _source(t, h, offset, extent(shape, strides))
    if source is None:
        raise t.unsupported(
            "as_strided has a rule where all its elements are the tensor's own, which lie without "
            "gaps; where nothing is differentiated, those of the tensor that it is a view of"
        )
    steps = (*_in_memory(source), pick(shape, strides, offset - source.offset))
    return t.view(source, steps, shape, strides, offset)


def _source(t: Trace, h: Handle, offset: int, count: int) -> Handle | None:
    """A tensor that has all elements from `offset` on: this one, or that of which it is a view.
    Elements of another tensor have no gradient through this one."""
    storage = h.storage
    base = storage.value.type.shape
    start = 0 if storage.real is None else t.lift(storage.real).offset
    whole = Handle(h.family, (), base, storage.strides, start, h.dtype, h.device, h.version)
    for source in (h, whole) if not (t.requires_grad(h) or reads_bits(h.steps)) else (h,):
        inside = source.offset <= offset and offset + count <= source.offset + source.numel
        if is_dense(source.shape, source.strides) and (inside or not count):
            return source
    if storage.real is None and not 0 <= offset <= math.prod(base) - count:
        raise t.shape_error(
            f"setStorage: {count} elements from {offset} on are out of bounds for storage of "
            f"{math.prod(base)} elements"
        )
    return None


def _in_memory(h: Handle) -> tuple[Step, ...]:
    """The elements of a tensor without gaps in the order of memory, as a row."""
    axes = by_memory(h.shape, h.strides)
    return ("permute", (("axes", axes),)), ("reshape", (("shape", (h.numel,)),))
