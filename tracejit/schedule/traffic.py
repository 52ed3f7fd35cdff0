"""How many bytes a plan's launches must move at least: unique addresses loaded and stored; and how
much they compute.

Affine accesses whose addresses cannot collide are counted from their extents; others, and several
different accesses of one buffer, are enumerated (where too large for that, bounded by their sum and
by the buffer's size). What is read at the values of an index is bounded in the same way.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from tracejit.schedule.kernel import (
    Attend,
    Axis,
    Compute,
    FloorDiv,
    HostCall,
    InBounds,
    Index,
    Kernel,
    Load,
    Mask,
    Mod,
    Position,
    Reduce,
    Statement,
    Store,
    Var,
)
from tracejit.schedule.plan import Launch, Plan, PlanBuffer
from tracejit.schedule.sizes import substitute

ENUMERATED = 1 << 22  # points of a domain that are enumerated at most

_FREE = ("alias", "cast", "full", "where")  # no arithmetic

_Access = tuple[Index, Mask, tuple[Axis, ...]]


def bytes_moved(plan: Plan) -> tuple[int, ...]:
    """Per launch, the bytes of unique addresses loaded and of those stored, in all steps."""
    return tuple(
        bytes_of([bound(one) for one in launch.alone()], plan.buffers) * plan.times(launch)
        for launch in plan.launches
    )


def bytes_apart(plan: Plan, launch: Launch) -> tuple[int, ...]:
    """The same for each kernel that runs side by side in a launch, as if it was alone; for the rows
    of a foreach together."""
    if launch.kernel.foreach:
        return (bytes_of([bound(one) for one in launch.alone()], plan.buffers),)
    return tuple(bytes_of([bound(one)], plan.buffers) for one in launch.alone())


def bound(launch: Launch) -> tuple[Kernel, dict[str, str]]:
    """A launch's kernel with plain sizes, and what the plan calls its buffers."""
    sizes = dict(zip(launch.kernel.sizes, launch.sizes, strict=True))
    memory = dict(zip((b.name for b in launch.kernel.buffers), launch.buffers, strict=True))
    return substitute(launch.kernel, sizes), memory


def operations(plan: Plan) -> int:
    """Arithmetic on floats in all launches: 2 for each product of a contraction, 1 for each result
    of another operation, and for each element that is reduced."""
    return sum(
        operations_in(bound(one)[0]) * plan.times(launch)
        for launch in plan.launches
        for one in launch.alone()
    )


def products(plan: Plan) -> Counter[str]:
    """Those of contractions alone, by the dtype of their operands."""
    found: Counter[str] = Counter()
    for launch in (one for together in plan.launches for one in together.alone()):
        kernel = bound(launch)[0]
        for dot in (stage.dot for stage in kernel.stages if stage.dot is not None):
            points = math.prod(a.extent for a in (*kernel.stages[0].axes, dot.k))
            values = (dot.a_value, dot.b_value, dot.out)
            dtype = next(v.dtype.name for v in values if isinstance(v, Var))
            found[dtype] += 2 * points * plan.times(launch)
        for stage in (stage for stage in kernel.stages if stage.attend is not None):
            batches = math.prod(a.extent for a in stage.axes)
            value = stage.attend.side("q").value
            found[value.dtype.name] += products_of(stage.attend, batches) * plan.times(launch)
    return found


def products_of(attend: Attend, batches: int) -> int:
    """Arithmetic of an attention's products, of all scores: 2 for each product."""
    m, n, c, d = (a.extent for a in attend.axes)
    names = {op.name for op, _ in attend.results}
    depth = c + d * ("attention" in names)
    if not attend.is_forward:
        depth = c + d * ("attention_dv" in names)
        if names - {"attention_dv"}:
            depth += d + c * len(names - {"attention_dv"})
    return 2 * batches * m * n * depth


_CUBES = {  # multiplications and additions of each primitive, of matrices with n³ elements cubed
    "cholesky": 1 / 3,
    "triangular_solve": 1.0,
    "lu": 2 / 3,
    "lu_solve": 2.0,
    "qr": 8 / 3,
    "geqrf": 4 / 3,
    "eigh": 9.0,
    "svd": 21.0,
    "expm": 20.0,
}


def operations_of(call: HostCall) -> int:
    """About what a call of the host computes: what textbooks count of square matrices."""
    if call.is_collective:
        return 0
    *batch, m, n = call.shapes[-2 if call.op.name == "lu_solve" else 0]
    columns = call.shapes[-1][-1] if call.op.name in ("triangular_solve", "lu_solve") else min(m, n)
    if call.op.name == "lu_solve":
        n = m
    return int(_CUBES[call.op.name] * math.prod(batch) * m * n * columns)


def operations_in(kernel: Kernel) -> int:
    """Arithmetic on floats of one kernel with plain sizes."""
    total = 0 if kernel.call is None else operations_of(kernel.call)
    for stage in kernel.stages:
        points = math.prod(a.extent for a in (*kernel.axes, *stage.axes))
        if stage.dot is not None:
            total += 2 * points * stage.dot.k.extent
        if stage.attend is not None:
            total += products_of(stage.attend, points)
        total += points * sum(
            isinstance(s, Compute | Reduce) and s.out.dtype.is_float and s.op.name not in _FREE
            for s in stage.body
        )
    return total


def bytes_of(
    kernels: Sequence[tuple[Kernel, Mapping[str, str]]], buffers: Sequence[PlanBuffer]
) -> int:
    """The bytes of unique addresses that kernels together load, plus those that they store.

    kernels: with plain numbers as sizes, and what the plan calls their buffers; others are not
        memory of the plan, and not counted.
    """
    named = {b.name: b for b in buffers}
    found: dict[tuple[str, type], dict[_Access, None]] = {}
    for kernel, memory in kernels:
        for (name, kind), accesses in _accesses(kernel).items():
            if name in memory:
                found.setdefault((memory[name], kind), {}).update(accesses)
    return sum(
        _addresses(list(accesses), named[name]) * named[name].type.dtype.itemsize
        for (name, _), accesses in found.items()
    )


def _accesses(kernel: Kernel) -> dict[tuple[str, type], dict[_Access, None]]:
    """The distinct accesses of each buffer, loads and stores apart."""
    found: dict[tuple[str, type], dict[_Access, None]] = {}

    if kernel.call is not None:
        for buffer, shape in zip(kernel.buffers, kernel.call.shapes, strict=True):
            axis = Axis("i0", math.prod(shape))
            access = Index((("i0", 1),)), (), (axis,)
            found[buffer.name, Store if buffer.access == "w" else Load] = {access: None}
    varies: dict[int, set[str]] = {}  # the axes that a variable depends on

    def visit(body: tuple[Statement, ...], axes: tuple[Axis, ...]) -> None:
        for s in body:
            used = _read_axes(s, varies)
            if isinstance(s, Load | Store):
                walked = tuple(a for a in axes if a.name in used)
                kinds = (Load, Store) if isinstance(s, Store) and s.fold else (type(s),)
                for kind in kinds:
                    found.setdefault((s.buffer, kind), {})[s.index, s.mask, walked] = None
            if isinstance(s, Load | Compute | Position | InBounds):
                varies[s.out.id] = used

    for stage in kernel.stages:
        axes = kernel.axes + stage.axes
        if stage.dot is not None:
            visit(stage.dot.a, (*axes, stage.dot.k))
            visit(stage.dot.b, (*axes, stage.dot.k))
        if stage.attend is not None:
            axes += stage.attend.axes
            for side in stage.attend.sides:
                visit(side.body, axes)
        visit(stage.body, axes)
    return found


def _read_axes(s: Statement, varies: dict[int, set[str]]) -> set[str]:
    """The axes that the place, or the result, of a statement depends on."""
    names: set[str] = set()
    if isinstance(s, Load | Store | Position):
        names |= _used(s.index, varies)
    if isinstance(s, Load | Store | InBounds):
        names |= {n for b in s.mask for n in _used(b.index, varies)}
    if isinstance(s, Compute):
        names |= {n for a in s.args if isinstance(a, Var) for n in varies.get(a.id, ())}
    return names


def _used(index: Index, varies: dict[int, set[str]]) -> set[str]:
    """The axes that an index depends on."""
    names: set[str] = set()
    for atom, _ in index.terms:
        if isinstance(atom, Var):
            names |= varies.get(atom.id, set())
        else:
            names |= {atom} if isinstance(atom, str) else _used(atom.index, varies)
    return names


def _is_dynamic(index: Index, mask: Mask) -> bool:
    """Whether values decide an access."""
    atoms = [atom for i in (index, *(b.index for b in mask)) for atom, _ in i.terms]
    below = (atom.index for atom in atoms if isinstance(atom, FloorDiv | Mod))
    return any(isinstance(a, Var) for a in atoms) or any(_is_dynamic(i, ()) for i in below)


def _addresses(accesses: list[_Access], buffer: PlanBuffer) -> int:
    """How many different elements the accesses touch."""
    if len(accesses) == 1:
        index, mask, axes = accesses[0]
        if not mask and _is_injective(index, axes):
            return math.prod(a.extent for a in axes)
    points = [math.prod(a.extent for a in axes) for _, _, axes in accesses]
    dynamic = any(_is_dynamic(index, mask) for index, mask, _ in accesses)
    if dynamic or sum(points) > ENUMERATED:
        return min(sum(points), buffer.type.numel)
    return _different([_enumerate(*access) for access in accesses])


def _different(values: list[np.ndarray]) -> int:
    """How many different numbers there are in some arrays."""
    values = [v for v in values if v.size]
    if not values:
        return 0
    low, high = min(v.min() for v in values), max(v.max() for v in values)
    if high - low > ENUMERATED:
        return len(np.unique(np.concatenate(values)))
    seen = np.zeros(high - low + 1, np.bool_)
    for v in values:
        seen[v - low] = True
    return int(np.count_nonzero(seen))


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


def points_inside(mask: Mask, axes: tuple[Axis, ...]) -> int:
    """At how many points of some axes a mask holds; they are enumerated."""
    return int(np.count_nonzero(_inside(mask, axes, _points(axes))))


def _enumerate(index: Index, mask: Mask, axes: tuple[Axis, ...]) -> np.ndarray:
    """All values of an index where its mask holds."""
    env = _points(axes)
    inside = _inside(mask, axes, env)
    return np.broadcast_to(_values(index, env), inside.shape)[inside]


def _points(axes: tuple[Axis, ...]) -> dict[str, np.ndarray]:
    """The value of each axis at each point."""
    grids = np.indices([a.extent for a in axes], sparse=True)
    return {a.name: grid for a, grid in zip(axes, grids, strict=True)}


def _inside(mask: Mask, axes: tuple[Axis, ...], env: dict[str, np.ndarray]) -> np.ndarray:
    """Whether a mask holds, at each point."""
    inside = np.ones(tuple(a.extent for a in axes), np.bool_)
    for bound in mask:
        at = _values(bound.index, env)
        inside &= (at >= 0) & (at < bound.high) & (at % bound.step == 0)
    return inside


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
