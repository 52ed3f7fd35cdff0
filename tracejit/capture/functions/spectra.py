"""What is made of spectra: matrix norms, ranks, condition numbers, pseudoinverses, least squares.

And products of Householder's reflections.
"""

from __future__ import annotations

import torch

from tracejit.capture.functions.common import normal_axes
from tracejit.capture.functions.composites import composed
from tracejit.capture.functions.decompositions import empty, identity, made, matrix
from tracejit.capture.functions.derived import derived, underived
from tracejit.capture.trace.cuts import is_true
from tracejit.capture.trace.tensor import TO_TORCH
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Value
from tracejit.ir.ops.matrix_derivatives import triangle
from tracejit.ir.ops.movement import part, transpose

Tensor = torch.Tensor
_types = torch.return_types
NORMS = (1, -1, 2, -2, float("inf"), -float("inf"), "fro", "nuc")


# --- norms -------------------------------------------------------------------------------------


@composed(torch.linalg.matrix_norm)
def matrix_norm(
    t: Trace,
    A: Tensor,
    ord: object = "fro",
    dim: tuple[int, int] = (-2, -1),
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The largest sum of a row or column, the sum or the extremum of singular values, or the root
    of the sum of squares."""
    name, h = "linalg.matrix_norm", t.lift(A)
    if len(h.shape) < 2:
        raise t.shape_error(f"{name}: The input tensor A must have at least 2 dimensions.")
    spectral = ord in (2, -2, "nuc")
    if not h.dtype.is_float or (spectral and h.dtype.narrow):
        raise t.shape_error(f"{name}: Expected a floating point, not {TO_TORCH[h.dtype]}")
    if ord not in NORMS:
        raise t.shape_error(f"{name}: Order {ord} not supported.")
    if not isinstance(dim, (tuple, list)) or len(dim) != 2:
        raise t.shape_error(f"{name}: dim must be a 2-tuple. Got {dim}")
    normal_axes(t, tuple(dim), len(h.shape))  # raises where there are none such, or two alike
    rows, columns = (int(d) % len(h.shape) for d in dim)
    A = A if dtype is None else A.to(dtype)
    if ord == "fro":
        return torch.linalg.vector_norm(A, 2, (rows, columns), keepdim)
    if spectral:
        rest = [k for k in range(len(h.shape)) if k not in (rows, columns)]
        s = torch.linalg.svdvals(A.permute(*rest, rows, columns))
        over = s.sum if ord == "nuc" else s.amax if ord == 2 else s.amin
        if not keepdim:
            return over(-1)
        order = [*rest, rows, columns]
        return (
            over(-1, keepdim=True)
            .unsqueeze(-1)
            .permute([order.index(k) for k in range(len(order))])
        )
    summed, reduced = (rows, columns) if abs(ord) == 1 else (columns, rows)
    sums = torch.linalg.vector_norm(A, 1, summed, keepdim=True)
    out = sums.amax(reduced, keepdim=True) if ord > 0 else sums.amin(reduced, keepdim=True)
    return out if keepdim else out.squeeze((rows, columns))


@composed(torch.linalg.cond)
def cond(t: Trace, A: Tensor, p: object = None) -> Tensor:
    """The norm of a matrix times that of its inverse; of singular values for the 2-norm."""
    h = matrix(t, A, "linalg.cond", square=p not in (None, 2, -2), empty="all")
    if not h.numel:
        return t.fresh(empty(t, t.read(h), h.shape[:-2]))
    if p in (None, 2, -2):
        s = torch.linalg.svdvals(A)
        first, last = s[..., 0], s[..., -1]
        return last / first if p == -2 else first / last
    if p not in NORMS:
        raise t.shape_error(f"linalg.cond got an invalid norm type: {p}")
    if p == "nuc":
        # as eager, by itself where the matrix has an inverse
        raise t.unsupported("The condition number has no rule for the nuclear norm")
    with t.untaped():
        inverse, failed = torch.linalg.inv_ex(A)
        inverse = torch.where((failed > 0)[..., None, None], float("inf"), inverse)
        out = torch.linalg.matrix_norm(A, p) * torch.linalg.matrix_norm(inverse, p)
    reason = "linalg.cond: eager modifies the inverse in place, and has no gradient"
    return t.fresh(underived(t, "linalg_cond", (t.read(h),), t.read(t.lift(out)), reason))


# --- ranks and pseudoinverses ------------------------------------------------------------------


def _above(A: Tensor, s: Tensor, atol: object, rtol: object) -> Tensor:
    """Which values count: those above atol, and above rtol times the largest."""
    if rtol is None:
        rtol = torch.finfo(A.dtype).eps * max(A.shape[-2:])
        if isinstance(atol, Tensor):
            rtol = torch.where(atol > 0, 0.0, rtol).to(A.dtype)
        elif atol is not None and atol > 0:
            rtol = 0.0
    atol, rtol = (
        x.unsqueeze(-1) if isinstance(x, Tensor) else 0.0 if x is None else x for x in (atol, rtol)
    )
    least = s.amax(-1, keepdim=True) * rtol
    if isinstance(atol, Tensor):
        return s > torch.maximum(least, atol.to(s.dtype))
    return s > least.clamp(min=float(atol))


@composed(torch.linalg.matrix_rank)
def matrix_rank(
    t: Trace,
    A: Tensor,
    tol: object = None,
    hermitian: bool = False,
    *,
    atol: object = None,
    rtol: object = None,
) -> Tensor:
    h = matrix(t, A, "linalg.matrix_rank", square=hermitian)
    if tol is not None:
        atol, rtol = tol, 0.0
    with t.untaped():
        if not h.numel:
            return torch.zeros(h.shape[:-2], dtype=torch.int64)
        s = torch.linalg.eigvalsh(A).abs() if hermitian else torch.linalg.svdvals(A)
        return _above(A, s, atol, rtol).sum(-1)


def _pinv(
    t: Trace, A: Tensor, atol: object, rtol: object, hermitian: bool, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """V·S⁺·Uᵀ, the sizes of S, and which of them count.

    The derivative is of Golub and Pereyra 1973, The differentiation of pseudo-inverses and
    nonlinear least squares problems whose variables separate.
    """
    h = matrix(t, A, name, square=hermitian)
    x = t.read(h)
    if not h.numel:
        none = A.new_zeros((*h.shape[:-2], 0))
        return A.mT @ A.new_zeros((*h.shape[:-1], h.shape[-2])), none, none
    with t.untaped():
        if hermitian:
            s, u = torch.linalg.eigh(A)
            left, size = u, s.abs()
        else:
            u, s, vt = torch.linalg.svd(A, full_matrices=False)
            left, size = vt.mT, s
        counts = _above(A, size, atol, rtol)
        kept = torch.where(counts, s.reciprocal(), 0.0)
        value = t.read(t.lift((left * kept.unsqueeze(-2)).matmul(u.mT)))
    if value.type.dtype is not h.dtype:  # by autocast, outside of which eager multiplies the two
        reason = f"{name}: expected m1 and m2 to have the same dtype"
        return t.fresh(underived(t, "linalg_pinv", (x,), value, reason)), size, counts
    b = t.b

    def backward(g: Value, p: Value, a: Value) -> Value:
        """-Pᵀ·g·Pᵀ + (1 - A·P)·gᵀ·P·Pᵀ + Pᵀ·P·gᵀ·(1 - P·A)"""
        pt, gt = transpose(b, p), transpose(b, g)
        first = b.matmul(pt, b.matmul(g, pt))
        left = b.matmul(gt, b.matmul(p, pt))
        left = b.sub(left, b.matmul(a, b.matmul(p, left)))
        right = b.matmul(b.matmul(pt, p), gt)
        right = b.sub(right, b.matmul(b.matmul(right, p), a))
        return b.sub(b.add(left, right), first)

    out = derived(t, "linalg_pinv", (x,), lambda x: value, (backward,))
    return t.fresh(out), size, counts


@composed(torch.linalg.pinv)
def pinv(
    t: Trace,
    A: Tensor,
    rcond: object = None,
    hermitian: bool = False,
    *,
    atol: object = None,
    rtol: object = None,
) -> Tensor:
    if rcond is not None:
        atol, rtol = 0.0, rcond
    return _pinv(t, A, atol, rtol, hermitian, "linalg.pinv")[0]


@composed(torch.pinverse, Tensor.pinverse)
def pinverse(t: Trace, input: Tensor, rcond: float = 1e-15) -> Tensor:
    return _pinv(t, input, 0.0, rcond, False, "pinverse")[0]


@composed(torch.linalg.lstsq)
def lstsq(
    t: Trace, A: Tensor, B: Tensor, rcond: float | None = None, *, driver: str | None = None
) -> object:
    """The pseudoinverse times B: eager's drivers give the shortest solution too."""
    name = "torch.linalg.lstsq"
    if driver not in (None, "gelsy", "gels", "gelsd", "gelss"):
        raise t.shape_error(
            f"{name}: parameter `driver` should be one of (gels, gelsy, gelsd, gelss)"
        )
    a, z = matrix(t, A, name), t.lift(B)
    vector = len(a.shape) - 1 == len(z.shape) and z.shape == a.shape[:-1]
    if vector:
        B = B.unsqueeze(-1)
    matrix(t, B, name)
    *batch, m, n = a.shape
    if not a.numel or not z.numel:
        raise t.unsupported("It has a rule for matrices with elements")
    if m != B.shape[-2] or tuple(batch) != tuple(B.shape[:-2]):
        raise t.shape_error(f"{name}: the shapes {list(a.shape)} and {list(z.shape)} do not fit")
    rtol = torch.finfo(A.dtype).eps * max(m, n) if rcond is None else rcond
    inverse, values, counts = _pinv(t, A, 0.0, rtol, False, name)
    x = inverse.matmul(B)
    with t.untaped():
        rank = counts.sum(-1)
    residuals = t.fresh(empty(t, t.read(a), (0,)))  # they require a gradient in eager
    if m > n and (driver == "gels" or (driver in ("gelsd", "gelss") and _is_full(t, rank, n))):
        residuals = (A.matmul(x) - B).square().sum(-2)
    if m > n:  # eager's lies at the top of what was B
        x = torch.cat([x, B[..., n:, :].detach()], -2)
    x = made(t, t.read(t.lift(x))).narrow(-2, 0, n)
    if vector:
        x = x.squeeze(-1)
    if driver == "gels":
        rank = torch.empty(0, dtype=torch.int64)
    if driver not in ("gelsd", "gelss"):
        values = torch.empty(0, dtype=A.dtype)
    return _types.linalg_lstsq((x, residuals, rank, values))


def _is_full(t: Trace, rank: Tensor, n: int) -> bool:
    """Whether the columns of all matrices are independent: a decision."""
    with t.untaped():
        return is_true(t, t.read(t.lift((rank == n).all())))


# --- reflections -------------------------------------------------------------------------------


def _reflected(t: Trace, v: Value, tau: Value, c: Value, *, transposed: bool = False) -> Value:
    """Q·C, or Qᵀ·C, of Q = H₁·H₂·… with Hᵢ = 1 - τᵢ·vᵢ·vᵢᵀ. Together they are 1 - V·T·Vᵀ, where
    T⁻¹·diag(τ) is 1 and above it diag(τ)·Vᵀ·V (Joffrain et al. 2006, Accumulating Householder
    transformations, revisited)."""
    b, *shape = t.b, *v.type.shape
    k = shape[-1]
    wide = b.expand(b.reshape(tau, shape=(*tau.type.shape, 1)), shape=(*shape[:-2], k, k))
    inner = b.mul(wide, triangle(b, b.matmul(transpose(b, v), v), upper=True, strict=True))
    inner = b.add(inner, identity(t, inner, inner.type.shape))
    product = b.matmul(transpose(b, v), c)
    columns = product.type.shape[-1]
    tall = b.expand(b.reshape(tau, shape=(*tau.type.shape, 1)), shape=(*shape[:-2], k, columns))
    how = {"upper": True, "unit": True}
    if transposed:  # Tᵀ = diag(τ)·(1 + …)⁻ᵀ
        found = b.mul(tall, b.triangular_solve(inner, product, transposed=True, **how))
    else:
        found = b.triangular_solve(inner, b.mul(tall, product), transposed=False, **how)
    return b.sub(c, b.matmul(v, found))


def _without_gradient(t: Trace, new: Value, inputs: tuple[Value, ...], *of: Value) -> Value:
    """What torch gives for matrices without elements: it requires a gradient, and those inputs have
    none; `of` is what it is itself."""
    with t.untaped():
        out = t.b.alias(new)

    def vjp(b: object, cts: tuple, need: tuple) -> list[Value | None]:
        return [*[None] * len(inputs), *(cts[0] for _ in of)]

    return t.derive("householder_product", (*inputs, *of), out, vjp)


def _vectors(t: Trace, h: Value, k: int) -> Value:
    """Householder's vectors: what is below the diagonal, and ones on it."""
    b = t.b
    x = part(b, h, -1, 0, k)
    return b.add(triangle(b, x, strict=True), identity(t, x, x.type.shape))


@composed(torch.linalg.householder_product, torch.orgqr, Tensor.orgqr)
def householder_product(t: Trace, input: Tensor, tau: Tensor) -> Tensor:
    h = matrix(t, input, "torch.linalg.householder_product")
    of, (*batch, m, n) = t.lift(tau), h.shape
    k = of.shape[-1] if of.shape else 0
    if m < n or n < k or of.shape[:-1] != tuple(batch) or of.dtype is not h.dtype:
        raise t.shape_error(
            "torch.linalg.householder_product: input is to have no more columns than rows, and tau "
            f"no more elements, not {list(h.shape)} and {list(of.shape)}"
        )
    x, y = t.read(h), t.read(of)
    eye = identity(t, x, h.shape)
    if not h.numel or not k:
        return made(t, _without_gradient(t, eye, (x, y)))
    return made(t, _reflected(t, _vectors(t, x, k), y, eye))


@composed(torch.ormqr, Tensor.ormqr)
def ormqr(
    t: Trace,
    input: Tensor,
    tau: Tensor,
    other: Tensor,
    left: bool = True,
    transpose: bool = False,
) -> Tensor:
    """Q·C, Qᵀ·C, C·Q or C·Qᵀ with the whole of Q."""
    if not left:
        out = ormqr(t, input, tau, other.mT, True, not transpose).mT
        return made(t, t.read(t.lift(out)))
    h, of, c = matrix(t, input, "torch.ormqr"), t.lift(tau), matrix(t, other, "torch.ormqr")
    m, k = h.shape[-2], of.shape[-1] if of.shape else 0
    fits = c.shape[-2] == m and h.shape[:-2] == of.shape[:-1] == c.shape[:-2]
    if not fits or k > min(h.shape[-2:]):
        raise t.shape_error(
            f"torch.ormqr: {list(h.shape)}, {list(of.shape)} and {list(c.shape)} do not fit"
        )
    x, y, z = (t.read(v) for v in (h, of, c))
    if not h.numel or not c.numel or not k:
        return made(t, _without_gradient(t, t.b.alias(z), (x, y), z))
    return made(t, _reflected(t, _vectors(t, x, k), y, z, transposed=transpose))
