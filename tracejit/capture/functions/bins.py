"""Counts of numbers by bins: histc, histogram, histogramdd."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tracejit.capture.functions.composites import composed
from tracejit.capture.functions.derived import require_float, underived
from tracejit.capture.trace.bounds import between
from tracejit.capture.trace.trace import Trace

Tensor = torch.Tensor


def _ends(t: Trace, x: Tensor, low: float, high: float, margin: float) -> tuple[Tensor, Tensor]:
    """Where the first bin starts and the last one ends: as given, or where the
    numbers do; apart from each other."""
    if high < low:
        raise t.shape_error(f"{t.calling.__name__}: max must be larger than min")
    if low == high and t.lift(x).numel:
        first, last = x.aminmax()
        largest = torch.finfo(x.dtype).max
        error = t.shape_error(f"{t.calling.__name__}: range of the numbers is not finite")
        for end in (first, last):
            between(t, end, -largest, largest, error)
    else:
        first, last = (torch.scalar_tensor(n, dtype=x.dtype, device=x.device) for n in (low, high))
    alone = first == last
    return torch.where(alone, first - margin, first), torch.where(alone, last + margin, last)


def _counted(
    t: Trace, x: Tensor, bins: int, ends: tuple, place: Tensor, weight: Tensor | None
) -> Tensor:
    """How many numbers, or how much of a weight, are in each bin, whose right end belongs to the
    next one, but for the last."""
    first, last = ends
    inside = (x >= first) & (x <= last)
    place = torch.where(inside, place.clamp(0, bins - 1), bins)
    t.ranges[t.read(t.lift(place))] = 0, bins
    each = torch.ones_like(x) if weight is None else weight
    return x.new_zeros(bins + 1).index_add(0, place, each)[:bins]


@composed(torch.histc, Tensor.histc, kernel=True)
def histc(t: Trace, input: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    h = t.lift(input)
    require_float(t, "histogram_cpu", t.read(h))
    if bins <= 0:
        raise t.shape_error(f"torch.histogram(): bins must be > 0, but got {bins} for dimension 0")
    with torch.no_grad():
        x = input.detach().reshape(-1)
        first, last = _ends(t, x, float(min), float(max), 1.0)
        place = ((x - first) * bins / (last - first)).nan_to_num(0.0, 0.0, 0.0)
        return _counted(t, x, bins, (first, last), place.long(), None)


@composed(torch.histogram, Tensor.histogram, kernel=True)
def histogram(
    t: Trace,
    input: Tensor,
    bins: int | Tensor = 100,
    *,
    range: tuple[float, float] | None = None,
    weight: Tensor | None = None,
    density: bool = False,
) -> object:
    h = t.lift(input)
    require_float(t, "histogramdd", t.read(h))
    with torch.no_grad():
        x = input.detach().reshape(-1)
        if isinstance(bins, Tensor):
            if t.lift(bins).dtype is not h.dtype or len(t.lift(bins).shape) != 1:
                raise t.shape_error("torch.histogram(): bins tensor must be 1-d, of input's dtype")
            edges = bins.detach().clone()
            bins = t.lift(edges).shape[0] - 1
        else:
            if range is None and h.numel and h.dtype.narrow:  # eager finds no ends of such
                raise t.not_implemented("histogramdd", h.dtype)
            empty = range is None and not h.numel
            low, high = range if range is not None else (0.0, 1.0) if empty else (0.0, 0.0)
            low, high = float(low), float(high)
            edges = torch.linspace(*_ends(t, x, low, high, 0.5), bins + 1, dtype=x.dtype)
        if bins < 1:
            raise t.shape_error("torch.histogram(): bins must be > 0")
        if weight is not None:
            if t.lift(weight).shape != h.shape or t.lift(weight).dtype is not h.dtype:
                raise t.shape_error("torch.histogram(): weight must be of input's shape and dtype")
            weight = weight.detach().reshape(-1)
        place = torch.searchsorted(edges, x, right=True) - 1
        found = _counted(t, x, bins, (edges[0], edges[-1]), place, weight)
        if density:
            found = found / (found.sum() * edges.diff())
    inputs = (t.read(h),)
    values = (t.read(t.lift(x)) for x in (found, edges))
    made = (t.fresh(underived(t, "histogram", inputs, value)) for value in values)
    return torch.return_types.histogram(tuple(made))


@composed(torch.histogramdd, kernel=True)
def histogramdd(
    t: Trace,
    input: Tensor,
    bins: int | Sequence,
    range: Sequence[float] | None = None,
    weight: Tensor | None = None,
    density: bool = False,
) -> object:
    """Counts of points by boxes, which edges along each coordinate bound."""
    h = t.lift(input)
    require_float(t, "histogramdd", t.read(h))
    if len(h.shape) < 2:
        raise t.shape_error("torch.histogramdd: input tensor should have at least 2 dimensions")
    rank = h.shape[-1]
    given = [bins] * rank if isinstance(bins, int) else list(bins)
    if len(given) != rank:
        raise t.shape_error(
            "torch.histogramdd: The size of bins must be equal to the innermost dimension"
        )
    if any(isinstance(n, Tensor) and t.lift(n).dtype is not h.dtype for n in given):
        raise t.shape_error("torch.histogramdd: bins must be of input's dtype")
    if h.dtype.narrow:
        raise t.unsupported("histogramdd of bf16 and f16 has no rule")
    with torch.no_grad():
        x = input.detach().reshape(-1, rank)
        edges, inside, place = [], torch.ones_like(x[:, 0], dtype=torch.bool), 0
        for k, (column, n) in enumerate(zip(x.unbind(-1), given, strict=True)):
            if isinstance(n, Tensor):
                found = n.detach()
            else:
                low, high = (0.0, 0.0) if x.numel() else (0.0, 1.0)
                low, high = range[2 * k : 2 * k + 2] if range is not None else (low, high)
                ends = _ends(t, column, float(low), float(high), 0.5)
                found = torch.linspace(*ends, n + 1, dtype=x.dtype)
            if len(found) < 2:
                raise t.shape_error("torch.histogramdd(): bins must be > 0")
            edges.append(found)
            inside = inside & (column >= found[0]) & (column <= found[-1])
            at = (torch.searchsorted(found, column.contiguous(), right=True) - 1).clamp(0)
            place = place * (len(found) - 1) + at.clamp(max=len(found) - 2)
        counts = [len(e) - 1 for e in edges]
        total = math.prod(counts)
        place = torch.where(inside, place, total)
        t.ranges[t.read(t.lift(place))] = 0, total
        each = torch.ones_like(x[:, 0]) if weight is None else weight.detach().reshape(-1)
        found = x.new_zeros(total + 1).index_add(0, place, each)[:total].reshape(counts)
        if density:
            found = found / found.sum()
            for k, e in enumerate(edges):
                found = found / e.diff().reshape((-1,) + (1,) * (rank - 1 - k))
    inputs = (t.read(h),)
    values = [t.read(t.lift(v)) for v in (found, *edges)]
    hist, *made = (t.fresh(underived(t, "histogramdd", inputs, value)) for value in values)
    edges = (n if isinstance(n, Tensor) else e for n, e in zip(given, made, strict=True))
    return torch.return_types.histogramdd((hist, tuple(edges)))
