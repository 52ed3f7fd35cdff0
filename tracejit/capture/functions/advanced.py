"""x[i, j] and x[i, j] = y with tensors among the indices; index_put, index_copy, index_fill.

Assignments go from one index to the next: the same bits every time, at a cost of elements plus
indices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import EllipsisType

import torch

from tracejit.capture.functions import movement
from tracejit.capture.functions.common import (
    cast,
    check_range,
    expand,
    literal,
    normal_axis,
    operand,
    register,
)
from tracejit.capture.functions.masks import assign_masked, check_mask, columns, masked
from tracejit.capture.functions.movement import basic_index, check_item, reshape
from tracejit.capture.functions.patterns import along, constant, from_end, scattered
from tracejit.capture.functions.places import at_place, is_place
from tracejit.capture.functions.writes import copy_
from tracejit.capture.trace import location
from tracejit.capture.trace.bounds import within
from tracejit.capture.trace.overlaps import check_put
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
from tracejit.ir.types import b1, contiguous_strides, i32, i64, u8

Tensor = torch.Tensor


class Chosen:
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
        wrapped = [from_end(t, v, shape[a]) for v, a in zip(self.indices, self.axes, strict=True)]
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
    c = Chosen(t, input, index)
    if c.has_scalar:
        raise t.unsupported(
            "x[i] with a 0-d tensor is a view whose place depends on a value; use "
            "torch.index_select, or i.reshape(1)"
        )
    matrix = c.matrix(t, t.read(c.target))
    at = along(t, c.linear, (c.count, c.columns), 0)
    return t.fresh(c.placed(t, t.b.gather(matrix, at, axis=0)), c.strides())


def assign(t: Trace, input: Tensor, index: object, value: object) -> None:
    """x[i, :, j, …] = value: of several values for one place the last one counts."""
    target, merged = _merged(t, input, index, value, "last")
    check_put(t, target, index, value)
    copy_(t, target.tensor, merged)


def _merged(
    t: Trace, input: Tensor, index: object, value: object, combine: str
) -> tuple[Handle, TracedTensor]:
    """The part of a tensor that an index with tensors is about, and what it becomes."""
    c = Chosen(t, input, index)
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
        old = t.b.alias(t.read(c.target))
        return c.target, t.fresh(t.unread(old, new) if dtype.is_float else old)
    new = new if shape == new.type.shape else t.b.reshape(new, shape=shape)
    new = expand(t, new, c.shape)
    if len(c.axes) == 1:  # as it lies, so that it is written where it is
        (axis,) = c.axes
        shape = tuple(c.count if k == axis else n for k, n in enumerate(c.target.shape))
        rows = t.b.reshape(new, shape=shape)
        merged = _combined(t, c, t.read(c.target), rows, axis, combine)
    else:
        old = c.matrix(t, t.read(c.target))
        merged = _combined(t, c, old, c.listed(t, new), 0, combine)
        merged = t.b.reshape(merged, shape=tuple(c.target.shape[k] for k in c.order))
        back = tuple(c.order.index(k) for k in range(len(c.order)))
        merged = t.b.permute(merged, axes=back)
    return c.target, t.fresh(merged)


def _combined(t: Trace, c: Chosen, old: Value, rows: Value, axis: int, combine: str) -> Value:
    """`old` with `rows`, added or instead, where the indices say along an axis; as in eager, all
    that was given gets the gradient of its place, even if another one overwrote it."""
    with t.untaped():
        at = along(t, c.linear, rows.type.shape, axis)
        merged = scattered(t.b, old, at, rows, axis, combine)

    def vjp(b: Builder, cts: tuple, need: tuple) -> tuple:
        (g,) = cts
        kind = rows.type
        zeros = b.full(0, shape=kind.shape, dtype=kind.dtype, device=kind.device)
        kept = g if combine == "add" else None
        if need[0] and kept is None:
            kept = scattered(b, g, at, zeros, axis, "last")
        return kept, b.gather(g, at, axis=axis) if need[1] else None

    return t.derive("index_put_", (old, rows), merged, vjp)


@rule(Tensor.__getitem__)
def getitem(t: Trace, input: Tensor, index: object) -> Tensor:
    if not is_advanced(index):
        return movement.getitem(t, input, index)
    mask = _sole_mask(t, index)
    if mask is not None:
        if not t.lift(mask).shape:  # it chooses all of the tensor or nothing, on a new first axis
            input, mask = movement.unsqueeze(t, input, 0), movement.unsqueeze(t, mask, 0)
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


def index_put(
    t: Trace, input: Tensor, indices: Sequence, values: Tensor, accumulate: bool = False
) -> TracedTensor:
    """x[indices] = values, or += with `accumulate`, where each index counts that names a place."""
    index = _unmasked(t, t.lift(input), tuple(slice(None) if i is None else i for i in indices))
    return _changed(t, input, index, values, "add" if accumulate else "last")


def _changed(t: Trace, input: Tensor, index: object, value: object, combine: str) -> TracedTensor:
    """A new tensor, laid out as the old one, with values where an index of the whole says."""
    h = t.lift(input)
    _, merged = _merged(t, input, index, value, combine)
    strides = elementwise_strides(h.shape, [(h.shape, h.strides)])
    return t.fresh(t.read(t.lift(merged)), strides)


def _of_slices(t: Trace, input: Tensor, dim: int, index: Tensor, name: str) -> tuple:
    """(x[:, …, index], as an index; the shape of what it names) for a vector of indices."""
    h, i = t.lift(input), t.lift(index)
    axis = normal_axis(t, dim, len(h.shape))
    if len(i.shape) > 1 and name == "index_fill":
        raise t.shape_error("Index has to be a vector/scalar")
    if len(i.shape) > 1:
        raise AxisError(where=location.full(), reason=f"{name}(): Index is supposed to be a vector")
    if not h.shape:
        raise t.unsupported(f"{name} of a tensor with no axes has no rule")
    if i.dtype is not i64:
        raise t.shape_error(f"{name}(): Expected dtype int64 for index.")
    one = reshape(t, index, i.numel)
    return (slice(None),) * axis + (one,), (*h.shape[:axis], i.numel, *h.shape[axis + 1 :])


def index_copy(t: Trace, input: Tensor, dim: int, index: Tensor, source: Tensor) -> TracedTensor:
    """Slices of `source` where a vector of indices says."""
    if not t.lift(input).shape and t.lift(source).numel == 1:
        x, given = (reshape(t, x, 1) for x in (input, source))
        return _without_axes(t, index_copy(t, x, dim, index, given))
    chosen_by, shape = _of_slices(t, input, dim, index, "index_copy")
    s = t.lift(source)
    axis = normal_axis(t, dim, len(shape))
    n = t.lift(index).numel
    if len(s.shape) == len(shape) and s.shape[axis] != n:
        reason = f"index_copy_(): Number of indices ({n}) should be equal to source.size(dim)"
        raise AxisError(where=location.full(), reason=reason)
    if s.shape != shape:
        raise t.shape_error(
            f"index_copy_(): source of shape {list(s.shape)} does not fit {list(shape)}"
        )
    if s.dtype is not t.lift(input).dtype:
        raise t.shape_error("index_copy_(): self and source expected to have the same dtype")
    return _merged(t, input, chosen_by, source, "last")[1]


def index_fill(t: Trace, input: Tensor, dim: int, index: Tensor, value: object) -> TracedTensor:
    """A number, or a tensor of no axes, where a vector of indices says."""
    h = t.lift(input)
    if not h.shape:
        return _without_axes(t, index_fill(t, reshape(t, input, 1), dim, index, value))
    _of_slices(t, input, dim, index, "index_fill")
    if isinstance(value, Tensor):
        if t.lift(value).shape:
            raise t.shape_error(
                "index_fill_ only supports a 0-dimensional value tensor, but got tensor with "
                f"{len(t.lift(value).shape)} dimension(s)."
            )
        new = cast(t, t.read(t.lift(value)), h.dtype)
    else:
        check_range(t, operand(t, value).number, h.dtype)
        number = literal(operand(t, value).number, h.dtype)
        new = t.b.full(number, shape=(), dtype=h.dtype, device=h.device)
    axis = normal_axis(t, dim, len(h.shape))
    none = t.b.full(False, shape=(h.shape[axis],), dtype=b1, device=h.device)
    one = reshape(t, index, t.lift(index).numel)
    hit = t.read(_changed(t, t.fresh(none), (one,), True, "last").handle)
    out = t.b.where(along(t, hit, h.shape, axis), expand(t, new, h.shape), t.read(h))
    return t.fresh(out, elementwise_strides(h.shape, [(h.shape, h.strides)]))


def _without_axes(t: Trace, x: TracedTensor) -> TracedTensor:
    return t.fresh(t.b.reshape(t.read(x.handle), shape=()))


for _implementation in (index_put, index_copy, index_fill):
    register((_implementation.__name__,), _implementation)
