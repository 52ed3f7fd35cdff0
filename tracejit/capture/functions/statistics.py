"""Variance, norms and distances."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from tracejit.capture.functions.arithmetic import add, div, sub
from tracejit.capture.functions.common import (
    Number,
    cast,
    common_shape,
    expand,
    literal,
    normal_axes,
    normal_axis,
    operand,
    operands_as,
    register,
    result_dtype,
)
from tracejit.capture.functions.composites import composed, in_torch
from tracejit.capture.functions.derived import derived, require_float, spread
from tracejit.capture.functions.reduction import attains, keep
from tracejit.capture.functions.selection import clamp_min
from tracejit.capture.functions.spectra import matrix_norm
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import TO_IR, TO_TORCH, Ints, TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Value

Tensor = torch.Tensor
functional = torch.nn.functional


# --- variance ----------------------------------------------------------------------------------


def _mean(t: Trace, x: Value, axes: Ints) -> Value:
    """The mean over axes; over none, x itself."""
    if not axes:
        return t.b.alias(x)
    count = math.prod(x.type.shape[a] for a in axes)
    total = t.b.reduce_sum(x, axes=axes)
    return t.b.div(total, float(count))


def _from_mean(t: Trace, x: Value, axes: Ints) -> Value:
    """x - mean, both less the first value: exactly 0 for equal values, as in torch.

    Source: shifted data, in Chan, Golub, LeVeque, "Algorithms for Computing the Sample Variance".
    The derivatives of the shift add up to 0, so it has none.
    """
    b, shape = t.b, x.type.shape
    if axes and 0 not in shape:
        stops = tuple(1 if i in axes else n for i, n in enumerate(shape))
        with t.untaped():
            first = b.slice(x, starts=(0,) * len(shape), stops=stops, steps=(1,) * len(shape))
            first = expand(t, first, shape)
        x = b.sub(x, first)
    return b.sub(x, spread(t, _mean(t, x, axes), shape, axes))


def _variance(t: Trace, x: Value, axes: Ints, correction: Number, *, root: bool) -> Value:
    """sum((x - mean)²) / (n - correction), or its square root.

    The gradient is 2/(n - correction)·(x - mean)·g, for the root with g/(2·y), 0 where y is 0.
    """
    b, shape = t.b, x.type.shape
    freedom = math.prod(shape[a] for a in axes) - correction
    name = "std" if root else "var"

    def forward(x: Value) -> Value:
        d = _from_mean(t, x, axes)
        squares = b.mul(d, d)
        total = b.reduce_sum(squares, axes=axes) if axes else squares
        y = b.div(total, literal(max(freedom, 0.0), total.type.dtype))
        return b.sqrt(y) if root else y

    def backward(g: Value, y: Value, x: Value) -> Value:
        if root:
            g = b.where(b.eq(y, 0.0), 0.0, b.div(g, b.mul(y, 2.0)))
        slope = 2.0 / freedom if freedom else math.inf
        g = b.mul(g, literal(slope, g.type.dtype))
        return b.mul(spread(t, g, shape, axes), _from_mean(t, x, axes))

    return derived(t, name, (x,), forward, (backward,))


def _statistic(*, root: bool, with_mean: bool) -> Callable:
    def function(
        t: Trace,
        input: Tensor,
        dim: object = None,
        unbiased: bool | None = None,
        keepdim: bool = False,
        *,
        correction: Number | None = None,
    ) -> object:
        if isinstance(dim, bool):
            dim, unbiased = None, dim
        if correction is None:
            correction = 1 if unbiased is None else int(unbiased)
        h = t.lift(input)
        x = t.read(h)
        if not x.type.dtype.is_float:
            raise t.shape_error("std and var only support floating point and complex dtypes")
        axes = normal_axes(t, dim, len(h.shape))
        y = _variance(t, x, axes, correction, root=root)
        kept = keep(t, y, h.shape, axes, keepdim)
        if root:  # whose derivative reads the result
            t.saves(y, kept)
        y = t.fresh(kept)
        if not with_mean:
            return y
        mean = derived(t, "mean", (x,), lambda x: _mean(t, x, axes))
        return y, t.fresh(keep(t, mean, h.shape, axes, keepdim))

    return function


register(("var",), _statistic(root=False, with_mean=False), inplace=False)
register(("std",), _statistic(root=True, with_mean=False), inplace=False)
register(("var_mean",), _statistic(root=False, with_mean=True), inplace=False)
register(("std_mean",), _statistic(root=True, with_mean=True), inplace=False)


# --- norms -------------------------------------------------------------------------------------


def _norm_forward(t: Trace, x: Value, p: float, axes: Ints) -> Value:
    b = t.b
    size = b.abs(x)

    def total(v: Value) -> Value:
        return b.reduce_sum(v, axes=axes) if axes else b.alias(v)

    if p in (math.inf, -math.inf):
        if not axes:
            return size
        return (b.reduce_max if p > 0 else b.reduce_min)(size, axes=axes)
    if p == 0:
        return total(b.cast(b.ne(x, 0.0), dtype=x.type.dtype))
    if p == 1:
        return total(size)
    if p == 2:
        return b.sqrt(total(b.mul(x, x)))
    return b.pow(total(b.pow(size, p)), 1.0 / p)


def _norm_backward(t: Trace, g: Value, y: Value, x: Value, p: float, axes: Ints) -> Value | None:
    """torch's derivative: of norm 0 it is 0, of the largest element shared among equals."""
    b, shape = t.b, x.type.shape

    def over(v: Value) -> Value:
        return spread(t, v, shape, axes)

    if p == 0:
        return None
    if p == 1:
        return b.mul(b.sign(x), over(g))
    if p == 2:
        return b.mul(x, over(b.where(b.eq(y, 0.0), 0.0, b.div(g, y))))
    if p in (math.inf, -math.inf):
        top, size = over(y), b.abs(x)
        ones = b.cast(attains(t, size, top), dtype=x.type.dtype)
        count = b.reduce_sum(ones, axes=axes) if axes else ones
        return b.mul(b.mul(b.sign(x), ones), over(b.div(g, count)))
    if p < 2:
        scaled = b.mul(b.sign(x), b.pow(b.abs(x), p - 1))
    else:
        scaled = b.mul(x, b.pow(b.abs(x), p - 2))
    if p < 1:
        scaled = b.where(b.eq(x, 0.0), 0.0, scaled)
        return b.mul(b.mul(scaled, over(g)), over(b.pow(y, 1 - p)))
    return b.mul(scaled, over(b.where(b.eq(y, 0.0), 0.0, b.div(g, b.pow(y, p - 1)))))


def vector_norm(
    t: Trace,
    x: Tensor,
    ord: float = 2,
    dim: object = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> TracedTensor:
    """(sum |x|^p)^(1/p) over the given axes, or all."""
    h = t.lift(x)
    value = t.read(h)
    if dtype is not None:
        given = TO_TORCH[h.dtype]
        if dtype.is_floating_point and torch.promote_types(given, dtype) is not dtype:
            raise t.shape_error(
                f"linalg.vector_norm: the dtype of the input ({given}) should be convertible "
                f"without narrowing to the specified dtype ({dtype})"
            )
        value = cast(t, value, TO_IR[dtype])
    require_float(t, "linalg_vector_norm", value, checked=True)
    axes, p = normal_axes(t, dim, len(h.shape)), float(ord)
    if (p < 0 or p == math.inf) and any(h.shape[a] == 0 for a in axes):
        raise t.shape_error(f"linalg.vector_norm cannot compute the {p} norm on an empty dimension")
    y = derived(
        t,
        "linalg_vector_norm",
        (value,),
        lambda x: _norm_forward(t, x, p, axes),
        (lambda g, y, x: _norm_backward(t, g, y, x, p, axes),),
    )
    return t.fresh(keep(t, y, h.shape, axes, keepdim))


@rule(torch.linalg.vector_norm)
def _linalg_vector_norm(t: Trace, x: Tensor, *args: object, **kwargs: object) -> TracedTensor:
    return vector_norm(t, x, *args, **kwargs)


@composed(torch.linalg.norm)
def linalg_norm(
    t: Trace,
    A: Tensor,
    ord: object = None,
    dim: object = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> TracedTensor:
    """The vector norm, or that of matrices where an order is given for two axes."""
    over = len(dim) if isinstance(dim, (tuple, list)) else 1
    rank = len(t.lift(A).shape)
    if ord is not None and (over == 2 or dim is None):
        if dim is None and rank not in (1, 2):
            raise t.shape_error(
                f"linalg.norm: If dim is not specified but ord is, the input must be 1D or 2D. Got "
                f"{rank}D."
            )
        if rank > 1 or dim is not None:
            return matrix_norm(t, A, ord, dim or (0, 1), keepdim, dtype=dtype)
    return vector_norm(t, A, 2 if ord is None else ord, dim, keepdim, dtype=dtype)


@rule(torch.norm, Tensor.norm)
def norm(
    t: Trace,
    input: Tensor,
    p: object = "fro",
    dim: object = None,
    keepdim: bool = False,
    out: object = None,
    dtype: torch.dtype | None = None,
) -> TracedTensor:
    """vector_norm, as torch.norm calls it."""
    if out is not None:
        raise t.unsupported("Use torch.linalg.vector_norm, without out=")
    if p == "nuc":
        return _nuclear(t, input, dim, keepdim, dtype)
    p = 2.0 if p in ("fro", None) else p
    return vector_norm(t, input, p, dim, keepdim, dtype=dtype)


@in_torch
def _nuclear(
    t: Trace, input: Tensor, dim: object, keepdim: bool, dtype: torch.dtype | None
) -> Tensor:
    return matrix_norm(t, input, "nuc", (0, 1) if dim is None else dim, keepdim, dtype=dtype)


@rule(functional.normalize)
def normalize(
    t: Trace,
    input: Tensor,
    p: float = 2.0,
    dim: object = 1,
    eps: float = 1e-12,
    out: object = None,
) -> TracedTensor:
    """x / max(‖x‖, eps)."""
    if out is not None:
        raise t.unsupported("out= has no rule")
    return div(t, input, clamp_min(t, norm(t, input, p, dim, True), eps))


# --- distances ---------------------------------------------------------------------------------


@rule(torch.cosine_similarity)
def cosine_similarity(
    t: Trace, x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-08
) -> TracedTensor:
    """sum(x1/‖x1‖ · x2/‖x2‖), norms not below eps; their gradient ignores that bound."""
    operands = [operand(t, x) for x in (x1, x2)]
    dtype, shape, b = result_dtype(operands), common_shape(t, operands), t.b
    if not dtype.is_float:
        raise t.shape_error("expected common dtype to be floating point")
    axis = normal_axis(t, dim, len(shape))
    axes = (axis,) if shape else ()
    bound = literal(eps, dtype)

    def unit(x: Value) -> Value:
        size = derived(
            t,
            "linalg_vector_norm",
            (x,),
            lambda x: _norm_forward(t, x, 2.0, axes),
            (lambda g, y, x: _norm_backward(t, g, y, x, 2.0, axes),),
        )
        size = derived(t, "clamp_min", (size,), lambda n: b.maximum(n, bound), (lambda g, y, n: g,))
        return b.div(x, spread(t, size, shape, axes))

    left, right = (unit(x) for x in operands_as(t, operands, dtype, shape))
    product = b.mul(left, right)
    return t.fresh(b.reduce_sum(product, axes=axes) if axes else product)


@rule(torch.pairwise_distance)
def pairwise_distance(
    t: Trace, x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-06, keepdim: bool = False
) -> TracedTensor:
    """‖x1 - x2 + eps‖ over the last axis."""
    return vector_norm(t, add(t, sub(t, x1, x2), eps), p, -1, keepdim)


@rule(torch.dist, Tensor.dist)
def dist(t: Trace, input: Tensor, other: Tensor, p: float = 2) -> TracedTensor:
    """‖input - other‖ of all elements."""
    return vector_norm(t, sub(t, input, other), p)
