"""Stages of kernels as C loops, and what c_outer and c_matmul share with them.

One loop of each nest is the vector loop: the axis that most accesses walk contiguously. Axes longer
than BLOCK are split, the blocks being one more outer loop. The outer loops are flattened as far as
it takes to make units of work, which are dealt to threads in chunks; the number of chunks depends
on the sizes only, and partial results are combined in their order, so that results do not depend on
the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tracejit.codegen.c_body import Body, extents_of, is_independent, opened, variables
from tracejit.codegen.c_reduce import Fold, fold_of, lanes_of
from tracejit.codegen.c_text import C, block, memory_type, product, value_type
from tracejit.codegen.language import Line
from tracejit.schedule.kernel import (
    Axis,
    Compute,
    FloorDiv,
    Index,
    Kernel,
    Load,
    Mod,
    Reduce,
    Stage,
    Statement,
    Store,
)

BLOCK = 1024  # elements of a vector loop
COLUMNS = 256  # elements of a vector loop whose reductions run over other axes
RUN = 64  # values that a float32 lane adds up before it is folded into float64
GRAIN = 65536  # of the cost units of `weight`: a chunk is worth handing to a thread (some 10 µs)
MAX_CHUNKS = 128
STREAMED = 8 << 20  # bytes of a result that is written past the caches


@dataclass(frozen=True)
class Loop:
    """A loop over an axis, in steps of a block where `step` is not 1."""

    axis: Axis
    step: int = 1

    @property
    def count(self) -> int:
        return -(-self.axis.extent // self.step)

    @property
    def variable(self) -> str:
        return f"{self.axis.name}_block" if self.step > 1 else self.axis.name


@dataclass
class Task:
    """A function that computes one chunk of a stage or kernel; `lines` is its body."""

    name: str
    chunks: int
    lines: list[Line]


@dataclass
class Part:
    """What a kernel's function does next: run a task on all threads, then some lines itself."""

    task: Task | None
    after: list[Line]


def weight(body: Sequence[Statement]) -> int:
    """The cost of one point, an access of memory being 2 and an addition 1. Of dearer operations it
    is half their cost: the accesses do not wait for them."""
    total = 0
    for s in body:
        if isinstance(s, Compute):
            total += (s.op.cost + 1) // 2
        else:
            total += 2
    return total


def chunks_of(units: int, work: int) -> int:
    """How many chunks `units` of `work` cost units in all are dealt in."""
    return max(1, min(units, work // GRAIN, MAX_CHUNKS))


def full_stage(kernel: Kernel, stage: Stage, task_name: str, name: str) -> tuple[Part, list[Line]]:
    """A stage of a kernel without outer axes: a loop nest of its own."""
    body = Body(kernel, extents_of(kernel))
    if not stage.axes:
        lines = [*reduced_values(kernel, stage.body), *body.lines(stage.body)]
        saved, fields = [], []
        for s in stage.body:
            if isinstance(s, Reduce):  # over axes of extent 1
                fields.append(Line(f"{value_type(s.out.dtype)} {s.out!r};"))
                saved.append(Line(f"at->{s.out!r} = {body.operand(s.value, s.out.dtype)};"))
        lines = [*opened(kernel, stage.body, name)[1:], *lines, *saved]
        return Part(None, [Line("{"), *C.indent(lines), Line("}")]), fields
    folds = [fold_of(s) for s in stage.body if isinstance(s, Reduce)]
    vector = vector_axis(stage.axes, stage.body)
    loops = split(stage.axes, vector, BLOCK)
    work = product(a.extent for a in stage.axes) * weight(stage.body)
    inner = vector_loop(body, stage.body, vector, folds)
    units, lines, chunks = parallel(loops, inner, work)
    head = [*opened(kernel, stage.body, name), *reduced_values(kernel, stage.body)]
    totals = [Line(f"{f.total} r{f.name} = {f.neutral};") for f in folds]
    saved = [Line(f"at->p{f.name}[chunk] = r{f.name};") for f in folds]
    task = Task(task_name, chunks, [*head, *units, *totals, *lines, *saved, *finished(lines)])
    fields, after = [], []
    for f in folds:
        fields += partial_fields(f, chunks)
        after += combined(f, chunks)
    return Part(task, after), fields


def finished(lines: Sequence[Line]) -> list[Line]:
    """What a task ends with."""
    streams = any("tj_stream(" in line.text for line in lines)
    return [Line("tj_stream_end();")] if streams else []


def partial_fields(f: Fold, chunks: int) -> list[Line]:
    """Struct fields of a reduction over chunks: the partial results and the value."""
    return [
        Line(f"{f.total} p{f.name}[{chunks}];"),
        Line(f"{value_type(f.reduce.out.dtype)} v{f.name};"),
    ]


def combined(f: Fold, chunks: int) -> list[Line]:
    """Lines that fold the partial results of all chunks, in order."""
    if chunks == 1:
        return [Line(f"at->v{f.name} = {f.result(f'at->p{f.name}[0]')};", f.reduce.where)]
    total = f"r{f.name}"
    return [
        Line(f"{f.total} {total} = at->p{f.name}[0];"),
        Line(f"for (int64_t i = 1; i < {chunks}; i++) {f.merge(total, f'at->p{f.name}[i]')}"),
        Line(f"at->v{f.name} = {f.result(total)};", f.reduce.where),
    ]


def reduced_values(kernel: Kernel, body: Sequence[Statement]) -> list[Line]:
    """Locals for the reduced values of earlier stages that statements use."""
    reduced = {
        s.out.id: s.out for stage in kernel.stages for s in stage.body if isinstance(s, Reduce)
    }
    used = {id: reduced[id] for id in operands(body) if id in reduced}
    return [Line(f"const {value_type(v.dtype)} {v!r} = at->{v!r};") for v in used.values()]


def operands(body: Sequence[Statement]) -> list[int]:
    """The variables that statements read."""
    return [v.id for s in body for v in variables(s)]


# --- loops


def vector_axis(axes: Sequence[Axis], body: Sequence[Statement]) -> Axis:
    """The axis that most accesses walk contiguously, the last one at a tie."""
    return max(axes, key=lambda a: (contiguity(a, body), axes.index(a)))


def contiguity(axis: Axis, body: Sequence[Statement]) -> int:
    """How many accesses an axis walks element by element, less those it strides through."""
    if axis.extent == 1:
        return -1000
    votes = 0
    for s in body:
        if isinstance(s, Load | Store):
            weight = 2 if isinstance(s, Store) else 1
            step = stride(s.index, axis.name)
            votes += weight if step == 1 else -weight if step else 0
    return votes


def stride(index: Index, axis: str) -> int:
    """How far an index moves with an axis, besides what values decide; 2 where that varies."""
    for atom, c in index.terms:
        if atom == axis:
            return abs(c)
        if isinstance(atom, FloorDiv | Mod) and stride(atom.index, axis):
            return 2
    return 0


def split(axes: Sequence[Axis], vector: Axis, size: int) -> list[Loop]:
    """The loops outside the vector loop: all other axes, and the blocks of the vector axis."""
    loops = []
    for axis in axes:
        if axis is not vector:
            loops.append(Loop(axis))
        elif axis.extent > size:
            loops.append(Loop(axis, size))
    return loops


def limits(vector: Axis, size: int) -> tuple[str, str]:
    """Where the vector loop starts and ends, within a block where the axis is split."""
    if vector.extent <= size:
        return "0", str(vector.extent)
    start = f"{vector.name}_block * {size}"
    if vector.extent % size == 0:
        return start, f"{start} + {size}"
    return start, f"tj_least({start} + {size}, {vector.extent})"


def vector_loop(
    body: Body, statements: Sequence[Statement], vector: Axis, folds: Sequence[Fold]
) -> list[Line]:
    """The innermost loop, with accumulators around it that are folded into totals (r…)."""
    lanes = lanes_of(folds, body)
    before, after = lanes.before, lanes.after
    first, last = limits(vector, BLOCK)
    pragma = []
    independent = is_independent(statements, vector.name)
    if independent:
        pragma = [Line(" ".join(["#pragma omp simd", *lanes.clauses]))]
    head = f"for (int64_t {vector.name} = {first}; {vector.name} < {last}; {vector.name}++)"
    # a reduction follows what it reduces: stores stand after all values
    inner = body.lines(s for s in statements if not isinstance(s, Store))
    inner += lanes.steps
    stores = [s for s in statements if isinstance(s, Store)]
    kept = {s.value: s.buffer for s in stores if s.buffer in body.local}
    for s in stores:
        if independent and is_streamed(body, s, vector):
            dtype, name = body.buffers[s.buffer], f"{s.buffer}_block"
            source = name
            if body.buffers.get(kept.get(s.value)) is dtype:
                source = f"{kept[s.value]} + {first}"  # lies in a local array anyway
            else:
                size = min(vector.extent, BLOCK)
                before.append(
                    Line(f"{memory_type(dtype)} {name}[{size}] __attribute__((aligned(64)));")
                )
                target = f"{name}[{vector.name} - ({first})]"
                inner.append(Line(f"{target} = {body.stored(s)};", s.where))
            place = body.index(s.index, {vector.name: f"({first})"})
            nbytes = f"({last} - ({first})) * {dtype.itemsize}"
            after.append(Line(f"tj_stream({s.buffer} + {place}, {source}, {nbytes});"))
        else:
            inner += body.lines([s])
    return [*before, *pragma, *block(head, inner), *after]


def is_streamed(body: Body, store: Store, vector: Axis) -> bool:
    """Whether a store goes past the caches: to rows of a large buffer that is only written."""
    access = next(b.access for b in body.kernel.buffers if b.name == store.buffer)
    size = product(body.extents[a] for a, _ in store.index.terms if isinstance(a, str))
    return (
        access == "w"
        and stride(store.index, vector.name) == 1
        and vector.extent >= BLOCK // 4
        and size * body.buffers[store.buffer].itemsize >= STREAMED
    )


def nested(loops: Sequence[Loop], inner: list[Line]) -> list[Line]:
    """Loops around lines."""
    for loop in reversed(loops):
        v = loop.variable
        inner = block(f"for (int64_t {v} = 0; {v} < {loop.count}; {v}++)", inner)
    return inner


def parallel(
    loops: Sequence[Loop], inner: list[Line], work: int
) -> tuple[list[Line], list[Line], int]:
    """(the range of units of a chunk, the loop over them, the number of chunks): the leading loops
    flattened into units as far as there must be units for the chunks."""
    wanted = chunks_of(MAX_CHUNKS, work)
    depth, units = 0, 1
    while depth < len(loops) and (units < 4 * wanted and wanted > 1):
        units *= loops[depth].count
        depth += 1
    lines = nested(loops[depth:], inner)
    if wanted == 1 or units <= 1:
        return [], nested(loops[:depth], lines), 1
    chunks = min(units, wanted)
    if depth == 1:
        unit = loops[0].variable
    else:
        unit = "unit"
        lines = [*unravelled(loops[:depth], unit), *lines]
    head = f"for (int64_t {unit} = first; {unit} < last; {unit}++)"
    return chunk_range(units, chunks), block(head, lines), chunks


def chunk_range(units: int, chunks: int) -> list[Line]:
    """The units of a chunk."""
    return [
        Line(f"const int64_t first = chunk * {units} / {chunks};"),
        Line(f"const int64_t last = (chunk + 1) * {units} / {chunks};"),
    ]


def unravelled(loops: Sequence[Loop], unit: str) -> list[Line]:
    """The loop variables of a unit's number."""
    lines, below = [], product(loop.count for loop in loops)
    for i, loop in enumerate(loops):
        below //= loop.count
        text = unit if below == 1 else f"{unit} / {below}"
        if i:
            text = f"{f'({text})' if below > 1 else text} % {loop.count}"
        lines.append(Line(f"const int64_t {loop.variable} = {text};"))
    return lines
