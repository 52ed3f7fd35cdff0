"""Derivatives of the primitives of matrices, in primitives. They are those of

    Giles 2008, Collected matrix derivative results for forward and reverse mode algorithmic
        differentiation: solve, eigh, svd
    Murray 2016, Differentiation of the Cholesky decomposition, https://arxiv.org/abs/1602.07527
    Walter and Lehmann 2010, Algorithmic differentiation of linear algebra functions with
        application in optimum experimental design (extended), https://arxiv.org/abs/1001.1654: qr
    Mathias 1996, A chain rule for matrix functions and applications: expm

Where a matrix is taken to be symmetric, its gradient is symmetric, as torch's.
"""

from __future__ import annotations

import math

from tracejit.errors import InvalidGraph
from tracejit.ir.ops.movement import part, transpose

Ints = tuple[int, ...]


def parts(name: str, m: int, n: int, **attrs: object) -> tuple[Ints, ...]:
    """The shapes of what lies in the flat result for a matrix m × n, in order."""
    k = min(m, n)
    if name == "lu":
        return (m, n), (k,), (m,)
    if name == "qr":
        inner = m if attrs["complete"] else k
        return (m, inner), (inner, n)
    if name == "geqrf":
        return (m, n), (k,)
    if name == "eigh":
        return ((n,), (n, n)) if attrs["vectors"] else ((n,),)
    if not attrs["vectors"]:
        return ((k,),)
    return ((m, m), (k,), (n, n)) if attrs["full"] else ((m, k), (k,), (k, n))


def _places(b, x, axis: int):
    """The row (axis -2) or column (-1) of each element."""
    kind = x.type
    return b.iota(
        axis=len(kind.shape) + axis, shape=kind.shape, dtype=kind.dtype, device=kind.device
    )


def triangle(b, x, *, upper: bool = False, strict: bool = False):
    """One triangle of matrices, with the diagonal unless it is strict, and zeros."""
    name = ("gt" if strict else "ge") if not upper else ("lt" if strict else "le")
    return b.where(getattr(b, name)(_places(b, x, -2), _places(b, x, -1)), x, 0.0)


def on_diagonal(b, x):
    """Which elements of matrices are on the diagonal."""
    return b.eq(_places(b, x, -2), _places(b, x, -1))


def along(b, v, shape: Ints, axis: int):
    """A vector along the rows (-1) or columns (-2) of matrices."""
    kept = (*shape[:-2], 1, shape[-1]) if axis == -1 else (*shape[:-1], 1)
    return b.expand(b.reshape(v, shape=kept), shape=shape)


def split(b, flat, shapes: tuple[Ints, ...]) -> list:
    """The parts of a flat result."""
    *batch, _ = flat.type.shape
    found, start = [], 0
    for shape in shapes:
        length = math.prod(shape)
        found.append(b.reshape(part(b, flat, -1, start, length), shape=(*batch, *shape)))
        start += length
    return found


def _half(b, x):
    """The lower triangle with half the diagonal."""
    return b.where(on_diagonal(b, x), b.mul(x, 0.5), triangle(b, x, strict=True))


def _solve_with(b, x, y, **how):
    return b.triangular_solve(x, y, **({"upper": False, "transposed": False, "unit": False} | how))


def vjp_cholesky(b, g, y, a):
    """L⁻ᵀ·Φ(Lᵀ·g)·L⁻¹ made symmetric, where Φ takes the lower triangle and half the diagonal."""
    inner = _half(b, b.matmul(transpose(b, y), triangle(b, g)))
    inner = b.mul(b.add(inner, transpose(b, inner)), 0.5)
    left = _solve_with(b, y, inner, transposed=True)
    return transpose(b, _solve_with(b, y, transpose(b, left), transposed=True))


def vjp_triangular_b(b, g, y, a, z, *, upper: bool, transposed: bool, unit: bool):
    return b.triangular_solve(a, g, upper=upper, transposed=not transposed, unit=unit)


def vjp_triangular_a(b, g, y, a, z, *, upper: bool, transposed: bool, unit: bool):
    w = vjp_triangular_b(b, g, y, a, z, upper=upper, transposed=transposed, unit=unit)
    outer = b.matmul(y, transpose(b, w)) if transposed else b.matmul(w, transpose(b, y))
    return b.neg(triangle(b, outer, upper=upper, strict=unit))


def _beside(b, x, y, axis: int):
    """Two matrices one after another along an axis."""
    rank = len(x.type.shape)
    axis += rank
    zero, none = (0,) * rank, (0,) * rank

    def by(n: int) -> Ints:
        return tuple(n if k == axis else 0 for k in range(rank))

    first = b.pad(x, low=zero, high=by(y.type.shape[axis]), interior=none, value=0.0)
    second = b.pad(y, low=by(x.type.shape[axis]), high=zero, interior=none, value=0.0)
    place = b.iota(axis=axis, shape=first.type.shape, dtype=x.type.dtype, device=x.type.device)
    return b.where(b.lt(place, x.type.shape[axis]), first, second)


def vjp_lu(b, g, y, a):
    """P·L⁻ᵀ·(tril₋(Lᵀ·gL) + triu(gU·Uᵀ))·U⁻ᵀ; a matrix that is not square in two blocks, of which
    the first is square."""
    *batch, m, n = a.type.shape
    k = min(m, n)
    shapes = parts("lu", m, n)
    both, _, order = split(b, y, shapes)
    of_both, _, _ = split(b, g, shapes)
    first, of_first = (part(b, part(b, x, -1, 0, k), -2, 0, k) for x in (both, of_both))
    lower = b.where(on_diagonal(b, first), 1.0, triangle(b, first, strict=True))
    upper = triangle(b, first, upper=True)
    low = b.matmul(transpose(b, lower), triangle(b, of_first, strict=True))
    up = b.matmul(triangle(b, of_first, upper=True), transpose(b, upper))
    if m > n:  # A₂ = L₂·U
        rest, of_rest = (part(b, x, -2, k, m - k) for x in (both, of_both))
        up = b.sub(up, b.matmul(transpose(b, rest), of_rest))
    if n > m:  # A₂ = L·U₂
        rest, of_rest = (part(b, x, -1, k, n - k) for x in (both, of_both))
        low = b.sub(low, b.matmul(of_rest, transpose(b, rest)))
    inner = b.add(triangle(b, low, strict=True), triangle(b, up, upper=True))
    unit = {"unit": True, "transposed": True}
    out = _solve_with(b, first, inner, **unit)
    out = transpose(b, _solve_with(b, first, transpose(b, out), upper=True))
    if m > n:
        below = transpose(b, _solve_with(b, first, transpose(b, of_rest), upper=True))
        out = _beside(b, out, below, -2)
    if n > m:
        out = _beside(b, out, _solve_with(b, first, of_rest, **unit), -1)
    return _unordered(b, out, order)


def _unordered(b, x, order):
    """Rows back to where they were before they were put in an order."""
    *_, m, n = x.type.shape
    wide = (*order.type.shape, m)
    there = along(b, order, wide, -2)
    hit = b.cast(b.eq(there, _places(b, there, -1)), dtype=x.type.dtype)
    return b.matmul(transpose(b, hit), x)


def vjp_qr(b, g, y, a, *, complete: bool):
    """(gQ + Q·sym(triu(gR·Rᵀ - Qᵀ·gQ)))·R⁻ᵀ where there are no more columns than rows. Of a wide
    matrix [X Y] with R = [U W], X = Q·U and W = Qᵀ·Y."""
    *_, m, n = a.type.shape
    shapes = parts("qr", m, n, complete=complete)
    (q, r), (of_q, of_r) = split(b, y, shapes), split(b, g, shapes)
    if q.type.shape[-1] > n:
        raise InvalidGraph(reason="the complete QR of a tall matrix has no derivative")
    if n > m:
        rest, of_rest = part(b, a, -1, m, n - m), part(b, of_r, -1, m, n - m)
        of_q = b.add(of_q, b.matmul(rest, transpose(b, of_rest)))
        r, of_r = part(b, r, -1, 0, m), part(b, of_r, -1, 0, m)
    inner = b.matmul(of_r, transpose(b, r))
    inner = triangle(b, b.sub(inner, b.matmul(transpose(b, q), of_q)), upper=True)
    inner = b.add(inner, transpose(b, triangle(b, inner, upper=True, strict=True)))
    out = b.add(of_q, b.matmul(q, inner))
    out = transpose(b, _solve_with(b, r, transpose(b, out), upper=True))
    return out if n <= m else _beside(b, out, b.matmul(q, of_rest), -1)


def vjp_eigh(b, g, y, a, *, lower: bool, vectors: bool):
    """V·(diag(gw) + (Vᵀ·gV) / E)·Vᵀ made symmetric, where E has w_j - w_i off the diagonal."""
    n = a.type.shape[-1]
    if not vectors:
        y = b.eigh(a, lower=lower, vectors=True)
        v = split(b, y, parts("eigh", n, n, vectors=True))[1]
        return b.matmul(b.mul(v, along(b, g, a.type.shape, -1)), transpose(b, v))
    shapes = parts("eigh", n, n, vectors=True)
    (w, v), (of_w, of_v) = split(b, y, shapes), split(b, g, shapes)
    apart = b.sub(along(b, w, a.type.shape, -1), along(b, w, a.type.shape, -2))
    inner = b.matmul(transpose(b, v), of_v)
    diagonal = on_diagonal(b, inner)
    apart = b.where(diagonal, 1.0, apart)
    inner = b.where(diagonal, along(b, of_w, a.type.shape, -1), b.div(inner, apart))
    inner = b.mul(b.add(inner, transpose(b, inner)), 0.5)
    return b.matmul(b.matmul(v, inner), transpose(b, v))


def vjp_svd(b, g, y, a, *, full: bool, vectors: bool):
    """U·(skew(Uᵀ·gU)/E·S + S·skew(Vᵀ·gV)/E + diag(gS))·Vᵀ, where E has s_j² - s_i² off the
    diagonal, and what leads out of the spaces of U and V. Of full ones that of the first vectors,
    as torch has it."""
    *batch, m, n = a.type.shape
    k = min(m, n)
    if not vectors:
        reduced = {"full": False, "vectors": True}
        u, _, vt = split(b, b.svd(a, **reduced), parts("svd", m, n, **reduced))
        return b.matmul(b.mul(u, along(b, g, u.type.shape, -1)), vt)
    shapes = parts("svd", m, n, full=full, vectors=True)
    (u, s, vt), (of_u, of_s, of_vt) = split(b, y, shapes), split(b, g, shapes)
    u, of_u = (part(b, x, -1, 0, k) for x in (u, of_u))
    vt, of_vt = (part(b, x, -2, 0, k) for x in (vt, of_vt))
    v, of_v, square = transpose(b, vt), transpose(b, of_vt), (*batch, k, k)
    rows, columns = along(b, s, square, -2), along(b, s, square, -1)
    apart = b.mul(b.sub(columns, rows), b.add(columns, rows))
    diagonal = on_diagonal(b, apart)
    apart = b.where(diagonal, 1.0, apart)

    def skew(x, of_x):
        z = b.matmul(transpose(b, x), of_x)
        return b.div(b.sub(z, transpose(b, z)), apart)

    inner = b.add(b.mul(skew(u, of_u), columns), b.mul(rows, skew(v, of_v)))
    inner = b.where(diagonal, along(b, of_s, square, -1), inner)
    if m > k:
        left = b.div(of_u, along(b, s, of_u.type.shape, -1))
        left = b.sub(left, b.matmul(u, b.matmul(transpose(b, u), left)))
        out = b.matmul(b.add(b.matmul(u, inner), left), vt)
    else:
        out = b.matmul(u, b.matmul(inner, vt))
    if n > k:
        right = b.div(of_vt, along(b, s, of_vt.type.shape, -2))
        right = b.sub(right, b.matmul(b.matmul(right, v), vt))
        out = b.add(out, b.matmul(u, right))
    return out


def vjp_expm(b, g, y, a):
    """The upper right block of the exponential of [Aᵀ g; 0 Aᵀ]."""
    n, at, kind = a.type.shape[-1], transpose(b, a), a.type
    nothing = b.full(0.0, shape=kind.shape, dtype=kind.dtype, device=kind.device)
    whole = _beside(b, _beside(b, at, g, -1), _beside(b, nothing, at, -1), -2)
    return part(b, part(b, b.expm(whole), -2, 0, n), -1, n, n)


def underived(b, g, y, *operands, **attrs):
    raise InvalidGraph(reason="it has no derivative of its own: who emits it differentiates it")
