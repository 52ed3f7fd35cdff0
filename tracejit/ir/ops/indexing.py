"""Indexing by values: primitives that read where an operand says."""

from __future__ import annotations

import math

import numpy as np

from tracejit.ir.ops.record import BITS, NO_GRAD, Op, require, require_tensor
from tracejit.ir.types import DType, Type, i64


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
    """Each element adds up the cotangents of its readers, in order: x.numel · index extent work.

    A reduction over where(index == position, g, 0): no atomics, so the same bits every time.
    """
    kind, taken = x.type, index.type.shape[axis]
    spread = (*kind.shape[: axis + 1], taken, *kind.shape[axis + 1 :])

    def along(value):
        shape = (*kind.shape[:axis], 1, taken, *kind.shape[axis + 1 :])
        return b.expand(b.reshape(value, shape=shape), shape=spread)

    position = b.iota(axis=axis, shape=spread, dtype=i64, device=kind.device)
    return b.reduce_sum(b.where(b.eq(along(index), position), along(g), 0.0), axes=(axis + 1,))


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
