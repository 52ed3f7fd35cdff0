"""Distances of all pairs of rows, and rows scaled to a length: cdist, pdist, renorm."""

from __future__ import annotations

import torch

from tracejit.capture.functions.common import in_place, normal_axis
from tracejit.capture.functions.composites import composed, in_torch
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import broadcast_shape
from tracejit.capture.trace.trace import Trace
from tracejit.ir.types import f32, f64

Tensor = torch.Tensor
BY_PRODUCT = 25  # rows from which on torch computes Euclidean distances by a matrix product


def _check(t: Trace, name: str, p: float, *xs: Tensor) -> None:
    for x in xs:
        if t.lift(x).dtype not in (f32, f64):
            raise t.not_implemented(name, t.lift(x).dtype)
    if p < 0:
        raise t.shape_error(f"{name} only supports non-negative p values")


@composed(torch._C._VariableFunctions.cdist)
def cdist(
    t: Trace, x1: Tensor, x2: Tensor, p: float = 2, compute_mode: int | None = None
) -> Tensor:
    """‖x1[i] - x2[j]‖ for all i and j."""
    a, b = t.lift(x1).shape, t.lift(x2).shape
    if len(a) < 2 or len(b) < 2:
        raise t.shape_error("cdist only supports at least 2D tensors")
    if a[-1] != b[-1]:
        raise t.shape_error(f"X1 and X2 must have the same number of columns: {a[-1]} {b[-1]}")
    if broadcast_shape([a[:-2], b[:-2]]) is None:
        raise t.shape_error("cdist: the batches of X1 and X2 do not broadcast")
    _check(t, "cdist", p, x1, x2)
    if t.lift(x1).dtype is not t.lift(x2).dtype:
        raise t.shape_error("cdist: X1 and X2 must have the same dtype")
    large = not compute_mode and (a[-2] > BY_PRODUCT or b[-2] > BY_PRODUCT)
    if p == 2 and (large or compute_mode == 1) and a[-1]:
        return _euclidean(x1, x2)
    out = torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)
    return _depends(t, out, x1, x2) if p == 0 else out


def _depends(t: Trace, out: Tensor, *xs: Tensor) -> Tensor:
    """A tensor as one that depends on others, with derivative zero."""
    value = t.read(t.lift(out))
    for x in xs:
        value = t.unread(value, t.read(t.lift(x)))
    return t.fresh(value)


def _euclidean(x: Tensor, y: Tensor) -> Tensor:
    """√(x² - 2·x·y + y²) by one product; its gradient at 0 is 0."""
    first, second = (v.pow(2).sum(-1, keepdim=True) for v in (x, y))
    left = torch.cat([x * -2, first, torch.ones_like(first)], -1)
    right = torch.cat([y, torch.ones_like(second), second], -1)
    square = left.matmul(right.mT).clamp_min(0)
    apart = square > 0
    return torch.where(apart, torch.where(apart, square, 1.0).sqrt(), 0.0)


@composed(torch.pdist)
def pdist(t: Trace, input: Tensor, p: float = 2) -> Tensor:
    """‖x[i] - x[j]‖ for i < j."""
    shape = t.lift(input).shape
    if len(shape) != 2:
        raise t.shape_error(f"pdist only supports 2D tensors, got: {len(shape)}D")
    _check(t, "pdist", p, input)
    n = shape[0]
    if n < 2:
        return _depends(t, input.new_zeros(0), input)
    i, j = torch.triu_indices(n, n, 1, device=input.device).unbind()
    out = torch.linalg.vector_norm(input[i] - input[j], p, -1)
    return _depends(t, out, input) if p == 0 else out


def _renorm(t: Trace, input: Tensor, p: float, dim: int, maxnorm: float) -> Tensor:
    """Slices along a dim, scaled down to the norm `maxnorm` where theirs is larger."""
    h = t.lift(input)
    if len(h.shape) < 2:
        raise t.shape_error(f"renorm: input needs at least 2 dimensions, got {len(h.shape)}")
    if not h.dtype.is_float:
        raise t.shape_error("renorm expects a floating point or complex tensor")
    if not p > 0:
        raise t.shape_error("renorm: non-positive-norm not supported")
    if not maxnorm >= 0:
        raise t.shape_error("renorm: expected maxnorm to be >= 0")
    axis = normal_axis(t, dim, len(h.shape))
    others = tuple(k for k in range(len(h.shape)) if k != axis)
    dtype = torch.float32 if h.dtype.narrow else None
    size = torch.linalg.vector_norm(input, p, others, keepdim=True, dtype=dtype)
    factor = torch.where(size > maxnorm, maxnorm / (size + 1e-7), 1.0)
    return (input * factor).to(input.dtype).contiguous()


_run = in_torch(_renorm, kernel=True)
rule(torch.renorm, Tensor.renorm)(_run)
rule(Tensor.renorm_)(in_place(_run))
