"""Axes that are read by quotient and remainder: the remainders are written out.

In: a Kernel with a stage whose indices have an axis's quotient and remainder by a small number. The
input gradient of a convolution with strides is such: it interleaves phases, and each element asks
by masks which phase it is of, one load for each. Out: the same over the quotient, with the
statements of all remainders one after another. Every mask of a remainder is known then, and what
lies side by side in memory is loaded and stored side by side.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace

from tracejit.ir.ops import OPS
from tracejit.ir.types import f32, f64
from tracejit.schedule.axes import map_statements
from tracejit.schedule.cpu.access import places
from tracejit.schedule.cpu.plan import CpuKernel
from tracejit.schedule.index import add
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
    Reduce,
    Stage,
    Statement,
    Store,
    Var,
)

COPIES = 4  # of a stage's statements, at most
FOLDS = {"reduce_sum": "add", "reduce_max": "maximum", "reduce_min": "minimum"}


def write_out_phases(kernel: CpuKernel) -> CpuKernel:
    """The kernel with the remainders of its stages' axes written out."""
    if kernel.columns is not None or kernel.kernel.sort:
        return kernel
    fresh = fresh_numbers(kernel.kernel)
    stages = tuple(_written_out(stage, fresh) for stage in kernel.kernel.stages)
    return replace(kernel, kernel=replace(kernel.kernel, stages=stages))


def fresh_numbers(kernel: Kernel) -> Iterator[int]:
    """Numbers that no value of a kernel has."""
    outs = [s.out.id for stage in kernel.stages for s in stage.body if not isinstance(s, Store)]
    return itertools.count(1 + max(outs, default=0))


def renamed(s: Statement, names: Mapping[Var, Operand]) -> Statement:
    """A statement with other names, or numbers, for what it uses, and a name for its result."""

    def name(x: Operand) -> Operand:
        return names.get(x, x) if isinstance(x, Var) else x

    if isinstance(s, Store):
        return replace(s, value=name(s.value))
    if isinstance(s, Compute):
        return replace(s, out=name(s.out), args=tuple(map(name, s.args)))
    return replace(s, out=name(s.out))


def _written_out(stage: Stage, fresh: Iterator[int]) -> Stage:
    """A stage over quotients, if that is worth it."""
    found = _divisors(stage)
    if not found:
        return stage
    folded = [s for s in stage.body if isinstance(s, Reduce)]
    points = list(itertools.product(*(range(by) for by in found.values())))
    body: list[Statement] = []
    values: list[dict[Var, Operand]] = []  # by remainder: what is reduced
    for point in points:
        at = {name: (by, r) for (name, by), r in zip(found.items(), point, strict=True)}
        names: dict[Var, Operand] = {}
        sums: set[Operand] = set()
        for s in map_statements(stage.body, lambda index, at=at: _at(index, at)):
            s, holds = _decided(s)
            if isinstance(s, Reduce) or (isinstance(s, Store) and not holds):
                continue
            if not holds:  # what is read outside of its mask
                names[s.out] = s.out.dtype.compute.type(0).item()
                continue
            if not isinstance(s, Store):
                names[s.out] = Var(next(fresh), s.out.dtype)
            made = renamed(s, names)
            known = _sum(made, sums)
            if known is None:
                body.append(made)
            else:
                names[s.out] = known
        values.append({s.out: names.get(s.value, s.value) for s in folded})
    for s in folded:
        total, *rest = (v[s.out] for v in values)
        for value in rest:
            out = Var(next(fresh), s.value.dtype)
            body.append(Compute(out, OPS[FOLDS[s.op.name]], (total, value), (), s.where))
            total = out
        body.append(replace(s, value=total))
    axes = tuple(Axis(a.name, a.extent // found.get(a.name, 1)) for a in stage.axes)
    return replace(stage, axes=axes, body=tuple(body))


def _sum(s: Statement, sums: set[Operand]) -> Operand | None:
    """What a sum with zero is, where it need not be computed. `sums`, to which it is added, are
    never -0.0, the one number that adding zero changes."""
    if not (isinstance(s, Compute) and s.op.name == "add"):
        return None
    zeros = [x for x in s.args if not isinstance(x, Var) and str(x) in ("0", "0.0")]
    others = [x for x in s.args if x not in zeros]
    if zeros and (not others or others[0] in sums):
        return (others or zeros)[0]
    if zeros or not sums.isdisjoint(others):
        sums.add(s.out)
    return None


def _divisors(stage: Stage) -> dict[str, int]:
    """The axes of a stage that are written out, and by what they are divided; none where anything
    else is done with them."""
    if not stage.axes or stage.dot or stage.attend or stage.in_order:
        return {}
    for s in stage.body:
        if isinstance(s, Reduce) and not (s.op.name in FOLDS and s.value.dtype in (f32, f64)):
            return {}
    extents = {a.name: a.extent for a in stage.axes}
    found: dict[str, int] = {}
    remainders: set[str] = set()
    for atom in (atom for s in stage.body for index in places(s) for atom, _ in index.terms):
        if isinstance(atom, Var):
            return {}
        if isinstance(atom, str):
            continue
        ((name, step), *more) = atom.index.terms
        if more or step != 1 or atom.index.offset or not isinstance(name, str):
            return {}
        if name not in extents or extents[name] % atom.by or found.get(name, atom.by) != atom.by:
            return {}
        found[name] = atom.by
        if isinstance(atom, Mod):
            remainders.add(name)
    copies = 1
    for by in found.values():
        copies *= by
    return found if remainders and copies <= COPIES else {}


def _decided(s: Statement) -> tuple[Statement, bool]:
    """A statement without the bounds that are known to hold, and whether all others may."""
    if not isinstance(s, Load | Store | InBounds):
        return s, True
    known = [b for b in s.mask if not b.index.terms]
    holds = all(0 <= b.index.offset < b.high and b.index.offset % b.step == 0 for b in known)
    return replace(s, mask=tuple(b for b in s.mask if b.index.terms)), holds


def _at(index: Index, at: Mapping[str, tuple[int, int]]) -> Index:
    """An index with axes as quotients times divisors plus remainders."""
    parts = []
    for atom, c in index.terms:
        name = atom if isinstance(atom, str) else atom.index.terms[0][0]
        by, remainder = at.get(name, (1, 0))
        if isinstance(atom, Mod):
            parts.append(Index((), remainder * c))
        elif isinstance(atom, FloorDiv):
            parts.append(Index(((name, c),)))
        else:
            parts.append(Index(((name, c * by),), remainder * c))
    return add(parts, index.offset)
