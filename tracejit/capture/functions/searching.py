"""Finding values among others: searchsorted, bucketize, isin; masked_scatter, put, index_reduce."""

from __future__ import annotations

import torch

from tracejit.capture.functions.common import normal_axis, register
from tracejit.capture.functions.composites import composed, in_torch
from tracejit.capture.trace import location
from tracejit.capture.trace.bounds import within
from tracejit.capture.trace.trace import Trace
from tracejit.errors import AxisError
from tracejit.ir.types import b1, i64

Tensor = torch.Tensor


def _found(t: Trace, rows: Tensor, values: Tensor, right: bool, sorter: Tensor | None) -> Tensor:
    """How many elements of sorted rows stand before each value: bisection, one gather a step. What
    cannot be compared stands last."""
    n = rows.shape[-1]
    low = torch.zeros(values.shape, dtype=torch.int64, device=values.device)
    if not n:
        return low
    step = 1 << (n.bit_length() - 1)
    while step:
        # all before low are before the value; those up to low + step are if the last of them is
        probe = (low + (step - 1)).clamp(max=n - 1)
        at = probe if sorter is None else _taken(sorter, probe)
        here = _taken(rows, at)
        before = ~(here > values) if right else ~(here >= values)
        low = torch.where(before & (low + step <= n), low + step, low)
        step //= 2
    return low


def _taken(rows: Tensor, at: Tensor) -> Tensor:
    if rows.dim() == 1:
        return rows.take(at)
    return rows.gather(-1, at)


def _searchsorted(
    t: Trace,
    sorted_sequence: Tensor,
    input: object,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    given = isinstance(input, Tensor)
    shape, asked = t.lift(sorted_sequence).shape, t.lift(input).shape if given else ()
    if side not in (None, "left", "right"):
        raise t.shape_error(f"side can only be 'left' or 'right' but got {side}")
    if side == "left" and right:
        raise t.shape_error("side and right can't be set to opposites, got side of left")
    if not shape:
        raise t.shape_error("boundaries tensor should have positive dimension")
    if len(shape) > 1 and shape[:-1] != asked[:-1]:
        raise t.shape_error(
            "boundaries tensor should be 1 dimension or the first N-1 dimensions of boundaries "
            f"tensor and input value tensor must match, but we got boundaries tensor {list(shape)} "
            f"and input value tensor {list(asked)}"
        )
    if sorter is not None and (t.lift(sorter).shape != shape or t.lift(sorter).dtype is not i64):
        raise t.shape_error("boundary and sorter must have the same size, and sorter be int64")
    rows = sorted_sequence.detach()
    if not given:
        input = torch.tensor(input, dtype=rows.dtype, device=rows.device)
    values = input.detach()
    if t.lift(rows).dtype is t.lift(values).dtype is b1:
        raise t.not_implemented("searchsorted_out_cpu", b1)
    found = _found(t, rows, values, right or side == "right", sorter)
    found = found.contiguous()
    return found.to(torch.int32) if out_int32 else found


@composed(torch.bucketize, kernel=True)
def bucketize(
    t: Trace, input: object, boundaries: Tensor, *, out_int32: bool = False, right: bool = False
) -> Tensor:
    rank = len(t.lift(boundaries).shape)
    if rank != 1:
        raise t.shape_error(f"boundaries tensor must be 1 dimension, but got dim({rank})")
    return _searchsorted(t, boundaries, input, out_int32=out_int32, right=right)


composed(torch.searchsorted)(_searchsorted)


@composed(torch.isin, kernel=True)
def isin(
    t: Trace,
    elements: object,
    test_elements: object,
    *,
    assume_unique: bool = False,
    invert: bool = False,
) -> Tensor:
    """Which elements are equal to any of others: each is compared with each."""
    if not isinstance(test_elements, Tensor):
        found = elements == test_elements
        return ~found if invert else found
    if not isinstance(elements, Tensor):
        elements = torch.tensor(elements, device=test_elements.device)
    kind = torch.promote_types(elements.dtype, test_elements.dtype)
    if torch.bool in (elements.dtype, test_elements.dtype):
        raise t.shape_error("Unsupported input type encountered for isin(): Bool")
    x, tests = elements.detach().to(kind), test_elements.detach().to(kind).reshape(-1)
    found = (x.unsqueeze(-1) == tests).any(-1)
    return ~found if invert else found


def _masked_scatter(t: Trace, input: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """Where a mask is true the elements of `source`, in order."""
    h, m, given = (t.lift(x) for x in (input, mask, source))
    if m.dtype is not b1:
        raise t.shape_error(
            f"masked_scatter_ only supports boolean masks, but got mask with dtype {m.dtype}"
        )
    if given.dtype is not h.dtype:
        raise t.shape_error("masked_scatter: expected self and source to have same dtypes")
    short = t.shape_error("Number of elements of source < number of ones in mask")
    input, mask = torch.broadcast_tensors(input, mask)
    order = mask.reshape(-1).cumsum(0) - 1
    if not given.numel:
        within(t, order, -1, 0, short)
    if not given.numel or not order.numel():
        kept = input.clone(memory_format=torch.contiguous_format)
        return t.fresh(t.unread(t.read(kept.handle), t.read(given))) if h.dtype.is_float else kept
    order = torch.where(mask.reshape(-1), order, 0)  # elements that take none stand at the first
    within(t, order, 0, given.numel, short)
    taken = t.b.gather(t.read(t.lift(source.reshape(-1))), t.read(order.handle), axis=0)
    return torch.where(mask, t.fresh(t.b.reshape(taken, shape=t.lift(mask).shape)), input)


register(("masked_scatter",), in_torch(_masked_scatter, kernel=True))


def _put(
    t: Trace, input: Tensor, index: Tensor, source: Tensor, accumulate: bool = False
) -> Tensor:
    """The flattened tensor with elements where indices say."""
    h, i, given = (t.lift(x) for x in (input, index, source))
    if i.dtype is not i64:
        raise t.shape_error("put_(): Expected a long tensor for index")
    if given.dtype is not h.dtype:
        raise t.shape_error("put_(): self and source expected to have the same dtype")
    if i.numel != given.numel:
        raise AxisError(
            where=location.full(),
            reason="put_(): Expected source and index to have the same number of elements, but got "
            f"source.numel() = {given.numel}, index.numel() = {i.numel}",
        )
    flat = input.reshape(-1)
    flat = flat.index_put((index.reshape(-1),), source.reshape(-1), accumulate)
    return torch.empty_like(input).copy_(flat.reshape(input.shape))


register(("put",), in_torch(_put, kernel=True))


def _index_reduce(
    t: Trace,
    input: Tensor,
    dim: int,
    index: Tensor,
    source: Tensor,
    reduce: str,
    *,
    include_self: bool = True,
) -> Tensor:
    """Slices of `source` reduced into those that a vector of indices names."""
    if reduce not in ("prod", "mean", "amax", "amin"):
        raise t.shape_error(
            f"index_reduce(): Expected reduce to be one of prod, mean, amax or amin but got "
            f"{reduce}."
        )
    if len(t.lift(index).shape) > 1:
        raise t.shape_error("index_reduce(): Index is supposed to be a vector")
    axis = normal_axis(t, dim, len(t.lift(input).shape))
    if not t.lift(input).shape:
        return _index_reduce(
            t,
            input.reshape(1),
            0,
            index.reshape(1),
            source.reshape(1),
            reduce,
            include_self=include_self,
        ).reshape(())
    thin = [1] * input.dim()
    thin[axis] = index.numel()
    wide = index.reshape(thin).expand(source.shape)
    return input.scatter_reduce(axis, wide, source, reduce, include_self=include_self)


register(("index_reduce",), in_torch(_index_reduce, kernel=True))
