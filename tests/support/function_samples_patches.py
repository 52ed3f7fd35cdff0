"""Samples of patches, unpooling, sampling by a grid, and channels traded for pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from support.function_samples import (
    BY_FUNCTION,
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
    v,
)

restart()

LAST = torch.channels_last

# --- windows as columns ------------------------------------------------------------------------

_x = r(2, 3, 5, 4)
PATCHES = [
    S(_x, 2, 1, 0, 1, smooth=True),
    S(_x, 2, 1, 0, 2, smooth=True),
    S(_x, 3, 1, 1, 2, smooth=True),
    S(_x, (2, 3), (2, 1), (1, 0), (1, 2)),
    S(_x, 2, 1, 1, 3),
    S(_x, 1, 1, 0, 1),
    S(_x, (5, 4), 1, 0, 1),
    S(_x[0], 2, 1, 0, 1),
    S(_x[:0], 2, 1, 0, 1),
    S(_x.double(), 2, 1, 1, 1, smooth=True),
    S(_x.bfloat16(), 2, 1, 1, 1),
    S(_x.half(), 2, 1, 0, 1),
    S(_x.to(memory_format=LAST), 2, 1, 0, 1),
    S(r(4, 5, 3, 2).permute(3, 2, 1, 0), 2, 1, 0, 1),
    S(r(2, 3, 5, 4, dtype=b1), 2, 1, 1, 1),
    S(r(2, 3, 5, 4, dtype=i64), 2, 1, 0, 1),
    S(_x, 9, 1, 0, 1),
    S(_x, 0, 1, 0, 1),
    S(_x, 2, 0, 0, 1),
    S(_x, 2, 1, -1, 1),
    S(_x, 2, 1, 0, 0),
    S(_x, (2, 2, 2), 1, 0, 1),
    S(_x[0, 0], 2, 1, 0, 1),
    S(_x[:, :0], 2, 1, 0, 1),
]


def pairs(sample: Sample) -> Sample:
    """The sample with two numbers for each one, as torch's own function takes them."""
    args = tuple((a, a) if type(a) is int else a for a in sample.args)
    return Sample(args, sample.kwargs, sample.smooth, sample.refused)


row("im2col", list(map(pairs, PATCHES)), exact=False)
row(
    "unfold",
    [
        S(_x, 2, smooth=True),
        S(_x, (3, 2), padding=1, stride=2, smooth=True),
        S(_x, 2, 2, (1, 0), 1),
        S(_x[0], 2),
        S(_x, 9),
    ],
    exact=False,
)
_sheet = r(4, 6)
STRIDED = [
    S(r(16), (4, 6), (3, 1), smooth=True),  # frames that overlap
    S(r(16), (2, 3), (1, 4), 2, smooth=True),
    S(_sheet, (2, 2), (1, 2), 1, smooth=True),
    S(_sheet, (3, 2, 2), (6, 0, 3), smooth=True),
    S(_sheet, (24,), (1,), 0),
    S(_sheet, (), (), 5),
    S(_sheet, (0, 3), (1, 1)),
    S(_sheet.t(), (2, 3), (6, 1)),
    S(r(2, 3, 4).permute(2, 0, 1), (6, 2), (2, 1), 12),
    S(_sheet.bfloat16(), (5, 6), (2, 2)),
    S(_sheet.double(), [2, 2], [6, 3], storage_offset=3, smooth=True),
    S(r(9, dtype=i64), (3, 3), (2, 1)),
    S(r(9, dtype=b1), (3, 3), (2, 1)),
    no(_sheet[:, ::2], (2, 2), (6, 2)),
    no(_sheet[1:], (2, 2), (6, 1), 0),
    S(_sheet, (5, 6), (6, 1)),
    S(_sheet, (2, 2), (6,)),
    S(_sheet, (2, 2), (-1, 1)),
    S(_sheet, (2, -2), (1, 1)),
    S(_sheet, (2, 2), (1, 1), -1),
]
row("as_strided as_strided_copy", STRIDED)
row(
    "as_strided_scatter",
    [
        S(_sheet, r(2, 2), (2, 2), (1, 2), 1),
        S(_sheet, r(2, 3), (2, 3), (12, 1)),
        S(_sheet, r(3), (3,), (7,), 2),
        S(_sheet.double(), r(4, 6, dtype=f64), (4, 6), (6, 1)),
        S(r(9, dtype=i64), r(2, dtype=i64), (2,), (4,), 3),
        S(_sheet, r(2, 2), (2, 3), (12, 1)),
        S(_sheet, r(2, 2), (2, 2), (24, 1)),
        no(_sheet, r(3, 3), (3, 3), (2, 1)),
    ],
)
_line = r(3, 7)
BY_FUNCTION[torch.Tensor.unfold] = [
    S(_line, 1, 3, 1, smooth=True),
    S(_line, 1, 2, 2, smooth=True),
    S(_line, 0, 2, 1, smooth=True),
    S(_line, -1, 2, 3, smooth=True),
    S(_line, 1, 4, 5),
    S(_line, 1, 7, 2),
    S(_line, 0, 1, 1),
    S(_line.t(), 0, 3, 2),
    S(r(2, 5, 3, dtype=i64), 1, 2, 2),
    S(r(0, 3), 1, 2, 1),
    S(r(6, dtype=bf16), 0, 2, 3),
    no(_line, 1, 0, 1),
    no(r(), 0, 1, 1),
    S(_line, 1, 8, 1),
    S(_line, 2, 1, 1),
    S(_line, 1, 2, 0),
    S(_line, 1, -1, 1),
]

_c = r(3, 12, 12)
COLUMNS = [
    S(_c, (5, 4), 2, 1, 0, 1, smooth=True),
    S(r(2, 12, 4), (5, 4), 2, 1, 0, 2, smooth=True),
    S(r(2, 18, 6), (5, 4), 3, 1, 1, 2, smooth=True),
    S(r(1, 6, 20), (5, 4), 1, 1, 0, 1),
    S(_c[0], (5, 4), 2, 1, 0, 1),
    S(_c[:0], (5, 4), 2, 1, 0, 1),
    S(_c.double(), (5, 4), 2, 1, 0, 1, smooth=True),
    S(_c.bfloat16(), (5, 4), 2, 1, 0, 1),
    S(_c.half(), (5, 4), 2, 1, 0, 1),
    S(r(12, 12, 2).permute(2, 1, 0), (5, 4), 2, 1, 0, 1),
    S(r(1, 4, 16), (4, 4), 2, 2, 1, 1),
    S(r(2, 12, 12, dtype=i64), (5, 4), 2, 1, 0, 1),
    no(r(2, 12, 12, dtype=b1), (5, 4), 2, 1, 0, 1),
    S(_c, (5, 5), 2, 1, 0, 1),
    S(_c[:, :11], (5, 4), 2, 1, 0, 1),
    S(_c, (5, 4), 2, 1, -1, 1),
    S(_c, (5, 4), 0, 1, 0, 1),
]
row("col2im", list(map(pairs, COLUMNS)), exact=False)
row(
    "fold",
    [
        S(_c, (5, 4), 2, smooth=True),
        S(r(2, 18, 6), (5, 4), 3, padding=1, stride=2, smooth=True),
        S(_c[0], (5, 4), 2),
        S(_c, 5, 2),
    ],
    exact=False,
)

# --- channels and pixels -----------------------------------------------------------------------

row(
    "pixel_shuffle",
    [
        S(r(2, 8, 3, 5), 2, smooth=True),
        S(r(9, 2, 3), 3, smooth=True),
        S(r(2, 1, 4, 3, 1), 2),
        S(r(2, 3, 5, 2), 1),
        S(r(2, 8, 3, 5).to(memory_format=LAST), 2),
        S(r(2, 8, 3, 5).transpose(2, 3), 2),
        no(r(0, 4, 3, 2), 2),
        S(r(1, 4, 3, 2, dtype=bf16), 2),
        S(r(1, 4, 3, 2, dtype=i64), 2),
        S(r(7, 3, 3), 2),
        S(r(4, 3), 2),
        S(r(4, 3, 3), 0),
    ],
)
row(
    "pixel_unshuffle",
    [
        S(r(2, 3, 4, 6), 2, smooth=True),
        S(r(1, 3, 6), 3, smooth=True),
        S(r(2, 3, 5, 2), 1),
        S(r(2, 2, 6, 4).to(memory_format=LAST), 2),
        no(r(0, 3, 4, 6), 2),
        S(r(1, 3, 2, 4, dtype=f16), 2),
        S(r(1, 3, 3), 2),
        S(r(4, 4), 2),
        S(r(4, 4, 4), 0),
    ],
)
row(
    "channel_shuffle",
    [
        S(r(2, 6, 3, 5), 2, smooth=True),
        S(r(2, 6, 3), 3, smooth=True),
        S(r(2, 6, 3, 5).to(memory_format=LAST), 3),
        S(r(2, 6, 3, 5).transpose(2, 3), 2),
        S(r(2, 3, 2, 2), 1),
        no(r(0, 4, 3, 2), 2),
        S(r(1, 4, 3, 2, dtype=bf16), 2),
        S(r(1, 4, 3, 2, dtype=i64), 2),
        S(r(1, 4, 3, 3), 3),
        S(r(1, 4), 2),
        S(r(1, 4, 3, 3), 0),
    ],
)

# --- pooling -----------------------------------------------------------------------------------


def unpooled(rank: int, *more: object) -> list[Sample]:
    """What torch's own function takes: (x, places, size)."""
    pool = getattr(F, f"max_pool{rank}d")
    size = (5, 4, 3)[:rank]

    def of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return pool(x, 2, return_indices=True)

    y, at = of(r(2, 3, *size))
    wide = (*(n + 1 for n in size[:-1]), size[-1])
    samples = [
        S(y, at, size, *more, smooth=True),
        S(y, at, wide, *more),
        S(y[0], at[0], size, *more),
        S(y[:0], at[:0], size, *more),
        S(y.double(), at, size, *more, smooth=True),
        S(y.bfloat16(), at, size, *more),
        S(y.transpose(0, 1), at.transpose(0, 1), size, *more),
        S(y, at[:1], size, *more),
        S(y, at.to(i32), size, *more),
        S(y.to(i64), at, size, *more),
        S(y, at + 100, size, *more),
        S(y, at, size[1:], *more),
    ]
    if rank == 2:
        samples.append(S(y.to(memory_format=LAST), at, size))
    return samples


row("max_unpool3d", unpooled(3, (2, 2, 2), (0, 0, 0)), exact=False)
row("max_unpool2d", unpooled(2), exact=False)


def put_back(rank: int) -> list[Sample]:
    """What F.max_unpool takes: (x, places, kernel_size, …)."""
    sides = (6, 4, 4)[:rank]
    y, at = getattr(F, f"max_pool{rank}d")(r(1, 3, *sides), 2, return_indices=True)
    return [
        S(y, at, 2, smooth=True),
        S(y, at, 2, 2, 0, (7, 5, 3)[:rank]),
        S(y, at, 2, 2, 0, (7, 4, 4)[:rank]),
        S(y, at, 2, output_size=(1, 3, *sides)),
        S(y, at, [2] * rank, [2] * rank),
        S(y, at, 2, output_size=(20, 20, 20)[:rank]),
        S(y, at, 2, output_size=(6,) * (rank + 1)),
    ]


for _rank in (1, 2, 3):
    BY_FUNCTION[getattr(F, f"max_unpool{_rank}d")] = put_back(_rank)
row("max_unpool1d", put_back(1), exact=False)


def lp(rank: int) -> list[Sample]:
    x = r(2, 3, *(5, 4, 3)[:rank], low=0.2)
    return [
        S(x, 2, 2, smooth=True),
        S(x, 3, 2, 1),
        S(x, 2.5, 2, smooth=True),
        S(x, 1, 2, ceil_mode=True),
        S(-x, 2, 3, 2, True),
        S(x, inf, 2),
        S(x, -inf, 2),
        S(x[0], 2, 2),
        S(x.double(), 2, 2),
        S(x.bfloat16(), 1, 2) if rank < 3 else S(x[:0], 2, 2),
        S(x, 2, 9),
    ]


for _rank in (1, 2, 3):
    row(f"lp_pool{_rank}d", lp(_rank), exact=False)
row(
    "local_response_norm",
    [
        S(r(2, 5, 4), 2, smooth=True),
        S(r(2, 5, 3, 2), 3, smooth=True),
        S(r(2, 3, 2, 1, 3), 2, 0.5, 0.6, 2.0),
        S(r(2, 5, 4), 5, alpha=0.1, beta=0.5, k=0.7),
        S(r(0, 5, 4), 2),
        S(r(2, 5, 4, dtype=f64), 2),
        S(r(2, 3, 3, 2).to(memory_format=LAST).contiguous(), 2),
        S(r(5, 4), 2),
    ],
    exact=False,
)

# --- grids -------------------------------------------------------------------------------------

_theta, _volume = r(2, 2, 3), r(2, 3, 4)
AFFINE = [
    S(_theta, (2, 1, 3, 4), False, smooth=True),
    S(_theta, (2, 1, 5, 3), True, smooth=True),
    S(_theta, (2, 4, 1, 2), False),
    S(_volume, (2, 1, 2, 3, 4), False, smooth=True),
    S(_volume, (2, 1, 2, 3, 3), True),
    S(r(2, 3, 2).transpose(1, 2), (2, 1, 3, 4), False),
    S(_theta.double(), [2, 1, 3, 4], False, smooth=True),
    S(_theta.bfloat16(), (2, 1, 3, 4), False),
    S(_theta.half(), (2, 1, 3, 4), True),
    S(_theta.half(), (2, 1, 1, 4), True),
    S(_theta, (3, 1, 3, 4), False),
    S(_volume, (2, 1, 3, 4), False),
]
row("affine_grid_generator", AFFINE, exact=False)
row(
    "affine_grid",
    [*AFFINE[:9], S(_theta, (2, 1, 3)), S(_theta[0], (2, 1, 3, 4)), S(_theta, (2, 1, 0, 4))],
    exact=False,
)


def sampled() -> list[tuple]:
    """(image, grid): places inside and outside, and on whole elements."""
    x, grid = r(2, 3, 4, 5), r(2, 3, 2, 2, low=-1.3, high=1.3)
    return [
        (x, grid),
        (r(2, 2, 3, 2, 4), r(2, 2, 1, 3, 3, low=-1.3, high=1.3)),
        (x, torch.stack([v(-1.0, -0.6, 0.0, 1.0), v(-1.0, 0.5, 1.0, 1.5)], -1).expand(2, 2, 4, 2)),
        (x, 3 * grid),
    ]


def sampling(*modes: object, corners: object) -> list[Sample]:
    found = [S(*pair, *modes, *corners) for pair in sampled()]
    if modes[0] in (2, "bicubic"):  # in float64: eager's places are too coarse for its slopes
        images = [s.args for s in found if s.args[0].ndim == 4]
        found = [S(x.double(), grid.double(), *more) for x, grid, *more in images]
    return found


_image, _grid = sampled()[0]
_odd = _image.clone()
_odd[0, 0, 1, 1], _odd[1, 0, 2, 2] = nan, inf
KINDS = [
    (_image[:0], _grid[:0]),
    (_image, _grid[:, :0]),
    (_image.double(), _grid.double()),
    (_image.half(), _grid.half()),
    (_image.bfloat16(), _grid.bfloat16()),
    (_image.to(memory_format=LAST), _grid),
    (_image.transpose(2, 3), _grid.transpose(1, 2)),
    (_odd, _grid),
    (_image, _grid[:1]),
    (_image, _grid.double()),
    (_image, _grid[..., :1]),
    (_image[0], _grid),
    (_image[:, :, :0], _grid),
    (_image.to(i64), _grid.to(i64)),
]
row(
    "grid_sampler",
    [
        *(
            s
            for mode in (0, 1, 2)
            for padding in (0, 1, 2)
            for corners in (False, True)
            for s in sampling(mode, padding, corners=(corners,))
        ),
        *(S(*pair, 0, 0, False) for pair in KINDS),
        S(*sampled()[1], 2, 0, False),
    ],
    exact=False,
)
row(
    "grid_sample",
    [
        *sampling("bilinear", "zeros", corners=(False,))[:2],
        *sampling("bicubic", "border", corners=(True,))[:1],
        *sampling("nearest", "reflection", corners=(False,))[:2],
        S(_image, _grid),
        S(_image, _grid, "cubic"),
        S(_image, _grid, "nearest", "mirror"),
    ],
    exact=False,
)
