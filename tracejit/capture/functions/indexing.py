"""Reading and writing where integers say: gather, embedding, x[i, j], argmax, max(dim), …

An index that is out of range reads NaN (0 in integer tensors) and passes no gradient; eager raises
IndexError on a CPU. Gradients, and assignments through indices, go from one index to the next: the
same bits every time, at a cost of elements plus indices.
"""

from __future__ import annotations

import math
from types import EllipsisType

import torch

from tracejit.capture.functions import movement
from tracejit.capture.functions.common import (
    cast,
    expand,
    literal,
    normal_axis,
    operand,
    register,
)
from tracejit.capture.functions.masks import assign_masked, check_mask, columns, masked
from tracejit.capture.functions.movement import basic_index, check_item, reshape
from tracejit.capture.functions.patterns import constant, scattered
from tracejit.capture.functions.places import at_place, is_place
from tracejit.capture.functions.writes import copy_
from tracejit.capture.trace import location
from tracejit.capture.trace.bounds import within
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import (
    Handle,
    Ints,
    TracedTensor,
    broadcast_shape,
    elementwise_strides,
)
from tracejit.capture.trace.trace import Trace
from tracejit.errors import AxisError
from tracejit.ir.graph import Builder, Value
from tracejit.ir.ops.indexing import gather as gather_op
from tracejit.ir.types import b1, contiguous_strides, i32, i64, u8

Tensor = torch.Tensor


def _index(t: Trace, x: Tensor, name: str) -> Value:
    """An index tensor as i64."""
    h = t.lift(x)
    if h.dtype not in (i64, i32):
        raise t.shape_error(f"{name}(): Expected dtype int32/int64 for index")
    return cast(t, t.read(h), i64)


def _along(t: Trace, index: Value, shape: Ints, axis: int) -> Value:
    """A vector of indices as an index at every point of `shape`, along an axis."""
    thin = tuple(n if k == axis else 1 for k, n in enumerate(shape))
    return expand(t, t.b.reshape(index, shape=thin), shape)


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
        nothing = t.b.full(0, shape=i.shape, dtype=h.dtype, device=h.device)
        return t.fresh(t.unread(nothing, x) if h.dtype.is_float else nothing)
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
    return t.fresh(t.b.gather(x, _along(t, at, shape, axis), axis=axis))


def take(t: Trace, input: Tensor, index: Tensor) -> TracedTensor:
    """Elements of the flattened tensor; negative indices count from its end."""
    h, i = t.lift(input), t.lift(index)
    if i.dtype is not i64:
        raise t.shape_error("take(): Expected a long tensor for index")
    reason = f"out of range: tried to access index {{value}} on a tensor of {h.numel} elements."
    within(t, index, -h.numel, h.numel, AxisError(where=location.full(), reason=reason))
    flat = t.b.reshape(t.read(h), shape=(h.numel,))
    at = t.b.reshape(_wrapped(t, t.read(i), h.numel), shape=(i.numel,))
    return t.fresh(t.b.reshape(t.b.gather(flat, at, axis=0), shape=i.shape))


def embedding(
    t: Trace,
    weight: Tensor,
    indices: Tensor,
    padding_idx: int | None = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> TracedTensor:
    """Rows of a table. Rows of `padding_idx` get no gradient."""
    if scale_grad_by_freq or sparse:
        raise t.unsupported("Use scale_grad_by_freq=False and sparse=False")
    w, i = t.lift(weight), t.lift(indices)
    if len(w.shape) != 2:
        raise t.shape_error("'weight' must be 2-D")
    outside = AxisError(where=location.full(), reason="index out of range in self")
    within(t, indices, 0, w.shape[0], outside)
    table, shape = t.read(w), (i.numel, w.shape[1])
    at = t.b.reshape(_index(t, indices, "embedding"), shape=(i.numel,))
    at = _along(t, at, shape, 0)
    padding = -1 if padding_idx is None else padding_idx
    with t.untaped():
        out = t.b.gather(table, at, axis=0)

    def vjp(b: Builder, cts: tuple, need: tuple) -> tuple:
        (g,) = cts
        if padding >= 0:
            g = b.where(b.eq(at, padding), 0.0, g)
        return (gather_op.vjp[0](b, g, out, table, at, axis=0),)

    out = t.derive("embedding", (table,), out, vjp)
    return t.fresh(t.b.reshape(out, shape=(*i.shape, w.shape[1])))


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
        raise t.unsupported("max_norm changes the table while reading it; renormalize it outside")
    rows = (t.lift(weight).shape or (0,))[0]
    if padding_idx is not None:
        if not -rows <= padding_idx < rows:
            raise t.shape_error("Padding_idx must be within num_embeddings")
        padding_idx %= rows
    return embedding(t, weight, input, padding_idx, scale_grad_by_freq, sparse)


# ---- x[i, j]


def _wrapped(t: Trace, index: Value, size: int) -> Value:
    """An index whose negative values count from the end."""
    return t.b.where(t.b.lt(index, 0), t.b.add(index, size), index)


class _Chosen:
    """Index tensors on some axes of a handle: the handle with those axes first, and one index."""

    def __init__(self, t: Trace, input: Tensor, index: object):
        basic, tensors = _parted(t, t.lift(input), index)
        self.target = basic_index(t, t.lift(input), basic)
        self.axes = tuple(tensors)
        self.has_scalar = any(not t.lift(x).shape for x in tensors.values())
        shape = self.target.shape
        for n, (k, x) in enumerate(tensors.items()):  # eager counts the axes with an index
            reason = f"index {{value}} is out of bounds for dimension {n} with size {shape[k]}"
            error = AxisError(where=location.full(), reason=reason)
            within(t, x, -shape[k], shape[k], error)
        read = [cast(t, t.read(t.lift(x)), i64) for x in tensors.values()]
        self.batch = broadcast_shape([v.type.shape for v in read])
        if self.batch is None:
            raise AxisError(
                where=location.full(),
                reason="shape mismatch: indexing tensors could not be broadcast together with "
                f"shapes {[list(v.type.shape) for v in read]}",
            )
        self.rest = tuple(k for k in range(len(shape)) if k not in tensors)
        self.order = (*self.axes, *self.rest)
        self.rows = math.prod(shape[a] for a in self.axes)
        self.columns = math.prod(shape[k] for k in self.rest)
        self.count = math.prod(self.batch)
        first, last = self.axes[0], self.axes[-1]
        adjacent = last - first + 1 == len(self.axes)
        self.before = sum(k < first for k in self.rest) if adjacent else 0
        self.indices = [expand(t, v, self.batch) for v in read]
        self.linear = t.b.reshape(self._linear(t, shape), shape=(self.count,))

    def _linear(self, t: Trace, shape: Ints) -> Value:
        """The row, and -1 where one of several indices is out of range."""
        wrapped = [_wrapped(t, v, shape[a]) for v, a in zip(self.indices, self.axes, strict=True)]
        if len(wrapped) == 1:
            return wrapped[0]
        total, inside = None, None
        for v, a in zip(wrapped, self.axes, strict=True):
            good = t.b.and_(t.b.ge(v, 0), t.b.lt(v, shape[a]))
            inside = good if inside is None else t.b.and_(inside, good)
            total = v if total is None else t.b.add(t.b.mul(total, shape[a]), v)
        return t.b.where(inside, total, -1)

    @property
    def shape(self) -> Ints:
        """The shape of what is chosen."""
        rest = tuple(self.target.shape[k] for k in self.rest)
        return (*rest[: self.before], *self.batch, *rest[self.before :])

    def matrix(self, t: Trace, x: Value) -> Value:
        """A value of the target's shape as (rows, columns)."""
        return t.b.reshape(t.b.permute(x, axes=self.order), shape=(self.rows, self.columns))

    def placed(self, t: Trace, x: Value) -> Value:
        """(count, columns) in the shape of what is chosen."""
        rest = tuple(self.target.shape[k] for k in self.rest)
        value = t.b.reshape(x, shape=(*self.batch, *rest))
        n = len(self.batch)
        axes = (*range(n, n + self.before), *range(n), *range(n + self.before, n + len(rest)))
        return t.b.permute(value, axes=axes)

    def listed(self, t: Trace, x: Value) -> Value:
        """The inverse of `placed`."""
        n, rank = len(self.batch), len(x.type.shape)
        axes = (
            *range(self.before, self.before + n),
            *range(self.before),
            *range(self.before + n, rank),
        )
        return t.b.reshape(t.b.permute(x, axes=axes), shape=(self.count, self.columns))

    def strides(self) -> Ints:
        """torch's layout of the result: an iterator over the tensor, broadcast, and the indices."""
        target, rest = self.target, self.rest
        zeros = (0,) * len(self.batch)
        kept = tuple(target.strides[k] for k in rest)
        source = (*kept[: self.before], *zeros, *kept[self.before :])
        none = (0,) * len(rest)
        places = (*none[: self.before], *contiguous_strides(self.batch), *none[self.before :])
        return elementwise_strides(self.shape, [(self.shape, source), (self.shape, places)])


def _parted(t: Trace, h: Handle, index: object) -> tuple[tuple, dict[int, Tensor]]:
    """The basic part of an index, tensors as full slices, and the tensors by resulting axis."""
    items = index if isinstance(index, tuple) else (index,)
    basic: list[object] = []
    tensors: dict[int, Tensor] = {}
    axis = 0
    taken = sum(1 for i in items if i is not None and not isinstance(i, EllipsisType))
    for item in items:
        if isinstance(item, (Tensor, list)):
            tensors[axis] = _index_tensor(t, item, h.device)
            item = slice(None)
        basic.append(item)
        if isinstance(item, EllipsisType):
            axis += len(h.shape) - taken
        elif item is None or isinstance(item, slice):
            axis += 1
        else:
            check_item(t, item)
    return tuple(basic), tensors


def _index_tensor(t: Trace, item: object, device: str) -> Tensor:
    if isinstance(item, list):
        if not all(type(k) is int for k in item):
            raise t.unsupported("Only lists of ints are indices")
        return t.fresh(constant(t, item, (len(item),), i64, device))
    dtype = t.lift(item).dtype
    if dtype not in (i64, i32, b1, u8):
        raise AxisError(
            where=location.full(),
            reason="tensors used as indices must be long, int, byte or bool tensors",
        )
    return item


def _unmasked(t: Trace, h: Handle, index: object) -> object:
    """An index with the places where a mask is true instead of each mask."""
    items = index if isinstance(index, tuple) else (index,)
    are_masks = [isinstance(x, Tensor) and t.lift(x).dtype in (b1, u8) for x in items]
    if not any(are_masks):
        return index
    found: list[object] = []
    taken = sum(
        len(t.lift(x).shape) if is_mask else x is not None and not isinstance(x, EllipsisType)
        for x, is_mask in zip(items, are_masks, strict=True)
    )
    axis = 0
    for item, is_mask in zip(items, are_masks, strict=True):
        if is_mask:
            mask = t.lift(item)
            check_mask(t, h, axis, mask)
            found += [t.fresh(t.b.alias(x)) for x in columns(t, mask)]
            axis += len(mask.shape)
            continue
        found.append(item)
        if isinstance(item, EllipsisType):
            axis += len(h.shape) - taken
        elif item is not None:
            axis += 1
    return tuple(found)


def _sole_mask(t: Trace, index: object) -> Tensor | None:
    """The mask, when the index is one tensor of bools (or bytes)."""
    if isinstance(index, tuple) and len(index) == 1:
        index = index[0]
    return index if isinstance(index, Tensor) and t.lift(index).dtype in (b1, u8) else None


def is_advanced(index: object) -> bool:
    """Whether tensors or lists take part in an index."""
    items = index if isinstance(index, tuple) else (index,)
    return any(isinstance(item, (Tensor, list)) for item in items)


def chosen(t: Trace, input: Tensor, index: object) -> TracedTensor:
    """x[i, :, j, …]: gathered rows of the tensor with the indexed axes first."""
    c = _Chosen(t, input, index)
    if c.has_scalar:
        raise t.unsupported(
            "x[i] with a 0-d tensor is a view whose place depends on a value; use "
            "torch.index_select, or i.reshape(1)"
        )
    matrix = c.matrix(t, t.read(c.target))
    at = _along(t, c.linear, (c.count, c.columns), 0)
    return t.fresh(c.placed(t, t.b.gather(matrix, at, axis=0)), c.strides())


def assign(t: Trace, input: Tensor, index: object, value: object) -> None:
    """x[i, :, j, …] = value: every row looks for the last index that names it."""
    c = _Chosen(t, input, index)
    if c.has_scalar and len(c.axes) > 1:
        raise t.unsupported("Give index tensors next to others one axis at least")
    dtype, device = c.target.dtype, c.target.device
    given = operand(t, value)
    if given.handle is None:
        new = t.b.full(literal(given.number, dtype), shape=(), dtype=dtype, device=device)
    else:
        new = t.read(given.handle)
    if new.type.dtype is not dtype:
        raise t.shape_error(
            "Index put requires the source and destination dtypes match, got "
            f"{dtype} for the destination and {new.type.dtype} for the source."
        )
    shape = new.type.shape
    while len(shape) > len(c.shape) and shape[0] == 1:
        shape = shape[1:]
    if broadcast_shape([shape, c.shape]) != c.shape:
        raise t.shape_error(
            f"shape mismatch: value tensor of shape {list(new.type.shape)} cannot be broadcast to "
            f"indexing result of shape {list(c.shape)}"
        )
    if not c.count or not c.rows or not c.columns:
        t.write(c.target, t.b.alias(t.read(c.target)))
        return
    new = new if shape == new.type.shape else t.b.reshape(new, shape=shape)
    new = expand(t, new, c.shape)
    if len(c.axes) == 1:  # as it lies, so that it is written where it is
        (axis,) = c.axes
        shape = tuple(c.count if k == axis else n for k, n in enumerate(c.target.shape))
        merged = _overwritten(t, c, t.read(c.target), t.b.reshape(new, shape=shape), axis)
    else:
        merged = _overwritten(t, c, c.matrix(t, t.read(c.target)), c.listed(t, new), 0)
        merged = t.b.reshape(merged, shape=tuple(c.target.shape[k] for k in c.order))
        back = tuple(c.order.index(k) for k in range(len(c.order)))
        merged = t.b.permute(merged, axes=back)
    copy_(t, c.target.tensor, t.fresh(merged))


def _overwritten(t: Trace, c: _Chosen, old: Value, rows: Value, axis: int) -> Value:
    """`old` with `rows` where the indices say along an axis; as in eager, all that was given gets
    the gradient of its place, even if another one overwrote it."""
    with t.untaped():
        at = _along(t, c.linear, rows.type.shape, axis)
        merged = scattered(t.b, old, at, rows, axis, "last")

    def vjp(b: Builder, cts: tuple, need: tuple) -> tuple:
        (g,) = cts
        kind = rows.type
        zeros = b.full(0, shape=kind.shape, dtype=kind.dtype, device=kind.device)
        return (
            scattered(b, g, at, zeros, axis, "last") if need[0] else None,
            b.gather(g, at, axis=axis) if need[1] else None,
        )

    return t.derive("index_put_", (old, rows), merged, vjp)


@rule(Tensor.__getitem__)
def getitem(t: Trace, input: Tensor, index: object) -> Tensor:
    if not is_advanced(index):
        return movement.getitem(t, input, index)
    mask = _sole_mask(t, index)
    if mask is not None and t.lift(mask).shape:
        return masked(t, input, mask)
    if is_place(t, index):
        return at_place(t, input, index)
    return chosen(t, input, _unmasked(t, t.lift(input), index))


@rule(Tensor.__setitem__)
def setitem(t: Trace, input: Tensor, index: object, value: object) -> None:
    if not is_advanced(index):
        return movement.setitem(t, input, index, value)
    mask = _sole_mask(t, index)
    if mask is None:
        return assign(t, input, _unmasked(t, t.lift(input), index), value)
    many = isinstance(value, Tensor) and t.lift(value).numel != 1
    if many:
        return assign_masked(t, input, mask, value)
    return movement.setitem(t, input, index, value)


for _names, _implementation in (
    (("gather",), gather),
    (("take_along_dim",), take_along_dim),
    (("index_select",), index_select),
    (("take",), take),
):
    register(_names, _implementation, inplace=False)
rule(torch.embedding)(embedding)
