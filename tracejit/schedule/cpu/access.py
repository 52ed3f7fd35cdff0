"""What a Kernel's statements read, and how their accesses move with each axis."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tracejit.schedule.kernel import (
    Axis,
    Compute,
    FloorDiv,
    InBounds,
    Index,
    Kernel,
    Load,
    Mod,
    Operand,
    Position,
    Statement,
    Store,
    Var,
)


def variables(s: Statement) -> list[Var]:
    """The variables that a statement reads, those that decide a place included."""
    args = s.args if isinstance(s, Compute) else (getattr(s, "value", None),)
    found = [a for a in args if isinstance(a, Var)]
    for index in places(s):
        found += values_in(index)
    return found


def places(s: Statement) -> list[Index]:
    """The indices of a statement, those of its mask included."""
    found = [s.index] if isinstance(s, Load | Store | Position) else []
    if isinstance(s, Load | Store | InBounds):
        found += [bound.index for bound in s.mask]
    return found


def has_value(index: Index) -> bool:
    """Whether a value of the body takes part in an index."""
    return any(True for _ in values_in(index))


def values_in(index: Index) -> Iterator[Var]:
    """The values of the body in an index: positions that were gathered."""
    for atom, _ in index.terms:
        if isinstance(atom, Var):
            yield atom
        elif isinstance(atom, FloorDiv | Mod):
            yield from values_in(atom.index)


def axes_of(index: Index) -> set[str]:
    """The axes that an index moves with."""
    found: set[str] = set()
    for atom, _ in index.terms:
        if isinstance(atom, FloorDiv | Mod):
            found |= axes_of(atom.index)
        elif isinstance(atom, str):
            found.add(atom)
    return found


def extents_of(kernel: Kernel) -> dict[str, int]:
    """The extent of every axis of a kernel."""
    axes: list[Axis] = list(kernel.axes)
    for stage in kernel.stages:
        axes += stage.axes
        if stage.dot is not None:
            axes.append(stage.dot.k)
        if stage.attend is not None:
            axes += stage.attend.axes
    return {a.name: a.extent for a in axes}


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


def fixed_and_moving(
    statements: Sequence[Statement], axis: Axis, values: Iterable[Var] = ()
) -> tuple[list[Statement], list[Statement]]:
    """(what is the same at all points of an axis, the rest), each in order. `values` move with the
    axis. What is stored here is not loaded once for all."""
    stored = {s.buffer for s in statements if isinstance(s, Store)}
    fixed: list[Statement] = []
    moving: list[Statement] = []
    changing = set(values)
    for s in statements:
        pure = isinstance(s, Load | Compute | Position | InBounds) and axis.extent > 0
        if (
            not pure
            or (isinstance(s, Load) and s.buffer in stored)
            or any(axis.name in axes_of(index) for index in places(s))
            or not changing.isdisjoint(variables(s))
        ):
            moving.append(s)
            if not isinstance(s, Store):
                changing.add(s.out)
        else:
            fixed.append(s)
    return fixed, moving


def running_load(statements: Sequence[Statement]) -> Load | None:
    """The load, of a running result, of what the step before has stored."""
    stored = {s.buffer: s.index for s in statements if isinstance(s, Store)}
    loads = (s for s in statements if isinstance(s, Load) and s.buffer in stored and s.mask)
    before = (s for s in loads if s.mask[0].index.offset == -1 and not has_value(s.index))
    return next((s for s in before if s.index != stored[s.buffer]), None)


def carried(statements: Sequence[Statement], load: Load, store: Store) -> tuple[Var, Operand]:
    """What the steps of a running result hand on: the variable that it is for the next step, and
    its value. That is what is stored, or, where the next step casts it to another dtype and the
    stored value is cast from that, what is so before it is rounded."""
    readers = [s for s in statements if load.out in variables(s)]
    made = next((s for s in statements if getattr(s, "out", None) == store.value), None)
    casts = [s for s in (*readers, made) if isinstance(s, Compute) and s.op.name == "cast"]
    if len(readers) == 1 and len(casts) == 2:
        ((whole,), wide) = made.args, readers[0].out
        if isinstance(whole, Var) and whole.dtype is wide.dtype:
            return wide, whole
    return load.out, store.value
