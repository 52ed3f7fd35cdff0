"""Samples of linear algebra: decompositions, solutions, determinants, what is made of spectra.

Importing this adds them to the table of `function_samples`, as `function_samples_nn` does. The
matrices are far from singular, so that eager's rounding, by another LAPACK, is near to ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch

from support.function_samples import (
    BY_FUNCTION,
    S,
    bare_name,
    bf16,
    f16,
    f32,
    f64,
    i64,
    inf,
    no,
    r,
    restart,
    row,
)

restart()


def square(*shape: int, dtype: torch.dtype = f32) -> torch.Tensor:
    """Square matrices, a batch of shape `shape[:-1]`, with a strong diagonal that alternates."""
    *batch, n = shape
    sign = 1 - 2 * (torch.arange(n) % 3 == 1).to(dtype)
    return r(*batch, n, n, dtype=dtype, low=-0.5, high=0.5) + torch.diag(sign * 2)


def swapping(*shape: int, dtype: torch.dtype = f32) -> torch.Tensor:
    """The same with their rows turned round, so that LU has to swap some."""
    return square(*shape, dtype=dtype).flip(-2).contiguous()


def spd(*shape: int, dtype: torch.dtype = f32) -> torch.Tensor:
    """Symmetric positive definite matrices with eigenvalues that lie apart."""
    x = r(*shape, shape[-1], dtype=dtype, low=-0.5, high=0.5)
    return x @ x.mT / shape[-1] + torch.diag(1.0 + torch.arange(shape[-1])).to(dtype)


def wide(*shape: int, dtype: torch.dtype = f32) -> torch.Tensor:
    """Matrices of which the singular values lie apart."""
    *_, m, n = shape
    places = torch.arange(min(m, n))
    spread = torch.zeros(m, n, dtype=dtype)
    spread[places, places] = 1.0 + places.to(dtype)
    return r(*shape, dtype=dtype, low=-0.4, high=0.4) + spread


def singular(n: int) -> torch.Tensor:
    return torch.ones(n, n)


NONE = [torch.zeros(0, 0), torch.zeros(0, 3, 3), torch.zeros(2, 0, 0)]
NONE += [torch.zeros(0, 3, 3, dtype=bf16), torch.zeros(0, 0, dtype=i64)]  # some kernels ask late
REFUSED = [S(r(3, 4)), S(r(3)), S(r(3, 3).to(bf16)), S(torch.eye(3, dtype=i64))]  # by eager too
_nan = square(3)
_nan[1, 2] = float("nan")


def of(make: Callable[..., torch.Tensor], **kwargs: object) -> list:
    """Of several sizes, layouts and batches."""
    return [
        S(make(3), smooth=True, **kwargs),
        S(make(1), **kwargs),
        S(make(5).t(), **kwargs),
        S(make(2, 3), smooth=True, **kwargs),
        S(make(2, 1, 3).transpose(0, 1), **kwargs),
        S(make(6)[::2, ::2], **kwargs),
        S(make(4, dtype=f64), smooth=True, **kwargs),
        S(make(3).expand(2, 3, 3), **kwargs),
        *(S(x, **kwargs) for x in NONE),
    ]


# --- cholesky and lu ---------------------------------------------------------------------------

_cholesky = [*of(spd), *of(spd, upper=True), *REFUSED]
row("linalg_cholesky", [*_cholesky, S(-spd(3)), S(_nan)], exact=False)
row("cholesky", [*_cholesky, S(spd(3), True), S(-spd(3))], exact=False)
row("linalg_cholesky_ex", [*_cholesky, S(-spd(3), check_errors=True)], exact=False)
_lu = [*of(square), *of(swapping), S(r(3, 5)), S(r(2, 5, 3)), S(r(4, 7, dtype=f64), smooth=True)]
_lu += [S(r(0, 3)), S(r(3)), S(square(3), pivot=False), S(torch.eye(3, dtype=i64))]
row("linalg_lu", _lu, exact=False)
row("linalg_lu_factor", [*_lu, S(singular(3)), S(square(3).to(bf16))], exact=False)
row("linalg_lu_factor_ex", [*_lu, S(singular(3)), S(singular(3), check_errors=True)], exact=False)
row("_lu_with_info", [S(x) for x in (square(3), swapping(2, 4))], exact=False)
row("lu", [S(square(3), smooth=True), S(swapping(2, 4)), S(swapping(3), True, True)], exact=False)


def factored(*shape: int, dtype: torch.dtype = f32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.linalg.lu_factor(swapping(*shape, dtype=dtype))


_fixed = torch.linalg.lu_factor(torch.tensor([[1.0, 2.0, 0.5], [4.0, 1.0, -1.0], [2.0, -3.0, 8.0]]))
row(
    "lu_unpack",
    [
        S(*factored(3), smooth=True),
        S(*factored(2, 4)),
        S(*torch.linalg.lu_factor(r(3, 5))),
        S(*torch.linalg.lu_factor(r(2, 5, 3))),
        S(*factored(3), unpack_pivots=False),
        *(S(_fixed[0].to(dtype), _fixed[1]) for dtype in (bf16, f16, i64)),
        S(torch.zeros(2, 0, 3, dtype=i64), torch.zeros(2, 0, dtype=torch.int32)),
    ],
    exact=False,
)
row(
    "linalg_lu_solve",
    [
        S(*factored(3), r(3, 2), smooth=True),
        S(*factored(2, 4), r(2, 4, 3)),
        S(*factored(2, 4), r(4, 3)),
        S(*factored(3), r(3, 2), adjoint=True, smooth=True),
        S(*factored(3), r(2, 3), left=False),
        S(*factored(3), r(2, 3), left=False, adjoint=True),
        S(*factored(3, dtype=f64), r(3, 2, dtype=f64)),
        S(*factored(3), r(4, 2)),
        S(*factored(3), r(3, 0)),
        S(_fixed[0].to(bf16), _fixed[1], torch.zeros(3, 0, dtype=bf16)),
        S(_fixed[0].to(bf16), _fixed[1], torch.ones(3, 2, dtype=bf16)),
    ],
    exact=False,
)
BY_FUNCTION[torch.lu_solve] = BY_FUNCTION[torch.Tensor.lu_solve] = [
    S(r(3, 2), *factored(3), smooth=True),
    S(r(2, 4, 3), *factored(2, 4)),
    S(r(3, 2), *factored(2, 3)),
]

# --- qr, eigenvalues, singular values ----------------------------------------------------------

_tall = [S(wide(3, 3), smooth=True), S(wide(5, 3)), S(wide(3, 5), smooth=True), S(wide(2, 4, 3))]
_tall += [S(wide(5, 3).t()), S(wide(1, 1)), S(wide(4, 3, dtype=f64), smooth=True)]
_tall += [*(S(x) for x in NONE), S(r(0, 3)), S(r(3, 0)), S(r(3)), S(r(3, 3).to(bf16))]
row(
    "linalg_qr",
    [
        *_tall,
        S(wide(3, 5), "complete", smooth=True),
        S(wide(3, 3), mode="complete"),
        S(wide(5, 3), "complete"),
        S(wide(5, 3), "r"),
        S(wide(3, 3), "other"),
    ],
    exact=False,
)
row("qr", [*_tall, S(wide(3, 5), False), S(wide(5, 3), some=False)], exact=False)
row("geqrf", _tall, exact=False)
row(
    "linalg_eigh linalg_eigvalsh",
    [*of(spd), *of(spd, UPLO="U"), S(square(3)), S(square(3), "u"), S(spd(3), "X"), *REFUSED]
    + [S(torch.eye(3)), S(_nan)],
    exact=False,
)
row(
    "linalg_svd",
    [
        *_tall,
        *(S(*s.args, full_matrices=False, smooth=s.smooth) for s in _tall),
        S(wide(3, 5), driver="gesvd"),
        S(_nan),
    ],
    exact=False,
)
row("linalg_svdvals", [*_tall, S(torch.eye(3)), S(_nan)], exact=False)
row(
    "svd",
    [*_tall, S(wide(3, 5), False), S(wide(3, 5), some=False), S(wide(5, 3), True, False)],
    exact=False,
)
for _name, _more in (("svd_lowrank", {}), ("pca_lowrank", {"center": False}), ("pca_lowrank", {})):
    _function = getattr(torch, _name)
    BY_FUNCTION.setdefault(_function, [])
    _even = S(wide(5, 4), q=3, **_more)
    BY_FUNCTION[_function] += [_even, S(wide(2, 3, 6), q=2, smooth=True, **_more)]

# --- solutions ---------------------------------------------------------------------------------

_pairs = [
    S(square(3), r(3, 2), smooth=True),
    S(swapping(2, 4), r(2, 4, 3), smooth=True),
    S(square(3).t(), r(2, 3).t()),
    S(square(1), r(1, 1)),
    S(swapping(5, dtype=f64), r(5, 2, dtype=f64), smooth=True),
    S(square(2, 3), r(3, 2)),
    S(square(3), r(2, 3, 2)),
    S(square(3), r(3, 0)),
    S(torch.zeros(0, 0), r(0, 2)),
    S(torch.zeros(0, 3, 3), r(0, 3, 2)),
    S(torch.zeros(0, 3, 3, dtype=bf16), torch.zeros(0, 3, 2, dtype=bf16)),
    S(torch.zeros(0, 3, 3, dtype=f16), torch.ones(1, 3, 2, dtype=f16)),
    S(square(3), r(4, 2)),
    S(square(3), r(3, 2, dtype=f64)),
    S(r(3, 4), r(3, 2)),
]
_fitting = [s for s in _pairs if s.args[0].dtype is s.args[1].dtype]
_right = [
    S(square(3), r(2, 3), left=False, smooth=True),
    S(swapping(2, 4), r(2, 5, 4), left=False),
    S(square(3), r(3, 2), left=False),
]
_vectors = [
    S(square(3), r(3), smooth=True),
    S(square(2, 4), r(2, 4)),
    S(square(3), r(3), left=False),
]
row("linalg_solve", [*_pairs, *_right, *_vectors, S(singular(3), r(3, 2))], exact=False)
row(
    "linalg_solve_ex",
    [*_pairs, *_right, *_vectors, S(singular(3), r(3, 2), check_errors=True)],
    exact=False,
)
row(
    "linalg_solve_triangular",
    [S(*s.args, upper=upper, smooth=s.smooth) for s in _fitting for upper in (False, True)]
    + [S(*s.args, upper=True, smooth=s.smooth, **s.kwargs) for s in _right]
    + [S(square(3), r(3, 2), upper=False, unitriangular=True, smooth=True)]
    + [S(torch.zeros(3, 3), r(3, 2), upper=False)],
    exact=False,
)
row(
    "triangular_solve",
    [
        S(r(3, 2), square(3), smooth=True),
        S(r(2, 3, 2), square(2, 3), False),
        S(r(3, 2), square(3), True, True, smooth=True),
        S(r(3, 2), square(3), False, True, True),
        S(r(3, 2), square(2, 3)),
        S(r(4, 2), square(3)),
    ],
    exact=False,
)
_roots = [S(r(3, 2), spd(3).tril(), smooth=True), S(r(2, 3, 1), spd(2, 3).tril())]
_roots += [S(r(3, 2), spd(3).triu(), True, smooth=True), S(r(3, 2), spd(2, 3)), S(r(4, 2), spd(3))]
row("cholesky_solve", [*_roots, S(r(0, 2), torch.zeros(0, 0))], exact=False)
row("cholesky_inverse", [*of(spd), *of(spd, upper=True), S(torch.zeros(3, 3))], exact=False)
_inverse = [*of(square), *of(swapping), *REFUSED, S(singular(3))]
row("linalg_inv inverse", _inverse, exact=False)
row("linalg_inv_ex", [*_inverse[:-1], S(singular(3), check_errors=True)], exact=False)
_four = square(6).reshape(2, 3, 6)
row(
    "linalg_tensorinv",
    [S(_four, smooth=True), S(square(6).reshape(6, 3, 2), 1), S(_four, ind=1)],
    exact=False,
)
row(
    "linalg_tensorsolve",
    [
        S(_four, r(2, 3), smooth=True),
        S(square(6).reshape(6, 2, 3), r(6)),
        S(square(6).reshape(2, 6, 3), r(2, 3), dims=(0, 2)),
        S(_four, r(2, 2)),
    ],
    exact=False,
)

# --- determinants and matrix functions ---------------------------------------------------------

_det = [*of(square), *of(swapping), *REFUSED]
row("linalg_det det", [*_det, S(singular(3)), S(singular(2))], exact=False)
row("linalg_slogdet slogdet logdet", _det, exact=False)
row(
    "linalg_matrix_exp matrix_exp",
    [*of(square), S(r(3, 3, dtype=f64, low=-4.0, high=4.0)), S(torch.zeros(3, 3)), S(r(3, 4))]
    + [no(torch.eye(3, dtype=bf16))],  # of which eager gives garbage
    exact=False,
)

# --- spectra -----------------------------------------------------------------------------------

_orders = ("fro", "nuc", 1, -1, 2, -2, inf, -inf)
row(
    "linalg_matrix_norm",
    [
        *(S(wide(3, 4), order, smooth=order in ("fro", "nuc", 2)) for order in _orders),
        *(S(wide(2, 3, 4, dtype=f64), order, (0, 2), True) for order in _orders),
        *(S(wide(2, 3, 4, dtype=f64), order, (-1, 0)) for order in _orders),
        S(wide(3, 4, dtype=f64), "nuc"),
        S(wide(3, 4), dtype=f64),
        S(r(3, 4, dtype=bf16), 1),
        S(r(0, 3), "nuc"),
        S(r(3)),
        S(wide(3, 4), 3),
        S(wide(3, 4), 2, (0, 0)),
        S(torch.eye(3, dtype=i64)),
        *(S(torch.eye(3, 4, dtype=bf16), order) for order in _orders),
    ],
    exact=False,
)
row(
    "linalg_cond",
    [S(square(3), p) for p in (None, 1, -1, 2, -2, inf, "fro")]
    # singular values far apart: between close ones the second derivative loses its digits
    + [S(torch.tensor([[1.1, -0.2, 0.1], [0.3, 2.0, -0.1], [0.1, 0.2, 4.0]]), 2, smooth=True)]
    + [S(wide(2, 3, 4)), S(wide(2, 3, 4), 1), S(singular(3), 1), S(square(2, 3), -inf), S(r(3))],
    exact=False,
)
row(
    "linalg_matrix_rank",
    [
        S(wide(3, 4)),
        S(singular(3)),
        S(wide(2, 4, 3), 1.5),
        S(wide(2, 4, 3), rtol=0.5),
        S(spd(3), hermitian=True, atol=1.5),
        S(wide(2, 4, 3), atol=torch.tensor([1.5, 0.5])),
        S(torch.zeros(2, 0, 3)),
        S(r(3)),
    ],
    exact=False,
)
row(
    "linalg_pinv",
    [
        S(wide(3, 4), smooth=True),
        S(wide(4, 3), smooth=True),
        S(wide(2, 3, 3)),
        S(singular(3)),
        S(spd(3), hermitian=True, smooth=True),
        S(wide(3, 4), 0.6),
        S(wide(3, 4), atol=1.5),
        S(wide(3, 4, dtype=f64), rtol=0.1),
        S(torch.zeros(2, 0, 3)),
        S(r(3)),
    ],
    exact=False,
)
row("pinverse", [S(wide(3, 4), smooth=True), S(wide(2, 4, 3)), S(wide(3, 4), 0.6)], exact=False)
row(
    "linalg_lstsq",
    [
        S(wide(3, 3), r(3, 2)),
        S(wide(5, 3), r(5, 2), smooth=True),
        S(wide(3, 5), r(3, 2)),
        S(wide(2, 5, 3), r(2, 5, 2)),
        S(wide(2, 5, 3), r(2, 5)),
        S(wide(5, 3), r(5, 2), driver="gels"),
        S(wide(5, 3), r(5, 2), driver="gelsd"),
        S(wide(5, 3), r(5, 2), driver="gelss"),
        S(wide(5, 3, dtype=f64), r(5, 2, dtype=f64)),
        S(wide(5, 3), r(4, 2)),
        S(wide(5, 3), r(5, 2), driver="other"),
    ],
    exact=False,
)


def reflections(*shape: int, dtype: torch.dtype = f32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.geqrf(wide(*shape, dtype=dtype))


row(
    "linalg_householder_product orgqr",
    [
        S(*reflections(3, 3), smooth=True),
        S(*reflections(5, 3), smooth=True),
        S(*reflections(2, 5, 3)),
        S(wide(5, 3), r(2)),
        S(wide(3, 5), r(3)),
        S(torch.zeros(2, 4, 0), torch.zeros(2, 0)),
        S(*reflections(4, 2, dtype=f64)),
    ],
    exact=False,
)
row(
    "ormqr",
    [S(*reflections(4, 3), r(4, 2), True, turned, smooth=True) for turned in (False, True)]
    + [S(*reflections(4, 3), r(2, 4), False, turned) for turned in (False, True)]
    + [S(*reflections(2, 4, 3), r(2, 4, 4)), S(*reflections(4, 3), r(3, 2))],
    exact=False,
)

# --- vectors of any sign -----------------------------------------------------------------------

# Where results have vectors, and whether they are rows: one lot after another turns with the first.
SIGNED = {
    "linalg_eigh": ((1, False),),
    "linalg_svd": ((0, False), (2, True)),
    "svd": ((0, False), (2, False)),
    "svd_lowrank": ((0, False), (2, False)),
    "pca_lowrank": ((0, False), (2, False)),
}


def signless(function: Callable) -> Callable:
    """A function that gives vectors of any sign, so turned that the largest component of each is
    positive; any other as it is. Of a full decomposition's vectors without a value nothing."""
    lots = SIGNED.get(bare_name(function))
    if lots is None:
        return function

    @wraps(function, updated=())
    def turned(*args: object, **kwargs: object) -> list[torch.Tensor]:
        found, sign = list(function(*args, **kwargs)), None
        k = min(found[0].shape[-1], *(x.shape[-1] for x in found[1:2]))
        for place, rows in lots:
            x = found[place].mT if rows else found[place]
            x = x[..., :k]
            if sign is None and x.numel():
                sign = x.detach().gather(-2, x.detach().abs().argmax(-2, keepdim=True)).sign()
            found[place] = x if sign is None else x * sign
        return found

    turned.__name__ = bare_name(function)
    return turned
