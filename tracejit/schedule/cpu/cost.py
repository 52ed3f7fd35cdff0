"""What a point of a body costs, and in how many chunks so much work is dealt to threads.

The number of chunks depends on the sizes only, and partial results are combined in their order, so
that results do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence

from tracejit.schedule.kernel import Compute, Statement

GRAIN = 65536  # of the cost units of `weight`: a chunk is worth handing to a thread (some 10 µs)
MAX_CHUNKS = 128

_SLOW = {"exp": 10, "log": 10, "tanh": 15, "sin": 30, "cos": 30, "pow": 40, "mod": 40}


def weight(body: Sequence[Statement]) -> int:
    """The cost of one point, an access of memory being 2 and an addition 1."""
    total = 0
    for s in body:
        if isinstance(s, Compute):
            total += _SLOW.get(s.op.name, 1)
        else:
            total += 2
    return total


def chunks_of(units: int, work: int) -> int:
    """How many chunks `units` of `work` cost units in all are dealt in."""
    return max(1, min(units, work // GRAIN, MAX_CHUNKS))
