"""The bits of a tensor as numbers of another dtype: `view(dtype)`."""

from __future__ import annotations

import torch

from tracejit.capture.trace.scalars import is_runtime
from tracejit.capture.trace.tensor import TO_IR, TO_TORCH, Handle, Ints, TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.capture.trace.views import bits, reads_bits
from tracejit.ir.types import DType, b1


def as_dtype(t: Trace, input: torch.Tensor, dtype: torch.dtype) -> TracedTensor:
    """A view of the same bytes, without history. Of numbers of another size, the last axis becomes
    longer or shorter. Of bools only their own bytes are read, as 0 and 1."""
    if dtype not in TO_IR:
        raise t.unsupported(f"{dtype} is not supported")
    h, to = t.lift(input), TO_IR[dtype]
    shape, strides, offset = h.shape, h.strides, h.offset
    if to is b1 and h.dtype is not b1:
        raise t.unsupported("Other numbers as bools have no rule; compare them with 0")
    if is_runtime(offset) or h.storage in t.copied:
        raise t.unsupported("The bits of what lies where a value says have no rule")
    if to.itemsize < h.dtype.itemsize:
        shape, strides, offset = _smaller(t, h, to)
    elif to.itemsize > h.dtype.itemsize:
        shape, strides, offset = _larger(t, h, to)
    alias = t.detached(h, share_version=True).handle
    if to is h.dtype:
        return alias.tensor
    if reads_bits(alias.steps[-1:]):  # no number on the way, whose bits might not stay
        alias.steps = alias.steps[:-1]
    return t.view(alias, (bits(to),), shape, strides, offset, to)


def _smaller(t: Trace, h: Handle, to: DType) -> tuple[Ints, Ints, int]:
    _check_rows(t, h, to)
    count = h.dtype.itemsize // to.itemsize
    shape = (*h.shape[:-1], h.shape[-1] * count)
    return shape, (*(s * count for s in h.strides[:-1]), 1), h.offset * count


def _larger(t: Trace, h: Handle, to: DType) -> tuple[Ints, Ints, int]:
    _check_rows(t, h, to)
    count = to.itemsize // h.dtype.itemsize
    wanted = {"self.size(-1)": h.shape[-1], "self.storage_offset()": h.offset}
    wanted |= {f"self.stride({k})": s for k, s in enumerate(h.strides[:-1])}
    for name, number in wanted.items():
        if number % count:
            raise t.shape_error(
                f"{name} must be divisible by {count} to view {TO_TORCH[h.dtype]} as "
                f"{TO_TORCH[to]} (different element sizes), but got {number}"
            )
    shape = (*h.shape[:-1], h.shape[-1] // count)
    return shape, (*(s // count for s in h.strides[:-1]), 1), h.offset // count


def _check_rows(t: Trace, h: Handle, to: DType) -> None:
    """Numbers of another size are read along rows."""
    what = f"to view {TO_TORCH[h.dtype]} as {TO_TORCH[to]} (different element sizes)"
    if not h.shape:
        raise t.shape_error(f"self.dim() cannot be 0 {what}")
    if h.strides[-1] != 1:
        raise t.shape_error(f"self.stride(-1) must be 1 {what}, but got {h.strides[-1]}")
