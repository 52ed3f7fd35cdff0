"""Samples of element-wise functions in breadth: rounding, inverse, hyperbolic and special ones."""

from __future__ import annotations

from dataclasses import replace

import torch

from support.function_samples import (
    BINARY,
    BY_FUNCTION,
    NUMBER_PAIRS,
    SPECIAL,
    TENSOR_PAIRS,
    UNARY,
    S,
    Sample,
    b1,
    bf16,
    f16,
    f64,
    i8,
    i32,
    i64,
    inf,
    layouts,
    nan,
    no,
    r,
    restart,
    row,
    u8,
    v,
)

restart()


def _mixes_bools(sample: Sample) -> bool:
    first, second = (x.dtype for x in sample.args)
    return first is b1 and second.is_floating_point


TIES = [S(v(-2.5, -1.5, -0.5, -0.0, 0.0, 0.5, 1.5, 2.5, 0.49999997, 8388609.0, 1e20, nan, -inf))]
INSIDE = [  # within -1 … 1
    S(r(5, low=-0.9, high=0.9), smooth=True),
    S(r(7, dtype=f64, low=-0.9, high=0.9), smooth=True),
    S(r(123, dtype=bf16, low=-0.9, high=0.9)),
    S(v(1.0, -1.0, 0.0, -0.0, 1e-7, 0.99999994, -0.99999994)),
]
ABOVE = [S(r(7, low=1.1, high=9.0), smooth=True), S(v(1.0, 1.0000001, 1e10, 3e38, inf))]
FAR = [S(v(-89.3, -80.5, -20.0, -5.0, 5.0, 20.0, 80.5, 89.3)), S(v(-3e38, -1e10, 1e-30, 1e10))]


def both(name: str) -> str:
    """The spellings of a function that torch.special has too."""
    special = f" special_{name}" if hasattr(torch.special, name) else ""
    return f"{name} {name}_{special}" if hasattr(torch, name) else f"special_{name}"


for _name in ("ceil", "sgn"):
    row(f"{_name} {_name}_", [*UNARY, *TIES])
row("frac frac_", [*UNARY, *TIES])
row(
    "round round_ special_round",
    [
        *UNARY,
        *TIES,
        *(S(r(123) * 40, decimals=d) for d in (0, 1, 3, -1)),
        *(S(r(9, dtype=d), decimals=1) for d in (f64, bf16, f16, i64)),
        S(v(*SPECIAL), decimals=2),
        S(r(9, dtype=i32), decimals=0),
    ],
)
row("signbit", UNARY)
row("isposinf isneginf", UNARY)
row(
    "nan_to_num nan_to_num_",
    [
        *UNARY,
        S(v(*SPECIAL), 1.5, 2.5, -3.5),
        S(v(*SPECIAL, dtype=f64), nan=-1.0),
        S(v(nan, inf, -inf, dtype=bf16), 0.1, posinf=0.3),
        S(v(*SPECIAL), neginf=nan),
        S(r(5, dtype=i64), 2.0),
        S(r(5, dtype=b1), 1.0),
    ],
)
row(
    "heaviside heaviside_",
    [
        S(v(-1.5, 0, -0.0, 2, nan, inf), v(0.5)),
        S(r(3, 1), r(4)),
        S(v(-1, 0, 3, dtype=i64), v(5, 6, 7, dtype=i64)),
        S(r(5, dtype=b1), r(5, dtype=b1)),
        S(v(0.0, 1.0, dtype=bf16), v(0.5, 0.5, dtype=bf16)),
        S(r(5), r(5, dtype=f64)),
        S(r(0), r(1)),
    ],
)
# Vectorized eager may differ where the quotient is beyond 2**24.
_ordinary = [s for s in TENSOR_PAIRS if s.args[0].numel() != len(SPECIAL) ** 2]
row(
    "fmod fmod_",
    [
        *_ordinary,
        *NUMBER_PAIRS,
        S(v(nan, inf, -inf, 1, -1, -0.5, 0, 5, -5, -0.0), v(1, 1, 1, inf, inf, 0, 2, -3, 3, 2)),
        S(v(-7, 7, -7, 7, dtype=i64), v(3, -3, -3, 3, dtype=i64)),
        S(v(-128, 127, dtype=i8), v(-1, 5, dtype=i8)),
    ],
)
row(
    "float_power",
    [s for s in BINARY if not isinstance(s.args[1], bool)],
    exact=False,
)

for _name in ("tan", "sinh", "cosh"):
    row(f"{_name} {_name}_", [*UNARY, *INSIDE, *FAR], exact=False)
for _name in ("asin", "acos", "atan"):
    _arc = f"arc{_name[1:]}"
    row(f"{_name} {_name}_ {_arc} {_arc}_", [*UNARY, *INSIDE, *FAR], exact=False)
for _name in ("asinh", "acosh", "atanh"):
    _arc = f"arc{_name[1:]}"
    row(f"{_name} {_name}_ {_arc} {_arc}_", [*UNARY, *INSIDE, *ABOVE, *FAR], exact=False)
row(both("erfc"), [*UNARY, *FAR], exact=False)
row(both("ndtr"), [*UNARY, *FAR], exact=False)
row(both("entr"), [*UNARY, *INSIDE, *ABOVE], exact=False)
for _name in ("deg2rad", "rad2deg"):
    row(both(_name), UNARY, exact=False)
_shares = [S(r(5, low=0.05, high=0.95), smooth=True), S(r(5, dtype=f64, low=0.1, high=0.9))]
row(
    both("logit"),
    [
        *UNARY,
        *_shares,
        *(S(x, e) for x in layouts() for e in (0.1,)),
        *(S(r(7, dtype=d), eps=0.2) for d in (f64, bf16, f16, i64)),
        S(v(0.0, 1.0, 0.5, -1.0, 2.0, nan, inf), 0.0),
        S(v(*SPECIAL), 0.25),
        S(r(5), None),
    ],
    exact=False,
)

# Without those where eager's gradient is of a bool tensor, which it cannot subtract or negate.
# Second derivatives of equal shapes cancel out for the weights that the check takes.
FLOAT_PAIRS = [replace(s, smooth=False) for s in TENSOR_PAIRS if not _mixes_bools(s)]
_pairs = [S(r(3, 1), r(1, 4), smooth=True), S(r(3, 1, dtype=f64), r(1, 4, dtype=f64), smooth=True)]
for _name in ("logaddexp", "logaddexp2", "hypot"):
    row(f"{_name} {_name}_" if _name == "hypot" else _name, [*FLOAT_PAIRS, *_pairs], exact=False)
row("atan2 atan2_ arctan2 arctan2_", [*FLOAT_PAIRS, *_pairs], exact=False)
_positive = [S(r(5), r(5, low=0.2), smooth=True), S(r(3), v(1, 2, 3, dtype=u8))]
row(both("xlogy"), [*BINARY, *_positive], exact=False)
row(both("xlog1py"), [*BINARY, *_positive], exact=False)
row("copysign copysign_", [replace(s, smooth=False) for s in BINARY])


# --- special functions: their numbers leave those of the samples above as they are ----------------

HALF = [  # by halves and thirds, between and beyond whole numbers
    S(r(9, low=0.2, high=9.0), smooth=True),
    S(r(9, dtype=f64, low=0.2, high=40.0), smooth=True),
    S(v(0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.25, 30.0)),
    S(v(-0.5, -1.25, -2.75, -7.5, -10.2)),
]
_poles = [S(v(0.0, -0.0, nan, inf, 1.0, 2.0, -3e38, -1e10)), S(v(-50, -2, -1, 0, 3, dtype=i64))]
_shares = [
    S(r(9, low=0.02, high=0.98), smooth=True),
    S(r(9, dtype=f64, low=0.02, high=0.98), smooth=True),
    S(v(0.0, 1.0, 0.5, 1e-7, 0.9999999, -0.5, 1.5, nan)),
    S(v(1e-9, 1e-4, 0.25, 0.75, dtype=f64)),
]
_inner = [s for s in UNARY if s.args[0].numel() != len(SPECIAL)]  # far out eager's differ


def also(name: str, other: str | None = None) -> str:
    """The spellings of a function, in place too, which torch.special has under another name."""
    method = f"{name} {name}_ " if hasattr(torch, name) else ""
    return f"{method}special_{other or name}"


row(also("lgamma", "gammaln"), [*UNARY, *HALF, *_poles], exact=False)
row(f"{also('digamma')} special_psi", [*_inner, *HALF, *_poles], exact=False)
_orders = [replace(s, args=(0, *s.args), smooth=False) for s in HALF]
_orders += [S(1, v(-3, 0, 1, 2, 7, dtype=i64)), S(1, r(9, dtype=i32)), S(-1, r(3))]
_orders += [replace(s, args=(n, *s.args)) for n in (2, 3, 7) for s in HALF[:-1]]
_orders += [S(n, v(-0.5, -1.25, -2.75, -10.2, dtype=f64)) for n in (2, 3, 7)]
_orders += [
    S(2, v(0.0, -0.0, -1.0, -4.0, nan, 1e-3)),
    S(5, v(-3, 0, 1, 7, dtype=i64)),
    no(31, r(3)),
]
row("polygamma special_polygamma polygamma_", _orders, exact=False)
for _method in (torch.Tensor.polygamma, torch.Tensor.polygamma_):
    BY_FUNCTION[_method] = [replace(s, args=s.args[::-1]) for s in _orders]
_above = [S(r(5, low=2.5, high=9.0), p, smooth=True) for p in (1, 3)]
row("mvlgamma mvlgamma_ special_multigammaln", [*_above, S(r(3), 0)], exact=False)
row(also("erfinv"), [*_inner, *INSIDE, *_shares], exact=False)
row(also("ndtri"), [*_inner, *_shares], exact=False)
row(also("log_ndtr"), [*_inner, S(v(-30.0, -12.5, -5.0, -1.0, 5.0, 20.0))], exact=False)
row(also("erfcx"), [*_inner, S(v(-2.5, -0.5, 0.0, 0.5, 3.75, 20.0))], exact=False)
_wide = [S(v(-20.0, -8.0, -3.0, -0.0, 0.0, 1e-6, 5.0, 8.0, 8.1, 60.0)), S(r(9, dtype=f64) * 9)]
for _name in ("i0", "i0e", "i1", "i1e"):
    row(also(_name), [*_inner, *_wide], exact=False)

# eager differentiates by x alone, so where a is of integers; its float64 is inexact near a large a
_gammas = [
    S(r(9, low=0.1, high=9.0), r(9, low=0.1, high=12.0)),
    S(v(1, 1, 2, 3, 7, dtype=i64), r(5, low=0.1, high=9.0), smooth=True),
    S(v(1, 30, 300, dtype=i64), v(50.0, 31.0, 290.0), smooth=True),
    S(r(123, dtype=f64, low=0.001, high=19.0), r(123, dtype=f64, low=0.05, high=1.0)),
    S(r(123, dtype=f64, low=0.001, high=19.0), r(123, dtype=f64, low=1.2, high=30.0)),
    S(r(3, 1, low=0.1, high=9.0), r(1, 4, low=0.1, high=9.0)),
    S(r(4, 3, low=0.5, high=2.0).t(), r(3, 4, low=0.1, high=2.0)),
    S(r(0), r(1)),
    S(r(123, low=0.001, high=2.0), r(low=0.5, high=0.9)),
    S(r(123, low=20.0, high=400.0), r(123, low=10.0, high=500.0)),
    S(r(123, low=20.0, high=40.0), r(123, low=15.0, high=50.0)),
    S(
        v(1e-3, 1e-3, 0.3, 20.5, 199.0, 201.0, 1e3, 1e3, 1e3),
        v(1e-3, 30, 1.1, 20, 199, 205, 900, 1e3, 1300),
    ),
    S(r(9, dtype=bf16, low=0.1, high=9.0), r(9, dtype=bf16, low=0.1, high=9.0)),
    S(r(9, dtype=f16, low=0.1, high=9.0), r(9, dtype=f16, low=0.1, high=9.0)),
    S(r(3, low=0.1), r(3, dtype=f64, low=0.1)),
    S(r(3, dtype=i64), r(3, dtype=i64)),
    S(r(3, low=0.1), 2.0),
]
_EDGES = (0.0, -0.0, 1.0, -1.0, 0.5, 300.0, inf, -inf, nan)
_edge_pairs = [(a, x) for a in _EDGES for x in _EDGES if not a == x == 300]
_EDGE_A, _EDGE_X = (v(*column) for column in zip(*_edge_pairs, strict=True))
_gammas += [S(_EDGE_A, _EDGE_X), S(_EDGE_A.double(), _EDGE_X.double())]
_shapes = torch.tensor([0.05, 0.7, 3.0, 7.0, 12.0, 90.0, 900.0])
_spread = torch.tensor([[0.01], [0.3], [0.95], [1.02], [1.5], [4.0]])
row(
    "_standard_gamma_grad",
    [
        S(x, y)
        for dtype in (torch.float32, f64)
        for x, y in ((_shapes.expand(6, 7).to(dtype), (_shapes * _spread).to(dtype)),)
    ]
    + [S(r(5, low=0.1), r(5, low=0.1)), S(r(5, low=0.1), r(3, low=0.1))],
    exact=False,
)
_samples = torch.tensor([0.001, 0.1, 0.4, 0.52, 0.8, 0.97, 0.9999])
_totals = torch.tensor([[0.3], [2.5], [9.0], [60.0], [800.0]])
row(
    "_dirichlet_grad",
    [
        S(*(x.expand(5, 7).to(dtype) for x in (_samples, _totals * share, _totals)))
        for dtype in (torch.float32, f64)
        for share in (0.05, 0.45, 0.5, 0.9)
    ]
    + [S(r(5, low=0.1, high=0.9), r(5, low=0.1), r(5, low=3.0) + 1)],
    exact=False,
)
row("igamma igamma_ igammac igammac_ special_gammainc special_gammaincc", _gammas, exact=False)
_zetas = [
    S(r(9, low=1.2, high=9.0), r(9, low=0.1, high=9.0)),
    S(r(9, dtype=f64, low=1.01, high=9.0), r(9, dtype=f64, low=0.1, high=40.0)),
    S(r(3, 1, low=1.1, high=9.0), r(1, 4, low=0.3, high=9.0)),
    S(r(4, 3, low=1.5, high=9.0).t(), r(3, 4, low=0.5, high=9.0)),
    S(2.0, r(5, low=0.3), smooth=True),
    S(3, r(5, dtype=f64, low=0.3, high=9.0), smooth=True),
    S(3, v(-0.3, -2.25, 0.01), smooth=True),
    S(v(2, 5, 3, dtype=i64), r(3, low=0.3), smooth=True),
    S(r(5, low=1.5, high=9.0), 1.5),
    S(2, v(1, 2, 3, 50, dtype=i64)),
    S(v(2, 3, 4, 9, dtype=i64), v(1, 2, -3, 0, dtype=i64)),
    S(v(2, 3, 4, 7, 2, 3), v(-0.5, -2.25, -3.75, -0.3, -7.5, -10.2)),
    S(v(2, 3, 4, 7, 2, 3, dtype=f64), v(-0.5, -2.25, -3.75, -0.3, -7.5, -10.2, dtype=f64)),
    S(v(2.5, 2.5, 1.0, 0.5, 200, 200, 1e10, 40, 40), v(-0.5, -2, -0.5, 1, 1, 100, 10, 10, 2)),
    S(_EDGE_A + 1, _EDGE_X),
    S(_EDGE_A.double() + 1, _EDGE_X.double()),
    S(r(0), r(1)),
    S(r(3, dtype=b1), r(3, dtype=b1)),
    S(r(3, dtype=bf16), r(3)),
    S(2.0, r(3, dtype=f16)),
]
row("special_zeta", _zetas, exact=False)

_undifferentiated = [
    *layouts(),
    v(0.0, -0.0, 0.3, 0.5, -2.0, 30.0, inf, -inf, nan),
    r(9, dtype=f64),
]
_undifferentiated += [torch.linspace(-12, 12, 97), torch.linspace(0.1, 130, 60, dtype=f64)]
_undifferentiated += [v(1e-6, 2.0, 2.09, -2.09, 5.1, 8.4, 103.0, 1e-30, dtype=f64)]
_undifferentiated += [r(5, dtype=i64), r(5, dtype=b1), r(5, dtype=bf16), r(5, dtype=f16)]
row(
    "special_spherical_bessel_j0 special_modified_bessel_i0 special_modified_bessel_i1 "
    "special_bessel_j0 special_bessel_j1 special_bessel_y0 special_bessel_y1 special_airy_ai "
    "special_modified_bessel_k0 special_modified_bessel_k1 special_scaled_modified_bessel_k0 "
    "special_scaled_modified_bessel_k1",
    [S(x) for x in _undifferentiated],
    exact=False,
)

_x = torch.linspace(-1.5, 1.7, 23)
_xs = [_x, _x.double(), _x[:20].reshape(4, 5).t(), torch.zeros(0), v(1, 2, 3).to(i64)]
_points = [S(x, n) for x in _xs for n in (0, 1, 2.7, 5)] + [S(_x, n) for n in (-1, 7, 12, inf)]
_points += [S(v(-1.0, -0.0, 0.0, 0.5, 1.0, inf, -inf), n) for n in (1, 3, 9)]
_points += [S(_x, torch.arange(23) % 12 - 1), S(_x[:, None], v(0.0, 3.9, -0.5, 10.0, nan, inf))]
_points += [
    S(0.3, v(2.0, 5.0)),
    S(_x[:1], torch.zeros(0, dtype=i64)),
    S(_x.to(bf16), 2),
    no(_x.double(), 400),
]
row(
    "special_chebyshev_polynomial_t special_chebyshev_polynomial_u special_chebyshev_polynomial_v "
    "special_chebyshev_polynomial_w special_shifted_chebyshev_polynomial_t "
    "special_shifted_chebyshev_polynomial_u special_shifted_chebyshev_polynomial_v "
    "special_shifted_chebyshev_polynomial_w special_hermite_polynomial_h "
    "special_hermite_polynomial_he special_laguerre_polynomial_l special_legendre_polynomial_p",
    _points,
    exact=False,
)

# --- parts of numbers ----------------------------------------------------------------------------

_numbers = v(0.0, -0.0, 1.0, -0.75, 3e38, -1e-40, 1e-45, inf, -inf, nan, 0.5, 1e-38)
row(
    "frexp",
    [
        *(S(x) for x in layouts()),
        S(_numbers),
        *(S(_numbers.to(d)) for d in (f64, f16, bf16)),
        # beyond, eager's gradient takes the power of two in float32, and is 0 or inf
        S(v(1.7e30, 5e-30, -2.3e-20, 1e20, 1e-20, dtype=f64)),
        S(r(5, dtype=i64)),
    ],
)
_nexts = [S(r(5), r(5)), S(r(3, 1), r(4)), S(r(4, 3).t(), r(3, 4)), S(r(5, dtype=f64), r(5))]
_nexts += [S(_numbers, x) for x in (_numbers.flip(0), _numbers, v(0.0), v(nan), v(-inf))]
_nexts += [
    S(r(3, dtype=i64), r(3, dtype=i64)),
]
_narrow = v(0.0, 1.0, -0.75, 2.5, 0.5, 255, 1e-3, inf, -inf, nan, 6e4, 3e38, 1e-38, 1e-40, 6.1e-5)
_nexts += [S(_narrow.to(d), v(x).to(d)) for d in (bf16, f16) for x in (inf, -inf, 0.0, nan, 1.0)]
row("nextafter nextafter_", _nexts)
_whole = [S(r(9, dtype=d), r(9, dtype=e)) for d in (i64, i32, i8, u8) for e in (d, i64)]
_whole += [S(v(12, -18, 0, 0, 7, 10**15, dtype=i64), v(18, 12, 5, 0, -7, 360, dtype=i64))]
_whole += [S(r(3, 1, dtype=i64), r(4, dtype=i64)), S(r(0, dtype=i64), r(1, dtype=i64))]
_whole += [S(r(3), r(3, dtype=i64)), S(r(3, dtype=b1), r(3, dtype=b1))]
row("gcd gcd_ lcm lcm_", _whole)

# --- bins ----------------------------------------------------------------------------------------

_edges = torch.linspace(-1.0, 3.0, 41)
row(
    "histc",
    [
        S(r(200)),
        S(r(200), 7),
        S(_edges, 20, -1, 3),
        S(_edges.double(), bins=20, min=-1, max=3),
        S(r(4, 9).t(), 5, -1.5, 1.0),
        S(v(1, 1, 1), 4),
        S(v(nan, 0.5, inf, -inf, 2.0), 4, 0, 1),
        S(v(nan, 0.5), 4),
        S(r(0), 4),
        S(r(50, dtype=bf16), 5, -1, 1),
        S(r(50, dtype=f16), 5),
        S(r(5), 3, 2, 1),
        S(r(5), 0),
        S(r(5, dtype=i64), 3),
    ],
)
row(
    "histogram",
    [
        S(r(200)),
        S(r(200), 7),
        S(_edges + 0.05, 20, range=(-1.0, 3.0)),
        S(_edges.double() + 0.05, 20, range=(-1.0, 3.0), density=True),
        S(r(4, 9).t(), 5, range=(-1.5, 1.0), weight=r(9, 4)),
        S(r(30), v(-1.5, 0.0, 0.25, 1.0), weight=r(30), density=True),
        S(v(1, 1, 1), 4),
        S(v(nan, 0.5, inf, -inf, 2.0), 4, range=(0.0, 1.0)),
        S(torch.linspace(-2, 2, 60).to(bf16), 4, range=(-1.0, 1.0)),
        S(torch.linspace(-2, 2, 60).to(f16), v(-1.5, 0.25, 1.0).to(f16), density=True),
        S(torch.ones(3, dtype=bf16), 4),
        S(torch.ones(0, dtype=bf16), 4),
        S(v(nan, 0.5), 4),
        S(r(0), 4),
        S(r(5), 0),
        S(r(5, dtype=i64), 3),
        S(r(5, dtype=bf16), 3),
    ],
    exact=False,
)
row("sym_float", [S(2), S(-1.5), S(True)])

_points = r(9, 3)
row(
    "histogramdd",
    [
        S(_points, [3, 1, 4]),
        S(_points, 3, range=[-1.0, 1.0, 0.0, 2.0, -0.5, 0.5], density=True),
        S(r(3, 3, 2), [2, 5], weight=r(3, 3)),
        S(_points[:, :2], (v(-1.0, 0.0, 1.0), v(0.0, 0.5, 1.0, 3.0)), density=True),
        S(r(0, 2), 3),
        S(r(5), 3),
        S(r(5, 2), [3]),
        S(r(5, 2, dtype=i64), 3),
        no(r(5, 2, dtype=bf16), 3),
    ],
    exact=False,
)
