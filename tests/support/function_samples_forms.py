"""Samples of other forms of functions: copies of views, real tensors where torch has complex ones,
searches among sorted values.

Importing this adds them to the table of `function_samples`, as `function_samples_nn` does.
"""

from __future__ import annotations

import torch

from support import function_samples_indexing  # noqa: F401  rows that get more here
from support.function_samples import (
    ROWS,
    SPECIAL,
    SPECIAL_A,
    SPECIAL_B,
    TENSOR_PAIRS,
    UNARY,
    S,
    Sample,
    b1,
    bf16,
    f32,
    f64,
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

ANY = [S(x) for x in layouts()] + [S(r(5, dtype=d)) for d in (f64, bf16, i64, i32, u8, b1)]
SMOOTH = S(r(3, 5), smooth=True)
CUBES = [r(3, 5, 2), r(2, 5, 3).permute(2, 1, 0), r(3, 5, 2, dtype=i64), r(6, 10, 4)[::2, ::2, ::2]]

# --- copies of views ---------------------------------------------------------------------------

row("alias_copy detach_copy", ANY)
row("diagonal_copy", [S(x, *a) for x in CUBES for a in ((), (1,), (-1, 1, 2))] + [S(r(5))])
row("expand_copy", [S(r(3, 1), (2, 3, 5)), S(r(3, 1), (-1, 5), implicit=True), S(r(), (3,))])
row("permute_copy", [S(x, (2, 0, 1)) for x in CUBES] + [S(r(3, 5), (0,))])
row("select_copy", [S(x, 1, k) for x in CUBES for k in (0, -1)] + [S(r(3), 0, 3)])
row(
    "slice_copy",
    [S(x, 1, *a) for x in CUBES for a in ((), (1,), (1, 3), (-4, -1, 2))] + [S(r(7), 0, 2, 9)],
)
row("split_copy unsafe_split", [S(x, n, 1) for x in CUBES for n in (1, 2, 5)] + [S(r(3), -1)])
row(
    "split_with_sizes_copy unsafe_split_with_sizes",
    [S(x, [1, 4], 1) for x in CUBES] + [S(r(5), [2, 2])],
)
row("unsafe_chunk", [S(x, n, 1) for x in CUBES for n in (1, 3)] + [S(r(3), 0)])
row("squeeze_copy", [S(r(3, 1, 5)), S(r(3, 1, 5), 1), S(r(3, 1, 5), (0, 1)), S(r())])
row("t_copy", [S(r(3, 5)), S(r(5)), S(r()), S(r(3, 5, dtype=i64)), S(r(3, 5, 1))])
row("transpose_copy", [S(x, 0, 2) for x in CUBES] + [S(r(), 0, 0), S(r(3), 0, 1)])
row("unbind_copy", [S(x, 1) for x in CUBES] + [S(r(3))])
row("unfold_copy", [S(x, 1, 2, 2) for x in CUBES] + [S(r(7), 0, 3, 1), S(r(3), 0, 5, 1)])
row("unsqueeze_copy", [S(x, k) for x in CUBES for k in (0, -1)] + [S(r(3), 5)])
row("view_copy", [S(r(3, 5), (5, 3)), S(r(3, 5), (-1,)), S(r(5, 3).t(), (15,))])
row("ravel", ANY)
row("diagflat", [S(r(3)), S(r(3, 2), 1), S(r(2, 3).t(), -2), S(r()), S(r(3, dtype=i64))])
row(
    "linalg_diagonal",
    [S(x) for x in CUBES] + [S(r(3, 5), offset=1), S(r(3, 5, 2), dim1=0, dim2=1), S(r(5))],
)
row("fill", [S(r(3, 5), 2), S(r(5, 3).t(), 0.5), S(r(5), v(2.0)[0]), S(r(5, dtype=i64), 3)])
row(
    "sum_to_size",
    [S(r(3, 5), 1, 5), S(r(3, 5), (3, 5)), S(r(2, 3, 5), (3, 1)), S(r(3, 5), 5), S(r(3, 5), 2, 5)]
    + [S(x, ()) for x in (r(), r(3), r(dtype=b1), r(3, dtype=i32))]
    + [S(r(3, dtype=b1), 3), S(r(3, dtype=b1), 1)],
    exact=False,
)

# --- real tensors where torch has complex ones -------------------------------------------------

row("conj conj_physical resolve_conj resolve_neg real", ANY)
row("conj_physical_", [no(*x.args) if 0 in x.args[0].stride() else x for x in ANY])
row("adjoint", [S(x) for x in CUBES] + [S(r(3, 5)), S(r(3))])
row("isreal", ANY)
row("angle", UNARY)
row("fmax fmin", [*TENSOR_PAIRS, *(S(a, b) for a, b in ((SPECIAL_A, SPECIAL_B),))])
_exponents = [S(x, v(-3, 0, 1, 2, 7, dtype=d)) for x, d in ((r(5), f32), (r(5, dtype=i64), i32))]
_exponents += [S(r(3, 1), r(5), smooth=True), S(r(3, dtype=f64), v(5))]
row("ldexp ldexp_", _exponents, exact=False)
row(
    "vander",
    [
        S(r(5)),
        S(r(5), 3),
        S(r(5), N=7, increasing=True),
        S(r(5), 0),
        S(r(5), 1),
        S(r(5, dtype=i64), 4),
        S(r(5, dtype=b1)),
        S(r(3, 5)),
    ],
)
row(
    "linalg_vander",
    [
        S(r(5)),
        S(r(3, 5), N=3),
        S(r(5, dtype=i64), N=4),
        S(r(5), N=1),
        S(r()),
        S(v(1.3), N=5),
        S(v(1.3)[0], N=3),
    ]
    + [S(v(1.5, -2.0).to(dtype)) for dtype in (bf16, torch.float16)],
    exact=False,
)
row(
    "fft_fftshift fft_ifftshift",
    [S(x) for x in CUBES] + [S(r(3, 5), 1), S(r(3, 5), dim=(0, -1)), S(r(3, 5), 2), S(r(5))],
)

# --- what torch's own decompositions call --------------------------------------------------------

_KINDS = [(bf16, bf16, torch.float32), (torch.float16, torch.float16, torch.float16)]
_KINDS += [(torch.float32, torch.float32, torch.float16), (bf16, torch.float32, bf16)]
row(
    "_softmax_backward_data",
    [S(r(3, 5), r(3, 5), k, torch.float32) for k in (0, 1)]
    + [S(r(5, dtype=f64), r(5, dtype=f64), 0, f64)]
    + [S(v(0.5, -1.0).to(g), v(0.25, 0.75).to(y), 0, to) for g, y, to in _KINDS],
    exact=False,
)
_grid = [(r(2, 3, 4, 5), r(2, 3, 3, 2)), (r(1, 2, 3, 4, 3), r(1, 2, 3, 2, 3))]
row(
    "grid_sampler_2d",
    [S(*_grid[0], m, p, c) for m in (0, 1) for p in (0, 1) for c in (True, False)],
    exact=False,
)
row(
    "grid_sampler_3d",
    [S(*_grid[1], m, p, c) for m in (0, 1) for p in (0, 1) for c in (True, False)],
    exact=False,
)
row(
    "native_layer_norm",
    [
        S(r(3, 5), [5], r(5), r(5), 1e-5),
        S(r(2, 3, 5), [3, 5], r(3, 5), None, 0.1),
        S(r(3, 5), [5], None, None, 1e-5),
        S(v(1.5, -2.0, 0.25).to(bf16), [3], torch.ones(3), torch.zeros(3), 1e-5),
        S(v(1.5, -2.0, 0.25).to(bf16), [3], None, None, 1e-5),
    ],
    exact=False,
)
_groups = torch.linspace(-2, 3, 12).reshape(1, 4, 3)
row(
    "native_group_norm",
    [S(r(2, 6, 5), r(6), r(6), 2, 6, 5, 3, 1e-5), S(r(1, 4, 3), None, None, 1, 4, 3, 2, 0.1)]
    + [S(_groups.to(bf16), torch.ones(4), torch.zeros(4), 1, 4, 3, 2, 0.1)]
    + [S(_groups.to(bf16), None, None, 1, 4, 3, 2, 0.1)],
    exact=False,
)

# --- searches ----------------------------------------------------------------------------------

_sorted = [r(n).sort().values for n in (0, 1, 2, 3, 7, 8, 33)]
_rows = r(3, 7).sort().values
_ties = v(-1.0, -1.0, 0.0, 0.0, 0.0, 2.0, inf)
_asked = v(-2.0, -1.0, 0.0, 0.5, 2.0, 3.0, inf, -inf, nan)
SIDES = [{}, {"right": True}, {"out_int32": True}]
row(
    "searchsorted",
    [
        *(S(x, r(5, 3), **how) for x in _sorted for how in SIDES),
        *(S(_ties, _asked, **how) for how in SIDES),
        *(S(_rows, r(3, 5), **how) for how in SIDES),
        S(_ties, _asked, side="right"),
        S(_ties, _asked, side="left"),
        S(_ties, 0.5),
        S(v(1, 3, 5, 7, dtype=i64), v(0, 3, 8, dtype=i64)),
        S(v(1.0, 3.0, dtype=f64), r(5, dtype=f64)),
        S(_rows.flip(1), r(3, 5), sorter=torch.arange(6, -1, -1).expand(3, 7).contiguous()),
        S(_rows, r(2, 5)),
        S(_ties, r(5, dtype=f64)),
        S(_ties, r(5, dtype=i64)),
        S(v(1, 3, 5, dtype=i64), r(5)),
        S(_ties, _asked, side="left", right=True),
        S(_ties, _asked, side="up"),
        S(_ties, r(5, 3).t()),
    ],
)
row(
    "bucketize",
    [
        *(S(r(5, 3), x, **how) for x in _sorted for how in SIDES),
        *(S(_asked, _ties, **how) for how in SIDES),
        S(0.5, _ties),
        S(r(5, 3).t(), _ties),
        S(r(3), _rows),
    ],
)
row(
    "isin",
    [
        S(r(9, dtype=i64), r(5, dtype=i64)),
        S(r(3, 5, dtype=i32), r(5, 1, dtype=i64)),
        S(v(*SPECIAL), v(nan, inf, 1.0, 0.0)),
        S(v(1.0, 2.0, 3.0), v(1.0, 2.0), invert=True),
        S(r(9, dtype=i64), 3),
        S(3, r(9, dtype=i64)),
        S(r(5), r(0)),
        S(r(5, 3).t(), r(5), assume_unique=True),
    ],
)
_mask = v(True, False, True, True, False, dtype=b1)
row(
    "masked_scatter masked_scatter_",
    [
        S(r(5), _mask, r(3), smooth=True),
        S(r(3, 5), _mask, r(3, 5)),
        S(r(5, 3).t(), r(3, 5, dtype=b1), r(15)),
        S(r(5, dtype=i64), _mask, r(5, dtype=i64)),
        S(r(3, 5), torch.zeros(3, 5, dtype=b1), r(3)),
        S(r(5), _mask, r(2)),
        S(r(5), torch.zeros(5, dtype=b1), r(0)),
        S(r(5), _mask, r(0)),
        S(r(0), torch.zeros(0, dtype=b1), r(3)),
        S(r(5), _mask, r(5, dtype=f64)),
        S(r(5), r(5), r(5)),
    ],
)
_places = v(0, 7, -1, 7, dtype=i64)
row(
    "put put_",
    [
        S(r(3, 5), _places, r(4)),
        S(r(3, 5), _places, r(4), True),
        S(r(5, 3).t(), _places.reshape(2, 2), r(4), accumulate=True),
        S(r(3, 5, dtype=i64), _places, r(4, dtype=i64)),
        S(r(3, 5), v(15, dtype=i64), r(1)),
        S(r(3, 5), _places, r(3)),
        S(r(3, 5), _places, r(4, dtype=f64)),
    ],
)
_named = v(0, 2, 0, 4, dtype=i64)
row(
    "index_reduce index_reduce_",
    [
        *(
            S(r(5, 3), 0, _named, r(4, 3), how, include_self=own)
            for how in ("mean", "prod", "amax", "amin")
            for own in (True, False)
        ),
        S(r(3, 5).t(), 0, _named, r(4, 3), "amax"),
        S(r(3, 5), 1, _named, r(3, 4), "mean"),
        S(r(5, dtype=i64), 0, _named, r(4, dtype=i64), "amin"),
        S(r(5, 3), 0, _named, r(4, 3), "sum"),
    ],
    exact=False,
)


# --- further samples of functions that have a row elsewhere --------------------------------------


def more(names: str, *samples: Sample) -> None:
    """Samples that came later, which leave the numbers of the others as they are."""
    for name in names.split():
        ROWS[name] += samples


IMAGE = r(2, 3, 4, 5)
LAST = IMAGE.to(memory_format=torch.channels_last)
FORMATS = (torch.channels_last, torch.contiguous_format, torch.preserve_format)
more(
    "broadcast_to expand",
    S(r(1, 5), (1, 1, 5)),
    S(r(5), (1, 3, 5)),
    S(r(3, 1), (2, 1, 3, 1)),
    S(r(5, 3).t(), (1, 3, 5)),
    S(r(), (1, 1)),
)
_laid_out = [S(x, memory_format=f) for x in (IMAGE, LAST) for f in FORMATS]
more("float double bfloat16 half long int bool short char byte", *_laid_out)
more(
    "to",
    *(S(x, d, memory_format=f) for x in (IMAGE, LAST) for f in FORMATS for d in (f32, f64)),
    *(S(IMAGE, x, memory_format=torch.channels_last) for x in (r(3), r(3, dtype=f64))),
    S(LAST, f32, copy=True, memory_format=torch.contiguous_format),
    S(r(5, 3).t(), f64, memory_format=torch.contiguous_format),
)
more("cat concat concatenate", S([LAST]), S([LAST, LAST], 1), S([LAST, IMAGE], 1), S([LAST, r(0)]))
_again = v(2, 1, 2, 2, dtype=i64)
more(
    "index_fill index_fill_",
    S(r(5, 3), 0, _again, torch.tensor(1.5), smooth=True),
    S(r(), 0, v(0, dtype=i64), 2.5),
    S(r(), -1, v(0, 0, dtype=i64), torch.tensor(1.5)),
)
more("index_copy index_copy_", S(r(), 0, v(0, dtype=i64), r()), S(r(), 0, v(0, dtype=i64), r(1)))
more(
    "index_add index_add_",
    S(r(), 0, v(0, dtype=i64), r(), alpha=2),
    S(r(), 0, v(0, dtype=i64), r(1)),
)
more(
    "pad",
    *(S(r(2, 3, 4), w, m) for w in ((-1, 2), (2, -1), (-1, -2)) for m in ("reflect", "circular")),
    S(r(1, 3, 4, 4), (-1, 1, -2, 1), "replicate"),
    S(r(5, 3, 4, 4), (-4, 5, 0, 0), "replicate"),
    S(r(2, 3, 4), (-5, 1), "reflect"),
)
_whole = (v(-7, 7, -7, 7, -128, dtype=i64), v(2, -2, -2, 2, 3, dtype=i64))
more(
    "div div_ divide divide_",
    S(*_whole, rounding_mode="trunc"),
    S(v(7, 255, 0, dtype=u8), v(2, 3, 5, dtype=u8), rounding_mode="trunc"),
    S(r(5, dtype=bf16), r(5, dtype=bf16), rounding_mode="trunc"),
    S(r(5), 0.3, rounding_mode="trunc"),
)
