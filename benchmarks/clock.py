"""How long calls take on the host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

# Seconds between the turns of two processes, until threads of the one that was timed sleep:
# OpenBLAS's have been seen to spin for 113 ms after a product, and slow down the next by half.
PAUSE = 0.25


def microseconds(
    call: Callable[[], object],
    rounds: int = 15,
    calls: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """The time of a call by a clock that counts seconds: the median of rounds, each of some calls
    in a row."""

    def spent() -> float:
        start = clock()
        for _ in range(calls):
            call()
        return (clock() - start) / calls * 1e6

    return statistics.median(spent() for _ in range(rounds))
