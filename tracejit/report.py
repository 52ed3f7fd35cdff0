"""The kernel report: what each launch of a step compiles to, for GPUs that need not be here.

    print(report(step, target=90))                # a step that has been called, or a Plan
    assert not limits(report(step, target=90))

In: a compiled step (its last plan is judged) or a Plan, of CPU or CUDA tensors alike. Out: a
`Report` with one `Row` per launch, read off the machine code that the CUDA executor would launch:
the same sources, constants and options, for pointers aligned to 16 bytes. `limits` lists what no
kernel may do, `shortfalls` what keeps a launch from using its GPU.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from typing import Protocol

import torch

from tracejit.aot import KernelFacts, compile_launch
from tracejit.codegen.triton_table import LOCAL_TABLES
from tracejit.codegen.work import work
from tracejit.errors import BackendUnavailable
from tracejit.gpus import ARCHES, GPUS, occupancy
from tracejit.records import dataclass
from tracejit.roofline import filling, predict
from tracejit.rows import Row, limits, peeled_share_of, shortfalls, spills, stream_share_of
from tracejit.runtime.select import executor_for
from tracejit.runtime.triton_executor import TritonExecutor
from tracejit.runtime.triton_launch import TRITON_NAME, LoadedLaunch, positions
from tracejit.schedule.collectives import START
from tracejit.schedule.kernel import Compute
from tracejit.schedule.plan import Launch, Plan
from tracejit.schedule.plan_text import parse_plan
from tracejit.schedule.traffic import bytes_apart, bytes_moved
from tracejit.schedule.wire import ranks_of, sent
from tracejit.tables import Columns, joined, micro, table


@dataclass(frozen=True)
class Sends:
    """A collective of the plan, which no kernel makes, and the bytes that a rank sends in it."""

    collective: str
    ranks: int
    bytes: int
    lines: tuple[str, ...]

    def __str__(self) -> str:
        where = f"; {joined(self.lines)}" if self.lines else ""
        return f"{self.collective} of {self.ranks} ranks: {self.bytes:,} bytes{where}"


@dataclass(frozen=True)
class Report:
    """The launches of one plan, compiled for sm_<target>; `str(report)` is a table."""

    plan: str
    target: int
    precision: str  # of fp32 contractions
    triton: str  # the version that compiled
    rows: tuple[Row, ...]
    sends: tuple[Sends, ...] = ()  # for each collective

    def as_dict(self) -> dict[str, object]:
        """The report and its violations as plain data for JSON."""
        return {
            "plan": self.plan,
            "target": f"sm_{self.target}",
            "precision": self.precision,
            "triton": self.triton,
            "launches": [row.as_dict() for row in self.rows],
            "collectives": [asdict(s) for s in self.sends],
            "violations": limits(self),
            "shortfalls": [asdict(s) for s in shortfalls(self)],
        }

    def __str__(self) -> str:
        total = sum(row.minimum_bytes for row in self.rows)
        head = (
            f"{self.plan} for sm_{self.target} (Triton {self.triton}, {self.precision}): "
            f"{len(self.rows)} launch{'es' * (len(self.rows) != 1)}, {total:,} bytes at least"
        )
        named = [f"{i}: {', '.join(row.inputs)}" for i, row in enumerate(self.rows) if row.inputs]
        inputs = ["", "inputs of each launch:", *named] if named else []
        sends = ["", "what a rank sends:", *map(str, self.sends)] if self.sends else []
        found = [str(s) for s in shortfalls(self)]
        short = ["", "what keeps launches from using the GPU:", *found] if found else []
        return "\n".join(
            [head, *table(self.rows, columns_of(self.target)), *inputs, *sends, *short]
        )


# Heading of a column, and its cell in a row.
COLUMNS = {
    "kernel": lambda row: row.name,
    "form": lambda row: row.form,
    "regs": lambda row: f"{row.facts.registers}",
    "spills": lambda row: f"{spills(row)}",
    "shared": lambda row: f"{row.facts.shared_bytes}",
    "CTAs/SM": lambda row: f"{row.occupancy}",
    "128-bit": lambda row: f"{row.facts.wide_share:.0%}",
    "stream": lambda row: "" if row.stream_share is None else f"{row.stream_share:.0%}",
    "wgmma": lambda row: f"{row.facts.wgmma}",
    "mma": lambda row: f"{row.facts.mma}",
    "ffma": lambda row: f"{row.facts.ffma}",
    "bars": lambda row: f"{row.facts.barriers}",
    "atomics": lambda row: f"{row.facts.atomics}",
    "instrs": lambda row: f"{row.facts.instructions}",
    "compile s": lambda row: f"{row.facts.compile_seconds:.2f}",
    "min bytes": lambda row: f"{row.minimum_bytes:,}",
    "issued": lambda row: f"{row.issued_bytes:,}",
    "operations": lambda row: f"{row.operations:,}",
    "steps": lambda row: f"{row.filled.steps}",
    "in flight/SM": lambda row: f"{row.filled.in_flight:,.0f}",
    "waves": lambda row: f"{row.filled.waves:.2f}",
    "balance": lambda row: f"{row.filled.balance:.0%}",
    "lines": lambda row: joined(row.lines),
}


def columns_of(target: int) -> Columns:
    """The columns, and the predicted time on each GPU of a target, before the lines."""
    columns = dict(COLUMNS)
    lines = columns.pop("lines")
    names = [gpu.name for gpu in GPUS.values() if gpu.target == target]
    for name in names:
        columns[f"{name} µs"] = lambda row, name=name: micro(row.predicted[name].seconds)
    columns["bound"] = lambda row: row.predicted[names[-1]].bound
    return columns | {"lines": lines}


# --- building a report ------------------------------------------------------------------------


class HasPlans(Protocol):
    """A compiled step: its plans, the one that ran last at the end, and the names of its inputs.
    `plan_on_gpu`: that one as it would be scheduled for a GPU."""

    plans: Sequence[Plan]
    plan_on_gpu: Plan | None
    input_names: Sequence[str]


def report(step_or_plan: HasPlans | Plan, *, target: int = 90) -> Report:
    """Compile every launch for sm_<target> and say what it became.

    A step has to have been called: the last of its `plans` is taken. Launches of an empty grid have
    no row, as they are never launched. Raises ValueError for another target than those of ARCHES or
    a step without a plan, BackendUnavailable where Triton cannot compile.
    """
    if target not in ARCHES:
        raise ValueError(f"target is one of {', '.join(map(str, ARCHES))}, not {target!r}")
    is_plan = isinstance(step_or_plan, Plan)
    plan = step_or_plan if is_plan else _last_plan(step_or_plan)
    names = () if is_plan else step_or_plan.input_names
    version = _triton_version()
    executor = _executor()
    moved = bytes_moved(plan)
    rows = [
        _row(
            plan,
            plan.launches[i],
            loaded,
            moved[i] // plan.times(plan.launches[i]),
            target,
            names,
            executor.precision,
        )
        for i, loaded in _loaded(plan, executor, target)
    ]
    sends = [
        Sends(call.op.name, ranks_of(call), sent(launch.kernel), launch.kernel.lines)
        for launch in plan.launches
        if (call := launch.kernel.call) is not None and call.phase == START
    ]
    return Report(plan.name, target, executor.precision, version, tuple(rows), tuple(sends))


def precompile(
    plans: Iterable[Plan], *, targets: Sequence[int] = tuple(ARCHES), processes: int | None = None
) -> None:
    """Compile the kernels of plans in several processes, by default one a core, for all targets.

    Afterwards `report` finds them done. Raises as `report` does.
    """
    _triton_version()
    executor = _executor()
    jobs: dict[tuple, tuple] = {}
    for plan in plans:
        text = str(plan)
        for target in targets:
            for i, loaded in _loaded(plan, executor, target):
                key = _key(plan.launches[i], loaded, target)
                if key not in _FACTS:
                    jobs[key] = (text, i, target, executor)
    if not jobs:
        return
    with ProcessPoolExecutor(processes or os.cpu_count(), get_context("spawn")) as pool:
        _FACTS.update(zip(jobs, pool.map(_compile, *zip(*jobs.values(), strict=True)), strict=True))


def _compile(text: str, launch: int, target: int, executor: TritonExecutor) -> KernelFacts:
    """One launch of a plan, given as text because a Plan does not pickle."""
    plan = parse_plan(text)
    loaded = dict(_loaded(plan, executor, target))[launch]
    return _facts(plan.launches[launch], loaded, target)


def _last_plan(step: HasPlans) -> Plan:
    if not hasattr(step, "plans"):
        raise TypeError(f"report takes a compiled step or a Plan, not {type(step).__name__}")
    if not step.plans:
        raise ValueError(f"{step.__name__} has no plan yet: call it before asking for a report")
    plan = step.plans[-1]
    return plan if plan.device != "cpu" else step.plan_on_gpu or plan


def _triton_version() -> str:
    """Triton's version, where it can compile."""
    try:
        import triton
    except ImportError:
        raise BackendUnavailable(
            backend="triton", reason="Triton is not installed", remedy="Install it"
        ) from None
    if triton.knobs.runtime.interpret:
        raise BackendUnavailable(
            backend="triton",
            reason="this process interprets Triton kernels (TRITON_INTERPRET=1)",
            remedy="Use a process without TRITON_INTERPRET",
        )
    return triton.__version__


def _executor() -> TritonExecutor:
    return executor_for("triton", "cuda", torch.get_float32_matmul_precision())


def _loaded(
    plan: Plan, executor: TritonExecutor, target: int
) -> Iterator[tuple[int, LoadedLaunch]]:
    """The launches that have a grid, by position, as the CUDA executor prepares them for the first
    GPU of a target. It has none for calls of the host."""
    position, first_scalar = positions(plan), 0
    sms = next(gpu.sms for gpu in GPUS.values() if gpu.target == target)
    for i, launch in enumerate(plan.launches):
        if launch.kernel.call is not None:
            continue
        loaded = executor.load_launch(launch, position, first_scalar, sms)
        first_scalar += len(launch.scalars)
        if loaded.geometry.grid[0] > 0:
            yield i, loaded


_COMMENT = re.compile(r" +# .*")
_FACTS: dict[tuple, KernelFacts] = {}  # of what this process compiled


def _key(launch: Launch, loaded: LoadedLaunch, target: int) -> tuple:
    """Equal for kernels whose sources differ in their name and the user's lines only."""
    text = _COMMENT.sub("", loaded.source.text).replace(loaded.source.name, "kernel")
    signature = {b.name: f"*{TRITON_NAME[b.dtype.name]}" for b in launch.kernel.buffers}
    signature |= {"scalars": "*fp64", "workspace": "*i8"}
    if launch.kernel.foreach:
        signature |= {"addresses": "*i64", "chunks": "*i64"}
    unaligned = frozenset(("scalars",) if loaded.first_scalar % 2 else ())  # 8 bytes a scalar
    keywords = tuple(sorted(loaded.options().items()))
    return text, tuple(signature.items()), keywords, unaligned, target


def _facts(launch: Launch, loaded: LoadedLaunch, target: int) -> KernelFacts:
    """Compile, once a process."""
    key = _key(launch, loaded, target)
    if key not in _FACTS:
        _, signature, keywords, unaligned, _ = key
        _FACTS[key] = compile_launch(
            loaded.function, dict(signature), dict(keywords), unaligned=unaligned, target=target
        )
    return _FACTS[key]


def _row(
    plan: Plan,
    launch: Launch,
    loaded: LoadedLaunch,
    minimum_bytes: int,
    target: int,
    names: Sequence[str],
    precision: str,
) -> Row:
    kernel, warps, name = launch.kernel, loaded.geometry.num_warps, loaded.source.name
    facts = _facts(launch, loaded, target)
    form = name.rpartition("_")[0]
    statements = list(kernel.statements)
    works = work(loaded.source, launch.sizes, loaded.geometry)
    per_sm = occupancy(target, facts.registers, warps, facts.shared_bytes, facts.tensor_memory)
    gpus = [gpu for gpu in GPUS.values() if gpu.target == target]
    copies, tensor = facts.copies > 0, facts.wgmma + facts.mma > 0
    known = {"precision": precision, "copies": copies, "tensor": tensor}
    stream = stream_share_of(plan, launch, form, facts)
    return Row(
        name=name,
        form=form,
        facts=replace(facts, name=name),
        warps=warps,
        occupancy=per_sm,
        minimum_bytes=minimum_bytes,
        lines=kernel.lines,
        stream_share=peeled_share_of(launch, loaded, facts) if stream is None else stream,
        has_tables=any(isinstance(s, Compute) and s.op.name in LOCAL_TABLES for s in statements),
        works=works,
        part_bytes=bytes_apart(plan, launch),
        filled=filling(works, gpus[0], per_sm, copies=copies),
        predicted={g.name: predict(works, g, per_sm, minimum_bytes, **known) for g in gpus},
        inputs=_inputs(plan, launch, names),
        times=plan.times(launch),
    )


def _inputs(plan: Plan, launch: Launch, names: Sequence[str]) -> tuple[str, ...]:
    """The names of the step's inputs among the buffers of a launch."""
    buffers = map(plan.buffer, launch.buffers)
    return tuple(names[b.index] for b in buffers if names and b.kind == "input")
