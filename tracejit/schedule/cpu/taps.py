"""Reductions over a few places, written out: windows that do not overlap, as of most poolings.

In: a Kernel whose stages reduce over a few taps at each of its outer points. Loops over 2 × 2 taps
are too short for vectors, and the loops around them cannot be vector loops with such inside. Out:
one stage over the outer axes, with the statements of all taps one after another, each once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from tracejit.ir.ops import OPS
from tracejit.ir.types import f32, f64, i64
from tracejit.schedule.axes import map_statements
from tracejit.schedule.cpu.access import places
from tracejit.schedule.cpu.loops import SHORT
from tracejit.schedule.cpu.phases import FOLDS, fresh_numbers, renamed
from tracejit.schedule.cpu.plan import CpuKernel
from tracejit.schedule.kernel import (
    Axis,
    Compute,
    Index,
    Kernel,
    Load,
    Operand,
    Reduce,
    Stage,
    Statement,
    Store,
    Var,
)

TAPS = 9  # of a stage, at most


def write_out_taps(kernel: CpuKernel) -> CpuKernel:
    """The kernel with the taps of its reductions written out, where it reduces over such only."""
    k = kernel.kernel
    if kernel.columns is not None or kernel.rows or k.sort or not all(map(_is_few, k.stages)):
        return kernel
    if not k.axes or not any(stage.axes for stage in k.stages):
        return kernel
    stored = {s.buffer for stage in k.stages for s in stage.body if isinstance(s, Store)}
    if any(isinstance(s, Load) and s.buffer in stored for stage in k.stages for s in stage.body):
        return kernel
    return replace(kernel, kernel=_written_out(k))


def _is_few(stage: Stage) -> bool:
    """Whether a stage reduces over few taps, or over nothing."""
    if stage.dot or stage.attend or stage.in_order:
        return False
    short = all(a.extent < SHORT for a in stage.axes)
    if not short or math.prod(a.extent for a in stage.axes) > TAPS:
        return False
    for s in stage.body:
        if isinstance(s, Store) and stage.axes:
            return False
        if isinstance(s, Reduce) and not (s.op.name in FOLDS and s.out.dtype in (f32, f64, i64)):
            return False
    atoms = (atom for s in stage.body for index in places(s) for atom, _ in index.terms)
    return all(isinstance(atom, str) for atom in atoms)


def _written_out(kernel: Kernel) -> Kernel:
    fresh = fresh_numbers(kernel)
    body: list[Statement] = []
    for stage in kernel.stages:
        folds = [s for s in stage.body if isinstance(s, Reduce)]
        rest = [s for s in stage.body if not isinstance(s, Reduce)]
        if not stage.axes:
            body += rest
            continue
        totals: dict[Var, Operand] = {}
        points = points_of(stage.axes)
        for at in points:
            names: dict[Var, Var] = {}
            copy_at(rest, at, body, fresh, names)
            for s in folds:
                value = names.get(s.value, s.value)
                if s.out in totals:
                    last = at is points[-1]
                    out = s.out if last else Var(next(fresh), s.out.dtype)
                    args = (totals[s.out], value)
                    body.append(Compute(out, OPS[FOLDS[s.op.name]], args, (), s.where))
                    value = out
                totals[s.out] = value
    return replace(kernel, axes=(), stages=(Stage(kernel.axes, _once(body)),))


def _once(body: Sequence[Statement]) -> tuple[Statement, ...]:
    """The statements without those that compute what an earlier one has computed."""
    names: dict[Var, Operand] = {}
    seen: dict[Statement, Var] = {}
    kept: list[Statement] = []
    for s in body:
        s = renamed(s, names)
        if not isinstance(s, Store):
            alike = replace(s, out=Var(0, s.out.dtype), where="")
            if alike in seen:
                names[s.out] = seen[alike]
                continue
            seen[alike] = s.out
        kept.append(s)
    return tuple(kept)


def copy_at(
    statements: Sequence[Statement],
    at: Mapping[str, int],
    body: list[Statement],
    fresh: Iterator[int],
    names: dict[Var, Var],
) -> None:
    """Append statements at one point of some axes, with new names for their results."""
    for s in map_statements(statements, partial(fixed_at, at=at)):
        if not isinstance(s, Store):
            names[s.out] = Var(next(fresh), s.out.dtype)
        body.append(renamed(s, names))


def points_of(axes: Sequence[Axis]) -> list[dict[str, int]]:
    """All points of some axes."""
    names = [a.name for a in axes]
    ranges = itertools.product(*(range(a.extent) for a in axes))
    return [dict(zip(names, point, strict=True)) for point in ranges]


def fixed_at(index: Index, at: Mapping[str, int]) -> Index:
    """An index at one point of some axes."""
    kept = tuple((atom, c) for atom, c in index.terms if atom not in at)
    return Index(kept, index.offset + sum(at[atom] * c for atom, c in index.terms if atom in at))
