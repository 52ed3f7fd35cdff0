"""A launch on a fake device: the arguments that Triton's launcher would get are checked, and numpy
does what the kernel would."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from tracejit.codegen.triton_phases import HEADER, words_of_row
from tracejit.runtime.fake_clock import Clocks, Fault
from tracejit.runtime.fake_rows import Rows
from tracejit.runtime.numpy_kernel import Run
from tracejit.runtime.triton_launch import LoadedLaunch, memory_bytes


class Stage(Protocol):
    """What a launch needs of the fake device."""

    clocks: Clocks

    def give_launch(self, text: str, stream: int, work: object) -> None: ...

    def check_memory(self, start: int, nbytes: int, what: str) -> None: ...


class FakeLaunch:
    """What stands for a compiled kernel's launcher.

    aligned:  for which pointers the kernel was specialized as aligned to 16 bytes; the first one is
              a table of addresses where it loads some of them (`LoadedLaunch.through`).
    function: the handle that it must be launched with, and the metadata.
    """

    def __init__(
        self,
        device: Stage,
        launch: LoadedLaunch,
        aligned: Sequence[bool],
        function: object,
        packed: object,
    ):
        self._device, self._launch, self._aligned = device, launch, tuple(aligned)
        self._handles = function, packed
        names = launch.function.arg_names[len(aligned) :]
        self._constants = [launch.constants[n] for n in names]
        self.what = f"launch {launch.source.name.rpartition('_')[0]}"
        self._rows = Rows(launch, self.what) if launch.launch.kernel.foreach else None

    @functools.cached_property
    def _runs(self) -> list[Run]:
        """Each kernel of the launch, with its arguments by their position among the pointers."""
        launch = self._launch
        buffers = {buffer.name: buffer for buffer in launch.memory}
        position = {name: i for i, name in enumerate(launch.launch.buffers)}
        alone = launch.launch.alone()
        return [Run(one, buffers, [position[name] for name in one.buffers]) for one in alone]

    def __call__(self, *head: object) -> None:
        grid, stream, handles, hooks = head[:3], head[3], head[4:6], head[6:9]
        pointers, constants = head[9 : 9 + len(self._aligned)], head[9 + len(self._aligned) :]
        launch, what = self._launch, self.what
        if grid != (launch.geometry.grid[0], 1, 1) or hooks != (None, None, None):
            raise Fault(f"{what} has the grid {grid} and the hooks {hooks}")
        if any(a is not b for a, b in zip(handles, self._handles, strict=True)):
            raise Fault(f"{what} has another kernel's function")
        if [*constants] != self._constants:
            raise Fault(f"{what} has the constants {constants}, not {self._constants}")
        for pointer, aligned in zip(pointers, self._aligned, strict=True):
            if type(pointer) is not int:
                raise Fault(f"{what} has a pointer that is no integer: {pointer!r}")
            if aligned and pointer % 16:
                raise Fault(f"{what} was compiled for aligned pointers, and {pointer:#x} is not")
        text = f"{what} of {grid[0]} programs"
        self._device.give_launch(text, stream, lambda stream: self._work(stream, pointers))

    def _work(self, stream: int, pointers: Sequence[int]) -> None:
        launch = self._launch
        pointers = [*pointers]
        if launch.phases:
            table = pointers.pop(0)
            head = [*self._words(stream, table, HEADER)]
            if head[0] != 0 or head[2:] != [0, len(launch.phases)]:
                raise Fault(f"{self.what} has the head {head} of a table")
            for row in range(head[1]):
                start = table + 8 * (HEADER + row * words_of_row(launch.launch.kernel))
                found = self._through(stream, start, [])
                if launch.launch.kernel.scalars:
                    found.append(start + 8 * len(found))
                self._step(stream, [*found, *pointers])
            return
        if launch.through:
            pointers = self._through(stream, pointers[0], pointers[1:])
        self._step(stream, pointers)

    def _words(self, stream: int, address: int, count: int) -> Sequence[int]:
        self._device.clocks.reads(stream, address, 8 * count, self.what)
        self._device.check_memory(address, 8 * count, self.what)
        return (ctypes.c_uint64 * count).from_address(address)

    def _through(self, stream: int, table: int, pointers: Sequence[int]) -> list[int]:
        """The pointers, with those that are found in a table."""
        pointers, through = [*pointers], self._launch.through
        found = self._words(stream, table, len(through))
        for (i, aligned), pointer in zip(through, found, strict=True):
            pointers.insert(i, pointer)
            if aligned and pointer % 16:
                raise Fault(f"{self.what} loads {pointer:#x}, which was to be aligned")
        return pointers

    def _step(self, stream: int, pointers: Sequence[int]) -> None:
        launch, clocks = self._launch, self._device.clocks
        kernel = launch.launch.kernel
        reads, writes = [], []
        rest = [*pointers[len(kernel.buffers) :]]
        if self._rows is not None:
            rest = [*pointers[2:]]
            tables, pieces = self._rows.read(*pointers[:2])
            for place in tables:
                clocks.reads(stream, *place, self.what)
            reads += tables
            reads += [piece for piece, access in pieces if "r" in access]
            writes += [piece for piece, access in pieces if "w" in access]
        else:
            for pointer, buffer, memory in zip(
                pointers, kernel.buffers, launch.memory, strict=False
            ):
                place = pointer, memory_bytes(memory)
                reads += [place] * ("r" in buffer.access)
                writes += [place] * ("w" in buffer.access)
        scalars: list[float] = []
        if kernel.scalars:
            table = rest.pop(0)
            reads.append((table, 8 * len(kernel.scalars)))
            scalars = list((ctypes.c_double * len(kernel.scalars)).from_address(table))
        if launch.geometry.workspace:
            work = rest.pop(0)
            writes.append((work, launch.geometry.workspace))
            self._check_counters(work)
        for place in {*reads, *writes}:
            self._device.check_memory(*place, self.what)
        for place in reads:
            clocks.reads(stream, *place, self.what)
        for place in writes:
            clocks.writes(stream, *place, self.what)
        if self._rows is not None:
            with np.errstate(all="ignore"):
                self._rows.run(scalars)
            return
        slots = dict(zip(launch.launch.scalars, scalars, strict=True))
        table_of_plan = [slots.get(i, np.nan) for i in range(max(slots, default=-1) + 1)]
        with np.errstate(all="ignore"):
            for run in self._runs:
                run(pointers, table_of_plan)

    def _check_counters(self, work: int) -> None:
        """Every reduction's counter is at rest: nothing else works in the same place, and what did
        so before has come to its end."""
        constants = self._launch.constants
        pieces = [v for name, v in constants.items() if name.startswith("WORKSPACE_")] or [0]
        if self._rows is not None:
            pieces = [4 * row for row in range(self._rows.counters())]
        for piece in pieces:
            count = ctypes.c_int32.from_address(work + piece).value
            if count:
                raise Fault(f"{self.what} finds a counter at {count}, not at rest")


class _Utils:
    """What Triton's driver asks of a device."""

    def __init__(self, shared: int):
        self._shared = shared

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple:
        """A handle instead of a function: (module, function, registers, spills, threads)."""
        return object(), f"{name} on {device}", 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self._shared, "multiprocessor_count": 132}


class _Launcher:
    """What Triton makes of a compiled kernel; `FakeLaunch` takes its place."""

    def __init__(self, source: object, metadata: object):
        self.source, self.metadata = source, metadata


@functools.cache
def fake_driver(number: int, arch: int, shared: int) -> object:
    """A driver of Triton's for a device of that number, which stands for sm_<arch>."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Driver(DriverBase):
        utils, launcher_cls = _Utils(shared), _Launcher

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self) -> int:
            return number

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_benchmarker(self) -> None:
            return None

    return Driver()
