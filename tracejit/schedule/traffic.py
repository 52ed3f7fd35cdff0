"""How many bytes a plan's launches must move at least: unique addresses loaded and stored.

Affine accesses whose addresses cannot collide are counted from their extents; others, and several
different accesses of one buffer, are enumerated (where too large for that, bounded by their sum and
by the buffer's size).
"""

from __future__ import annotations

import math

import numpy as np

from tracejit.schedule.kernel import Axis, FloorDiv, Index, Kernel, Load, Mask, Statement, Store
from tracejit.schedule.plan import Plan, PlanBuffer
from tracejit.schedule.sizes import substitute

ENUMERATED = 1 << 22  # points of a domain that are enumerated at most

_Access = tuple[Index, Mask, tuple[Axis, ...]]


def bytes_moved(plan: Plan) -> tuple[int, ...]:
    """Per launch, the bytes of unique addresses loaded plus those stored."""
    buffers = {b.name: b for b in plan.buffers}
    totals = []
    for launch in plan.launches:
        sizes = dict(zip(launch.kernel.sizes, launch.sizes, strict=True))
        kernel = substitute(launch.kernel, sizes)
        memory = dict(zip((b.name for b in kernel.buffers), launch.buffers, strict=True))
        total = 0
        for (name, _), accesses in _accesses(kernel).items():
            buffer = buffers[memory[name]]
            total += _addresses(list(accesses), buffer) * buffer.type.dtype.itemsize
        totals.append(total)
    return tuple(totals)


def _accesses(kernel: Kernel) -> dict[tuple[str, type], dict[_Access, None]]:
    """The distinct accesses of each buffer, loads and stores apart."""
    found: dict[tuple[str, type], dict[_Access, None]] = {}

    def visit(body: tuple[Statement, ...], axes: tuple[Axis, ...]) -> None:
        for s in body:
            if isinstance(s, Load | Store):
                mask = s.mask if isinstance(s, Load) else ()
                used = _used(s.index) | {n for b in mask for n in _used(b.index)}
                walked = tuple(a for a in axes if a.name in used)
                found.setdefault((s.buffer, type(s)), {})[s.index, mask, walked] = None

    for stage in kernel.stages:
        axes = kernel.axes + stage.axes
        if stage.dot is not None:
            visit(stage.dot.a, (*axes, stage.dot.k))
            visit(stage.dot.b, (*axes, stage.dot.k))
        visit(stage.body, axes)
    return found


def _used(index: Index) -> set[str]:
    """The axes that an index depends on."""
    names: set[str] = set()
    for atom, _ in index.terms:
        names |= {atom} if isinstance(atom, str) else _used(atom.index)
    return names


def _addresses(accesses: list[_Access], buffer: PlanBuffer) -> int:
    """How many different elements the accesses touch."""
    if len(accesses) == 1:
        index, mask, axes = accesses[0]
        if not mask and _is_injective(index, axes):
            return math.prod(a.extent for a in axes)
    points = [math.prod(a.extent for a in axes) for _, _, axes in accesses]
    if sum(points) > ENUMERATED:
        return min(sum(points), buffer.type.numel)
    return len(np.unique(np.concatenate([_enumerate(*access) for access in accesses])))


def _is_injective(index: Index, axes: tuple[Axis, ...]) -> bool:
    """Whether an affine index surely takes a different value at each point."""
    if not all(isinstance(atom, str) for atom, _ in index.terms):
        return False
    extents = {a.name: a.extent for a in axes}
    reach = 0
    for name, step in sorted(index.terms, key=lambda term: abs(term[1])):
        if abs(step) <= reach:
            return False
        reach += abs(step) * (extents[name] - 1)
    return True


def _enumerate(index: Index, mask: Mask, axes: tuple[Axis, ...]) -> np.ndarray:
    """All values of an index where its mask holds."""
    grids = np.indices([a.extent for a in axes], sparse=True)
    env = {a.name: grid for a, grid in zip(axes, grids, strict=True)}
    shape = tuple(a.extent for a in axes)
    inside = np.ones(shape, np.bool_)
    for bound in mask:
        at = _values(bound.index, env)
        inside &= (at >= 0) & (at < bound.high) & (at % bound.step == 0)
    return np.broadcast_to(_values(index, env), shape)[inside]


def _values(index: Index, env: dict[str, np.ndarray]) -> np.ndarray:
    total = np.asarray(index.offset)
    for atom, c in index.terms:
        if isinstance(atom, str):
            part = env[atom]
        else:
            below = _values(atom.index, env)
            part = below // atom.by if isinstance(atom, FloorDiv) else below % atom.by
        total = total + part * c
    return total
