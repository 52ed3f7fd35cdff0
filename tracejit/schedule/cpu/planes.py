"""Windows that slide over a plane, padded: the plane is copied first, and the taps are written out.

In: a Kernel with outer axes whose first stage reads through a window of a few taps. It reduces over
the taps, such as a depthwise convolution or a pooling; or the taps are outer axes, and it reduces
over all places of the window, such as the gradient of the convolution's weight. What it reads is
masked where the window leaves the image, and each element is read, and computed upon, once for each
tap. Out: the same kernel whose outer points are planes (an image and a channel; a channel). Its
first stage computes each element of a plane once and stores it in a local array, with what stands
outside of the image around it. The second goes along the rows of results, or of what is reduced,
without masks: it loads all taps from the array.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from tracejit.ir.ops import OPS
from tracejit.ir.types import contiguous_strides, f32, f64
from tracejit.records import dataclass
from tracejit.schedule.axes import map_statements
from tracejit.schedule.cpu.access import axes_of, extents_of, has_value, places, variables
from tracejit.schedule.cpu.phases import FOLDS, fresh_numbers
from tracejit.schedule.cpu.plan import CpuKernel
from tracejit.schedule.cpu.rows import KEPT_BYTES
from tracejit.schedule.cpu.taps import copy_at, fixed_at, points_of
from tracejit.schedule.index import add, bounds, scale
from tracejit.schedule.kernel import (
    Axis,
    Buffer,
    Compute,
    InBounds,
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

FIRST = 500  # of the numbers of a plane's axes
TAPS = 25  # of a window, at most: each is written out
COPIED_BYTES = 256 << 10  # of the planes of all images, at most
SHORT = 4  # results of a row, fewer than which are not worth a vector loop
PLANE = "plane0"


def copy_planes(kernel: CpuKernel) -> CpuKernel:
    """The kernel with its padded planes in a local array, where windows slide over such."""
    if kernel.columns is not None or kernel.rows:
        return kernel
    found = copied_planes(kernel.kernel)
    return kernel if found is None else replace(kernel, kernel=found, rows=(PLANE,))


@dataclass(frozen=True)
class _Direction:
    """A direction in which a window slides: its position in the image, which is a sum over outer
    axes and taps; what a step is in the load's index; the plane's axis, and its first position."""

    position: Index
    step: int
    axis: Axis
    low: int


@dataclass(frozen=True)
class _Slide:
    """What a kernel's first stage reads through its window.

    load:    the masked load; `rest` is its index without the directions.
    once:    the statements that compute the plane's values, in order.
    value:   what they compute.
    each:    the statements of each tap, and what is the same for all.
    """

    kernel: Kernel
    directions: tuple[_Direction, ...]
    load: Load
    rest: Index
    once: tuple[Statement, ...]
    value: Var
    each: tuple[Statement, ...]
    reduce: Reduce

    @property
    def sliding(self) -> set[str]:
        """The axes that say where the window is, and the tap."""
        return _sliding(self.directions)

    @property
    def outer(self) -> tuple[Axis, ...]:
        """The axes of the kernel over planes."""
        return tuple(a for a in self.kernel.axes if a.name not in self.sliding)

    @property
    def within(self) -> tuple[Axis, ...]:
        """The outer axes that move within a plane: those of results, or the taps."""
        return tuple(a for a in self.kernel.axes if a.name in self.sliding)

    @property
    def copied(self) -> tuple[Axis, ...]:
        """The axes of the copy: those of the first stage that its values move with besides, and
        those of the plane."""
        moving = {a for s in self.once for index in places(s) for a in axes_of(index)}
        besides = [a for a in self.kernel.stages[0].axes if a.name in moving - self.sliding]
        return (*besides, *(d.axis for d in self.directions))

    @property
    def nbytes(self) -> int:
        """Of the copy."""
        return math.prod(a.extent for a in self.copied) * self.value.dtype.itemsize

    def over_results(self) -> Kernel:
        """The kernel over planes, where it reduces over the taps."""
        taps, last = self.kernel.stages
        fresh = fresh_numbers(self.kernel)
        fold, where = OPS[FOLDS[self.reduce.op.name]], self.reduce.where
        body: list[Statement] = []
        total: Operand | None = None
        points = points_of(taps.axes)
        for at in points:
            names = self._tap(at, body, self.each, fresh)
            value = names[self.reduce.value]
            if total is not None:
                out = self.reduce.out if at is points[-1] else Var(next(fresh), value.dtype)
                body.append(Compute(out, fold, (total, value), (), where))
                value = out
            total = value
        return self._kernel(Stage(self.within, (*body, *last.body)))

    def over_taps(self) -> Kernel:
        """The kernel over planes, where the taps are outer axes."""
        stage, last = self.kernel.stages
        names_of_taps = {a.name for a in self.within}
        fresh = fresh_numbers(self.kernel)
        depends: set[int] = {self.value.id}  # values that differ from tap to tap
        for s in self.each:
            moves = any(axes_of(index) & names_of_taps for index in places(s))
            if moves or any(v.id in depends for v in variables(s)):
                depends.add(s.out.id)
        body = [s for s in self.each if s.out.id not in depends]
        each = tuple(s for s in self.each if s.out.id in depends)
        after: list[Statement] = []
        for at in points_of(self.within):
            names = self._tap(at, body, each, fresh)
            out = Var(next(fresh), self.reduce.out.dtype)
            value = names.get(self.reduce.value, self.reduce.value)
            body.append(replace(self.reduce, out=out, value=value))
            copy_at(last.body, at, after, fresh, {self.reduce.out: out})
        return self._kernel(Stage(stage.axes, tuple(body)), Stage((), tuple(after)))

    def _kernel(self, *stages: Stage) -> Kernel:
        """The kernel of a stage that fills the array, and others."""
        here = add([Index(((a.name, s),)) for a, s in self._strides()])
        at = {d.position: Index(((d.axis.name, 1),), d.low) for d in self.directions}
        parts = [scale(at[d.position], d.step) for d in self.directions]
        at[self.load.index] = add([self.rest, *parts])
        once = map_statements(self.once, lambda index: at.get(index, index))
        fill = (*once, Store(PLANE, here, self.value, self.load.where))
        buffers = (*self.kernel.buffers, Buffer(PLANE, self.value.dtype, "rw"))
        stages = (Stage(self.copied, fill), *stages)
        return replace(self.kernel, axes=self.outer, stages=stages, buffers=buffers)

    def _strides(self) -> list[tuple[Axis, int]]:
        """The axes of the copy, and how it lies in memory."""
        axes = self.copied
        return list(zip(axes, contiguous_strides(tuple(a.extent for a in axes)), strict=True))

    def _tap(
        self,
        at: Mapping[str, int],
        body: list[Statement],
        each: Sequence[Statement],
        fresh: Iterator[int],
    ) -> dict[Var, Var]:
        """Append the statements of one tap; returns what its values are called."""
        seen = Var(next(fresh), self.value.dtype)
        position = {d.axis: add([fixed_at(d.position, at)], -d.low) for d in self.directions}
        parts = [
            scale(position.get(axis, Index(((axis.name, 1),))), stride)
            for axis, stride in self._strides()
        ]
        body.append(Load(seen, PLANE, add(parts), (), self.load.where))
        names = {self.value: seen}
        copy_at(each, at, body, fresh, names)
        return names


def copied_planes(kernel: Kernel) -> Kernel | None:
    """A kernel over planes instead of this one; None where no windows slide in it."""
    if len(kernel.stages) != 2 or not kernel.axes or kernel.sort:
        return None
    first, last = kernel.stages
    if first.dot or first.attend or first.in_order or last.axes or not first.axes:
        return None
    loads = [s for s in first.body if isinstance(s, Load) and s.mask]
    reduces = [s for s in first.body if isinstance(s, Reduce)]
    if len(loads) != 1 or len(reduces) != 1 or any(isinstance(s, Store) for s in first.body):
        return None
    if any(has_value(index) for stage in kernel.stages for s in stage.body for index in places(s)):
        return None
    (load,), (reduce,) = loads, reduces
    found = _directions(kernel, first, load)
    if found is None:
        return None
    directions, rest = found
    sliding = _sliding(directions)
    parted = _parted(first.body, load, reduce, sliding)
    if parted is None or parted[1].dtype not in (f32, f64):
        return None
    slide = _Slide(kernel, directions, load, rest, *parted, reduce)
    inner = [a for a in first.axes if a.name in sliding]
    if not slide.outer:  # one plane is all there is
        return None
    row = axes_of(directions[-1].position)
    if _are_taps(inner, slide.within, row) and len(inner) == len(first.axes):
        plain = reduce.op.name in FOLDS and reduce.out.dtype in (f32, f64)
        return slide.over_results() if plain and slide.nbytes <= KEPT_BYTES else None
    if _are_taps(slide.within, inner, row) and slide.nbytes <= COPIED_BYTES:
        return slide.over_taps()
    return None


def _sliding(directions: Sequence[_Direction]) -> set[str]:
    return {a for d in directions for a in axes_of(d.position)}


def _are_taps(taps: Sequence[Axis], across: Sequence[Axis], row: set[str]) -> bool:
    """Whether axes are few taps, and the others' rows are worth a vector loop."""
    few = 1 < math.prod(a.extent for a in taps) <= TAPS
    return few and any(a.extent >= SHORT for a in across if a.name in row)


def _directions(
    kernel: Kernel, taps: Stage, load: Load
) -> tuple[tuple[_Direction, ...], Index] | None:
    """In which directions a load's window slides, and the rest of its index."""
    extents, steps = extents_of(kernel), dict(load.index.terms)
    outer, inner = ({a.name for a in axes} for axes in (kernel.axes, taps.axes))
    directions, seen, rest = [], set(), load.index
    for number, bound in enumerate(load.mask):
        terms = dict(bound.index.terms)
        names = terms.keys()
        plain = bound.step == 1 and all(isinstance(atom, str) for atom in terms)
        if not plain or not names & outer or not names & inner or names & seen:
            return None
        ratios = {divmod(steps.get(name, 0), c) for name, c in terms.items()}
        if len(ratios) != 1:
            return None
        ((step, remainder),) = ratios
        if remainder or step <= 0:
            return None
        low, high = bounds(bound.index, extents)
        axis = Axis(f"i{FIRST + number}", high - low + 1)
        directions.append(_Direction(bound.index, step, axis, low))
        rest = add([rest, scale(bound.index, -step)])
        seen |= names
    directions.sort(key=lambda d: -d.step)
    if not directions or directions[-1].step != 1 or axes_of(rest) & seen:
        return None
    return tuple(directions), rest


def _parted(
    body: tuple[Statement, ...], load: Load, reduce: Reduce, sliding: set[str]
) -> tuple[tuple[Statement, ...], Var, tuple[Statement, ...]] | None:
    """(the statements that compute the plane's values, what they compute, those of each tap)."""
    of_plane: set[int] = set()  # values that depend on the load or its mask
    shared: set[int] = set()  # those that are the same all over the plane
    for s in body:
        used = {v.id for v in variables(s)}
        if isinstance(s, Reduce):
            continue
        masks = isinstance(s, InBounds) and set(s.mask) <= set(load.mask)
        derived = isinstance(s, Compute) and used & of_plane and used <= of_plane | shared
        if s is load or masks or derived:
            of_plane.add(s.out.id)
        elif used <= shared and not any(axes_of(index) & sliding for index in places(s)):
            shared.add(s.out.id)
    rest = [s for s in body if isinstance(s, Reduce) or s.out.id not in of_plane]
    needed = {v.id for s in rest for v in variables(s)} & of_plane
    if len(needed) != 1:
        return None
    (id_,) = needed
    once = tuple(s for s in body if not isinstance(s, Reduce) and s.out.id in of_plane | shared)
    value = next(s.out for s in once if s.out.id == id_)
    return _live(once, value), value, tuple(s for s in rest if s is not reduce)


def _live(statements: tuple[Statement, ...], value: Var) -> tuple[Statement, ...]:
    """The statements that a value needs."""
    needed, found = {value.id}, []
    for s in reversed(statements):
        if s.out.id in needed:
            needed |= {v.id for v in variables(s)}
            found.append(s)
    return tuple(reversed(found))
