"""Decompositions of matrices with orthogonal factors by LAPACK: qr, eigenvalues, singular values.

The signs of the vectors are those of numpy's LAPACK: see `decompositions`.
"""

from __future__ import annotations

import torch

from tracejit.capture.functions.decompositions import (
    empty,
    identity,
    made,
    matrix,
    refuse_values,
    unknown,
)
from tracejit.capture.functions.derived import derived, underived
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import Handle, TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Value
from tracejit.ir.ops.matrix_derivatives import along, parts, split
from tracejit.ir.ops.movement import part, transpose

Tensor = torch.Tensor
_types = torch.return_types

# --- qr ----------------------------------------------------------------------------------------


def _qr(t: Trace, A: Tensor, mode: str, name: str) -> tuple[TracedTensor, TracedTensor]:
    if mode not in ("reduced", "complete", "r"):
        raise t.shape_error(
            f"qr received unrecognized mode '{mode}' but expected one of 'reduced' (default), 'r', "
            "or 'complete'"
        )
    h = matrix(t, A, name)
    x, (*batch, m, n) = t.read(h), h.shape
    complete, k = mode == "complete", min(m, n)
    inner = m if complete else k
    nothing = t.b.full(0.0, shape=(0,), dtype=h.dtype, device=h.device)
    if not h.numel:
        q = t.unread(identity(t, x, (*batch, m, inner)), x)
        r = made(t, empty(t, x, (*batch, inner, n)))
        return (t.fresh(nothing) if mode == "r" else made(t, q)), r
    if mode == "r" or (complete and m > n):
        with t.untaped():
            flat = t.b.qr(x, complete=complete)
        why = "mode='complete' and nrows > ncols"
        if mode == "r":
            why = "mode='r'. Please use torch.linalg.qr(..., mode='reduced')"
        why = f"qr is not differentiable when {why}"
        flat = underived(t, "linalg_qr", (x,), flat, why)
    else:
        flat = t.b.qr(x, complete=complete)
    q, r = split(t.b, flat, parts("qr", m, n, complete=complete))
    return (t.fresh(nothing) if mode == "r" else made(t, q)), made(t, r)


@rule(torch.linalg.qr)
def linalg_qr(t: Trace, A: Tensor, mode: str = "reduced") -> object:
    return _types.linalg_qr(_qr(t, A, mode, "linalg.qr"))


@rule(torch.qr, Tensor.qr)
def qr(t: Trace, input: Tensor, some: bool = True) -> object:
    return _types.qr(_qr(t, input, "reduced" if some else "complete", "qr"))


@rule(torch.geqrf, Tensor.geqrf)
def geqrf(t: Trace, input: Tensor) -> object:
    """Householder's vectors and factors; torch has no derivative either."""
    h = matrix(t, input, "torch.geqrf")
    x, (*batch, m, n) = t.read(h), h.shape
    with t.untaped():
        if h.numel:
            found = split(t.b, t.b.geqrf(x), parts("geqrf", m, n))
        else:
            found = [empty(t, x, h.shape), empty(t, x, (*batch, min(m, n)))]
    found = [underived(t, "geqrf", (x,), value) for value in found]
    return _types.geqrf((made(t, found[0]), t.fresh(found[1])))


# --- eigenvalues and singular values -----------------------------------------------------------


def eigen(t: Trace, x: Value, lower: bool) -> tuple[Value, Value]:
    """Eigenvalues and eigenvectors. The derivative of the former needs no differences of them."""
    n = x.type.shape[-1]
    flat = t.b.eigh(x, lower=lower, vectors=True)
    shapes = parts("eigh", n, n, vectors=True)
    v = split(t.b, flat, shapes)[1]

    def slope(g: Value, y: Value, x: Value) -> Value:
        return t.b.matmul(t.b.mul(v, along(t.b, g, v.type.shape, -1)), transpose(t.b, v))

    w = derived(t, "linalg_eigh", (x,), lambda x: split(t.b, flat, shapes)[0], (slope,))
    return w, v


def singular(t: Trace, x: Value, full: bool = False) -> tuple[Value, Value, Value]:
    """U, the singular values, and the transpose of V."""
    m, n = x.type.shape[-2:]
    k, b = min(m, n), t.b
    flat = b.svd(x, full=full, vectors=True)
    shapes = parts("svd", m, n, full=full, vectors=True)
    u, _, vt = split(b, flat, shapes)

    def slope(g: Value, y: Value, x: Value) -> Value:
        left = part(b, u, -1, 0, k)
        return b.matmul(b.mul(left, along(b, g, left.type.shape, -1)), part(b, vt, -2, 0, k))

    s = derived(t, "linalg_svd", (x,), lambda x: split(b, flat, shapes)[1], (slope,))
    return u, s, vt


def refuse_unsolved(t: Trace, values: Value, name: str) -> None:
    """Raise as eager does where the values of a decomposition are not finite."""
    with t.untaped(), t.unchecked():
        bad = unknown(t, values)
    if name == "linalg.svd":
        why = "the input matrix contained non-finite values."
    else:
        why = "the input matrix is ill-conditioned or has too many repeated eigenvalues."
    refuse_values(
        t, bad, lambda batch, _: f"{name}: {batch}The algorithm failed to converge because {why}"
    )


def _is_lower(t: Trace, uplo: str) -> bool:
    if len(uplo) != 1 or uplo.upper() not in "LU":
        raise t.shape_error(f"Expected UPLO argument to be 'L' or 'U', but got {uplo}")
    return uplo.upper() == "L"


@rule(torch.linalg.eigh)
def eigh(t: Trace, A: Tensor, UPLO: str = "L") -> object:
    h = matrix(t, A, "linalg.eigh", square=True, empty="all")
    lower, x = _is_lower(t, UPLO), t.read(h)
    if not h.numel:
        return _types.linalg_eigh(
            (t.fresh(empty(t, x, h.shape[:-1])), made(t, empty(t, x, h.shape)))
        )
    w, v = eigen(t, x, lower)
    refuse_unsolved(t, w, "linalg.eigh")
    return _types.linalg_eigh((t.fresh(w), made(t, v)))


@rule(torch.linalg.eigvalsh)
def eigvalsh(t: Trace, A: Tensor, UPLO: str = "L") -> TracedTensor:
    h = matrix(t, A, "linalg.eigvalsh", square=True, empty="all")
    return t.fresh(eigenvalues(t, t.read(h), _is_lower(t, UPLO)))


def eigenvalues(t: Trace, x: Value, lower: bool = True) -> Value:
    """Eigenvalues alone, without vectors where nothing is differentiated."""
    if not x.type.numel:
        return empty(t, x, x.type.shape[:-1])
    if t.grad_on and x in t.tape.tracked:
        w = eigen(t, x, lower)[0]
    else:
        w = t.b.eigh(x, lower=lower, vectors=False)
    refuse_unsolved(t, w, "linalg.eigh")
    return w


def _svd(t: Trace, h: Handle, full: bool) -> tuple[Value, Value, Value]:
    x, (*batch, m, n) = t.read(h), h.shape
    if h.numel:
        u, s, vt = singular(t, x, full)
        refuse_unsolved(t, s, "linalg.svd")
        return u, s, vt
    k = min(m, n)
    p, q = (m, n) if full else (k, k)
    u, vt = (t.unread(identity(t, x, (*batch, *s)), x) for s in ((m, p), (q, n)))
    return u, empty(t, x, (*batch, k)), vt


def _check_driver(t: Trace, driver: object) -> None:
    if driver is not None:
        raise t.shape_error("torch.linalg.svd: keyword argument `driver=` is only for CUDA")


@rule(torch.linalg.svd)
def linalg_svd(
    t: Trace, A: Tensor, full_matrices: bool = True, *, driver: str | None = None
) -> object:
    _check_driver(t, driver)
    u, s, vt = _svd(t, matrix(t, A, "linalg.svd", empty="floats"), full_matrices)
    return _types.linalg_svd((made(t, u), t.fresh(s), made(t, vt)))


@rule(torch.svd, Tensor.svd)
def svd(t: Trace, input: Tensor, some: bool = True, compute_uv: bool = True) -> object:
    """V itself, which is a view of its transpose in eager."""
    h = matrix(t, input, "svd", empty="floats")
    if not compute_uv:
        s, (*batch, m, n) = t.fresh(singular_values(t, t.read(h))), h.shape
        of = {"dtype": h.dtype, "device": h.device}
        u, v = (t.b.full(0.0, shape=(*batch, k, k), **of) for k in (m, n))
        return _types.svd((t.fresh(u), s, made(t, v)))
    u, s, vt = _svd(t, h, not some)
    return _types.svd((made(t, u), t.fresh(s), t.fresh(transpose(t.b, vt))))


def singular_values(t: Trace, x: Value) -> Value:
    """Singular values alone, without vectors where nothing is differentiated."""
    if not x.type.numel:
        return empty(t, x, (*x.type.shape[:-2], min(x.type.shape[-2:])))
    if t.grad_on and x in t.tape.tracked:
        s = singular(t, x)[1]
    else:
        s = t.b.svd(x, full=False, vectors=False)
    refuse_unsolved(t, s, "linalg.svd")
    return s


@rule(torch.linalg.svdvals)
def svdvals(t: Trace, A: Tensor, *, driver: str | None = None) -> TracedTensor:
    _check_driver(t, driver)
    return t.fresh(singular_values(t, t.read(matrix(t, A, "linalg.svdvals", empty="floats"))))
