"""Indexing by values: primitives that read, and write, where an operand says."""

from __future__ import annotations

import math

import numpy as np

from tracejit.ir.ops.record import BITS, NO_GRAD, ULPS, Op, require, require_tensor
from tracejit.ir.ops.selecting import chosen
from tracejit.ir.types import DType, Type, b1, i64

FEW = 4  # indices along an axis that are found by comparing every element with each of them


def missing(dtype: DType) -> float | int | bool:
    """What an index out of range reads: NaN, and 0 where there is no NaN."""
    return math.nan if dtype.is_float else False if dtype.kind == "b" else 0


def _infer_gather(x: Type, index: Type, *, axis: int) -> Type:
    require_tensor("gather", x)
    require_tensor("gather", index)
    require(index.dtype is i64, f"gather at {index}, which is not i64")
    fits = (
        0 <= axis < len(x.shape) == len(index.shape)
        and all(
            n == m or k == axis for k, (n, m) in enumerate(zip(x.shape, index.shape, strict=True))
        )
        and x.device == index.device
    )
    require(fits, f"gather of {x} at {index} along axis {axis}")
    return Type(x.dtype, index.shape, x.device)


def _eval_gather(x: np.ndarray, index: np.ndarray, *, axis: int) -> np.ndarray:
    size = x.shape[axis]
    inside = (index >= 0) & (index < size)
    fill = x.dtype.type(math.nan if x.dtype.kind == "f" else 0)
    if not size:
        return np.full(index.shape, fill, x.dtype)
    found = np.take_along_axis(x, np.where(inside, index, 0), axis)
    return np.where(inside, found, fill)


def _vjp_gather(b, g, y, x, index, *, axis: int):
    """Each element adds up the cotangents of its readers, in order: the same bits every time.

    Where there are few, as the one class of each row of logits, that is a reduction over
    where(index == position, g, 0), which fuses with what reads it.
    """
    kind, taken = x.type, index.type.shape[axis]
    if taken > FEW:
        zeros = b.full(0, shape=kind.shape, dtype=kind.dtype, device=kind.device)
        return b.scatter(zeros, index, g, axis=axis, combine="add")
    spread = (*kind.shape[: axis + 1], taken, *kind.shape[axis + 1 :])

    def along(value):
        shape = (*kind.shape[:axis], 1, taken, *kind.shape[axis + 1 :])
        return b.expand(b.reshape(value, shape=shape), shape=spread)

    position = b.iota(axis=axis, shape=spread, dtype=i64, device=kind.device)
    return b.reduce_sum(b.where(b.eq(along(index), position), along(g), 0.0), axes=(axis + 1,))


_COMBINED = {"add": np.add, "mul": np.multiply, "last": None, "max": np.maximum, "min": np.minimum}


def _infer_scatter(x: Type, index: Type, source: Type, *, axis: int, combine: str) -> Type:
    require(combine in _COMBINED, f"scatter that combines by {combine!r}")
    require(x.dtype is not b1 or combine == "last", f"scatter of bools by {combine}")
    require_tensor("scatter", source)
    taken = _infer_gather(x, index, axis=axis)
    require(taken == source, f"scatter of {source} at {index} into {x} along axis {axis}")
    return x


def _eval_scatter(
    x: np.ndarray, index: np.ndarray, source: np.ndarray, *, axis: int, combine: str
) -> np.ndarray:
    wide = np.float64 if x.dtype.kind == "f" and combine in ("add", "mul") else x.dtype
    out = np.array(x, wide)
    moved = np.moveaxis(out, axis, 0)
    at, given = np.moveaxis(index, axis, 0), np.moveaxis(source, axis, 0)
    inside = (at >= 0) & (at < moved.shape[0])
    rest = np.indices(at.shape, sparse=True)[1:]
    places = tuple(np.broadcast_to(i, at.shape)[inside] for i in (at, *rest))
    fold = _COMBINED[combine]
    if fold is not None:
        fold.at(moved, places, given[inside])
    else:
        moved[places] = given[inside]
    return out


def _shared(b, g, y, x, index, source, axis: int):
    """The cotangent of an extremum's place, over how many attain it."""
    kind = x.type
    ours = b.cast(b.eq(source, b.gather(y, index, axis=axis)), dtype=kind.dtype)
    count = b.cast(b.eq(x, y), dtype=kind.dtype)
    count = b.scatter(count, index, ours, axis=axis, combine="add")
    return b.div(g, b.maximum(count, 1.0)), ours


def _vjp_scatter_target(b, g, y, x, index, source, *, axis: int, combine: str):
    if combine == "add":
        return g
    if combine == "mul":  # the product of the others
        own = b.where(b.eq(x, 0.0), 1.0, x)
        return b.div(b.mul(g, b.scatter(own, index, source, axis=axis, combine="mul")), own)
    if combine != "last":
        share, _ = _shared(b, g, y, x, index, source, axis)
        return b.where(b.eq(x, y), share, 0.0)
    kind = source.type
    zeros = b.full(0, shape=kind.shape, dtype=kind.dtype, device=kind.device)
    return b.scatter(g, index, zeros, axis=axis, combine="last")


def _vjp_scatter_source(b, g, y, x, index, source, *, axis: int, combine: str):
    taken = b.and_(b.ge(index, 0), b.lt(index, x.type.shape[axis]))
    if combine == "mul":
        return _vjp_factor(b, g, y, x, index, source, axis, taken)
    if combine in ("max", "min"):
        share, ours = _shared(b, g, y, x, index, source, axis)
        return b.where(taken, b.mul(b.gather(share, index, axis=axis), ours), 0.0)
    if combine == "last":  # and not overwritten by a later one
        shape, device = index.type.shape, x.type.device
        order = b.iota(axis=axis, shape=shape, dtype=i64, device=device)
        none = b.full(-1, shape=x.type.shape, dtype=i64, device=device)
        last = b.scatter(none, index, order, axis=axis, combine="last")
        taken = b.and_(taken, b.eq(b.gather(last, index, axis=axis), order))
    return b.where(taken, b.gather(g, index, axis=axis), 0.0)


def _vjp_factor(b, g, y, x, index, source, axis: int, taken):
    """The cotangent of a factor: the product over it, or that of the others if it alone is 0."""
    kind, none = source.type, b.eq(source, 0.0)
    zeros = b.full(0, shape=x.type.shape, dtype=kind.dtype, device=kind.device)
    zeros = b.scatter(zeros, index, b.cast(none, dtype=kind.dtype), axis=axis, combine="add")
    alone = b.and_(none, b.eq(b.gather(zeros, index, axis=axis), 1.0))
    others = b.scatter(x, index, b.where(alone, 1.0, source), axis=axis, combine="mul")
    others = b.where(taken, b.gather(b.mul(g, others), index, axis=axis), 0.0)
    usual = b.where(taken, b.gather(b.mul(g, y), index, axis=axis), 0.0)
    return b.where(alone, others, b.div(usual, b.where(none, 1.0, source)))


def _infer_cumsum(x: Type, *, axis: int) -> Type:
    require_tensor("cumsum", x)
    require(0 <= axis < len(x.shape), f"cumsum of {x} along axis {axis}")
    require(x.dtype is not b1 and not x.dtype.narrow, f"cumsum of {x.dtype}")
    return x


def _eval_cumsum(x: np.ndarray, *, axis: int) -> np.ndarray:
    return np.cumsum(x, axis, dtype=np.float64 if x.dtype.kind == "f" else x.dtype)


def _vjp_cumsum(b, g, y, x, *, axis: int):
    return b.flip(b.cumsum(b.flip(g, axes=(axis,)), axis=axis), axes=(axis,))


# Each element is the sum of those up to it along an axis, added in their order.
cumsum = Op(
    "cumsum",
    "indexing",
    _infer_cumsum,
    _eval_cumsum,
    (_vjp_cumsum,),
    cost=1,
    exact=ULPS,
    rounds=True,
    host=None,
)


def _infer_argsort(x: Type, *, axis: int, count: int, descending: bool, topk: str = "") -> Type:
    require_tensor("argsort", x)
    require(topk in ("", "sorted", "unsorted"), f"argsort of {x} as topk {topk}")
    require(0 <= axis < len(x.shape), f"argsort of {x} along axis {axis}")
    require(0 <= count <= x.shape[axis], f"the first {count} of {x} along axis {axis}")
    return Type(i64, (*x.shape[:axis], count, *x.shape[axis + 1 :]), x.device)


def argsorted(x: np.ndarray, axis: int, count: int, descending: bool, topk: str = "") -> np.ndarray:
    """The places along an axis of the first `count` elements in their order."""
    if topk:
        return np.moveaxis(chosen(np.moveaxis(x, axis, -1), count, descending, topk), -1, axis)
    last = x.shape[axis] - 1
    if not descending:
        order = np.argsort(x, axis, kind="stable")
    else:  # backwards twice, so that equal ones keep their order
        order = last - np.flip(np.argsort(np.flip(x, axis), axis, kind="stable"), axis)
    return np.moveaxis(np.moveaxis(order, axis, 0)[:count], 0, axis)


# Where along an axis the elements stand that come first in order; equal ones keep theirs. NaN is
# the largest, and no two of them differ. `topk`, sorted or unsorted: equal ones come as torch's
# topk has them on a CPU (`selecting.py`); a GPU keeps their order.
argsort = Op(
    "argsort",
    "indexing",
    _infer_argsort,
    lambda x, *, axis, count, descending, topk="": argsorted(x, axis, count, descending, topk),
    (NO_GRAD,),
    cost=1,
    exact=BITS,
    rounds=False,
    host=None,
)

# x, and at each place that an index along the axis names the source: added in the order of the
# indices, or multiplied, or the last one, or what is largest or smallest, x included. Indices out
# of range name no place.
scatter = Op(
    "scatter",
    "indexing",
    _infer_scatter,
    _eval_scatter,
    (_vjp_scatter_target, NO_GRAD, _vjp_scatter_source),
    cost=1,
    exact=ULPS,
    rounds=True,
    host=None,
)
gather = Op(
    "gather",
    "indexing",
    _infer_gather,
    _eval_gather,
    (_vjp_gather, NO_GRAD),
    cost=1,
    exact=BITS,
    rounds=False,
    host=None,
)
