"""np.pad and sliding windows, as convolutions are written in numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tracejit.numpy_front.core import ArrayData, Root, array, made, number, refuse
from tracejit.numpy_front.functions import rule

_BY_INDEX = ("edge", "reflect", "symmetric", "wrap")


@rule(np.pad)
def pad(array_: object, pad_width: object, mode: str = "constant", **more: object) -> ArrayData:
    a = array(array_)
    if mode not in ("constant", *_BY_INDEX) or more.keys() - {"constant_values"}:
        kind = f" with {', '.join(more)}" if more else ""
        raise refuse(f"np.pad in the mode {mode!r}{kind}", "put the parts together", a)
    widths = _pairs(pad_width, a.t.ndim)
    if any(n < 0 for pair in widths for n in pair):
        raise ValueError("index can't contain negative values")
    t = a.t
    if mode == "constant":
        value = more.get("constant_values", 0)
        if isinstance(value, (ArrayData, np.ndarray, list, tuple)):
            raise refuse("np.pad with several constant_values", "give one number", a)
        shape = [n + low + high for n, (low, high) in zip(t.shape, widths, strict=True)]
        found = number(value, a.dtype).expand(shape).clone()
        inner = tuple(slice(low, low + n) for n, (low, _) in zip(t.shape, widths, strict=True))
        found[inner] = t
        return made(found)
    for axis, (low, high) in enumerate(widths):
        if low or high:
            if not t.shape[axis]:
                raise ValueError(
                    f"can't extend empty axis {axis} using modes other than 'constant'"
                )
            places = np.pad(np.arange(t.shape[axis]), (low, high), mode=mode)
            t = t.index_select(axis, torch.tensor(places.tolist()))
    return made(t.clone())


def _pairs(widths: object, ndim: int) -> list[tuple[int, int]]:
    """So many on either side of each axis."""
    if isinstance(widths, ArrayData):
        raise refuse("np.pad by an array", "give the widths as numbers", widths)
    given = np.asarray(widths)
    if given.dtype.kind not in "iu":
        raise TypeError("`pad_width` must be of integral type.")
    return [(int(low), int(high)) for low, high in np.broadcast_to(given, (ndim, 2))]


@rule(np.lib.stride_tricks.sliding_window_view)
def sliding_window_view(
    x: object,
    window_shape: int | Sequence[int],
    axis: int | Sequence[int] | None = None,
    *,
    subok: bool = False,
    writeable: bool = False,
) -> ArrayData:
    x = array(x)
    if writeable:
        raise refuse("windows that are written to", "write to the array itself", x)
    sizes = tuple(window_shape) if np.iterable(window_shape) else (window_shape,)
    if any(n < 0 for n in sizes):
        raise ValueError("`window_shape` cannot contain negative values")
    if axis is None:
        axes = tuple(range(x.t.ndim))
        if len(sizes) != len(axes):
            raise ValueError("Since axis is None, must provide window_shape for all dimensions")
    else:
        axes = np.lib.array_utils.normalize_axis_tuple(axis, x.t.ndim, allow_duplicate=True)
        if len(sizes) != len(axes):
            raise ValueError("Must provide matching length window_shape and axis")
    t = x.t
    for at, size in zip(axes, sizes, strict=True):
        if t.shape[at] < size:
            raise ValueError("window shape cannot be larger than input array shape")
        if not size:
            raise refuse("windows of no elements", "leave them out", x)
        t = t.unfold(at, size, 1)
    x.root.copied = True  # the view is for reading, and what is written later would show in it
    return ArrayData.made(t.clone(), Root("read-only", x.root), sure=False)
