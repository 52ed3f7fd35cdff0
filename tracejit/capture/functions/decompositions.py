"""Decompositions of matrices into triangles by LAPACK; what all decompositions need.

Eager's results lie by columns; ours are laid out so. The signs of eigenvectors, of singular vectors
and of Q are those of numpy's LAPACK, by the routines that torch calls in its own: nearly always the
same. What eager refuses for its values (a matrix that is not positive definite, or not finite) is a
decision of the trace: a failure raises before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from tracejit.capture.functions.common import cast, literal
from tracejit.capture.functions.composites import composed
from tracejit.capture.functions.derived import underived
from tracejit.capture.trace import location
from tracejit.capture.trace.cuts import is_true, plain_number_of
from tracejit.capture.trace.table import function_name, rule
from tracejit.capture.trace.tensor import TO_TORCH, Handle, Ints, TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.errors import LinAlgError
from tracejit.ir.graph import Value
from tracejit.ir.ops.matrix_derivatives import along, parts, split
from tracejit.ir.ops.movement import part, transpose
from tracejit.ir.types import contiguous_strides, f32, f64, i32, i64

Tensor = torch.Tensor
_types = torch.return_types
Dtypes = Literal["lapack", "floats", "all"]
MOST_SWAPS = 64  # one after another, of pivots that come from outside


# --- what all of them need ---------------------------------------------------------------------


def matrix(
    t: Trace,
    x: Tensor,
    name: str,
    *,
    square: bool = False,
    takes: Dtypes = "lapack",
    empty: Dtypes = "lapack",
) -> Handle:
    """The handle of a batch of matrices, of the dtypes that eager takes. Where eager asks for the
    dtype only when it calls LAPACK, it takes more of matrices without elements."""
    h = t.lift(x)
    if len(h.shape) < 2:
        raise t.shape_error(f"{name}: The input tensor A must have at least 2 dimensions.")
    if square and h.shape[-1] != h.shape[-2]:
        m, n = h.shape[-2:]
        raise t.shape_error(
            f"{name}: A must be batches of square matrices, but they are {m} by {n} matrices"
        )
    if h.device != "cpu":
        raise t.unsupported(
            "It is a call of LAPACK, which is made on the CPU only; do it outside the step, or "
            'leave the step to eager (on_unsupported="eager")'
        )
    takes = takes if h.numel or takes != "lapack" else empty
    known = h.dtype in (f32, f64) or takes == "all" or (takes == "floats" and h.dtype.is_float)
    if not known:
        raise t.not_implemented(name, h.dtype)
    return h


def by_columns(shape: Ints) -> Ints:
    """The strides of matrices that lie by columns, as eager's do."""
    *batch, m, n = shape
    outer = contiguous_strides((*batch, max(m, 1) * max(n, 1)))[:-1] if batch else ()
    return (*outer, 1, max(m, 1))


def made(t: Trace, value: Value) -> TracedTensor:
    """A new tensor of matrices, laid out as eager's."""
    return t.fresh(value, by_columns(value.type.shape))


def empty(t: Trace, like: Value, shape: Ints, number: float = 0.0) -> Value:
    """What a function gives for matrices without elements: it depends on them all the same."""
    kind = like.type
    number = literal(number, kind.dtype)
    new = t.b.full(number, shape=shape, dtype=kind.dtype, device=kind.device)
    return t.unread(new, like)


def empty_solved(t: Trace, name: str, shape: Ints, *inputs: Value) -> Value:
    """As `empty`, where the derivative solves triangles: eager asks for the dtype there."""
    dtype = inputs[0].type.dtype
    out = empty(t, inputs[0], shape)
    if dtype not in (f32, f64):
        reason = f'"triangular_solve_cpu" not implemented for {TO_TORCH[dtype]}'
        return underived(t, name, inputs, out, reason)
    for x in inputs[1:]:
        out = t.unread(out, x)
    return out


def identity(t: Trace, like: Value, shape: Ints) -> Value:
    """Matrices with ones on the diagonal."""
    kind, b = like.type, t.b
    rank = len(shape)
    of = {"shape": shape, "dtype": i64, "device": kind.device}
    row, column = (b.iota(axis=rank - k, **of) for k in (2, 1))
    return b.cast(b.eq(row, column), dtype=kind.dtype)


def diagonal(t: Trace, x: Value) -> Value:
    """The diagonals of matrices, as rows."""
    *batch, m, n = x.type.shape
    flat = t.b.reshape(x, shape=(*batch, m * n))
    count = min(m, n)
    stop = (count - 1) * (n + 1) + 1 if count else 0
    return t.b.slice(
        flat,
        starts=(0,) * (len(batch) + 1),
        stops=(*batch, stop),
        steps=(1,) * len(batch) + (n + 1,),
    )


def refuse_values(t: Trace, bad: Value, what: Callable[[str, int], str]) -> None:
    """Raise eager's error in a call in which an element of `bad`, which has a row for each matrix,
    is true. `what(batch element, number of the first bad column)` is its text."""
    if not bad.type.numel:
        return
    b = t.b
    with t.untaped(), t.unchecked():
        axes = tuple(range(len(bad.type.shape)))
        if not is_true(t, b.reduce_max(bad, axes=axes)):
            return
        places = b.iota(axis=0, shape=(bad.type.numel,), dtype=i64, device=bad.type.device)
        flat = b.reshape(bad, shape=(bad.type.numel,))
        first = b.reduce_min(b.where(flat, places, bad.type.numel), axes=(0,))
        at = int(plain_number_of(t, t.fresh(first).handle))
    element, column = divmod(at, bad.type.shape[-1])
    batch = f"(Batch element {element}): " if len(bad.type.shape) > 1 else ""
    function = function_name(t.calling) if t.calling else "a function of matrices"
    reason = what(batch, column + 1)
    raise LinAlgError(where=location.full(), function=function, reason=reason)


def unknown(t: Trace, x: Value) -> Value:
    """Where there is NaN."""
    return t.b.ne(x, x)


def info(t: Trace, bad: Value) -> TracedTensor:
    """The number of the first bad column of each matrix, from 1; 0 if there is none."""
    *batch, n = bad.type.shape
    with t.untaped(), t.unchecked():
        b = t.b
        if not n:
            none = b.full(0, shape=tuple(batch), dtype=i32, device=bad.type.device)
            return t.fresh(none)
        axis = len(batch)
        place = b.iota(axis=axis, shape=bad.type.shape, dtype=i64, device=bad.type.device)
        first = b.reduce_min(b.where(bad, place, n), axes=(axis,))
        return t.fresh(b.cast(b.where(b.eq(first, n), 0, b.add(first, 1)), dtype=i32))


# --- cholesky ----------------------------------------------------------------------------------


def _lower(t: Trace, h: Handle, upper: bool) -> Value:
    """L of the lower or the upper triangle."""
    x = t.read(h)
    if not h.numel:
        return empty_solved(t, "linalg_cholesky_ex", h.shape, x)
    return t.b.cholesky(transpose(t.b, x) if upper else x)


def _cholesky(t: Trace, x: Tensor, upper: bool, name: str) -> TracedTensor:
    low = _lower(t, matrix(t, x, name, square=True, empty="floats"), upper)
    _refuse_indefinite(t, low, name)
    return made(t, transpose(t.b, low) if upper else low)


def _refuse_indefinite(t: Trace, low: Value, name: str) -> None:
    with t.untaped(), t.unchecked():
        bad = unknown(t, diagonal(t, low))
    refuse_values(
        t,
        bad,
        lambda batch, order: (
            f"{name}: {batch}The factorization could not be completed because the "
            f"input is not positive-definite (the leading minor of order {order} is not "
            "positive-definite)."
        ),
    )


@rule(torch.linalg.cholesky)
def linalg_cholesky(t: Trace, A: Tensor, *, upper: bool = False) -> TracedTensor:
    return _cholesky(t, A, upper, "linalg.cholesky")


@rule(torch.cholesky, Tensor.cholesky)
def cholesky(t: Trace, input: Tensor, upper: bool = False) -> TracedTensor:
    if not t.lift(input).numel:  # which eager lays out by rows
        h = matrix(t, input, "cholesky", square=True, empty="all")
        return t.fresh(empty_solved(t, "cholesky", h.shape, t.read(h)))
    return _cholesky(t, input, upper, "cholesky")


@rule(torch.linalg.cholesky_ex)
def cholesky_ex(t: Trace, A: Tensor, *, upper: bool = False, check_errors: bool = False) -> object:
    """Where the matrix is not positive definite, what eager leaves undefined is NaN."""
    low = _lower(t, matrix(t, A, "linalg.cholesky_ex", square=True, empty="floats"), upper)
    if check_errors:
        _refuse_indefinite(t, low, "linalg.cholesky_ex")
    with t.untaped(), t.unchecked():
        failed = unknown(t, diagonal(t, low))
    out = made(t, transpose(t.b, low) if upper else low)
    return _types.linalg_cholesky_ex((out, info(t, failed)))


# --- lu ----------------------------------------------------------------------------------------


def lu_parts(t: Trace, flat: Value, m: int, n: int) -> list[Value]:
    """L and U in one; the swaps; the order."""
    return split(t.b, flat, parts("lu", m, n))


def zero_pivots(t: Trace, both: Value) -> Value:
    """Which elements of U's diagonal are zero."""
    with t.untaped(), t.unchecked():
        return t.b.eq(diagonal(t, both), 0.0)


def _lu_factor(t: Trace, A: Tensor, pivot: bool, name: str) -> tuple[Value, Value, Value]:
    """L and U in one, the swaps as integers, and which pivots are zero."""
    h = matrix(t, A, name, empty="all")
    if not pivot:
        raise t.shape_error("linalg.lu_factor: LU without pivoting is not implemented on the CPU")
    x, (*batch, m, n) = t.read(h), h.shape
    if not h.numel:
        with t.untaped():
            swaps = t.b.full(0, shape=(*batch, min(m, n)), dtype=i32, device=h.device)
            bad = t.b.eq(swaps, 1)
        return empty_solved(t, "linalg_lu_factor_ex", h.shape, x), swaps, bad
    both, swaps, _ = lu_parts(t, t.b.lu(x), m, n)
    return both, cast(t, swaps, i32), zero_pivots(t, both)


@rule(torch.linalg.lu_factor)
def lu_factor(t: Trace, A: Tensor, *, pivot: bool = True) -> object:
    both, swaps, bad = _lu_factor(t, A, pivot, "linalg.lu_factor")
    _refuse_zero(t, bad)
    return _types.linalg_lu_factor((made(t, both), t.fresh(swaps)))


def _refuse_zero(t: Trace, bad: Value) -> None:
    refuse_values(
        t,
        bad,
        lambda batch, k: (
            f"torch.linalg.lu_factor: {batch}U[{k},{k}] is zero and using it on "
            "lu_solve would result in a division by zero. If you still want to perform the "
            "factorization, consider calling linalg.lu(A, pivot) or linalg.lu_factor_ex(A, pivot)"
        ),
    )


@rule(torch.linalg.lu_factor_ex)
def lu_factor_ex(t: Trace, A: Tensor, *, pivot: bool = True, check_errors: bool = False) -> object:
    both, swaps, bad = _lu_factor(t, A, pivot, "linalg.lu_factor_ex")
    if check_errors:
        _refuse_zero(t, bad)
    return _types.linalg_lu_factor_ex((made(t, both), t.fresh(swaps), info(t, bad)))


@rule(torch._lu_with_info)
def lu_with_info(t: Trace, input: Tensor, pivot: bool = True, check_errors: bool = True) -> object:
    """What torch.lu calls."""
    found = lu_factor_ex(t, input, pivot=pivot, check_errors=check_errors)
    return _types._lu_with_info(tuple(found))


def order_of(t: Trace, pivots: Value, m: int) -> Value:
    """The order of the rows that swaps lead to. A decomposition in this step has it."""
    flat, node = None, t.producers.get(pivots)
    shape = pivots.type.shape
    while node is not None and node.op.name in ("alias", "cast", "reshape", "slice"):
        if node.op.name == "slice":
            flat = node
        node = t.producers.get(node.args[0])
    with t.untaped(), t.unchecked():
        if node is not None and node.op.name == "lu" and flat is not None:
            *batch, rows, n = node.args[0].type.shape
            found = parts("lu", rows, n)
            ends = flat.attr("starts")[-1], flat.attr("stops")[-1]
            if ends == (m * n, m * n + found[1][0]) and (*shape, rows) == (*batch, *found[1], m):
                return cast(t, split(t.b, node.out, found)[2], i64)
        return _swapped(t, pivots, m)


def _swapped(t: Trace, pivots: Value, m: int) -> Value:
    """The rows after each of some swaps in turn."""
    b, (*batch, k) = t.b, pivots.type.shape
    if k > MOST_SWAPS:
        raise t.unsupported(
            f"Pivots from outside the step have a rule for {MOST_SWAPS} rows; factorize in the step"
        )
    axis, shape = len(batch), (*batch, m)
    swaps = b.sub(cast(t, pivots, i64), 1)
    place = order = b.iota(axis=axis, shape=shape, dtype=i64, device=pivots.type.device)
    for i in range(k):
        other = b.expand(part(b, swaps, axis, i, 1), shape=shape)
        mine, its = b.eq(place, i), b.eq(place, other)

        def at(hit: Value, order: Value) -> Value:
            row = b.reduce_sum(b.where(hit, order, 0), axes=(axis,))
            return b.expand(b.reshape(row, shape=(*batch, 1)), shape=shape)

        order = b.where(mine, at(its, order), b.where(its, at(mine, order), order))
    return order


def permutation(t: Trace, order: Value, dtype: object) -> Value:
    """P of A = P·L·U."""
    with t.untaped(), t.unchecked():
        b, (*batch, m) = t.b, order.type.shape
        shape = (*batch, m, m)
        row = b.iota(axis=len(batch), shape=shape, dtype=i64, device=order.type.device)
        there = along(b, order, shape, -1)
        return b.cast(b.eq(row, there), dtype=dtype)


def _triangles(t: Trace, both: Tensor) -> tuple[Tensor, Tensor]:
    """L and U of what holds both, of any dtype; they lie by rows."""
    k = min(both.shape[-2:])
    low, up = both[..., :k].tril(-1), both[..., :k, :].triu()
    low = low + torch.eye(*low.shape[-2:], dtype=both.dtype)
    return t.fresh(t.read(t.lift(low))), t.fresh(t.read(t.lift(up)))


@composed(torch.linalg.lu, kernel=True)
def linalg_lu(t: Trace, A: Tensor, *, pivot: bool = True) -> object:
    h = matrix(t, A, "linalg.lu", empty="all")
    if not pivot:
        raise t.shape_error("linalg.lu_factor: LU without pivoting is not implemented on the CPU")
    x, (*batch, m, n) = t.read(h), h.shape
    if not h.numel:
        p = identity(t, x, (*batch, m, m))
        x = empty_solved(t, "linalg_lu", h.shape, x)
        return _types.linalg_lu((t.fresh(p), *_no_triangles(t, x)))
    both, _, order = lu_parts(t, t.b.lu(x), m, n)
    with t.untaped():
        order = cast(t, order, i64)
    p = permutation(t, order, h.dtype)
    return _types.linalg_lu((t.fresh(p), *_triangles(t, t.fresh(both))))


def _no_triangles(t: Trace, x: Value) -> tuple[Tensor, Tensor]:
    """L and U of matrices without elements."""
    *batch, m, n = x.type.shape
    k = min(m, n)
    return tuple([t.fresh(empty(t, x, (*batch, *s))) for s in ((m, k), (k, n))])


@composed(torch.lu_unpack, kernel=True)
def lu_unpack(
    t: Trace,
    LU_data: Tensor,
    LU_pivots: Tensor,
    unpack_data: bool = True,
    unpack_pivots: bool = True,
) -> object:
    """P, L and U, those of them that are asked for."""
    h = matrix(t, LU_data, "torch.lu_unpack", takes="all")
    x, (*batch, m, _) = t.read(h), h.shape
    p = low = up = torch.empty(0, dtype=LU_data.dtype)
    if unpack_pivots and h.numel:
        p = t.fresh(permutation(t, order_of(t, t.read(t.lift(LU_pivots)), m), h.dtype))
    elif unpack_pivots:
        p = t.fresh(identity(t, x, (*batch, m, m)))
    if unpack_data:
        low, up = _triangles(t, LU_data) if h.numel else _no_triangles(t, x)
    return _types.lu_unpack((p, low, up))


@composed(torch.functional.lu, Tensor.lu)
def lu(
    t: Trace, A: Tensor, pivot: bool = True, get_infos: bool = False, out: object = None
) -> tuple[Tensor, ...]:
    """What lu_factor gives; it fails if that is not asked for."""
    if out is not None:
        raise t.unsupported("out= has no rule")
    found = torch._lu_with_info(A, pivot=pivot, check_errors=not get_infos)
    return found if get_infos else (found[0], found[1])
