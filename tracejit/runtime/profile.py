"""TRACEJIT_DEBUG=2: each launch of a loaded plan timed, with bytes and share of bandwidth."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

import torch

from tracejit.runtime.executor import LoadedPlan, memory_of
from tracejit.schedule.plan import Plan

# copied to find the bandwidth: on a GPU many times what its caches hold
_COPY_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}


class ProfiledPlan:
    """A loaded plan that prints what each of its launches cost."""

    def __init__(self, plan: Plan, loaded: LoadedPlan):
        self._device = torch.device(plan.device)
        self._loaded = loaded
        self.sources = loaded.sources
        self.layout = memory_of(loaded, plan)
        if hasattr(loaded, "device"):  # a GPU
            self.device, self.read = loaded.device, loaded.read
        self.bytes_moved = functools.cache(loaded.bytes_moved)
        self.lines = loaded.lines

    def __call__(self, addresses: Sequence[int], scalars: Sequence[float]) -> None:
        self.timed(addresses, scalars)

    def timed(self, addresses: Sequence[int], scalars: Sequence[float]) -> list[float]:
        """Run all launches; print, and return, how long each took."""
        bandwidth = copy_bandwidth(self._device)
        _wait(self._device)
        times = self._loaded.timed(addresses, scalars)
        rows = zip(self.sources, times, self.bytes_moved(), strict=True)
        for i, (source, seconds, nbytes) in enumerate(rows):
            rate = nbytes / seconds if seconds else 0.0
            print(
                f"tracejit: kernel {i} ({source.name}): {seconds * 1e6:.1f} µs, {nbytes} bytes, "
                f"{rate / 1e9:.2f} GB/s, {100 * rate / bandwidth:.0f} % of copy bandwidth"
            )
        return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes read plus written per second by a large copy on the device, best of five."""
    nbytes = _COPY_BYTES[device.type]
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    times = []
    for _ in range(5):
        if device.type == "cuda":  # by the clock of the GPU
            started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.device(device):
                started.record()
                target.copy_(source)
                ended.record()
            ended.synchronize()
            times.append(started.elapsed_time(ended) / 1e3)
        else:
            begun = time.perf_counter()
            target.copy_(source)
            times.append(time.perf_counter() - begun)
    return 2 * nbytes / min(times)
