"""The C executor: a Plan becomes a table of compiled kernels.

Running a plan is one foreign call with one block of bytes: the number of threads, the addresses,
the scalars. What calls the kernels, and the pool of threads that they share, is compiled once for
all plans.
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from tracejit.errors import InvalidGraph
from tracejit.ir.process_groups import Started
from tracejit.runtime.c_compiler import find_compiler, vector_bytes, version
from tracejit.runtime.c_kernels import Kernels
from tracejit.runtime.c_plans import lowered, lowered_anew
from tracejit.runtime.collectives import Collective, Pieces
from tracejit.runtime.executor import CallText, Inlined, Source
from tracejit.runtime.pool import load_pool
from tracejit.schedule.collectives import START
from tracejit.schedule.cpu.plan import Call, CpuPlan
from tracejit.schedule.plan import Plan, runs
from tracejit.schedule.plan_text import communicates
from tracejit.schedule.traffic import bytes_of

ALIGNMENT = 64  # bytes, of scratch memory


class _Launch(ctypes.Structure):
    """struct tj_launch of the pool's source."""

    _fields_ = [
        ("kernel", ctypes.c_void_p),
        ("buffers", ctypes.c_int64),
        ("scalars", ctypes.c_int64),
        ("steps", ctypes.c_int64),
        ("parts", ctypes.c_int64),
        ("span", ctypes.c_int64),
    ]


class _Plan(ctypes.Structure):
    """struct tj_plan of the pool's source."""

    _fields_ = [
        ("addresses", ctypes.c_int64),
        ("launches", ctypes.c_int64),
        ("launch", ctypes.POINTER(_Launch)),
        ("slots", ctypes.POINTER(ctypes.c_int64)),
    ]


class CExecutor:
    """Executes plans on the CPU as compiled C.

    threads: how many threads a call uses, or a function that says so at each call; by default the
        CPUs that this process may run on. Results do not depend on it.

    Raises BackendUnavailable where there is no C compiler.
    """

    name = "c"
    gpu = False

    def __init__(self, threads: int | Callable[[], int] | None = None):
        if threads is None:
            threads = len(os.sched_getaffinity(0))
        self.threads = threads if callable(threads) else lambda: threads
        version(find_compiler())

    def load(self, plan: Plan) -> LoadedCPlan:
        """Compile a plan, or find it in the disk cache."""
        return LoadedCPlan(plan, self.threads)


class LoadedCPlan:
    """A plan as compiled kernels. Calls must not overlap: the memory for them is its own."""

    def __init__(self, plan: Plan, threads: Callable[[], int]):
        with ThreadPoolExecutor(1) as beside, Kernels() as kernels:
            beside.submit(load_pool)
            found = lowered(plan, vector_bytes(), kernels.add)
            try:
                self._collectives = _collectives(plan, found.plan)
                self._kernels = kernels.loaded(found, self._collectives)
            except InvalidGraph:  # a kernel's text in the cache
                found = lowered_anew(plan, vector_bytes(), kernels.add)
                self._collectives = _collectives(plan, found.plan)
                self._kernels = kernels.loaded(found, self._collectives)
        self.plan = found.plan
        self.layout = self.plan.layout(plan.buffers)
        self._threads, self._scalars = threads, len(plan.scalars)
        self._memory = plan.buffers
        self._steps = {b.name: b.step for b in plan.buffers}
        self._position = {name: i for i, name in enumerate(self.plan.addresses(plan.buffers))}
        self._run = load_pool()["tj_run_plan"]
        self._run.restype = None
        self._wake = load_pool()["tj_pool_wake"]
        self._wake.restype = None

    @property
    def sources(self) -> list[Source]:
        """The C function of each call, printed anew: what was compiled, with the users' lines."""
        from tracejit.codegen.c import emit_kernel  # a warm start prints nothing

        functions = {
            name: CallText(kernel.kernel)
            if name in self._collectives
            else emit_kernel(kernel, number)
            for number, (name, kernel) in enumerate(self.plan.kernels.items())
        }
        return [functions[call.kernel] for call in self.plan.calls]

    def bytes_moved(self) -> list[int]:
        """Of each call, the bytes of unique addresses loaded plus those stored."""
        totals = []
        for call in self.plan.calls:
            kernel = self.plan.kernels[call.kernel]
            memory = dict(zip((b.name for b in kernel.bound), call.buffers, strict=True))
            parts = [k.kernel for k in (kernel, kernel.columns) if k is not None]
            once = bytes_of([(one, memory) for one in parts], self._memory)
            totals.append(once * self.plan.times(call) * self.plan.parts_of(call))
        return totals

    def lines(self) -> list[tuple[str, ...]]:
        """Of each call, the user's lines that it computes."""
        kernels = (self.plan.kernels[call.kernel] for call in self.plan.calls)
        parts = ((k.kernel, *([] if k.columns is None else [k.columns.kernel])) for k in kernels)
        return [tuple(dict.fromkeys(x for one in some for x in one.lines)) for some in parts]

    def timed(self, addresses: Sequence[int], scalars: Sequence[float]) -> list[float]:
        """Run each call alone, in their order; the seconds that each took."""
        as_given = [(i, 0) for i in range(self.layout.count)]
        moves = [self._steps.get(name, 0) for name in self._position]
        seconds: list[float] = []
        under_way: dict[int, Started] = {}
        for together in runs(self.plan.calls, lambda call: call.loop):
            if together[0].kernel in self._collectives:
                seconds.append(self._communicate(together[0], addresses, under_way))
                continue
            tables = [self._table([call], as_given, once=True) for call in together]
            spent = [0.0] * len(together)
            for step in range(self.plan.times(together[0])):
                moved = [a + step * move for a, move in zip(addresses, moves, strict=True)]
                for k, table in enumerate(tables):
                    words = table.pack(0, self._threads(), *moved, *scalars)
                    started = time.perf_counter()
                    self._run(table.at, words)
                    spent[k] += time.perf_counter() - started
            seconds += spent
        return seconds

    def _table(
        self,
        calls: Sequence[Call],
        places: Sequence[tuple[int, int]],
        count: int | None = None,
        once: bool = False,
    ) -> _Table:
        """What a run of some calls does, for words with `count` addresses, of which each of the
        layout's is one, and bytes from there. `once`: one step of loops."""
        slots: list[int] = []
        works = dict(self.plan.working)
        for call in calls:
            at = places[self._position[call.working or call.buffers[0]]]
            slots += (*at, 0, works.get(call.working, 0))
            for name, further in call.moves:
                slots += (*places[self._position[name]], self._steps.get(name, 0), further)
            slots += call.scalars
        launches = []
        for together in runs(calls, lambda call: call.loop):
            steps = 1 if once else self.plan.times(together[0])
            turns = [(steps, self.plan.parts_of(together[0]), len(together))]
            turns += [(1, 1, 1)] * (len(together) - 1)
            for call, turn in zip(together, turns, strict=True):
                address = self._kernels[call.kernel].address
                launches.append((address, len(call.buffers), len(call.scalars), *turn))
        if count is None:
            count = max((n for n, _ in places), default=-1) + 1
        return _Table(count, self._scalars, launches, slots)

    def expect(self) -> None:
        """A call will come soon: wake the threads that share it."""
        if self._threads() > 1:
            self._wake()

    def inlined(self, addresses: Sequence[tuple[str, int]], scalars: Sequence[str]) -> Inlined:
        """The lines of a call. C code is not interrupted, and says in the first word that it ran.
        Each call has words of its own: a signal handler may call the step before they are used."""
        bases = {base: n for n, base in enumerate(dict.fromkeys(base for base, _ in addresses))}
        places = [(bases[base], offset) for base, offset in addresses]
        if self._collectives:
            return self._in_pieces(bases, places, scalars)
        table = self._table(self.plan.calls, places)
        given = "".join(f", {x}" for x in (*bases, *scalars))
        names = {
            "pack": table.pack,
            "threads": self._threads,
            "run": self._run,
            "at": table.at,
            "loaded": (self, table),  # whose memory is used
        }
        return Inlined([f"words = pack(0, threads(){given})"], "run(at, words)", "words[0]", names)

    # ---- collectives

    def _in_pieces(
        self, bases: Mapping[str, int], places: Sequence[tuple[int, int]], scalars: Sequence[str]
    ) -> Inlined:
        """The lines of a call whose launches are not all C: between them ranks communicate."""
        steps: list[tuple] = []
        calls: list[Call] = []
        for call in (*self.plan.calls, None):
            collective = None if call is None else self._collectives.get(call.kernel)
            if call is not None and collective is None:
                calls.append(call)
                continue
            if calls:
                steps.append((None, self._table(calls, places, len(bases))))
                calls = []
            if collective is not None:
                steps.append((collective, [places[self._position[x]] for x in call.buffers]))
        pieces = Pieces(steps, len(bases), self._run)
        given = "".join(f", {x}" for x in (*bases, *scalars))
        names = {
            "begin": pieces.begin,
            "drive": pieces.drive,
            "has_run": pieces.ran,
            "threads": self._threads,
            "loaded": (self, pieces),
        }
        gather = [f"words = begin(threads(){given})"]
        return Inlined(gather, "drive(words)", "has_run(words)", names)

    def _communicate(
        self, call: Call, addresses: Sequence[int], under_way: dict[int, Started]
    ) -> float:
        """Make one half of a collective; the seconds that it took."""
        collective = self._collectives[call.kernel]
        started = time.perf_counter()
        if collective.phase == START:
            at = [addresses[self._position[name]] for name in call.buffers]
            under_way[collective.key] = collective.start(at)
        else:
            under_way.pop(collective.key).wait()
        return time.perf_counter() - started


def _collectives(plan: Plan, lowered: CpuPlan) -> dict[str, Collective]:
    """The kernels of a lowered plan that are collectives, by name."""
    if not communicates(plan):
        return {}
    kernels = {name: kernel.kernel for name, kernel in lowered.kernels.items()}
    return {
        name: Collective.of(kernel)
        for name, kernel in kernels.items()
        if kernel.call is not None and kernel.call.is_collective
    }


class _Table:
    """struct tj_plan with what it points to; `pack` makes the words of a call."""

    def __init__(
        self, addresses: int, scalars: int, calls: list[tuple[int, ...]], slots: list[int]
    ):
        self._memory = (
            (_Launch * len(calls))(*calls),
            (ctypes.c_int64 * len(slots))(*slots),
        )
        self._plan = _Plan(addresses, len(calls), *self._memory)
        self.at = ctypes.c_void_p(ctypes.addressof(self._plan))
        self.pack = struct.Struct(f"2q{addresses}Q{scalars}d").pack
