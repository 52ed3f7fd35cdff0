"""numpy's functions of whole arrays, under `__array_function__`: shapes, products, sorting.

Each is a function of Arrays with numpy's arguments; arguments that it does not take are refused.
`reductions.py` has sums and their like, `creation.py` what makes arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from tracejit.numpy_front.core import (
    ArrayData,
    Root,
    array,
    cast,
    common,
    copy_for_view,
    made,
    refuse,
    unknown,
    view,
    write,
)
from tracejit.numpy_front.ufuncs import elementwise

FUNCTIONS: dict[Callable, Callable] = {}


def rule(*functions: Callable) -> Callable:
    """Make a function the rule of functions of numpy's."""

    def put(of: Callable) -> Callable:
        for function in functions:
            FUNCTIONS[function] = of
        return of

    return put


# ---- shapes


def row_major(name: str, order: object) -> None:
    if order not in ("C", "K", None):
        raise refuse(f"np.{name} with order={order!r}", "leave the order out")


@rule(np.reshape)
def reshape(a: object, shape: object, order: str = "C") -> ArrayData:
    a = array(a)
    row_major("reshape", order)
    shape = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    if -1 not in shape and int(np.prod(shape)) != a.t.numel():
        raise ValueError(f"cannot reshape array of size {a.t.numel()} into shape {shape}")
    if a.contiguous:
        return view(a, a.t.view(shape)) if not a.scalar else ArrayData.made(a.t.clone().view(shape))
    return copy_for_view(a, a.t.contiguous().view(shape), "it is reshaped, which may copy")


@rule(np.ravel)
def ravel(a: object, order: str = "C") -> ArrayData:
    a = array(a)
    row_major("ravel", order)
    if a.contiguous:
        return view(a, a.t.view(-1)) if not a.scalar else flatten(a)
    if a.sure:
        return flatten(a)
    return copy_for_view(a, a.t.clone().reshape(-1), "it is made flat, which may copy")


def flatten(a: ArrayData, order: str = "C") -> ArrayData:
    row_major("flatten", order)
    return ArrayData.made(a.t.contiguous().reshape(-1).clone())


@rule(np.copy)
def copy(a: object, order: str = "K") -> ArrayData:
    a = array(a)
    row_major("copy", order)
    return ArrayData.made(
        a.t.clone(memory_format=torch.contiguous_format), scalar=a.scalar, sure=a.contiguous
    )


def copy_method(a: ArrayData, order: str = "C") -> ArrayData:
    row_major("copy", order)
    return ArrayData.made(a.t.clone(memory_format=torch.contiguous_format), scalar=a.scalar)


@rule(np.transpose, np.permute_dims)
def transpose(a: object, axes: Sequence[int] | None = None) -> ArrayData:
    a = array(a)
    axes = tuple(reversed(range(a.t.ndim))) if axes is None else tuple(axes)
    if sorted(x % a.t.ndim for x in axes) != [*range(a.t.ndim)]:
        raise ValueError("axes don't match array")
    return a if a.scalar else view(a, a.t.permute(axes))


@rule(np.swapaxes)
def swapaxes(a: object, axis1: int, axis2: int) -> ArrayData:
    a = array(a)
    return view(a, a.t.transpose(axis1, axis2))


@rule(np.moveaxis)
def moveaxis(a: object, source: object, destination: object) -> ArrayData:
    a = array(a)
    return view(a, torch.movedim(a.t, source, destination))


@rule(np.expand_dims)
def expand_dims(a: object, axis: object) -> ArrayData:
    a = array(a)
    axes = axis if isinstance(axis, (tuple, list)) else (axis,)
    ndim, t = a.t.ndim + len(axes), a.t
    for i in sorted(np.lib.array_utils.normalize_axis_tuple(axes, ndim)):
        t = t.unsqueeze(i)
    return view(a, t) if not a.scalar else ArrayData.made(t.clone())


@rule(np.squeeze)
def squeeze(a: object, axis: object = None) -> ArrayData:
    a, t = array(a), array(a).t
    if axis is None:
        axes = [i for i, n in enumerate(a.shape) if n == 1]
    else:
        given = axis if isinstance(axis, tuple) else (axis,)
        axes = sorted(np.lib.array_utils.normalize_axis_tuple(given, t.ndim))
        if any(a.shape[i] != 1 for i in axes):
            raise ValueError("cannot select an axis to squeeze out which has size not equal to one")
    for i in reversed(axes):
        t = t.squeeze(i)
    return a if a.scalar else view(a, t)


@rule(np.broadcast_to)
def broadcast_to(a: object, shape: object) -> ArrayData:
    a = array(a)
    shape = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    if np.broadcast_shapes(a.shape, shape) != shape:
        raise ValueError(f"cannot broadcast {a.shape} to {shape}")
    found = view(a, a.t.broadcast_to(shape))
    a.root.copied = True  # the view is for reading, and what is written later would show in it
    found.root = Root("read-only", a.root)
    return found


@rule(np.diagonal)
def diagonal(a: object, offset: int = 0, axis1: int = 0, axis2: int = 1) -> ArrayData:
    a = array(a)
    t = torch.diagonal(a.t, offset, axis1, axis2).clone()
    a.root.copied = True
    return ArrayData.made(t, Root("read-only", a.root), sure=False)


@rule(np.diag)
def diag(v: object, k: int = 0) -> ArrayData:
    v = array(v)
    return made(torch.diag(v.t, k)) if v.t.ndim == 1 else diagonal(v, k)


@rule(np.atleast_1d)
def atleast_1d(a: object) -> ArrayData:
    a = array(a)
    return reshape(a, (1,)) if a.t.ndim == 0 else a


@rule(np.atleast_2d)
def atleast_2d(a: object) -> ArrayData:
    a = array(a)
    return a if a.t.ndim >= 2 else expand_dims(atleast_1d(a), 0)


@rule(np.flip)
def flip(m: object, axis: object = None) -> ArrayData:
    m = array(m)
    axes = range(m.t.ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    return copy_for_view(m, torch.flip(m.t, tuple(axes)), "it is reversed, which copies here")


@rule(np.flipud)
def flipud(m: object) -> ArrayData:
    return flip(m, 0)


@rule(np.fliplr)
def fliplr(m: object) -> ArrayData:
    return flip(m, 1)


@rule(np.roll)
def roll(a: object, shift: object, axis: object = None) -> ArrayData:
    a = array(a)
    if axis is None:
        return made(torch.roll(a.t.reshape(-1), shift, 0).reshape(a.shape), sure=a.contiguous)
    return made(torch.roll(a.t, shift, axis), sure=a.contiguous)


# ---- putting together and taking apart


def _together(arrays: Sequence, dtype: object) -> list[torch.Tensor]:
    parts = [array(x) for x in arrays]
    to = np.dtype(dtype) if dtype is not None else common(*parts)
    return [cast(p.t, to) for p in parts]


@rule(np.concatenate)
def concatenate(arrays: Sequence, axis: int | None = 0, dtype: object = None) -> ArrayData:
    parts = _together(arrays, dtype)
    if axis is None:
        parts, axis = [p.reshape(-1) for p in parts], 0
    if any(p.ndim != parts[0].ndim for p in parts):
        raise ValueError("all the input array dimensions must match exactly")
    return made(torch.cat(parts, axis))


@rule(np.stack)
def stack(arrays: Sequence, axis: int = 0, dtype: object = None) -> ArrayData:
    return made(torch.stack(_together(arrays, dtype), axis))


@rule(np.vstack)
def vstack(tup: Sequence, dtype: object = None) -> ArrayData:
    return concatenate([atleast_2d(x) for x in tup], 0, dtype)


@rule(np.hstack)
def hstack(tup: Sequence, dtype: object = None) -> ArrayData:
    parts = [atleast_1d(x) for x in tup]
    return concatenate(parts, 0 if parts[0].t.ndim == 1 else 1, dtype)


@rule(np.column_stack)
def column_stack(tup: Sequence) -> ArrayData:
    parts = [array(x) for x in tup]
    return concatenate([expand_dims(p, 1) if p.t.ndim == 1 else p for p in parts], 1)


@rule(np.split, np.array_split)
def split(ary: object, indices_or_sections: object, axis: int = 0) -> list[ArrayData]:
    a = array(ary)
    n = a.shape[axis]
    if isinstance(indices_or_sections, int):
        if n % indices_or_sections:
            raise refuse("np.split into parts of different sizes", "give the indices", a)
        size = n // indices_or_sections
        cuts = [size * i for i in range(1, indices_or_sections)]
    else:
        cuts = [slice(None, i).indices(n)[1] for i in indices_or_sections]
    starts, ends = [0, *cuts], [*cuts, n]
    return [
        view(a, a.t.narrow(axis, low, max(high - low, 0)))
        for low, high in zip(starts, ends, strict=True)
    ]


@rule(np.tile)
def tile(A: object, reps: object) -> ArrayData:
    a = array(A)
    reps = tuple(reps) if isinstance(reps, (tuple, list)) else (reps,)
    return made(a.t.tile(reps))


@rule(np.repeat)
def repeat(a: object, repeats: int, axis: int | None = None) -> ArrayData:
    a = array(a)
    if not isinstance(repeats, int):
        raise refuse("np.repeat with several counts", "give one count", a)
    t, axis = (a.t.reshape(-1), 0) if axis is None else (a.t, axis)
    return made(torch.repeat_interleave(t, repeats, axis))


# ---- choosing


@rule(np.where)
def where(condition: object, *values: object) -> ArrayData:
    if len(values) != 2:
        raise refuse("np.where without values", "the shape of its result depends on values")
    mask = array(condition)
    mask = mask.t if mask.dtype.kind == "b" else mask.t != 0
    dtype = common(*values)
    x, y = (cast(array(v).t, dtype) for v in values)
    np.broadcast_shapes(tuple(mask.shape), tuple(x.shape), tuple(y.shape))
    found = torch.where(mask, x, y)
    return ArrayData.made(found, sure=all(t.is_contiguous() for t in (mask, x, y)))


@rule(np.clip)
def clip(
    a: object,
    a_min: object = None,
    a_max: object = None,
    out: object = None,
    *,
    min: object = None,
    max: object = None,
) -> ArrayData:
    low, high = (min if a_min is None else a_min), (max if a_max is None else a_max)
    found = array(a)
    given = [x for x in (low, high) if x is not None]
    if not given:
        return copy(found)
    if low is not None:
        found = elementwise(np.maximum, found, low)
    if high is not None:
        found = elementwise(np.minimum, found, high)
    if out is None:
        return found
    write(out, found.t)
    return out


@rule(np.take)
def take(a: object, indices: object, axis: int | None = None) -> ArrayData:
    a, places = array(a), array(indices)
    t, axis = (a.t.reshape(-1), 0) if axis is None else (a.t, axis % a.t.ndim)
    key = (*(slice(None),) * axis, places.t.to(torch.int64))
    return made(t[key], sure=False)


@rule(np.sort)
def sort(a: object, axis: int | None = -1, *, stable: bool | None = None) -> ArrayData:
    a = array(a)
    t, axis = (a.t.reshape(-1), 0) if axis is None else (a.t, axis)
    return made(torch.sort(t, dim=axis, stable=True).values, sure=a.contiguous)


@rule(np.argsort)
def argsort(
    a: object, axis: int | None = -1, kind: str | None = None, *, stable: bool | None = None
) -> ArrayData:
    a = array(a)
    if kind not in ("stable", "mergesort") and not stable:
        raise refuse("np.argsort", "the order of equal elements is open; pass kind='stable'", a)
    t, axis = (a.t.reshape(-1), 0) if axis is None else (a.t, axis)
    return made(torch.argsort(t, dim=axis, stable=True), sure=a.contiguous)


@rule(np.tril)
def tril(m: object, k: int = 0) -> ArrayData:
    return made(torch.tril(array(m).t, k))


@rule(np.triu)
def triu(m: object, k: int = 0) -> ArrayData:
    return made(torch.triu(array(m).t, k))


# ---- products


def _same(name: str, *operands: object) -> list[ArrayData]:
    dtype = common(*operands)
    if dtype.kind != "f":
        raise refuse(f"np.{name} of {dtype}", "make one of them an array of floats", *operands)
    return [ArrayData.made(cast(array(x).t, dtype)) for x in operands]


@rule(np.dot)
def dot(a: object, b: object, out: object = None) -> ArrayData:
    x, y = array(a), array(b)
    if out is not None:
        raise unknown("np.dot with out", x, y)
    if not x.t.ndim or not y.t.ndim:
        return elementwise(np.multiply, a, b)
    x, y = _same("dot", a, b)
    if y.t.ndim > 2:
        return made(torch.tensordot(x.t, y.t, ([-1], [-2])))
    return _product(x, y)


def _product(x: ArrayData, y: ArrayData) -> ArrayData:
    inner = y.shape[-2] if y.t.ndim > 1 else y.shape[0]
    if x.shape[-1] != inner:
        raise ValueError(f"shapes {x.shape} and {y.shape} not aligned")
    return made(torch.matmul(x.t, y.t))


def matmul(a: object, b: object) -> ArrayData:
    """np.matmul, which is a ufunc."""
    if not array(a).t.ndim or not array(b).t.ndim:
        raise ValueError("matmul: Input operand does not have enough dimensions")
    return _product(*_same("matmul", a, b))


@rule(np.vdot)
def vdot(a: object, b: object) -> ArrayData:
    x, y = _same("vdot", a, b)
    return made(torch.dot(x.t.reshape(-1), y.t.reshape(-1)))


@rule(np.inner)
def inner(a: object, b: object) -> ArrayData:
    x, y = _same("inner", a, b)
    if not x.t.ndim or not y.t.ndim:
        return elementwise(np.multiply, x, y)
    return made(torch.tensordot(x.t, y.t, ([-1], [-1])))


@rule(np.outer)
def outer(a: object, b: object) -> ArrayData:
    x, y = array(a), array(b)
    x, y = ArrayData.made(x.t.reshape(-1, 1)), ArrayData.made(y.t.reshape(-1))
    return elementwise(np.multiply, x, y)


@rule(np.tensordot)
def tensordot(a: object, b: object, axes: object = 2) -> ArrayData:
    x, y = _same("tensordot", a, b)
    return ArrayData.made(torch.tensordot(x.t, y.t, axes))  # not a scalar without axes either


@rule(np.einsum)
def einsum(subscripts: str, *operands: object, optimize: object = False) -> ArrayData:
    if type(subscripts) is not str:
        raise refuse("np.einsum without subscripts as text", "write them as text", *operands)
    return made(torch.einsum(subscripts, *(x.t for x in _same("einsum", *operands))), sure=False)
