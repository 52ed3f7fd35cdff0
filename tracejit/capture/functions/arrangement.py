"""Tensors laid out anew: flip, roll, repeat, tile, meshgrid, …"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tracejit.capture.functions.assembly import joined
from tracejit.capture.functions.common import (
    expand,
    normal_axes,
    normal_axis,
    register,
    size_args,
    sized,
)
from tracejit.capture.functions.movement import (
    expand_,
    preserved_strides,
    reshape,
    view,
)
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.ir.ops.movement import part

Tensor = torch.Tensor
Tensors = Sequence[Tensor]


# ---- order


def flip(t: Trace, input: Tensor, *dims: object) -> TracedTensor:
    h = t.lift(input)
    chosen = size_args(t, dims)
    axes = normal_axes(t, chosen, len(h.shape)) if chosen else ()
    return t.fresh(t.b.flip(t.read(h), axes=axes if h.shape else ()), preserved_strides(h))


def _flip_function(t: Trace, input: Tensor, dims: object) -> TracedTensor:
    return flip(t, input, dims)


def _flip_one(name: str, axis: int):
    def rule(t: Trace, input: Tensor) -> TracedTensor:
        if len(t.lift(input).shape) <= axis:
            raise t.shape_error(f"{name}: Input must be >= {axis + 1}-d.")
        return flip(t, input, axis)

    return rule


def roll(t: Trace, input: Tensor, shifts: object, dims: object = ()) -> TracedTensor:
    """Each axis in two parts, in the other order."""
    h = t.lift(input)
    shifts = (shifts,) if isinstance(shifts, int) else tuple(shifts)
    dims = (dims,) if isinstance(dims, int) else tuple(dims)
    if not dims and len(shifts) == 1:
        flat = reshape(t, input, -1) if h.numel else input
        return reshape(t, roll(t, flat, shifts, 0), h.shape) if h.numel else flip(t, input, ())
    if len(shifts) != len(dims):
        raise t.shape_error(f"shifts and dimensions must align. shifts: {shifts}, dims: {dims}")
    value = t.read(h)
    for shift, dim in zip(shifts, dims, strict=True):
        axis = normal_axis(t, dim, len(h.shape))
        n = h.shape[axis] if h.shape else 0
        if n and shift % n:
            at = n - shift % n
            parts = part(t.b, value, axis, at, n - at), part(t.b, value, axis, 0, at)
            value = joined(t, parts, axis)
    return t.fresh(value)


# ---- copies side by side


def repeat(t: Trace, input: Tensor, *repeats: object) -> TracedTensor:
    times = size_args(t, repeats)
    h = t.lift(input)
    missing = len(times) - len(h.shape)
    if missing < 0 or any(n < 0 for n in times):
        raise t.shape_error(f"repeat {list(times)} does not fit a tensor of shape {list(h.shape)}")
    shape = (1,) * missing + h.shape
    apart = tuple(n for size in shape for n in (1, size))
    spread = tuple(n for pair in zip(times, shape, strict=True) for n in pair)
    value = expand(t, t.b.reshape(t.read(h), shape=apart), spread)
    whole = tuple(n * size for n, size in zip(times, shape, strict=True))
    return t.fresh(t.b.reshape(value, shape=whole))


def tile(t: Trace, input: Tensor, *dims: object) -> TracedTensor:
    times = size_args(t, dims)
    missing = len(t.lift(input).shape) - len(times)
    return repeat(t, input, (1,) * missing + times)


def each_as_often(t: Trace, input: Tensor, repeats: int, dim: int | None) -> TracedTensor:
    """Each element `repeats` times in a row."""
    h = t.lift(input)
    value = t.read(h)
    if dim is None:
        value, axis = t.b.reshape(value, shape=(h.numel,)), 0
    else:
        axis = normal_axis(t, dim, len(h.shape))
    if repeats < 0:
        raise t.shape_error("Repeats must be non-negative")
    shape = value.type.shape
    if not shape:
        value, shape = t.b.reshape(value, shape=(1,)), (1,)
    thin = (*shape[: axis + 1], 1, *shape[axis + 1 :])
    wide = (*shape[: axis + 1], repeats, *shape[axis + 1 :])
    value = expand(t, t.b.reshape(value, shape=thin), wide)
    whole = (*shape[:axis], shape[axis] * repeats, *shape[axis + 1 :])
    return t.fresh(t.b.reshape(value, shape=whole))


def meshgrid(t: Trace, *tensors: object, indexing: str | None = None) -> tuple:
    """Views of vectors, one axis for each."""
    given = tensors[0] if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)) else tensors
    if not given:
        raise t.shape_error("meshgrid expects a non-empty TensorList")
    if any(len(t.lift(x).shape) > 1 for x in given):
        raise t.shape_error("Expected 0D or 1D tensor in the tensor list")
    if indexing not in (None, "ij", "xy"):
        raise t.shape_error(f"indexing must be one of 'xy' or 'ij', but received: {indexing}")
    swap = indexing == "xy" and len(given) > 1
    order = [1, 0, *range(2, len(given))] if swap else list(range(len(given)))
    given = [given[k] for k in order]
    shape = tuple(t.lift(x).numel for x in given)
    grids = []
    for k, x in enumerate(given):
        thin = tuple(n if i == k else 1 for i, n in enumerate(shape))
        grids.append(expand_(t, view(t, x, thin), shape))
    return tuple(grids[k] for k in order)


for _names, _implementation in (
    (("fliplr",), _flip_one("fliplr", 1)),
    (("flipud",), _flip_one("flipud", 0)),
    (("roll",), roll),
    (("meshgrid",), meshgrid),
):
    register(_names, _implementation, inplace=False)
rule(Tensor.repeat)(sized("repeats", repeat))
register(("flip",), _flip_function, inplace=False, others={Tensor.flip: sized("dims", flip)})
rule(torch.tile, Tensor.tile)(sized("dims", tile))
