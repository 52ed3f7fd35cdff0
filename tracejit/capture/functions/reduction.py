"""Reductions over axes: sum, mean, amax, amin, max, min, any, all."""

from __future__ import annotations

import math

import torch

from tracejit.capture.functions.arithmetic import maximum, minimum, sub
from tracejit.capture.functions.common import (
    cast,
    normal_axes,
    register,
)
from tracejit.capture.functions.unary import FUNCTIONS
from tracejit.capture.table import rule
from tracejit.capture.tensor import TO_IR, Ints, TracedTensor
from tracejit.capture.tracer import Tracer
from tracejit.ir.graph import Value
from tracejit.ir.types import b1, i64, u8

Tensor = torch.Tensor


def keep(t: Tracer, value: Value, shape: Ints, axes: Ints, keepdim: bool) -> Value:
    """Put the reduced axes back with extent 1 when the caller asked for it."""
    if not keepdim:
        return value
    kept = tuple(1 if i in axes else n for i, n in enumerate(shape))
    return t.b.reshape(value, shape=kept)


def _sum(t: Tracer, x: Value, axes: Ints) -> Value:
    return t.b.reduce_sum(x, axes=axes) if axes else t.b.alias(x)


def sum_(
    t: Tracer,
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
    axes = normal_axes(t, dim, len(handle.shape))
    value = _sum(t, cast(t, t.read(handle), into), axes)
    return t.fresh(keep(t, value, handle.shape, axes, keepdim))


def mean(
    t: Tracer,
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
    def reduce(t: Tracer, input: Tensor, dim: object = (), keepdim: bool = False) -> TracedTensor:
        handle = t.lift(input)
        axes = normal_axes(t, dim, len(handle.shape))
        if any(handle.shape[a] == 0 for a in axes):
            raise t.shape_error("Expected reduction dim to have non-zero size")
        x = t.read(handle)
        value = getattr(t.b, f"reduce_{name}")(x, axes=axes) if axes else t.b.alias(x)
        return t.fresh(keep(t, value, handle.shape, axes, keepdim))

    return reduce


amax, amin = _extremum("max"), _extremum("min")


def _max_or_min(whole, elementwise):
    def either(t: Tracer, input: Tensor, other: object = None, **rest: object) -> TracedTensor:
        if isinstance(other, Tensor):
            return elementwise(t, input, other)
        if other is None and not rest:
            return whole(t, input)
        raise t.unsupported("max and min along a dim (with indices) have no rule; use amax or amin")

    return either


def _boolean(name: str):
    """any and all, as the maximum and minimum of truth values."""

    def reduce(t: Tracer, input: Tensor, dim: object = None, keepdim: bool = False) -> TracedTensor:
        handle = t.lift(input)
        axes = normal_axes(t, dim, len(handle.shape))
        x = t.read(handle)
        truth = x if handle.dtype is b1 else t.b.ne(x, 0.0 if handle.dtype.is_float else 0)
        if any(handle.shape[a] == 0 for a in axes):
            shape = tuple(n for i, n in enumerate(handle.shape) if i not in axes)
            value = t.b.full(name == "min", shape=shape, dtype=b1, device=handle.device)
        elif axes:
            value = getattr(t.b, f"reduce_{name}")(truth, axes=axes)
        else:
            value = t.b.alias(truth)
        value = cast(t, value, u8) if handle.dtype is u8 else value
        return t.fresh(keep(t, value, handle.shape, axes, keepdim))

    return reduce


register(("sum",), sum_, inplace=False)
register(("mean",), mean, inplace=False)
register(("amax",), amax, inplace=False)
register(("amin",), amin, inplace=False)
register(("max",), _max_or_min(amax, maximum), inplace=False)
register(("min",), _max_or_min(amin, minimum), inplace=False)
register(("any",), _boolean("max"), inplace=False)
register(("all",), _boolean("min"), inplace=False)


@rule(torch.nn.functional.mse_loss)
def mse_loss(
    t: Tracer,
    input: Tensor,
    target: Tensor,
    size_average: object = None,
    reduce: object = None,
    reduction: str = "mean",
    weight: object = None,
) -> TracedTensor:
    """Mean, sum, or none of (input - target)²; its gradient is 2·(input - target)·g (·1/n)."""
    if size_average is not None or reduce is not None or weight is not None:
        raise t.unsupported("Use reduction='mean', 'sum' or 'none'")
    squared = FUNCTIONS["square"](t, sub(t, input, target))
    if reduction == "none":
        return squared
    if reduction not in ("mean", "sum"):
        raise t.shape_error(f"{reduction} is not a valid value for reduction")
    return (mean if reduction == "mean" else sum_)(t, squared)
