"""A plan whose Triton kernels run in Triton's interpreter on CPU memory: one program after another,
in shuffled order, with every access checked."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from tracejit.runtime import interpreter
from tracejit.runtime.foreach import launches_of, table_of
from tracejit.runtime.numpy_kernel import Run
from tracejit.runtime.triton_launch import (
    TRITON_NAME,
    LoadedLaunch,
    memory_bytes,
    workspace_bytes,
)
from tracejit.schedule.memory import layout_of
from tracejit.schedule.plan import Plan
from tracejit.schedule.traffic import bytes_moved


class InterpretedPlan:
    """A plan whose kernels are ready to run; `sources` holds one Source per launch."""

    def __init__(self, plan: Plan, launches: Sequence[LoadedLaunch]):
        self.plan = plan
        self.layout = layout_of(plan)
        self.sources = tuple(launch.source for launch in launches)
        self._ran = [launch.geometry.grid[0] > 0 for launch in launches]
        self.launched = [one for one, ran in zip(launches, self._ran, strict=True) if ran]
        self._slots = [slot for launch in plan.launches for slot in launch.scalars]
        self._workspace = np.zeros(workspace_bytes(launches), np.int8)
        self._sizes = [memory_bytes(buffer) for buffer in plan.buffers]
        self._calls = [_of_host(launch) for launch in self.launched]

    def __call__(self, addresses: Sequence[int], scalars: Sequence[float]) -> None:
        """Run every launch in order."""
        self._run(addresses, scalars, lambda: None)

    def timed(self, addresses: Sequence[int], scalars: Sequence[float]) -> list[float]:
        """Run every launch; the seconds that each took, 0 for one without programs."""
        marks: list[float] = []
        self._run(addresses, scalars, lambda: marks.append(time.perf_counter()))
        seconds = (b - a for a, b in pairwise(marks))
        return [next(seconds) if ran else 0.0 for ran in self._ran]

    def bytes_moved(self) -> tuple[int, ...]:
        """Of each launch, the bytes of unique addresses loaded plus those stored."""
        return bytes_moved(self.plan)

    def lines(self) -> list[tuple[str, ...]]:
        """Of each launch, the user's lines that it computes."""
        return [launch.kernel.lines for launch in self.plan.launches]

    def _run(self, addresses: Sequence[int], scalars: Sequence[float], mark: Callable) -> None:
        table = np.array([scalars[slot] for slot in self._slots], np.float64)
        mark()
        for number, launch in enumerate(self.launched):
            try:
                self._run_launch(launch, addresses, table, number)
            except BaseException:
                self._workspace[:] = 0  # the counter of a launch that was cut off
                raise
            mark()

    def _run_launch(
        self, launch: LoadedLaunch, addresses: Sequence[int], table: np.ndarray, number: int
    ) -> None:
        kernel = launch.source.kernel
        places = [addresses[i] for i in launch.buffers]
        if (call := self._calls[number]) is not None:
            call(places, ())
            return
        sizes = [self._sizes[i] for i in launch.buffers]
        memory = list(zip(places, sizes, strict=True))
        if kernel.foreach:
            words = np.array([addresses[i] for i in table_of(launch)], np.uint64)
            for one, chunks in launches_of(launch, words.tolist()):
                tables = (words.view(np.int64), chunks.ravel())
                pointers = [interpreter.Pointer.of(x) for x in tables]
                near = [(x.ctypes.data, x.nbytes) for x in tables]
                self._give(one, pointers, [*memory, *near], table, number)
            return
        pointers = [
            interpreter.Pointer(address, TRITON_NAME[buffer.dtype.name])
            for address, buffer in zip(places, kernel.buffers, strict=True)
        ]
        self._give(launch, pointers, memory, table, number)

    def _give(
        self,
        launch: LoadedLaunch,
        pointers: list[interpreter.Pointer],
        memory: list[tuple[int, int]],
        table: np.ndarray,
        number: int,
    ) -> None:
        """Run a launch with its scalars and workspace behind its pointers."""
        kernel = launch.source.kernel
        if kernel.scalars:
            first = table.ctypes.data + 8 * launch.first_scalar
            pointers.append(interpreter.Pointer(first, "fp64"))
            memory.append((first, 8 * len(kernel.scalars)))
        if launch.geometry.workspace:
            place = self._workspace.ctypes.data + launch.workspace
            pointers.append(interpreter.Pointer(place, "i8"))
            memory.append((place, launch.geometry.workspace))
        interpreter.run(
            launch.function,
            launch.geometry.grid,
            pointers,
            launch.constants,
            buffers=memory,
            seed=number,
        )


def _of_host(launch: LoadedLaunch) -> Run | None:
    """What makes a launch that is a call of the host."""
    if launch.source.kernel.call is None:
        return None
    names = {buffer.name: buffer for buffer in launch.memory}
    return Run(launch.launch, names, range(len(launch.buffers)))
