"""Sums and their like, norms, comparisons of whole arrays, and what makes arrays."""

from __future__ import annotations

import builtins
from collections.abc import Callable

import numpy as np
import torch

from tracejit.numpy_front.core import (
    ON,
    ArrayData,
    array,
    axes_of,
    cast,
    is_weak,
    made,
    number,
    refuse,
    torch_dtype,
    unknown,
)
from tracejit.numpy_front.functions import copy, reshape, row_major, rule
from tracejit.numpy_front.ufuncs import elementwise


def _summed(a: ArrayData, dtype: object) -> np.dtype:
    """The dtype of a sum: small integers become int64."""
    if dtype is not None:
        return np.dtype(dtype)
    if a.dtype == np.uint8:
        raise refuse("a sum of uint8", "numpy makes uint64 of it; pass dtype=np.int64", a)
    return np.dtype(np.int64) if a.dtype.kind in "bi" else a.dtype


def _finish(t: torch.Tensor, out: object, *, sure: bool = True) -> ArrayData:
    if out is not None:
        raise refuse("out= of a reduction", "assign the result: out[...] = x.sum()", out)
    return made(t, sure=sure)


@rule(np.sum)
def sum(
    a: object, axis: object = None, dtype: object = None, out: object = None, keepdims: bool = False
) -> ArrayData:
    a = array(a)
    to, axes = _summed(a, dtype), axes_of(a, axis)
    t = cast(a.t, to)
    t = t.sum(dim=axes, keepdim=bool(keepdims)) if axes else t.clone()
    return _finish(cast(t, to), out, sure=a.contiguous)


@rule(np.prod)
def prod(
    a: object, axis: object = None, dtype: object = None, out: object = None, keepdims: bool = False
) -> ArrayData:
    a = array(a)
    t = cast(a.t, _summed(a, dtype))
    return _finish(_each(torch.prod, t, axes_of(a, axis), keepdims), out)


def _each(
    function: Callable, t: torch.Tensor, axes: tuple[int, ...], keepdims: bool
) -> torch.Tensor:
    """A reduction over several axes, one after another."""
    for i in reversed(axes):
        t = function(t, dim=i, keepdim=bool(keepdims))
    return t if axes else t.clone()


@rule(np.mean)
def mean(
    a: object, axis: object = None, dtype: object = None, out: object = None, keepdims: bool = False
) -> ArrayData:
    a = array(a)
    to = np.dtype(dtype or (np.float64 if a.dtype.kind in "biu" else a.dtype))
    t = cast(a.t, np.dtype(np.float32) if to == np.float16 else to)
    axes = axes_of(a, axis)
    t = t.mean(dim=axes, keepdim=bool(keepdims)) if axes else t.clone()
    return _finish(cast(t, to), out, sure=a.contiguous)


@rule(np.var)
def var(
    a: object,
    axis: object = None,
    dtype: object = None,
    out: object = None,
    ddof: int = 0,
    keepdims: bool = False,
) -> ArrayData:
    a = array(a)
    to = np.dtype(dtype or (np.float64 if a.dtype.kind in "biu" else a.dtype))
    t, axes = cast(a.t, to), axes_of(a, axis)
    count = int(np.prod([a.shape[i] for i in axes]))
    if to == np.float16 or not axes or count <= ddof:
        raise unknown("np.var of these", a)
    centered = t - t.mean(dim=axes, keepdim=True)
    total = (centered * centered).sum(dim=axes, keepdim=bool(keepdims))
    return _finish(total / (count - ddof), out, sure=a.contiguous)


@rule(np.std)
def std(
    a: object,
    axis: object = None,
    dtype: object = None,
    out: object = None,
    ddof: int = 0,
    keepdims: bool = False,
) -> ArrayData:
    return elementwise(np.sqrt, var(a, axis, dtype, out, ddof, keepdims))


def _extremum(name: str, function: Callable) -> Callable:
    def reduce(
        a: object, axis: object = None, out: object = None, keepdims: bool = False
    ) -> ArrayData:
        a = array(a)
        axes = axes_of(a, axis)
        if builtins.any(not a.shape[i] for i in axes):
            raise ValueError(f"zero-size array to reduction operation {name} has no identity")
        t = function(a.t, dim=axes, keepdim=bool(keepdims)) if axes else a.t.clone()
        return _finish(t, out, sure=a.contiguous)

    return reduce


max = rule(np.max, np.amax)(_extremum("maximum", torch.amax))
min = rule(np.min, np.amin)(_extremum("minimum", torch.amin))


@rule(np.ptp)
def ptp(a: object, axis: object = None) -> ArrayData:
    return elementwise(np.subtract, max(a, axis), min(a, axis))


def _truth(function: Callable) -> Callable:
    def reduce(
        a: object, axis: object = None, out: object = None, keepdims: bool = False
    ) -> ArrayData:
        a = array(a)
        return _finish(_each(function, a.t != 0, axes_of(a, axis), keepdims), out)

    return reduce


any = rule(np.any)(_truth(torch.any))
all = rule(np.all)(_truth(torch.all))


@rule(np.count_nonzero)
def count_nonzero(a: object, axis: object = None, *, keepdims: bool = False) -> ArrayData:
    return sum(elementwise(np.not_equal, array(a), 0), axis, keepdims=keepdims)


def _place(function: Callable) -> Callable:
    def reduce(
        a: object, axis: int | None = None, out: object = None, *, keepdims: bool = False
    ) -> ArrayData:
        a = array(a)
        if not a.t.numel():
            raise unknown("a place in an empty array", a)
        t = a.t.to(torch.uint8) if a.dtype.kind == "b" else a.t
        if axis is not None or not keepdims:
            flat = t.reshape(-1) if axis is None else t
            return _finish(function(flat, dim=0 if axis is None else axis, keepdim=keepdims), out)
        return _finish(function(t.reshape(-1), dim=0).reshape((1,) * t.ndim), out)

    return reduce


argmax = rule(np.argmax)(_place(torch.argmax))
argmin = rule(np.argmin)(_place(torch.argmin))


def _running(function: Callable) -> Callable:
    def run(
        a: object, axis: int | None = None, dtype: object = None, out: object = None
    ) -> ArrayData:
        a = array(a)
        t = cast(a.t, _summed(a, dtype))
        t, axis = (t.reshape(-1), 0) if axis is None else (t, axis)
        return _finish(function(t, axis), out, sure=a.contiguous)

    return run


cumsum = rule(np.cumsum)(_running(torch.cumsum))
cumprod = rule(np.cumprod)(_running(torch.cumprod))


@rule(np.diff)
def diff(a: object, n: int = 1, axis: int = -1) -> ArrayData:
    a = array(a)
    for _ in range(n):
        length = a.shape[axis]
        if not length:
            raise unknown("np.diff of an empty axis", a)
        parts = (a.t.narrow(axis, low, length - 1) for low in (1, 0))
        later, earlier = (ArrayData.made(t, sure=False) for t in parts)
        a = elementwise(np.not_equal if a.dtype.kind == "b" else np.subtract, later, earlier)
    return a


@rule(np.trace)
def trace(a: object, offset: int = 0, axis1: int = 0, axis2: int = 1) -> ArrayData:
    t = torch.diagonal(array(a).t, offset, axis1, axis2)
    return sum(ArrayData.made(t, sure=False), -1)


@rule(np.round, np.around)
def round(a: object, decimals: int = 0) -> ArrayData:
    a = array(a)
    if a.dtype.kind != "f" or decimals:
        raise unknown("np.round of integers, or with decimals", a)
    return elementwise(np.rint, a)


@rule(np.isclose)
def isclose(
    a: object, b: object, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False
) -> ArrayData:
    x, y = (cast(array(v).t, np.dtype(np.float64)) for v in (a, b))
    same = torch.isfinite(y) & ((x - y).abs() <= atol + rtol * y.abs()) | (x == y)
    if equal_nan:
        same = same | (torch.isnan(x) & torch.isnan(y))
    return made(same, sure=False)


@rule(np.allclose)
def allclose(
    a: object, b: object, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False
) -> bool:
    return bool(isclose(a, b, rtol, atol, equal_nan).t.all())


@rule(np.array_equal)
def array_equal(a1: object, a2: object) -> bool:
    x, y = array(a1), array(a2)
    return x.shape == y.shape and bool(elementwise(np.equal, x, y).t.all())


@rule(np.linalg.norm)
def norm(
    x: object,
    ord: object = None,
    axis: object = None,
    keepdims: bool = False,
) -> ArrayData:
    a = array(x)
    vector = a.t.ndim == 1 or (axis is not None and not isinstance(axis, tuple))
    whole = ord is None and axis is None
    if not whole and not (vector and ord in (None, 1, 2, np.inf)):
        raise unknown("np.linalg.norm of matrices by another norm", a)
    t = a.t if a.dtype.kind == "f" else a.t.to(torch.float64)
    f = ArrayData.made(t, sure=a.contiguous)
    if ord in (1, np.inf):
        reduce = sum if ord == 1 else max
        return reduce(elementwise(np.absolute, f), axis, keepdims=keepdims)
    return elementwise(np.sqrt, sum(elementwise(np.square, f), axis, keepdims=keepdims))


# ---- what makes arrays


def _like(value: float) -> Callable:
    def make(a: object, dtype: object = None) -> ArrayData:
        a = array(a)
        to = torch_dtype(a.dtype if dtype is None else dtype)
        return ArrayData.made(
            torch.full(a.shape, value, dtype=to, device=ON.device), sure=a.contiguous
        )

    return make


rule(np.zeros_like)(_like(0))
rule(np.ones_like)(_like(1))
rule(np.empty_like)(_like(0))


@rule(np.full_like)
def full_like(a: object, fill_value: object, dtype: object = None) -> ArrayData:
    a = array(a)
    return _filled(a.shape, fill_value, np.dtype(dtype or a.dtype), sure=a.contiguous)


def _shape(shape: object) -> tuple[int, ...]:
    return tuple(shape) if isinstance(shape, (tuple, list)) else (shape.__index__(),)


def _filled(shape: object, value: object, dtype: np.dtype, *, sure: bool = True) -> ArrayData:
    if is_weak(value):
        value = int(value) if dtype.kind in "iu" else value
        t = number(value, dtype)
    else:
        t = cast(array(value).t, dtype)
    return ArrayData.made(t.broadcast_to(_shape(shape)).clone().contiguous(), sure=sure)


def zeros(shape: object, dtype: object = float, order: str = "C") -> ArrayData:
    row_major("zeros", order)
    return ArrayData.made(torch.zeros(_shape(shape), dtype=torch_dtype(dtype), device=ON.device))


def ones(shape: object, dtype: object = None, order: str = "C") -> ArrayData:
    row_major("ones", order)
    return ArrayData.made(
        torch.ones(_shape(shape), dtype=torch_dtype(dtype or float), device=ON.device)
    )


def full(shape: object, fill_value: object, dtype: object = None, order: str = "C") -> ArrayData:
    row_major("full", order)
    to = np.dtype(dtype) if dtype is not None else array(fill_value).dtype
    return _filled(shape, fill_value, to)


def eye(N: int, M: int | None = None, k: int = 0, dtype: object = float) -> ArrayData:
    if k:
        raise unknown("np.eye with k")
    return ArrayData.made(
        torch.eye(N, N if M is None else M, dtype=torch_dtype(dtype), device=ON.device)
    )


def identity(n: int, dtype: object = None) -> ArrayData:
    return eye(n, dtype=dtype or float)


def new_array(object: object, dtype: object = None, *, copy: bool = True) -> ArrayData:
    return _as_array(object, dtype, copied=bool(copy))


def asarray(a: object, dtype: object = None) -> ArrayData:
    return _as_array(a, dtype, copied=False)


def ascontiguousarray(a: object, dtype: object = None) -> ArrayData:
    found = _as_array(a, dtype, copied=False)
    if not found.t.ndim:
        return reshape(found, (1,))
    return found if found.contiguous else ArrayData.made(found.t.clone().contiguous())


def _as_array(x: object, dtype: object, *, copied: bool) -> ArrayData:
    if isinstance(x, ArrayData) and not x.scalar:
        if dtype is None or np.dtype(dtype) == x.dtype:
            return copy(x) if copied else x
        return ArrayData.made(cast(x.t, np.dtype(dtype)), sure=x.contiguous)
    found = array(x)
    return ArrayData.made(cast(found.t, np.dtype(dtype or found.dtype)).clone())


# functions that do not ask their arguments: names of numpy's in the step stand for these meanwhile
INSTEAD: dict[Callable, Callable] = {
    np.zeros: zeros,
    np.empty: zeros,
    np.ones: ones,
    np.full: full,
    np.eye: eye,
    np.identity: identity,
    np.array: new_array,
    np.asarray: asarray,
    np.asanyarray: asarray,
    np.ascontiguousarray: ascontiguousarray,
}
