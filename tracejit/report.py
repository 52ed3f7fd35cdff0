"""The kernel report: what each launch of a step compiles to, for GPUs that need not be here.

    print(report(step, target=90))                # a step that has been called, or a Plan
    assert not limits(report(step, target=90))

In: a compiled step (its last plan is judged) or a Plan, of CPU or CUDA tensors alike. Out: a
`Report` with one `Row` per launch, read off the machine code that the CUDA executor would launch:
the same sources, constants and options, for pointers aligned to 16 bytes. `limits` lists what no
kernel may do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context

import torch

from tracejit.aot import KernelFacts, compile_launch
from tracejit.codegen.triton_table import LOCAL_TABLES
from tracejit.compile import CompiledStep
from tracejit.errors import BackendUnavailable
from tracejit.ir.types import contiguous_strides, f32
from tracejit.runtime.select import executor_for
from tracejit.runtime.triton_executor import TritonExecutor
from tracejit.runtime.triton_launch import TRITON_NAME, LoadedLaunch, positions
from tracejit.schedule.kernel import Compute, Load, Reduce, Stage, Store
from tracejit.schedule.plan import Launch, Plan, PlanBuffer
from tracejit.schedule.plan_text import parse_plan
from tracejit.schedule.sizes import substitute
from tracejit.schedule.traffic import bytes_moved

LARGE_STREAM = 1 << 17  # elements from which a stream has to move 128 bits at a time
STREAM_SHARE = 0.9  # of its accesses
TABLE_BYTES = 48  # of stack: what the argument reduction within sin and cos keeps there


@dataclass(frozen=True)
class Arch:
    """What bounds the CTAs of one SM, besides what all targets have in common; bytes."""

    shared_per_block: int
    shared_per_sm: int


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
ARCHES = {
    80: Arch(shared_per_block=163 << 10, shared_per_sm=164 << 10),
    90: Arch(shared_per_block=227 << 10, shared_per_sm=228 << 10),
    100: Arch(shared_per_block=227 << 10, shared_per_sm=228 << 10),
}


@dataclass(frozen=True)
class Row:
    """One launch. `occupancy` is CTAs per SM; `lines` are the user's, as file:line.

    `stream_share` is the share of 128-bit accesses where the kernel is a large contiguous fp32
    stream (`stream_share_of` says what that is), else None.
    """

    name: str
    form: str
    facts: KernelFacts
    warps: int
    occupancy: int
    minimum_bytes: int
    lines: tuple[str, ...]
    stream_share: float | None
    has_tables: bool  # computes sin or cos
    inputs: tuple[str, ...] = ()  # of the step that it reads or writes, where they have names

    def as_dict(self) -> dict[str, object]:
        """The row as plain data for JSON."""
        plain = asdict(self)
        facts = plain.pop("facts")
        return plain | facts | {"wide_share": self.facts.wide_share, "spills": spills(self)}


@dataclass(frozen=True)
class Report:
    """The launches of one plan, compiled for sm_<target>; `str(report)` is a table."""

    plan: str
    target: int
    precision: str  # of fp32 contractions
    triton: str  # the version that compiled
    rows: tuple[Row, ...]

    def as_dict(self) -> dict[str, object]:
        """The report and its violations as plain data for JSON."""
        return {
            "plan": self.plan,
            "target": f"sm_{self.target}",
            "precision": self.precision,
            "triton": self.triton,
            "launches": [row.as_dict() for row in self.rows],
            "violations": limits(self),
        }

    def __str__(self) -> str:
        total = sum(row.minimum_bytes for row in self.rows)
        head = (
            f"{self.plan} for sm_{self.target} (Triton {self.triton}, {self.precision}): "
            f"{len(self.rows)} launch{'es' * (len(self.rows) != 1)}, {total:,} bytes at least"
        )
        named = [f"{i}: {', '.join(row.inputs)}" for i, row in enumerate(self.rows) if row.inputs]
        inputs = ["", "inputs of each launch:", *named] if named else []
        return "\n".join([head, *table(self.rows, COLUMNS), *inputs])


# Heading of a column, and its cell in a row; the first two and the last are aligned to the left.
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
    "lines": lambda row: joined(row.lines),
}
_LEFT = ("kernel", "form", "lines")


def table(rows: Sequence[Row], columns: Mapping[str, object]) -> list[str]:
    """The rows as lines of text under their headings."""
    cells = [list(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        padded = (
            text.ljust(width) if name in _LEFT else text.rjust(width)
            for name, text, width in zip(columns, line, widths, strict=True)
        )
        lines.append("  ".join(padded).rstrip())
    return lines


def joined(lines: Sequence[str]) -> str:
    """`net.py:5`, `net.py:3` as `net.py:3,5`."""
    files: dict[str, list[str]] = {}
    for where in lines:
        file, _, number = where.rpartition(":")
        files.setdefault(file, []).append(number)
    return " ".join(f"{f}:{','.join(sorted(ns, key=int))}" for f, ns in files.items())


# --- building a report ------------------------------------------------------------------------


def report(step_or_plan: CompiledStep | Plan, *, target: int = 90) -> Report:
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
        _row(plan, plan.launches[i], loaded, moved[i], target, names)
        for i, loaded in _loaded(plan, executor)
    ]
    return Report(plan.name, target, executor.precision, version, tuple(rows))


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
        for i, loaded in _loaded(plan, executor):
            for target in targets:
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
    loaded = dict(_loaded(plan, executor))[launch]
    return _facts(plan.launches[launch], loaded, target)


def _last_plan(step: CompiledStep) -> Plan:
    if not isinstance(step, CompiledStep):
        raise TypeError(f"report takes a compiled step or a Plan, not {type(step).__name__}")
    if not step.plans:
        raise ValueError(f"{step.__name__} has no plan yet: call it before asking for a report")
    return step.plans[-1]


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


def _loaded(plan: Plan, executor: TritonExecutor) -> Iterator[tuple[int, LoadedLaunch]]:
    """The launches that have a grid, by position, as the CUDA executor prepares them."""
    position, first_scalar = positions(plan), 0
    for i, launch in enumerate(plan.launches):
        loaded = executor.load_launch(launch, position, first_scalar)
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
) -> Row:
    kernel, warps, name = launch.kernel, loaded.geometry.num_warps, loaded.source.name
    facts = _facts(launch, loaded, target)
    form = name.rpartition("_")[0]
    statements = list(kernel.statements)
    return Row(
        name=name,
        form=form,
        facts=replace(facts, name=name),
        warps=warps,
        occupancy=occupancy(
            target, facts.registers, warps, facts.shared_bytes, facts.tensor_memory
        ),
        minimum_bytes=minimum_bytes,
        lines=tuple(dict.fromkeys(where for s in statements if (where := s.where))),
        stream_share=stream_share_of(plan, launch, form, facts),
        has_tables=any(isinstance(s, Compute) and s.op.name in LOCAL_TABLES for s in statements),
        inputs=_inputs(plan, launch, names),
    )


def _inputs(plan: Plan, launch: Launch, names: Sequence[str]) -> tuple[str, ...]:
    """The names of the step's inputs among the buffers of a launch."""
    buffers = map(plan.buffer, launch.buffers)
    return tuple(names[b.index] for b in buffers if names and b.kind == "input")


def occupancy(
    target: int, registers: int, warps: int, shared_bytes: int, tensor_memory: int = 0
) -> int:
    """CTAs that one SM holds at a time, the least that a resource allows; 0 if none fits.

    slots          an SM holds 32 CTAs and 64 warps
    registers      each of its 4 partitions has 16384; a warp takes 32 times the `registers` of a
                   thread, rounded up to a multiple of 256
    shared memory  a CTA takes its bytes and 1024 more of the driver's, rounded up to 128
    tensor memory  an SM has 512 columns (sm_100)

    Source: cudaOccMaxActiveBlocksPerMultiprocessor in cuda_occupancy.h of the CUDA toolkit, with
    the largest shared-memory carve-out; for tensor memory, tcgen05.alloc in the PTX ISA.
    """
    arch = ARCHES[target]
    per_warp = _round_up(32 * registers, 256)
    if registers > 255 or per_warp * _round_up(warps, 4) > 65536:
        return 0
    if shared_bytes > arch.shared_per_block:
        return 0
    by_resource = [
        32,
        64 // warps,
        16384 // per_warp * 4 // warps,
        arch.shared_per_sm // _round_up(shared_bytes + 1024, 128),
    ]
    if tensor_memory:
        by_resource.append(512 // tensor_memory)
    return min(by_resource)


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to


# --- limits -----------------------------------------------------------------------------------


def limits(report: Report) -> list[str]:
    """What breaks the absolute limits, one sentence each; empty if nothing does.

    - No launch spills. (sin and cos keep a table of up to TABLE_BYTES on the stack: in a kernel
      that computes them, local memory counts as spills where the stack is larger.)
    - No launch uses more shared memory than a block of the target has.
    - A large contiguous fp32 stream moves STREAM_SHARE of its accesses in 128 bits.
    """
    return [violation for row in report.rows for violation in _violations(row)]


def spills(row: Row) -> int:
    """Instructions that spill registers or fill them again."""
    return 0 if row.has_tables and row.facts.stack_bytes <= TABLE_BYTES else row.facts.spills


def _violations(row: Row) -> Iterator[str]:
    facts = row.facts
    where = f"{row.name} on sm_{facts.target} ({joined(row.lines) or 'no line known'})"
    if spills(row):
        yield f"{where}: {spills(row)} spill instructions, limit 0"
    most = ARCHES[facts.target].shared_per_block
    if facts.shared_bytes > most:
        yield f"{where}: {facts.shared_bytes} bytes of shared memory, limit {most}"
    if row.stream_share is not None and row.stream_share < STREAM_SHARE:
        yield (
            f"{where}: {row.stream_share:.0%} of the accesses of a contiguous fp32 stream move "
            f"128 bits, limit {STREAM_SHARE:.0%}"
        )


def stream_share_of(plan: Plan, launch: Launch, form: str, facts: KernelFacts) -> float | None:
    """The share of 128-bit accesses of a large contiguous fp32 stream; None for other kernels.

    Such a stream is an element-wise kernel or a full reduction over one axis of LARGE_STREAM
    elements or more, all of whose buffers are contiguous and fp32, and whose accesses walk along
    the axis, unmasked, from a multiple of 16 bytes. Left out of the count is what the kernel does
    once, whatever the elements: its runtime scalars, and the partials that a full reduction
    publishes and, after its atomic, folds.
    """
    stage = _streaming_stage(launch, form)
    if stage is None or not all(_is_plain(plan.buffer(name)) for name in launch.buffers):
        return None
    once = len(launch.kernel.scalars) + sum(isinstance(s, Reduce) for s in stage.body)
    wide = sum(n for width, n in facts.streamed.items() if width >= 128)
    narrow = max(0, sum(facts.streamed.values()) - wide - once)
    return wide / (wide + narrow) if wide + narrow else 0.0


def _streaming_stage(launch: Launch, form: str) -> Stage | None:
    """The only stage over the elements of a kernel that walks its buffers along one long axis."""
    if form not in ("pointwise", "reduce"):
        return None
    sizes = dict(zip(launch.kernel.sizes, launch.sizes, strict=True))
    kernel = substitute(launch.kernel, sizes)
    stage = kernel.stages[0]
    axes = kernel.axes + stage.axes
    if len(axes) != 1 or axes[0].extent < LARGE_STREAM:
        return None
    for s in stage.body:
        if isinstance(s, Load | Store):
            along = [atom for atom, _ in s.index.terms] == [axes[0].name]
            masked = isinstance(s, Load) and s.mask
            if not along or masked or s.index.offset % 4:
                return None
    return stage


def _is_plain(buffer: PlanBuffer) -> bool:
    """Contiguous fp32."""
    shape = buffer.type.shape
    dense = buffer.strides is None or tuple(buffer.strides) == contiguous_strides(shape)
    return dense and buffer.type.dtype is f32
