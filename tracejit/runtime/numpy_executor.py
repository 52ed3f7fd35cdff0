"""The numpy executor: runs a Plan's kernels over raw memory, vectorised over their domains."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from tracejit.records import dataclass
from tracejit.runtime.numpy_arrays import span
from tracejit.runtime.numpy_kernel import Run
from tracejit.schedule.plan import Plan, runs
from tracejit.schedule.traffic import bytes_moved


class NumpyExecutor:
    """Executes plans on the CPU with numpy."""

    name = "numpy"
    gpu = False

    def load(self, plan: Plan) -> LoadedNumpyPlan:
        """Prepare all launches of a plan."""
        return LoadedNumpyPlan(plan)


@dataclass(frozen=True)
class KernelText:
    """A kernel as it is run: with plain numbers as sizes."""

    suffix: ClassVar[str] = ".txt"
    name: str
    text: str


class LoadedNumpyPlan:
    """A plan whose launches are lists of numpy steps. A call that raises leaves the plan's inputs
    as they were."""

    undoes = True

    def __init__(self, plan: Plan):
        self.plan = plan
        buffers = {b.name: b for b in plan.buffers}
        position = {b.name: i for i, b in enumerate(plan.buffers)}
        self._launches = [one for together in plan.launches for one in together.alone()]
        self._runs = [
            Run(launch, buffers, [position[name] for name in launch.buffers])
            for launch in self._launches
        ]
        self._steps = [b.step for b in plan.buffers]
        self._written = [(position[name], span(buffers[name])) for name in plan.writes]

    def __call__(self, addresses: Sequence[int], scalars: Sequence[float]) -> None:
        self.timed(addresses, scalars)

    @property
    def sources(self) -> list[KernelText]:
        """The text of each kernel."""
        return [KernelText(f"kernel{i}", str(run.kernel)) for i, run in enumerate(self._runs)]

    def timed(self, addresses: Sequence[int], scalars: Sequence[float]) -> list[float]:
        """Run each kernel; the seconds that each took."""
        written = [(addresses[i], ctypes.string_at(addresses[i], n)) for i, n in self._written]
        try:
            return self._launch(addresses, scalars)
        except BaseException:  # too little memory for what numpy works in
            for address, before in written:
                ctypes.memmove(address, before, len(before))
            raise

    def _launch(self, addresses: Sequence[int], scalars: Sequence[float]) -> list[float]:
        seconds = [0.0] * len(self._runs)
        with np.errstate(all="ignore"):
            for together in runs(range(len(self._runs)), lambda i: self._launches[i].loop):
                for step in range(self.plan.times(self._launches[together[0]])):
                    moved = [a + step * s for a, s in zip(addresses, self._steps, strict=True)]
                    for i in together:
                        started = time.perf_counter()
                        self._runs[i](moved, scalars)
                        seconds[i] += time.perf_counter() - started
        return seconds

    def bytes_moved(self) -> tuple[int, ...]:
        """Of each kernel, the bytes of unique addresses loaded plus those stored."""
        return bytes_moved(replace(self.plan, launches=tuple(self._launches)))

    def lines(self) -> list[tuple[str, ...]]:
        """Of each kernel, the user's lines that it computes."""
        return [one.kernel.lines for one in self._launches]
