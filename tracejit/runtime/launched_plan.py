"""A plan on a GPU: a generated function launches its kernels on the caller's current stream.

What a plan works with beside its buffers belongs to one stream: counters and partials of
reductions, and the table of scalars, which is copied there when a number has changed. So calls on
several streams do not meet, and calls on one stream follow each other. A launch is one line, with
integers for pointers. Kernels are compiled and brought to the device before anything is written.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from struct import Struct

import torch

from tracejit.errors import CaptureError, LaunchError
from tracejit.ir.torch_types import TO_TORCH
from tracejit.runtime.device import Device, LoadedKernel
from tracejit.runtime.executor import Inlined
from tracejit.runtime.ring import Ring, read_element
from tracejit.runtime.triton_launch import DevicePointer, LoadedLaunch, workspace_bytes
from tracejit.schedule.plan import Plan
from tracejit.schedule.traffic import bytes_moved

MAX_STREAMS = 16  # whose counters and tables are kept; the least recently added go first
_ALIGNED = 16  # bytes: how well Triton wants to know where a pointer points

_OF_GRAPHS: list[torch.Tensor | None] = []  # zeros that graphs of callers copy, as long as they run

Place = tuple[int, int]  # which of a function's bases, and bytes from there


class StreamState:
    """What the launches of a plan work with on one stream."""

    __slots__ = ("stream", "work", "table", "words", "_memory", "_copy")

    def __init__(
        self,
        stream: int,
        memory: Sequence[torch.Tensor | None],
        copy: Callable[[torch.Tensor, bytes], None] | None,
    ):
        self.stream = stream
        self._memory, self._copy = memory, copy
        work, table = memory
        self.work = 0 if work is None else work.data_ptr()
        self.table = 0 if table is None else table.data_ptr()
        self.words: bytes | None = None  # what the table holds

    def upload(self, words: bytes) -> None:
        """Bring the scalars to the table, behind what was launched so far."""
        self.words = None
        self._copy(self._memory[1], words)
        self.words = words


class LaunchedPlan:
    """A plan whose kernels are on their device; `sources` holds one Source per launch."""

    def __init__(self, plan: Plan, launches: Sequence[LoadedLaunch], device: Device):
        self.plan, self.device = plan, device
        if device.capturing():
            raise CaptureError(
                reason=f"step {plan.name!r} has not been compiled for these arguments yet",
                remedy="Call it a few times before it is captured",
            )
        self.sources = tuple(launch.source for launch in launches)
        self._ran = [launch.geometry.grid[0] > 0 for launch in launches]
        self._launches = [one for one, ran in zip(launches, self._ran, strict=True) if ran]
        self._slots = [slot for launch in plan.launches for slot in launch.scalars]
        self._pack = Struct(f"{len(self._slots)}d").pack
        self._states: OrderedDict[int, StreamState] = OrderedDict()
        self._work_bytes = workspace_bytes(self._launches)
        self._ring = Ring(device, 8 * len(self._slots)) if self._slots else None
        self._zeros: torch.Tensor | None = None
        if self._work_bytes:
            self._zeros = device.pinned(self._work_bytes)
            ctypes.memset(self._zeros.data_ptr(), 0, self._work_bytes)
        self.read = partial(read_element, device)
        self._kernels: dict[tuple[int, tuple[bool, ...]], LoadedKernel] = {}
        for number in range(len(self._launches)):
            self._loaded(number, [b.offset if b.kind == "arena" else 0 for b in plan.buffers])

    # ---- running

    def inlined(self, addresses: Sequence[tuple[str, int]], scalars: Sequence[str]) -> Inlined:
        """The lines of a call. Bases that are not aligned to 16 bytes have a function of their
        own."""
        bases = {base: n for n, base in enumerate(dict.fromkeys(base for base, _ in addresses))}
        fitting = Fitting(self, [(bases[base], offset) for base, offset in addresses])
        device, given = self.device, ", ".join(bases)
        names: dict[str, object] = {
            "enter": self._enter,
            "fitting": fitting,
            "here": device.here,
            "elsewhere": partial(_elsewhere, device),
        }
        gather = ["launch = fitting([])", "state = enter()"]
        if bases:
            names["aligned"] = fitting([0] * len(bases))
            together = " | ".join(bases)
            gather[0] = f"launch = fitting([{given}]) if ({together}) & {_ALIGNED - 1} else aligned"
        words = "None"
        if self._ring is not None:
            words, names["pack"] = "words", self._pack
            gather.append(f"words = pack({', '.join(scalars[slot] for slot in self._slots)})")
        arguments = ", ".join(("state", words, *bases))
        run = (
            f"launch({arguments}) if here() == {device.number} else elsewhere(launch, {arguments})"
        )
        return Inlined(gather, run, None, names)

    def __call__(self, addresses: Sequence[int], scalars: Sequence[float]) -> None:
        """Give every launch to the current stream, in order."""
        self._run(addresses, scalars)

    def timed(self, addresses: Sequence[int], scalars: Sequence[float]) -> list[float]:
        """Run every launch; the seconds that each took, 0 for one without programs."""
        clock = self.device.clock()
        self._run(addresses, scalars, clock.mark)
        seconds = iter(clock.seconds())
        return [next(seconds) if ran else 0.0 for ran in self._ran]

    def _run(
        self,
        addresses: Sequence[int],
        scalars: Sequence[float],
        mark: Callable[[], None] | None = None,
    ) -> None:
        launch = Fitting(self, [(i, 0) for i in range(len(addresses))], mark)(addresses)
        state = self._enter()
        words = self._pack(*(scalars[slot] for slot in self._slots)) if self._slots else None
        _elsewhere(self.device, launch, state, words, *addresses)

    def bytes_moved(self) -> tuple[int, ...]:
        """Of each launch, the bytes of unique addresses loaded plus those stored."""
        return bytes_moved(self.plan)

    # ---- what belongs to a stream

    def _enter(self) -> StreamState:
        """What the launches work with on the current stream."""
        device = self.device
        if device.capturing():
            return self._captured()
        stream = device.current_stream()
        state = self._states.get(stream)
        if state is None:
            copy = None if self._ring is None else self._ring.upload
            state = self._states[stream] = StreamState(stream, self._memory(), copy)
            while len(self._states) > MAX_STREAMS:
                self._states.popitem(last=False)
        return state

    def _captured(self) -> StreamState:
        """The same in a graph that the caller captures: memory of the graph, which is filled each
        time that it runs. The numbers are those of the capture, as eager's would be."""
        _OF_GRAPHS.append(self._zeros)
        copy = None if self._ring is None else self._ring.upload_captured
        return StreamState(self.device.current_stream(), self._memory(), copy)

    def _memory(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Fresh memory for counters and partials, at 0, and for scalars."""
        device, work, table = self.device, None, None
        if self._work_bytes:
            work = device.allocate(self._work_bytes)
            device.upload(work, self._zeros)
        if self._slots:
            table = device.allocate(8 * len(self._slots))
        return work, table

    # ---- functions

    def _loaded(self, number: int, residues: Sequence[int]) -> LoadedKernel:
        """The kernel of a launch, for buffers that lie so many bytes behind a multiple of 16."""
        launch = self._launches[number]
        kernel = launch.launch.kernel
        pointers = [
            DevicePointer(residues[i] % _ALIGNED, TO_TORCH[buffer.dtype])
            for i, buffer in zip(launch.buffers, kernel.buffers, strict=True)
        ]
        if kernel.scalars:
            pointers.append(DevicePointer(8 * launch.first_scalar, torch.float64))
        if launch.geometry.workspace:
            pointers.append(DevicePointer(launch.workspace, torch.int8))
        key = number, tuple([pointer.address % _ALIGNED == 0 for pointer in pointers])
        if key not in self._kernels:
            if self.device.capturing():
                raise CaptureError(
                    reason=f"the kernels of step {self.plan.name!r} for arguments that are aligned "
                    "like these are not on the device yet",
                    remedy="Call it with them before it is captured",
                )
            try:
                self._kernels[key] = self.device.load(launch, pointers)
            except Exception as error:
                raise self._error(number, "could not be loaded", error) from error
        return self._kernels[key]

    def launcher(
        self, places: Sequence[Place], residues: Sequence[int], mark: Callable[[], None] | None
    ) -> Callable[..., None]:
        """The function `launches(state, words, *bases)`, with its kernels on the device, for bases
        that lie so many bytes behind a multiple of 16."""
        names: dict[str, object] = {"failed": self._failed, "mark": mark}
        of_buffers = [residues[n] + offset for n, offset in places]
        for number in range(len(self._launches)):
            kernel = self._loaded(number, of_buffers)
            names |= {
                f"run{number}": kernel.run,
                f"function{number}": kernel.function,
                f"packed{number}": kernel.packed,
            }
        text = self._text(places, len(residues), mark is not None)
        exec(compile(text, "<tracejit launches>", "exec"), names)
        return names.pop("launches")

    def _text(self, places: Sequence[Place], bases: int, marked: bool) -> str:
        """The text of `launches`. It names the kernels `run0`, `function0`, `packed0`, …"""
        given = ", ".join(("state", "words", *(f"b{n}" for n in range(bases))))
        lines = [
            f"def launches({given}):",
            "    n = -1",
            "    try:",
            "        if words != state.words: state.upload(words)",
            "        stream, work, table = state.stream, state.work, state.table",
            *["        mark()"] * marked,
        ]
        for number, launch in enumerate(self._launches):
            kernel = launch.launch.kernel
            pointers = [_sum(f"b{n}", offset) for n, offset in (places[i] for i in launch.buffers)]
            if kernel.scalars:
                pointers.append(_sum("table", 8 * launch.first_scalar))
            if launch.geometry.workspace:
                pointers.append(_sum("work", launch.workspace))
            names = launch.function.arg_names[len(pointers) :]
            constants = [repr(launch.constants[name]) for name in names]
            head = f"{launch.geometry.grid[0]}, 1, 1, stream, function{number}, packed{number}"
            arguments = ", ".join((head, "None, None, None", *pointers, *constants))
            lines.append(f"        n = {number}")
            lines.append(f"        run{number}({arguments})")
            lines += ["        mark()"] * marked
        lines += [
            "    except Exception as error:",
            "        raise failed(state, n, error) from error",
        ]
        return "\n".join([*lines, ""])

    def _failed(self, state: StreamState, number: int, error: Exception) -> Exception:
        """What to raise where a launch has failed. Its stream starts afresh: counters may not be
        at rest."""
        if self._states.get(state.stream) is state:
            del self._states[state.stream]
        if isinstance(error, CaptureError):
            return error
        return self._error(number, "failed", error)

    def _error(self, number: int, what: str, error: Exception) -> LaunchError:
        name, lines = "the copy of its numbers", []
        if number >= 0:
            launch = self._launches[number]
            name = f"launch {number + 1} of {len(self._launches)} ({launch.source.name})"
            lines = launch.lines()
        shown = ", ".join(lines[:3]) + (", …" if len(lines) > 3 else "")
        return LaunchError(
            where=f"{shown}: " if shown else "",
            step=self.plan.name,
            launch=name,
            what=what,
            device=self.device.properties().name,
            reason=f"{type(error).__name__}: {error}",
        )


class Fitting:
    """Gives the function that launches a plan, with buffers at some places, for bases at some
    addresses: there is one for each way in which they are aligned."""

    def __init__(
        self, plan: LaunchedPlan, places: Sequence[Place], mark: Callable[[], None] | None = None
    ):
        self._plan, self._places, self._mark = plan, places, mark
        self._known: dict[tuple[int, ...], Callable[..., None]] = {}

    def __call__(self, bases: Sequence[int]) -> Callable[..., None]:
        residues = tuple([base % _ALIGNED for base in bases])
        found = self._known.get(residues)
        if found is None:
            found = self._plan.launcher(self._places, residues, self._mark)
            self._known[residues] = found
        return found


def _elsewhere(device: Device, launch: Callable[..., None], *given: object) -> None:
    """Launch from a thread whose current device is another one."""
    with device.entered():
        launch(*given)


def _sum(base: str, offset: int) -> str:
    return f"{base} + {offset}" if offset else base
