"""Running results along an axis, in linear work: products, extrema, log-sums, recurrences.

`cumsum`, in `indexing.py`, is one more of them.
"""

from __future__ import annotations

import numpy as np

from tracejit.ir.ops.movement import part
from tracejit.ir.ops.record import ULPS, Op, require, require_tensor
from tracejit.ir.types import Type, b1, f32, f64, i64

COMBINED = ("mul", "max", "min", "logaddexp")


def _infer_accumulate(x: Type, *, axis: int, combine: str) -> Type:
    require(combine in COMBINED, f"accumulate that combines by {combine!r}")
    require_tensor("accumulate", x)
    require(0 <= axis < len(x.shape), f"accumulate of {x} along axis {axis}")
    require(x.dtype is not b1, f"accumulate of {x.dtype}")
    rounded = combine in ("mul", "logaddexp")
    require(not (rounded and x.dtype.narrow), f"accumulate of {x.dtype} by {combine}")
    require(combine != "logaddexp" or x.dtype.is_float, f"log-sums of {x.dtype}")
    return x


def _eval_accumulate(x: np.ndarray, *, axis: int, combine: str) -> np.ndarray:
    wide = np.float64 if x.dtype.kind == "f" else x.dtype
    if combine == "mul":
        return np.cumprod(x, axis, dtype=wide)
    if combine == "logaddexp":
        with np.errstate(invalid="ignore"):  # NaN among the elements
            return np.logaddexp.accumulate(x.astype(wide), axis)
    fold = np.maximum if combine == "max" else np.minimum
    shape = [-1 if k == axis else 1 for k in range(x.ndim)]
    places = np.arange(x.shape[axis]).reshape(shape)
    own = (fold.accumulate(x, axis) == x) | (x != x)  # the last of equal ones, and of NaN
    return np.take_along_axis(x, np.maximum.accumulate(np.where(own, places, 0), axis), axis)


def before(b, x, axis: int, fill: float | int):
    """What stands before each element along an axis, `fill` at its start."""
    rank, n = len(x.type.shape), x.type.shape[axis]
    low = tuple(int(k == axis) for k in range(rank))
    kept = part(b, x, axis, 0, max(n - 1, 0))
    if not n:
        return x
    return b.pad(kept, low=low, high=(0,) * rank, interior=(0,) * rank, value=fill)


def backwards(b, factor, term, axis: int):
    """s where s_i = term_i + factor_i+1 · s_i+1, from the end of an axis."""
    factor, term = (b.flip(v, axes=(axis,)) for v in (factor, term))
    return b.flip(b.recurrence(before(b, factor, axis, 1.0), term, axis=axis), axes=(axis,))


def _vjp_accumulate(b, g, y, x, *, axis: int, combine: str):
    if combine in ("max", "min"):
        return _of_places(b, g, y, x, axis)
    if combine == "logaddexp":
        return _of_log_sums(b, g, y, x, axis)
    # what stands before an element, times the sum of g and the products behind the element; wide,
    # since one may underflow where the other overflows
    kind = x.type
    if kind.dtype is f32 and kind.device == "cpu":
        x, g = (b.cast(v, dtype=f64) for v in (x, g))
        y = b.accumulate(x, axis=axis, combine="mul")
        return b.cast(_of_products(b, g, y, x, axis), dtype=f32)
    return _of_products(b, g, y, x, axis)


def _of_products(b, g, y, x, axis: int):
    first, sums = before(b, y, axis, 1.0), backwards(b, x, g, axis)
    # a product that is 0 by underflow, of a sum that overflows, is no NaN: eager has 0 here
    large = b.or_(b.eq(b.abs(sums), float("inf")), b.ne(sums, sums))
    none = b.and_(b.eq(first, 0.0), large)
    return b.where(none, 0.0, b.mul(b.where(none, 1.0, first), b.where(none, 0.0, sums)))


def _of_log_sums(b, g, y, x, axis: int):
    """The sum over i >= j of g_i·exp(x_j - y_i): with s_j = g_j + exp(y_j - y_j+1)·s_j+1 it is
    s_j·exp(x_j - y_j), where no exponential is of a positive number."""
    earlier = before(b, y, axis, 0.0)
    shape, device = y.type.shape, y.type.device
    first = b.lt(b.iota(axis=axis, shape=shape, dtype=i64, device=device), 1)
    alike = b.or_(b.eq(b.abs(earlier), float("inf")), first)
    factor = b.where(alike, 1.0, b.exp(b.where(alike, 0.0, b.sub(earlier, y))))
    return b.mul(backwards(b, factor, g, axis), b.exp(b.sub(x, y)))


def places(b, y, x, axis: int):
    """Where each running extremum y of x stands: the last of equal ones, and of NaN."""
    own = b.eq(x, y)
    if x.type.dtype.is_float:
        own = b.or_(own, b.ne(x, x))
    at = b.iota(axis=axis, shape=x.type.shape, dtype=i64, device=x.type.device)
    return b.accumulate(b.where(own, at, 0), axis=axis, combine="max")


def _of_places(b, g, y, x, axis: int):
    kind = x.type
    zeros = b.full(0, shape=kind.shape, dtype=kind.dtype, device=kind.device)
    return b.scatter(zeros, places(b, y, x, axis), g, axis=axis, combine="add")


def _infer_recurrence(factor: Type, term: Type, *, axis: int) -> Type:
    require_tensor("recurrence", factor)
    require(0 <= axis < len(factor.shape), f"recurrence of {factor} along axis {axis}")
    require(factor == term, f"recurrence of {factor} and {term}")
    kind = factor.dtype
    require(kind.is_float and not kind.narrow, f"recurrence of {kind}")
    return term


def _eval_recurrence(factor: np.ndarray, term: np.ndarray, *, axis: int) -> np.ndarray:
    factor, out = np.moveaxis(factor, axis, 0), np.array(np.moveaxis(term, axis, 0), np.float64)
    for k in range(1, len(out)):
        out[k] += factor[k] * out[k - 1]
    return np.moveaxis(out, 0, axis)


def _vjp_factor(b, g, y, factor, term, *, axis: int):
    return b.mul(backwards(b, factor, g, axis), before(b, y, axis, 0.0))


def _vjp_term(b, g, y, factor, term, *, axis: int):
    return backwards(b, factor, g, axis)


# Each element is those up to it along an axis, combined in their order: their product, their
# log-sum-exp, or the extremum, which is the last one of equal ones (-0.0 equals 0.0) and NaN from
# the first NaN on.
accumulate = Op(
    "accumulate",
    "indexing",
    _infer_accumulate,
    _eval_accumulate,
    (_vjp_accumulate,),
    cost=1,
    exact=ULPS,
    rounds=True,
    host=None,
)
# Each element is its term and its factor times the element before it; the first is its term.
recurrence = Op(
    "recurrence",
    "indexing",
    _infer_recurrence,
    _eval_recurrence,
    (_vjp_factor, _vjp_term),
    cost=2,
    exact=ULPS,
    rounds=True,
    host=None,
)
