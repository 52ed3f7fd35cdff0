"""Samples of convolution and pooling of images; importing this adds them to the table."""

from __future__ import annotations

import torch

from support.function_samples import (
    BY_FUNCTION,
    ROWS,
    S,
    Sample,
    bf16,
    f16,
    f64,
    i64,
    inf,
    nan,
    r,
    restart,
    row,
)

restart()

functional = torch.nn.functional
LAST = torch.channels_last


def images(rank: int, *, n: int = 2, channels: int = 3, **kind) -> torch.Tensor:
    """A batch of small images with odd sides."""
    return r(n, channels, *(7, 5, 4)[:rank] if rank < 3 else (3, 5, 4), **kind)


def w(*shape: int, **kind) -> torch.Tensor:
    """Weights: with larger ones rounding shows in the sums."""
    return r(*shape, low=-0.6, high=0.7, **kind)


def convolutions(rank: int) -> list[Sample]:
    three, two, one = (3,) * rank, (2,) * rank, (1,) * rank
    x, k = images(rank), w(4, 3, *three[:2], *two[2:])
    bias = r(4)
    samples = [
        S(x, k, smooth=True),
        S(x, k, bias, smooth=True),
        S(images(rank, dtype=f64), w(4, 3, *two, dtype=f64), r(4, dtype=f64), 2, 1, smooth=True),
        S(x, k, bias, padding=1),
        S(x, k, bias, 2, 1),
        S(x, k, stride=three, padding=one, smooth=True),
        S(x, k, padding="same"),
        S(x, k, bias, padding="valid"),
        S(x, w(4, 3, *two), padding="same"),
        S(x, w(4, 3, *two), dilation=2, padding=1, smooth=True),
        S(x, w(4, 3, *two), bias, [2], [1], [2]),
        S(x, w(5, 3, *one), smooth=True),
        S(x, w(5, 3, *one), stride=2),
        S(x, w(5, 3, *two), r(5), 2, smooth=True),
        S(x, w(5, 3, *two), stride=3, padding=1),
        S(x, w(1, 3, *two), r(1)),
        S(x, w(6, 1, *two), groups=3, smooth=True),
        S(x, w(3, 1, *two), r(3), groups=3, padding=1, stride=2, smooth=True),
        S(images(rank, channels=4), w(6, 2, *two), r(6), groups=2, padding=1, smooth=True),
        S(x[0], k, bias, padding=1),
        S(images(rank, n=0), k, bias),
        S(r(*x.shape[::-1]).permute(*reversed(range(rank + 2))), k, bias, smooth=True),
        S(x[:, :, 1:], k, padding=1),
        S(x, w(3, 4, *two).transpose(0, 1)),
        *(S(x.to(d), k.to(d), bias.to(d), padding=1) for d in (bf16, f16)),
        # what eager refuses
        S(x, w(4, 2, *two)),
        S(x, w(5, 1, *two), groups=3),
        S(x, k, r(3)),
        S(x, k.double()),
        S(x, w(4, 3, *(9,) * rank)),
        S(x, k, stride=0),
        S(x, k, padding=-1),
        S(x, k, dilation=0),
        S(x, k, stride=2, padding="same"),
        S(x, k, padding="full"),
        S(x, k, None, (1,) * (rank + 1)),
        S(x[0, 0], k),
        S(x, k[0]),
    ]
    if rank == 2:
        samples += [
            S(x.to(memory_format=LAST), k, bias, padding=1, smooth=True),
            S(x, k.to(memory_format=LAST), bias, 2),
            S(x[:1].to(memory_format=LAST), k),
            S(x, w(4, 3, 3, 2), bias, (2, 1), (1, 0), (1, 2)),
            S(images(2, channels=1), w(4, 1, 3, 3), padding=1),
        ]
    if rank == 3:
        samples.append(S(x.to(memory_format=torch.channels_last_3d), k, bias))
    return samples


def transposed(rank: int) -> list[Sample]:
    two, one = (2,) * rank, (1,) * rank
    x = r(2, 3, *(4, 3, 2)[:rank])
    k, bias = w(3, 4, *two), r(4)
    wide = w(3, 4, *(3, 2, 2)[:rank])
    return [
        S(x, k, smooth=True),
        S(x, wide, bias, smooth=True),
        S(x.double(), wide.double(), bias.double(), 2, 1, 1, smooth=True),
        S(x, k, bias, 2, smooth=True),
        S(x, k, bias, 3, 0, 2),
        S(x, wide, bias, 2, 1),
        S(x, wide, stride=2, padding=1, output_padding=1, dilation=2, smooth=True),
        S(x, w(3, 4, *one), bias),
        S(x, w(3, 1, *two), groups=3, stride=2),
        S(r(2, 4, *x.shape[2:]), w(4, 3, *two), groups=2, padding=1, smooth=True),
        S(x[0], k, bias),
        S(r(0, *x.shape[1:]), k, bias),
        S(x.transpose(0, 1)[:, :, ::2], w(2, 4, *two)),
        *(S(x.to(d), k.to(d), bias.to(d), stride=2) for d in (bf16, f16)),
        S(x, w(2, 4, *two)),
        S(x, k, r(3)),
        S(x, k, stride=2, output_padding=2),
        S(x, k, padding=9),
        S(x, w(3, 4, *two), groups=2),
    ]


for _rank in (1, 2, 3):
    row(f"conv{_rank}d", convolutions(_rank), exact=False)
    row(f"conv_transpose{_rank}d", transposed(_rank), exact=False)

_x, _k, _b = images(2), w(4, 3, 3, 2), r(4)
_ones, _none = [1, 1], [0, 0]
row(
    "convolution",
    [
        S(_x, _k, _b, [2, 1], [1, 0], [1, 2], False, _none, 1, smooth=True),
        S(_x, _k, None, [1], [1], [1], False, [7], 1),
        S(_x, _k, _b, [1], [1], [1], False, [0, 2], 1),
        S(_x, _k, _b, [1], [1], [1], False, [0, -1], 1),
        S(_x, _k, _b, [1], [1], [1], False, [0, 0, 0], 1),
        S(_x, w(6, 1, 2, 2), r(6), _ones, _none, _ones, False, _none, 3),
        S(_x, w(3, 4, 2, 3), _b, [2, 3], [1, 0], _ones, True, [1, 2], 1, smooth=True),
        S(images(1), w(4, 3, 3), _b, (2,), (1,), (1,), False, (0,), 1),
        S(images(3), w(3, 2, 2, 2, 2), None, [1], [0], [1], True, [0], 1),
        S(_x.to(memory_format=LAST), _k, _b, _ones, _ones, _ones, False, _none, 1),
        # what eager refuses
        S(_x[0], _k, _b, _ones, _none, _ones, False, _none, 1),
        S(_x, _k, _b, 1, _none, _ones, False, _none, 1),
        S(_x, _k, _b, _ones, [-1, 0], _ones, False, _none, 1),
        S(_x.double(), _k, _b, _ones, _none, _ones, False, _none, 1),
    ],
    exact=False,
)
_x, _k, _b = r(7, 2, 3), w(3, 3, 5), r(5)
row(
    "conv_tbc",
    [
        S(_x, _k, _b, smooth=True),
        S(_x, _k, _b, 1, smooth=True),
        S(_x.double(), _k.double(), _b.double(), pad=2, smooth=True),
        S(_x, _k, _b, -1),
        S(r(2, 7, 3).transpose(0, 1)[1:6], w(1, 3, 5), _b, 1),
        *(S(_x.to(d), _k.to(d), _b.to(d), 1) for d in (bf16, f16)),
        # what eager refuses
        S(_x[:1], _k, _b),
        S(_x[..., :2], _k, _b),
        S(_x, _k, _b[:3]),
        S(_x[0], _k, _b),
        S(_x.double(), _k, _b),
    ],
    exact=False,
)

# --- pooling -----------------------------------------------------------------------------------


def tied(rank: int) -> torch.Tensor:
    """Images with equal elements, NaN and infinities."""
    x = images(rank).mul(2).round()
    x[0, 0, 1:4] = nan
    x[1, 1] = -inf
    x[1, 2, 2] = inf
    return x


def max_pools(rank: int) -> list[Sample]:
    x = images(rank)
    ties = images(rank).round()
    samples = [
        S(x, 2, smooth=True),
        S(ties, 2),
        S(tied(rank), 2),
        S(x, 3, 2, 1, smooth=True),
        S(ties, 3, 2, 1),
        S(tied(rank), 3, 1, 1),
        S(ties, 2, 3, ceil_mode=True),
        S(ties, 3, 2, 1, 1, True),
        S(x, 2, 1, dilation=2),
        S(ties, (3, 2, 2)[:rank], (2, 1, 1)[:rank], dilation=(1, 2, 1)[:rank]),
        S(x, [2], []),
        S(x[0], 2),
        S(images(rank, n=0), 2),
        S(images(rank, dtype=f64), 2, padding=1, smooth=True),
        S(images(rank, dtype=bf16), 3, 2),
        S(images(rank, dtype=f16), 2),
        S(r(*x.shape[::-1]).permute(*reversed(range(rank + 2))), 2),
        S(x[:, :, ::2], 2),
        S(x, 2, padding=2),
        S(x, 0),
        S(x, 2, 0),
        S(x, 9),
        S(x[0, 0], 2),
    ]
    if rank == 2:
        samples += [S(x.to(memory_format=LAST), 2), S(x.to(memory_format=LAST), 3, 2, 1)]
        samples += [S(images(2, dtype=i64), 2), S(x, (1, 2, 3))]
    return samples


def avg_pools(rank: int) -> list[Sample]:
    x = images(rank)
    samples = [
        S(x, 2, smooth=True),
        S(x, 3, 2, 1, smooth=True),
        S(x, 3, 2, 1, False, False, smooth=True),
        S(x, 2, 3, ceil_mode=True),
        S(x, 3, 2, 1, True),
        S(x, 3, 2, 1, True, False, smooth=True),
        S(x, (3, 2, 2)[:rank], (2, 1, 1)[:rank]),
        S(x[0], 2),
        S(images(rank, n=0), 2),
        S(images(rank, dtype=f64), 2, 1, 1, smooth=True),
        S(x[:, :, ::2], 2),
        S(x, 2, padding=2),
        S(x, 9),
    ]
    if rank < 3:
        samples += [S(images(rank, dtype=bf16), 3, 2, 1), S(images(rank, dtype=f16), 2)]
    if rank > 1:
        samples += [S(x, 2, divisor_override=3, smooth=True), S(x, 2, divisor_override=0)]
    if rank == 2:
        samples.append(S(x.to(memory_format=LAST), 2))
    return samples


def adaptive(rank: int) -> list[Sample]:
    x = images(rank)
    samples = [
        S(x, 1, smooth=True),
        S(x, 2, smooth=True),
        S(x, 3),
        S(x, x.shape[2:]),
        S(images(rank).round(), (3, 2, 2)[:rank]),
        S(x[0], 2),
        S(images(rank, n=0), 2),
        S(images(rank, dtype=f64), 3, smooth=True),
        S(images(rank, dtype=bf16), 3),
        S(r(*x.shape[:2], *(6, 4, 8)[:rank]), 2),
        S(r(*x.shape[:2], *(6, 4, 8)[:rank]).round(), 2),
        S(x[0, 0], 2),
        S(x, -1),
    ]
    if rank == 2:
        samples.append(S(x.to(memory_format=LAST), (3, 2)))
    return samples


def both(samples: list[Sample]) -> list[Sample]:
    """A few of the samples with the places asked for."""
    return [Sample(s.args, {**s.kwargs, "return_indices": True}) for s in samples[1:8]]


for _rank in (1, 2, 3):
    row(f"max_pool{_rank}d max_pool{_rank}d_with_indices", max_pools(_rank), exact=False)
    row(f"avg_pool{_rank}d", avg_pools(_rank), exact=False)
    row(f"adaptive_avg_pool{_rank}d", adaptive(_rank), exact=False)
    _name = f"adaptive_max_pool{_rank}d"
    row(f"{_name} {_name}_with_indices", adaptive(_rank), exact=False)
    for _either in (_name, f"max_pool{_rank}d"):
        BY_FUNCTION[getattr(functional, _either)] = ROWS[_either] + both(ROWS[_either])
BY_FUNCTION[functional.adaptive_avg_pool2d] = [
    *ROWS["adaptive_avg_pool2d"],
    S(images(2), (None, 2)),
    S(images(2), (1, 2, 3)),
]
