"""Samples of interpolation; importing this adds them to the table."""

from __future__ import annotations

import torch

from support.function_samples import (
    S,
    Sample,
    bf16,
    f16,
    f64,
    i64,
    inf,
    nan,
    no,
    r,
    restart,
    row,
    u8,
)

restart()

LAST = torch.channels_last
SIDES = (5, 4, 3)


def image(rank: int, n: int = 1, **kind) -> torch.Tensor:
    """An image of two channels."""
    return r(n, 2, *SIDES[:rank], **kind)


def odd(rank: int) -> torch.Tensor:
    """An image with elements that are not finite."""
    x = image(rank)
    x[0, 0, 1:2], x[0, 1, 3:4], x[0, 1, :1] = nan, inf, -inf
    return x


def resized(rank: int) -> list[tuple[tuple | None, list | None]]:
    """(size, scale factors)"""
    return [
        ((10, 8, 6)[:rank], None),
        ((7, 9, 4)[:rank], None),
        ((3, 4, 2)[:rank], None),
        ((1,) * rank, None),
        (SIDES[:rank], None),
        (None, [2.0] * rank),
        (None, [2.3, 1.0, 1.4][:rank]),
        (None, [0.6, 1.7, 1.0][:rank]),
    ]


def layouts(rank: int) -> list[torch.Tensor]:
    """Images of other dtypes and in other orders."""
    wide = r(2, 2, *(2 * n for n in SIDES[:rank])) if rank < 3 else r(1, 2, 10, 8, 6)
    steps = (slice(None), slice(None), *(slice(None, None, 2),) * rank)
    found = [
        image(rank, n=0),
        image(rank, dtype=f64),
        image(rank, dtype=bf16),
        image(rank, dtype=f16),
        wide[steps],
        r(*SIDES[:rank], 2, 1).permute(*reversed(range(rank + 2))),
        odd(rank),
    ]
    if rank == 2:
        found += [image(2, n=2).to(memory_format=LAST), r(1, 1, 5, 4).to(memory_format=LAST)]
    if rank == 3:
        found += [image(3).to(memory_format=torch.channels_last_3d)]
    return found


def nearest(rank: int) -> list[Sample]:
    x, size = image(rank), (7, 9, 4)[:rank]
    return [
        *(S(x, *to, smooth=True) for to in resized(rank)),
        *(S(y, size) for y in layouts(rank)),
        *(S(y, None, [2.0] * rank) for y in layouts(rank)),
        S(image(rank, dtype=u8), size),
        S(image(rank, dtype=u8), None, [2.0] * rank),
        S(image(rank, dtype=i64), size),
        S(x, size, *(1.3, 2.1, 0.7)[:rank]),
        S(x, size, *(None,) * rank),
        S(x, (0,) * rank),
        S(x, size[1:]),
        S(x[0], size),
        S(x[:, :0], size),
        S(x, None, [0.1] * rank),
    ]


def smooth(rank: int) -> list[Sample]:
    x, size = image(rank), (7, 9, 4)[:rank]
    listed = [(*to[:1], corners, *to[1:]) for to in resized(rank) for corners in (False, True)]
    found = [
        *(S(x, *to, smooth=True) for to in listed),
        *(S(y, size, False) for y in layouts(rank)),
        S(image(rank, n=2), size, True),
        S(x, size, False, *(1.3, 2.0, 0.7)[:rank]),
        S(image(rank, dtype=i64), size, False),
        S(x, (0,) * rank, False),
        S(x, size[1:], True),
        S(x[0], size, False),
    ]
    if rank == 2:
        found.append(no(image(rank, dtype=u8), size, False))
        found.append(S(r(1, 1, 16, 13), (3, 2), False))
    return found


for _rank in (1, 2, 3):
    row(f"upsample_nearest{_rank}d", nearest(_rank), exact=False)
    row(f"_upsample_nearest_exact{_rank}d", nearest(_rank), exact=False)
row("upsample_linear1d", smooth(1), exact=False)
row("upsample_bilinear2d", smooth(2), exact=False)
row("upsample_trilinear3d", smooth(3), exact=False)
row("upsample_bicubic2d", smooth(2), exact=False)
row("_upsample_bilinear2d_aa", smooth(2), exact=False)
row("_upsample_bicubic2d_aa", smooth(2), exact=False)

_x = image(2)
row(
    "interpolate",
    [
        S(_x, scale_factor=2, mode="bilinear", align_corners=False, smooth=True),
        S(_x, 7),
        S(_x, (3, 8), smooth=True),
        S(_x, scale_factor=(2, 1.5), mode="nearest-exact"),
        S(_x, scale_factor=1.5, mode="bicubic", smooth=True),
        S(_x, None, 1.7, "bilinear", True),
        S(_x, None, 1.7, "bilinear", True, True),
        S(_x, scale_factor=0.6, mode="bilinear", antialias=True, smooth=True),
        S(_x, size=[2, 3], mode="bicubic", antialias=True),
        S(_x, scale_factor=2, mode="area", smooth=True),
        S(_x, (2, 3), mode="area", smooth=True),
        S(image(1), 8, mode="linear", smooth=True),
        S(image(1), 3, mode="area"),
        S(image(3), scale_factor=1.4, mode="trilinear", smooth=True),
        S(image(3), (3, 2, 3), mode="area"),
        S(image(2, n=0), 7),
        S(image(2, dtype=bf16), scale_factor=2.0, recompute_scale_factor=True),
        S(_x),
        S(_x, 7, 2.0),
        S(_x, (7, 8, 9)),
        S(_x, 7, align_corners=True),
        S(_x, 7, mode="linear"),
        S(_x, 7, mode="cubic"),
        S(image(1), 7, mode="bicubic"),
        S(image(3), 7, mode="bilinear", antialias=True),
        S(_x, 7, recompute_scale_factor=True),
        S(_x[0, 0], 7),
        S(image(2, dtype=i64), 7, mode="bilinear"),
        no(_x, (3, 2), mode="lanczos", antialias=True),
        no(_x, (3, 1), mode="bilinear", antialias=True),  # eager reads other rows
        no(_x, (3, 1), mode="bicubic", antialias=True),
        S(_x, (1, 3), mode="bilinear", antialias=True, smooth=True),
        S(_x[..., :1, :], (1, 1), mode="bilinear", antialias=True),
        S(
            image(2).contiguous(memory_format=torch.channels_last),
            (3, 1),
            mode="bicubic",
            antialias=True,
        ),
    ],
    exact=False,
)
