"""Tidying a Kernel's axes: drop those of extent 1, join those walked as one, rename.

In and out: a Kernel with concrete sizes over axes "i0", "i1", … Extent-1 axes stay where they are
the m or n of a Dot, or belong to an Attend. Two adjacent axes p, q are one axis when in every index
the coefficient of p is that of q times q's extent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from tracejit.schedule.kernel import (
    Attend,
    Axis,
    Bound,
    FloorDiv,
    InBounds,
    Index,
    Kernel,
    Load,
    Mask,
    Mod,
    Position,
    Side,
    Sort,
    Statement,
    Store,
    Var,
)


def map_statements(
    statements: Iterable[Statement], change: Callable[[Index], Index]
) -> tuple[Statement, ...]:
    """Statements with every index (of accesses, positions and bounds) replaced."""

    def mask(m: Mask) -> Mask:
        return tuple(Bound(change(b.index), b.high, b.step) for b in m)

    def statement(s: Statement) -> Statement:
        if isinstance(s, Load | Store):
            return accessing(s, change(s.index), mask(s.mask))
        if isinstance(s, Position):
            return Position(s.out, change(s.index), s.where)
        if isinstance(s, InBounds):
            return replace(s, mask=mask(s.mask))
        return s

    return tuple(map(statement, statements))


def accessing(s: Load | Store, index: Index, mask: Mask) -> Load | Store:
    """An access at another index. (`replace` would take four times as long.)"""
    if isinstance(s, Load):
        return Load(s.out, s.buffer, index, mask, s.where)
    return Store(s.buffer, index, s.value, s.where, mask, s.fold)


def map_indices(kernel: Kernel, change: Callable[[Index], Index]) -> Kernel:
    """The kernel with every index replaced."""

    def body(statements: tuple[Statement, ...]) -> tuple[Statement, ...]:
        return map_statements(statements, change)

    stages = []
    for stage in kernel.stages:
        dot = stage.dot
        if dot is not None:
            dot = replace(dot, a=body(dot.a), b=body(dot.b))
        attend = stage.attend
        if attend is not None:
            sides = tuple(Side(body(side.body), side.value) for side in attend.sides)
            attend = replace(attend, sides=sides)
        stages.append(replace(stage, body=body(stage.body), dot=dot, attend=attend))
    return replace(kernel, stages=tuple(stages))


def indices_of(kernel: Kernel) -> Iterator[Index]:
    """Every index of a kernel, with the ones nested in quotients and remainders."""
    for stage in kernel.stages:
        bodies = (stage.body,) if stage.dot is None else (stage.body, stage.dot.a, stage.dot.b)
        if stage.attend is not None:
            bodies += tuple(side.body for side in stage.attend.sides)
        for body in bodies:
            for s in body:
                if isinstance(s, Load | Store | Position):
                    yield from _nested(s.index)
                if isinstance(s, Load | Store | InBounds):
                    for bound in s.mask:
                        yield from _nested(bound.index)


def _nested(index: Index) -> Iterator[Index]:
    yield index
    for atom, _ in index.terms:
        if not isinstance(atom, str | Var):
            yield from _nested(atom.index)


def along_memory(kernel: Kernel) -> Kernel:
    """The axes of a run in another order, where most accesses then go along memory: the axis on
    which neighbours lie side by side is the last one. Products, attention and what goes in order
    keep theirs."""
    fixed = any(s.dot is not None or s.attend is not None or s.in_order for s in kernel.stages)
    if fixed or any(isinstance(s, Sort) for s in kernel.statements):
        return kernel
    accesses = [s.index for s in kernel.statements if isinstance(s, Load | Store)]

    def ordered(run: tuple[Axis, ...]) -> tuple[Axis, ...]:
        names = {a.name for a in run if a.extent != 1}
        votes: Counter[str] = Counter()
        for index in accesses:
            units = [atom for atom, c in index.terms if c == 1 and atom in names]
            if units and names <= _axis_names(index):
                votes.update(units)
        if not votes:
            return run
        best = max(votes.values())
        last = [a for a in run if votes[a.name] == best][-1]
        return (*(a for a in run if a is not last), last)

    stages = tuple(replace(stage, axes=ordered(stage.axes)) for stage in kernel.stages)
    return replace(kernel, axes=ordered(kernel.axes), stages=stages)


def _axis_names(index: Index) -> set[str]:
    """All axes that an index depends on."""
    return {atom for part in _nested(index) for atom, _ in part.terms if isinstance(atom, str)}


def tidy(kernel: Kernel) -> Kernel:
    """Drop, join and rename axes."""
    fixed: set[str] = set()  # axes that keep their role: m, n and k of a Dot, those of an Attend
    k_name = ""
    for stage in kernel.stages:
        if stage.dot is not None:
            fixed |= {a.name for a in stage.axes[-2:]} | {stage.dot.k.name}
            k_name = stage.dot.k.name
        if stage.attend is not None:
            fixed |= {a.name for a in stage.attend.axes}
    runs = {kernel.axes} | {stage.axes for stage in kernel.stages}
    runs |= {stage.attend.axes for stage in kernel.stages if stage.attend is not None}
    coefficients = [dict(terms) for terms in dict.fromkeys(i.terms for i in indices_of(kernel))]
    joined: set[str] = set()  # axes that became part of the next one
    kept: dict[tuple[Axis, ...], tuple[Axis, ...]] = {}
    for run in sorted(runs, key=repr):
        axes = [a for a in run if a.extent != 1 or a.name in fixed]
        out: list[Axis] = []
        for axis in axes:
            last = out[-1] if out else None
            if last is not None and not {last.name, axis.name} & fixed:
                adjacent = all(
                    c.get(last.name, 0) == c.get(axis.name, 0) * axis.extent for c in coefficients
                )
                if adjacent:
                    joined.add(last.name)
                    out[-1] = Axis(axis.name, last.extent * axis.extent)
                    continue
            out.append(axis)
        kept[run] = tuple(out)
    names: dict[str, str] = {k_name: "k"} if k_name else {}
    attends = [stage.attend.axes for stage in kernel.stages if stage.attend is not None]
    for run in (kernel.axes, *(stage.axes for stage in kernel.stages), *attends):
        for axis in kept[run]:
            names.setdefault(axis.name, f"i{len(names) - bool(k_name)}")

    def change(index: Index) -> Index:
        terms = []
        for atom, c in index.terms:
            if isinstance(atom, str):
                if atom not in joined:
                    terms.append((names[atom], c))
            elif isinstance(atom, Var):
                terms.append((atom, c))
            elif isinstance(atom, FloorDiv):
                terms.append((FloorDiv(change(atom.index), atom.by), c))
            else:
                terms.append((Mod(change(atom.index), atom.by), c))
        return Index(tuple(sorted(terms, key=position)), index.offset)

    def rename(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
        return tuple(Axis(names[a.name], a.extent) for a in kept[axes])

    kernel = map_indices(kernel, change)
    stages = tuple(
        replace(
            stage,
            axes=rename(stage.axes),
            dot=stage.dot and replace(stage.dot, k=Axis("k", stage.dot.k.extent)),
            attend=stage.attend and _with_axes(stage.attend, rename(stage.attend.axes)),
        )
        for stage in kernel.stages
    )
    return replace(kernel, axes=rename(kernel.axes), stages=stages)


def _with_axes(attend: Attend, axes: tuple[Axis, ...]) -> Attend:
    m, n, c, d = axes
    return replace(attend, m=m, n=n, c=c, d=d)


def position(term: tuple) -> tuple:
    """Terms in the order of their axes, k last, quotients, remainders and values after that."""
    atom = term[0]
    if not isinstance(atom, str):
        return (2, 0, repr(atom))
    return (1, 0, "") if atom == "k" else (0, int(atom[1:]), "")
