"""Loops of which each row goes its own way, dealt to threads as a whole.

In: the kernels of a plan, sizes as plain numbers. A step of a recurrent network is too little work
to be dealt to threads, and the next one waits for it. But the sequences of a batch have nothing to
do with each other: of what a loop writes, a row reads nothing but its own. Out: kernels for a part
of the rows, and how far the parts of each buffer lie from each other. Each part runs all steps, and
none waits for another. How many parts there are depends on the sizes only, and no sum is taken in
another order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tracejit.schedule.axes import indices_of
from tracejit.schedule.cpu.access import axes_of, extents_of, has_value
from tracejit.schedule.cpu.cost import GRAIN, work_of
from tracejit.schedule.cpu.plan import CpuKernel, CpuLaunch
from tracejit.schedule.index import Extents, add, bounds, scale
from tracejit.schedule.kernel import (
    Axis,
    Bound,
    InBounds,
    Index,
    Kernel,
    Load,
    Position,
    Reduce,
    Store,
    Var,
)
from tracejit.schedule.plan import Plan, PlanBuffer, runs

PARTS = (8, 4, 2)
ROWS = 8  # of a part, where there are more than two: what all parts read is read for each
SHARED = 512 << 10  # bytes that all parts may read in a step: they stay in the second cache


def deal_loops(
    plan: Plan, launches: Sequence[CpuLaunch]
) -> tuple[list[CpuLaunch], tuple[int, ...]]:
    """The launches, those of a loop whose rows are independent for a part of the rows, and how many
    parts each loop has."""
    found: list[CpuLaunch] = []
    parts = [1] * len(plan.loops)
    buffers = {b.name: b for b in plan.buffers}
    for together in runs(launches, lambda launch: launch.loop):
        number = together[0].loop
        if number is not None:
            loop = _Loop(buffers, together, plan.loops[number])
            for count in PARTS:
                dealt = loop.dealt(count)
                if dealt is not None:
                    together, parts[number] = dealt, count
                    break
        found += together
    return found, tuple(parts)


class _Loop:
    """A loop's launches, and the memory that they share."""

    def __init__(self, buffers: Mapping[str, PlanBuffer], launches: list[CpuLaunch], steps: int):
        self.buffers, self.launches, self.steps = buffers, launches, steps
        self.written = {
            self._whole(name)
            for launch in launches
            for name, buffer in zip(launch.buffers, launch.kernel.bound, strict=True)
            if "w" in buffer.access
        }

    def dealt(self, parts: int) -> list[CpuLaunch] | None:
        """The launches for a part of the rows each, if that is right and worth it."""
        if not (self._is_worth(parts) and self._parts_lie_apart(parts)):
            return None
        found = []
        for launch in self.launches:
            cuts = (self._cut(launch, axis, parts) for axis in _candidates(launch.kernel, parts))
            cut = next((cut for cut in cuts if cut is not None), None)
            if cut is None:
                return None
            found.append(cut)
        return found if self._shared(found) <= SHARED else None

    def _whole(self, name: str) -> str:
        """The buffer that a buffer is a row of, or itself."""
        return self.buffers[name].of or name

    # ---- whether it is worth it

    def _is_worth(self, parts: int) -> bool:
        """Whether there is work for each part, and too little in any kernel to deal that."""
        work = [work_of(launch.kernel.kernel) for launch in self.launches]
        return sum(work) * self.steps // parts >= GRAIN and max(work) // GRAIN <= 2 * parts

    def _shared(self, launches: Sequence[CpuLaunch]) -> int:
        """The bytes that all parts read."""
        names = {
            name
            for launch in launches
            for name, step in zip(launch.buffers, launch.apart, strict=True)
            if not step
        }
        return sum(self.buffers[name].type.nbytes for name in names)

    # ---- whether it is right

    def _parts_lie_apart(self, parts: int) -> bool:
        """Whether equal parts of each buffer that is written, in all steps, lie where no other part
        of any buffer lies."""
        names = dict.fromkeys(name for launch in self.launches for name in launch.buffers)
        used = [self.buffers[name] for name in names if self._whole(name) in self.written]
        for b in used:
            nbytes = b.type.nbytes
            if b.kind not in ("arena", "row") or not nbytes or nbytes % parts or b.step % nbytes:
                return False
        return all(
            a.type.nbytes == b.type.nbytes and (a.offset - b.offset) % a.type.nbytes == 0
            for i, a in enumerate(used)
            for b in used[:i]
            if self._whole(a.name) == self._whole(b.name) and self._meet(a, b)
        )

    def _meet(self, a: PlanBuffer, b: PlanBuffer) -> bool:
        """Whether two buffers of one memory share a byte in some steps."""
        (low, high), (first, last) = self._reach(a), self._reach(b)
        return low < last and first < high

    def _reach(self, b: PlanBuffer) -> tuple[int, int]:
        start = b.offset if b.kind == "row" else 0
        end = start + (self.steps - 1) * b.step
        return min(start, end), max(start, end) + b.type.nbytes

    def _cut(self, launch: CpuLaunch, axis: Axis, parts: int) -> CpuLaunch | None:
        """A launch for a part of an axis, if that is a part of each buffer."""
        kernel, short = launch.kernel.kernel, replace(axis, extent=axis.extent // parts)
        extents = {**extents_of(kernel), axis.name: short.extent}
        apart = []
        for name, buffer in zip(launch.buffers, launch.kernel.bound, strict=True):
            size = buffer.dtype.itemsize
            accesses = [
                s
                for s in kernel.statements
                if isinstance(s, Load | Store) and s.buffer == buffer.name
            ]
            steps = {dict(s.index.terms).get(axis.name, 0) * short.extent for s in accesses}
            if len(steps) != 1:
                return None
            (step,) = steps
            if self._whole(name) in self.written:
                if step * size * parts != self.buffers[name].type.nbytes:
                    return None
                if not all(_is_within(s, step, extents) for s in accesses):
                    return None
            apart.append(step * size)
        cut = replace(launch.kernel, kernel=_shortened(kernel, short))
        return replace(launch, kernel=cut, apart=tuple(apart))


def _candidates(kernel: CpuKernel, parts: int) -> list[Axis]:
    """The axes along which a kernel could be cut."""
    whole = kernel.kernel
    if whole.call is not None or whole.sort is not None or kernel.partials or kernel.columns:
        return []
    if any(stage.in_order or stage.attend is not None for stage in whole.stages):
        return []
    axes, least = whole.axes, 1
    if not axes:  # a product
        stage, *rest = whole.stages
        if stage.dot is None or rest or any(isinstance(s, Reduce) for s in stage.body):
            return []
        axes, least = stage.axes, ROWS if parts > 2 else 1
    fixed = _decided_by(whole)
    wanted = least * parts
    return [a for a in axes if a.extent >= wanted and a.extent % parts == 0 and a.name not in fixed]


def _decided_by(kernel: Kernel) -> set[str]:
    """The axes whose own value counts, and not only where it leads: of positions, conditions,
    quotients and remainders."""
    found: set[str] = set()
    for s in kernel.statements:
        if isinstance(s, Position):
            found |= axes_of(s.index)
        if isinstance(s, Load | Store | InBounds):
            for bound in s.mask:
                found |= axes_of(bound.index)
    for index in indices_of(kernel):
        for atom, _ in index.terms:
            if not isinstance(atom, str | Var):
                found |= axes_of(atom.index)
    return found


def _is_within(s: Load | Store, count: int, extents: Extents) -> bool:
    """Whether an access of the first part stays within that part's elements."""
    if has_value(s.index) or any(has_value(bound.index) for bound in s.mask):
        return False
    low, high = bounds(s.index, extents)
    for bound in s.mask:
        first, last = _under(s.index, bound, extents)
        low, high = max(low, first), min(high, last)
    return low >= 0 and high < count


def _under(index: Index, bound: Bound, extents: Extents) -> tuple[int, int]:
    """The least and the greatest value of an index where 0 <= bound.index < bound.high."""
    low, high = bounds(add([index, scale(bound.index, -1)]), extents)
    return low, high + bound.high - 1


def _shortened(kernel: Kernel, short: Axis) -> Kernel:
    """The kernel with another extent of an axis."""

    def axes(given: tuple[Axis, ...]) -> tuple[Axis, ...]:
        return tuple(short if a.name == short.name else a for a in given)

    stages = tuple(replace(stage, axes=axes(stage.axes)) for stage in kernel.stages)
    return replace(kernel, axes=axes(kernel.axes), stages=stages)
