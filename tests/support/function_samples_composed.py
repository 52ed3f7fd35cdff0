"""Samples of functions that torch composes of others: losses of margins, quantiles, scans, …

Importing this adds them to the table of `function_samples`, as `function_samples_nn` does.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from support.function_samples import (
    BY_FUNCTION,
    ROWS,
    S,
    Sample,
    b1,
    bf16,
    f16,
    f64,
    i32,
    i64,
    inf,
    nan,
    no,
    r,
    restart,
    row,
    u8,
    v,
)

restart()

HOW = [{}, {"reduction": "sum"}, {"reduction": "none"}]


def sign(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """1 and -1, as integers too: what a target of pairs holds."""
    return (torch.arange(torch.Size(shape).numel()).reshape(shape) % 3 % 2 * 2 - 1).to(dtype)


# --- losses of pairs ---------------------------------------------------------------------------

row(
    "margin_ranking_loss",
    [
        *(S(r(5), r(5), sign(5, dtype=i64), smooth=True, **how) for how in HOW),
        S(r(3, 4), r(3, 4), sign(3, 4, dtype=i64), margin=0.5),
        S(r(3, 1), r(3, 4), sign(3, 4, dtype=i64), 0.3),
        S(r(4, 3).t(), r(4, 3).t(), sign(3, 4, dtype=i64), reduction="none"),
        S(r(33, dtype=bf16), r(33, dtype=bf16), sign(33, dtype=i64)),
        S(r(5, dtype=f64), r(5, dtype=f64), sign(5, dtype=i64), size_average=False),
        S(r(0), r(0), sign(0, dtype=i64)),
        S(r(), r(), sign(dtype=i64)),
        S(r(5), r(4), sign(5, dtype=i64)),
        no(r(5, dtype=i64), r(5, dtype=i64), sign(5, dtype=i64)),
        S(r(5), r(5), sign(5, dtype=i64), reduction="other"),
    ],
    exact=False,
)
row(
    "hinge_embedding_loss",
    [
        *(S(r(5), sign(5, dtype=i64), smooth=True, **how) for how in HOW),
        S(r(3, 4), sign(3, 4, dtype=i64), margin=0.5),
        S(r(3, 4), torch.arange(-1, 2)[:, None], reduction="none"),
        S(r(4, 3).t(), sign(3, 4, dtype=i64), 2.0, reduction="none"),
        S(r(33, dtype=bf16), sign(33, dtype=i64)),
        S(r(5, dtype=f64), sign(5, dtype=i64), reduce=False),
        S(r(0), sign(0, dtype=i64)),
        S(r(), sign(dtype=i64)),
        S(r(5), sign(4, dtype=i64)),
        no(r(5, dtype=i64), sign(5, dtype=i64)),
    ],
    exact=False,
)
row(
    "cosine_embedding_loss",
    [
        *(S(r(5, 3), r(5, 3), sign(5, dtype=i64), smooth=True, **how) for how in HOW),
        S(r(5, 3), r(5, 3), sign(5, dtype=i64), 0.4),
        S(r(3), r(3), sign(dtype=i64)),
        S(r(3, 5).t(), r(5, 3), torch.arange(5) % 3 - 1, reduction="none"),
        S(r(5, 3, dtype=f64), r(5, 3, dtype=f64), sign(5, dtype=i64)),
        S(r(5, 7, dtype=bf16), r(5, 7, dtype=bf16), sign(5, dtype=i64)),
        S(r(0, 3), r(0, 3), sign(0, dtype=i64)),
        S(r(5, 3), r(5, 3), sign(5, 1, dtype=i64)),
        S(r(5), r(5), sign(5, dtype=i64)),
        S(r(5, 3), r(5, 3), sign(dtype=i64)),
    ],
    exact=False,
)
row(
    "triplet_margin_loss",
    [
        *(S(r(5, 3), r(5, 3), r(5, 3), smooth=True, **how) for how in HOW),
        S(r(5, 3), r(5, 3), r(5, 3), margin=2.0, p=3.0),
        S(r(5, 3), r(5, 3), r(5, 3), 0.5, 1, swap=True, smooth=True),
        S(r(3), r(3), r(3)),
        S(r(3, 5).t(), r(1, 3), r(5, 3), reduction="none"),
        S(r(5, 3, dtype=f64), r(5, 3, dtype=f64), r(5, 3, dtype=f64), swap=True),
        S(r(5, 7, dtype=bf16), r(5, 7, dtype=bf16), r(5, 7, dtype=bf16)),
        S(r(0, 3), r(0, 3), r(0, 3)),
        S(r(5, 3), r(3), r(5, 3)),
        S(r(5, 3), r(4, 3), r(5, 3)),
        S(r(5, 3), r(5, 3), r(5, 3), margin=-1.0),
    ],
    exact=False,
)


def manhattan(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x - y).abs().sum(-1)


row(
    "triplet_margin_with_distance_loss",
    [
        *(S(r(5, 3), r(5, 3), r(5, 3), smooth=True, **how) for how in HOW),
        S(r(5, 3), r(5, 3), r(5, 3), distance_function=manhattan, swap=True),
        S(r(5, 3, dtype=f64), r(5, 3, dtype=f64), r(5, 3, dtype=f64), margin=0.3),
        S(r(5, 3), r(3), r(5, 3)),
        S(r(5, 3), r(5, 3), r(5, 3), reduction="other"),
    ],
    exact=False,
)

# --- losses of classes -------------------------------------------------------------------------

# of no samples, eager's sum of these two is what lay in memory
_classes = torch.tensor([2, 0, 3, 1, 2])
row(
    "multi_margin_loss",
    [
        *(S(r(5, 4), _classes, **how) for how in HOW),
        *(S(r(5, 4), _classes, p=2, margin=0.7, **how) for how in HOW),
        S(r(5, 4), _classes, weight=r(4, low=0.1).requires_grad_(False), reduction="sum"),
        S(r(4), _classes[0]),
        S(r(4), _classes[:1], reduction="none"),
        S(r(4, 5).t(), _classes, reduction="none"),
        S(r(5, 4, dtype=f64), _classes),
        S(r(5, 4, dtype=bf16), _classes),
        S(r(5, 0), _classes),
        S(r(5, 4), _classes[:3]),
        S(r(5, 3), _classes),
        S(r(5, 4), _classes, p=3),
    ],
    exact=False,
)
_labels = torch.tensor([[3, 0, -1, 1], [-1, 1, 2, 3], [0, 1, 2, 3], [2, 2, -1, -1], [1, -1, -1, 0]])
row(
    "multilabel_margin_loss",
    [
        *(S(r(5, 4), _labels, **how) for how in HOW),
        S(r(4), _labels[0]),
        S(r(4), _labels[0], reduction="none"),
        S(r(4, 5).t(), _labels, reduction="none"),
        S(r(5, 4, dtype=f64), _labels),
        S(r(5, 4, dtype=bf16), _labels),
        S(r(5, 4), _labels[0]),
        S(r(5, 3), _labels[:, :3]),
    ],
    exact=False,
)
row(
    "multilabel_soft_margin_loss",
    [
        *(S(r(5, 4), r(5, 4, low=0.0, high=1.0), smooth=True, **how) for how in HOW),
        S(r(5, 4), r(5, 4, low=0.0), r(4)),
        S(r(4), r(4)),
        S(r(4, 5).t(), r(5, 4), weight=r(5, 4), reduction="none"),
        S(r(5, 4, dtype=f64), r(5, 4, dtype=f64)),
        S(r(5, 7, dtype=bf16), r(5, 7, dtype=bf16)),
        S(r(0, 4), r(0, 4), reduction="sum"),
        S(r(5, 4), r(5, 3)),
    ],
    exact=False,
)

# --- losses of distributions -------------------------------------------------------------------

row(
    "poisson_nll_loss",
    [
        *(S(r(5), r(5, low=0.1), smooth=True, **how) for how in HOW),
        S(r(5), r(5, low=0.1, high=5.0), full=True, smooth=True),
        S(r(5, low=0.1), r(5, low=0.1), log_input=False, smooth=True),
        S(r(5, low=0.1), r(5, low=0.1), False, True, None, 0.01),
        S(r(4, 3).t(), r(3, 4, low=0.1), reduction="none"),
        S(r(3, 1), v(1, 2, 3, 4)),
        S(r(5, dtype=f64), r(5, dtype=f64, low=0.1)),
        S(r(33, dtype=bf16), r(33, dtype=bf16, low=0.1)),
        S(r(0), r(0)),
        S(r(5), r(4)),
        S(r(5), r(5), reduction="other"),
    ],
    exact=False,
)


def variance(*shape: int, **options: object) -> torch.Tensor:
    return r(*shape, low=0.2, **options)


row(
    "gaussian_nll_loss",
    [
        *(S(r(5), r(5), variance(5), smooth=True, **how) for how in HOW),
        S(r(5, 3), r(5, 3), variance(5, 1), full=True),
        S(r(5, 3), r(5, 3), variance(5), full=True, reduction="none"),
        S(r(5, 3), r(3), variance(5, 3), eps=0.5),
        S(r(5), r(5), 0.3),
        S(r(5), r(5), -0.3),
        S(r(5), r(5), v(1.0, 2.0, -0.1, 1.0, 1.0)),
        S(r(5, 3), r(5, 3), variance(3)),
        S(r(5, 3), r(5, 3), variance(1, 1)),
        S(r(3, 5).t(), r(5, 3), variance(5, 3), reduction="none"),
        S(r(5, dtype=f64), r(5, dtype=f64), variance(5, dtype=f64)),
        S(r(33, dtype=bf16), r(33, dtype=bf16), variance(33, dtype=bf16)),
        S(r(0), r(0), variance(0)),
        S(r(5), r(5), variance(5), reduction="other"),
    ],
    exact=False,
)

# --- the same in C++, where a number says how to reduce ----------------------------------------

_NUMBERED = {"none": 0, "mean": 1, "sum": 2, "other": 1}


def numbered(name: str) -> list[Sample]:
    """The samples of a loss for its form in C++."""
    found = []
    for s in ROWS[name]:
        if not {"size_average", "reduce"} & set(s.kwargs):
            how = _NUMBERED[s.kwargs.get("reduction", "mean")]
            found.append(replace(s, kwargs={**s.kwargs, "reduction": how}))
    return found


for _name in (
    "margin_ranking_loss",
    "hinge_embedding_loss",
    "cosine_embedding_loss",
    "triplet_margin_loss",
):
    BY_FUNCTION[getattr(torch, _name)] = numbered(_name)
for _name in ("multi_margin_loss", "multilabel_margin_loss"):
    BY_FUNCTION[getattr(torch._C._nn, _name)] = numbered(_name)
BY_FUNCTION[torch.poisson_nll_loss] = [
    S(r(5), r(5, low=0.1), True, False, 1e-8, 1, smooth=True),
    S(r(3, 4, low=0.1), r(3, 4, low=0.1), False, True, 1e-8, 0, smooth=True),
    S(r(4, 3, dtype=f64).t(), r(3, 4, dtype=f64), True, False, 1e-8, 2),
]

# --- products ----------------------------------------------------------------------------------

row(
    "tensordot",
    [
        S(r(3, 4, 5), r(4, 5, 2), smooth=True),
        S(r(3, 4, 5), r(5, 3, 2), dims=([0, 2], [1, 0]), smooth=True),
        S(r(3, 4), r(5, 2), dims=0),
        S(r(4, 3).t(), r(4, 5), 1),
        S(r(3, 1), r(4, 2), dims=1),
        S(r(3, 4), r(1, 2), dims=1),
        S(r(3, 4, dtype=i64), r(4, 2, dtype=i64), dims=1),
        S(r(3, 4, dtype=bf16), r(4, 2, dtype=bf16), dims=1),
        S(r(0, 4), r(4, 2), dims=1),
        S(r(3, 4), r(3, 2), dims=1),
        S(r(3, 4), r(4, 2, dtype=f64), dims=1),
        S(r(3, 4), r(4, 2), dims=3),
        S(r(3, 4), r(4, 2), dims=([1], [0, 1])),
    ],
    exact=False,
)
row(
    "inner",
    [
        S(r(5), r(5), smooth=True),
        S(r(3, 4), r(2, 4), smooth=True),
        S(r(2, 3, 4), r(4)),
        S(r(4, 3).t(), r(2, 4)),
        S(r(), r(3)),
        S(r(3), r()),
        S(r(3, 4, dtype=f64), r(2, 4, dtype=f64)),
        S(r(3, 4), r(2, 5)),
    ],
    exact=False,
)
row(
    "bilinear",
    [
        S(r(5, 3), r(5, 4), r(2, 3, 4), smooth=True),
        S(r(5, 3), r(5, 4), r(2, 3, 4), r(2), smooth=True),
        S(r(2, 5, 3), r(2, 5, 4), r(1, 3, 4), r(1)),
        S(r(3), r(4), r(2, 3, 4)),
        S(r(5, 3, dtype=f64), r(5, 4, dtype=f64), r(2, 3, 4, dtype=f64)),
        S(r(5, 3, dtype=bf16), r(5, 4, dtype=bf16), r(2, 3, 4, dtype=bf16)),
        S(r(0, 3), r(0, 4), r(2, 3, 4), r(2)),
        S(r(5, 3), r(4, 4), r(2, 3, 4)),
        S(r(5, 3), r(5, 4), r(2, 4, 3)),
        S(r(5, 3), r(5, 4), r(2, 3, 4), r(3)),
    ],
    exact=False,
)
row(
    "kron",
    [
        S(r(3), r(5), smooth=True),
        S(r(2, 3), r(3, 1), smooth=True),
        S(r(3), r(2, 4)),
        S(r(2, 3, 2), r(2)),
        S(r(), r(2, 3)),
        S(r(4, 3).t(), r(2, 2)),
        S(r(3, dtype=i64), r(3)),
        S(r(3, dtype=bf16), r(3, dtype=bf16)),
        S(r(0), r(3)),
    ],
    exact=False,
)
_CROSS = [
    S(r(5, 3), r(5, 3)),
    S(r(3), r(3)),
    S(r(3, 5), r(3, 5), dim=0),
    S(r(5, 3, dtype=f64), r(1, 3, dtype=f64)),
    S(r(3, 5).t(), r(3, 5).t()),
    S(r(5, 3, dtype=i64), r(5, 3, dtype=i64)),
    S(r(5, 3, dtype=bf16), r(5, 3, dtype=bf16)),
    S(r(0, 3), r(0, 3)),
    S(r(5, 4), r(5, 4)),
    S(r(5, 3), r(3)),
]
row("linalg_cross", _CROSS, exact=False)
row(
    "cross",
    [*_CROSS, S(r(3, 3), r(3, 3)), S(r(3, 5), r(3, 5)), S(r(5, 3), r(5, 3), 1)],
    exact=False,
)
row(
    "linalg_vecdot",
    [
        S(r(5, 3), r(5, 3), smooth=True),
        S(r(5, 3), r(3)),
        S(r(5), r(5)),
        S(r(5, 3), r(5, 3), dim=0),
        S(r(5, 3, dtype=i64), r(5, 3, dtype=i64)),
        S(r(5, 3, dtype=f64), r(5, 3, dtype=f64)),
        S(r(5, 3), r(5, 4)),
    ],
    exact=False,
)
row(
    "linalg_multi_dot",
    [
        S([r(3, 4), r(4, 2)], smooth=True),
        S([r(3, 4), r(4, 2), r(2, 5)], smooth=True),
        S([r(3), r(3, 7), r(7, 2), r(2)]),
        S([r(3), r(3, 7), r(7, 2)]),
        S([r(3, 7), r(7)]),
        S([r(9, 1), r(1, 7), r(7, 2), r(2, 8)]),
        S([r(3, 4, dtype=f64), r(4, 2, dtype=f64), r(2, 5, dtype=f64)]),
        S([r(3, 4)]),
        S([r(3, 4), r(3, 4)]),
        S([r(3, 4), r(3), r(3, 4)]),
    ],
    exact=False,
)
row(
    "chain_matmul",
    [
        S(r(3, 4), r(4, 2), smooth=True),
        S(r(3, 4), r(4, 2), r(2, 5), smooth=True),
        S(r(3, 4)),
        S(r(3), r(3, 4)),
        S(r(3, 4), r(3, 4)),
    ],
    exact=False,
)
row(
    "matrix_power linalg_matrix_power",
    [
        *(S(r(3, 3), n, smooth=True) for n in (1, 2, 3, 5)),
        S(r(3, 3), 0),
        S(r(2, 3, 3), 6),
        S(r(3, 3).t(), 2),
        S(r(3, 3, dtype=f64), 4),
        S(r(1, 1, dtype=i64), 3),
        S(r(0, 3, 3), 2),
        S(r(3, 4), 2),
        S(r(3), 2),
        S(r(3, 3), -1),
        S(torch.eye(3) + torch.ones(3, 3), -3),
    ],
    exact=False,
)

# --- along an axis -----------------------------------------------------------------------------

ALONG = [
    S(r(5), 0, smooth=True),
    S(r(3, 4), 1, smooth=True),
    S(r(4, 3).t(), 0),
    S(r(123), -1),
    S(r(2, 3, 4), -2),
    S(r(0), 0),
    S(r(3, 0), 1),
    S(r(), 0),
    S(r(5, dtype=f64), 0, smooth=True),
    S(r(33, dtype=bf16), 0),
    S(r(33, dtype=f16), 0),
    S(r(5), 1),
]
_INTEGERS = [S(r(7, dtype=i64), 0), S(r(3, 5, dtype=i32), 1), S(r(7, dtype=u8), 0)]

row(
    "cumprod cumprod_",
    [
        *ALONG,
        S(v(2.0, 0.0, 3.0, 0.0, 5.0), 0, smooth=True),
        S(r(5), 0, dtype=f64),
    ],
    exact=False,
)
ROWS["cumprod"] += [*_INTEGERS, S(r(5, dtype=b1), 0)]
row(
    "cummax cummin",
    [
        *ALONG,
        *_INTEGERS,
        S(r(5, dtype=b1), 0),
        S(v(1, 3, 3, 2, 3, 5), 0),
        S(v(1, nan, 3, nan, -inf, inf), 0),
        S(v(-inf, -inf, inf, inf), 0),
    ],
    exact=False,
)
row(
    "logcumsumexp",
    [*ALONG, S(v(1, inf, 2, -inf), 0), S(v(-inf, -inf, 1.0, 2.0), 0), S(v(1, nan, 2), 0)],
    exact=False,
)
_AREAS = [
    S(r(5), smooth=True),
    S(r(3, 5), dx=0.5, smooth=True),
    S(r(3, 5), dim=0),
    S(r(5), r(5), smooth=True),
    S(r(3, 5), r(5)),
    S(r(3, 5), r(3), dim=0),
    S(r(3, 5), r(3, 5)),
    S(r(2, 3, 5), r(3, 5)),
    S(r(5, 3).t(), dx=2),
    S(r(1)),
    S(r(0, 5)),
    S(r(5, dtype=f64), r(5, dtype=f64)),
    S(r(5, dtype=bf16)),
    S(r(5, dtype=i64)),
    S(r(5), r(4)),
    S(r(5, dtype=b1)),
    no(r(3, 0)),
]
row("trapezoid trapz cumulative_trapezoid", _AREAS, exact=False)
row(
    "gradient",
    [
        S(r(5), smooth=True),
        S(r(3, 4), smooth=True),
        S(r(3, 4), dim=1),
        S(r(3, 4), spacing=0.5, dim=(1, 0), edge_order=2, smooth=True),
        S(r(3, 4), spacing=(0.5, 2.0)),
        S(r(5), spacing=(v(0.0, 1.0, 1.5, 3.0, 3.5),), smooth=True),
        S(r(5), spacing=(v(0.0, 1.0, 1.5, 3.0, 3.5),), edge_order=2),
        S(r(3, 4), spacing=[v(0.0, 1.0, 1.5), v(0.0, 1.0, 1.5, 3.0)]),
        S(r(2)),
        S(r(4, 3).t()),
        S(r(5, dtype=f64)),
        S(r(5, dtype=bf16)),
        S(r(5, dtype=i64)),
        S(r(1)),
        S(r(2), edge_order=2),
        S(r(3, 4), spacing=(0.5,)),
    ],
    exact=False,
)

# --- what describes numbers --------------------------------------------------------------------

_HOLES = v(1.0, nan, 3.0, nan, -2.0, 0.5).reshape(2, 3)
WITHOUT = [
    S(r(5), smooth=True),
    S(_HOLES, smooth=True),
    S(_HOLES, 1),
    S(_HOLES, (0, 1), True),
    S(_HOLES, dim=0, dtype=f64),
    S(_HOLES.t(), 0, keepdim=True),
    S(v(nan, nan)),
    S(r()),
    S(r(0)),
    S(r(3, 0), 1),
    S(r(33, dtype=f64)),
    S(r(33, dtype=bf16)),
    S(r(5, dtype=i64)),
    S(r(5), 1),
]
row("nansum nanmean", WITHOUT, exact=False)


def apart(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Distinct numbers in no order."""
    n = torch.Size(shape).numel()
    return (torch.arange(n) * 7 % max(n, 1) - 3.0).reshape(shape).to(dtype) if n % 7 else r(*shape)


_MEDIANS = [
    S(_HOLES),
    S(_HOLES, 1),
    S(_HOLES.t(), 0, True),
    S(apart(3, 5), 1, smooth=True),
    S(v(nan, nan, nan), 0),
    S(v(nan, nan, nan)),
    S(v(1.0, nan, 2.0, 2.0, 3.0, 2.0)),
    S(apart(9, dtype=f64)),
    S(apart(9, dtype=bf16), 0),
    S(apart(9, dtype=i64), 0),
    S(r(), 0),
    S(r(3), 1),
    S(r(0)),
    no(r(0, dtype=i64)),
]
row("nanmedian", _MEDIANS)
_QUANTILES = [
    *(
        S(apart(9), 0.3, interpolation=how, smooth=True)
        for how in ("linear", "lower", "higher", "midpoint", "nearest")
    ),
    S(apart(3, 5), 0.25, 1),
    S(apart(3, 5), 0.25, 0, keepdim=True),
    S(apart(3, 5), v(0.1, 0.5, 1.0), 1),
    S(apart(3, 5), v(0.1, 0.5, 1.0), 0, True),
    S(apart(3, 5), v(0.6), keepdim=True),
    S(apart(3, 5), torch.tensor(0.6)),
    S(apart(5, 3).t(), 0.5, 0),
    S(_HOLES, 0.5),
    S(_HOLES, 0.5, 1),
    S(_HOLES, v(0.2, 0.7), 0),
    S(apart(9, dtype=f64), 0.7),
    S(r(), 0.5),
    S(r(1), 0.5),
    S(r(0), 0.5),
    S(r(5), 1.5),
    S(r(5), v(0.5, 1.5)),
    S(r(5), torch.tensor(0.5, dtype=f64)),
    S(r(5, dtype=bf16), 0.5),
    S(r(5), 0.5, interpolation="other"),
]
row("quantile nanquantile", _QUANTILES, exact=False)
row(
    "mode",
    [
        S(torch.tensor([[3, 1, 3, 1, 2], [5, 5, 4, 4, 4], [1, 2, 3, 4, 0]])),
        S(v(3, 1, 3, 1, 2)),
        S(v(3, 1, 3, 1, 2).reshape(5, 1), 0, True),
        S(v(3, 1, 3, 1, 2, 2).reshape(2, 3).t(), 0),
        S(v(1, 2, 2, dtype=f64), smooth=True),
        S(v(1, 2, 2, dtype=bf16)),
        S(v(1, 2, 2, dtype=u8)),
        S(r()),
        S(r(3), 1),
        S(torch.tensor([True, False, False, True, True])),
        S(torch.tensor([[True, False, True], [False, False, True]]), 0),
        S(torch.randint(0, 4, (5, 123), generator=torch.Generator().manual_seed(7)).t(), 1),
        S(v(nan, nan, nan)),
        S(v(2.0, 1.0, 2.0, nan, nan, nan)),
        S(v(0.0, -0.0, 1.0, 1.0)),
        S(v(inf, -inf, inf, 3e38, 3e38, -inf)),
        S(r(5, 1), 1, smooth=True),
        S(r(0, 3), 1),
        S(r(3, 0), 0, True),
        S(r(3, 0), 1),
        S(r(0)),
    ],
)
row(
    "aminmax",
    [
        S(r(5), smooth=True),
        S(r(3, 5), dim=1, smooth=True),
        S(r(3, 5), dim=0, keepdim=True),
        S(r(5, 3).t(), dim=-1),
        S(v(1, 2, 2, 1)),
        S(v(1, nan, 2)),
        S(r(5, dtype=f64)),
        S(r(5, dtype=bf16)),
        S(r(5, dtype=i64)),
        S(r(5, dtype=b1)),
        S(r()),
        S(r(), dim=0),
        S(r(0)),
        S(r(0, 3), dim=0),
        S(r(0, 3), dim=1),
        S(r(5), dim=1),
    ],
)
_COUNTED = torch.tensor([[0, 1, 0], [2, 0, 3]])
row(
    "count_nonzero",
    [
        S(_COUNTED),
        S(_COUNTED, 0),
        S(_COUNTED.float(), (0, 1)),
        S(_COUNTED.bool().t(), dim=-1),
        S(v(0, nan, -0.0)),
        S(r(0)),
        S(r(3, 0), 1),
        S(r()),
        S(_COUNTED, (0, 0)),
        S(_COUNTED, 2),
    ],
)
row(
    "cov",
    [
        S(r(3, 5), smooth=True),
        S(r(5), smooth=True),
        S(r(3, 5), correction=0),
        S(r(5, 3).t()),
        S(r(3, 5, dtype=f64)),
        S(r(3, 5, dtype=i64)),
        S(r(3, 1)),
        S(r()),
        S(r(2, 3, 4)),
        S(r(3, dtype=b1)),
        S(r(3, 5), fweights=torch.tensor([1, 2, 1, 1, 1])),
        S(r(3, 5), aweights=r(5, low=0.1), smooth=True),
        S(r(5), fweights=torch.tensor([1, 2, 0, 1, 3]), aweights=r(5, low=0.1), correction=0),
        S(r(3, 5), fweights=torch.tensor([1, 2, 0, 1, 3]), aweights=r(5, low=0.1)),
        S(r(3, 5), fweights=torch.tensor([1, -2, 1, 1, 1])),
        S(r(3, 5), fweights=torch.tensor([1, 2])),
        S(r(3, 5), fweights=r(5, low=0.1)),
        S(r(3, 5), aweights=torch.tensor([1, 2, 1, 1, 1])),
        no(r(3, 0)),
    ],
    exact=False,
)
row(
    "corrcoef",
    [
        S(r(3, 5), smooth=True),
        S(r(5, 3).t()),
        S(r(3, 5, dtype=f64)),
        S(r(2, 3, 4)),
    ],
    exact=False,
)

# --- distances ---------------------------------------------------------------------------------

row(
    "cdist",
    [
        S(r(5, 3), r(4, 3)),
        *(S(r(5, 3), r(4, 3), p=p) for p in (0.0, 0.5, 1.0, 1.5, 3.0, inf)),
        S(r(2, 5, 3), r(4, 3)),
        S(r(3, 5).t(), r(4, 3), 1.0),
        S(r(30, 3, dtype=f64), r(5, 3, dtype=f64)),
        S(r(5, 3), r(5, 3), compute_mode="use_mm_for_euclid_dist"),
        S(r(30, 3), r(5, 3), compute_mode="donot_use_mm_for_euclid_dist"),
        S(r(5, 3, dtype=f64), r(4, 3, dtype=f64)),
        S(r(0, 3), r(4, 3)),
        S(r(5, 0), r(4, 0)),
        S(r(5, 3, dtype=bf16), r(4, 3, dtype=bf16)),
        S(r(5, 3), r(4, 2)),
        S(r(5), r(5)),
        S(r(5, 3), r(4, 3), p=-1.0),
        S(r(5, 3), r(4, 3), compute_mode="other"),
    ],
    exact=False,
)
BY_FUNCTION[torch._C._VariableFunctions.cdist] = [
    S(r(5, 3), r(4, 3)),
    S(r(5, 3, dtype=f64), r(4, 3, dtype=f64), 3.0, 2),
    S(r(5, 3), r(4, 2)),
]
row(
    "pdist",
    [
        S(r(5, 3)),
        *(S(r(5, 3), p=p) for p in (1.0, 3.0, inf)),
        S(r(3, 7).t()),
        S(r(1, 3)),
        S(r(2, 3, dtype=f64)),
        S(r(13, 2)),
        S(r(5)),
        S(r(5, 3, dtype=i64)),
    ],
    exact=False,
)
row(
    "renorm renorm_",
    [
        S(r(3, 5), 2, 0, 1.0, smooth=True),
        S(r(3, 5), 1.0, 1, 2.0),
        S(r(3, 5), 2, -1, 100.0),
        S(r(2, 3, 4), 3, 1, 1.5),
        S(r(5, 3).t(), 2, 0, 1.0),
        S(r(3, 5, dtype=f64), 2, 0, 1.0),
        S(r(3, 5, dtype=bf16), 2, 0, 1.0),
        S(r(3, 5, dtype=i64), 2, 0, 1.0),
        S(r(5), 2, 0, 1.0),
        S(r(3, 5), 0, 0, 1.0),
        S(r(3, 5), 2, 0, -1.0),
        S(r(3, 5), 2, 2, 1.0),
    ],
    exact=False,
)

# --- by position -------------------------------------------------------------------------------

row(
    "rot90",
    [
        *(S(r(3, 4), k, smooth=True) for k in (-1, 0, 1, 2, 3, 5)),
        S(r(3, 4)),
        S(r(2, 3, 4), 1, (1, 2)),
        S(r(2, 3, 4), 3, [-1, 0]),
        S(r(4, 3, dtype=i64).t(), 1),
        S(r(0, 3)),
        S(r(3)),
        S(r(3, 4), 1, (0,)),
        S(r(3, 4), 1, (0, -2)),
    ],
)
row("narrow_copy", [S(r(5, 3), 0, 1, 3), S(r(3, 5).t(), 1, 0, 2, smooth=True), S(r(5), 0, 4, 3)])
row(
    "select_scatter",
    [
        S(r(3, 4), r(4), 0, 1, smooth=True),
        S(r(3, 4), r(3), -1, -2),
        S(r(4, 3).t(), r(4), 0, 1),
        S(r(1).expand(3, 4), r(4), 0, 1),
        S(r(3, 4, dtype=i64), r(4), 0, 1),
        S(r(3, 4, dtype=bf16), r(4, dtype=bf16), 0, 1),
        S(r(3, 4), r(3), 0, 1),
        S(r(3, 4), r(4), 0, 3),
        no(r(6, 4)[::2], r(4), 0, 1),
    ],
)
row(
    "slice_scatter",
    [
        S(r(5, 3), r(2, 3), 0, 1, 3, smooth=True),
        S(r(5, 3), r(5, 2), 1, step=2),
        S(r(5, 3), r(5, 3)),
        S(r(5), r(2), start=-2),
        S(r(5), r(0), start=7),
        S(r(3, 5).t(), r(2, 3), 0, 1, 3),
        S(r(5, dtype=i64), r(2, dtype=i64), 0, 1, 3),
        S(r(5), r(3), 0, 1, 3),
        S(r(5), r(3), 1),
        S(r(5), r(3), step=0),
    ],
)
row(
    "diagonal_scatter",
    [
        S(r(3, 4), r(3), smooth=True),
        S(r(3, 4), r(3), 1),
        S(r(3, 4), r(2), -1),
        S(r(2, 3, 4), r(3, 2), 0, 0, 2),
        S(r(4, 3).t(), r(3)),
        S(r(3, 4, dtype=i64), r(3, dtype=i64)),
        S(r(3, 4), r(4)),
    ],
)
row(
    "fill_diagonal_",
    [
        S(r(3, 4), 2.5),
        S(r(7, 3), 1.0, wrap=True),
        S(r(7, 3), 1),
        S(r(3, 3, 3), 2.0),
        S(r(4, 3).t(), 0.5),
        S(r(3, 3, dtype=i64), 2),
        S(r(0, 3), 2.0),
        S(r(3), 2.0),
        S(r(3, 3, 2), 2.0),
    ],
)
row(
    "block_diag",
    [
        S(r(2, 3), r(1, 2), smooth=True),
        S(r(), r(3), r(2, 2)),
        S(r(3, 2).t(), r(0, 2)),
        S(r(2, 2, dtype=i64), r(1, 1)),
        S(r(2, 2, 2)),
    ],
)
row(
    "cartesian_prod",
    [
        S(r(3), r(2), smooth=True),
        S(r(3), r(2), r(5)),
        S(r(3)),
        S(r(3), r(0)),
        S(r(3, dtype=i64), r(2, dtype=i64)),
        S(r(3), r(2, 2)),
    ],
)
row(
    "combinations",
    [
        S(r(5), smooth=True),
        S(r(5), 3),
        S(r(3), 2, True),
        S(r(3), 1),
        S(r(3), 0),
        S(r(3), 5),
        S(r(0)),
        S(r(4, dtype=i64), with_replacement=True),
        S(r(3, 2)),
        S(r(3), -1),
    ],
)
row(
    "tril_indices triu_indices",
    [
        S(n, m, k)
        for n, m in ((3, 3), (5, 3), (3, 5), (1, 7), (9, 9))
        for k in (0, 1, 3, 7, -1, -3, -7)
    ]
    + [S(0, 3), S(3, 0), S(3, 4, dtype=i32), S(-1, 3), S(300, 200, 17), S(3, 3, dtype=f64)],
)

# --- bags --------------------------------------------------------------------------------------

_BAGS = torch.tensor([[0, 2, 1], [4, 4, 3]])
_FLAT = torch.tensor([0, 2, 1, 4, 4, 3, 0])
_STARTS, _ENDED = torch.tensor([0, 2, 2, 5]), torch.tensor([0, 2, 2, 7])
row(
    "embedding_bag",
    [
        *(S(_BAGS, r(5, 3), mode=m, smooth=m != "max") for m in ("sum", "mean", "max")),
        *(S(_FLAT, r(5, 3), _STARTS, mode=m, smooth=m != "max") for m in ("sum", "mean", "max")),
        *(
            S(_FLAT, r(5, 3), _ENDED, mode=m, padding_idx=4, include_last_offset=True)
            for m in ("sum", "mean", "max")
        ),
        *(S(_BAGS, r(5, 3), mode=m, padding_idx=-1) for m in ("sum", "mean", "max")),
        S(_BAGS, r(5, 3), mode="sum", per_sample_weights=r(2, 3), smooth=True),
        S(_FLAT, r(5, 3), _STARTS, mode="sum", per_sample_weights=r(7)),
        S(_BAGS.int(), r(5, 3, dtype=f64)),
        S(_BAGS, r(5, 3, dtype=bf16)),
        S(_FLAT[:0], r(5, 3), _STARTS[:1]),
        S(_BAGS[:0], r(5, 3)),
        S(_FLAT, r(5, 3)),
        S(_BAGS, r(5, 3), _STARTS),
        S(_FLAT, r(5, 3), _STARTS[1:]),
        S(_BAGS, r(4, 3)),
        S(_BAGS, r(5)),
        S(_BAGS, r(5, 3), mode="other"),
        S(_BAGS, r(5, 3), per_sample_weights=r(2, 3)),
        S(_BAGS, r(5, 3), max_norm=1.0),
        S(_BAGS.int(), torch.linspace(-2, 3, 15).reshape(5, 3), max_norm=1.0),
        S(_BAGS, r(5, 3), scale_grad_by_freq=True, mode="sum"),
        S(_BAGS, r(5, 3), scale_grad_by_freq=True, mode="max"),
        S(_BAGS.flatten(), r(5, 3), torch.tensor([0, 2, 2]), scale_grad_by_freq=True),
    ],
    exact=False,
)


# --- fake quantization -------------------------------------------------------------------------

ODD = torch.tensor([nan, inf, -inf, 1e30, 2.55, -0.0, 0.04])
SCALES = torch.tensor([0.1, 0.03, 0.5])


def points(*numbers: int, dtype: torch.dtype = i32) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype)


row(
    "fake_quantize_per_tensor_affine",
    [
        S(r(5, 3), 0.1, 3, 0, 15),
        S(r(4, 3, dtype=f64).t(), 0.07, 0, -8, 7),
        S(r(5, dtype=f16), 0.1, 0, -8, 7),
        S(r(123, dtype=bf16), torch.tensor([0.1]), points(3), 0, 15),
        S(r(5, 3), torch.tensor(0.1), points(300)[0], 0, 255),
        S(r(1), torch.tensor(0.1, dtype=f64), points(3, dtype=i64), 0, 255),
        S(ODD, 0.1, 3, 0, 255),
        S(r(0, 3), 0.1, 3, 0, 15),
        S(r(), 0.1, 3, 0, 15),
        S(r(5), 0.1, 300, 0, 255),
        S(r(5), 0.1, 0, 3, 2),
        S(r(5), SCALES, points(0, 1, 2), 0, 255),
        S(r(5, dtype=i64), 0.1, 3, 0, 15),
    ],
)
row(
    "fake_quantize_per_channel_affine",
    [
        S(r(5, 3), SCALES, points(0, 1, 2), 1, 0, 15),
        S(r(3, 5, 2, dtype=f64), SCALES, points(0, -1, 2), 0, -8, 7),
        S(r(5, 3, dtype=f16), SCALES, points(0, 1, 2), 1, 0, 15),
        S(r(3, 123, dtype=bf16), SCALES, points(0, 1, 2), 0, 0, 15),
        S(ODD.repeat(3, 1), SCALES, points(0, 1, 2), 0, 0, 255),
        S(r(0, 3), SCALES, points(0, 1, 2), 1, 0, 15),
        S(r(1), SCALES[:1], points(2), 0, 0, 15),
        S(r(5, 3), SCALES, points(0, 1, 300), 1, 0, 255),
        S(r(5, 3), SCALES, points(0, 1, 2, dtype=i64), 1, 0, 255),
        S(r(5, 3), SCALES.double(), points(0, 1, 2), 1, 0, 255),
        S(r(5, 3), SCALES, points(0, 1, 2), 0, 0, 255),
        S(r(5, 3), SCALES, points(0, 1, 2), 2, 0, 255),
        no(r(5, 3), SCALES, torch.tensor([0.0, 1.0, 2.5]), 1, 0, 255),
        no(r(5, 3), SCALES.to(bf16), points(0, 1, 2), 1, 0, 255),
    ],
)
