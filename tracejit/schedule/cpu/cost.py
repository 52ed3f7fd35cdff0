"""What a point of a body costs, and in how many chunks so much work is dealt to threads.

The number of chunks depends on the sizes only, and partial results are combined in their order, so
that results do not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tracejit.schedule.kernel import Compute, Kernel, Statement

GRAIN = 65536  # of the cost units of `weight`: a chunk is worth handing to a thread (some 10 µs)
MAX_CHUNKS = 128
LANES = 8  # products that are done at once, whatever the machine


def weight(body: Sequence[Statement]) -> int:
    """The cost of one point, an access of memory being 2 and an addition 1. Of dearer operations it
    is half their cost: the accesses do not wait for them."""
    total = 0
    for s in body:
        if isinstance(s, Compute):
            total += (s.op.cost + 1) // 2
        else:
            total += 2
    return total


def work_of(kernel: Kernel) -> int:
    """The cost of all points of a kernel, and of the sums of its product."""
    outer, total = math.prod(a.extent for a in kernel.axes), 0
    for stage in kernel.stages:
        points = outer * math.prod(a.extent for a in stage.axes)
        total += points * weight(stage.body)
        if stage.dot is not None:
            total += points * stage.dot.k.extent * 2 // LANES
    return total


def chunks_of(units: int, work: int) -> int:
    """How many chunks `units` of `work` cost units in all are dealt in."""
    return max(1, min(units, work // GRAIN, MAX_CHUNKS))
