"""What `x[key]` and `x[key] = value` mean: views, copies, and places that arrays say."""

from __future__ import annotations

import numpy as np
import torch

from tracejit.capture.trace.scalars import TracedInt
from tracejit.numpy_front.core import (
    ArrayData,
    array,
    common,
    copy_for_view,
    is_weak,
    made,
    number,
    refuse,
    view,
    weak,
    write,
)

_MIXED = "index in two steps: x[i][:, rows], or with arrays alone"


def _parts(x: ArrayData, key: object) -> tuple:
    """A key as a tuple of ints, slices, None, Ellipsis, and Arrays of bool or int64."""
    parts = []
    for part in key if type(key) is tuple else (key,):
        if part is None or part is ... or type(part) is slice:
            parts.append(part)
        elif isinstance(part, ArrayData) and part.scalar and part.dtype.kind in "iu":
            parts.append(int(part.t))
        elif isinstance(part, (ArrayData, np.ndarray, list)):
            places = array(part)
            if places.dtype.kind not in "biu" and (places.t.numel() or type(part) is not list):
                raise IndexError("arrays used as indices must be of integer (or boolean) type")
            boolean = places.dtype.kind == "b"
            parts.append(places.t if boolean else places.t.to(torch.int64))
        elif type(part) is bool or type(part) is np.bool_:
            raise refuse("indexing with a bool", "index with an array of bools", x)
        else:
            parts.append(part if isinstance(part, TracedInt) else part.__index__())
    if any(isinstance(p, torch.Tensor) for p in parts):
        parts = [p.__index__() if isinstance(p, TracedInt) else p for p in parts]
    return tuple(parts)


def _is_int(part: object) -> bool:
    """Whether a part of a key is a number; it may be a runtime scalar."""
    return type(part) is int or isinstance(part, TracedInt)


def _advanced(x: ArrayData, parts: tuple) -> bool:
    """Whether a key has arrays; refuses what torch and numpy take differently."""
    arrays = [p for p in parts if isinstance(p, torch.Tensor)]
    if not arrays:
        return False
    if any(p.dtype == torch.bool for p in arrays) and len(parts) > 1:
        raise refuse("a mask beside other indices", "take the mask alone: x[mask]", x)
    if len(parts) == 1:
        mask = arrays[0]
        if mask.dtype == torch.bool and tuple(mask.shape) != x.shape[: mask.ndim]:
            raise IndexError("boolean index did not match indexed array")
        return True
    others = [p for p in parts if not isinstance(p, torch.Tensor)]
    if any(type(p) is int for p in others) and len(others) != sum(type(p) is int for p in others):
        raise refuse("ints and arrays and slices in one index", _MIXED, x)
    for p in others:
        if type(p) is slice and p.step is not None and p.step < 0:
            raise refuse("a reversed slice beside arrays", _MIXED, x)
    return True


def _forward(x: ArrayData, parts: tuple) -> tuple[tuple, list[int]]:
    """A basic key with steps forward, and the axes of its result that are then to be reversed."""
    free = sum(p is not None and p is not ... for p in parts)
    if free > x.t.ndim:
        raise IndexError(f"too many indices for array: array is {x.t.ndim}-dimensional")
    key, reverse, axis, place = [], [], 0, 0
    for p in parts:
        if p is ...:
            skipped = x.t.ndim - free
            axis, place = axis + skipped, place + skipped
        elif p is None:
            place += 1
        elif type(p) is slice:
            if p.step is not None and p.step < 0:
                there = range(*p.indices(x.shape[axis]))
                p = slice(there[-1], there[0] + 1, -p.step) if there else slice(0, 0)
                reverse.append(place)
            axis, place = axis + 1, place + 1
        else:
            axis += 1
        key.append(p)
    return tuple(key), reverse


def get(x: ArrayData, key: object) -> ArrayData:
    """x[key]: a view for slices, a scalar for as many ints as axes, else a copy."""
    parts = _parts(x, key)
    if _advanced(x, parts):
        return made(x.t[parts if len(parts) > 1 else parts[0]], sure=len(parts) == 1)
    forward, reverse = _forward(x, parts)
    if len(parts) == x.t.ndim and all(map(_is_int, parts)):
        return made(x.t[forward].clone())
    if x.scalar:
        return ArrayData.made(x.t.clone()[forward])
    t = x.t[forward]
    if reverse:
        return copy_for_view(x, torch.flip(t, reverse), "it is reversed, which copies here")
    return view(x, t)


def put(x: ArrayData, key: object, value: object) -> None:
    """x[key] = value; the value is cast to the dtype of x, whatever it is."""
    parts = _parts(x, key)
    if is_weak(value):
        if x.dtype.kind in "iu" and weak(value) is not int:
            value = int(value)
        t = number(value, x.dtype)
    else:
        t = array(value).t.to(x.t.dtype)
    if _advanced(x, parts):
        write(x, t, parts if len(parts) > 1 else parts[0])
        return
    forward, reverse = _forward(x, parts)
    target, given = tuple(x.t[forward].shape), tuple(t.shape)
    while len(given) > len(target) and given[0] == 1:
        given = given[1:]
    if len(given) > len(target) or any(
        n not in (1, m) for n, m in zip(given[::-1], target[::-1], strict=False)
    ):
        raise ValueError(f"could not broadcast input array from shape {given} into shape {target}")
    t = t.reshape(given)
    if reverse:
        t = torch.flip(t.broadcast_to(target), reverse)
    write(x, t, forward)


def add_at(x: object, key: object, value: object, sign: int = 1) -> None:
    """np.add.at(x, key, value), or np.subtract.at: elements that are there twice count twice."""
    if not isinstance(x, ArrayData):
        raise refuse("np.add.at", "the array that is added to is no argument of the step", x)
    if not np.can_cast(common(x, value), x.dtype, "same_kind"):
        raise refuse(f"np.add.at of {common(x, value)} to {x.dtype}", "cast it first", x)
    parts, added = _parts(x, key), array(value).t.to(x.t.dtype)
    added = added if sign > 0 else -added
    if not _advanced(x, parts):
        put(x, key, ArrayData.made(get(x, key).t + added))
        return
    if any(not isinstance(p, (int, torch.Tensor)) or _is_mask(p) for p in parts):
        raise refuse("np.add.at with a mask or slices", "index with arrays of integers", x)
    places = tuple(torch.tensor(p) if type(p) is int else p for p in parts)
    write(x, x.t.index_put(places, added, accumulate=True))


def _is_mask(part: object) -> bool:
    return isinstance(part, torch.Tensor) and part.dtype == torch.bool
