"""Max unpooling: elements put back to where a max pooling says that it took them from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tracejit.capture.functions.layouts import like
from tracejit.capture.functions.scattering import scatter
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.ir.types import i64

Tensor = torch.Tensor
builtin = torch._C._nn


def _unpool(t: Trace, input: Tensor, indices: Tensor, output_size: Sequence[int], rank: int):
    """Zeros, and x[n, c, o] at the element indices[n, c, o] of the image n, c."""
    h, i = t.lift(input), t.lift(indices)
    name = f"max_unpool{rank}d"
    size = tuple(int(n) for n in output_size)
    if len(size) != rank:
        raise t.shape_error(f"There should be exactly {rank} elements in output_size, not {size}")
    if i.dtype is not i64:
        raise t.shape_error("elements in indices should be type int64")
    if len(h.shape) not in (rank + 1, rank + 2) or 0 in h.shape[-rank:]:
        raise t.shape_error(
            f"Input to {name} should be a {rank + 1}d or {rank + 2}d Tensor with non-zero sizes, "
            f"but got {list(h.shape)}"
        )
    if h.shape != i.shape:
        raise t.shape_error(
            f"Expected shape of indices to be same as that of the input tensor ({list(h.shape)}) "
            f"but got indices tensor with shape: {list(i.shape)}"
        )
    if not h.dtype.is_float:
        raise t.not_implemented(name, h.dtype)
    whole, shape = math.prod(size), (*h.shape[:-rank], *size)
    lead = math.prod(h.shape[:-rank])
    flat = (lead, math.prod(h.shape[-rank:]))
    x, at = (t.fresh(t.b.reshape(t.read(v), shape=flat)) for v in (h, i))
    zeros = t.fresh(t.b.full(0, shape=(lead, whole), dtype=h.dtype, device=h.device))
    found = t.read(t.lift(scatter(t, zeros, 1, at, x)))
    return t.fresh(t.b.reshape(found, shape=shape), like(h, shape))


@rule(builtin.max_unpool2d)
def max_unpool2d(
    t: Trace, input: Tensor, indices: Tensor, output_size: Sequence[int]
) -> TracedTensor:
    return _unpool(t, input, indices, output_size, 2)


@rule(builtin.max_unpool3d)
def max_unpool3d(
    t: Trace,
    input: Tensor,
    indices: Tensor,
    output_size: Sequence[int],
    stride: object,
    padding: object,
) -> TracedTensor:
    return _unpool(t, input, indices, output_size, 3)
