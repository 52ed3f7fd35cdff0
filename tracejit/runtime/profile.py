"""TRACEJIT_DEBUG=2: each launch of a plan timed alone, with bytes and share of bandwidth."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from tracejit.runtime.executor import Executor
from tracejit.schedule.plan import Plan
from tracejit.schedule.traffic import bytes_moved

_COPY_BYTES = 1 << 26


class ProfiledPlan:
    """A loaded plan that prints what each launch cost."""

    def __init__(self, plan: Plan, executor: Executor):
        self._device = torch.device(plan.device)
        self._launches = [
            executor.load(replace(plan, launches=(launch,))) for launch in plan.launches
        ]
        self._bytes = bytes_moved(plan)

    def __call__(self, addresses: Sequence[int], scalars: Sequence[float]) -> None:
        bandwidth = copy_bandwidth(self._device)
        for i, (launch, nbytes) in enumerate(zip(self._launches, self._bytes, strict=True)):
            _wait(self._device)
            started = time.perf_counter()
            launch(addresses, scalars)
            _wait(self._device)
            seconds = time.perf_counter() - started
            rate = nbytes / seconds
            print(
                f"tracejit: kernel {i}: {seconds * 1e6:.1f} µs, {nbytes} bytes, "
                f"{rate / 1e9:.2f} GB/s, {100 * rate / bandwidth:.0f} % of copy bandwidth"
            )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes read plus written per second by a large copy on the device, best of five."""
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    best = float("inf")
    for _ in range(5):
        _wait(device)
        started = time.perf_counter()
        target.copy_(source)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * _COPY_BYTES / best
