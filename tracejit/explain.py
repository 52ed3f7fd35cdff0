"""`step.explain()`: the ledger of what a step has compiled.

In: a `Subject`, which says what runs in a call of the step. Out: a `Ledger`. The plans are looked
at as they would be launched on a GPU, and timed on memory of their own where they run natively.
Nothing of the user's is run, read or written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain

import torch

from tracejit.capture.effects.eager import EagerCost
from tracejit.codegen.geometry import Geometry
from tracejit.codegen.triton import Source, emit
from tracejit.codegen.work import Work, work
from tracejit.gpus import EAGER, GPUS, REPLAY, Gpu, occupancy
from tracejit.ir.graph import Graph
from tracejit.ledger import KernelCost, LaunchCost, Ledger, Memory
from tracejit.links import CLUSTERS
from tracejit.passes import optimize
from tracejit.records import dataclass
from tracejit.report import report
from tracejit.roofline import Filling, Prediction, fall_short, filling, predict, rate, said
from tracejit.rows import Row
from tracejit.runtime.executor import memory_of
from tracejit.runtime.program import Program
from tracejit.runtime.select import executor_for
from tracejit.runtime.trial import trial
from tracejit.scaling import Timed, collective_costs, efficiencies, hidden_share, world_of
from tracejit.schedule import schedule
from tracejit.schedule.collectives import START
from tracejit.schedule.kernel_text import canonical
from tracejit.schedule.plan import Launch, Plan, by_launch
from tracejit.schedule.traffic import (
    bytes_apart,
    bytes_moved,
    operations,
    operations_of,
    products,
)
from tracejit.tables import joined

REGISTERS = 64  # that a thread is taken to use, where the machine code is not asked
TIMED = ("c", "triton")  # the executors whose time says something


@dataclass(frozen=True)
class Subject:
    """A step that has been called.

    graphs:   the final graph, then the captured ones of the backwards outside that have run.
    programs: all that a call runs, in turn; those backwards at the end.
    backend:  of the executor that runs them.
    seconds:  of compiling, by stage.
    eager:    what the last call's step takes in eager, without a backward outside.
    """

    name: str
    mode: str
    retraces: Sequence[str]
    graphs: Sequence[Graph]
    programs: Sequence[Program]
    backend: str
    seconds: Mapping[str, float]
    eager: EagerCost


def explain(
    subject: Subject,
    gpu: str,
    *,
    eager_seconds: float | None = None,
    machine_code: bool = False,
    measure: bool = True,
) -> Ledger:
    """The ledger of a step; `CompiledStep.explain` tells of the arguments."""
    if gpu not in GPUS:
        raise ValueError(f"gpu is one of {', '.join(GPUS)}, not {gpu!r}")
    look = _Look(GPUS[gpu], machine_code)
    plans = [program.plan for program in subject.programs]
    timed = measure and subject.backend in TIMED
    times = [trial(p.plan, p.loaded) if timed else None for p in subject.programs]
    device = plans[0].device if plans else ""
    native = [None] * len(plans) if device == "cpu" else times
    launches = [x for p, t in zip(plans, native, strict=True) for x in look.launches(p, t)]
    graphs = [*subject.graphs[:1], *map(optimize, subject.graphs[1:])]
    unfused = [schedule(graph, fuse=False) for graph in graphs]
    measured = sum(chain(*times)) if times and None not in times else None
    predicted = sum(x.seconds for x in launches)
    eager = _eager(subject, unfused, look) if eager_seconds is None else eager_seconds
    host = REPLAY[0] + REPLAY[1] * sum(x.times for x in launches)
    ours = max(host, predicted) if eager_seconds is None or measured is None else measured
    replays = subject.mode.startswith("replay")  # else Python's time is not known
    spent = sum(subject.seconds.values())
    moved = sum(x.bytes for x in launches)
    links = CLUSTERS[gpu]
    collectives = collective_costs(look.timeline, links)
    return Ledger(
        step=subject.name,
        mode=subject.mode,
        device=device,
        backend=subject.backend,
        gpu=gpu,
        precision=look.precision,
        launches=tuple(launches),
        kernels=tuple(_kernels(subject.programs, times)) if device == "cpu" else (),
        collectives=tuple(collectives),
        scaling=tuple(efficiencies(look.timeline, links)),
        launches_before_fusion=sum(plan.times(x) for plan in unfused for x in plan.launches),
        bytes_moved=moved,
        bytes_minimum=min(moved, sum(map(_minimum, graphs))),
        bytes_issued=sum(x.issued_bytes for x in launches),
        flops=sum(map(operations, unfused)),
        sent_bytes=sum(x.sent for x in collectives),
        hidden=hidden_share(look.timeline, links, world_of(look.timeline)),
        predicted_seconds=predicted,
        measured_seconds=measured,
        eager_operations=subject.eager.operations,
        eager_seconds=eager,
        eager_given=eager_seconds is not None,
        compile_seconds=dict(subject.seconds),
        pays_back_after=math.ceil(spent / (eager - ours)) if replays and eager > ours else None,
        memory=_memory(subject),
        holds_back=(*_reasons(subject), *look.short),
    )


class _Look:
    """Looks at plans as they are launched on a GPU, and collects what keeps launches from using
    it."""

    def __init__(self, gpu: Gpu, machine_code: bool):
        self.gpu, self.machine_code, self.short = gpu, machine_code, []
        self.timeline: list[Timed] = []
        setting = torch.get_float32_matmul_precision()
        self.precision = executor_for("triton", "cuda", setting).precision
        self._seen: dict[tuple, tuple[Source, Geometry, tuple[Work, ...]]] = {}
        self._count = 0

    def launches(self, plan: Plan, seconds: Sequence[float] | None) -> list[LaunchCost]:
        """The costs of launches that have programs; `seconds` are of all, as they were measured."""
        rows = iter(report(plan, target=self.gpu.target).rows) if self.machine_code else None
        costs = []
        unmeasured = [None] * len(plan.launches)
        times = unmeasured if seconds is None else by_launch(plan, seconds)
        for launch, least, measured in zip(plan.launches, bytes_moved(plan), times, strict=True):
            if launch.kernel.call is not None:
                costs.append(self._of_host(launch, least, measured))
                self.timeline.append(Timed(launch.kernel, 0.0))
                continue
            source, shape, works = self._printed(launch)
            if not shape.grid[0]:
                continue
            row = None if rows is None else next(rows)
            calls = plan.times(launch)
            filled, found = self._judged(works, shape, least // calls, row)
            apart = bytes_apart(plan, launch) if launch.kernel.parts else (least // calls,)
            self.timeline.append(Timed(launch.kernel, found.seconds * calls))
            self._note(source.name, launch, [said(*x) for x in fall_short(works, apart, filled)])
            costs.append(
                LaunchCost(
                    kernel=source.name,
                    lines=launch.kernel.lines,
                    bytes=least,
                    issued_bytes=sum(w.issued for w in works) * calls,
                    operations=sum(w.operations + w.products for w in works) * calls,
                    steps=filled.steps,
                    seconds=found.seconds * calls,
                    bound=found.bound,
                    measured=measured,
                    times=calls,
                )
            )
        return costs

    def _of_host(self, launch: Launch, least: int, measured: float | None) -> LaunchCost:
        """What a call of the host costs: no GPU makes it, so no time is predicted."""
        call, lines = launch.kernel.call, launch.kernel.lines
        name, done = f"host_{call.op.name}", operations_of(call)
        short = ["LAPACK runs on the CPU only"]
        if call.is_collective:
            name, short = f"{name}_{call.phase}", ["collectives are made on the CPU only"]
            short *= call.phase == START
        self._note(name, launch, short)
        return LaunchCost(name, lines, least, least, done, 0, 0.0, "the host", measured)

    def _printed(self, launch: Launch) -> tuple[Source, Geometry, tuple[Work, ...]]:
        """A launch's source, geometry and work; once for all that differ in the user's lines."""
        key = canonical(launch.kernel), launch.sizes
        if key not in self._seen:
            options = {"precision": self.precision, "sms": self.gpu.sms}
            source = emit(launch.kernel, launch.sizes, **options)
            shape = source.geometry(launch.sizes)
            self._seen[key] = source, shape, work(source, launch.sizes, shape)
        return self._seen[key]

    def _judged(
        self, works: Sequence[Work], shape: Geometry, least: int, row: Row | None
    ) -> tuple[Filling, Prediction]:
        """How a launch fills the GPU and how long it takes: by its machine code, or by a guess of
        how many of its programs an SM holds."""
        if row is not None:
            return row.filled, row.predicted[self.gpu.name]
        per_sm, copies = _guessed(works, shape, self.gpu.target), any(w.ahead > 1 for w in works)
        return (
            filling(works, self.gpu, per_sm, copies=copies),
            predict(works, self.gpu, per_sm, least, precision=self.precision, copies=copies),
        )

    def _note(self, name: str, launch: Launch, short: list[str]) -> None:
        """Keep what a launch falls short of, with its number and the user's lines."""
        where = joined(launch.kernel.lines)
        self.short += [f"launch {self._count} ({name}): {what}; {where}" for what in short]
        self._count += 1


def _guessed(works: Sequence[Work], shape: Geometry, target: int) -> int:
    """How many programs an SM holds if threads use REGISTERS, or what their accumulators take and
    half as many; and tiles of operands lie in shared memory, as many as are loaded ahead."""
    registers, shared = REGISTERS, 0
    for i, one in enumerate(works):
        if one.form != "matmul":
            continue
        suffix = "" if f"BLOCK_M_{i}" not in shape.constants else f"_{i}"
        m, n, k = (shape.constants[f"BLOCK_{axis}{suffix}"] for axis in "MNK")
        registers = max(registers, m * n // (32 * shape.num_warps) + REGISTERS // 2)
        itemsize = {"f64": 8, "bf16": 2, "f16": 2}.get(one.operands, 4)
        shared = max(shared, (m + n) * k * itemsize * one.ahead)
    return max(1, occupancy(target, min(registers, 255), shape.num_warps, shared))


def _kernels(
    programs: Sequence[Program], times: Sequence[Sequence[float] | None]
) -> list[KernelCost]:
    """What runs on the CPU: the kernels as their executor has them."""
    found = []
    for program, seconds in zip(programs, times, strict=True):
        loaded = program.loaded
        measured = [None] * len(loaded.sources) if seconds is None else seconds
        rows = zip(loaded.sources, loaded.lines(), loaded.bytes_moved(), measured, strict=True)
        for source, lines, nbytes, took in rows:
            found.append(KernelCost(source.name, tuple(lines), nbytes, took))
    return found


def _eager(subject: Subject, unfused: Sequence[Plan], look: _Look) -> float:
    """What eager should take on the GPU: as long as the host needs for its operations, or the GPU
    for what they move and multiply."""
    cost = subject.eager
    there = sum(
        n / rate(dtype, look.gpu, look.precision, None)
        for plan in unfused
        for dtype, n in products(plan).items()
    )
    return max(cost.operations * EAGER, cost.bytes / look.gpu.bandwidth + there)


def _minimum(graph: Graph) -> int:
    """Each input that is read, once, and each result and write."""
    read = {v for node in graph.nodes for v in node.inputs} | set(graph.outputs())
    inputs = {p.value for p in graph.params if p.value in read and not p.value.type.is_host}
    return sum(v.type.nbytes for v in inputs) + sum(v.type.nbytes for v in graph.outputs())


def _memory(subject: Subject) -> Memory:
    """What a call takes. Kernels of one call work in one arena."""
    if not subject.graphs:
        return Memory(0, 0, 0, 0, 0)
    graph = subject.graphs[0]
    outputs = sum(result.value.type.nbytes for result in graph.results)
    again = any(node.op.name == "after" for graph in subject.graphs for node in graph.nodes)
    arena = max(memory_of(p.loaded, p.plan).arena_bytes for p in subject.programs)
    return Memory(
        inputs=sum(p.value.type.nbytes for p in graph.params if not p.value.type.is_host),
        outputs=outputs,
        arena=arena,
        peak=outputs + arena,
        eager_saved=subject.eager.saved_bytes,
        computed_again=subject.eager.again_bytes if again else 0,
    )


def _reasons(subject: Subject) -> list[str]:
    """Why calls are not replayed: what the mode says, and the latest changes."""
    mode, _, why = subject.mode.partition(": ")
    found = [] if mode == "replay" or not why else [why]
    return [*found, *(f"not replayed: {x}" for x in dict.fromkeys(subject.retraces[-3:]))]
