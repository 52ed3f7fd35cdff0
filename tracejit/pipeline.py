"""From a graph to what runs it, by all stages in turn.

    Graph → passes → schedule → load → Program

A graph comes from a trace, or from a file that one was saved in.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import field, replace
from pathlib import Path

import torch

from tracejit import knobs
from tracejit.capture.effects.captured import Checks
from tracejit.errors import TracejitError, UnsupportedOperation
from tracejit.forks import own_lock
from tracejit.garbage import uncollected
from tracejit.interrupts import held, interruptible, look_around
from tracejit.ir.graph import Graph, verify
from tracejit.options import Options
from tracejit.passes import optimize
from tracejit.passes.checkpoints import kept
from tracejit.progress import stage, telling
from tracejit.records import dataclass
from tracejit.runtime.agreement import Agreement, numbers_in_common
from tracejit.runtime.cache import DiskCache, digest_of
from tracejit.runtime.executor import Executor
from tracejit.runtime.memory import Memory
from tracejit.runtime.program import Program
from tracejit.runtime.select import executor_for
from tracejit.schedule import schedule
from tracejit.schedule.memory import layout_of
from tracejit.schedule.plan import Plan


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


class Pipeline:
    """Builds the programs of one step.

    name:   the step's, in messages and dumps; an identifier.
    where:  the line of the step, for errors.
    """

    def __init__(self, name: str, where: str, stats: Stats, options: Options):
        self.name, self.where, self.stats, self.options = name, where, stats, options

    def report(self, what: str) -> None:
        """Print what happens, under TRACEJIT_DEBUG."""
        if knobs.debug() >= 1:
            print(f"tracejit: {self.name}: {what}")

    def executor(self, graph: Graph, precision: str | None = None) -> Executor:
        """What runs a graph, by the device of its values. `precision` is that of products on a GPU,
        by torch's name; else what the process has."""
        devices = {p.value.type.device for p in graph.params}
        nodes = [n for n in graph.nodes if n.inputs or not n.is_ordered]  # a barrier is nowhere
        devices = (devices | {n.out.type.device for n in nodes}) - {"host"}
        if len(devices) > 1:
            raise UnsupportedOperation(
                where=self.where,
                function="a step over several devices",
                shapes=", ".join(sorted(devices)),
                remedy="Move every tensor that the step uses to one device.",
            )
        device = devices.pop() if devices else "cpu"
        if device.partition(":")[0] not in ("cpu", "cuda"):
            raise UnsupportedOperation(
                where=self.where,
                function="a step on another device than the CPU and CUDA's",
                shapes=f"tensors on {device}",
                remedy="Move them to one of these.",
            )
        return executor_for(
            self.options.backend, device, precision or torch.get_float32_matmul_precision()
        )

    @held
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
        look_around()
        # graphs and plans have no cycles, and many objects
        with telling(self.name), uncollected(), interruptible():
            stage("passes")
            final = self._optimized(graph)
            stage("schedule")
            plan = self._plan(final, executor)
            started = time.perf_counter()
            stage("load", f"of {len(plan.launches)} launches for {executor.name}")
            agreement = None
            computes = getattr(executor, "computes", True)
            if computes and any(node.is_ordered for node in final.nodes):
                agreement = Agreement(plan, numbers_in_common(final), names)
            program = Program(
                plan,
                executor,
                memory,
                require_graph=self.options.require_graph,
                agreement=agreement,
            )
        program.graph = final
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
        if self.options.remat == "none":
            graph = kept(graph)

        def on_pass(name: str, result: Graph) -> None:
            if knobs.debug() >= 5:
                print(f"# after {name}\n{result}")

        final = optimize(graph, on_pass)
        self.stats.add("passes", started)
        if knobs.debug() >= 3:
            print(final)
        return final

    def _plan(self, graph: Graph, executor: Executor) -> Plan:
        """The schedule of a graph for an executor, from the disk cache when it is there."""
        from tracejit.schedule.plan_text import stored_plan

        started = time.perf_counter()
        cache = DiskCache()
        made_by = digest_of("ir", "passes", "schedule")
        fuse, again, gpu = self.options.fuse, self.options.remat == "auto", executor.gpu
        key = f"{made_by} fuse={fuse} again={again} gpu={gpu}\n{graph}"
        text = cache.get("plan", key)
        plan = None
        if text is not None:
            try:
                plan = stored_plan(text)
                self.stats.cache_hits += 1
            except TracejitError:
                plan = None  # written by another version: rebuilt below
        if plan is None:
            plan = schedule(graph, fuse=fuse, again=again, gpu=gpu)
            if knobs.verify():
                from tracejit.schedule.sound import check_plan

                check_plan(plan, layout_of(plan))
            cache.store("plan", key, str(plan))
        self.stats.add("schedule", started)
        return plan

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


class Backward:
    """The backward graph of a returned tensor. It is compiled at the first backward."""

    def __init__(self, pipeline: Pipeline, graph: Graph, executor: Executor):
        self.pipeline, self.graph, self.executor = pipeline, graph, executor
        self.program: Program | None = None
        self._function: Callable[[list], list[torch.Tensor]] | None = None
        own_lock(self, "lock", threading.Lock)

    def __call__(self, inputs: list) -> list[torch.Tensor]:
        with self.lock:
            self.build()
            return self._function(inputs)

    def build(self) -> None:
        """Compile it, unless that is done."""
        if self.program is None:
            self.program, _ = self.pipeline.build(
                self.graph, self.executor, Memory(), " of backward"
            )
            self._function = self.program.function()


class Checking:
    """The checks of a captured step: one flag tells whether any fails. Only when one does, a second
    program is built, which tells what fails."""

    def __init__(self, pipeline: Pipeline, checks: Checks, executor: Executor):
        self._pipeline, self._checks, self._executor = pipeline, checks, executor
        flag = self._program(replace(checks.graph, results=checks.graph.results[:1]))
        self.program, self._failed, self._read = flag, flag.function(), flag.read
        self._found: Callable[[list], list[torch.Tensor]] | None = None

    def _program(self, graph: Graph) -> Program:
        return self._pipeline.build(graph, self._executor, Memory(), " of checks")[0]

    def __call__(self, inputs: list, errors: Sequence[TracejitError]) -> None:
        """Raise the first error whose check fails."""
        if not self._read(self._failed(inputs)[0]):
            return
        if self._found is None:
            self._found = self._program(self._checks.graph).function()
        raise self._checks.refusal(self._found(inputs), errors)
