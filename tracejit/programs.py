"""The programs of one compiled step: captured graphs through passes and schedule to an executor.

    Captured → passes → schedule → load → Compiled

A program serves every capture with the same graph, alignment of inputs, and executor.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FunctionType

import torch

from tracejit import knobs
from tracejit.capture.effects.captured import Captured, Checks, Key, graph_key
from tracejit.capture.effects.eager import EagerCost
from tracejit.capture.effects.effects import Call
from tracejit.capture.literals import Literals
from tracejit.errors import TracejitError, UnsupportedOperation
from tracejit.ir.graph import Graph, verify
from tracejit.options import Options
from tracejit.parts import Parts, Stages
from tracejit.passes import optimize
from tracejit.progress import stage, telling
from tracejit.run import Hooks, Run, generate
from tracejit.runtime.cache import DiskCache, digest_of
from tracejit.runtime.executor import Executor
from tracejit.runtime.memory import Memory
from tracejit.runtime.program import Program
from tracejit.runtime.select import executor_for
from tracejit.schedule import schedule
from tracejit.schedule.plan import Plan

MAX_PROGRAMS = 64  # per step; the least recently used goes first
_MANY_COUNTS = 4  # from so many numbers of found elements on, at one place, it is said


@dataclass
class Stats:
    """Counters of one compiled step. `seconds` has the total per stage."""

    traces: int = 0  # times the Python body ran
    compiles: int = 0  # programs built
    replays: int = 0  # calls served without running the Python body
    retraces: int = 0  # calls that an armed replay did not accept, and no other did
    reruns: int = 0  # calls that ran the Python body on a program built before
    cuts: int = 0  # values that Python reads in a call, of the replay armed last
    branches: int = 0  # replays that decide by such values
    eager: int = 0  # calls that ran as the plain function, uncompiled
    cache_hits: int = 0  # plans found in the disk cache
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, stage: str, started: float) -> None:
        """Count the time since `started` (of perf_counter)."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


@dataclass
class Compiled:
    """A program with the graphs that it came from."""

    key: tuple
    program: Program
    final: Graph
    backwards: list[Backward] = field(default_factory=list)
    names: tuple[str, ...] = ()  # of the graph's inputs, as the user's code calls them
    backend: str = ""  # the executor's
    eager: EagerCost = EagerCost()  # of the captured step that it was built for
    runs: dict[tuple, Run] = field(default_factory=dict)  # captured key, in part -> what calls do
    checking: Checking | None = None  # runs before it
    seen: dict[Key, int] = field(default_factory=dict)  # captured key -> times traced
    parts: dict[tuple, Parts] = field(default_factory=dict)  # the program in segments
    used: int = 0  # when it ran last
    kept: bool = True  # until there are too many

    def run_of(self, captured: Captured, hooks: Hooks) -> Run:
        """What traced calls of a captured step do."""
        key = captured.key.graph, captured.key.effects
        run = self.runs.get(key)
        if run is None:
            parts = self.program, self.final, self.backwards, hooks
            run = generate(captured, *parts, checking=self.checking)
            _put(self.runs, key, run)
        return run

    def traced(self, captured: Captured) -> int:
        """How often the same was captured, this time included."""
        count = self.seen.pop(captured.key, 0) + 1
        _put(self.seen, captured.key, count)
        return count


def _put(bounded: dict, key: object, value: object) -> None:
    """Add an item; the oldest one goes when there are too many."""
    bounded[key] = value
    if len(bounded) > MAX_PROGRAMS:
        del bounded[next(iter(bounded))]


class Backward:
    """The backward graph of a returned tensor. It is compiled at the first backward."""

    def __init__(self, programs: Programs, graph: Graph, executor: Executor):
        self.programs, self.graph, self.executor = programs, graph, executor
        self.program: Program | None = None
        self._function: Callable[[list], list[torch.Tensor]] | None = None
        self.lock = threading.Lock()

    def __call__(self, inputs: list) -> list[torch.Tensor]:
        with self.lock:
            self.build()
            return self._function(inputs)

    def build(self) -> None:
        """Compile it, unless that is done."""
        if self.program is None:
            self.program, _ = self.programs.build(
                self.graph, self.executor, Memory(), " of backward"
            )
            self._function = self.program.function()


class Checking:
    """The checks of a captured step: one flag tells whether any fails. Only when one does, a second
    program is built, which tells what fails."""

    def __init__(self, programs: Programs, checks: Checks, executor: Executor):
        self._programs, self._checks, self._executor = programs, checks, executor
        flag = self._program(replace(checks.graph, results=checks.graph.results[:1]))
        self.program, self._failed, self._read = flag, flag.function(), flag.read
        self._found: Callable[[list], list[torch.Tensor]] | None = None

    def _program(self, graph: Graph) -> Program:
        return self._programs.build(graph, self._executor, Memory(), " of checks")[0]

    def __call__(self, inputs: list, errors: Sequence[TracejitError]) -> None:
        """Raise the first error whose check fails."""
        if not self._read(self._failed(inputs)[0]):
            return
        if self._found is None:
            self._found = self._program(self._checks.graph).function()
        raise self._checks.refusal(self._found(inputs), errors)


class Programs:
    """Finds or builds the program of a captured step.

    dropped: called with what is forgotten when there are more than MAX_PROGRAMS.
    """

    def __init__(
        self,
        function: FunctionType,
        stats: Stats,
        options: Options,
        dropped: Callable[[Compiled], None],
    ):
        self._kept: dict[tuple, Compiled] = {}
        self._uses = 0
        self.name = function.__name__ if function.__name__.isidentifier() else "step"
        self.stats, self.options, self.dropped = stats, options, dropped
        self._where = f"{function.__code__.co_filename}:{function.__code__.co_firstlineno}"
        self._literals = Literals()
        self._memory = Memory()  # of all programs that run in calls of the step
        self._counts: dict[tuple, set[int]] = {}  # by place and search: how much was found there
        self.varying = ""  # where that varies much, and what to do
        part = weakref.WeakMethod(self.part)
        self._stages = Stages(lambda graph, what: part()(graph, what))

    def report(self, what: str) -> None:
        """Print what happens, under TRACEJIT_DEBUG."""
        if knobs.debug() >= 1:
            print(f"tracejit: {self.name}: {what}")

    @property
    def kept(self) -> list[Compiled]:
        """The programs that there are, the one used last at the end."""
        return sorted(self._kept.values(), key=lambda x: x.used)

    def used(self, compiled: Compiled) -> None:
        """A program has run."""
        self._uses += 1
        compiled.used = self._uses

    def find(
        self, captured: Captured, call: Call, names: Callable[[Captured, Call], tuple[str, ...]]
    ) -> tuple[Compiled, Captured]:
        """The program of a captured step. Where its graph's varying literals become scalars, it is
        another captured step, and the scalars of the call grow. `names` names the graph's inputs
        where a program is built."""
        executor = self._executor(captured.graph)
        aligned = tuple([t.data_ptr() % 16 == 0 for t in call.reals])
        backward = tuple(graph_key(node.graph) for node in captured.effects.outside)
        checks = None if captured.checks is None else graph_key(captured.checks.graph)
        key = (captured.key.graph, backward, aligned, executor, checks)
        found = self._kept.get(key)
        if found is None:
            general = self._literals.generalize(captured)
            if general is not None:
                captured, more = general
                call.scalars.extend(more)
                key = (captured.key.graph, *key[1:])
                found = self._kept.get(key)
        if found is not None:
            self.used(found)
            self.stats.reruns += 1
            return found, captured
        backwards = [Backward(self, node.graph, executor) for node in captured.effects.outside]
        named = names(captured, call)
        self._note_counts(captured)
        built = self.build(captured.graph, executor, self._memory, names=named)
        made = executor.name, captured.eager
        compiled = Compiled(key, *built, backwards, named, *made)
        if not compiled.program.computes:  # nobody will call them
            for backward in backwards:
                backward.build()
                backward.program.rehearse()
        if captured.checks is not None:
            compiled.checking = Checking(self, captured.checks, executor)
        self._kept[key] = compiled
        self.used(compiled)
        while len(self._kept) > MAX_PROGRAMS:
            dropped = self._kept.pop(self.kept[0].key)
            dropped.kept = False
            self.dropped(dropped)
        return compiled, captured

    def _note_counts(self, captured: Captured) -> None:
        """Take note of how much the cuts of a new program have found."""
        for cut in captured.cuts:
            if cut.search is None or self.varying:
                continue
            counts = self._counts.setdefault((cut.where, cut.search), set())
            counts.add(cut.count)
            if len(counts) >= _MANY_COUNTS:
                so_far = ", ".join(map(str, sorted(counts)))
                self.varying = (
                    f"makes a plan for each number of elements that it finds at {cut.where} "
                    f"({so_far} so far). {cut.search.remedy}"
                )

    def parts(self, compiled: Compiled, captured: Captured, cuts: Sequence[int]) -> Parts | None:
        """A captured step in segments that end with some of its cuts."""
        if not cuts:
            return None
        key = captured.key, tuple(cuts)
        found = compiled.parts.get(key)
        if found is None:
            found = self._stages.parts_of(captured, cuts)
            if not found.program.computes:  # nobody will run them
                for stage in found.stages:
                    stage.build()
            _put(compiled.parts, key, found)
        return found

    def part(self, graph: Graph, what: str) -> Program:
        """The program of a part of a step."""
        return self.build(graph, self._executor(graph), self._memory, what, counted=False)[0]

    def build(
        self,
        graph: Graph,
        executor: Executor,
        memory: Memory,
        what: str = "",
        names: tuple[str, ...] = (),
        *,
        counted: bool = True,
    ) -> tuple[Program, Graph]:
        """A program for a graph, and the final form of the graph. `names` are its inputs';
        what is not `counted` is a part of a step."""
        with telling(self.name):
            stage("passes")
            final = self._optimized(graph)
            stage("schedule")
            plan = self._plan(final)
            started = time.perf_counter()
            stage("load", f"of {len(plan.launches)} launches for {executor.name}")
            program = Program(plan, executor, memory, require_graph=self.options.require_graph)
        self.stats.add("load", started)
        self.stats.compiles += counted
        self.report(f"compiled {len(plan.launches)} launch(es){what} for {executor.name}")
        if knobs.debug() >= 4:
            for source in program.loaded.sources:
                print(source.text)
        self._dump(graph, final, program, names)
        return program, final

    def _optimized(self, graph: Graph) -> Graph:
        started = time.perf_counter()
        if knobs.verify():
            verify(graph)

        def on_pass(name: str, result: Graph) -> None:
            if knobs.debug() >= 5:
                print(f"# after {name}\n{result}")

        final = optimize(graph, on_pass)
        self.stats.add("passes", started)
        if knobs.debug() >= 3:
            print(final)
        return final

    def _plan(self, graph: Graph) -> Plan:
        """The schedule of a graph, from the disk cache when it is there."""
        from tracejit.schedule.plan_text import parse_plan

        started = time.perf_counter()
        cache = DiskCache()
        made_by = digest_of("ir", "passes", "schedule")
        fuse, again = self.options.fuse, self.options.remat == "auto"
        key = f"{made_by} fuse={fuse} again={again}\n{graph}"
        text = cache.get("plan", key)
        plan = None
        if text is not None:
            try:
                plan = parse_plan(text)
                self.stats.cache_hits += 1
            except TracejitError:
                plan = None  # written by another version: rebuilt below
        if plan is None:
            plan = schedule(graph, fuse=fuse, again=again)
            cache.put("plan", key, str(plan))
        self.stats.add("schedule", started)
        return plan

    def _executor(self, graph: Graph) -> Executor:
        devices = {p.value.type.device for p in graph.params}
        devices = (devices | {n.out.type.device for n in graph.nodes}) - {"host"}
        if len(devices) > 1:
            raise UnsupportedOperation(
                where=self._where,
                function="a step over several devices",
                shapes=", ".join(sorted(devices)),
                remedy="Move every tensor that the step uses to one device.",
            )
        device = devices.pop() if devices else "cpu"
        if device.partition(":")[0] not in ("cpu", "cuda"):
            raise UnsupportedOperation(
                where=self._where,
                function="a step on another device than the CPU and CUDA's",
                shapes=f"tensors on {device}",
                remedy="Move them to one of these.",
            )
        return executor_for(self.options.backend, device, torch.get_float32_matmul_precision())

    def _dump(self, raw: Graph, final: Graph, program: Program, names: tuple[str, ...]) -> None:
        directory = knobs.dump_dir()
        if directory is None:
            return
        at = Path(directory) / f"{self.name}_{self.stats.compiles}"
        at.mkdir(parents=True, exist_ok=True)
        named = "".join(f"# %{i} is {name}\n" for i, name in enumerate(names))
        (at / "0_captured.txt").write_text(f"{named}{raw}")
        (at / "1_final.txt").write_text(f"{named}{final}")
        (at / "2_plan.txt").write_text(str(program.plan))
        for i, source in enumerate(program.loaded.sources):
            (at / f"3_kernel_{i}_{source.name}{source.suffix}").write_text(source.text)
