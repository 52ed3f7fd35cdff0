"""embedding_bag: sums, means and maxima of rows of a table."""

from __future__ import annotations

import math

import torch

from tracejit.capture.functions.composites import composed
from tracejit.capture.functions.derived import argument_error
from tracejit.capture.functions.indexing import renormalize
from tracejit.capture.trace.bounds import within
from tracejit.capture.trace.trace import Trace

Tensor = torch.Tensor
functional = torch.nn.functional


@composed(functional.embedding_bag, kernel=True)
def embedding_bag(
    t: Trace,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Bags are the rows of `input`, or begin at the `offsets` of a vector.

    Rows of `padding_idx` are not in any bag; a bag of none gives 0.
    """
    i, w = t.lift(input).shape, t.lift(weight).shape
    factors = per_sample_weights
    if sparse:
        raise t.unsupported("Sparse gradients have no rule; use sparse=False")
    if scale_grad_by_freq and mode == "max":
        raise argument_error(t, "max mode does not support scaling the gradient by the frequency")
    if factors is not None and t.lift(factors).shape != i:
        raise argument_error(t, "per_sample_weights must have the same shape as the input")
    if len(w) != 2:
        raise argument_error(t, f"weight has to be a 2D Tensor, but got {len(w)} dimensions")
    if len(i) not in (1, 2):
        raise argument_error(t, f"input has to be 1D or 2D Tensor, but got {len(i)} dimensions")
    if input.dtype is torch.bool:
        raise t.not_implemented("arange_cpu", t.lift(input).dtype)
    if (len(i) == 1) == (offsets is None):
        raise argument_error(t, "offsets are for an input of 1 dimension, and has to be 1D there")
    if offsets is not None and len(t.lift(offsets).shape) != 1:
        raise argument_error(t, "offsets has to be a 1D Tensor")
    if mode not in ("sum", "mean", "max"):
        raise argument_error(t, "mode has to be one of sum, mean or max")
    if factors is not None and mode != "sum":
        raise t.shape_error("embedding_bag: per_sample_weights is only supported for mode='sum'")
    if padding_idx is not None and not -w[0] <= padding_idx < w[0]:
        raise t.shape_error("padding_idx must be within the number of embeddings")
    reason = f"an index of the input is not in the valid range [0, {w[0]})"
    within(t, input, 0, w[0], t.shape_error(reason))
    if max_norm is not None:
        renormalize(t, weight, input, max_norm, norm_type)
    taken = None if padding_idx is None else input != padding_idx % max(w[0], 1)
    if offsets is None:
        rows = functional.embedding(input, weight, scale_grad_by_freq=scale_grad_by_freq)
        rows = rows if factors is None else rows * factors.unsqueeze(-1)
        return _pooled(t, rows, taken, mode)
    rows = functional.embedding(input, weight, scale_grad_by_freq=scale_grad_by_freq)
    return _scattered(t, rows, taken, offsets, factors, mode, include_last_offset)


def _pooled(t: Trace, rows: Tensor, taken: Tensor | None, mode: str) -> Tensor:
    """Over the middle axis of three, of what is `taken`."""
    _, length, _ = t.lift(rows).shape
    if not length:
        return rows.sum(1)
    if mode == "max":
        if taken is None:
            return rows.max(1).values
        rows = torch.where(taken.unsqueeze(-1), rows, -math.inf)
        return torch.where(taken.any(1).unsqueeze(-1), rows.max(1).values, 0.0)
    if taken is not None:
        rows = torch.where(taken.unsqueeze(-1), rows, 0.0)
    total = rows.sum(1)
    if mode == "sum":
        return total
    count = length if taken is None else taken.sum(1).clamp_min(1).unsqueeze(-1)
    return total / count


def _scattered(
    t: Trace,
    rows: Tensor,
    taken: Tensor | None,
    offsets: Tensor,
    factors: Tensor | None,
    mode: str,
    include_last: bool,
) -> Tensor:
    """Bags that begin at offsets: each row compares its place with all of them to find its own."""
    n, width = t.lift(rows).shape
    bags = t.lift(offsets).shape[0] - include_last
    if bags < 0:
        raise t.shape_error("include_last_offset: number of offsets should be at least 1")
    if bags:
        within(t, offsets[:1], 0, 1, t.shape_error("offsets[0] has to be 0"))
    within(t, offsets, 0, n + 1, t.shape_error("offsets can not be greater than input's length"))
    if include_last:  # eager does not always stop there
        within(t, offsets[-1:], n, n + 1, t.shape_error(f"the last of the offsets has to be {n}"))
    if not n or not bags:
        none = rows.new_zeros((bags, width))
        return t.fresh(t.unread(t.read(t.lift(none)), t.read(t.lift(rows))))
    place = torch.arange(n, device=rows.device)
    bag = (offsets[:bags, None] <= place).sum(0) - 1
    t.ranges[t.read(t.lift(bag))] = 0, bags - 1
    if mode == "max":
        mine = bag == torch.arange(bags, device=rows.device)[:, None]
        mine = mine if taken is None else mine & taken
        spread = torch.where(mine.unsqueeze(-1), rows, -math.inf)
        return torch.where(mine.any(1, keepdim=True), spread.max(1).values, 0.0)
    if factors is not None:
        rows = rows * factors.unsqueeze(-1)
    if taken is not None:
        rows = torch.where(taken.unsqueeze(-1), rows, 0.0)
    total = rows.new_zeros((bags, width)).index_add(0, bag, rows)
    if mode == "sum":
        return total
    each = torch.ones_like(place) if taken is None else taken.long()
    count = each.new_zeros(bags).index_add(0, bag, each)
    return total / count.clamp_min(1).unsqueeze(-1)
