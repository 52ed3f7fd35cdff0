"""Column sums that ride along with the row kernel before them.

In: kernels in the order of a plan, sizes as plain numbers. A kernel of rows (a layer norm, forward
and backward) is often followed by one that reduces the columns of the same elements (its weights'
gradients), which would read them all from memory once more. Out: `Ride`s, where the row kernel does
that for each row while the row is in the cache: every chunk of rows adds up its own part of each
column, and a small kernel folds the parts in their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tracejit.codegen.c_body import has_value, opened
from tracejit.codegen.c_loops import GRAIN, MAX_CHUNKS, Part, Task, finished, weight
from tracejit.codegen.c_outer import OverOuter, parts_of
from tracejit.ir.types import f32, f64
from tracejit.schedule.axes import indices_of, map_indices, position
from tracejit.schedule.kernel import (
    Axis,
    Buffer,
    Compute,
    FloorDiv,
    Index,
    Kernel,
    Load,
    Mod,
    Operand,
    Reduce,
    Scalar,
    Stage,
    Statement,
    Store,
    Var,
)
from tracejit.schedule.plan import Launch

ARRAY_BYTES = 64 << 10  # of the arrays that a chunk adds its columns up in
ROWS = 16  # of a chunk at least: its part of the columns is written and read once more


@dataclass(frozen=True)
class Ride:
    """A row kernel and what rides along.

    rows: the row kernel, with the buffers and scalars of both. stage: what is done for each row,
    with reductions over the rows. chunks: in how many parts. columns: the kernel that folds the
    parts, and ends as the second one did. parts: the buffers of the parts, one per reduction, which
    neither plan nor `rows` knows.
    """

    rows: Kernel
    stage: Stage
    chunks: int
    columns: Kernel
    parts: tuple[Buffer, ...]

    @property
    def part_elements(self) -> int:
        """Elements of each buffer of parts."""
        return self.chunks * self.stage.axes[0].extent


def with_rides(launches: Sequence[Launch]) -> Iterator[tuple[Launch, Ride | None]]:
    """The launches, each with what rides along; those that do are not listed themselves."""
    waiting = list(launches)
    while waiting:
        launch = waiting.pop(0)
        found = _ride(launch, waiting[0]) if waiting else None
        if found is not None:
            waiting.pop(0)
        yield found or (launch, None)


def ride_parts(ride: Ride, name: str) -> list[Part]:
    """The tasks of a ride: all rows, then the columns."""
    rows = OverOuter(ride.rows, f"{name}_chunk").riding(ride.stage, ride.chunks, ride.parts)
    body = [s for stage in (*ride.rows.stages, ride.stage) for s in stage.body]
    body += [Store(part.name, Index(), 0) for part in ride.parts]
    kernel = replace(ride.rows, buffers=(*ride.rows.buffers, *ride.parts))
    lines = [*opened(kernel, body, name), *rows.lines, *finished(rows.lines)]
    columns, _ = parts_of(ride.columns, f"{name}_columns", name)
    return [Part(Task(rows.name, rows.chunks, lines), []), *columns]


def _ride(rows: Launch, columns: Launch) -> tuple[Launch, Ride] | None:
    """Both as one, where the second can ride along with the first."""
    first, second = rows.kernel, columns.kernel
    if not (_is_rows(first) and _sums_columns(second)):
        return None
    (row,), (across,) = first.axes, next(s.axes for s in first.stages if s.axes)
    (column,), (down,) = second.axes, second.stages[0].axes
    if (row.extent, across.extent) != (down.extent, column.extent):
        return None
    reduces = [s for s in second.stages[0].body if isinstance(s, Reduce)]
    size = sum(s.out.dtype.itemsize for s in reduces)
    work = row.extent * across.extent * sum(weight(stage.body) for stage in first.stages)
    chunks = max(1, min(row.extent // ROWS, work // GRAIN, MAX_CHUNKS))
    if across.extent * size * 3 > ARRAY_BYTES:  # of floats, and of doubles where a chunk is long
        return None
    joined, names, scalars = _joined(rows, columns)
    second = _renamed(second, names, scalars)
    swapped = {column.name: across.name, down.name: row.name}
    stage = map_indices(replace(second, stages=second.stages[:1]), _swap(swapped)).stages[0]
    if not _is_ready(first, stage, row, across):
        return None
    stage = Stage((across,), _shifted(stage.body, 1 + _last(first)))
    kernel = replace(first, buffers=joined.kernel.buffers, scalars=joined.kernel.scalars)
    parts = tuple(
        Buffer(f"part{k}", f64 if s.out.dtype is f64 else f32, "rw") for k, s in enumerate(reduces)
    )
    ending = _ending(second, reduces, parts, chunks)
    return replace(joined, kernel=kernel), Ride(kernel, stage, chunks, ending, parts)


def _is_rows(kernel: Kernel) -> bool:
    """Whether a kernel goes over rows, one after another."""
    inner = {stage.axes for stage in kernel.stages if stage.axes}
    return (
        len(kernel.axes) == 1
        and len(inner) == 1
        and len(next(iter(inner))) == 1
        and OverOuter(kernel, "").by_rows
    )


def _sums_columns(kernel: Kernel) -> bool:
    """Whether a kernel reduces columns in its first stage, and then ends with them."""
    first, *rest = kernel.stages
    reduces = [s for s in first.body if isinstance(s, Reduce)]
    return (
        len(kernel.axes) == 1
        and first.dot is None
        and len(first.axes) == 1
        and bool(reduces)
        and all(s.out.dtype.is_float for s in reduces)
        and not any(isinstance(s, Store) for s in first.body)
        and not any(map(has_value, indices_of(kernel)))
        and all(not stage.axes for stage in rest)
        and not OverOuter(kernel, "").by_rows
    )


def _is_ready(rows: Kernel, stage: Stage, row: Axis, across: Axis) -> bool:
    """Whether all that the rider reads is there when a row is done: what the row kernel writes is
    read where it was written in this row; and whether the two read something large together."""
    written: dict[str, set[tuple]] = {}
    seen: set[tuple] = set()
    for s in (s for stage in rows.stages for s in stage.body):
        if isinstance(s, Store):
            written.setdefault(s.buffer, set()).add(_place(s.index))
        if isinstance(s, Store | Load):
            seen.add((s.buffer, _place(s.index)))
    shared = False
    for s in stage.body:
        if not isinstance(s, Load):
            continue
        places = written.get(s.buffer)
        if places is not None and (places != {_place(s.index)} or s.mask):
            return False
        walked = {atom for atom, _ in s.index.terms}
        shared |= (s.buffer, _place(s.index)) in seen and walked >= {row.name, across.name}
    return shared


def _place(index: Index) -> tuple:
    return frozenset(index.terms), index.offset


# --- the two kernels' parameters and variables


def _joined(a: Launch, b: Launch) -> tuple[Launch, dict[str, str], dict[str, str]]:
    """A launch of kernel a with the buffers and scalars of both, and b's names among them."""
    buffers = dict(zip(a.buffers, a.kernel.buffers, strict=True))
    names = {}
    for memory, buffer in zip(b.buffers, b.kernel.buffers, strict=True):
        known = buffers.get(memory)
        if known is None:
            known = replace(buffer, name=f"b{len(buffers)}")
        elif known.access != buffer.access:
            known = replace(known, access="rw")
        buffers[memory] = known
        names[buffer.name] = known.name
    count = len(a.kernel.scalars)
    scalars = {name: f"s{count + k}" for k, name in enumerate(b.kernel.scalars)}
    kernel = replace(
        a.kernel,
        buffers=tuple(buffers.values()),
        scalars=(*a.kernel.scalars, *scalars.values()),
    )
    return Launch(kernel, tuple(buffers), (), (*a.scalars, *b.scalars)), names, scalars


def _renamed(kernel: Kernel, names: dict[str, str], scalars: dict[str, str]) -> Kernel:
    """A kernel with other names of buffers and scalars."""

    def operand(arg: Operand) -> Operand:
        return Scalar(scalars[arg.name]) if isinstance(arg, Scalar) else arg

    def statement(s: Statement) -> Statement:
        if isinstance(s, Load):
            return replace(s, buffer=names[s.buffer])
        if isinstance(s, Store):
            return replace(s, buffer=names[s.buffer], value=operand(s.value))
        if isinstance(s, Compute):
            return replace(s, args=tuple(map(operand, s.args)))
        return replace(s, value=operand(s.value)) if isinstance(s, Reduce) else s

    stages = [replace(stage, body=tuple(map(statement, stage.body))) for stage in kernel.stages]
    buffers = tuple(replace(b, name=names[b.name]) for b in kernel.buffers)
    new = tuple(scalars[s] for s in kernel.scalars)
    return replace(kernel, buffers=buffers, scalars=new, stages=tuple(stages))


def _swap(names: dict[str, str]):
    """A change of indices: other names of axes."""

    def change(index: Index) -> Index:
        terms = []
        for atom, c in index.terms:
            if isinstance(atom, FloorDiv | Mod):
                atom = replace(atom, index=change(atom.index))
            terms.append((names.get(atom, atom) if isinstance(atom, str) else atom, c))
        return Index(tuple(sorted(terms, key=position)), index.offset)

    return change


def _last(kernel: Kernel) -> int:
    """The highest number of a variable."""
    return max(
        (s.out.id for stage in kernel.stages for s in stage.body if not isinstance(s, Store)),
        default=0,
    )


def _shifted(body: Sequence[Statement], by: int) -> tuple[Statement, ...]:
    """Statements with their variables' numbers moved up. No place in them depends on values."""

    def var(v: object) -> object:
        return Var(v.id + by, v.dtype) if isinstance(v, Var) else v

    moved: list[Statement] = []
    for s in body:
        s = replace(s, out=var(s.out))
        if isinstance(s, Compute):
            s = replace(s, args=tuple(map(var, s.args)))
        elif isinstance(s, Reduce):
            s = replace(s, value=var(s.value))
        moved.append(s)
    return tuple(moved)


def _ending(
    kernel: Kernel, reduces: Sequence[Reduce], parts: Sequence[Buffer], chunks: int
) -> Kernel:
    """The kernel that folds the parts of the columns, and goes on as the given one did."""
    (column,) = kernel.axes
    (down,) = kernel.stages[0].axes
    at = Index(((down.name, column.extent), (column.name, 1)))
    body: list[Statement] = []
    for k, (reduce, part) in enumerate(zip(reduces, parts, strict=True)):
        value = Var(_last(kernel) + 1 + k, part.dtype)
        body += [Load(value, part.name, at), replace(reduce, value=value)]
    first = Stage((Axis(down.name, chunks),), tuple(body))
    return replace(kernel, buffers=(*kernel.buffers, *parts), stages=(first, *kernel.stages[1:]))
