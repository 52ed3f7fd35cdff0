"""Reductions over axes: sum, mean, amax, amin, any, all; max and min of everything."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from tracejit.capture.functions.common import (
    cast,
    expand,
    normal_axes,
    register,
    truth,
)
from tracejit.capture.trace import location
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import TO_IR, Ints, TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.errors import AxisError
from tracejit.ir.graph import Builder, Value
from tracejit.ir.types import b1, i64, u8

Tensor = torch.Tensor


def keep(t: Trace, value: Value, shape: Ints, axes: Ints, keepdim: bool) -> Value:
    """Put the reduced axes back with extent 1 when the caller asked for it."""
    if not keepdim:
        return value
    kept = tuple(1 if i in axes else n for i, n in enumerate(shape))
    return t.b.reshape(value, shape=kept)


def _sum(t: Trace, x: Value, axes: Ints) -> Value:
    return t.b.reduce_sum(x, axes=axes) if axes else t.b.alias(x)


def sum_(
    t: Trace,
    input: Tensor,
    dim: object = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> TracedTensor:
    handle = t.lift(input)
    into = TO_IR[dtype] if dtype is not None else handle.dtype
    if dtype is None and not into.is_float:
        into = i64
    if handle.dtype.is_float and not into.is_float and t.grad_on and t.requires_grad(handle):
        raise t.autograd_error(f"Autograd not support dtype: {dtype}")
    axes = normal_axes(t, dim, len(handle.shape))
    value = _sum(t, cast(t, t.read(handle), into), axes)
    return t.fresh(keep(t, value, handle.shape, axes, keepdim))


def mean(
    t: Trace,
    input: Tensor,
    dim: object = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> TracedTensor:
    """The sum divided by the count, as torch computes it."""
    handle = t.lift(input)
    into = TO_IR[dtype] if dtype is not None else handle.dtype
    if not into.is_float:
        raise t.shape_error(
            "mean(): could not infer output dtype. Input dtype must be either a floating point or "
            "complex dtype"
        )
    axes = normal_axes(t, dim, len(handle.shape))
    count = math.prod(handle.shape[a] for a in axes)
    total = _sum(t, cast(t, t.read(handle), into), axes)
    value = t.b.div(total, float(count)) if count else t.b.div(t.b.mul(total, 0.0), 0.0)
    return t.fresh(keep(t, value, handle.shape, axes, keepdim))


def _extremum(name: str):
    def reduce(t: Trace, input: Tensor, dim: object = (), keepdim: bool = False) -> TracedTensor:
        handle = t.lift(input)
        axes = normal_axes(t, dim, len(handle.shape))
        if any(handle.shape[a] == 0 for a in axes):
            if dim == ():
                raise t.shape_error("Expected reduction dim to be specified for an empty input")
            raise AxisError(
                where=location.full(),
                reason=f"a{name}: Expected reduction dim to have non-zero size",
            )
        x = t.read(handle)
        if not axes:
            return t.fresh(_only(t, f"a{name}", x))
        value = getattr(t.b, f"reduce_{name}")(x, axes=axes)
        kept = keep(t, value, handle.shape, axes, keepdim)
        t.saves(value, kept)
        return t.fresh(kept)

    return reduce


def _only(t: Trace, name: str, x: Value) -> Value:
    """The extremum of one element: the derivative asks whether x attains it, as for several."""
    with t.untaped():
        y = t.b.alias(x)

    def vjp(b: Builder, cts: tuple, need: tuple) -> tuple:
        hit = b.cast(b.eq(x, y), dtype=x.type.dtype)
        return (b.mul(hit, b.div(cts[0], hit)),)

    return t.derive(name, (x,), y, vjp)


amax, amin = _extremum("max"), _extremum("min")


def attains(t: Trace, x: Value, top: Value) -> Value:
    """Whether elements equal an extremum; NaN equals NaN."""
    hit = t.b.eq(x, top)
    if not x.type.dtype.is_float:
        return hit
    return t.b.or_(hit, t.b.and_(t.b.ne(x, x), t.b.ne(top, top)))


def shared(t: Trace, x: Value, y: Value, axes: Ints) -> Callable:
    """torch's derivative of one element of all, y: those that equal it share the gradient."""

    def vjp(b: Builder, cts: tuple, need: tuple) -> tuple:
        hit = attains(t, x, expand(t, y, x.type.shape))
        ones = b.cast(hit, dtype=x.type.dtype)
        count = b.reduce_sum(ones, axes=axes) if axes else ones
        return (b.mul(ones, expand(t, b.div(cts[0], count), x.type.shape)),)

    return vjp


def whole(name: str):
    """max() and min() of all elements: the gradient is shared by those that attain it, NaN too."""

    def reduce(t: Trace, input: Tensor) -> TracedTensor:
        handle = t.lift(input)
        if not handle.numel:
            raise t.shape_error("Expected reduction dim to be specified for input.numel() == 0")
        x, axes = t.read(handle), tuple(range(len(handle.shape)))
        with t.untaped():
            y = getattr(t.b, f"reduce_{name}")(x, axes=axes) if axes else t.b.alias(x)

        return t.fresh(t.derive(name, (x,), y, shared(t, x, y, axes)))

    return reduce


def _boolean(name: str):
    """any and all, as the maximum and minimum of truth values."""

    def reduce(t: Trace, input: Tensor, dim: object = None, keepdim: bool = False) -> TracedTensor:
        handle = t.lift(input)
        axes = normal_axes(t, dim, len(handle.shape)) if dim not in ((), []) else ()
        x = t.read(handle)
        found = truth(t, x)
        if any(handle.shape[a] == 0 for a in axes):
            shape = tuple(n for i, n in enumerate(handle.shape) if i not in axes)
            value = t.b.full(name == "min", shape=shape, dtype=b1, device=handle.device)
        elif axes:
            value = getattr(t.b, f"reduce_{name}")(found, axes=axes)
        else:
            value = t.b.alias(found)
        value = cast(t, value, u8) if handle.dtype is u8 else value
        return t.fresh(keep(t, value, handle.shape, axes, keepdim))

    return reduce


register(("sum",), sum_, inplace=False)
register(("mean",), mean, inplace=False)
register(("amax",), amax, inplace=False)
register(("amin",), amin, inplace=False)
register(("any",), _boolean("max"), inplace=False)
register(("all",), _boolean("min"), inplace=False)
rule(torch._is_any_true)(_boolean("max"))
rule(torch._is_all_true)(_boolean("min"))
