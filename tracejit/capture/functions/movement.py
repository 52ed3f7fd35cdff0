"""Views and shape changes: handles on the same storage, with torch's geometry beside them."""

from __future__ import annotations

import math
from types import EllipsisType

import torch

from tracejit.capture.functions.bits import as_dtype
from tracejit.capture.functions.common import (
    cast,
    normal_axis,
    operand,
    register,
    size_args,
    sized,
    write_back,
)
from tracejit.capture.functions.layouts import lies_in, strides_in
from tracejit.capture.functions.selection import masked_fill
from tracejit.capture.functions.writes import copy_, fill_
from tracejit.capture.trace import location
from tracejit.capture.trace.integers import difference
from tracejit.capture.trace.scalars import TracedInt, is_runtime, pinned, plain
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import (
    Handle,
    Ints,
    Step,
    TracedTensor,
    elementwise_strides,
    is_dense,
)
from tracejit.capture.trace.trace import Trace
from tracejit.capture.trace.views import stretch
from tracejit.errors import AxisError
from tracejit.ir.types import b1, contiguous_strides, i64

Tensor = torch.Tensor


def _step(name: str, **attrs: object) -> Step:
    return name, tuple(attrs.items())


def _permuted(t: Trace, h: Handle, axes: Ints) -> TracedTensor:
    return t.view(
        h,
        (_step("permute", axes=axes),),
        tuple(h.shape[a] for a in axes),
        tuple(h.strides[a] for a in axes),
        h.offset,
    )


def _reshaped(t: Trace, h: Handle, shape: Ints, strides: Ints) -> TracedTensor:
    return t.view(h, (_step("reshape", shape=shape),), shape, strides, h.offset)


def permute(t: Trace, input: Tensor, *dims: object) -> TracedTensor:
    h = t.lift(input)
    axes = tuple(normal_axis(t, d, len(h.shape)) for d in size_args(t, dims))
    if sorted(axes) != list(range(len(h.shape))):
        raise t.shape_error("permute(dims): number or values of dims do not match the tensor's")
    return _permuted(t, h, axes)


def _permute_function(t: Trace, input: Tensor, dims: object) -> TracedTensor:
    return permute(t, input, *dims)


def transpose(t: Trace, input: Tensor, dim0: int, dim1: int) -> TracedTensor:
    h = t.lift(input)
    axes = list(range(len(h.shape)))
    if not axes:
        return t.view(h, (), h.shape, h.strides, h.offset)
    a, b = normal_axis(t, dim0, len(axes)), normal_axis(t, dim1, len(axes))
    axes[a], axes[b] = axes[b], axes[a]
    return _permuted(t, h, tuple(axes))


def t_(t: Trace, input: Tensor) -> TracedTensor:
    h = t.lift(input)
    if len(h.shape) > 2:
        raise t.shape_error(
            f"t() expects a tensor with <= 2 dimensions, but self is {len(h.shape)}D"
        )
    return _permuted(t, h, tuple(reversed(range(len(h.shape)))))


@rule(Tensor.T.__get__)
def T(t: Trace, input: Tensor) -> TracedTensor:
    return _permuted(t, t.lift(input), tuple(reversed(range(len(t.lift(input).shape)))))


@rule(Tensor.H.__get__)
def H(t: Trace, input: Tensor) -> Tensor:
    """As of real numbers."""
    rank = len(t.lift(input).shape)
    if rank not in (0, 2):
        raise t.shape_error("tensor.H is only supported on matrices (2-D tensors)")
    return input if rank == 0 else transpose(t, input, 0, 1)


@rule(Tensor.mT.__get__, Tensor.mH.__get__)
def mT(t: Trace, input: Tensor) -> Tensor:
    rank = len(t.lift(input).shape)
    if rank == 0:
        return input
    if rank == 1:
        raise t.shape_error("tensor.mT is only supported on matrices or batches of matrices")
    return transpose(t, input, -2, -1)


def view_strides(shape: Ints, strides: Ints, new: Ints) -> Ints | None:
    """Strides of a view of another shape, or None where only a copy can have it.

    Source: torch's computeStride; runs of axes that lie densely in memory are split or merged.
    """
    if 0 in shape:
        return strides if new == shape else contiguous_strides(new)
    if not shape:
        return (1,) * len(new)
    out = [0] * len(new)
    at = len(new) - 1
    chunk_stride, numel, covered = strides[-1], 1, 1
    for axis in reversed(range(len(shape))):
        numel *= shape[axis]
        breaks = axis == 0 or (shape[axis - 1] != 1 and strides[axis - 1] != numel * chunk_stride)
        if not breaks:
            continue
        while at >= 0 and (covered < numel or new[at] == 1):
            out[at] = covered * chunk_stride
            covered *= new[at]
            at -= 1
        if covered != numel:
            return None
        if axis > 0:
            chunk_stride, numel, covered = strides[axis - 1], 1, 1
    return tuple(out) if at == -1 else None


def infer_size(t: Trace, h: Handle, sizes: Ints) -> Ints:
    """Resolve a -1 in the sizes of view and reshape."""
    known = math.prod(n for n in sizes if n != -1)
    if sizes.count(-1) > 1:
        raise t.shape_error("only one dimension can be inferred")
    if -1 in sizes:
        if known == 0 or h.numel % known:
            raise t.shape_error(f"shape '{list(sizes)}' is invalid for input of size {h.numel}")
        sizes = tuple(h.numel // known if n == -1 else n for n in sizes)
    if math.prod(sizes) != h.numel or any(n < 0 for n in sizes):
        raise t.shape_error(f"shape '{list(sizes)}' is invalid for input of size {h.numel}")
    return sizes


def view(t: Trace, input: Tensor, *size: object, dtype: torch.dtype | None = None) -> TracedTensor:
    if dtype is not None or isinstance(size[0], torch.dtype):
        return as_dtype(t, input, dtype or size[0])
    h = t.lift(input)
    shape = infer_size(t, h, size_args(t, size))
    strides = view_strides(h.shape, h.strides, shape)
    if strides is None:
        raise t.shape_error(
            "view size is not compatible with input tensor's size and stride (at least one "
            "dimension spans across two contiguous subspaces). Use .reshape(...) instead"
        )
    return _reshaped(t, h, shape, strides)


def reshape(t: Trace, input: Tensor, *shape: object) -> TracedTensor:
    h = t.lift(input)
    sizes = infer_size(t, h, size_args(t, shape))
    strides = view_strides(h.shape, h.strides, sizes)
    if strides is not None:
        return _reshaped(t, h, sizes, strides)
    return t.fresh(t.b.reshape(t.read(h), shape=sizes))


def flatten(t: Trace, input: Tensor, start_dim: int = 0, end_dim: int = -1) -> TracedTensor:
    h = t.lift(input)
    rank = len(h.shape)
    if rank == 0:
        return reshape(t, input, 1)
    first, last = normal_axis(t, start_dim, rank), normal_axis(t, end_dim, rank)
    if first > last:
        raise t.shape_error("flatten() has invalid args: start_dim cannot come after end_dim")
    if first == last:
        return input
    merged = math.prod(h.shape[first : last + 1])
    return reshape(t, input, h.shape[:first] + (merged,) + h.shape[last + 1 :])


def unsqueeze(t: Trace, input: Tensor, dim: int) -> TracedTensor:
    h = t.lift(input)
    axis = normal_axis(t, dim, len(h.shape) + 1)
    stride = h.shape[axis] * h.strides[axis] if axis < len(h.shape) else 1
    shape = h.shape[:axis] + (1,) + h.shape[axis:]
    return _reshaped(t, h, shape, h.strides[:axis] + (stride,) + h.strides[axis:])


def squeeze(t: Trace, input: Tensor, dim: object = None) -> TracedTensor:
    h = t.lift(input)
    rank = len(h.shape)
    if dim is None:
        chosen = set(range(rank))
    else:
        dims = (dim,) if isinstance(dim, int) else tuple(dim)
        chosen = {normal_axis(t, d, rank) for d in dims}
    kept = [i for i in range(rank) if i not in chosen or h.shape[i] != 1]
    return _reshaped(t, h, tuple(h.shape[i] for i in kept), tuple(h.strides[i] for i in kept))


def expand_(t: Trace, input: Tensor, *size: object) -> TracedTensor:
    h = t.lift(input)
    sizes = size_args(t, size)
    missing = len(sizes) - len(h.shape)
    if missing < 0:
        raise t.shape_error(
            f"expand: the number of sizes provided ({len(sizes)}) must be greater or equal to the "
            f"number of dimensions in the tensor ({len(h.shape)})"
        )
    old = (1,) * missing + h.shape
    new, strides = [], []
    for axis, (n, want) in enumerate(zip(old, sizes, strict=True)):
        if want == -1 and axis >= missing:
            want = n
        if want < 0 or (n != want and n != 1):
            raise t.shape_error(
                f"The expanded size of the tensor ({want}) must match the existing size ({n}) at "
                f"non-singleton dimension {axis}"
            )
        new.append(want)
    for axis in reversed(range(len(new))):
        if axis >= missing:
            stride = h.strides[axis - missing]
        else:  # as if it went around what comes after it
            stride = new[axis + 1] * strides[0] if h.shape else 0
        strides.insert(0, stride if old[axis] == new[axis] else 0)
    steps = (_step("reshape", shape=old),) if missing else ()
    if old != tuple(new):
        steps += (_step("expand", shape=tuple(new)),)
    return t.view(h, steps, tuple(new), tuple(strides), h.offset)


@rule(Tensor.expand_as)
def expand_as(t: Trace, input: Tensor, other: Tensor) -> TracedTensor:
    return expand_(t, input, t.lift(other).shape)


@rule(Tensor.view_as)
def view_as(t: Trace, input: Tensor, other: Tensor) -> TracedTensor:
    return view(t, input, t.lift(other).shape)


@rule(Tensor.reshape_as)
def reshape_as(t: Trace, input: Tensor, other: Tensor) -> TracedTensor:
    return reshape(t, input, t.lift(other).shape)


def preserved_strides(h: Handle) -> Ints:
    """Strides of a copy under torch.preserve_format."""
    if is_dense(h.shape, h.strides):
        return h.strides
    return elementwise_strides(h.shape, [(h.shape, h.strides)])


@rule(Tensor.clone, torch.clone)
def clone(
    t: Trace, input: Tensor, *, memory_format: torch.memory_format = torch.preserve_format
) -> TracedTensor:
    h = t.lift(input)
    keeps = memory_format is torch.preserve_format
    strides = preserved_strides(h) if keeps else strides_in(t, h, memory_format)
    return t.fresh(t.b.alias(t.read(h)), strides)


@rule(Tensor.contiguous)
def contiguous(
    t: Trace, input: Tensor, memory_format: torch.memory_format = torch.contiguous_format
) -> Tensor:
    h = t.lift(input)
    if lies_in(t, h, memory_format):
        return input
    return t.fresh(t.b.alias(t.read(h)), strides_in(t, h, memory_format))


def slice_steps(h: Handle, axis: int, start: int, stop: int, step: int) -> Step:
    """The slice primitive along one axis."""
    rank = range(len(h.shape))
    return _step(
        "slice",
        starts=tuple(start if i == axis else 0 for i in rank),
        stops=tuple(stop if i == axis else h.shape[i] for i in rank),
        steps=tuple(step if i == axis else 1 for i in rank),
    )


def _sliced(t: Trace, h: Handle, axis: int, start: int, stop: int, step: int) -> Handle:
    n = -(-(stop - start) // step)
    shape = tuple(n if i == axis else m for i, m in enumerate(h.shape))
    strides = tuple(st * step if i == axis else st for i, st in enumerate(h.strides))
    offset = h.offset + start * h.strides[axis]
    steps = (slice_steps(h, axis, start, stop, step),)
    return t.view(h, steps, shape, strides, offset).handle


def _windowed(t: Trace, h: Handle, axis: int, start: TracedInt, size: int) -> Handle:
    """`size` elements from a place on that is a runtime scalar, which is inside."""
    shape = tuple(size if i == axis else m for i, m in enumerate(h.shape))
    at = t.b.full(start.value, shape=(), dtype=i64, device=h.device)
    offset = h.offset + start * h.strides[axis]
    return t.view(h, (stretch(axis, size, at),), shape, h.strides, offset).handle


def _selected(t: Trace, h: Handle, axis: int, index: int) -> Handle:
    n = h.shape[axis]
    counted = index + n if index < 0 else index  # decisions, if it is a runtime scalar
    if counted < 0 or counted >= n:
        raise AxisError(
            where=location.full(),
            reason=f"index {plain(index)} is out of bounds for dimension {axis} with size {n}",
        )
    if is_runtime(counted):
        h = _windowed(t, h, axis, counted, 1)
    else:
        h = _sliced(t, h, axis, counted, counted + 1, 1)
    shape, strides = h.shape[:axis] + h.shape[axis + 1 :], h.strides[:axis] + h.strides[axis + 1 :]
    return _reshaped(t, h, shape, strides).handle


def select(t: Trace, input: Tensor, dim: int, index: int) -> Tensor:
    h = t.lift(input)
    return _selected(t, h, normal_axis(t, dim, len(h.shape)), as_int(index)).tensor


def narrow(t: Trace, input: Tensor, dim: int, start: int, length: int) -> Tensor:
    h = t.lift(input)
    axis = normal_axis(t, dim, len(h.shape))
    start, length, extent = as_int(start), int(length), h.shape[axis]
    start = start + extent if start < 0 else start
    if length < 0 or start < 0 or start > extent - length:
        raise t.shape_error(
            f"start ({plain(start)}) + length ({length}) exceeds dimension size ({extent})"
        )
    if is_runtime(start):
        return _windowed(t, h, axis, start, length).tensor
    return _sliced(t, h, axis, start, start + length, 1).tensor


def basic_index(t: Trace, h: Handle, index: object) -> Handle:
    """A view by ints, slices, None and Ellipsis."""
    items = index if isinstance(index, tuple) else (index,)
    taken = sum(1 for i in items if i is not None and not isinstance(i, EllipsisType))
    if taken > len(h.shape):
        raise AxisError(
            where=location.full(),
            reason=f"too many indices for tensor of dimension {len(h.shape)}",
        )
    axis = 0
    for item in items:
        if item is None:
            h = unsqueeze(t, h.tensor, axis).handle
            axis += 1
        elif isinstance(item, EllipsisType):
            axis += (
                len(h.shape) - axis - sum(1 for i in items[items.index(...) + 1 :] if i is not None)
            )
        elif isinstance(item, slice):
            if any(isinstance(v, Tensor) for v in (item.start, item.stop, item.step)):
                raise t.unsupported("A slice bound that is a tensor depends on values")
            step = None if item.step is None else int(item.step)
            if step is not None and step <= 0:
                raise ValueError("step must be greater than zero")
            size = _fixed_size(t, item, h.shape[axis])
            if size is not None:
                h, item = _windowed(t, h, axis, item.start, size), slice(None, None, step)
            start, stop, step = slice(*map(pinned, (item.start, item.stop, step))).indices(
                h.shape[axis]
            )
            if (start, stop, step) != (0, h.shape[axis], 1):
                h = _sliced(t, h, axis, start, max(start, stop), step)
            axis += 1
        else:
            h = _selected(t, h, axis, as_int(item))
    return h


def as_int(x: object) -> int:
    """An index as an int; a runtime scalar as it is."""
    return x if is_runtime(x) else int(x)


def _fixed_size(t: Trace, item: slice, extent: int) -> int | None:
    """How many elements lie between two bounds that are runtime scalars, if that is the same
    whatever they are, and all are there; else None."""
    if not (is_runtime(item.start) and is_runtime(item.stop)):
        return None
    size = difference(t, item.stop, item.start)
    if size is None or size <= 0 or item.start < 0 or item.stop > extent:
        return None
    return size


def mask_of(t: Trace, index: object) -> Tensor | None:
    """The boolean mask, when the index is one tensor of bools."""
    if isinstance(index, tuple) and len(index) == 1:
        index = index[0]
    if isinstance(index, Tensor) and t.lift(index).dtype is b1:
        return index
    return None


def check_item(t: Trace, item: object) -> None:
    """Refuse what is not an int, a slice, None or Ellipsis."""
    if isinstance(item, bool) or not isinstance(item, (int, slice, type(None), EllipsisType)):
        raise t.unsupported(f"An index of type {type(item).__name__} has no rule")


def _refuse_advanced(t: Trace, index: object) -> None:
    for item in index if isinstance(index, tuple) else (index,):
        check_item(t, item)


def getitem(t: Trace, input: Tensor, index: object) -> Tensor:
    """x[index] by ints, slices, None and Ellipsis: a view."""
    _refuse_advanced(t, index)
    h = t.lift(input)
    found = basic_index(t, h, index)
    if found is h:
        found = t.view(h, (), h.shape, h.strides, h.offset).handle
    return found.tensor


def setitem(t: Trace, input: Tensor, index: object, value: object) -> None:
    """x[index] = value, with an index as of `getitem` or one mask."""
    mask = mask_of(t, index)
    if mask is not None:
        _assign_masked(t, input, mask, value)
        return
    _refuse_advanced(t, index)
    target = basic_index(t, t.lift(input), index).tensor
    if not isinstance(value, Tensor):
        fill_(t, target, value)
        return
    source, into = t.lift(value), t.lift(target)
    shape, extra = source.shape, len(source.shape) - len(into.shape)
    if extra > 0 and all(n == 1 for n in shape[:extra]):
        shape = shape[extra:]
    if extra < 0 and into.shape == (1,) * -extra + shape:
        shape = into.shape  # torch expands it first; the tensor itself may come
    copy_(t, target, value if shape == source.shape else reshape(t, value, shape))


def _assign_masked(t: Trace, input: Tensor, mask: Tensor, value: object) -> None:
    """x[mask] = scalar: the mask covers the leading axes of x."""
    x, m = t.lift(input), t.lift(mask)
    if m.shape != x.shape[: len(m.shape)]:
        raise AxisError(
            where=location.full(),
            reason=f"The shape of the mask {list(m.shape)} does not match the indexed tensor "
            f"{list(x.shape)}",
        )
    given = operand(t, value)
    if given.handle is not None and given.handle.numel != 1:
        raise t.unsupported("x[mask] = tensor depends on how many elements the mask selects")
    if given.handle is not None and given.handle.shape:
        value = reshape(t, value, ())
    if given.handle is not None:
        value = t.fresh(cast(t, t.read(t.lift(value)), x.dtype))
    if len(m.shape) < len(x.shape):
        mask = reshape(t, mask, m.shape + (1,) * (len(x.shape) - len(m.shape)))
    write_back(t, input, masked_fill(t, input, mask, value))


def _reshape_function(t: Trace, input: Tensor, shape: object) -> TracedTensor:
    return reshape(t, input, *shape)


_SIZED = {Tensor.permute: sized("dims", permute), Tensor.reshape: sized("shape", reshape)}
register(("permute",), _permute_function, inplace=False, others=_SIZED)
register(("reshape",), _reshape_function, inplace=False, others=_SIZED)
for _names, _implementation in (
    (("transpose", "swapaxes", "swapdims"), transpose),
    (("t",), t_),
    (("flatten",), flatten),
    (("unsqueeze",), unsqueeze),
    (("squeeze",), squeeze),
    (("select",), select),
    (("narrow",), narrow),
):
    register(_names, _implementation, inplace=False)
rule(Tensor.view)(sized("size", view))
rule(Tensor.expand)(sized("size", expand_))


@rule(torch.broadcast_to, Tensor.broadcast_to)
def broadcast_to(t: Trace, input: Tensor, size: object) -> TracedTensor:
    return expand_(t, input, size)
