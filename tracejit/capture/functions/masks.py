"""Elements that a condition selects: x[mask], nonzero, masked_select, argwhere.

Which they are is found on the host in the middle of the step (`trace/cuts.py`); how many is part of
the step, so another number leads to another plan.
"""

from __future__ import annotations

import math

import torch

from tracejit.autodiff import zeros
from tracejit.capture.functions.common import common_shape, expand, operand, truth
from tracejit.capture.trace import location
from tracejit.capture.trace.cuts import Selected, selected_by
from tracejit.capture.trace.overlaps import check_put
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import Handle, Ints, TracedTensor, broadcast_shape
from tracejit.capture.trace.trace import Trace
from tracejit.errors import AxisError
from tracejit.ir.graph import Value
from tracejit.ir.types import b1, contiguous_strides, i64

Tensor = torch.Tensor


def _selected(t: Trace, handle: Handle) -> Selected:
    with t.untaped():
        return selected_by(t, truth(t, t.read(handle)))


def check_mask(t: Trace, x: Handle, first: int, mask: Handle) -> None:
    """A mask covers axes of x from the first one given on."""
    for k, n in enumerate(mask.shape):
        if first + k >= len(x.shape):
            raise AxisError(
                where=location.full(),
                reason=f"too many indices for tensor of dimension {len(x.shape)}",
            )
        if x.shape[first + k] != n:
            raise AxisError(
                where=location.full(),
                reason=f"The shape of the mask {list(mask.shape)} at index {k} does not match the "
                f"shape of the indexed tensor {list(x.shape)} at index {first + k}",
            )


def columns(t: Trace, condition: Handle) -> list[Value]:
    """Where a tensor is not zero: a vector of indices i64[n] for each of its axes."""
    positions = _selected(t, condition).positions
    with t.untaped():
        found = []
        for size, step in zip(condition.shape, contiguous_strides(condition.shape), strict=True):
            at = t.b.floordiv(positions, step) if step > 1 else positions
            found.append(t.b.mod(at, size) if found else at)
        return found


# ---- the rows of x that a mask of its leading axes selects


def rows(t: Trace, x: Value, selected: Selected) -> Value:
    """The selected rows of a matrix; each gives its gradient back to its place."""
    width = x.type.shape[1]
    n = selected.positions.type.shape[0]
    ranks = selected.ranks
    if not n or not width:
        nothing = t.b.full(0, shape=(n, width), dtype=x.type.dtype, device=x.type.device)
        return t.unread(nothing, x) if x.type.dtype.is_float else nothing
    with t.untaped():
        out = t.b.gather(x, _spread(t, selected.positions, (n, width)), axis=0)

    def vjp(b, cts, need):
        return (_placed(t, cts[0], ranks, 0.0),)

    return t.derive("index", (x,), out, vjp)


def _spread(t: Trace, index: Value, shape: Ints) -> Value:
    return expand(t, t.b.reshape(index, shape=(index.type.shape[0], 1)), shape)


def _placed(t: Trace, rows: Value, ranks: Value, otherwise: object) -> Value:
    """A matrix with each row that has a rank from `rows`, and `otherwise` elsewhere."""
    shape = (ranks.type.shape[0], rows.type.shape[1])
    at = _spread(t, ranks, shape)
    return t.b.where(t.b.ge(at, 0), t.b.gather(rows, at, axis=0), otherwise)


def replaced(t: Trace, x: Value, rows: Value, selected: Selected) -> Value:
    """x, a matrix, with its selected rows replaced by `rows`."""
    n, width = rows.type.shape
    none = not n or not width
    with t.untaped():
        out = t.b.alias(x) if none else _placed(t, rows, selected.ranks, x)

    def vjp(b, cts, need):
        (g,) = cts
        if none:
            return g if need[0] else None, zeros(b, rows) if need[1] else None
        kept = b.ge(_spread(t, selected.ranks, x.type.shape), 0)
        taken = b.gather(g, _spread(t, selected.positions, (n, width)), axis=0)
        return b.where(kept, 0.0, g) if need[0] else None, taken if need[1] else None

    return t.derive("index_put_", (x, rows), out, vjp)


def matrix(t: Trace, x: Value, axes: int) -> Value:
    """A value with its first axes as rows, and the rest as columns."""
    shape = x.type.shape
    return t.b.reshape(x, shape=(math.prod(shape[:axes]), math.prod(shape[axes:])))


def masked(t: Trace, input: Tensor, mask: Tensor) -> TracedTensor:
    """x[mask]: the mask covers the leading axes of x."""
    x, m = t.lift(input), t.lift(mask)
    check_mask(t, x, 0, m)
    selected = _selected(t, m)
    found = rows(t, matrix(t, t.read(x), len(m.shape)), selected)
    shape = (found.type.shape[0], *x.shape[len(m.shape) :])
    return t.fresh(t.b.reshape(found, shape=shape))


def assign_masked(t: Trace, input: Tensor, mask: Tensor, value: Tensor) -> None:
    """x[mask] = value, which has an element for each that is selected, or broadcasts to them."""
    x, m, v = t.lift(input), t.lift(mask), t.lift(value)
    check_mask(t, x, 0, m)
    if v.dtype is not x.dtype:
        raise t.shape_error(
            f"Index put requires the source and destination dtypes match, got {x.dtype} for the "
            f"destination and {v.dtype} for the source."
        )
    check_put(t, x, mask, value)
    selected = _selected(t, m)
    n = selected.positions.type.shape[0]
    target = (n, *x.shape[len(m.shape) :])
    new = t.read(v)
    shape = new.type.shape
    while len(shape) > len(target) and shape[0] == 1:
        shape = shape[1:]
    if broadcast_shape([shape, target]) != target:
        raise t.shape_error(
            f"shape mismatch: value tensor of shape {list(v.shape)} cannot be broadcast to "
            f"indexing result of shape {list(target)}"
        )
    new = new if shape == new.type.shape else t.b.reshape(new, shape=shape)
    given = matrix(t, expand(t, new, target), 1)
    old = matrix(t, t.read(x), len(m.shape))
    t.write(x, t.b.reshape(replaced(t, old, given, selected), shape=x.shape))


# ---- torch functions


@rule(Tensor.masked_select, torch.masked_select)
def masked_select(t: Trace, input: Tensor, mask: Tensor) -> TracedTensor:
    x, m = operand(t, input), operand(t, mask)
    if m.handle.dtype is not b1:
        raise t.shape_error("masked_select: expected BoolTensor for mask")
    shape = common_shape(t, (x, m))
    wide = expand(t, t.read(x.handle), shape)
    with t.untaped():
        selected = selected_by(t, expand(t, t.read(m.handle), shape))
    found = rows(t, matrix(t, wide, len(shape)), selected)
    return t.fresh(t.b.reshape(found, shape=found.type.shape[:1]))


@rule(Tensor.nonzero, torch.nonzero)
def nonzero(t: Trace, input: Tensor, *, as_tuple: bool = False) -> object:
    h = t.lift(input)
    if as_tuple:
        found = columns(t, h) if h.shape else [_selected(t, h).positions]
        return tuple(t.fresh(t.b.alias(x)) for x in found)
    n = _selected(t, h).positions.type.shape[0]
    with t.untaped():
        rows = t.b.full(0, shape=(n, len(h.shape)), dtype=i64, device=h.device)
        for k, x in enumerate(columns(t, h) if n else ()):
            axis = t.b.iota(axis=1, shape=rows.type.shape, dtype=i64, device=h.device)
            rows = t.b.where(t.b.eq(axis, k), _spread(t, x, rows.type.shape), rows)
    return t.fresh(rows, (1, n) if h.shape else None)


@rule(torch.argwhere, Tensor.argwhere)
def argwhere(t: Trace, input: Tensor) -> TracedTensor:
    return nonzero(t, input)
