"""Tile sizes of the matmul kernel: a table of choices measured by ahead-of-time compilation.

Plain Python without Triton, so that a scheduler can plan where Triton cannot be imported.
"""

from __future__ import annotations

FEW_TILES = 128  # below this many tiles a GPU of 132 SMs stands mostly idle


def tiles(
    M: int,
    N: int,
    K: int,
    dtype: str,
    precision: str = "ieee",
    epilogue_weight: int = 0,
    windows: str = "",
    batch: int = 1,
) -> dict[str, int]:
    """Keyword arguments of a matmul launch: tile sizes, GROUP_M, num_warps, num_stages.

    `dtype` is the operands' (IR names: f32, f64, bf16, f16, i32, …), `precision` the
    input_precision of fp32 operands, `epilogue_weight` the number of [M, N] tensors that the
    epilogue reads (each costs registers), `windows` whether an operand is read at quotients and
    remainders of its axes, as a convolution's is, so that its addresses take registers too: "last"
    where what a tile reads lies side by side, "apart" where it does not, "" for other products. The
    largest tile that still gives FEW_TILES programs wins; else the smallest. Of windows `batch`
    products count.
    """
    family = _family(dtype, precision)
    candidates = _CANDIDATES.get(family, _SUM)
    of_windows = _OF_WINDOWS.get(windows, {})
    candidates = of_windows.get(family, candidates)
    count = batch if windows else 1
    allowed = [c for c in candidates if epilogue_weight <= c[5]] or candidates[-1:]
    fitting = [c for c in allowed if count * -(-M // c[0]) * -(-N // c[1]) >= FEW_TILES]
    block_m, block_n, block_k, warps, stages, _ = fitting[0] if fitting else allowed[-1]
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": min(block_k, max(16, _power_of_two(K))),
        "GROUP_M": 8,
        "num_warps": warps,
        "num_stages": stages,
    }


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
# (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages, largest epilogue weight without spills).
_CANDIDATES = {
    "half": (
        (128, 256, 64, 8, 3, 1),
        (128, 128, 64, 4, 4, 1),
        (128, 128, 64, 8, 3, 2),
        (64, 64, 64, 4, 4, 8),
        (32, 32, 64, 4, 4, 8),
    ),
    "tf32": (
        (128, 128, 32, 8, 3, 2),
        (64, 64, 32, 4, 3, 8),
        (32, 32, 32, 4, 3, 8),
    ),
    "tf32x3": (
        (128, 128, 32, 8, 3, 0),
        (64, 64, 32, 4, 3, 8),
        (32, 32, 32, 4, 3, 8),
    ),
    "ieee": (
        (128, 128, 32, 8, 3, 1),
        (64, 64, 16, 4, 4, 8),  # BLOCK_K of 32 spills on sm_100
        (32, 32, 32, 4, 3, 8),
    ),
}
# The same where an operand is read through windows.
_OF_WINDOWS = {
    "apart": {
        "half": (
            (128, 128, 32, 8, 3, 1),
            (64, 64, 32, 4, 4, 8),
            (32, 32, 64, 4, 4, 8),
        ),
        "ieee": (
            (64, 64, 16, 8, 3, 8),
            (32, 32, 16, 4, 3, 8),
        ),
    },
    "last": {
        "half": (
            (128, 128, 64, 8, 3, 1),
            (64, 128, 64, 4, 4, 1),
            (64, 64, 64, 4, 4, 8),
            (32, 32, 64, 4, 4, 8),
        ),
        "tf32": (
            (128, 128, 32, 8, 3, 1),
            (64, 128, 32, 8, 3, 1),
            (64, 64, 32, 4, 3, 8),
            (32, 32, 32, 4, 3, 8),
        ),
        "ieee": (
            (64, 64, 16, 8, 3, 8),
            (32, 32, 16, 4, 3, 8),
        ),
    },
}
# Of attention, for gradients and for the forward pass, by the widest C or D:
# (it, BLOCK_M, BLOCK_N, num_warps, num_stages).
_ATTENTION = {
    "half": (
        ((64, 64, 64, 4, 1), (128, 64, 64, 8, 2), (256, 32, 32, 8, 1)),
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
_SUM = ((16, 16, 16, 4, 2, 8),)


def _family(dtype: str, precision: str) -> str:
    """The row of _CANDIDATES for a dtype and precision."""
    if dtype in ("bf16", "f16"):
        return "half"
    return precision if dtype == "f32" else "sum"


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
