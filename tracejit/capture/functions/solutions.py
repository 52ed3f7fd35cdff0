"""Solutions of linear systems and inverses, by decompositions into triangles.

A system is solved by LU with the factors kept for the derivative, which solves with them again
(Giles 2008, https://people.maths.ox.ac.uk/gilesm/files/NA-08-01.pdf, as all of this).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tracejit.capture.functions.common import expand
from tracejit.capture.functions.composites import composed
from tracejit.capture.functions.decompositions import (
    by_columns,
    diagonal,
    empty,
    empty_solved,
    identity,
    info,
    lu_parts,
    made,
    matrix,
    order_of,
    refuse_values,
    zero_pivots,
)
from tracejit.capture.functions.derived import derived
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import Handle, Ints, TracedTensor, broadcast_shape
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Value
from tracejit.ir.ops.movement import transpose
from tracejit.ir.types import b1

Tensor = torch.Tensor
_types = torch.return_types


def spread_to(t: Trace, x: Value, batch: Ints) -> Value:
    """Matrices for a larger batch."""
    return expand(t, x, (*batch, *x.type.shape[-2:]))


def common_batch(t: Trace, a: Handle, b: Handle, name: str, left: bool = True) -> Ints:
    """The batch of two lots of matrices together, of A·X = B or X·A = B."""
    if b.shape[-2 if left else -1] != a.shape[-1]:
        raise t.shape_error(
            f"{name}: Incompatible shapes of A and B for the equation "
            f"{'AX = B' if left else 'XA = B'} ({list(a.shape)} and {list(b.shape)})"
        )
    shape = broadcast_shape([a.shape[:-2], b.shape[:-2]])
    if shape is None:
        raise t.shape_error(f"{name}: the batches {a.shape[:-2]} and {b.shape[:-2]} do not fit")
    if a.dtype is not b.dtype:
        raise t.shape_error(f"{name}: Expected A and B to have the same dtype")
    return shape


# --- solve -------------------------------------------------------------------------------------


def solved(t: Trace, a: Value, flat: Value, z: Value, transposed: bool = False) -> Value:
    """X of A·X = B, or of Aᵀ·X = B, by the flat factors of A."""

    def backward_b(g: Value, y: Value, a: Value, z: Value) -> Value:
        return solved(t, a, flat, g, not transposed)

    def backward_a(g: Value, y: Value, a: Value, z: Value) -> Value:
        w, b = backward_b(g, y, a, z), t.b
        outer = b.matmul(y, transpose(b, w)) if transposed else b.matmul(w, transpose(b, y))
        return b.neg(outer)

    return derived(
        t,
        "linalg_solve",
        (a, z),
        lambda a, z: t.b.lu_solve(flat, z, transposed=transposed),
        (backward_a, backward_b),
    )


def factored(t: Trace, a: Value) -> Value:
    """The flat factors of A, of which nothing is differentiated."""
    with t.untaped():
        return t.b.lu(a)


def _pivots(t: Trace, flat: Value, n: int) -> Value:
    """Which pivots are zero."""
    with t.untaped(), t.unchecked():
        return zero_pivots(t, lu_parts(t, flat, n, n)[0])


def _of_batch(t: Trace, flat: Value, batch: Ints) -> Value:
    """Flat factors for a larger batch."""
    with t.untaped():
        wide = t.b.reshape(flat, shape=(*flat.type.shape[:-1], 1, flat.type.shape[-1]))
        return t.b.reshape(spread_to(t, wide, batch), shape=(*batch, flat.type.shape[-1]))


def _solve(
    t: Trace, A: Tensor, B: Tensor, left: bool, name: str, check: bool
) -> tuple[TracedTensor, Value]:
    """The solution, and which pivots are zero."""
    a, z = matrix(t, A, name, square=True, empty="floats"), t.lift(B)
    vector = len(z.shape) == 1 or (len(a.shape) - 1 == len(z.shape) and z.shape == a.shape[:-1])
    if vector and not left:
        raise t.shape_error(f"{name}: Vector broadcasting of the left hand side is not supported")
    if vector:
        B = B.unsqueeze(-1)
        z = t.lift(B)
    matrix(t, B, name, takes="floats")
    n, x, y = a.shape[-1], t.read(a), t.read(z)
    y = y if left else transpose(t.b, y)
    batch = common_batch(t, a, z, name, left)
    shape = (*batch, n, y.type.shape[-1])
    if not a.numel or 0 in shape:
        bad = t.b.full(False, shape=(*a.shape[:-2], 0), dtype=b1, device=a.device)
        out = t.unread(empty(t, x, shape), y)
    else:
        flat = factored(t, x if left else transpose(t.b, x))
        bad = _pivots(t, flat, n)
        if check:
            _refuse_singular(t, bad, name)
        x = x if left else transpose(t.b, x)
        out = solved(t, spread_to(t, x, batch), _of_batch(t, flat, batch), spread_to(t, y, batch))
    if vector:
        strides = by_columns(shape[:-1]) if len(shape) > 2 else None  # as of a matrix in eager
        return t.fresh(t.b.reshape(out, shape=shape[:-1]), strides), bad
    if left:
        return made(t, out), bad
    return t.fresh(transpose(t.b, out)), bad


def _refuse_singular(t: Trace, bad: Value, name: str) -> None:
    refuse_values(
        t,
        bad,
        lambda batch, _: (
            f"torch.{name}: {batch}The solver failed because the input matrix is singular."
        ),
    )


@composed(torch.linalg.solve)
def solve(t: Trace, A: Tensor, B: Tensor, *, left: bool = True) -> Tensor:
    return _solve(t, A, B, left, "linalg.solve", True)[0]


@composed(torch.linalg.solve_ex)
def solve_ex(
    t: Trace, A: Tensor, B: Tensor, *, left: bool = True, check_errors: bool = False
) -> object:
    out, bad = _solve(t, A, B, left, "linalg.solve_ex", check_errors)
    return _types.linalg_solve_ex((out, info(t, bad)))


# --- inverses ----------------------------------------------------------------------------------


def _inverse(t: Trace, x: Value, flat: Value) -> Value:
    def backward(g: Value, y: Value, x: Value) -> Value:
        """-Yᵀ·g·Yᵀ"""
        turned = transpose(t.b, y)
        return t.b.neg(t.b.matmul(turned, t.b.matmul(g, turned)))

    def forward(x: Value) -> Value:
        return t.b.lu_solve(flat, identity(t, x, x.type.shape), transposed=False)

    return derived(t, "linalg_inv_ex", (x,), forward, (backward,))


def _inv(t: Trace, A: Tensor, name: str, check: bool) -> tuple[TracedTensor, Value]:
    h = matrix(t, A, name, square=True)
    x = t.read(h)
    if not h.numel:
        bad = t.b.full(False, shape=h.shape[:-1], dtype=b1, device=h.device)
        return made(t, empty(t, x, h.shape)), bad
    flat = factored(t, x)
    bad = _pivots(t, flat, h.shape[-1])
    if check:
        _refuse_inverse(t, bad, name)
    return made(t, _inverse(t, x, flat)), bad


def _refuse_inverse(t: Trace, bad: Value, name: str) -> None:
    refuse_values(
        t,
        bad,
        lambda batch, k: (
            f"{name}: {batch}The diagonal element {k} is zero, the inversion could not "
            "be completed because the input matrix is singular."
        ),
    )


@rule(torch.linalg.inv, torch.inverse, Tensor.inverse)
def inv(t: Trace, A: Tensor) -> TracedTensor:
    return _inv(t, A, "linalg.inv", True)[0]


@rule(torch.linalg.inv_ex)
def inv_ex(t: Trace, A: Tensor, *, check_errors: bool = False) -> object:
    out, bad = _inv(t, A, "linalg.inv_ex", check_errors)
    return _types.linalg_inv_ex((out, info(t, bad)))


@composed(torch.linalg.tensorinv)
def tensorinv(t: Trace, A: Tensor, ind: int = 2) -> Tensor:
    shape = t.lift(A).shape
    if ind <= 0:
        raise t.shape_error("Expected a strictly positive integer for 'ind'")
    back, front = shape[ind:], shape[:ind]
    n = int(np.prod(back, dtype=np.int64))
    if n != int(np.prod(front, dtype=np.int64)):
        raise t.shape_error(
            "Expected self to satisfy the requirement prod(self.shape[ind:]) == "
            f"prod(self.shape[:ind]), but got {n} != {int(np.prod(front, dtype=np.int64))}"
        )
    return torch.linalg.inv(A.reshape(n, n)).reshape(*back, *front)


@composed(torch.linalg.tensorsolve)
def tensorsolve(t: Trace, A: Tensor, B: Tensor, dims: Sequence[int] | None = None) -> Tensor:
    if dims is not None:
        last = [d % A.dim() for d in ((dims,) if isinstance(dims, int) else dims)]
        A = A.permute(*(k for k in range(A.dim()) if k not in last), *last)
    rest = tuple(A.shape[B.dim() :])
    n = int(np.prod(rest, dtype=np.int64))
    if n != B.numel():
        raise t.shape_error(
            "Expected self to satisfy the requirement prod(self.shape[other.ndim:]) == "
            f"prod(self.shape[:other.ndim]), but got {n} != {B.numel()}"
        )
    return torch.linalg.solve(A.reshape(n, n), B.flatten()).reshape(rest)


# --- triangles ---------------------------------------------------------------------------------


@composed(torch.linalg.solve_triangular, kernel=True)
def solve_triangular(
    t: Trace,
    A: Tensor,
    B: Tensor,
    *,
    upper: bool,
    left: bool = True,
    unitriangular: bool = False,
) -> Tensor:
    name = "linalg.solve_triangular"
    a, z = matrix(t, A, name, square=True), matrix(t, B, name)
    x, y, n = t.read(a), t.read(z), a.shape[-1]
    y = y if left else transpose(t.b, y)
    batch = common_batch(t, a, z, name, left)
    shape = (*batch, n, y.type.shape[-1])
    if 0 in shape:
        out = t.unread(empty(t, x, shape), y)
    else:
        out = t.b.triangular_solve(
            spread_to(t, x, batch),
            spread_to(t, y, batch),
            upper=upper,
            transposed=not left,
            unit=unitriangular,
        )
    return made(t, out if left else transpose(t.b, out))


def _triangular(A: Tensor, B: Tensor, upper: bool, transpose: bool, unit: bool = False) -> Tensor:
    """X of A·X = B, or of Aᵀ·X = B, with one triangle of A."""
    if transpose:
        A, upper = A.mT, not upper
    return torch.linalg.solve_triangular(A, B, upper=upper, unitriangular=unit)


@composed(torch.triangular_solve, Tensor.triangular_solve)
def triangular_solve(
    t: Trace,
    b: Tensor,
    A: Tensor,
    upper: bool = True,
    transpose: bool = False,
    unitriangular: bool = False,
) -> object:
    matrix(t, b, "torch.triangular_solve")
    a = matrix(t, A, "triangular_solve", square=True)
    out = _triangular(A, b, upper, transpose, unitriangular)
    batch = common_batch(t, a, t.lift(b), "triangular_solve")
    copy = spread_to(t, t.read(a), batch)
    return _types.triangular_solve((out, made(t, t.b.alias(copy))))


@composed(torch.cholesky_solve, Tensor.cholesky_solve)
def cholesky_solve(t: Trace, B: Tensor, L: Tensor, upper: bool = False) -> Tensor:
    a, z = matrix(t, L, "cholesky_solve", square=True), matrix(t, B, "cholesky_solve")
    batch = common_batch(t, a, z, "cholesky_solve")
    x, y = spread_to(t, t.read(a), batch), spread_to(t, t.read(z), batch)
    if not a.numel or not z.numel:
        return made(t, t.unread(empty(t, x, y.type.shape), y))
    return made(t, _by_root(t, y, x, upper))


def _by_root(t: Trace, z: Value, root: Value, upper: bool) -> Value:
    """X of A·X = B for A = L·Lᵀ or Uᵀ·U. As in torch, the gradient of the triangle is not one."""
    b = t.b

    def forward(z: Value, root: Value) -> Value:
        x = b.triangular_solve(root, z, upper=upper, transposed=upper, unit=False)
        return b.triangular_solve(root, x, upper=upper, transposed=not upper, unit=False)

    def backward_z(g: Value, y: Value, z: Value, root: Value) -> Value:
        return _by_root(t, g, root, upper)

    def backward_root(g: Value, y: Value, z: Value, root: Value) -> Value:
        outer = b.matmul(backward_z(g, y, z, root), transpose(b, y))
        outer = b.neg(b.add(outer, transpose(b, outer)))
        return b.matmul(root, outer) if upper else b.matmul(outer, root)

    return derived(t, "cholesky_solve", (z, root), forward, (backward_z, backward_root))


@composed(torch.cholesky_inverse, Tensor.cholesky_inverse)
def cholesky_inverse(t: Trace, L: Tensor, upper: bool = False) -> Tensor:
    h = matrix(t, L, "cholesky_inverse", square=True)
    x = t.read(h)
    if not h.numel:
        return made(t, empty(t, x, h.shape))
    with t.untaped(), t.unchecked():
        bad = t.b.eq(diagonal(t, x), 0.0)
    _refuse_inverse(t, bad, "cholesky_inverse")
    b = t.b

    def forward(root: Value) -> Value:
        return _by_root(t, identity(t, root, root.type.shape), root, upper)

    def backward(g: Value, y: Value, root: Value) -> Value:
        inner = b.neg(b.matmul(y, b.matmul(b.add(g, transpose(b, g)), y)))
        return b.matmul(root, inner) if upper else b.matmul(inner, root)

    return made(t, derived(t, "cholesky_inverse", (x,), forward, (backward,)))


def _lu_solve(t: Trace, LU: Tensor, pivots: Tensor, B: Tensor, left: bool, adjoint: bool) -> Tensor:
    """By the triangles, whose derivatives are those of LU."""
    name = "torch.linalg.lu_solve"
    a = matrix(t, LU, name, square=True, takes="floats")
    z = matrix(t, B, name, takes="floats")
    if not left:
        return _lu_solve(t, LU, pivots, B.mT, True, not adjoint).mT
    n, batch = a.shape[-1], common_batch(t, a, z, name)
    shape = (*batch, n, z.shape[-1])
    if 0 in shape or not a.numel:
        return made(t, empty_solved(t, "linalg_lu_solve", shape, t.read(a), t.read(z)))
    matrix(t, LU, name)
    order = order_of(t, t.read(t.lift(pivots)), n)
    place = t.fresh(order)
    if adjoint:
        place = place.argsort(-1)
    wide = place.unsqueeze(-1).expand(shape)
    if not adjoint:
        x = B.expand(shape).gather(-2, wide)
        x = _triangular(LU, x, False, False, True)
        return _triangular(LU, x, True, False)
    x = _triangular(LU, B.expand(shape), True, True)
    x = _triangular(LU, x, False, True, True)
    return made(t, t.read(t.lift(x.gather(-2, wide))))


@composed(torch.linalg.lu_solve, kernel=True)
def linalg_lu_solve(
    t: Trace,
    LU: Tensor,
    pivots: Tensor,
    B: Tensor,
    *,
    left: bool = True,
    adjoint: bool = False,
) -> Tensor:
    return _lu_solve(t, LU, pivots, B, left, adjoint)


@composed(torch.lu_solve, Tensor.lu_solve)
def lu_solve(t: Trace, b: Tensor, LU_data: Tensor, LU_pivots: Tensor) -> Tensor:
    return _lu_solve(t, LU_data, LU_pivots, b, True, False)
