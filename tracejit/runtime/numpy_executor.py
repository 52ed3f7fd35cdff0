"""The numpy executor: runs a Plan's kernels over raw memory, vectorised over their domains."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from tracejit.runtime.numpy_kernel import Run
from tracejit.schedule.plan import Plan
from tracejit.schedule.traffic import bytes_moved


class NumpyExecutor:
    """Executes plans on the CPU with numpy."""

    name = "numpy"

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
    """A plan whose launches are lists of numpy steps."""

    def __init__(self, plan: Plan):
        self.plan = plan
        buffers = {b.name: b for b in plan.buffers}
        position = {b.name: i for i, b in enumerate(plan.buffers)}
        self._runs = [
            Run(launch, buffers, [position[name] for name in launch.buffers])
            for together in plan.launches
            for launch in together.alone()
        ]

    def __call__(self, addresses: Sequence[int], scalars: Sequence[float]) -> None:
        with np.errstate(all="ignore"):
            for run in self._runs:
                run(addresses, scalars)

    @property
    def sources(self) -> list[KernelText]:
        """The text of each kernel."""
        return [KernelText(f"kernel{i}", str(run.kernel)) for i, run in enumerate(self._runs)]

    def timed(self, addresses: Sequence[int], scalars: Sequence[float]) -> list[float]:
        """Run each kernel; the seconds that each took."""
        seconds = []
        with np.errstate(all="ignore"):
            for run in self._runs:
                started = time.perf_counter()
                run(addresses, scalars)
                seconds.append(time.perf_counter() - started)
        return seconds

    def bytes_moved(self) -> tuple[int, ...]:
        """Of each kernel, the bytes of unique addresses loaded plus those stored."""
        alone = [one for together in self.plan.launches for one in together.alone()]
        return bytes_moved(replace(self.plan, launches=tuple(alone)))

    def lines(self) -> list[tuple[str, ...]]:
        """Of each kernel, the user's lines that it computes."""
        return [one.kernel.lines for together in self.plan.launches for one in together.alone()]
