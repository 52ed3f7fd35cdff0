"""Reductions of segments that lie one after another along an axis: segment_reduce."""

from __future__ import annotations

import math

import torch

from tracejit.capture.functions.composites import composed
from tracejit.capture.trace.bounds import require
from tracejit.capture.trace.trace import Trace

Tensor = torch.Tensor
_STARTS = {"sum": 0.0, "mean": 0.0, "prod": 1.0, "max": -math.inf, "min": math.inf}
_SCATTERED = {"mean": "sum", "max": "amax", "min": "amin"}


@composed(torch.segment_reduce, kernel=True)
def segment_reduce(
    t: Trace,
    data: Tensor,
    reduce: str,
    *,
    lengths: Tensor | None = None,
    indices: Tensor | None = None,
    offsets: Tensor | None = None,
    axis: int = 0,
    unsafe: bool = False,
    initial: float | None = None,
    dim: int | None = None,
) -> Tensor:
    """Of each segment its sum, mean, product, largest or smallest, with a number that all start
    from. Segments are as long as `lengths` say, or begin at `offsets`, whose last is their end;
    those count where both are given."""
    h, axis = t.lift(data), axis if dim is None else dim
    if reduce not in _STARTS:
        raise t.shape_error(f"segment_reduce(): unsupported reduction {reduce!r}")
    if indices is not None or (lengths is None and offsets is None):
        raise t.shape_error("segment_reduce(): either lengths or offsets must be given")
    if not h.dtype.is_float:
        raise t.not_implemented("segment_reduce", h.dtype)
    given = t.lift(lengths if offsets is None else offsets)
    if axis != len(given.shape) - 1 or given.shape[:-1] != h.shape[:axis]:
        raise t.shape_error("segment_reduce(): the axis must be the last one of the segments")
    size = h.shape[axis]
    with torch.no_grad():
        if offsets is not None:
            ends, lengths = offsets[..., 1:], offsets.diff()
        else:
            ends = lengths.cumsum(-1)
            if not unsafe:
                error = t.shape_error("segment_reduce(): lengths must add up to the axis's size")
                wrong = (lengths < 0).any() | (lengths.sum(-1) != size).any()
                require(t, t.read(t.lift(wrong)), error)
        place = torch.arange(size, device=data.device).expand(h.shape[: axis + 1])
        segment = torch.searchsorted(ends.contiguous(), place.contiguous(), right=True)
        many = ends.shape[-1]
        if offsets is not None:
            segment = torch.where(place < offsets[..., :1], many, segment)
        t.ranges[t.read(t.lift(segment))] = 0, many
        rest = len(h.shape) - axis - 1
        segment = segment.reshape(*segment.shape, *(1,) * rest).expand(h.shape)
    shape = (*ends.shape[:-1], many + 1, *h.shape[axis + 1 :])
    extremum = reduce in ("max", "min")
    start = _STARTS[reduce] if initial is None or extremum else float(initial)
    base = torch.full(shape, start, dtype=data.dtype, device=data.device)
    found = base.scatter_reduce(axis, segment, data, _SCATTERED.get(reduce, reduce))
    found = found.narrow(axis, 0, many).contiguous()  # what is in none stands behind them
    if extremum and initial is not None:  # which shares no gradient with what equals it
        better = found >= initial if reduce == "max" else found <= initial
        found = torch.where(better | found.isnan(), found, float(initial))
    if reduce != "mean":
        return found
    count = lengths.reshape(*lengths.shape, *(1,) * rest).to(data.dtype)
    return found / count if initial is None else found / count.clamp_min(1)
