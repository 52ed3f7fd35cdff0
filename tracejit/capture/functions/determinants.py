"""Determinants, by LU, and the exponential of matrices."""

from __future__ import annotations

import numpy as np
import torch

from tracejit.capture.functions.decompositions import diagonal, empty, identity, lu_parts, matrix
from tracejit.capture.functions.derived import derived
from tracejit.capture.functions.products import halved
from tracejit.capture.functions.solutions import factored, solved
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import TO_TORCH, TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Value
from tracejit.ir.ops.matrix_derivatives import along
from tracejit.ir.types import i64

Tensor = torch.Tensor
_types = torch.return_types

# --- determinants ------------------------------------------------------------------------------


def _product(t: Trace, x: Value) -> Value:
    """The product of the last axis."""
    rank = len(x.type.shape)
    return t.b.reshape(halved(t, x, rank - 1), shape=x.type.shape[:-1])


def _sign(t: Trace, swaps: Value) -> Value:
    """Of the permutation: each swap of two rows turns it."""
    b, shape = t.b, swaps.type.shape
    like = swaps.type
    own = b.iota(axis=len(shape) - 1, shape=shape, dtype=like.dtype, device=like.device)
    moved = b.ne(swaps, b.add(own, 1.0))
    minus = b.full(-1.0, shape=shape, dtype=like.dtype, device=like.device)
    return _product(t, b.where(moved, minus, 1.0))


def _over_diagonal(t: Trace, v: Value, x: Value) -> Value:
    """Matrices with one number of each along the diagonal."""
    shape = x.type.shape
    wide = t.b.reshape(v, shape=(*v.type.shape, 1))
    row = along(t.b, t.b.expand(wide, shape=shape[:-1]), shape, -2)
    return t.b.mul(identity(t, x, shape), row)


def _determinant(t: Trace, x: Value) -> Value:
    n = x.type.shape[-1]
    flat = factored(t, x)
    b = t.b

    def forward(x: Value) -> Value:
        both, swaps, _ = lu_parts(t, flat, n, n)
        return b.mul(_product(t, diagonal(t, both)), _sign(t, swaps))

    def backward(g: Value, y: Value, x: Value) -> Value:
        """g·y·A⁻ᵀ; by torch's factors where one of the pivots is zero."""
        with t.untaped(), t.unchecked():
            own = b.iota(
                axis=len(flat.type.shape) - 1,
                shape=flat.type.shape,
                dtype=i64,
                device=flat.type.device,
            )
            of_diagonal = b.and_(b.lt(own, n * n), b.eq(b.mod(own, n + 1), 0))
            eps = float(np.finfo(x.type.dtype.compute).eps)
            mended = b.where(b.and_(of_diagonal, b.eq(flat, 0.0)), eps, flat)
        return solved(t, x, mended, _over_diagonal(t, b.mul(g, y), x), True)

    return derived(t, "linalg_det", (x,), forward, (backward,))


@rule(torch.linalg.det, torch.det, Tensor.det)
def det(t: Trace, A: Tensor) -> TracedTensor:
    h = matrix(t, A, "linalg.det", square=True, empty="floats")
    x = t.read(h)
    return t.fresh(_determinant(t, x) if h.numel else empty(t, x, h.shape[:-2], 1.0))


def _slogdet(t: Trace, A: Tensor, name: str) -> tuple[Value, Value]:
    h = matrix(t, A, name, square=True)
    x, b, n = t.read(h), t.b, h.shape[-1]
    if not h.numel:
        return empty(t, x, h.shape[:-2], 1.0), empty(t, x, h.shape[:-2])
    flat = factored(t, x)
    with t.untaped():
        both, swaps, _ = lu_parts(t, flat, n, n)
        pivots = diagonal(t, both)
        sign = b.mul(_product(t, b.sign(pivots)), _sign(t, swaps))

    def forward(x: Value) -> Value:
        return b.reduce_sum(b.log(b.abs(pivots)), axes=(len(pivots.type.shape) - 1,))

    def backward(g: Value, y: Value, x: Value) -> Value:
        return solved(t, x, flat, _over_diagonal(t, g, x), True)

    logarithm = derived(t, "linalg_slogdet", (x,), forward, (backward,))
    return t.unread(sign, x), logarithm


@rule(torch.linalg.slogdet)
def linalg_slogdet(t: Trace, A: Tensor) -> object:
    return _types.linalg_slogdet(tuple(map(t.fresh, _slogdet(t, A, "linalg.slogdet"))))


@rule(torch.slogdet, Tensor.slogdet)
def slogdet(t: Trace, input: Tensor) -> object:
    return _types.slogdet(tuple(map(t.fresh, _slogdet(t, input, "slogdet"))))


@rule(torch.logdet, Tensor.logdet)
def logdet(t: Trace, input: Tensor) -> TracedTensor:
    """NaN of a negative determinant."""
    sign, logarithm = _slogdet(t, input, "logdet")
    return t.fresh(t.b.where(t.b.eq(sign, -1.0), float("nan"), logarithm))


# --- the exponential ---------------------------------------------------------------------------


@rule(torch.linalg.matrix_exp, torch.matrix_exp, Tensor.matrix_exp)
def matrix_exp(t: Trace, A: Tensor) -> TracedTensor:
    h = matrix(t, A, "linalg.matrix_exp", square=True, takes="floats")
    x = t.read(h)
    if not h.numel:
        return t.fresh(empty(t, x, h.shape))
    if h.dtype.narrow:
        raise t.unsupported(
            f"Eager's numbers in {TO_TORCH[h.dtype]} are not the exponential; cast to float32"
        )
    return t.fresh(t.b.expm(x))
