"""How long calls take on the host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


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
