"""The CpuPlan: what the C executor runs, with every decision that is not about spelling C.

A `CpuKernel` is a Kernel with plain numbers as sizes and how its loops are walked; a `CpuPlan`
lists the kernels, calls them in their order, and says where they work. `lower.py` makes one from a
Plan, `text.py` has its text form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

from tracejit.ir.literals import print_literal
from tracejit.records import dataclass
from tracejit.schedule.kernel import Buffer, Kernel
from tracejit.schedule.memory import Layout
from tracejit.schedule.memory import Place as Position
from tracejit.schedule.plan import PlanBuffer

LINE = 64  # bytes: what working memory is aligned to


@dataclass(frozen=True, slots=True)
class Nest:
    """How a loop nest is walked.

    vector: the axis of the innermost loop, which goes over blocks of `block` of its points.
    chunks: in how many parts the loops around it are dealt to threads.
    """

    vector: str
    block: int
    chunks: int


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a contraction is cut, for vectors of `vector_bytes`.

    way: "tiles" of the result are dealt to threads; or "panels", tiles that pack their own part of
        B; or "windows", tiles that read A through tables of places; or "winograd", convolutions by
        transforms (winograd.py); or "slices" of k, for results much smaller than the operands; or
        "dots", one loop along k per result, for products with a vector.
    rows, vectors: the block of the result that a micro-kernel keeps in registers.
    tile_rows, tile_columns: the block that stays in the first cache.
    a: "direct" where A is read as it lies; else it is packed with k contiguous ("rows"), or in
        "strips" of a micro-kernel's rows, or "copied" as windows read it.
    packed_from: the first strip of B that is packed, as wide as a micro-kernel's block.
    deep: k is summed in several passes. round: how many batches are packed at once.
    chunks: in how many parts tiles or dots are dealt. pack_chunks: and the packing.
    """

    vector_bytes: int
    way: str
    rows: int
    vectors: int
    tile_rows: int
    tile_columns: int
    slices: int
    a: str
    packed_from: int
    deep: bool
    round: int
    chunks: int
    pack_chunks: int


@dataclass(frozen=True, slots=True)
class Blocks:
    """How attention is cut, for vectors of `vector_bytes`: `m` queries and `n` keys are a block.

    rows: of the block of a product that a micro-kernel keeps in registers.
    chunks: in how many parts the work is dealt, each of which works in memory of its own.
    """

    vector_bytes: int
    rows: int
    m: int
    n: int
    chunks: int


@dataclass(frozen=True)
class CpuKernel:
    """What is compiled as one function: a kernel with plain numbers as sizes.

    A launch binds the first of its buffers. Then come `partials`, which lie in the memory that the
    kernel works in, and `rows`, which are local arrays of one row.

    columns:  the second half of column sums, as a kernel of its own. The first half is the last
        stage: it goes over each row while it is in the cache, and each chunk of rows adds up its
        own part of each column in `partials`. `columns` adds up these parts in their order. Or the
        second half of a scatter whose indices are dealt in parts (parts.py).
    outer:    how the outer axes are walked, vector "" where an inner axis is the vector loop.
    inner:    how each stage's axes are walked, None for those that have none or a contraction.
    tiling:   of the contraction that the first stage starts with.
    blocks:   of the attention that it is.
    """

    kernel: Kernel
    columns: CpuKernel | None = None
    partials: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    outer: Nest | None = None
    inner: tuple[Nest | None, ...] = ()
    tiling: Tiling | None = None
    blocks: Blocks | None = None

    def __str__(self) -> str:
        """How it is walked, and the kernel itself."""
        lines = []
        if self.outer is not None:
            lines.append(f"outer: {_nest(self.outer)}")
        for number, nest in enumerate(self.inner):
            if nest is not None:
                lines.append(f"stage {number}: {_nest(nest)}")
        for word, cut in (("tiling", self.tiling), ("blocks", self.blocks)):
            if cut is not None:
                fields = asdict(cut).items()
                lines.append(f"{word} {', '.join(f'{k}={print_literal(v)}' for k, v in fields)}")
        if self.rows:
            lines.append(f"rows {', '.join(self.rows)}")
        if self.partials:
            lines.append(f"partials {', '.join(self.partials)}")
        lines.append(str(self.kernel))
        if self.columns is not None:
            lines += ["columns {", *_indented(str(self.columns), 2), "}"]
        return "\n".join(lines)

    @property
    def bound(self) -> tuple[Buffer, ...]:
        """The buffers that a launch binds."""
        buffers = self.in_memory.buffers
        return buffers[: len(buffers) - len(self.partials)]

    @property
    def in_memory(self) -> Kernel:
        """The kernel without the local arrays among its buffers."""
        count = len(self.kernel.buffers) - len(self.rows)
        return replace(self.kernel, buffers=self.kernel.buffers[:count])

    @property
    def partial_offsets(self) -> tuple[int, ...]:
        """Where each of the partials starts, in bytes, and where the last one ends."""
        offsets = [0]
        for name in self.partials:
            *_, before, last = self.kernel.stages
            (width,) = before.axes if last.in_order else last.axes
            size = next(b.dtype.itemsize for b in self.kernel.buffers if b.name == name)
            nbytes = self.outer.chunks * width.extent * size
            offsets.append(offsets[-1] + -(-nbytes // LINE) * LINE)
        return tuple(offsets)


@dataclass(frozen=True)
class CpuLaunch:
    """A kernel with its bindings, as passes hand it on: names of buffers and slots of the plan's
    scalars, in the order in which the kernel lists them, and the loop that it is part of. `apart`:
    of a launch for one part of a loop's rows, by how many bytes the parts of each buffer differ."""

    kernel: CpuKernel
    buffers: tuple[str, ...]
    scalars: tuple[int, ...]
    loop: int | None = None
    apart: tuple[int, ...] = ()


@dataclass(frozen=True)
class Call:
    """A launch in a plan: of the kernel of a name, which works in the memory `working` ("" for
    none). Those of one loop stand next to each other, and are repeated; for each part of a loop's
    rows, `apart` bytes further in each buffer."""

    kernel: str
    buffers: tuple[str, ...]
    scalars: tuple[int, ...]
    working: str
    loop: int | None = None
    apart: tuple[int, ...] = ()

    @property
    def moves(self) -> tuple[tuple[str, int], ...]:
        """Each buffer, and how many bytes further it lies for the next part of a loop's rows."""
        return tuple(zip(self.buffers, self.apart or (0,) * len(self.buffers), strict=True))


@dataclass(frozen=True)
class Place:
    """`memory` lies `offset` bytes from the start of the output `room`, or of the arena ("")."""

    memory: str
    room: str
    offset: int


@dataclass(frozen=True)
class CpuPlan:
    """A plan's kernels, their calls in the order in which they run, and where they work.

    kernels: by name, in the order of their first calls.
    working: the names and bytes of the memory that kernels work in, of each part of a loop.
    loops: the steps of each. parts: of its rows, each of which runs all steps.
    """

    calls: tuple[Call, ...]
    kernels: Mapping[str, CpuKernel]
    working: tuple[tuple[str, int], ...]
    places: tuple[Place, ...]
    arena_bytes: int
    loops: tuple[int, ...] = ()
    parts: tuple[int, ...] = ()

    def times(self, call: Call) -> int:
        """In how many steps a call is made."""
        return 1 if call.loop is None else self.loops[call.loop]

    def parts_of(self, call: Call) -> int:
        """For how many parts of the rows a call is made in each step."""
        return 1 if call.loop is None else self.parts[call.loop]

    def __str__(self) -> str:
        lines = [f"cpu plan arena {self.arena_bytes} {{"]
        for number, (steps, parts) in enumerate(zip(self.loops, self.parts, strict=True)):
            dealt = f" in {parts} parts" if parts > 1 else ""
            lines.append(f"  loop {number}: {steps} steps{dealt}")
        lines += [f"  works {name}: {nbytes}" for name, nbytes in self.working]
        for p in self.places:
            lines.append(f"  place {p.memory}{f' in {p.room}' if p.room else ''} at {p.offset}")
        for call in self.calls:
            bindings = _bindings(call, self.kernels[call.kernel])
            working = f" in {call.working}" if call.working else ""
            loop = "" if call.loop is None else f" loop {call.loop}"
            apart = f" apart {', '.join(map(str, call.apart))}" if call.apart else ""
            lines.append(f"  call {call.kernel}({bindings}){working}{loop}{apart}")
        for name, kernel in self.kernels.items():
            lines += [f"  kernel {name} {{", *_indented(str(kernel), 4), "  }"]
        return "\n".join([*lines, "}"])

    def addresses(self, buffers: Sequence[PlanBuffer]) -> list[str]:
        """What the addresses of a run are of: the plan's buffers, then working memory."""
        return [b.name for b in buffers] + [name for name, _ in self.working]

    def layout(self, buffers: Sequence[PlanBuffer]) -> Layout:
        """Where the kernels of a plan with these buffers work."""
        at = {name: i for i, name in enumerate(self.addresses(buffers))}
        places = {
            at[p.memory]: Position(at[p.room] if p.room else None, p.offset) for p in self.places
        }
        return Layout(places, len(at), self.arena_bytes)


def _indented(text: str, by: int) -> list[str]:
    return [f"{' ' * by}{line}" for line in text.splitlines()]


def _nest(nest: Nest) -> str:
    walked = f"{nest.vector} by {nest.block}" if nest.vector else "points"
    return f"{walked} in {nest.chunks} chunks"


def _bindings(call: Call, kernel: CpuKernel) -> str:
    buffers = zip((b.name for b in kernel.bound), call.buffers, strict=True)
    scalars = zip(kernel.kernel.scalars, call.scalars, strict=True)
    lists = [", ".join(f"{n}={v}" for n, v in pairs) for pairs in (buffers, scalars)]
    return "; ".join(lists if lists[1] else lists[:1])
