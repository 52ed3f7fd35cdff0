"""Tile sizes and splits of the matmul kernel: a table of choices measured by ahead-of-time
compilation, of which a model takes one.

Plain Python without Triton, so that a scheduler can plan where Triton cannot be imported.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from tracejit.kernels.costs import SMS, Product, Tile, cdiv, cheapest

from tracejit.gpus import GPUS

FEW_ELEMENTS = 64
HEADER_BYTES = 16  # a workspace starts with the counter of full reductions


@functools.lru_cache(4096)
def tiles(
    M: int,
    N: int,
    K: int,
    dtype: str,
    precision: str = "ieee",
    epilogue_weight: int = 0,
    windows: str = "",
    batch: int = 1,
    sms: int = SMS,
    long: bool = False,
) -> Mapping[str, int]:
    """Keyword arguments of a matmul launch: tile sizes, GROUP_M, SPLITS and GROUP, PIECES,
    num_warps, num_stages.

    `dtype` is the operands' (IR names: f32, f64, bf16, f16, i32, …), `precision` the
    input_precision of fp32 operands, `epilogue_weight` the number of tensors that the
    epilogue reads (each costs registers), `windows` whether an operand is read at quotients and
    remainders of its axes, as a convolution's is, so that its addresses take registers too: "last"
    where what a tile reads lies side by side, "apart" where it does not, "" for other products.
    A `long` epilogue, one of much arithmetic, takes as long in smaller tiles, and its text for each
    element of a thread is what takes long to compile: FEW_ELEMENTS at most then.
    Of the tiles that these allow, and of the splits of K, the fastest by `costs.py` win on a GPU
    of so many SMs.
    """
    family = _family(dtype, precision)
    candidates = _CANDIDATES.get(family, _SUM)
    of_windows = _OF_WINDOWS.get(windows, {})
    candidates = of_windows.get(family, candidates)
    allowed = [c for c in candidates if epilogue_weight <= c.weight]
    if long:
        allowed = [c for c in allowed if c.m * c.n <= FEW_ELEMENTS * 32 * c.warps and c.pieces == 1]
    allowed = allowed or candidates[-1:]
    depth = max(16, _power_of_two(K))
    allowed = [c._replace(k=min(c.k, depth)) for c in allowed]
    product = replace(_product(M, N, K, dtype, precision, batch), windows=bool(windows))
    found = [(cheapest(product, c, sms), c) for c in allowed]
    (_, split), tile = min(found, key=lambda f: (f[0][0], f[1].m * f[1].n))
    return MappingProxyType(
        {
            "BLOCK_M": tile.m,
            "BLOCK_N": tile.n,
            "BLOCK_K": tile.k,
            "GROUP_M": 8,
            "SPLITS": split.splits,
            "GROUP": split.group,
            "PIECES": tile.pieces,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }
    )


def workspace(
    choice: Mapping[str, int], tiles: int, itemsize: int, before: int = HEADER_BYTES
) -> dict[str, int]:
    """Where counters and partial tiles of a product lie in its workspace, behind the first bytes,
    and where they end: COUNTERS, PARTIALS, END."""
    groups = cdiv(choice["SPLITS"], choice["GROUP"])
    counters = cdiv(before, 16) * 16
    partials = counters + cdiv(4 * (groups + 1) * tiles, 16) * 16
    size = choice["SPLITS"] * choice["BLOCK_M"] * choice["BLOCK_N"] * itemsize
    return {"COUNTERS": counters, "PARTIALS": partials, "END": partials + tiles * size}


def _product(M: int, N: int, K: int, dtype: str, precision: str, batch: int) -> Product:
    """The product as `costs.py` wants it."""
    gpu = GPUS["H200"]
    peaks = {"half": gpu.half, "tf32": gpu.tf32, "tf32x3": gpu.tf32 / 3, "ieee": gpu.fp32}
    tensor = dot_path(dtype) == "tensor"
    size = {"b1": 1, "bf16": 2}.get(dtype) or int(dtype[1:]) // 8
    total = 4 if tensor else 8
    family = _family(dtype, precision)
    peak = peaks.get(family, gpu.fp64 / 4)
    return Product(batch, M, N, K, size, total, peak, tensor and family != "ieee", tensor)


def attention_tiles(
    M: int, N: int, C: int, D: int, dtype: str, precision: str, forward: bool, noisy: bool
) -> dict[str, int]:
    """Keyword arguments of a launch of attention: M queries and N keys of width C, values of D."""
    c, d = (max(16, _power_of_two(n)) for n in (C, D))
    family = "sum" if dot_path(dtype) == "sum" else _family(dtype, precision)
    fitting = _ATTENTION[family][forward]
    if noisy and not forward:
        fitting = _NOISY_GRADIENTS.get(family, fitting)
    wide, least = max(c, d), 16 if dot_path(dtype) == "tensor" else 1
    block_m, block_n, warps, stages = next((t for w, *t in fitting if wide <= w), fitting[-1][1:])
    return {
        "BLOCK_M": min(block_m, max(least, _power_of_two(M))),
        "BLOCK_N": min(block_n, max(least, _power_of_two(N))),
        "BLOCK_C": c,
        "BLOCK_D": d,
        "num_warps": warps,
        "num_stages": stages,
    }


def dot_path(dtype: str) -> str:
    """The matmul kernel's DOT argument: "tensor" where tl.dot has the dtype, else "sum"."""
    return "tensor" if dtype in ("f32", "bf16", "f16") else "sum"


# Per family, from the largest tile to the smallest:
# BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages, largest epilogue weight without spills, pieces.
_CANDIDATES = {
    "half": (
        Tile(128, 256, 64, 8, 3, 0),
        Tile(128, 256, 64, 8, 3, 2, 4),
        Tile(128, 192, 64, 8, 4, 1),
        Tile(128, 192, 64, 8, 4, 2, 2),
        Tile(128, 192, 64, 8, 4, 3, 4),
        Tile(128, 128, 64, 4, 4, 1),
        Tile(128, 128, 64, 8, 3, 2),
        Tile(128, 128, 64, 8, 3, 4, 4),
        Tile(64, 64, 64, 4, 4, 8),
        Tile(32, 32, 64, 4, 4, 8),
    ),
    "tf32": (
        Tile(128, 128, 32, 8, 3, 2),
        Tile(64, 64, 32, 4, 3, 8),
        Tile(32, 32, 32, 4, 3, 8),
    ),
    "tf32x3": (
        Tile(128, 128, 32, 8, 3, 0),
        Tile(64, 64, 32, 4, 3, 8),
        Tile(32, 32, 32, 4, 3, 8),
    ),
    "ieee": (
        Tile(128, 128, 16, 8, 4, 1),  # BLOCK_K of 32 takes twice as long to compile
        Tile(128, 128, 16, 8, 4, 3, 4),
        Tile(64, 64, 16, 4, 4, 8),  # BLOCK_K of 32 spills on sm_100
        Tile(32, 32, 32, 4, 3, 8),
        Tile(32, 32, 32, 4, 5, 8),
    ),
}
# The same where an operand is read through windows.
_OF_WINDOWS = {
    "apart": {
        "half": (
            Tile(128, 128, 32, 8, 3, 1),
            Tile(64, 64, 32, 4, 4, 8),
            Tile(32, 32, 64, 4, 4, 8),
        ),
        "ieee": (
            Tile(64, 64, 16, 8, 3, 8),
            Tile(32, 32, 16, 4, 3, 8),
        ),
    },
    "last": {
        "half": (
            Tile(128, 128, 64, 8, 3, 1),
            Tile(64, 128, 64, 4, 4, 1),
            Tile(64, 64, 64, 4, 4, 8),
            Tile(32, 32, 64, 4, 4, 8),
        ),
        "tf32": (
            Tile(128, 128, 32, 8, 3, 1),
            Tile(64, 128, 32, 8, 3, 1),
            Tile(64, 64, 32, 4, 3, 8),
            Tile(32, 32, 32, 4, 3, 8),
        ),
        "ieee": (
            Tile(64, 64, 16, 8, 3, 8),
            Tile(32, 32, 16, 4, 3, 8),
        ),
    },
}
# Of attention, for gradients and for the forward pass, by the widest C or D:
# (it, BLOCK_M, BLOCK_N, num_warps, num_stages).
_ATTENTION = {
    "half": (
        ((64, 64, 32, 4, 3), (128, 64, 64, 8, 2), (256, 32, 32, 8, 1)),
        ((64, 128, 64, 8, 3), (128, 128, 64, 8, 2), (256, 64, 32, 8, 2)),
    ),
    "tf32": (
        ((64, 32, 32, 4, 2), (128, 32, 32, 8, 1), (256, 16, 16, 8, 1)),
        ((64, 64, 32, 4, 2), (128, 32, 32, 4, 2), (256, 32, 16, 8, 1)),
    ),
    "tf32x3": (
        ((64, 32, 32, 4, 2), (128, 32, 32, 8, 1), (256, 16, 16, 8, 1)),
        ((64, 32, 32, 4, 2), (128, 32, 32, 8, 2), (256, 32, 16, 8, 1)),
    ),
    "ieee": (  # gradients of more than 64 spill
        ((64, 32, 32, 8, 2), (256, 16, 16, 8, 1)),
        ((64, 64, 32, 8, 2), (128, 32, 32, 8, 2), (256, 32, 16, 8, 1)),
    ),
    "sum": (
        ((64, 8, 8, 8, 1), (256, 4, 4, 8, 1)),
        ((64, 8, 8, 4, 1), (256, 4, 4, 8, 1)),
    ),
}
# Of gradients of attention with dropout, whose numbers take registers too.
_NOISY_GRADIENTS = {"half": ((64, 64, 64, 8, 1), (128, 64, 64, 8, 1), (256, 32, 32, 8, 1))}
_SUM = (Tile(16, 16, 16, 4, 2, 8),)


def _family(dtype: str, precision: str) -> str:
    """The row of _CANDIDATES for a dtype and precision."""
    if dtype in ("bf16", "f16"):
        return "half"
    return precision if dtype == "f32" else "sum"


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
