"""In how few passes a Triton kernel can go over rows that do not fit a tile.

A sum over a row that has one element that counts, by its place (the class of a row of logits), is a
load of that element: no pass at all. A sum of exponentials relative to the row's maximum goes with
the maximum in one pass. And what lies along the rows in memory, which decides whether a kernel can
read them from a multiple of 16 bytes on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from tracejit.codegen.statements import all_statements
from tracejit.ir.ops import OPS
from tracejit.ir.types import b1, f32, f64, i64
from tracejit.records import dataclass
from tracejit.schedule.cpu.access import axes_of, has_value, places, variables
from tracejit.schedule.kernel import (
    Axis,
    Bound,
    Compute,
    FloorDiv,
    InBounds,
    Index,
    Kernel,
    Load,
    Mod,
    Operand,
    Position,
    Reduce,
    Stage,
    Statement,
    Store,
    Var,
)

# --- sums of which one element counts -----------------------------------------------------------


def few_passes(kernel: Kernel) -> Kernel:
    """The kernel with each sum `where(place == chosen, value, 0)` as the value at the chosen place,
    or 0 where there is none."""
    stages: list[Stage] = []
    ids = _Numbers(kernel)
    for stage in kernel.stages:
        picks = [p for r in stage.body if isinstance(r, Reduce) and (p := _pick(stage, r))]
        chosen = [p.total for p in picks]
        rest = _needed(stage.body, [s for s in stage.body if is_root(s) and s not in chosen])
        if rest or not picks:
            stages.append(replace(stage, body=rest) if picks else stage)
        for pick in picks:
            stages.append(Stage((), _at_place(stage, pick, ids)))
    return replace(kernel, stages=tuple(stages))


@dataclass(frozen=True)
class _Pick:
    """A sum of a stage, the variable that says which element counts, and the element's value."""

    total: Reduce
    place: Var
    value: Operand


class _Numbers:
    """New variables for copies of statements."""

    def __init__(self, kernel: Kernel):
        outs = (getattr(s, "out", None) for s in all_statements(kernel))
        self.next = max((v.id for v in outs if v is not None), default=0) + 1

    def copy(self, var: Var) -> Var:
        self.next += 1
        return Var(self.next - 1, var.dtype)


def is_root(s: Statement) -> bool:
    """Whether a statement is what a stage is for."""
    return isinstance(s, Store | Reduce)


def _needed(body: Sequence[Statement], roots: Sequence[Statement]) -> tuple[Statement, ...]:
    """The roots, and the statements that they need, in order."""
    wanted = {v for s in roots for v in variables(s)}
    kept: list[Statement] = []
    for s in reversed(body):
        if s in roots or (not is_root(s) and s.out in wanted):
            wanted.update(variables(s))
            kept.insert(0, s)
    return tuple(kept)


def _pick(stage: Stage, total: Reduce) -> _Pick | None:
    """How a reduction picks one element of a stage over one axis, if it does."""
    made = {s.out: s for s in stage.body if not is_root(s)}
    chosen = made.get(total.value) if isinstance(total.value, Var) else None
    if total.op.name != "reduce_sum" or len(stage.axes) != 1:
        return None
    if not (isinstance(chosen, Compute) and chosen.op.name == "where" and _is_zero(chosen.args[2])):
        return None
    condition = made.get(chosen.args[0])
    if not (isinstance(condition, Compute) and condition.op.name == "eq"):
        return None
    along = Index(((stage.axes[0].name, 1),))
    for here, place in (condition.args, condition.args[::-1]):
        at = made.get(here)
        if isinstance(at, Position) and at.index == along and isinstance(place, Var):
            moves = moving_in(stage)
            if place.dtype is i64 and place not in moves and here.dtype is i64:
                return _Pick(total, place, chosen.args[1])
    return None


def _is_zero(arg: Operand) -> bool:
    return isinstance(arg, int | float) and not isinstance(arg, bool) and arg == 0


def moving_in(stage: Stage) -> set[Var]:
    """The variables that vary along a stage's axes."""
    axes, found = {a.name for a in stage.axes}, set()
    for s in stage.body:
        if not is_root(s):
            own = {name for index in places(s) for name in axes_of(index)}
            if own & axes or found & set(variables(s)):
                found.add(s.out)
    return found


def _at_place(stage: Stage, pick: _Pick, ids: _Numbers) -> tuple[Statement, ...]:
    """The statements that make what a pick sums up."""
    (axis,) = stage.axes
    new: dict[Var, Var] = {}
    body: list[Statement] = []
    inside = _Inside(axis, pick.place, new)
    moving = moving_in(stage)
    first = _needed_for(stage.body, (pick.place,))  # all others may be read there
    then = (s for s in _needed_for(stage.body, (pick.value,)) if s not in first)
    for s in (*first, *then):
        out = new[s.out] = ids.copy(s.out)
        if isinstance(s, Compute):
            body.append(replace(s, out=out, args=tuple(map(inside.operand, s.args))))
        elif isinstance(s, Position):
            body.append(replace(s, out=out, index=inside.index(s.index)))
        else:
            mask = tuple(replace(b, index=inside.index(b.index)) for b in s.mask)
            if isinstance(s, Load):
                mask = (*[inside.bound] * (s.out in moving), *mask)
                s = replace(s, index=inside.index(s.index))
            body.append(replace(s, out=out, mask=mask))
    exists = replace(ids.copy(pick.place), dtype=b1)
    body.append(InBounds(exists, (inside.bound,), pick.total.where))
    nothing = 0.0 if pick.total.out.dtype.is_float else 0
    args = (exists, inside.operand(pick.value), nothing)
    body.append(Compute(pick.total.out, OPS["where"], args, (), pick.total.where))
    return tuple(body)


@dataclass(frozen=True)
class _Inside:
    """Indices and operands of a stage at one place along its axis; `new`: the copies so far."""

    axis: Axis
    place: Var
    new: Mapping[Var, Var]

    @property
    def bound(self) -> Bound:
        """Whether there is such a place."""
        return Bound(Index(((self.operand(self.place), 1),)), self.axis.extent)

    def operand(self, arg: Operand) -> Operand:
        return self.new.get(arg, arg) if isinstance(arg, Var) else arg

    def index(self, index: Index) -> Index:
        return replace(index, terms=tuple((self._atom(atom), c) for atom, c in index.terms))

    def _atom(self, atom: object) -> object:
        if isinstance(atom, FloorDiv | Mod):
            return replace(atom, index=self.index(atom.index))
        return self.operand(self.place if atom == self.axis.name else atom)


# --- sums of exponentials -----------------------------------------------------------------------


@dataclass(frozen=True)
class Online:
    """A sum of exp(x - `less`), the `total` of a stage, which goes beside the maximum `most` of x
    in the loop of another `stage`; `before`: the statements that `less` needs."""

    stage: int
    most: Var
    total: Var
    less: Operand
    before: tuple[Statement, ...]


def online_sums(kernel: Kernel) -> dict[int, Online]:
    """By the number of its stage, each sum of exponentials of what an earlier stage has the maximum
    of. One sum goes with a maximum, and is all that its own stage is for."""
    found: dict[int, Online] = {}
    maxima: dict[tuple, tuple[int, Var]] = {}
    for position, stage in enumerate(kernel.stages):
        if any(isinstance(s, Store) for s in stage.body) and stage.axes:
            maxima.clear()  # what is read again may have changed
            continue
        roots = [s for s in stage.body if is_root(s)]
        content = _Content(stage)
        for r in roots if stage.axes else ():
            if r.op.name == "reduce_max" and r.out.dtype in (f32, f64):
                maxima[(_extents(stage), content.of(r.value))] = position, r.out
        one = _online(stage, content, maxima) if stage.axes and len(roots) == 1 else None
        if one is not None and all(other.most != one.most for other in found.values()):
            found[position] = one
    return found


def _extents(stage: Stage) -> tuple:
    return tuple((a.name, a.extent) for a in stage.axes)


def _online(stage: Stage, content: _Content, maxima: Mapping) -> Online | None:
    """A stage's one sum as exponentials of what has a maximum, if it is that."""
    (total,) = (s for s in stage.body if is_root(s))
    made = content.made
    top = made.get(total.value) if isinstance(total.value, Var) else None
    if total.op.name != "reduce_sum" or not isinstance(top, Compute) or top.op.name != "exp":
        return None
    relative = made.get(top.args[0]) if isinstance(top.args[0], Var) else None
    if not isinstance(relative, Compute) or relative.op.name != "sub":
        return None
    x, less = relative.args
    known = maxima.get((_extents(stage), content.of(x)))
    if known is None or known[1].dtype is not total.out.dtype or less in moving_in(stage):
        return None
    return Online(*known, total.out, less, _needed_for(stage.body, (less,)))


class _Content:
    """What the values of a stage are made of, whatever they are called."""

    def __init__(self, stage: Stage):
        self.made = {s.out: s for s in stage.body if not is_root(s)}
        self._of: dict[Var, object] = {}

    def of(self, arg: Operand) -> object:
        """An operand's; two of the same text are equal."""
        if not isinstance(arg, Var) or arg not in self.made:
            return repr(arg)
        if arg not in self._of:
            s = self.made[arg]
            args = tuple(map(self.of, s.args)) if isinstance(s, Compute) else ()
            rest = (s.op.name, s.attrs) if isinstance(s, Compute) else ()
            buffer = s.buffer if isinstance(s, Load) else ""
            read = tuple(map(self._index, places(s)))
            high = tuple((b.high, b.step) for b in getattr(s, "mask", ()))
            self._of[arg] = (type(s).__name__, arg.dtype, rest, buffer, args, read, high)
        return self._of[arg]

    def _index(self, index: Index) -> tuple:
        def atom(a: object) -> object:
            if isinstance(a, FloorDiv | Mod):
                return type(a).__name__, self._index(a.index), a.by
            return self.of(a)

        return tuple((atom(a), c) for a, c in index.terms), index.offset


def _needed_for(body: Sequence[Statement], args: Sequence[Operand]) -> tuple[Statement, ...]:
    """The statements that operands are made by, in order."""
    wanted, kept = set(args), []
    for s in reversed(body):
        if not is_root(s) and s.out in wanted:
            wanted.update(variables(s))
            kept.insert(0, s)
    return tuple(kept)


# --- along rows in memory -----------------------------------------------------------------------


def row_accesses(kernel: Kernel) -> list[tuple[Load | Store, Index]]:
    """The loads and stores that go along the one inner axis of a kernel's stages, element by
    element, in rows that the outer axes choose; and where in memory such a row starts."""
    inner = {a for stage in kernel.stages for a in stage.axes if a.extent != 1}
    if len(inner) != 1:
        return []
    (axis,) = inner
    found = []
    for s in (s for stage in kernel.stages if stage.axes for s in stage.body):
        if isinstance(s, Load | Store) and (row := row_of(s.index, {axis.name})) is not None:
            found.append((s, row))
    return found


def row_of(index: Index, inner: Collection[str]) -> Index | None:
    """An index without an inner axis that moves it by 1; None where it goes another way, or where
    no outer axis moves it."""
    rest = tuple((atom, c) for atom, c in index.terms if atom not in inner or c != 1)
    row = replace(index, terms=rest)
    if len(rest) + 1 != len(index.terms) or has_value(row):
        return None
    axes = axes_of(row)
    return row if axes and not axes & set(inner) else None


def row_unit(kernel: Kernel, sizes: Mapping[str, int]) -> int:
    """How many elements one access of 16 bytes moves, where rows do not begin or end with one, and
    those of all buffers begin alike; else 0."""
    accesses = row_accesses(kernel)
    types = {b.name: b.dtype for b in kernel.buffers}
    if not accesses or any(s.mask for s, _ in accesses):
        return 0
    (axis,) = {a for stage in kernel.stages for a in stage.axes if a.extent != 1}
    unit = min(8, 16 // min(types[s.buffer].itemsize for s, _ in accesses))
    starts = {_remainder(row, unit, sizes) for _, row in accesses}
    aligned = starts == {((), 0)} and sizes.get(axis.extent, axis.extent) % unit == 0
    return 0 if len(starts) != 1 or aligned else unit


def _remainder(index: Index, unit: int, sizes: Mapping[str, int]) -> tuple:
    """An index modulo a unit."""
    parts = ((repr(atom), sizes.get(c, c) % unit) for atom, c in index.terms)
    offset = sizes.get(index.offset, index.offset) % unit
    return tuple(sorted(part for part in parts if part[1])), offset
