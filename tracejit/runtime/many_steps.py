"""Many calls of a plan in one launch, for steps so small that launching takes longer than working.

A cooperative kernel (`codegen/triton_phases.py`) goes through the rows of a table, one per call,
with the addresses and scalars of each. Which calls go together is decided in `waiting.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from tracejit.codegen.triton_phases import HEADER, words_of_row
from tracejit.records import dataclass
from tracejit.runtime.device import Device, LoadedKernel
from tracejit.runtime.launches import Place, StreamState
from tracejit.runtime.ring import Ring
from tracejit.runtime.triton_launch import DevicePointer, LoadedLaunch
from tracejit.runtime.waiting import Row

ROUNDS = 4  # how often a program may go round in a phase: more work than that fills a GPU by itself


@dataclass(frozen=True)
class _Loaded:
    """The kernel on its device, and what its launches work with on a stream."""

    run: Callable[..., None]
    arguments: list
    table: torch.Tensor
    work: torch.Tensor | None
    ring: Ring


class Many:
    """All launches of a plan as one kernel, for bases that are aligned in some way.

    launch: the kernel.
    places: per buffer of the plan, which base, and bytes from there.
    slots:  per scalar of the kernel, which of the numbers of a call it is.
    """

    @classmethod
    def of(cls, device: Device, launch: LoadedLaunch, *given: object) -> Many | None:
        """None where a phase has work for many rounds."""
        limit = ROUNDS * device.properties().multiprocessors
        return cls(device, launch, *given) if max(launch.phases) <= limit else None

    def __init__(
        self,
        device: Device,
        launch: LoadedLaunch,
        places: Sequence[Place],
        slots: Sequence[int],
        calls: int,
        failed: Callable[[Exception], Exception],  # what to raise
    ):
        self.device, self.most, self._failed = device, calls, failed
        programs = min(launch.geometry.grid[0], device.properties().multiprocessors)
        self._launch = replace(launch, geometry=replace(launch.geometry, grid=(programs,)))
        self._places = [places[i] for i in launch.buffers]
        kernel = launch.launch.kernel
        self._row = words_of_row(kernel)
        self._slots = slots
        self._padding = b"\0" * 8 * (self._row - len(kernel.buffers) - len(kernel.scalars))
        self._pack = struct.Struct(f"{len(kernel.buffers)}Q").pack
        pointers = [DevicePointer(0, torch.int64)]
        if launch.geometry.workspace:
            pointers.append(DevicePointer(0, torch.int8))
        self._kernel: LoadedKernel = device.load(self._launch, pointers)
        self._of_streams: dict[StreamState, _Loaded] = {}

    def prepare(self, state: StreamState) -> None:
        """What a launch on the stream needs, before anything of its calls is written."""
        if state in self._of_streams:
            return
        device, launch = self.device, self._launch
        nbytes = 8 * (HEADER + self._row * self.most)
        table, work = device.allocate(nbytes), None
        if launch.geometry.workspace:
            work = device.allocate(launch.geometry.workspace)
            zeros = device.pinned(launch.geometry.workspace)
            zeros.zero_()
            device.upload(work, zeros)
            self._zeros = zeros
        pointers = [table.data_ptr(), *([] if work is None else [work.data_ptr()])]
        names = launch.function.arg_names[len(pointers) :]
        kernel = self._kernel
        head = [launch.geometry.grid[0], 1, 1, state.stream, kernel.function, kernel.packed]
        arguments = [*head, None, None, None, *pointers, *(launch.constants[x] for x in names)]
        loaded = _Loaded(kernel.run, arguments, table, work, Ring(device, nbytes))
        self._of_streams = {state: loaded}  # the stream that was used last

    def __call__(self, state: StreamState, rows: Sequence[Row]) -> None:
        """Launch these calls on a stream that is prepared."""
        found = self._of_streams[state]
        try:
            with self.device.entered():
                found.ring.upload(found.table, self.table(rows))
                found.run(*found.arguments)
        except Exception as error:
            self._of_streams = {}  # counters may not be at rest
            raise self._failed(error) from error

    def table(self, rows: Sequence[Row]) -> bytes:
        """The table of these rows, as long as it is for all calls."""
        words = [struct.pack("4q", 0, len(rows), 0, len(self._launch.phases))]
        for scalars, bases in rows:
            words.append(self._pack(*(bases[base] + offset for base, offset in self._places)))
            words += [scalars[8 * i : 8 * i + 8] for i in self._slots]
            words.append(self._padding)
        return b"".join(words).ljust(8 * (HEADER + self._row * self.most), b"\0")
