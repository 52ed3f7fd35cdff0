"""Decompositions of matrices and solutions by them: calls of LAPACK, made by the host.

All take matrices in the last two axes, batched, in float32 or float64, and have one result. What
has several parts lies flat, matrix by matrix; `parts` says where, and a slice costs nothing:

    cholesky           L of A = L·Lᵀ, of whose lower triangle it is; NaN from the column on in which
                       A turns out not to be positive definite
    triangular_solve   X of A·X = B, or Aᵀ·X = B, of one triangle of A
    lu                 L and U in one matrix; the rows that LAPACK swapped, counted from 1; and the
                       rows of A in their new order: A[order] = L·U
    lu_solve           X of A·X = B, or Aᵀ·X = B, by lu(A): who emits it knows the derivatives
    qr                 Q and R
    geqrf              R and below it the vectors of Householder's reflections; their factors
    eigh               eigenvalues, ascending; and eigenvectors, as columns. Of one triangle
    svd                U, the singular values, descending, and Vᵀ
    expm               the exponential

A decomposition that does not converge is NaN. The exponential is by Higham 2005, The
scaling and squaring method for the matrix exponential revisited, in float64. The derivatives stand
in `matrix_derivatives`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tracejit.ir.ops.matrix_derivatives import (
    parts,
    underived,
    vjp_cholesky,
    vjp_eigh,
    vjp_expm,
    vjp_lu,
    vjp_qr,
    vjp_svd,
    vjp_triangular_a,
    vjp_triangular_b,
)
from tracejit.ir.ops.record import ULPS, Op, require, require_tensor
from tracejit.ir.types import Type, f32, f64

Ints = tuple[int, ...]

FAMILY = "matrices"
THETA = 5.371920351148152  # norms up to which the approximant of degree 13 is as good as float64
PADE = (
    *(64764752532480000.0, 32382376266240000.0, 7771770303897600.0, 1187353796428800.0),
    *(129060195264000.0, 10559470521600.0, 670442572800.0, 33522128640.0, 1323241920.0),
    *(40840800.0, 960960.0, 16380.0, 182.0, 1.0),
)


def _is_matrix(name: str, x: Type, *, square: bool = False) -> None:
    require_tensor(name, x)
    fits = len(x.shape) >= 2 and x.dtype in (f32, f64) and 0 not in x.shape
    require(fits and (not square or x.shape[-1] == x.shape[-2]), f"{name} of {x}")


def _infer_same(a: Type) -> Type:
    _is_matrix("a function", a, square=True)
    return a


def _flat(name: str, *, square: bool = False) -> Callable[..., Type]:
    def infer(a: Type, **attrs: object) -> Type:
        _is_matrix(name, a, square=square)
        total = sum(map(math.prod, parts(name, *a.shape[-2:], **attrs)))
        return Type(a.dtype, (*a.shape[:-2], total), a.device)

    return infer


def _infer_solve(a: Type, b: Type) -> Type:
    _is_matrix("a solution", a, square=True)
    _is_matrix("a solution", b)
    fits = a.shape[:-1] == b.shape[:-1] and (a.dtype, a.device) == (b.dtype, b.device)
    require(fits, f"a solution of {a} for {b}")
    return b


def _infer_triangular(a: Type, b: Type, *, upper: bool, transposed: bool, unit: bool) -> Type:
    return _infer_solve(a, b)


def _infer_lu_solve(factors: Type, b: Type, *, transposed: bool) -> Type:
    _is_matrix("a solution", b)
    n = b.shape[-2]
    require(factors == Type(b.dtype, (*b.shape[:-2], n * n + 2 * n), b.device), "factors of others")
    return b


def _infer_qr(a: Type, *, complete: bool) -> Type:
    return _flat("qr")(a, complete=complete)


def _infer_eigh(a: Type, *, lower: bool, vectors: bool) -> Type:
    return _flat("eigh", square=True)(a, vectors=vectors)


def _infer_svd(a: Type, *, full: bool, vectors: bool) -> Type:
    return _flat("svd")(a, full=full, vectors=vectors)


# ---- by numpy


def _each(function: Callable, a: np.ndarray, shapes: tuple[Ints, ...]) -> np.ndarray:
    """The results of a function of one matrix, or of a batch of them, flat: NaN where it raises."""
    batch = a.shape[:-2]
    total = sum(map(math.prod, shapes))
    try:
        found = function(a)
    except np.linalg.LinAlgError:
        rows = []
        for matrix in a.reshape(-1, *a.shape[-2:]):
            try:
                rows.append(np.concatenate([np.ravel(x) for x in function(matrix)]))
            except np.linalg.LinAlgError:
                rows.append(np.full(total, np.nan, a.dtype))
        return np.reshape(rows, (*batch, total))
    return np.concatenate([x.reshape(*batch, math.prod(x.shape[len(batch) :])) for x in found], -1)


def _eval_cholesky(a: np.ndarray) -> np.ndarray:
    try:
        return np.linalg.cholesky(a)
    except np.linalg.LinAlgError:
        pass
    out = np.tril(a).astype(np.float64)
    for j in range(a.shape[-1]):
        row = out[..., j, :j]
        pivot = out[..., j, j] - np.sum(row * row, -1)
        root = np.sqrt(np.where(pivot > 0, pivot, np.nan))
        below = out[..., j:, j] - (out[..., j:, :j] @ row[..., None])[..., 0]
        out[..., j:, j] = below / root[..., None]
    return out.astype(a.dtype)


def _eval_triangular(
    a: np.ndarray, b: np.ndarray, *, upper: bool, transposed: bool, unit: bool
) -> np.ndarray:
    if transposed:
        a, upper = a.swapaxes(-1, -2), not upper
    n, x = a.shape[-1], b.astype(np.float64)
    for i in reversed(range(n)) if upper else range(n):
        known = slice(i + 1, n) if upper else slice(0, i)
        x[..., i, :] -= (a[..., i : i + 1, known] @ x[..., known, :])[..., 0, :]
        if not unit:
            x[..., i, :] /= a[..., i, i, None]
    return x.astype(b.dtype)


def _eval_lu(a: np.ndarray) -> np.ndarray:
    (m, n), batch = a.shape[-2:], a.shape[:-2]
    work = a.reshape(-1, m, n).astype(np.float64)
    count, k = len(work), min(m, n)
    pivots, order = np.zeros((count, k)), np.tile(np.arange(m), (count, 1))
    each = np.arange(count)
    for j in range(k):
        best = j + np.argmax(np.abs(work[:, j:, j]), -1)
        pivots[:, j] = best + 1
        for x in (work, order):
            x[each, j], x[each, best] = x[each, best].copy(), x[each, j].copy()
        pivot = work[:, j, j, None]
        work[:, j + 1 :, j] /= np.where(pivot == 0, 1.0, pivot)
        work[:, j + 1 :, j + 1 :] -= work[:, j + 1 :, j, None] * work[:, j, None, j + 1 :]
    flat = np.concatenate([work.reshape(count, m * n), pivots, order], -1)
    return flat.reshape(*batch, -1).astype(a.dtype)


def _eval_lu_solve(factors: np.ndarray, b: np.ndarray, *, transposed: bool) -> np.ndarray:
    n = b.shape[-2]
    both = factors[..., : n * n].reshape(*b.shape[:-1], n)
    order = factors[..., -n:]
    order = np.where((order >= 0) & (order < n), order, 0).astype(np.int64)[..., None]
    how = {"transposed": transposed}
    if not transposed:
        x = np.take_along_axis(b, order, -2)
        x = _eval_triangular(both, x, upper=False, unit=True, **how)
        return _eval_triangular(both, x, upper=True, unit=False, **how)
    x = _eval_triangular(both, b, upper=True, unit=False, **how)
    x = _eval_triangular(both, x, upper=False, unit=True, **how)
    found = np.zeros_like(x)
    np.put_along_axis(found, np.broadcast_to(order, x.shape), x, -2)
    return found


def _eval_qr(a: np.ndarray, *, complete: bool) -> np.ndarray:
    mode = "complete" if complete else "reduced"
    shapes = parts("qr", *a.shape[-2:], complete=complete)
    return _each(lambda x: np.linalg.qr(x, mode), a, shapes).astype(a.dtype)


def _eval_geqrf(a: np.ndarray) -> np.ndarray:
    def run(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        vectors, factors = np.linalg.qr(x, "raw")
        return np.ascontiguousarray(vectors.swapaxes(-1, -2)), factors

    return _each(run, a, parts("geqrf", *a.shape[-2:])).astype(a.dtype)


def _eval_eigh(a: np.ndarray, *, lower: bool, vectors: bool) -> np.ndarray:
    half = "L" if lower else "U"

    def run(x: np.ndarray) -> tuple:
        return np.linalg.eigh(x, half) if vectors else (np.linalg.eigvalsh(x, half),)

    return _each(run, a, parts("eigh", *a.shape[-2:], vectors=vectors))


def _eval_svd(a: np.ndarray, *, full: bool, vectors: bool) -> np.ndarray:
    def run(x: np.ndarray) -> tuple:
        found = np.linalg.svd(x, full, vectors)
        return tuple(found) if vectors else (found,)

    return _each(run, a, parts("svd", *a.shape[-2:], full=full, vectors=vectors))


def _eval_expm(a: np.ndarray) -> np.ndarray:
    out = np.empty(a.shape)
    for place in np.ndindex(a.shape[:-2]):
        out[place] = _expm_of_one(a[place].astype(np.float64))
    return out.astype(a.dtype)


def _expm_of_one(a: np.ndarray) -> np.ndarray:
    norm = np.max(np.sum(np.abs(a), 0))
    if not np.isfinite(norm):
        return np.full_like(a, np.nan)
    squarings = max(0, math.ceil(math.log2(norm / THETA))) if norm > 0 else 0
    a = a / 2.0**squarings
    one, c = np.eye(len(a)), PADE
    a2 = a @ a
    a4 = a2 @ a2
    a6 = a4 @ a2
    odd = a6 @ (c[13] * a6 + c[11] * a4 + c[9] * a2) + c[7] * a6 + c[5] * a4 + c[3] * a2
    u = a @ (odd + c[1] * one)
    v = a6 @ (c[12] * a6 + c[10] * a4 + c[8] * a2) + c[6] * a6 + c[4] * a4 + c[2] * a2 + c[0] * one
    x = np.linalg.solve(v - u, v + u)
    for _ in range(squarings):
        x = x @ x
    return x


def _op(name: str, infer: Callable, eval: Callable, *vjp: Callable | None) -> Op:
    return Op(name, FAMILY, infer, eval, vjp, cost=1, exact=ULPS, rounds=True, host=None)


cholesky = _op("cholesky", _infer_same, _eval_cholesky, vjp_cholesky)
triangular_solve = _op(
    "triangular_solve", _infer_triangular, _eval_triangular, vjp_triangular_a, vjp_triangular_b
)
lu = _op("lu", _flat("lu"), _eval_lu, vjp_lu)
lu_solve = _op("lu_solve", _infer_lu_solve, _eval_lu_solve, underived, underived)
qr = _op("qr", _infer_qr, _eval_qr, vjp_qr)
geqrf = _op("geqrf", _flat("geqrf"), _eval_geqrf, underived)
eigh = _op("eigh", _infer_eigh, _eval_eigh, vjp_eigh)
svd = _op("svd", _infer_svd, _eval_svd, vjp_svd)
expm = _op("expm", _infer_same, _eval_expm, vjp_expm)
