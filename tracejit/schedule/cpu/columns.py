"""Column reductions fused into the row kernel before them.

In: kernels in the order of a plan, sizes as plain numbers. A kernel of rows (a layer norm, forward
and backward) is often followed by one that reduces the columns of the same elements (its weights'
gradients), which would read them all from memory once more. Out: the row kernel does that for each
row while the row is in the cache: every chunk of rows adds up its own part of each column, and a
small kernel folds the parts in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tracejit.ir.types import f32, f64
from tracejit.schedule.axes import indices_of, map_indices, position
from tracejit.schedule.cpu.access import has_value
from tracejit.schedule.cpu.cost import GRAIN, MAX_CHUNKS, weight
from tracejit.schedule.cpu.loops import by_rows
from tracejit.schedule.cpu.plan import CpuKernel, CpuLaunch, Nest
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

ARRAY_BYTES = 64 << 10  # of the arrays that a chunk adds its columns up in
ROWS = 16  # of a chunk at least: its part of the columns is written and read once more


def fuse_columns(launches: Sequence[CpuLaunch]) -> list[CpuLaunch]:
    """Fuse a kernel that reduces columns into the row kernel right before it."""
    fused: list[CpuLaunch] = []
    waiting = list(launches)
    while waiting:
        launch = waiting.pop(0)
        both = _fused(launch, waiting[0]) if waiting else None
        if both is not None:
            waiting.pop(0)
        fused.append(both or launch)
    return fused


def _fused(rows: CpuLaunch, columns: CpuLaunch) -> CpuLaunch | None:
    """Both as one, where the second can be done along with the first."""
    first, second = rows.kernel.kernel, columns.kernel.kernel
    if rows.loop != columns.loop or second.call is not None:
        return None
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
    kernel, buffers, names, scalars = _joined(rows, columns)
    second = _renamed(second, names, scalars)
    swapped = {column.name: across.name, down.name: row.name}
    stage = map_indices(replace(second, stages=second.stages[:1]), _swap(swapped)).stages[0]
    if not _is_ready(first, stage, row, across):
        return None
    stage = Stage((across,), _shifted(stage.body, 1 + _last(first)))
    parts = tuple(
        Buffer(f"part{k}", f64 if s.out.dtype is f64 else f32, "rw") for k, s in enumerate(reduces)
    )
    ending = _ending(second, reduces, parts, chunks)
    kernel = replace(kernel, buffers=(*kernel.buffers, *parts), stages=(*kernel.stages, stage))
    fused = CpuKernel(
        kernel,
        columns=CpuKernel(ending),
        partials=tuple(part.name for part in parts),
        outer=Nest("", 1, chunks),
    )
    return CpuLaunch(fused, buffers, (*rows.scalars, *columns.scalars), rows.loop)


def _is_rows(kernel: Kernel) -> bool:
    """Whether a kernel goes over rows, one after another."""
    inner = {stage.axes for stage in kernel.stages if stage.axes}
    return (
        len(kernel.axes) == 1
        and len(inner) == 1
        and len(next(iter(inner))) == 1
        and by_rows(kernel)
        and not any(stage.in_order for stage in kernel.stages)
        and kernel.sort is None
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
        and not by_rows(kernel)
    )


def _is_ready(rows: Kernel, stage: Stage, row: Axis, across: Axis) -> bool:
    """Whether all that the columns read is there when a row is done: what the row kernel writes is
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


def _joined(
    a: CpuLaunch, b: CpuLaunch
) -> tuple[Kernel, tuple[str, ...], dict[str, str], dict[str, str]]:
    """Kernel a with the buffers and scalars of both, its launch's buffers, and b's names there."""
    first, second = a.kernel.kernel, b.kernel.kernel
    buffers = dict(zip(a.buffers, first.buffers, strict=True))
    names = {}
    for memory, buffer in zip(b.buffers, second.buffers, strict=True):
        known = buffers.get(memory)
        if known is None:
            known = replace(buffer, name=f"b{len(buffers)}")
        elif known.access != buffer.access:
            known = replace(known, access="rw")
        buffers[memory] = known
        names[buffer.name] = known.name
    count = len(first.scalars)
    scalars = {name: f"s{count + k}" for k, name in enumerate(second.scalars)}
    kernel = replace(
        first, buffers=tuple(buffers.values()), scalars=(*first.scalars, *scalars.values())
    )
    return kernel, tuple(buffers), names, scalars


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
