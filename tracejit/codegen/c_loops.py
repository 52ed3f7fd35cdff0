"""Stages of kernels as C loops, and what c_outer and c_matmul share with them.

The loops are walked as a `Nest` says; partial results of chunks are combined in their order, so
that results do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tracejit.codegen.c_body import Body, is_independent, opened
from tracejit.codegen.c_reduce import Fold, fold_of, lanes_of
from tracejit.codegen.c_text import C, block, loaded, memory_type, product, value_type
from tracejit.codegen.language import Line
from tracejit.records import dataclass
from tracejit.schedule.cpu.access import (
    carried,
    extents_of,
    fixed_and_moving,
    running_load,
    stride,
    variables,
)
from tracejit.schedule.cpu.loops import Loop, dealt, split
from tracejit.schedule.cpu.plan import Nest
from tracejit.schedule.kernel import (
    Axis,
    Compute,
    Kernel,
    Load,
    Reduce,
    Stage,
    Statement,
    Store,
    Var,
)

STREAMED = 8 << 20  # bytes of a result that is written past the caches
AHEAD = 16  # steps before a value says where to store, its place is asked for
NEAR = 512 << 10  # bytes of places that lie near anyway


@dataclass
class Task:
    """A function that computes one chunk of a stage or kernel; `lines` is its body. `straight`: the
    compiler must not make branches of its selects."""

    name: str
    chunks: int
    lines: list[Line]
    straight: bool = False


@dataclass
class Part:
    """What a kernel's function does next: run a task on all threads, then some lines itself."""

    task: Task | None
    after: list[Line]


def full_stage(
    kernel: Kernel, stage: Stage, nest: Nest | None, task_name: str, name: str
) -> tuple[Part, list[Line]]:
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
    vector, chunks = named(stage.axes, nest.vector), nest.chunks
    loops = split(stage.axes, vector, nest.block)
    inner = vector_loop(body, stage.body, vector, nest.block, folds)
    units, lines = parallel(loops, inner, chunks)
    head = [*opened(kernel, stage.body, name), *reduced_values(kernel, stage.body)]
    totals = [Line(f"{f.total} r{f.name} = {f.neutral};") for f in folds]
    saved = [Line(f"at->p{f.name}[chunk] = r{f.name};") for f in folds]
    lines = [*head, *units, *totals, *lines, *saved, *finished(lines)]
    task = Task(task_name, chunks, lines, _compares_extrema(stage.body))
    fields, after = [], []
    for f in folds:
        fields += partial_fields(f, chunks)
        after += combined(f, chunks)
    return Part(task, after), fields


def _compares_extrema(body: Sequence[Statement]) -> bool:
    """Whether values are compared that an extremum selected, as where a pooling looks for the place
    of its maximum: gcc knows both outcomes then, and goes from one branch to the next."""
    selected: set[int] = set()
    for s in body:
        if isinstance(s, Compute):
            if s.op.name in ("maximum", "minimum"):
                selected.add(s.out.id)
            elif s.op.name in ("eq", "ne") and any(v.id in selected for v in variables(s)):
                return True
    return False


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


def named(axes: Sequence[Axis], name: str) -> Axis:
    """The axis of a name."""
    return next(a for a in axes if a.name == name)


def limits(vector: Axis, size: int) -> tuple[str, str]:
    """Where the vector loop starts and ends, within a block where the axis is split."""
    if vector.extent <= size:
        return "0", str(vector.extent)
    start = f"{vector.name}_block * {size}"
    if vector.extent % size == 0:
        return start, f"{start} + {size}"
    return start, f"tj_least({start} + {size}, {vector.extent})"


def vector_loop(
    body: Body, statements: Sequence[Statement], vector: Axis, size: int, folds: Sequence[Fold]
) -> list[Line]:
    """The innermost loop, over a block of `size`. Its accumulators are set before it, and folded
    into totals (r…) after it. Before it stands what is the same in all its turns, which compilers
    leave inside where selects are branches to them."""
    fixed: Sequence[Statement] = ()
    if running_load(statements) is None:
        fixed, statements = fixed_and_moving(statements, vector)
    return under(body.lines(fixed), _vector_loop(body, statements, vector, size, folds))


def under(fixed: list[Line], lines: list[Line]) -> list[Line]:
    """Lines after others whose names they alone know."""
    return [Line("{"), *C.indent([*fixed, *lines]), Line("}")] if fixed else lines


def _vector_loop(
    body: Body, statements: Sequence[Statement], vector: Axis, size: int, folds: Sequence[Fold]
) -> list[Line]:
    lanes = lanes_of(folds, body)
    before, after = lanes.before, lanes.after
    first, last = limits(vector, size)
    pragma = []
    independent = is_independent(statements, vector.name)
    if independent:
        pragma = [Line(" ".join(["#pragma omp simd", *lanes.clauses]))]
    head = f"for (int64_t {vector.name} = {first}; {vector.name} < {last}; {vector.name}++)"
    # a reduction follows what it reduces: stores stand after all values
    running = running_load(statements)
    inner = fetched(body, statements, vector)
    stores = [s for s in statements if isinstance(s, Store)]
    taken = None
    if running is not None:
        taken, handed = carried(statements, running, stores[-1])
        before.append(_carried(body, running, taken, vector, first))
    for s in (s for s in statements if not isinstance(s, Store)):
        if taken is not None and s.out == taken:
            inner += body.assign(s, "carry")
        elif s is not running:
            inner += body.lines([s])
    inner += lanes.steps
    kept = {s.value: s.buffer for s in stores if s.buffer in body.local}
    for s in stores:
        if independent and is_streamed(body, s, vector, size):
            dtype, name = body.buffers[s.buffer], f"{s.buffer}_block"
            source = name
            if body.buffers.get(kept.get(s.value)) is dtype:
                source = f"{kept[s.value]} + {first}"  # lies in a local array anyway
            else:
                room = f"{name}[{min(vector.extent, size)}]"
                before.append(Line(f"{memory_type(dtype)} {room} __attribute__((aligned(64)));"))
                target = f"{name}[{vector.name} - ({first})]"
                inner.append(Line(f"{target} = {body.stored(s)};", s.where))
            place = body.index(s.index, {vector.name: f"({first})"})
            nbytes = f"({last} - ({first})) * {dtype.itemsize}"
            after.append(Line(f"tj_stream({s.buffer} + {place}, {source}, {nbytes});"))
        else:
            inner += body.lines([s])
            if running is not None and s.buffer == running.buffer:
                inner.append(Line(f"carry = {body.operand(handed, taken.dtype)};"))
    return [*before, *pragma, *block(head, inner), *after]


def fetched(body: Body, statements: Sequence[Statement], vector: Axis) -> list[Line]:
    """Lines that ask for the memory of coming steps' stores, where loaded values say their places,
    so that these steps need not wait for it."""
    lines = []
    loads = {s.out.id: s for s in statements if isinstance(s, Load) and not s.mask}
    for s in (s for s in statements if isinstance(s, Store) and s.buffer not in body.local):
        values = [(loads.get(a.id), step) for a, step in s.index.terms if isinstance(a, Var)]
        if len(values) != 1 or values[0][0] is None:
            continue
        ((load, step),) = values
        size = body.buffers[s.buffer].itemsize
        if s.mask and s.mask[0].high * step * size <= NEAR:
            continue
        if stride(load.index, vector.name) == 0 or stride(s.index, vector.name) != 0:
            continue
        later = {vector.name: f"tj_least({vector.name} + {AHEAD}, {vector.extent - 1})"}
        rest = replace(s.index, terms=tuple(t for t in s.index.terms if not isinstance(t[0], Var)))
        value = loaded(f"{load.buffer}[{body.index(load.index, later)}]", body.buffers[load.buffer])
        place = f"(uint64_t)({value}) * {step} + {body.index(rest, later)}"
        lines.append(Line(f"tj_fetch({s.buffer}, ({place}) * {size});"))
    return lines


def _carried(body: Body, s: Load, taken: Var, vector: Axis, first: str) -> Line:
    """What a running result's steps hand on, in a register: at first what lies before the block."""
    place = body.index(s.index, {vector.name: f"({first})"})
    kind, zero = value_type(taken.dtype), C.literal(0, taken.dtype, False)
    held = loaded(f"{s.buffer}[{place}]", body.buffers[s.buffer])
    start = zero if first == "0" else f"({first}) ? {held} : {zero}"
    return Line(f"{kind} carry = {start};", s.where)


def is_streamed(body: Body, store: Store, vector: Axis, block: int) -> bool:
    """Whether a store goes past the caches: to rows of a large buffer that is only written."""
    access = next(b.access for b in body.kernel.buffers if b.name == store.buffer)
    size = product(body.extents[a] for a, _ in store.index.terms if isinstance(a, str))
    return (
        access == "w"
        and stride(store.index, vector.name) == 1
        and vector.extent >= block // 4
        and size * body.buffers[store.buffer].itemsize >= STREAMED
    )


def nested(loops: Sequence[Loop], inner: list[Line]) -> list[Line]:
    """Loops around lines."""
    for loop in reversed(loops):
        v = loop.variable
        inner = block(f"for (int64_t {v} = 0; {v} < {loop.count}; {v}++)", inner)
    return inner


def parallel(
    loops: Sequence[Loop], inner: list[Line], chunks: int
) -> tuple[list[Line], list[Line]]:
    """(the range of units of a chunk, the loop over them): the leading loops flattened into units
    as far as there must be units for the chunks."""
    depth, units, _ = dealt(loops, chunks)
    lines = nested(loops[depth:], inner)
    if chunks == 1:
        return [], lines
    if depth == 1:
        unit = loops[0].variable
    else:
        unit = "unit"
        lines = [*unravelled(loops[:depth], unit), *lines]
    head = f"for (int64_t {unit} = first; {unit} < last; {unit}++)"
    return chunk_range(units, chunks), block(head, lines)


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
