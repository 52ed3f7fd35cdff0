"""The scaling model of the ledger beside what 1, 2 and 4 processes take, over gloo.

    python -m benchmarks.scaling [--case ddp_mlp|ddp_gpt]… [--rounds 5] [--calls 10]

Each process has one thread, and the same model in DistributedDataParallel. What the model is given
is measured: the seconds of each launch of the plan alone, and the link, by the time of two
all_reduces. From that it predicts (`tracejit/scaling.py`) how long a step takes with so many ranks:
the launches, and what they wait for. Where there are more processes than cores, these take turns,
and so long as that many times.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence

import torch
import torch.distributed as distributed

from benchmarks.data_parallel import CASES, WARM, build, on_ranks
from tracejit.links import Link
from tracejit.runtime.trial import trial
from tracejit.scaling import Timed, hidden_share, passages, world_of
from tracejit.schedule.plan import by_launch

COUNTS = (1, 2, 4)
_SIZES = (256, 1 << 20)  # elements of the all_reduces that measure a link


def link(ranks: int, rounds: int) -> Link:
    """What connects the ranks, by what two all_reduces take: rings, as in `schedule/wire.py`."""
    if ranks == 1:
        return Link("none", 1e12, 0.0)
    times = []
    for count in _SIZES:
        x, found = torch.ones(count), []
        for _ in range(3 * rounds):
            distributed.barrier()
            begun = time.perf_counter()
            distributed.all_reduce(x)
            found.append(time.perf_counter() - begun)
        times.append(statistics.median(found))
    steps = 2 * (ranks - 1)
    sent = [4 * count * steps / ranks for count in _SIZES]
    bandwidth = (sent[1] - sent[0]) / max(times[1] - times[0], 1e-9)
    return Link("gloo", bandwidth, max(0.0, times[0] - sent[0] / bandwidth) / steps)


def measured(case: str, rounds: int, calls: int) -> dict[str, float]:
    """On one rank: seconds of a step, and of its launches and of what they wait for as the model
    has it."""
    ranks = distributed.get_world_size()
    step = build(case, "tracejit")
    for _ in range(WARM):
        step()
    times = []
    for _ in range(rounds):
        distributed.barrier()
        begun = time.perf_counter()
        for _ in range(calls):
            step()
        times.append((time.perf_counter() - begun) / calls)
    program = step._last.program
    seconds = by_launch(program.plan, trial(program.plan, program.loaded))
    timeline = [
        Timed(launch.kernel, 0.0 if launch.kernel.call is not None else x)
        for launch, x in zip(program.plan.launches, seconds, strict=True)
    ]
    found = link(ranks, rounds)
    turns = max(1.0, ranks / os.cpu_count())
    timeline = [Timed(x.kernel, x.seconds * turns) for x in timeline]
    waited = 0.0
    if world_of(timeline) > 1:
        waited = sum(p.waited for p in passages(timeline, (found,), ranks, ranks))
    return {
        "seconds": statistics.median(times),
        "launches": sum(x.seconds for x in timeline),
        "waited": waited,
        "hidden": hidden_share(timeline, (found,), ranks) or 0.0,
        "bandwidth": found.bandwidth,
        "latency": found.latency,
    }


def table(case: str, rounds: int, calls: int, counts: Sequence[int] = COUNTS) -> list[dict]:
    """What is measured and predicted, for each number of processes; the slower rank counts."""
    rows = []
    for count in counts:
        found = on_ranks(count, measured, case, rounds, calls)
        worst = max(found, key=lambda x: x["seconds"])
        # what the first row takes besides its launches is Python, which all rows have
        besides = worst["seconds"] - worst["launches"] if not rows else rows[0]["besides"]
        predicted = worst["launches"] + worst["waited"] + besides * max(1.0, count / os.cpu_count())
        rows.append({**worst, "processes": count, "besides": besides, "predicted": predicted})
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=10)
    options = parser.parse_args()
    for case in options.case or CASES:
        rows = table(case, options.rounds, options.calls)
        for row in rows:
            print(
                f"{case:8} {row['processes']} processes: {row['seconds'] * 1e3:8.3f} ms a step, "
                f"predicted {row['predicted'] * 1e3:8.3f} ({row['predicted'] / row['seconds']:.2f})"
                f"; efficiency {rows[0]['seconds'] / row['seconds']:.2f}, predicted "
                f"{rows[0]['seconds'] / row['predicted']:.2f}; link {row['bandwidth'] / 1e9:.2f} "
                f"GB/s, {row['latency'] * 1e6:.0f} µs a step; {row['hidden']:.0%} hidden"
            )


if __name__ == "__main__":
    main()
