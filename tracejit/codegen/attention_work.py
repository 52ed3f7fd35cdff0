"""What a launch of attention issues: which of its functions are called for which blocks.

Forward, each block of queries goes over the blocks of keys that it sees. Of gradients, each block
of keys goes over the blocks of queries that see it, and each block of queries over the keys again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tracejit.codegen.triton_attention import GRADIENTS, Attention
from tracejit.ir.ops import OPS
from tracejit.ir.types import DType
from tracejit.records import dataclass

Pair = tuple[int, int]  # of a block of queries, and a block of keys

PER_SCORE = 4  # operations between the products, besides the exponential
APPROXIMATE = 10  # of an exponential of half types: 8 lanes share a unit; and a multiplication


def per_score(dtype: DType) -> int:
    """Operations between the products, for each score."""
    return PER_SCORE + (APPROXIMATE if dtype.narrow else OPS["exp"].cost)


@dataclass(frozen=True)
class Walk:
    """The calls of a launch, for one batch.

    calls: for each function, the pairs of blocks that it is called for; where it goes over queries
        only, or over keys, the other number is 0.
    programs, trips: of one batch, and of the longest program.
    """

    calls: Mapping[str, list[Pair]]
    programs: int
    trips: int
    products: int
    scores: int  # pairs whose scores are computed


def walk(a: Attention, m: int, n: int, constants: Mapping[str, int]) -> Walk:
    """The calls for m queries and n keys."""
    block_m, block_n, c, d = (constants[f"BLOCK_{x}"] for x in "MNCD")
    queries, keys = range(-(-m // block_m)), range(-(-n // block_n))
    results = {op.name for op, _ in a.attend.results}

    def keys_of(i: int) -> Iterable[int]:
        end = min(n, (i + 1) * block_m) if a.attend.causal else n
        return range(-(-end // block_n))

    def queries_of(j: int) -> Iterable[int]:
        return range(j * block_n // block_m if a.attend.causal else 0, len(queries))

    seen = [(i, j) for i in queries for j in keys_of(i)]
    of_queries, of_keys = [(i, 0) for i in queries], [(0, j) for j in keys]
    trips = max((len(keys_of(i)) for i in queries), default=0)
    tile = 2 * block_m * block_n
    calls: dict[str, list[Pair]] = {f"store_{name}": [] for name in results}
    if a.attend.is_forward:
        calls |= {"load_q": of_queries, "load_k": seen, "load_v": seen, "score": seen}
        calls |= {f"store_{name}": of_queries for name in results}
        if "attention" not in results:
            calls["load_v"] = []
        calls["load_noise"] = calls["load_v"]
        products = tile * len(seen) * (c + d * ("attention" in results))
        return Walk(calls, len(queries), trips, products, len(seen))
    calls = {name: [] for name in ("load_q", "load_k", "load_v", "load_g", "load_lse")}
    calls |= {"load_delta": [], "score": [], "load_noise": []}
    programs = products = longest = scores = 0
    dq, dk, dv = (name in results for name in GRADIENTS)
    if dk or dv:
        met = [(i, j) for j in keys for i in queries_of(j)]
        for name in ("load_q", "load_lse", "load_g", "score", "load_noise"):
            calls[name] += met
        calls["load_k"] += of_keys
        calls["load_v"] += of_keys * dk
        calls["load_delta"] += met * dk
        calls |= {f"store_{name}": of_keys for name in GRADIENTS[1:] if name in results}
        programs, longest = len(keys), max((len(queries_of(j)) for j in keys), default=0)
        products, scores = tile * len(met) * (c + d * dv + (c + d) * dk), len(met)
    if dq:
        for name in ("load_q", "load_lse", "load_delta", "load_g"):
            calls[name] += of_queries
        for name in ("load_k", "load_v", "score", "load_noise"):
            calls[name] += seen
        calls["store_attention_dq"] = of_queries
        programs, longest = programs + len(queries), max(longest, trips)
        products, scores = products + tile * len(seen) * (2 * c + d), scores + len(seen)
    return Walk(calls, programs, longest, products, scores)
