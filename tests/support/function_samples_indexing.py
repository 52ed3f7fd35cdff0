"""Samples of functions that put tensors together, take them apart, and read where integers say.

Importing this adds them to the table of `function_samples`; `NAMES` are the spellings added here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from support.function_samples import (
    BY_FUNCTION,
    ROWS,
    S,
    Sample,
    b1,
    bare_name,
    bf16,
    f16,
    f32,
    f64,
    i32,
    i64,
    inf,
    layouts,
    nan,
    no,
    r,
    reduction,
    restart,
    row,
    u8,
    v,
)

_before = set(ROWS)
restart()


def i(*values: int) -> torch.Tensor:
    """A vector of indices."""
    return v(*values, dtype=i64)


def at(*shape: int, below: int) -> torch.Tensor:
    """Random indices."""
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(7))


# --- joining -----------------------------------------------------------------------------------

x23, x234 = r(2, 3), r(2, 3, 4)
PAIRS = [
    S([r(2, 3), r(4, 3)], smooth=True),
    S([r(2, 3), r(4, 3), r(1, 3)], 0),
    S([r(3), r(0), r(2)]),
    S([r(0), r(2, 3)]),
    S([r(0)]),
    S([r(5)]),
    S((r(3), r(2, dtype=f64))),
    S([r(3, dtype=bf16), r(2, dtype=bf16)]),
    S([r(3, dtype=i64), r(2)]),
    S([r(3, dtype=i32), r(2, dtype=u8)]),
    S([r(3, dtype=b1), r(2, dtype=b1)]),
    S([r(4, 3).t(), r(3, 2)], 1),
    S([v(nan, inf), v(-0.0, -inf)]),
    S([r(123), r(5)]),
    S([r(2, 3), r(2, 4)]),
    S([r(2, 3), r(3)]),
    S([r(), r()]),
    S([]),
    S([r(2), r(3)], 1),
]
JOINED = [
    *PAIRS,
    S([r(2, 3), r(2, 1)], 1, smooth=True),
    S([r(2, 3), r(2, 1)], -1),
    S([r(2, 3), r(2, 1)], dim=1),
    S([r(2, 0), r(2, 3)], 1),
    S([r(2, 3, 4).permute(2, 0, 1), r(1, 2, 3)]),
]
row("cat concat concatenate", JOINED)
STACKED = [
    S([r(3), r(3)], smooth=True),
    S([r(), r()]),
    S([r(2, 3), r(2, 3), r(2, 3)]),
    S([r(4, 3).t(), r(3, 4)]),
    S([r(3), r(3, dtype=f64)]),
    S([r(3, dtype=i64)]),
    S([r(0), r(0)]),
    S([r(3), r(4)]),
    S([]),
]
row(
    "stack",
    [
        *STACKED,
        S([r(2, 3), r(2, 3)], 1),
        S([r(2, 3), r(2, 3)], -1),
        S([r(2, 3), r(2, 3)], dim=2),
        S([r(3), r(3)], 2),
    ],
)
row("hstack vstack row_stack dstack column_stack", [*STACKED, *PAIRS[:5], S([r(), r(2)])])
row("atleast_1d atleast_2d atleast_3d", [S(r()), S(r(3)), S(r(2, 3)), S(x234), S(r(), r(3))])

# --- taking apart ------------------------------------------------------------------------------

row(
    "split",
    [
        S(r(7), 3, smooth=True),
        S(r(7), [3, 4]),
        S(x234, 2, 1),
        S(x234, (1, 3), -1),
        S(x234, 2, dim=-1),
        S(r(4, 3).t(), 2),
        S(r(0), 2),
        S(r(0), 0),
        S(r(6), 6),
        S(r(6), 9),
        S(r(6), 0),
        S(r(6), [2, 3]),
        S(r(), 1),
        S(r(5, dtype=i64), 2),
    ],
)
row("split_with_sizes", [S(r(7), [3, 4]), S(x234, (1, 3), -1), S(x234, [1, 0, 2], 1), S(r(3), [1])])
row("chunk", [S(r(7), 3), S(x234, 2, 1), S(x234, 5, -1), S(r(0), 3), S(r(3), 0), S(r(), 1)])
row(
    "tensor_split",
    [
        S(r(7), 3, smooth=True),
        S(r(7), (2, 5)),
        S(r(7), [5, 2]),
        S(r(7), (2, -1)),
        S(r(7), (2, 50)),
        S(x234, 2, dim=1),
        S(x234, (1,), -1),
        S(r(3), 5),
        S(r(3), 0),
        S(r(), 1),
        S(r(7), i(2, 5)),
    ],
)
row("hsplit", [S(r(6), 3), S(r(4, 6), 2), S(r(4, 6), (1, 3)), S(r(6), 4), S(r(), 1), S(r(5, 3), 3)])
row("vsplit", [S(r(6, 2), 3), S(r(4, 6), (1, 3)), S(r(6), 2), S(r(3, 2), 2)])
row("dsplit", [S(r(2, 1, 6), 3), S(x234, (1, 3)), S(r(6, 2), 2)])
# With elements of the tensor itself, along the last axes of images.
PADDED = [
    S(x, widths, mode, smooth=True)
    for mode in ("reflect", "replicate", "circular")
    for x, widths in (
        (r(2, 3, 5), (2, 1)),
        (r(3, 5), (0, 2)),
        (r(2, 3, 4, 5), (1, 2, 3, 0)),
        (r(3, 4, 5), (1, 0, 0, 1)),
        (r(1, 2, 3, 4, 3), (1, 1, 2, 0, 0, 1)),
        (r(2, 3, 4, 5).to(memory_format=torch.channels_last), (1, 1, 1, 1)),
        (r(0, 3, 4, 5), (1, 1, 1, 1)),
        (r(2, 3, 5, dtype=bf16), (2, 1)),
        (r(2, 5, 3).transpose(1, 2), (1, 1)),
        (r(2, 3, 4), (0, 0)),
    )
]
PADDED += [
    S(r(2, 3, 4), (4, 1), "reflect"),
    S(r(2, 3, 4), (5, 1), "circular"),
    S(r(2, 3, 4), (4, 4), "circular"),
    S(r(2, 3, 4), (7, 1), "replicate"),
    S(r(2, 3, 4), (1, 1, 1), "reflect"),
    S(r(4), (1, 1), "reflect"),
    S(r(2, 3, 4), (1, 1), "mirror"),
    S(r(2, 3, 4), (-1, 1), "reflect", smooth=True),
    S(r(2, 3, 4, 5).to(memory_format=torch.channels_last), (1, 1), smooth=True),
]
row(
    "pad",
    [
        S(r(5), (1, 2), smooth=True),
        S(r(5), [1, 2], "constant", 2.5),
        S(x234, (1, 0, 0, 2)),
        S(x234, (1, 0, 0, 2), value=3),
        S(x234, (0, 1, 1, 0, 2, 2), value=-0.5),
        S(x234, (-1, 0, 2, -2), smooth=True),
        S(r(5), (-2, -3)),
        S(r(5), (-2, -4)),
        S(r(0), (1, 2)),
        S(r(4, 3).t(), (1, 1)),
        S(r(5, dtype=i64), (1, 1), value=2.0),
        S(r(5, dtype=b1), (1, 1)),
        S(r(5, dtype=bf16), (1, 1), value=0.1),
        S(r(5), ()),
        S(r(5), (1,)),
        S(r(5), (1, 1, 1, 1)),
        *PADDED,
    ],
)
row(
    "constant_pad_nd",
    [S(r(5), (1, 2)), S(r(5), (1, 2), 2.5), S(x234, [0, 1, -1, 0], value=2)],
)

# --- order and copies --------------------------------------------------------------------------

row(
    "flip",
    [
        *(S(x, (0,)) for x in layouts()),
        S(x234, (0, 2), smooth=True),
        S(x234, [-1]),
        S(x234, ()),
        S(x234, (0, 0)),
        S(x234, (3,)),
        S(r(5, dtype=b1), (0,)),
        S(r(5, dtype=bf16), (0,)),
        S(r(6, 4)[::2, 1:3], (1,)),
    ],
)
row("fliplr flipud", [S(r()), S(r(3)), S(r(2, 3)), S(x234), S(r(0, 3))])
row(
    "roll",
    [
        S(r(5), 2, smooth=True),
        S(r(5), -2, 0),
        S(r(5), 7, 0),
        S(x234, 1),
        S(x234, (1, 2), (0, 2)),
        S(x234, (1, 2), (2, 2)),
        S(x234, shifts=1, dims=-1),
        S(r(4, 3).t(), 1, 0),
        S(r(4, 3).t(), 1),
        S(r(0), 1),
        S(r(3, 0), 1, 0),
        S(r(5), 0, 0),
        S(r(5), 5, 0),
        S(r(), 2),
        S(x234, (1, 2), 0),
        S(r(5, dtype=i64), 1),
    ],
)
TIMES = [
    S(r(3), (2,), smooth=True),
    S(r(2, 3), (2, 2)),
    S(r(2, 3), (2, 1, 3)),
    S(r(2, 3), [1, 0]),
    S(r(4, 3).t(), (2, 2)),
    S(r(), (3,)),
    S(r(), ()),
    S(r(0, 2), (2, 2)),
    S(r(3, 1).expand(3, 4), (1, 2)),
    S(r(5, dtype=b1), (2,)),
    S(r(2, 3), (-1, 1)),
]
row("repeat", [*TIMES, S(r(2, 3), 2, 1), S(r(2, 3), (2,)), S(r(3), repeats=(2,))])
row("tile", [*TIMES, S(r(2, 3), (2,)), S(r(2, 3), dims=(2,))])
row(
    "repeat_interleave",
    [
        S(r(3), 2, smooth=True),
        S(r(2, 3), 2),
        S(r(2, 3), 3, 1),
        S(r(2, 3), 2, dim=0),
        S(r(2, 3), 0, 1),
        S(r(4, 3).t(), 2, -1),
        S(r(0, 3), 2, 0),
        S(r(5, dtype=i64), 2),
        S(r(3), 2, output_size=6),
        S(r(3), -1),
        S(r(3), i(1, 2, 0), smooth=True),
        S(r(2, 3), i(1, 2, 0), 1),
        S(r(2, 3), i(1, 2, 0), dim=-1, output_size=3),
        S(r(2, 3), i(2), 0),
        S(r(4, 3).t(), i(0, 2, 1), 0),
        S(r(2, 3), i(*range(6))),
        S(r(), i(3)),
        S(r(3), torch.tensor(2)),
        S(r(3), i(0, 0, 0)),
        S(i(2, 0, 1)),
        S(i(2, 0, 1).to(i32)),
        S(r(3), i(1, 2)),
        S(r(3), i(1, 2, 0)[None]),
        S(r(3), r(3)),
        S(r(3), i(1, 2, -1)),
        S(r(2, 3)),
    ],
)
row(
    "meshgrid",
    [
        S(r(3), r(4), indexing="ij", smooth=True),
        S(r(3), r(4), indexing="xy"),
        S([r(3), r(4), r(2)], indexing="xy"),
        S(r(3)),
        S(r(), r(2)),
        S(r(3), r(4), indexing="yx"),
        S(r(2, 3), r(2)),
    ],
)

# --- views -------------------------------------------------------------------------------------

row(
    "movedim moveaxis",
    [
        S(x234, 0, 2, smooth=True),
        S(x234, -1, 0),
        S(x234, (0, 1), (1, 2)),
        S(x234, (0, 1), (2, 0)),
        S(x234, [0, 0], [1, 2]),
        S(x234, (0,), (1, 2)),
        S(x234, 3, 0),
        S(r(), 0, 0),
    ],
)
row(
    "unflatten",
    [
        S(r(6), 0, (2, 3), smooth=True),
        S(r(2, 6), 1, (-1, 2)),
        S(r(2, 6), -1, [3, 2, 1]),
        S(r(6, 2).t(), -1, (2, 3)),
        S(r(5, 9), 1, (3, 3)),
        S(r(6), 0, (4, 2)),
        S(r(6), 1, (2, 3)),
    ],
)
DIAGONALS = [S(r(3, 4), k) for k in (0, 1, -1, 3, -2, 4, 9, -3)]
row(
    "diagonal",
    [
        S(r(3, 3), smooth=True),
        *DIAGONALS,
        S(r(4, 3).t(), 1),
        S(x234, 0, 1, 2),
        S(x234, 1, -1, 0),
        S(x234, offset=-1, dim1=0, dim2=2),
        S(x234, 0, 1, 1),
        S(r(3)),
        S(r(0, 3)),
        S(r(6, 4)[::2, 1:3], -1),
    ],
)

# --- positions ---------------------------------------------------------------------------------

row(
    "tril triu tril_ triu_",
    [
        S(r(3, 4), smooth=True),
        *DIAGONALS,
        S(x234, 1),
        S(x234, diagonal=-1),
        S(r(4, 3).t()),
        S(v(nan, inf, -inf, 1).reshape(2, 2)),
        S(r(3, 3, dtype=i64)),
        S(r(3, 3, dtype=b1)),
        S(r(3, 3, dtype=bf16)),
        S(r(0, 3)),
        S(r(3)),
    ],
)
row(
    "diag",
    [S(r(3, 3), smooth=True), *DIAGONALS, S(r(3), smooth=True), S(r(3), 2), S(r(3), -1)]
    + [S(r(0)), S(r(2, dtype=i64), 1), S(x234), S(r())],
)
row(
    "diag_embed",
    [
        S(r(3), smooth=True),
        S(r(2, 3), 1),
        S(r(2, 3), -2),
        S(r(2, 3), 0, 0, 2),
        S(r(2, 3), 1, 1, 0),
        S(r(2, dtype=b1)),
        S(r(3), 0, 0, 0),
        S(r(3), 0, 5, 0),
    ],
)
row(
    "trace",
    [S(r(3, 4), smooth=True), S(r(4, 3).t()), S(r(3, 3, dtype=i32)), S(r(0, 2)), S(r(3))],
    exact=False,
)
row("eye", [S(3), S(3, 5), S(3, m=2), S(0), S(2, dtype=i64), S(2, dtype=b1), S(-1), S(3, bad=1)])
row(
    "linspace",
    [
        S(0, 1, 5),
        S(-2.5, 3, 8),
        S(3, 0, 4, dtype=f64),
        S(0.0, 1.0, 123),
        S(0, 1, 1),
        S(0, 1, 0),
        S(0, 1, 2, requires_grad=True),
        S(0, 1, 5, dtype=bf16),
        S(0, 1, -1),
        S(0, 9, 4, dtype=i64),
        S(0, -7, 5, dtype=i32),
        S(v(0.5)[0], 3, 5),
        S(0, v(2.5)[0], 8, dtype=f64),
        S(v(0.5, 1, 2), 3, 5),
        S(v(1, dtype=i64)[0], v(2.5)[0], 7),
        S(r(2), 1, 3),
    ],
    exact=False,
)
row(
    "fft_fftfreq fft_rfftfreq",
    [
        *(S(n) for n in (0, 1, 2, 5, 8)),
        S(7, 0.25),
        S(6, d=-0.5, dtype=f64),
        S(9, dtype=bf16),
        S(5, dtype=i64),
        S(4, requires_grad=True),
    ],
    exact=False,
)
row(
    "logspace",
    [
        S(0, 1, 5),
        S(0, -3, 8, base=2),
        S(-2.5, 3, 7, 2.5, dtype=f64),
        S(v(0.5)[0], 3, 5),
        S(0, 1, 1),
        S(0, 1, 0),
        S(v(0.5, 1, 2), 3, 5),
        S(0, 1, 5, dtype=bf16),
        no(0, 4, 5, dtype=i64),
    ],
    exact=False,
)
row(
    "unravel_index",
    [
        S(i(4, 0, 11), (3, 4)),
        S(at(2, 5, below=24), (2, 3, 4)),
        S(i(5)[0], 7),
        S(at(3, below=5).to(i32), (5,)),
    ],
)
LISTS = [
    S([1, 2, 3]),
    S([1.5, 2, True]),
    S([[1, 2], [3, 4]]),
    S([]),
    S([[], []]),
    S([True, False]),
    S([nan, inf, -0.0]),
    S((1, 2), dtype=bf16),
    S([0.1, 0.2], dtype=f16),
    S([1.5, 2.0], requires_grad=True),
    S([[1, 2], [3]]),
    S([300], dtype=u8),
    no([0.5] * 65),
]
BY_FUNCTION[torch.tensor] = [*ROWS["tensor"], *LISTS]
row(
    "as_tensor",
    [
        *(S(x) for x in (3, 2.5, True, [1, 2], r(3), r(3, 2).t(), r(0), i(1, 2))),
        *(S(x, dtype=f64) for x in (3, [1.5, 2], r(3), r(4, 3)[::2], r(2, dtype=f64))),
        S(r(3), device="cpu"),
    ],
)
row(
    "one_hot",
    [
        S(i(0, 2, 1), 3),
        S(i(0, 2, 1), num_classes=5),
        S(at(2, 3, below=4), 4),
        S(torch.tensor(1), 3),
        S(i(0), 0),
        S(v(0, 1, dtype=i32), 2),
        S(i(0, 2, 1)),
        S(at(2, 3, below=4)),
        S(i()),
        S(i(-1)),
    ],
)

# --- products and running sums -----------------------------------------------------------------

row("outer ger", [S(r(3), r(4), smooth=True), S(r(0), r(2)), S(r(2, 3), r(2)), S(r(2), i(1, 2))])
ADDED = {"beta": 0.5, "alpha": 2}


def sums(matrix: tuple, *factors: tuple) -> list[Sample]:
    """input, factors: a sum with a product, of `matrix` shape."""

    def given(*first: torch.Tensor, dtype: torch.dtype = f32, **options: object) -> Sample:
        return S(*first, *(r(*shape, dtype=dtype) for shape in factors), **options)

    return [
        given(r(*matrix), smooth=True),
        given(r(*matrix), **ADDED),
        given(r(matrix[-1]), beta=2),
        given(r()),
        given(v(nan).expand(matrix), beta=0, alpha=0.5),
        given(r(*matrix, dtype=f64), dtype=f64),
        given(r(7, *matrix)),
        given(r(*matrix, dtype=i32), dtype=i32, beta=2, alpha=3),
        given(r(*matrix, dtype=u8), dtype=u8),
    ]


for _name, *_shapes in (
    ("baddbmm", (2, 3, 5), (2, 3, 4), (2, 4, 5)),
    ("addbmm", (3, 5), (2, 3, 4), (2, 4, 5)),
    ("addmv", (3,), (3, 4), (4,)),
    ("addr", (3, 4), (3,), (4,)),
):
    row(_name, sums(*_shapes), exact=False)
    _whole = [s for s in sums(*_shapes) if s.args[0].shape == _shapes[0]]
    row(f"{_name}_", [s for s in _whole if 0 not in s.args[0].stride()], exact=False)
row(
    "einsum",
    [
        S("ij,jk->ik", r(3, 4), r(4, 5), smooth=True),
        S("ij,jk", r(3, 4), r(4, 5)),
        S("ij->ji", x23),
        S("ij->", x23, smooth=True),
        S("ii->i", r(3, 3)),
        S("ii", r(3, 3), smooth=True),
        S("i,j->ij", r(3), r(4)),
        S("i,i", r(3), r(3)),
        S("bij,bjk->bik", r(2, 3, 4), r(2, 4, 5)),
        S("bhqd,bhkd->bhqk", r(2, 2, 3, 4), r(2, 2, 5, 4)),
        S("...ij,...jk->...ik", r(2, 3, 4), r(2, 4, 5)),
        S("...ij,jk", r(2, 3, 4), r(4, 5)),
        S("...i->...", x234),
        S("ij,ij->i", r(3, 4), r(3, 4)),
        S("ij,k->i", r(3, 4), r(5)),
        S("ij,jk,kl->il", r(2, 3), r(3, 4), r(4, 2), smooth=True),
        S("bn,anm,bm->ba", r(2, 3), r(4, 3, 5), r(2, 5)),
        S("ij,ij->ij", r(3, 1), r(3, 4)),
        S("ij,j->i", r(3, 4), r(1)),
        S("ij, jk -> ki", r(3, 4), r(4, 5)),
        S("bij,bjk->kbi", r(2, 3, 4), r(2, 4, 5)),
        S("aij,bjk->akib", r(2, 3, 4), r(6, 4, 5)),
        S("aij,bjk->biak", r(2, 3, 4), r(6, 4, 5)),
        S("i,j->ji", r(2), r(3)),
        S("ij,ij->ji", x23, r(2, 3)),
        S("ij,jk->ik", [r(3, 4), r(4, 5)]),
        S("i->", r(0)),
        S("ij,jk->ik", r(3, 0), r(0, 2)),
        S("ij,jk->ik", r(3, 4, dtype=f64), r(4, 5, dtype=f64)),
        S("ij,jk->ik", r(3, 4), r(3, 5)),
        S("ij->ik", x23),
        S("ijk->ij", x23),
        S("ij->ii", x23),
        S("i?->i", x23),
        S("ij", x23, x23),
    ],
    exact=False,
)
ALONG = [
    *(S(x, 0) for x in layouts()),
    S(x234, 1, smooth=True),
    S(x234, -1),
    S(x234, dim=2),
    S(x234, 3),
    S(r(5, dtype=f64), 0),
    S(r(5, dtype=bf16), 0),
    S(r(5, dtype=i64), 0),
    S(r(5, dtype=u8), 0),
    S(r(5, dtype=b1), 0),
    S(r(5), 0, dtype=f64),
    S(r(5, dtype=i32), 0, dtype=f32),
]
row("cumsum cumsum_", [*ALONG, S(v(1, inf, 2, -inf, 3, nan), 0)], exact=False)
row(
    "prod",
    [
        *[s for s in ALONG if s.args[0].numel() < 100],
        S(r(2, 3), smooth=True),
        S(r()),
        S(r(0)),
        S(r(3, 0), 1),
        S(x234, 1, True),
        S(v(2, 0, 3)),
        S(v(2, 0, 0)),
        S(v(2, nan, 0)),
        S(r(5, dtype=i64)),
    ],
    exact=False,
)
row(
    "diff",
    [
        S(r(5), smooth=True),
        S(x234, 1, 1),
        S(x234, 2, -1),
        S(r(3), 3),
        S(r(5), prepend=r(2), append=r(1)),
        S(r(5, dtype=i64)),
        S(r(5), 0),
        S(r(5, dtype=b1)),
        S(r(3, 4, dtype=b1), 2, 0),
        S(r()),
    ],
)

# --- where integers say ------------------------------------------------------------------------

row(
    "gather",
    [
        S(r(5), 0, i(4, 0, 0, 2), smooth=True),
        S(r(3, 4), 0, at(2, 4, below=3)),
        S(r(3, 4), 1, at(3, 7, below=4), smooth=True),
        S(r(3, 4), -1, at(2, 2, below=4)),
        S(r(4, 3).t(), 1, at(3, 1, below=4)),
        S(x234, 1, at(2, 5, 4, below=3)),
        S(r(3, 4), 1, at(3, 2, below=4).to(i32)),
        S(r(), 0, torch.tensor(0)),
        S(r(3), 0, torch.tensor(2)),
        S(r(3, 4), 1, torch.zeros(3, 0, dtype=i64)),
        S(r(5, dtype=i64), 0, i(1, 1)),
        S(r(5, dtype=b1), 0, i(1, 1)),
        S(r(5, dtype=bf16), 0, i(1, 4, 1)),
        S(r(5, dtype=f64), 0, i(1, 4, 1)),
        S(r(5), 0, r(5)),
        S(r(3, 4), 0, i(1)),
        S(r(3, 4), 0, at(2, 5, below=3)),
        S(r(3, 4), 2, at(2, 5, below=3)),
    ],
)
row(
    "take_along_dim",
    [
        S(r(3, 4), at(3, 2, below=4), 1, smooth=True),
        S(r(3, 4), at(1, 4, below=3), 0),
        S(r(3, 1), at(2, 4, below=3), 0),
        S(r(3, 4), at(1, 2, below=4), dim=1),
        S(r(3, 4), at(5, below=12)),
        S(r(3, 4), at(2, below=3), 0),
        S(r(3, 4), at(3, 2, below=4).to(i32), 1),
    ],
)
row(
    "index_select",
    [
        S(r(5), 0, i(4, 0, 0), smooth=True),
        S(x234, 1, i(2, 0, 2, 1)),
        S(x234, -1, i(3)),
        S(x234, 0, torch.tensor(1)),
        S(r(4, 3).t(), 0, i(0, 2)),
        S(x234, 1, i()),
        S(x234, 1, v(1, 2, dtype=i32)),
        S(r(5, dtype=bf16), 0, i(1, 1, 4)),
        S(r(5, dtype=b1), 0, i(1, 1, 4)),
        S(r(), 0, i(0)),
        S(x234, 1, at(2, 2, below=3)),
        S(x234, 1, r(2)),
    ],
)
row(
    "take",
    [S(x23, i(5, 0, -1), smooth=True), S(x23.t(), at(2, 2, below=6)), S(r(), i(0)), S(x23, r(2))],
)
TABLE = [
    S(i(1, 0, 1), r(4, 3), smooth=True),
    S(at(2, 5, below=4), r(4, 3)),
    S(at(2, 5, below=4).to(i32), r(4, 3)),
    S(torch.tensor(2), r(4, 3)),
    S(i(), r(4, 3)),
    S(at(50, below=4), r(4, 3, dtype=f64)),
    S(at(5, below=4), r(4, 3, dtype=bf16)),
    S(at(5, below=4), r(3, 4).t()),
    S(i(1, 0, 1), r(4)),
]
row(
    "embedding",
    [
        *TABLE,
        S(i(1, 0, 1), r(4, 3), 1),
        S(i(1, 3, 1), r(4, 3), padding_idx=-1),
        S(i(1, 3, 1), r(4, 3), max_norm=1.0),
        S(i(3, 3), r(4, 3), max_norm=0.5, norm_type=1.0),
        S(i(1, 3, 1).int(), torch.linspace(-2, 3, 12).reshape(4, 3), max_norm=1.0),
        S(i(1, 3, 1), r(4, 3, dtype=f64), max_norm=1.0, scale_grad_by_freq=True, padding_idx=3),
        S(i(1, 3, 1, 1)[None], r(4, 3), scale_grad_by_freq=True, smooth=True),
        no(i(1, 3), r(4, 3), sparse=True),
    ],
    exact=False,
)
BY_FUNCTION[torch.embedding] = [
    *(Sample(s.args[::-1], smooth=s.smooth) for s in TABLE),
    S(r(4, 3), i(1, 0, 1), 1),
    S(r(4, 3), i(1, 0, 1), padding_idx=0),
]
EXTREMA = [
    *reduction(True),
    S(v(1, 3, 3, 2)),
    S(v(1, 3, 3, 2), 0),
    S(v(1, nan, 3, nan), 0),
    S(v(-inf, -inf), 0),
    S(v(0.0, -0.0), 0),
]
row("argmax argmin", EXTREMA)
TIES = [s for s in EXTREMA[-5:] if len(s.args) > 1]
for _name in ("max", "min"):
    ROWS[_name] = [*ROWS[_name], *TIES, S(x234, 1, smooth=True)]

# --- x[i] and x[i] = y -------------------------------------------------------------------------

PLACES = [
    (r(5), i(4, 0, 0)),
    (r(5), i(-1, 2)),
    (r(5), [0, -2]),
    (r(3, 4), i(2, 0)),
    (r(3, 4), at(2, 3, below=3)),
    (r(3, 4), (slice(None), i(3, 1, 1))),
    (r(3, 4), (slice(None), [0, 1])),
    (r(3, 4), (i(2, 0, 1), i(3, 3, 0))),
    (r(3, 4), (i(2, 0, 1).reshape(3, 1), i(3, 0))),
    (r(3, 4), (i(2, 0), 1)),
    (r(3, 4), (1, i(2, 0))),
    (r(3, 4), (i(-1, 0), slice(1, 3))),
    (r(3, 4), (..., i(2, 0))),
    (r(3, 4), (None, i(2, 0))),
    (r(3, 4), (i(2, 0), None)),
    (r(4, 3).t(), i(2, 0)),
    (r(4, 3).t(), (slice(None), i(2, 0))),
    (x234, (i(1, 0), slice(None), i(3, 1))),
    (x234, (slice(None), i(2, 0), i(3, 1))),
    (x234, (i(1, 0), i(2, 1))),
    (x234, (0, i(2, 1))),
    (r(3, 4), i()),
    (r(5, dtype=i64), i(1, 1)),
    (r(5, dtype=bf16), i(1, 4)),
]
MASKED = [
    (r(5), r(5) > 0),
    (r(3, 4), r(3, dtype=b1)),
    (r(3, 4), (slice(None), r(4, dtype=b1))),
    (r(4, 3).t(), r(3, 4) > 0),
    (x234, r(2, 3) > 0),
    (x234, (r(2, 3) > 0, 1)),
    (x234, (..., r(3, 4) > 0)),
    (x234, (torch.tensor([True, True]), slice(None), i(3, 1))),
    (r(3, 4), r(3, 4) > 100),
    (r(3, 4), r(3, 4) < 100),
    (r(0, 4), r(0, dtype=b1)),
    (r(5, dtype=i64), r(5) > 0),
    (r(5, dtype=bf16), r(5) > 0),
]
READ = [
    *(S(x, index) for x, index in PLACES),
    S(r(3, 4), i(2, 0), smooth=True),
    S(r(3, 4), (i(2, 0, 1), i(3, 3, 0)), smooth=True),
    S(r(3, 4), (i(0, 1), i(0, 1, 2))),
    S(r(3, 4), r(2)),
    S(r(3, 4), (i(0), i(0), i(0))),
    *(S(x, index) for x, index in MASKED),
    S(r(3, 4), r(3, 4) > 0, smooth=True),
    S(r(3, 4), r(4, dtype=b1)),
    S(r(3, 4), (slice(None), r(3, dtype=b1))),
    S(r(3, 4), r(3, 4, 5, dtype=b1)),
    no(r(3, 4), [True, False, True]),
    no(r(3, 4), True),
]
WRITTEN = [
    *(S(x, index, 2.5) for x, index in PLACES),
    S(r(5), i(4, 0), r(2)),
    S(r(5), i(4, 0, 4), v(1, 2, 3)),
    S(r(5), [1, 2], r()),
    S(r(3, 4), i(2, 0), r(2, 4)),
    S(r(3, 4), i(2, 0), r(4)),
    S(r(3, 4), (slice(None), i(2, 0)), r(3, 2)),
    S(r(3, 4), (i(2, 0, 1), i(3, 3, 0)), r(3)),
    S(x234, (i(1, 0), slice(None), i(3, 1)), r(2, 3)),
    S(r(3, 4), i(2, 0), r(1, 2, 4)),
    S(r(3, 4), i(2, 0), r(3, 4)),
    S(r(3, 4), torch.tensor(1), 1.0),
    S(r(3, 4, dtype=i64), i(2, 0), r(4)),
    S(r(3), i(2, 0), r(2, dtype=f64)),
    *(S(x, index, x[index] * 2) for x, index in MASKED),
    S(r(3, 4), r(3) > 100, r(0, 4)),
    S(r(3, 4), r(3, dtype=b1), r(4)),
    S(r(3, 4), r(3, 4) > 0, r(30)),
]
CONDITIONS = [
    r(5),
    r(3, 4),
    r(4, 3).t(),
    x234,
    r(0),
    r(3, 0),
    r(),
    v(0.0, nan, -0.0, 1.0),
    r(5, dtype=i64),
]
row("nonzero", [S(x) for x in CONDITIONS] + [S(x, as_tuple=True) for x in CONDITIONS])
row("argwhere", [S(x) for x in CONDITIONS])
ROWS["where"] += [S(x) for x in CONDITIONS]
SORTABLE = [
    v(3.0, 1.0, 2.0, 1.0, 3.0),
    v(nan, 1.0, nan, -0.0, 0.0),
    at(4, 5, below=3),
    at(5, 4, below=3).t(),
    at(3, 4, below=3).to(f32),
    i(2, 2, 1, 1, 2).to(bf16),
    torch.tensor([True, False, True]),
    torch.tensor(3.0),
    r(0),
    r(0, 3),
]
ASKED = {"return_inverse": True, "return_counts": True}
SLICED = [at(4, 3, below=2), at(2, 3, 4, below=2), at(4, 3, below=2).t(), r(0, 3), r(3, 0), r()]
DISTINCT = [
    *(S(x) for x in SORTABLE),
    *(S(x, **ASKED) for x in SORTABLE),
    *(S(x, dim=k) for x in SLICED for k in (0, 1, -1)),
    *(S(x, dim=k, **ASKED) for x in SLICED for k in (0, 1)),
    S(SORTABLE[0], return_counts=True),
    S(SORTABLE[0], return_inverse=True),
]
row("unique", [*DISTINCT, S(SORTABLE[2], True, True), S(SORTABLE[2], sorted=False)])
row("unique_consecutive", DISTINCT)
row(
    "bincount",
    [
        *(S(at(9, below=4), minlength=n) for n in (0, 3, 7)),
        S(at(9, below=4).to(u8)),
        S(i()),
        S(i(), minlength=2),
        *(S(at(9, below=4), r(9, dtype=dtype)) for dtype in (f32, f64, i64, bf16, b1)),
        S(at(9, below=4), weights=r(9), minlength=6),
        S(i(), r(0), minlength=2),
        S(i(1), r(2)),
        S(i(-1)),
        S(at(2, 2, below=3)),
        S(r(3)),
        S(i(1), minlength=-1),
    ],
    exact=False,
)
row(
    "masked_select",
    [
        S(r(3, 4), r(3, 4) > 0, smooth=True),
        S(r(3, 4), r(4) > 0),
        S(r(4), r(3, 4) > 0),
        S(r(4, 3).t(), r(3, 1) > 100),
        S(r(), r() > 0),
        S(r(5, dtype=i64), r(5) > 0),
        S(r(5), r(5)),
        S(r(5), r(3) > 0),
    ],
)


AT = at(3, 4, below=3)
SCATTERED = [
    S(r(3, 4), 0, AT, r(3, 4), smooth=True),
    S(r(3, 4), 1, at(3, 2, below=4), r(3, 2), smooth=True),
    S(r(3, 4), -1, at(3, 7, below=4), r(3, 7)),
    S(r(4, 3).t(), 0, AT, r(5, 6)),
    S(r(5), 0, i(1, 1, 4), r(3)),
    S(r(5, dtype=i64), 0, i(1, 1, 4), i(7, 8, 9)),
    S(r(5, dtype=f64), 0, i(1, 1, 4).to(i32), r(3, dtype=f64)),
    S(r(2, 3, 4), 1, at(2, 5, 4, below=3), r(2, 5, 4)),
    S(r(300, 17), 0, at(123, 17, below=300), r(123, 17)),
    S(r(17, 300), 1, at(17, 123, below=300), r(17, 123)),
    S(r(8, 3, 200), 2, at(8, 3, 9, below=9), r(8, 3, 9)),
    S(r(5000), 0, at(700, below=50), r(700)),
    S(r(5000, dtype=bf16), 0, at(7, below=5), r(7, dtype=bf16)),
    S(r(3, 4), 0, at(0, 4, below=1), r(3, 4)),
    S(r(), 0, torch.tensor(0), r()),
    S(r(5), 0, i(1, 5), r(2)),
    S(r(5), 0, i(1, -1), r(2)),
    S(r(5), 0, i(1, 2, 3), r(2)),
    S(r(5), 0, i(1, 2), r(2, dtype=f64)),
    S(r(5), 0, r(2), r(2)),
    S(r(3, 4), 0, i(1), r(1)),
    S(r(3, 4), 2, AT, r(3, 4)),
    S(r(3, 4), 0, at(1, 2, below=3), r(1, 2), smooth=True),
    S(r(4, 5, 3).transpose(0, 1), 1, at(2, 6, 3, below=4), r(2, 6, 3)),
    S(r(40, 50), 0, at(12, 30, below=40), r(12, 30)),
]
row(
    "scatter scatter_",
    [
        *SCATTERED,
        S(r(3, 4), 1, at(3, 1, below=4), 2.5, smooth=True),
        S(r(3, 4, dtype=i64), 1, at(3, 1, below=4), 2),
        S(r(3, 4), dim=1, index=at(3, 1, below=4), value=1.0),
        S(r(3, 4), dim=1, index=at(3, 1, below=4), src=r(3, 1)),
        S(r(5), 0, i(1, 1, 4), r(3), reduce="add"),
        S(r(4, 3).t(), 1, at(3, 5, below=4), r(3, 5), reduce="multiply"),
        S(r(3, 4, dtype=i64), 1, at(3, 1, below=4), 2, reduce="add"),
        no(r(5, dtype=b1), 0, i(1, 1, 4), r(3, dtype=b1), reduce="add"),
    ],
)
row("scatter_add scatter_add_", SCATTERED, exact=False)
row(
    "index_add index_add_",
    [
        S(r(3, 4), 0, i(2, 0, 2, 1), r(4, 4), smooth=True),
        S(r(3, 4), 1, i(2, 0), r(3, 2), alpha=-0.5, smooth=True),
        S(r(3, 4), -1, i(2), r(3, 1)),
        S(r(5, dtype=i64), 0, i(1, 1, 4), i(7, 8, 9), alpha=2),
        S(r(3, 4), 0, i(2, 0), r(3, 4)),
        S(r(3, 4), 0, i(3), r(1, 4)),
        S(r(3, 4), 0, i(-1), r(1, 4)),
        S(r(3, 4), 0, i(0)[None], r(1, 4)),
        S(r(3, 4), 0, i(), r(0, 4)),
    ],
    exact=False,
)


row(
    "index_copy index_copy_",
    [
        S(r(3, 4), 0, i(2, 0), r(2, 4), smooth=True),
        S(r(3, 4), 1, i(2, 0, 3, 1, 1, 2), r(3, 6)),
        S(r(4, 3).t(), -1, i(2), r(3, 1)),
        S(r(5, dtype=i64), 0, i(1, 1, 4), i(7, 8, 9)),
        S(r(300, 20), 0, at(50, below=300), r(50, 20)),
        S(r(3, 4), 0, i(2, 0), r(3, 4)),
        S(r(3, 4), 0, i(3), r(1, 4)),
        S(r(3, 4), 0, i(0)[None], r(1, 4)),
        S(r(3, 4), 0, i(1), r(1, 4, dtype=f64)),
        S(r(3, 4), 0, i(), r(0, 4)),
    ],
)
row(
    "index_fill index_fill_",
    [
        S(r(3, 4), 0, i(2, 0), 2.5, smooth=True),
        S(r(3, 4), 1, i(2, 0, 3, 3, 3), 0),
        S(r(4, 3).t(), -1, i(2), torch.tensor(3.0)),
        S(r(5, dtype=i64), 0, i(1, 1, 4), 7),
        S(r(300, 20, dtype=bf16), 0, at(50, below=300), 1.5),
        S(r(3, 4), 0, i(3), 1.0),
        S(r(3, 4), 0, i(0)[None], 1.0),
        S(r(3, 4), 0, i(), 1.0),
    ],
)
row(
    "index_put index_put_",
    [
        S(r(3, 4), (i(2, 0),), r(2, 4), smooth=True),
        S(r(3, 4), (i(2, 0, 2), i(1, 3, 1)), r(3), smooth=True),
        S(r(3, 4), (i(2, 0, 2), i(1, 3, 1)), r(3), True, smooth=True),
        S(r(3, 4), (i(2, 0, 2),), r(3, 4), accumulate=True, smooth=True),
        S(r(3, 4), (None, i(1, 1, 0, -1, 2, 1)), r(3, 6), accumulate=True),
        S(r(3, 4), (at(2, 5, below=3),), r(2, 5, 4), accumulate=True),
        S(r(3, 4), (r(3, 4) > 0,), torch.tensor(1.5)),
        S(r(5, dtype=i64), (i(1, 1, 4),), i(7, 8, 9), True),
        S(r(4, 3).t(), (i(2, 0),), torch.tensor(1.5)),
        S(r(500, 20), (at(70, below=500),), r(70, 20), accumulate=True),
        S(r(3, 4), (i(3),), r(1, 4)),
        S(r(3, 4), (i(1),), r(1, 4, dtype=f64)),
        S(r(3, 4), (i(1, 2),), r(3, 4)),
    ],
    exact=False,
)


REDUCED = [
    # eager's second derivative of a product is not exactly zero where it should be
    S(*s.args, reduce, include_self=own, smooth=s.smooth and reduce != "prod")
    for s in SCATTERED
    if not s.refused and s.args[3].shape == s.args[2].shape
    for reduce in ("sum", "mean", "prod", "amax", "amin")
    for own in (True, False)
]
row(
    "scatter_reduce scatter_reduce_",
    [
        *REDUCED,
        S(r(3, 4), 0, AT, (r(3, 4) > 0).float(), "amax", smooth=True),
        S(v(1, 2, 0, 3, 4), 0, i(0, 0, 1, 1, 1, 4), v(2, 0, 0, 0, 3, 5), "prod"),
    ],
    exact=False,
)


def apart(*shape: int, dtype: torch.dtype = f32) -> torch.Tensor:
    """Numbers that are all different, in no order."""
    n = math.prod(shape)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    return (order.reshape(shape) - n // 2).to(dtype)


TIES = torch.tensor(
    [[2.0, 1.0, 2.0, math.nan, -0.0, 0.0], [math.inf, 1, 1, -math.inf, 1, math.nan]]
)
SORTED = [
    S(r(7), smooth=True),
    S(r(3, 5), smooth=True),
    S(apart(123)),
    S(apart(5, 4).t(), 0),
    S(apart(2, 3, 4), dim=1),
    S(apart(3, 6, dtype=i64)),
    S(apart(3, 6, dtype=bf16)),
    S(apart(3, 6, dtype=f64)),
    S(apart(8, 8)[::2, ::3]),
    S(r(1, 3), 0),
    S(r(0, 3)),
    S(r(3, 0)),
    S(r(3), 1),
]
STABLE = [
    S(TIES, stable=True),
    S(TIES, dim=0, stable=True, descending=True),
    S(TIES, stable=True, descending=True),
    S(r(4, 9) > 0, stable=True),
    S(apart(2, 8) % 3, stable=True),
    S(r(), stable=True),
]
row("sort", [*SORTED, *STABLE, S(apart(3, 5), descending=True), S(apart(3, 5), 0, True)])
row("argsort", [*SORTED, *STABLE, S(apart(3, 5), descending=True), S(apart(3, 5), 0, True)])
row("msort", [S(apart(6, 3), smooth=True), S(r(5)), S(apart(4, dtype=i64)), S(r(2, 0))])
row(
    "topk",
    [
        S(apart(7), 3, smooth=True),
        S(apart(3, 5), 2, smooth=True),
        S(apart(3, 5), 2, 0, False),
        S(apart(123), 123),
        S(apart(4, 6), k=1, dim=-2),
        S(apart(4, 6, dtype=i64), 4, largest=False),
        S(apart(4, 6, dtype=bf16).t(), 2),
        S(apart(4, 6), 0),
        S(r(), 1),
        S(apart(4), 5),
        S(apart(4), -1),
        S(apart(4), 1, 1),
    ],
)
row(
    "kthvalue",
    [
        S(apart(7), 3, smooth=True),
        S(apart(3, 5), 2, 0),
        S(apart(3, 5), 5, -1, True),
        S(apart(3, 5, dtype=i64), 1),
        S(apart(3), 4),
        S(apart(3), 0),
        S(r(), 1),
    ],
)
row(
    "median",
    [
        S(apart(7), smooth=True),
        S(apart(3, 4)),
        S(apart(3, 4), 1, smooth=True),
        S(apart(3, 4), 0, True),
        S(apart(4, 3, dtype=i64).t(), dim=-1),
        S(apart(4, 3, dtype=bf16), 0),
        S(torch.tensor([1.0, math.nan, 3.0])),
        S(torch.tensor([[1.0, math.nan, 3.0], [1, 2, 3]]), 1),
        S(torch.tensor([1.0, 2.0, 2.0, 3.0, 2.0])),
        S(torch.tensor([[1.0, math.nan, 3.0], [1, math.nan, 3]])),
        S(r(3, dtype=b1)),
        S(r(0)),
        S(r(0, 3)),
        S(r()),
        S(r(), 0),
        S(r(3), 2),
        no(r(0, dtype=i64)),
        no(r(3, 0), 1),
    ],
)


def is_basic(sample: Sample) -> bool:
    """Whether an index sample of the other file is still what it says."""
    items = sample.args[1] if isinstance(sample.args[1], tuple) else (sample.args[1],)
    return not sample.refused and not any(isinstance(x, list) for x in items)


ROWS["__getitem__"] = [*filter(is_basic, ROWS["__getitem__"]), *READ]
_assigned = [s for s in ROWS["__setitem__"] if not isinstance(s.args[1], list)]
ROWS["__setitem__"] = [*_assigned, *WRITTEN]

_lengths, _ends = torch.tensor([2, 0, 3]), torch.tensor([0, 2, 2, 5])
row(
    "segment_reduce",
    [
        *(
            S(x, how, initial=first, **segments)
            for x in (v(1, 2, 3, 3, 0), r(5, 4))
            for how in ("sum", "mean", "max", "min", "prod")
            for first in (None, 2.0)
            for segments in ({"lengths": _lengths}, {"offsets": _ends})
        ),
        S(r(2, 5, dtype=f64), "sum", lengths=torch.tensor([[2, 3], [5, 0]]), axis=1),
        S(r(2, 5, 3), "max", offsets=torch.tensor([[0, 2, 5], [0, 5, 5]]), axis=1),
        S(r(5), "sum", lengths=torch.tensor([2, 2])),
        S(r(5), "sum", lengths=_lengths, offsets=_ends),
        S(r(5), "median", lengths=_lengths),
    ],
    exact=False,
)

NAMES = (set(ROWS) - _before) | {"max", "min", "__getitem__", "__setitem__"}


def is_indexing(function: Callable) -> bool:
    """Whether the samples of a function stand in this file."""
    return bare_name(function) in NAMES
