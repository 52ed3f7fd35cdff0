"""Reductions, contraction, and sources: primitives whose results are not element by element."""

from __future__ import annotations

import numpy as np

from tracejit.ir.ops.movement import transpose
from tracejit.ir.ops.record import BITS, EDGES, NO_GRAD, ULPS, Exact, Op, require, require_tensor
from tracejit.ir.types import DType, Type, b1, round_to

Ints = tuple[int, ...]


def _infer_reduce(x: Type, *, axes: Ints) -> Type:
    require_tensor("reduction", x)
    fits = len(set(axes)) == len(axes) and all(0 <= a < len(x.shape) for a in axes)
    require(fits, f"reduction of {x} over axes {axes}")
    shape = tuple(s for i, s in enumerate(x.shape) if i not in axes)
    return Type(x.dtype, shape, x.device)


def _infer_extremum(x: Type, *, axes: Ints) -> Type:
    result = _infer_reduce(x, axes=axes)
    require(all(x.shape[a] > 0 for a in axes), f"max/min of {x} over an empty axis")
    return result


def _spread(b, v, x, axes: Ints):
    """Broadcast a reduced value back over the axes that were reduced away."""
    kept = tuple(1 if i in axes else s for i, s in enumerate(x.type.shape))
    return b.expand(b.reshape(v, shape=kept), shape=x.type.shape)


def _vjp_extremum(b, g, y, x, *, axes: Ints):
    """Shared evenly among the elements that attain the extremum, as torch.amax."""
    hit = b.cast(b.eq(x, _spread(b, y, x, axes)), dtype=x.type.dtype)
    count = b.reduce_sum(hit, axes=axes)
    return b.mul(hit, _spread(b, b.div(g, count), x, axes))


def _eval_sum(x: np.ndarray, *, axes: Ints) -> np.ndarray:
    """Sum with a wider accumulator than the operand's, so that the oracle is the better number."""
    wide = np.float64 if x.dtype.kind == "f" else x.dtype
    return np.sum(x, axis=axes, dtype=wide)


def _reduce(name: str, infer, eval, vjp, exact: Exact) -> Op:
    return Op(
        name,
        "reduce",
        infer,
        eval,
        (vjp,),
        cost=1,
        exact=exact,
        rounds=exact is ULPS,
        host=None,
    )


reduce_sum = _reduce(
    "reduce_sum",
    _infer_reduce,
    _eval_sum,
    lambda b, g, y, x, *, axes: _spread(b, g, x, axes),
    ULPS,
)
reduce_max = _reduce(
    "reduce_max", _infer_extremum, lambda x, *, axes: np.max(x, axis=axes), _vjp_extremum, EDGES
)
reduce_min = _reduce(
    "reduce_min", _infer_extremum, lambda x, *, axes: np.min(x, axis=axes), _vjp_extremum, EDGES
)


def _infer_matmul(a: Type, b: Type) -> Type:
    require_tensor("matmul", a)
    require_tensor("matmul", b)
    require(a.dtype is not b1, "matmul is not defined on b1")
    fits = (
        len(a.shape) == len(b.shape) >= 2
        and a.shape[:-2] == b.shape[:-2]
        and a.shape[-1] == b.shape[-2]
        and (a.dtype, a.device) == (b.dtype, b.device)
    )
    require(fits, f"matmul of {a} and {b}")
    return Type(a.dtype, (*a.shape[:-1], b.shape[-1]), a.device)


matmul = Op(
    "matmul",
    "contraction",
    _infer_matmul,
    np.matmul,
    (
        lambda b, g, y, x, z: b.matmul(g, transpose(b, z)),
        lambda b, g, y, x, z: b.matmul(transpose(b, x), g),
    ),
    cost=1,
    exact=ULPS,
    rounds=True,
    host=None,
)


def _infer_full(value: object, *, shape: Ints, dtype: DType, device: str) -> Type:
    known = isinstance(value, (int, float)) or (isinstance(value, Type) and value.is_host)
    require(known, f"full of {value}, which is no literal or host scalar")
    require(all(s >= 0 for s in shape), f"full of shape {shape}")
    return Type(dtype, shape, device)


def _eval_full(value: float, *, shape: Ints, dtype: DType, device: str) -> np.ndarray:
    return np.full(shape, round_to(np.asarray(value), dtype), dtype.compute)


full = Op(
    "full",
    "source",
    _infer_full,
    _eval_full,
    (NO_GRAD,),
    cost=1,
    exact=BITS,
    rounds=True,
    host="{0}",
)


def _infer_iota(*, axis: int, shape: Ints, dtype: DType, device: str) -> Type:
    fits = 0 <= axis < len(shape) and all(s >= 0 for s in shape)
    require(fits, f"iota over axis {axis} of {shape}")
    return Type(dtype, shape, device)


def _eval_iota(*, axis: int, shape: Ints, dtype: DType, device: str) -> np.ndarray:
    row = np.arange(shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return round_to(np.broadcast_to(row, shape), dtype)


iota = Op("iota", "source", _infer_iota, _eval_iota, (), cost=1, exact=BITS, rounds=True, host=None)
