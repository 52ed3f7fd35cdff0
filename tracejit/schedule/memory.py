"""Memory planning: arena offsets by liveness.

In: for each arena buffer its size and the first and last launch that touch it. Out: offsets such
that buffers alive at one time do not overlap, and the arena's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 128  # bytes; a cache line, and enough for every vector load


@dataclass(frozen=True, slots=True)
class Lifetime:
    """A buffer of `nbytes` used by launches first … last (inclusive)."""

    nbytes: int
    first: int
    last: int


def plan_arena(lifetimes: Sequence[Lifetime]) -> tuple[list[int], int]:
    """Offsets (first fit, largest buffers first) and the total size in bytes."""
    offsets = [0] * len(lifetimes)
    placed: list[int] = []
    total = 0
    order = sorted(range(len(lifetimes)), key=lambda i: (-lifetimes[i].nbytes, i))
    for i in order:
        mine = lifetimes[i]
        taken = sorted(
            (offsets[j], offsets[j] + _padded(lifetimes[j].nbytes))
            for j in placed
            if lifetimes[j].first <= mine.last and mine.first <= lifetimes[j].last
        )
        offset = 0
        for low, high in taken:
            if offset + _padded(mine.nbytes) <= low:
                break
            offset = max(offset, high)
        offsets[i] = offset
        placed.append(i)
        total = max(total, offset + _padded(mine.nbytes))
    return offsets, total


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
