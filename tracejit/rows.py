"""One launch of a kernel report, and the limits that it is held against.

In: what was read off the machine code of a launch, and what the launch issues. `limits` lists what
no kernel may do, `shortfalls` what keeps a launch from using its GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Protocol

from tracejit.aot import KernelFacts
from tracejit.codegen.row_passes import row_accesses
from tracejit.codegen.triton_foreach import words_of
from tracejit.codegen.triton_forms import form_of
from tracejit.codegen.work import Work
from tracejit.gpus import ARCHES
from tracejit.ir.types import contiguous_strides, f32
from tracejit.records import dataclass
from tracejit.roofline import Filling, Prediction, fall_short, said
from tracejit.runtime.triton_launch import LoadedLaunch
from tracejit.schedule.foreach import columns_of
from tracejit.schedule.kernel import Load, Reduce, Stage, Store
from tracejit.schedule.plan import Launch, Plan, PlanBuffer
from tracejit.schedule.sizes import substitute
from tracejit.tables import joined

LARGE_STREAM = 1 << 17  # elements from which a stream has to move 128 bits at a time
STREAM_SHARE = 0.9  # of its accesses
TABLE_BYTES = 48  # of stack: what the argument reduction within sin and cos keeps there


@dataclass(frozen=True)
class Row:
    """One launch. `occupancy` is CTAs per SM; `lines` are the user's, as file:line.

    `works` and `part_bytes` are what each kernel of the launch issues, and moves at least. Its
    programs fill the first GPU of the target as `filled` says; on each they take what is
    `predicted`. `stream_share` is the share of 128-bit accesses where the kernel is a large
    contiguous fp32 stream (`stream_share_of` says what that is), else None.
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
    works: tuple[Work, ...]
    part_bytes: tuple[int, ...]
    filled: Filling
    predicted: Mapping[str, Prediction]
    inputs: tuple[str, ...] = ()  # of the step that it reads or writes, where they have names
    times: int = 1  # that it is launched: in a loop, once a step

    @property
    def issued_bytes(self) -> int:
        """What all programs load and store."""
        return sum(w.issued for w in self.works)

    @property
    def operations(self) -> int:
        """What all programs compute, multiplications and additions of contractions included."""
        return sum(w.operations + w.products for w in self.works)

    def as_dict(self) -> dict[str, object]:
        """The row as plain data for JSON."""
        plain = asdict(self)
        facts = plain.pop("facts")
        more = {"wide_share": self.facts.wide_share, "spills": spills(self)}
        more |= {"issued_bytes": self.issued_bytes, "operations": self.operations}
        return plain | facts | more


# --- limits -----------------------------------------------------------------------------------


class HasRows(Protocol):
    """A report."""

    rows: Sequence[Row]


def limits(report: HasRows) -> list[str]:
    """What breaks the absolute limits, one sentence each; empty if nothing does.

    - No launch spills. (sin and cos keep a table of up to TABLE_BYTES on the stack: in a kernel
      that computes them, local memory counts as spills where the stack is larger.)
    - No launch uses more shared memory than a block of the target has.
    - A large contiguous fp32 stream moves STREAM_SHARE of its accesses in 128 bits; so do large
      fp32 rows of any length.
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


@dataclass(frozen=True)
class Shortfall:
    """What keeps a launch from using its GPU: which launch, of what, the number, its limit."""

    launch: int
    kernel: str
    what: str  # "issued", "in flight", "balance" or "spills"
    number: float
    limit: float

    def __str__(self) -> str:
        return f"{self.launch}: {self.kernel}: {said(self.what, self.number, self.limit)}"


def shortfalls(report: HasRows) -> list[Shortfall]:
    """What keeps launches from using their GPU (`roofline.py`), and spills."""
    found = []
    for i, row in enumerate(report.rows):
        short = fall_short(row.works, row.part_bytes, row.filled)
        if spills(row):
            short.append(("spills", spills(row), 0))
        found += [Shortfall(i, row.name, *one) for one in short]
    return found


def stream_share_of(plan: Plan, launch: Launch, form: str, facts: KernelFacts) -> float | None:
    """The share of 128-bit accesses of a large contiguous fp32 stream; None for other kernels.

    Such a stream is an element-wise kernel or a full reduction over one axis of LARGE_STREAM
    elements or more, all of whose buffers are contiguous and fp32, and whose accesses walk along
    the axis, unmasked, from a multiple of 16 bytes. Left out of the count is what the kernel does
    once, whatever the elements: its runtime scalars, and the partials that a full reduction
    publishes and, after its atomic, folds; of a foreach, also what it reads of its tables.
    """
    kernel, words = launch.kernel, 0
    if kernel.foreach:
        columns, words = columns_of(kernel), words_of(kernel)
        launch = max(launch.alone(), key=lambda one: one.sizes)
        kernel, form = columns.kernel, form_of(columns.kernel)
        words += columns.flat.count(False)  # numbers that a whole row reads
    stage = _streaming_stage(launch, form, whole_row=words > 0)
    if stage is None or not all(_is_plain(plan.buffer(name)) for name in launch.buffers):
        return None
    once = len(kernel.scalars) + sum(isinstance(s, Reduce) for s in stage.body) + words
    wide = sum(n for width, n in facts.streamed.items() if width >= 128)
    narrow = max(0, sum(facts.streamed.values()) - wide - once)
    return wide / (wide + narrow) if wide + narrow else 0.0


def peeled_share_of(launch: Launch, loaded: LoadedLaunch, facts: KernelFacts) -> float | None:
    """The share of 128-bit accesses among those of large fp32 rows that do not begin or end with
    one: of as many as the tile takes. Left out is what the kernel does once for a row, whatever its
    length. None for other kernels."""
    kernel, shape = launch.kernel, loaded.geometry
    if "peeled" not in loaded.source.name or kernel.parts:
        return None
    types = {b.name: b.dtype for b in kernel.buffers}
    if any(types[s.buffer] is not f32 for s, _ in row_accesses(kernel)):
        return None
    tile = shape.constants["BLOCK_I"] // (32 * shape.num_warps * shape.constants["UNIT"])
    needed = loaded.source.text.count("tl.multiple_of(") * max(1, tile)
    wide = sum(n for width, n in facts.streamed.items() if width >= 128)
    return min(1.0, wide / needed)


def _streaming_stage(launch: Launch, form: str, whole_row: bool) -> Stage | None:
    """The only stage over the elements of a kernel that walks its buffers along one long axis; what
    it reads at one place may be left out."""
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
            if whole_row and isinstance(s, Load) and not s.index.terms:
                continue
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
