"""Which loop of each nest is the vector loop, how it is blocked, and what is dealt to threads.

One loop of each nest is the vector loop: the axis that most accesses walk contiguously. Axes longer
than a block are split, the blocks being one more outer loop. The outer loops are flattened as far
as it takes to make units of work, which are dealt to threads in chunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from tracejit.records import dataclass
from tracejit.schedule.cpu.access import contiguity, running_load, stride, vector_axis
from tracejit.schedule.cpu.cost import MAX_CHUNKS, chunks_of, weight, work_of
from tracejit.schedule.cpu.plan import CpuKernel, Nest
from tracejit.schedule.kernel import Axis, Kernel, Load, Stage, Store

BLOCK = 1024  # elements of a vector loop
SHORT = 8  # elements of an inner axis, fewer than which are not worth a vector loop
COLUMNS = 256  # elements of a vector loop whose reductions run over other axes


@dataclass(frozen=True)
class Loop:
    """A loop over an axis, in steps of a block where `step` is not 1."""

    axis: Axis
    step: int = 1

    @property
    def count(self) -> int:
        return -(-self.axis.extent // self.step)

    @property
    def variable(self) -> str:
        return f"{self.axis.name}_block" if self.step > 1 else self.axis.name


def choose_loops(kernel: CpuKernel) -> CpuKernel:
    """Choose the vector loop, its blocks and the chunks of every loop nest, but not of contractions
    and attention."""
    stages, outer = kernel.kernel.stages, kernel.outer
    if not kernel.kernel.axes:
        inner = [None if stage.dot or stage.attend else _alone(stage) for stage in stages]
        return replace(kernel, inner=tuple(inner))
    if outer is None:
        outer = _outer(kernel.kernel, points=bool(kernel.rows))
    inner = [_inside(stage) if not outer.vector else None for stage in stages]
    columns = kernel.columns and choose_loops(kernel.columns)
    return replace(kernel, outer=outer, inner=tuple(inner), columns=columns)


def by_rows(kernel: Kernel) -> bool:
    """Whether the stages run one after another for each outer point, along an inner axis."""
    return any(stage.axes for stage in kernel.stages) and _outer_vector(kernel) is None


def split(axes: Sequence[Axis], vector: Axis, size: int) -> list[Loop]:
    """The loops outside the vector loop: all other axes, and the blocks of the vector axis."""
    loops = []
    for axis in axes:
        if axis is not vector:
            loops.append(Loop(axis))
        elif axis.extent > size:
            loops.append(Loop(axis, size))
    return loops


def dealt(loops: Sequence[Loop], wanted: int) -> tuple[int, int, int]:
    """(how many leading loops are flattened, into how many units, in how many chunks): as far as
    there must be units for the wanted chunks."""
    depth, units = 0, 1
    while depth < len(loops) and units < 4 * wanted and wanted > 1:
        units *= loops[depth].count
        depth += 1
    return depth, units, max(1, min(units, wanted))


def _alone(stage: Stage) -> Nest | None:
    """A stage of a kernel without outer axes: a loop nest of its own."""
    if not stage.axes:
        return None
    vector = vector_axis(stage.axes, stage.body)
    work = math.prod(a.extent for a in stage.axes) * weight(stage.body)
    size = _block(stage, vector)
    loops = split(stage.axes, vector, size)
    wanted = 1 if stage.in_order else chunks_of(MAX_CHUNKS, work)
    return Nest(vector.name, size, dealt(loops, wanted)[2])


def _inside(stage: Stage) -> Nest | None:
    """A stage inside an outer point."""
    if not stage.axes:
        return None
    vector = vector_axis(stage.axes, stage.body)
    return Nest(vector.name, _block(stage, vector), 1)


def _block(stage: Stage, vector: Axis) -> int:
    """The elements of a stage's vector loop: all, where a running result stays in a register."""
    whole = stage.in_order and running_load(stage.body) is not None
    return max(vector.extent, BLOCK) if whole else BLOCK


def _outer(kernel: Kernel, *, points: bool) -> Nest:
    """The outer axes of a kernel: point by point, or in blocks of the contiguous one."""
    vector = None if points else _outer_vector(kernel)
    if vector is None:
        name, size, loops = "", 1, [Loop(a) for a in kernel.axes]
    else:
        inner = any(stage.axes for stage in kernel.stages)
        name, size = vector.name, COLUMNS if inner else BLOCK
        loops = split(kernel.axes, vector, size)
    return Nest(name, size, dealt(loops, chunks_of(MAX_CHUNKS, work_of(kernel)))[2])


def _outer_vector(kernel: Kernel) -> Axis | None:
    """The outer axis to vectorise over; None where an inner one is better."""
    statements = [s for stage in kernel.stages for s in stage.body]
    best = vector_axis(kernel.axes, statements)
    inner = [a for stage in kernel.stages for a in stage.axes]
    if not inner:
        return best
    if all(a.extent < min(SHORT, best.extent) for a in inner) and _walked(kernel, best) > 0:
        return best  # the taps of a window are no loop for vectors
    longest = max(a.extent for a in inner)
    if best.extent < SHORT <= longest:
        return None
    most = max(_walked(kernel, a) for a in inner)
    return best if _walked(kernel, best) > most else None


def _walked(kernel: Kernel, axis: Axis) -> int:
    """How many accesses go along an axis in memory, each as often as it is done: what does not move
    with an inner axis is done before the loop over it."""
    walked = 0
    for stage in kernel.stages:
        for s in stage.body:
            if isinstance(s, Load | Store):
                moving = [a.extent for a in stage.axes if stride(s.index, a.name)]
                walked += contiguity(axis, [s]) * math.prod(moving)
    return walked
