"""Sorting: sort, argsort, msort, topk, kthvalue, median, nanmedian.

All of them are a gather at the places that `argsort` finds. NaN is the largest, and ties keep their
order, as in eager's stable sort; those of topk come as in eager's topk.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from tracejit.capture.functions.common import normal_axis, register
from tracejit.capture.functions.reduction import keep, shared
from tracejit.capture.trace.tensor import Handle, TracedTensor, elementwise_strides
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Value
from tracejit.ir.ops.movement import part
from tracejit.ir.types import b1, i64

Tensor = torch.Tensor
ON_GPU = 1 << 36  # comparisons of one sort: a GPU finds places by comparing each with each


def _order(t: Trace, x: Value, axis: int, descending: bool, count: int, topk: str = "") -> Value:
    """The places, along the axis, of the first `count` elements in the sorted order, or as torch's
    topk has them (see `argsort`)."""
    n, kind = x.type.shape[axis], x.type
    if n * kind.numel > ON_GPU and not kind.device.startswith("cpu"):
        raise t.unsupported(
            f"Sorting {n} elements along an axis compares each with each on a GPU, too many for "
            f"{list(kind.shape)}; sort outside of the step"
        )
    with t.untaped():
        how = {"topk": topk} if topk and kind.device.startswith("cpu") else {}
        found = t.b.argsort(x, axis=axis, count=count, descending=descending, **how)
    t.ranges[found] = 0, max(n - 1, 0)
    return found


def _sorted(
    t: Trace,
    input: Tensor,
    dim: int,
    descending: bool,
    count: int | None = None,
    topk: str = "",
) -> tuple[TracedTensor, TracedTensor]:
    """The first `count` elements in the sorted order, and their places."""
    h = t.lift(input)
    axis = normal_axis(t, dim, len(h.shape))
    x = t.read(h) if h.shape else t.b.reshape(t.read(h), shape=(1,))
    n = x.type.shape[axis]
    order = _order(t, x, axis, descending, n if count is None else count, topk)
    if order.type.numel:
        values = t.b.gather(x, order, axis=axis)
    else:
        kind = order.type
        values = t.b.full(0, shape=kind.shape, dtype=h.dtype, device=h.device)
        values = t.unread(values, x) if h.dtype.is_float else values
    if not h.shape:
        values, order = (t.b.reshape(v, shape=()) for v in (values, order))
    strides = None
    if count is None:  # as eager lays out a sorted tensor
        strides = elementwise_strides(h.shape, [(h.shape, h.strides)])
    return t.fresh(values, strides), t.fresh(order, strides)


def _refuse_bools(t: Trace, h: Handle, name: str) -> None:
    """Eager sorts bools, but does not choose among them."""
    if h.dtype is b1:
        raise t.not_implemented(name, b1)


def sort(
    t: Trace,
    input: Tensor,
    dim: int = -1,
    descending: bool = False,
    stable: bool | None = False,
) -> object:
    return torch.return_types.sort(_sorted(t, input, dim, bool(descending)))


def argsort(
    t: Trace, input: Tensor, dim: int = -1, descending: bool = False, stable: bool = False
) -> TracedTensor:
    return _sorted(t, input, dim, bool(descending))[1]


def msort(t: Trace, input: Tensor) -> TracedTensor:
    return _sorted(t, input, 0, False)[0]


def topk(
    t: Trace,
    input: Tensor,
    k: int,
    dim: int = -1,
    largest: bool = True,
    sorted: bool = True,
) -> object:
    """The k largest or smallest. On a CPU equal ones, and unsorted ones, come as in eager."""
    h = t.lift(input)
    _refuse_bools(t, h, "topk")
    axis = normal_axis(t, dim, len(h.shape))
    if not 0 <= k <= (h.shape[axis] if h.shape else 1):
        raise t.shape_error("selected index k out of range")
    how = "sorted" if sorted else "unsorted"
    return torch.return_types.topk(_sorted(t, input, dim, bool(largest), int(k), how))


def _one(t: Trace, input: Tensor, dim: int, keepdim: bool, k: int, name: str) -> object:
    """The k-th smallest along an axis, from 0, and its place."""
    h = t.lift(input)
    axis = normal_axis(t, dim, len(h.shape))
    values, order = _sorted(t, input, dim, False, k + 1)
    found = []
    for v in (t.read(t.lift(y)) for y in (values, order)):
        if h.shape:
            v = part(t.b, v, axis, k, v.type.shape[axis] - k)
        found.append(_kept(t, v, h, axis, keepdim))
    return getattr(torch.return_types, name)(found)


def _kept(t: Trace, v: Value, h: Handle, axis: int, keepdim: bool) -> TracedTensor:
    """One element along an axis of a tensor, whose axis stays if it is kept."""
    rest = (*h.shape[:axis], *h.shape[axis + 1 :])
    v = t.b.reshape(v, shape=rest)
    return t.fresh(keep(t, v, h.shape, (axis,), keepdim) if h.shape else v)


def kthvalue(t: Trace, input: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> object:
    h = t.lift(input)
    _refuse_bools(t, h, "kthvalue")
    axis = normal_axis(t, dim, len(h.shape))
    if not 1 <= k <= (h.shape[axis] if h.shape else 1):
        raise t.shape_error(f"kthvalue(): selected number k out of range for dimension {axis}")
    return _one(t, input, dim, bool(keepdim), int(k) - 1, "kthvalue")


def _middle(t: Trace, x: Value, axis: int, ignore: bool) -> tuple[Value, Value]:
    """The lower one of the two in the middle along an axis, or the first NaN; and its place.
    `ignore`: that of the numbers, if there are any."""
    b, n = t.b, x.type.shape[axis]
    kept = tuple(1 if k == axis else s for k, s in enumerate(x.type.shape))
    with t.untaped():
        order = _order(t, x, axis, False, n)
        place = b.full((n - 1) // 2, shape=kept, dtype=i64, device=x.type.device)
        if x.type.dtype.is_float:
            numbers = b.reduce_sum(b.cast(b.eq(x, x), dtype=i64), axes=(axis,))
            numbers = b.reshape(numbers, shape=kept)
            if ignore:
                place = b.maximum(b.sub(b.floordiv(b.add(numbers, 1), 2), 1), 0)
            else:
                place = b.where(b.lt(numbers, n), numbers, place)
        place = b.gather(order, place, axis=axis)
    t.ranges[place] = 0, n - 1
    return b.gather(x, place, axis=axis), place


def _median(name: str, *, ignore: bool) -> Callable:
    """The lower median of everything; along a dim, with its place."""

    def rule(t: Trace, input: Tensor, dim: int | None = None, keepdim: bool = False) -> object:
        h = t.lift(input)
        _refuse_bools(t, h, "median")
        if dim is None and not h.numel and h.dtype.is_float:
            total = t.b.reduce_sum(t.b.reshape(t.read(h), shape=(0,)), axes=(0,))
            return t.fresh(t.b.add(total, math.nan))
        if not h.numel:
            raise t.unsupported("The median of no elements has no rule")
        if dim is None:
            row = t.b.reshape(t.read(h), shape=(h.numel,))
            with t.untaped():
                value = t.b.reshape(_middle(t, row, 0, ignore)[0], shape=())
            return t.fresh(t.derive(name, (row,), value, shared(t, row, value, (0,))))
        axis = normal_axis(t, dim, len(h.shape))
        x = t.read(h) if h.shape else t.b.reshape(t.read(h), shape=(1,))
        found = [_kept(t, v, h, axis, keepdim) for v in _middle(t, x, axis, ignore)]
        return getattr(torch.return_types, name)(found)

    return rule


for _implementation in (sort, argsort, msort, topk, kthvalue):
    register((_implementation.__name__,), _implementation, inplace=False)
register(("median",), _median("median", ignore=False), inplace=False)
register(("nanmedian",), _median("nanmedian", ignore=True), inplace=False)
