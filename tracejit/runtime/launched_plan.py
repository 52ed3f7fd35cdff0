"""A plan on a GPU: its kernels are launched on the caller's current stream.

What a plan works with beside its buffers belongs to one stream: counters and partials of
reductions, and the table of scalars, which is copied there when a number has changed. So calls on
several streams do not meet, and calls on one stream follow each other. The arguments of launches
are built once, with integers for pointers, and patched where an address changes. Kernels are
compiled and brought to the device before anything is written.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from struct import Struct
from weakref import WeakMethod

import torch

from tracejit.errors import CaptureError, LaunchError
from tracejit.ir.torch_types import TO_TORCH
from tracejit.runtime.device import Device, LoadedKernel
from tracejit.runtime.executor import Inlined
from tracejit.runtime.ring import Ring, read_element
from tracejit.runtime.triton_launch import DevicePointer, LoadedLaunch, workspace_bytes
from tracejit.schedule.plan import Plan
from tracejit.schedule.traffic import bytes_moved

MAX_STREAMS = 16  # whose counters and tables are kept; the least recently used go first
_ALIGNED = 16  # bytes: how well Triton wants to know where a pointer points

_OF_GRAPHS: list[torch.Tensor | None] = []  # zeros that graphs of callers copy, as long as they run

_STREAM = 3  # where the stream is among the arguments of a launch

Place = tuple[int, int]  # which of a launcher's bases, and bytes from there


class StreamState:
    """What the launches of a plan work with on one stream."""

    __slots__ = ("stream", "kept", "work", "table", "words", "calls", "_memory", "_copy")

    def __init__(
        self,
        stream: int,
        memory: Sequence[torch.Tensor | None],
        copy: Callable[[torch.Tensor, bytes], None] | None,
        *,
        kept: bool = True,
    ):
        self.stream, self.kept = stream, kept
        self._memory, self._copy = memory, copy
        work, table = memory
        self.work = 0 if work is None else work.data_ptr()
        self.table = 0 if table is None else table.data_ptr()
        self.words: bytes | None = None  # what the table holds
        self.calls: dict[Launcher, Calls] = {}

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
        """The lines of a call. Bases that are not aligned to 16 bytes have a launcher of their
        own."""
        bases = {base: n for n, base in enumerate(dict.fromkeys(base for base, _ in addresses))}
        fitting = Fitting(self, [(bases[base], offset) for base, offset in addresses])
        device, given = self.device, ", ".join(bases)
        names: dict[str, object] = {
            "enter": self._enter,
            "leave": self._leave,
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
        return Inlined(gather, f"{run}; leave(state)", None, names)

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
        self._leave(state)

    def bytes_moved(self) -> tuple[int, ...]:
        """Of each launch, the bytes of unique addresses loaded plus those stored."""
        return bytes_moved(self.plan)

    def lines(self) -> list[tuple[str, ...]]:
        """Of each launch, the user's lines that it computes."""
        return [launch.kernel.lines for launch in self.plan.launches]

    # ---- what belongs to a stream

    def _enter(self) -> StreamState:
        """What the launches work with on the current stream, for one call at a time: a signal
        handler may call the step in the middle of a call."""
        device = self.device
        if device.capturing():
            return self._captured()
        stream = device.current_stream()
        state = self._states.pop(stream, None)
        if state is None:
            copy = None if self._ring is None else self._ring.upload
            state = StreamState(stream, self._memory(), copy)
        return state

    def _leave(self, state: StreamState) -> None:
        """The launches are given. After a failure it is not called: counters may not be at rest."""
        if state.kept:
            self._states[state.stream] = state
            if len(self._states) > MAX_STREAMS:
                self._states.popitem(last=False)

    def _captured(self) -> StreamState:
        """The same in a graph that the caller captures: memory of the graph, which is filled each
        time that it runs. The numbers are those of the capture, as eager's would be."""
        _OF_GRAPHS.append(self._zeros)
        copy = None if self._ring is None else self._ring.upload_captured
        return StreamState(self.device.current_stream(), self._memory(), copy, kept=False)

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
    ) -> Launcher:
        """What launches all, with the kernels on the device, for bases that lie so many bytes
        behind a multiple of 16. The bases are places of `places`; then come `work` and `table`."""
        of_buffers = [residues[n] + offset for n, offset in places]
        work, table = len(residues), len(residues) + 1
        runs, arguments, uses = [], [], [[] for _ in range(len(residues) + 2)]
        for number, launch in enumerate(self._launches):
            loaded = self._loaded(number, of_buffers)
            kernel = launch.launch.kernel
            pointers = [places[i] for i in launch.buffers]
            if kernel.scalars:
                pointers.append((table, 8 * launch.first_scalar))
            if launch.geometry.workspace:
                pointers.append((work, launch.workspace))
            names = launch.function.arg_names[len(pointers) :]
            head = [launch.geometry.grid[0], 1, 1, None, loaded.function, loaded.packed]
            head += [None, None, None]
            for position, (base, offset) in enumerate(pointers, len(head)):
                uses[base].append((number, position, offset))
            runs.append(loaded.run)
            arguments.append([*head, *[0] * len(pointers), *(launch.constants[x] for x in names)])
        return Launcher(runs, arguments, uses, WeakMethod(self._failed), mark)

    def _failed(self, number: int, error: Exception) -> Exception:
        """What to raise where a launch has failed."""
        if isinstance(error, CaptureError):
            return error
        return self._error(number, "failed", error)

    def _error(self, number: int, what: str, error: Exception) -> LaunchError:
        name, lines = "the copy of its numbers", []
        if number >= 0:
            launch = self._launches[number]
            name = f"launch {number + 1} of {len(self._launches)} ({launch.source.name})"
            lines = launch.launch.kernel.lines
        shown = ", ".join(lines[:3]) + (", …" if len(lines) > 3 else "")
        return LaunchError(
            where=f"{shown}: " if shown else "",
            step=self.plan.name,
            launch=name,
            what=what,
            device=self.device.properties().name,
            reason=f"{type(error).__name__}: {error}",
        )


class Calls:
    """The arguments of all launches on one stream, which are patched where an address changes.

    uses: per base, (launch, position, bytes from the base) of each argument that points there.
    """

    __slots__ = ("arguments", "bases", "_uses")

    def __init__(self, arguments: Sequence[list], uses: Sequence[Sequence[tuple]]):
        self.arguments = [[*given] for given in arguments]
        self.bases: tuple[int, ...] = ()  # where they are
        self._uses = uses

    def move(self, bases: tuple[int, ...]) -> None:
        """The bases are at these addresses now."""
        before = self.bases or (None,) * len(bases)
        for old, new, uses in zip(before, bases, self._uses, strict=False):
            if old != new:
                for number, position, offset in uses:
                    self.arguments[number][position] = new + offset
        self.bases = bases

    @classmethod
    def of(cls, state: StreamState, arguments: Sequence[list], uses: Sequence) -> Calls:
        """For the launches on a stream, with its counters and its table in place."""
        calls = cls(arguments, uses)
        for given in calls.arguments:
            given[_STREAM] = state.stream
        for base, place in zip((state.work, state.table), uses[-2:], strict=True):
            for number, position, offset in place:
                calls.arguments[number][position] = base + offset
        return calls


class Launcher:
    """`launcher(state, words, *bases)` brings the scalars over, if they have changed, and gives all
    launches of a plan to the stream of `state`."""

    def __init__(
        self,
        runs: Sequence[Callable[..., None]],
        arguments: Sequence[list],
        uses: Sequence[Sequence[tuple]],
        failed: WeakMethod,  # of the plan, whose streams hold launchers
        mark: Callable[[], None] | None,
    ):
        self._runs, self._arguments, self._uses = runs, arguments, uses
        self._failed, self._mark = failed, mark

    def __call__(self, state: StreamState, words: bytes | None, *bases: int) -> None:
        n, mark = -1, self._mark
        try:
            if words != state.words:
                state.upload(words)
            calls = state.calls.get(self)
            if calls is None:
                calls = state.calls[self] = Calls.of(state, self._arguments, self._uses)
            if bases != calls.bases:
                calls.move(bases)
            if mark is not None:
                mark()
            for run, given in zip(self._runs, calls.arguments):  # noqa: B905  faster
                n += 1
                run(*given)
                if mark is not None:
                    mark()
        except Exception as error:
            raise self._failed()(n, error) from error


class Fitting:
    """Gives the launcher of a plan, with buffers at some places, for bases at some addresses: there
    is one for each way in which they are aligned."""

    def __init__(
        self, plan: LaunchedPlan, places: Sequence[Place], mark: Callable[[], None] | None = None
    ):
        self._plan, self._places, self._mark = plan, places, mark
        self._known: dict[tuple[int, ...], Launcher] = {}

    def __call__(self, bases: Sequence[int]) -> Launcher:
        residues = tuple([base % _ALIGNED for base in bases])
        found = self._known.get(residues)
        if found is None:
            found = self._plan.launcher(self._places, residues, self._mark)
            self._known[residues] = found
        return found


def _elsewhere(device: Device, launch: Launcher, *given: object) -> None:
    """Launch from a thread whose current device is another one."""
    with device.entered():
        launch(*given)
