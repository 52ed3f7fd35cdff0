"""Kernels that go in order, as Triton functions, since values say where they store.

No atomics. An element is one program's own, which takes what goes there in the order of the
indices. Programs share out the outer points in blocks and, where the index is the same for all
outer points, the places along the axis in PARTS ranges too: each goes over all indices, and reads
the source only of those within its range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tracejit.codegen.language import Line
from tracejit.codegen.triton_body import NO_DIMS, Body
from tracejit.codegen.triton_forms import Function, MakeBody, lanes, program_number
from tracejit.codegen.triton_text import TRITON, Dim
from tracejit.schedule.cpu.access import axes_of, places, variables
from tracejit.schedule.kernel import Axis, Kernel, Size, Stage, Statement, Store


@dataclass(frozen=True)
class Scatter:
    """A scatter kernel taken apart: what is there before (None: it lies there already), and the
    stage that stores over it, which ends with `store`. `choosing` are the statements that its
    place needs, `storing` the others; `shared`: the outer points have one index in common."""

    before: Stage | None
    stage: Stage
    store: Store
    choosing: tuple[Statement, ...]
    storing: tuple[Statement, ...]
    shared: bool

    @property
    def places(self) -> Size:
        """How many places there are along the axis."""
        return self.store.mask[0].high


def scatter_of(kernel: Kernel) -> Scatter:
    """The parts of a kernel whose last stage runs in order."""
    *before, stage = kernel.stages
    *body, store = stage.body
    wanted = {v.id for v in variables(replace(store, value=0))}
    choosing: list[Statement] = []
    for s in reversed(body):
        if s.out.id in wanted:
            wanted |= {v.id for v in variables(s)}
            choosing.insert(0, s)
    storing = tuple(s for s in body if s not in choosing)
    outer = {a.name for a in kernel.axes}
    used = {name for s in choosing for index in places(s) for name in axes_of(index)}
    first = before[0] if before else None
    return Scatter(first, stage, store, tuple(choosing), storing, not used & outer)


def scatter(
    kernel: Kernel, variant: bool = False, part: str = "", make: MakeBody = Body
) -> Function:
    """The function of a kernel whose last stage runs in order."""
    body, s = make(kernel), scatter_of(kernel)
    dim = Dim("x", kernel.axes)
    middle: list[Line] = []
    if s.before is not None:
        middle = _loop(body, dim, s.before.axes, s.before.body)
        for axis in s.before.axes:
            head = Line(f"for {axis.name} in range(low, high):")
            middle = [head, *TRITON.indent(middle)]
        middle.append(Line("tl.debug_barrier()"))
    chosen = _loop(body, dim, s.stage.axes, s.choosing, keep=True)
    if s.shared:
        inside = replace(s.store, mask=())
        at = body.index(s.store.mask[0].index)
        rest = _loop(body, dim, s.stage.axes, (*s.storing, inside))
        rest = [Line(f"if ({at} >= low) & ({at} < high):"), *TRITON.indent(rest)]
    else:
        rest = _loop(body, dim, s.stage.axes, (*s.storing, s.store))
    loop = [*chosen, *rest, Line("tl.debug_barrier()  # for the next index, maybe of this place")]
    for axis in s.stage.axes:
        loop = [Line(f"for {axis.name} in range(0, {axis.extent}):"), *TRITON.indent(loop)]
    body.used |= {dim.mask}
    index = f"(program // PARTS) * BLOCK + {lanes(dim)}"
    lines = [
        Line(f"program = {program_number(kernel, part)}"),
        *body.prelude(dim, index),
        Line("low = program % PARTS * RANGE"),
        Line(f"high = tl.minimum(low + RANGE, {s.places})"),
        *body.scalar_lines(),
        *middle,
        *loop,
    ]
    return Function(tuple(lines), ("BLOCK", "PARTS", "RANGE"))


def _loop(
    body: Body, dim: Dim, axes: Sequence[Axis], statements: Sequence[Statement], keep: bool = False
) -> list[Line]:
    """Statements within a loop over `axes`; `keep` what they know for those that follow."""
    for axis in axes:
        body.axis_text[axis.name] = ("0" if axis.extent == 1 else axis.name, NO_DIMS)
    body.lines = []
    mark = body.mark()
    body.enter(dim)
    body.emit(statements)
    body.leave(dim, None if keep else mark)
    lines, body.lines = body.lines, []
    return lines
