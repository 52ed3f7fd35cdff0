"""A plan on a GPU: its kernels are launched on the caller's current stream.

What a plan works with beside its buffers belongs to one stream: counters and partials of
reductions, and the table of scalars, which is copied there when a number has changed. So calls on
several streams do not meet, and calls on one stream follow each other. The arguments of launches
are built once, with integers for pointers, and patched where an address changes. Kernels are
compiled and brought to the device before anything is written.
"""

from __future__ import annotations

import ctypes
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from struct import Struct
from weakref import WeakMethod

import numpy as np
import torch

from tracejit import knobs
from tracejit.codegen.triton_indirect import indirect
from tracejit.errors import OF_RANKS, CaptureError, GraphError, LaunchError, TracejitWarning
from tracejit.ir.torch_types import TO_TORCH
from tracejit.runtime import waiting
from tracejit.runtime.collectives import Collective, Half
from tracejit.runtime.device import Device, LoadedKernel
from tracejit.runtime.executor import Inlined
from tracejit.runtime.foreach import Constant, both, launches_of, placed, table_of
from tracejit.runtime.graphs import Give, Maker, stretches
from tracejit.runtime.launchers import ALIGNED, OF_GRAPHS, Fitting, weakly
from tracejit.runtime.launches import (
    COPY,
    GRAPH,
    MANY,
    Launches,
    Picked,
    Place,
    StreamState,
    packing,
)
from tracejit.runtime.many_steps import Many
from tracejit.runtime.ring import Ring, read_element
from tracejit.runtime.triton_launch import (
    DevicePointer,
    LoadedLaunch,
    memory_bytes,
    workspace_bytes,
)
from tracejit.runtime.triton_source import import_source
from tracejit.schedule.memory import layout_of
from tracejit.schedule.plan import Plan
from tracejit.schedule.traffic import bytes_moved

MAX_STREAMS = 16  # whose counters and tables are kept; the least recently used go first
MIN_LAUNCHES = 3  # of a graph: fewer are given to a stream as fast one by one
_NAMES = {COPY: "the copy of its numbers", GRAPH: "the CUDA graph", MANY: "that of many calls"}
_ELEMENT = re.compile(r"(\w+)\[(\d+)\]")  # an expression of a list's element


class LaunchedPlan:
    """A plan whose kernels are on their device; `sources` holds one Source per launch."""

    def __init__(
        self,
        plan: Plan,
        launches: Sequence[LoadedLaunch],
        device: Device,
        phases: Callable[[Sequence[bool]], LoadedLaunch | None],
    ):
        self.plan, self.device = plan, device
        self._phases = phases
        self.layout = layout_of(plan)
        if device.capturing():
            raise CaptureError(
                reason=f"step {plan.name!r} has not been compiled for these arguments yet",
                remedy="Call it a few times before it is captured",
            )
        self.sources = tuple(launch.source for launch in launches)
        self._ran = [launch.geometry.grid[0] > 0 for launch in launches]
        self.launched = [one for one, ran in zip(launches, self._ran, strict=True) if ran]
        self._slots = [slot for launch in plan.launches for slot in launch.scalars]
        self._pack = Struct(f"{len(self._slots)}d").pack
        self._states: OrderedDict[int, StreamState] = OrderedDict()
        self._work_bytes = workspace_bytes(self.launched)
        self._tables = {  # the buffers whose addresses each foreach finds in the table
            n: table_of(x) for n, x in enumerate(self.launched) if x.launch.kernel.foreach
        }
        words = sum(len(table) + len(table) % 2 for table in self._tables.values())
        self._table_bytes = 8 * (words + len(self._slots))
        self._ring = Ring(device, self._table_bytes) if self._table_bytes else None
        self._zeros: torch.Tensor | None = None
        if self._work_bytes:
            self._zeros = device.pinned(self._work_bytes)
            ctypes.memset(self._zeros.data_ptr(), 0, self._work_bytes)
        self.read = partial(_read, device)
        self._kernels: dict[tuple, LoadedKernel] = {}
        self._under_way: dict[int, list] = {}  # collectives that were started
        self._indirect: dict[str, object] = {}  # kernels with addresses in memory, by name
        self._graphs = MIN_LAUNCHES if knobs.graphs() else 0  # launches of the least that is one
        self._required, self._why_not = False, ""
        calls = [launch.launch.kernel.call for launch in self.launched]
        self._halves = frozenset(n for n, call in enumerate(calls) if call is not None)
        for number in range(len(self.launched)):
            if number not in self._tables:
                self._loaded(number, [b.offset if b.kind == "arena" else 0 for b in plan.buffers])
            else:
                self._rows(number, [0] * len(plan.buffers))

    # ---- running

    def inlined(self, addresses: Sequence[tuple[str, int]], scalars: Sequence[str]) -> Inlined:
        """The lines of a call. Bases that are not aligned to 16 bytes have a launcher of their
        own."""
        kinds = {base: b.kind for (base, _), b in zip(addresses, self.plan.buffers, strict=True)}
        own = [base for base, kind in kinds.items() if kind != "input"]
        given = [base for base, kind in kinds.items() if kind == "input"]
        lists: dict[str, list[str]] = {}  # whose elements are bases
        for base in given:
            if found := _ELEMENT.fullmatch(base):
                lists.setdefault(found[1], []).append(base)
        picked = dict.fromkeys(base for elements in lists.values() for base in elements)
        order = [*picked, *(base for base in given if base not in picked), *own]
        bases = {base: n for n, base in enumerate(order)}
        fitting = Fitting(self, [(bases[base], offset) for base, offset in addresses])
        names: dict[str, object] = {
            "enter": self._enter,
            "leave": self._leave,
            "fitting": fitting,
            "here": self.device.here,
            "elsewhere": partial(_elsewhere, self.device),
        }
        terms = []
        for i, (name, elements) in enumerate(lists.items()):
            terms.append(f"*pick{i}({name})")
            names[f"pick{i}"] = Picked([int(_ELEMENT.fullmatch(x)[2]) for x in elements])
        near = _tuple([*terms, *order[len(picked) : len(order) - len(own)]])
        gather = [f"near = {near}", "launch = fitting(near)", "state = enter()"]
        words = "None"
        if self._slots:
            given = [scalars[slot] for slot in self._slots]
            words, names["pack"] = "words", packing(given)
            gather.append(f"words = pack({', '.join(dict.fromkeys(given))})")
        gather.append(f"bases = {_tuple(['*near', *own])}")
        gather.append(f"runner = launch(state, {words}, bases)")
        call = f"runner(state, {words}, bases)"
        away = f"elsewhere(runner, state, {words}, bases)"
        run = f"{call} if here() == {self.device.number} else {away}; leave(state)"
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
        count = len(addresses)
        launch = Fitting(self, [(i, 0) for i in range(count)], mark)(tuple(addresses))
        state = self._enter()
        words = self._pack(*(scalars[slot] for slot in self._slots)) if self._slots else None
        give = launch(state, words, tuple(addresses))
        _elsewhere(self.device, give, state, words, tuple(addresses))
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
        if self._why_not:
            raise self._no_graph(self._why_not)
        stream = device.current_stream()
        state = self._states.pop(stream, None)
        if state is None:
            copy = None if self._ring is None else self._ring.upload
            state = StreamState(stream, self._memory(self._table_bytes), copy)
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
        if self._halves:
            raise CaptureError(
                reason=f"step {self.plan.name!r} has collectives, before which the ranks compare "
                "on the CPU what they are about to do",
                remedy="Call it outside of the capture: its kernels between collectives are graphs",
            )
        OF_GRAPHS.append(self._zeros)
        copy = None if self._ring is None else self._ring.upload_captured
        memory = self._memory(self._table_bytes)
        return StreamState(self.device.current_stream(), memory, copy, kept=False)

    def _memory(self, table_bytes: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Fresh memory for counters and partials, at 0, and for a table."""
        device, work, table = self.device, None, None
        if self._work_bytes:
            work = device.allocate(self._work_bytes)
            device.upload(work, self._zeros)
        if table_bytes:
            table = device.allocate(table_bytes)
        return work, table

    # ---- graphs

    def require_graph(self) -> None:
        """Every call is to be one graph, however few its launches are, once it is warm."""
        if self._halves:
            raise self._no_graph("it has collectives, and is a graph for each stretch between them")
        if not self._graphs:
            raise self._no_graph("TRACEJIT_GRAPHS=0 turns graphs off")
        self._graphs, self._required = 1, True

    def _no_graph(self, reason: str) -> GraphError:
        return GraphError(step=self.plan.name, reason=reason)

    def _refused(self, error: Exception) -> None:
        """A graph could not be made: nor is it tried again. Where there must be one, this call is
        refused, and so are later ones."""
        reason = str(error.__cause__ or error)
        if self._required:
            self._why_not = reason
            raise self._no_graph(reason) from error
        if not self._graphs:
            return  # it was said
        self._graphs = 0
        text = f"tracejit: step {self.plan.name!r} is launched kernel by kernel, as no CUDA graph "
        warnings.warn(TracejitWarning(f"{text}could be made of it: {reason}"), stacklevel=2)

    def maker(self, places: Sequence[Place], residues: Sequence[int]) -> Maker | None:
        """What makes graphs of the launches; None where they stay launches."""
        stretch = max(
            (b - a for a, b, kernels in stretches(len(self.launched), self._halves) if kernels),
            default=0 if self._halves else len(self.launched),
        )
        if not 0 < self._graphs <= stretch:
            return None
        written: dict[int, int] = {}
        fresh, inputs = set(), set()
        for buffer, (base, offset) in zip(self.plan.buffers, places, strict=True):
            if buffer.kind == "output":
                fresh.add(base)
            elif buffer.name in self.plan.writes and memory_bytes(buffer):
                written[base] = max(written.get(base, 0), offset + memory_bytes(buffer))
            elif buffer.kind == "input":
                inputs.add(base)
        direct = [
            i for n, x in enumerate(self.launched) for i in x.buffers if n not in self._tables
        ]
        tabled = {i for table in self._tables.values() for i in table}.difference(direct)
        free = {places[i][0] for i in tabled} - {places[i][0] for i in direct}
        fresh |= free  # these may move: nothing but tables points there
        return Maker(
            self.device,
            partial(weakly(self.launches), places, residues),
            weakly(self._memory),
            8 * len(self._slots),
            written,
            frozenset(fresh),
            frozenset(inputs),
            self._halves,
            WeakMethod(self.failed),
            weakly(self._refused),
        )

    def many(self, places: Sequence[Place], residues: Sequence[int], calls: int) -> Many | None:
        """What launches many calls at once, whose bases lie so many bytes behind a multiple of 16;
        None where plain launches are as good."""
        if self._halves or self.device.capturing():
            return None
        lies = [residues[n] + offset for n, offset in places]
        launch = self._phases([at % ALIGNED == 0 for at in lies])
        if launch is None:
            return None
        slots = [self._slots.index(slot) for slot in launch.launch.scalars]
        return Many.of(self.device, launch, places, slots, calls, weakly(self._failed_together))

    def _failed_together(self, error: Exception) -> Exception:
        return self._error(MANY, "failed", error)

    # ---- functions

    def _loaded(
        self, number: int, residues: Sequence[int], through: frozenset[int] = frozenset()
    ) -> LoadedKernel:
        """The kernel of a launch, for buffers that lie so many bytes behind a multiple of 16; it
        loads the addresses of the buffers `through` from a table."""
        launch = self.launched[number]
        kernel = launch.launch.kernel
        if kernel.call is not None:
            half = Half(Collective.of(kernel), self.device, self._under_way)
            return LoadedKernel(half, None, None)
        aligned = [residues[i] % ALIGNED == 0 for i in launch.buffers]
        pointers = [
            DevicePointer(residues[i] % ALIGNED, TO_TORCH[buffer.dtype])
            for i, buffer in zip(launch.buffers, kernel.buffers, strict=True)
        ]
        given: list[bool | None] = []
        if through:
            pointers = [pointer for i, pointer in enumerate(pointers) if i not in through]
            pointers.insert(0, DevicePointer(0, torch.int64))
            given = [x if i in through else None for i, x in enumerate(aligned)]
        return self._kernel(number, (*aligned, through), launch, pointers, given)

    def _rows(
        self, number: int, residues: Sequence[int]
    ) -> list[tuple[LoadedLaunch, LoadedKernel, np.ndarray]]:
        """The launches of a foreach with their kernels and chunks, for buffers that lie so."""
        found = []
        table = [residues[i] for i in self._tables[number]]
        for launch, chunks in launches_of(self.launched[number], table):
            key = (launch.constants["WIDE"], len(chunks))
            tables = [DevicePointer(0, torch.int64), DevicePointer(0, torch.int64)]
            found.append((launch, self._kernel(number, key, launch, tables), chunks))
        return found

    def _kernel(
        self,
        number: int,
        key: tuple,
        launch: LoadedLaunch,
        pointers: list[DevicePointer],
        through: Sequence[bool | None] = (),
    ) -> LoadedKernel:
        """A kernel on the device, for these pointers and those behind them: once for a key."""
        if launch.launch.kernel.scalars:
            pointers.append(DevicePointer(8 * launch.first_scalar, torch.float64))
        if launch.geometry.workspace:
            pointers.append(DevicePointer(launch.workspace, torch.int8))
        key = number, *key, *[p.address % ALIGNED == 0 for p in pointers]
        if key not in self._kernels:
            if self.device.capturing():
                raise CaptureError(
                    reason=f"the kernels of step {self.plan.name!r} for arguments that are aligned "
                    "like these are not on the device yet",
                    remedy="Call it with them before it is captured",
                )
            try:
                launch = self._with_table(launch, through) if through else launch
                self._kernels[key] = self.device.load(launch, pointers)
            except Exception as error:
                raise self._error(number, "could not be loaded", error) from error
        return self._kernels[key]

    def _with_table(self, launch: LoadedLaunch, aligned: Sequence[bool | None]) -> LoadedLaunch:
        """A launch whose kernel loads addresses from a table: see `indirect`."""
        source = indirect(launch.seen, launch.function.arg_names, aligned)
        function = self._indirect.get(source.name)
        if function is None:
            function = self._indirect[source.name] = import_source(source)
        through = tuple([(i, x) for i, x in enumerate(aligned) if x is not None])
        return replace(launch, source=source, seen=source, function=function, through=through)

    def launches(
        self, places: Sequence[Place], residues: Sequence[int], moved: frozenset[int] = frozenset()
    ) -> Launches:
        """All launches, with the kernels on the device, for bases that lie so many bytes behind a
        multiple of 16; those that have `moved` are found through the table. The bases are places
        of `places`; then come counters and partials, and the table."""
        of_buffers = [residues[n] + offset for n, offset in places]
        work, table, same = (len(residues) + n for n in range(3))
        runs, arguments, uses = [], [], [[] for _ in range(len(residues) + 3)]
        throughs = [
            frozenset([k for k, i in enumerate(launch.buffers) if places[i][0] in moved])
            if number not in self._halves and number not in self._tables
            else frozenset()
            for number, launch in enumerate(self.launched)
        ]
        counts = [len(x) for x in (*throughs, *self._tables.values())]
        words = sum(count + count % 2 for count in counts)
        listed: list[Place] = []
        constant = Constant()

        def give(number: int, launch: LoadedLaunch, at: list[Place], loaded: LoadedKernel) -> None:
            """Append a launch to what is given for its number."""
            kernel, pointers = launch.launch.kernel, [*at]
            if kernel.scalars:
                pointers.append((table, 8 * (words + launch.first_scalar)))
            if launch.geometry.workspace:
                pointers.append((work, launch.workspace))
            first = 2 if kernel.foreach else len(kernel.buffers)
            first += bool(kernel.scalars) + bool(launch.geometry.workspace)
            names = () if kernel.call is not None else launch.function.arg_names[first:]
            head = [launch.geometry.grid[0], 1, 1, None, loaded.function, loaded.packed]
            head += [None, None, None]
            given = arguments[number]
            for position, (base, offset) in enumerate(pointers, len(given) + len(head)):
                uses[base].append((number, position, offset))
            given += [*head, *[0] * len(pointers), *(launch.constants[x] for x in names)]

        for number, (launch, through) in enumerate(zip(self.launched, throughs, strict=True)):
            arguments.append([])
            at, here = (table, 8 * len(listed)), [*launch.buffers]
            if number in self._tables:
                found, splits = self._rows(number, of_buffers), []
                for one, loaded, chunks in found:
                    splits.append(len(arguments[number]))
                    give(number, one, [at, (same, constant.add(chunks))], loaded)
                kernels = [loaded.run for _, loaded, _ in found]
                runs.append(both(*kernels, splits[1]) if len(kernels) > 1 else kernels[0])
                near = self._tables[number]
            else:
                loaded = self._loaded(number, of_buffers, through)
                pointers = [places[i] for k, i in enumerate(here) if k not in through]
                give(number, launch, [at] * bool(through) + pointers, loaded)
                runs.append(loaded.run)
                near = [i for k, i in enumerate(here) if k in through]
            listed += [places[i] for i in near]
            listed += listed[-1:] * (len(near) % 2)  # so that each part is aligned
        return Launches(
            tuple(runs),
            tuple(arguments),
            tuple(uses),
            tuple(listed),
            constant.pinned(self.device),
            partial(placed, self.device),
        )

    def failed(self, number: int, error: Exception) -> Exception:
        """What to raise where a launch has failed."""
        if isinstance(error, (CaptureError, *OF_RANKS)):
            return error
        return self._error(number, "failed", error)

    def _error(self, number: int, what: str, error: Exception) -> LaunchError:
        name, lines = _NAMES.get(number), []
        if name is None:
            launch = self.launched[number]
            name = f"launch {number + 1} of {len(self.launched)} ({launch.source.name})"
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


def _read(device: Device, tensor: torch.Tensor) -> float | int | bool:
    """The one element of a tensor, which calls that wait may compute."""
    if waiting.active:
        waiting.launch()
    return read_element(device, tensor)


def _tuple(terms: Sequence[str]) -> str:
    """An expression of a tuple; it is the only term's own where that is one."""
    if len(terms) == 1 and terms[0].startswith("*"):
        return terms[0][1:]
    return f"({''.join(f'{x}, ' for x in terms)})"


def _elsewhere(device: Device, give: Give, *given: object) -> None:
    """Launch from a thread whose current device is another one."""
    with device.entered():
        give(*given)
