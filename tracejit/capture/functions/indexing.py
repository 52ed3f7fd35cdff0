"""Reading where integers say: gather, embedding, index_select, take.

An index that is out of range reads NaN (0 in integer tensors) and passes no gradient; eager raises
IndexError on a CPU. Gradients, and assignments through indices, go from one index to the next: the
same bits every time, at a cost of elements plus indices.
"""

from __future__ import annotations

import torch

from tracejit.capture.functions.common import (
    cast,
    expand,
    normal_axis,
    register,
)
from tracejit.capture.functions.composites import in_torch
from tracejit.capture.functions.movement import reshape
from tracejit.capture.functions.patterns import along, from_end
from tracejit.capture.trace import location
from tracejit.capture.trace.bounds import within
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import (
    Ints,
    TracedTensor,
    broadcast_shape,
)
from tracejit.capture.trace.trace import Trace
from tracejit.errors import AxisError
from tracejit.ir.graph import Builder, Value
from tracejit.ir.ops.indexing import gather as gather_op
from tracejit.ir.types import i32, i64

Tensor = torch.Tensor


def _index(t: Trace, x: Tensor, name: str) -> Value:
    """An index tensor as i64."""
    h = t.lift(x)
    if h.dtype not in (i64, i32):
        raise t.shape_error(f"{name}(): Expected dtype int32/int64 for index")
    return cast(t, t.read(h), i64)


# ---- reading


def gather(
    t: Trace, input: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False
) -> TracedTensor:
    h, i = t.lift(input), t.lift(index)
    axis = normal_axis(t, dim, len(h.shape))
    at = _index(t, index, "gather")
    if sparse_grad:
        raise t.unsupported("Sparse gradients are not supported")
    if len(h.shape or (1,)) != len(i.shape or (1,)):
        raise t.shape_error("Index tensor must have the same number of dimensions as input tensor")
    x = t.read(h)
    x = x if h.shape else t.b.reshape(x, shape=(1,))
    at = at if i.shape else t.b.reshape(at, shape=(1,))
    if at.type.numel and any(
        n > m for k, (n, m) in enumerate(zip(at.type.shape, x.type.shape, strict=True)) if k != axis
    ):
        raise t.shape_error(
            f"Size does not match: expected index {list(i.shape)} to be no larger than self "
            f"{list(h.shape)} apart from dimension {axis}"
        )
    whole, n = x, x.type.shape[axis]
    reason = f"index {{value}} is out of bounds for dimension {axis} with size {n}"
    within(t, index, 0, n, t.shape_error(reason))
    if not at.type.numel:
        none = (0,) * len(x.type.shape)
        nothing = t.b.slice(x, starts=none, stops=none, steps=(1,) * len(none))
        return t.fresh(t.b.reshape(nothing, shape=i.shape))
    stops = tuple(
        m if k == axis else n
        for k, (n, m) in enumerate(zip(at.type.shape, x.type.shape, strict=True))
    )
    if stops != x.type.shape:
        x = t.b.slice(x, starts=(0,) * len(stops), stops=stops, steps=(1,) * len(stops))
    out = t.saves(t.b.gather(x, at, axis=axis), whole)
    return t.fresh(out if i.shape else t.b.reshape(out, shape=()))


def take_along_dim(
    t: Trace, input: Tensor, indices: Tensor, dim: int | None = None
) -> TracedTensor:
    """gather, with the other axes of both broadcast, and indices taken modulo the size."""
    if dim is None:
        return gather(t, reshape(t, input, -1), 0, reshape(t, indices, -1))
    h, i = t.lift(input), t.lift(indices)
    if len(h.shape) != len(i.shape):
        raise t.shape_error(
            "take_along_dim(): input and indices need the same number of dimensions"
        )
    if i.dtype is not i64:
        raise t.shape_error("take_along_dim(): dtype of indices should be Long")
    axis = normal_axis(t, dim, len(h.shape))
    if not h.shape[axis] and i.numel:
        raise t.shape_error("ZeroDivisionError")
    rest = broadcast_shape([_without(h.shape, axis), _without(i.shape, axis)])
    if rest is None:
        raise t.shape_error("take_along_dim(): input and indices do not broadcast")
    x = expand(t, t.read(h), (*rest[:axis], h.shape[axis], *rest[axis:]))
    at = t.b.mod(t.read(i), h.shape[axis])  # so torch does not save what was given
    at = expand(t, at, (*rest[:axis], i.shape[axis], *rest[axis:]))
    return t.fresh(t.saves(t.b.gather(x, at, axis=axis), x))


def _without(shape: Ints, axis: int) -> Ints:
    return shape[:axis] + shape[axis + 1 :]


def index_select(t: Trace, input: Tensor, dim: int, index: Tensor) -> TracedTensor:
    h, i = t.lift(input), t.lift(index)
    axis = normal_axis(t, dim, len(h.shape))
    if len(i.shape) > 1:
        raise AxisError(
            where=location.full(), reason="index_select(): Index is supposed to be a vector"
        )
    at, n = _index(t, index, "index_select"), i.numel
    length = h.shape[axis] if h.shape else 1
    reason = f"INDICES element is out of DATA bounds, id={{value}} axis_dim={length}"
    within(t, index, 0, length, t.shape_error(reason))
    x = t.read(h)
    if not h.shape:
        if n != 1:
            raise t.shape_error("index_select(): Index to scalar can have only 1 value")
        out = t.b.gather(t.b.reshape(x, shape=(1,)), t.b.reshape(at, shape=(1,)), axis=0)
        return t.fresh(t.b.reshape(out, shape=()))
    shape = (*h.shape[:axis], n, *h.shape[axis + 1 :])
    return t.fresh(t.b.gather(x, along(t, at, shape, axis), axis=axis))


def take(t: Trace, input: Tensor, index: Tensor) -> TracedTensor:
    """Elements of the flattened tensor; negative indices count from its end."""
    h, i = t.lift(input), t.lift(index)
    if i.dtype is not i64:
        raise t.shape_error("take(): Expected a long tensor for index")
    reason = f"out of range: tried to access index {{value}} on a tensor of {h.numel} elements."
    within(t, index, -h.numel, h.numel, AxisError(where=location.full(), reason=reason))
    flat = t.b.reshape(t.read(h), shape=(h.numel,))
    at = t.b.reshape(from_end(t, t.read(i), h.numel), shape=(i.numel,))
    return t.fresh(t.b.reshape(t.b.gather(flat, at, axis=0), shape=i.shape))


def embedding(
    t: Trace,
    weight: Tensor,
    indices: Tensor,
    padding_idx: int | None = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> TracedTensor:
    """Rows of a table. Rows of `padding_idx` get no gradient; `scale_grad_by_freq`: the others
    the mean of those of their readers."""
    if sparse:
        raise t.unsupported("Sparse gradients have no rule; use sparse=False")
    w, i = t.lift(weight), t.lift(indices)
    if len(w.shape) != 2:
        raise t.shape_error("'weight' must be 2-D")
    outside = AxisError(where=location.full(), reason="index out of range in self")
    within(t, indices, 0, w.shape[0], outside)
    table, shape = t.read(w), (i.numel, w.shape[1])
    which = t.b.reshape(_index(t, indices, "embedding"), shape=(i.numel,))
    at = along(t, which, shape, 0)
    padding = -1 if padding_idx is None else padding_idx
    with t.untaped():
        out = t.b.gather(table, at, axis=0)

    def vjp(b: Builder, cts: tuple, need: tuple) -> tuple:
        (g,) = cts
        if padding >= 0:
            g = b.where(b.eq(at, padding), 0.0, g)
        if scale_grad_by_freq:
            kind = g.type
            none = b.full(0, shape=w.shape[:1], dtype=i64, device=kind.device)
            each = b.full(1, shape=(i.numel,), dtype=i64, device=kind.device)
            times = b.gather(b.scatter(none, which, each, axis=0, combine="add"), which, axis=0)
            times = b.reshape(b.cast(times, dtype=kind.dtype), shape=(i.numel, 1))
            g = b.div(g, b.expand(times, shape=shape))
        return (gather_op.vjp[0](b, g, out, table, at, axis=0),)

    out = t.derive("embedding", (table,), out, vjp)
    return t.fresh(t.b.reshape(out, shape=(*i.shape, w.shape[1])))


def _renormalize(
    t: Trace, weight: Tensor, indices: Tensor, max_norm: float, norm_type: float
) -> None:
    """Scale the rows of a table that are read, and are longer, to a length."""
    rows = t.lift(weight).shape[0]
    outside = AxisError(where=location.full(), reason="index out of range in self")
    within(t, indices, 0, rows, outside)
    with torch.no_grad():
        norms = torch.linalg.vector_norm(weight.detach(), norm_type, dim=1).double()
        places = indices.flatten().long()  # index_fill takes no int32, as an embedding does
        read = torch.zeros_like(norms, dtype=torch.bool).index_fill(0, places, True)
        factors = max_norm / (norms + 1e-7)
        factors = torch.where(read & (norms > max_norm), factors, torch.ones_like(factors))
        weight.mul_(factors.to(weight.dtype).unsqueeze(1))


renormalize = in_torch(_renormalize, kernel=True)


@rule(torch.nn.functional.embedding)
def functional_embedding(
    t: Trace,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> TracedTensor:
    if max_norm is not None:
        renormalize(t, weight, input, max_norm, norm_type)
    rows = (t.lift(weight).shape or (0,))[0]
    if padding_idx is not None:
        if not -rows <= padding_idx < rows:
            raise t.shape_error("Padding_idx must be within num_embeddings")
        padding_idx %= rows
    return embedding(t, weight, input, padding_idx, scale_grad_by_freq, sparse)


for _names, _implementation in (
    (("gather",), gather),
    (("take_along_dim",), take_along_dim),
    (("index_select",), index_select),
    (("take",), take),
):
    register(_names, _implementation, inplace=False)
rule(torch.embedding)(embedding)
