"""Kernels that go in order, as Triton functions, since values say where they store.

No atomics. An element is one program's own, which takes what goes there in the order of the
indices. Programs share out the outer points in blocks and, where the index is the same for all
outer points, the places along the axis in PARTS ranges too: each goes over all indices, IDS at a
time, and takes one after another those within its range, whose sources it reads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from tracejit.codegen.language import Line
from tracejit.codegen.triton_body import NO_DIMS, Body
from tracejit.codegen.triton_forms import Function, MakeBody, lanes, program_number
from tracejit.codegen.triton_text import TRITON, Dim
from tracejit.records import dataclass
from tracejit.schedule.cpu.access import axes_of, places, variables
from tracejit.schedule.kernel import Axis, Kernel, Size, Stage, Statement, Store, Var


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
    def chooses(self) -> bool:
        """Whether programs look for their own indices among all: some have an index in common."""
        return self.shared and len(self.stage.axes) == 1 and self.stage.axes[0].extent != 1

    @property
    def place(self) -> Var:
        """The value that says where along the axis it stores."""
        ((place, _),) = self.store.mask[0].index.terms
        return place

    @property
    def needs_only_place(self) -> bool:
        """Whether what it stores needs nothing else of the statements that choose."""
        used = {v for s in (*self.storing, self.store) for v in variables(s)}
        return used & {s.out for s in self.choosing} <= {self.place}

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


def scatter(kernel: Kernel, variant: str = "", part: str = "", make: MakeBody = Body) -> Function:
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
    loop = _chosen(body, dim, s) if s.chooses else _one_by_one(body, dim, s)
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
    return Function(tuple(lines), ("BLOCK", "PARTS", "RANGE", *(["IDS"] if s.chooses else [])))


NEXT = Line("tl.debug_barrier()  # for the next index, maybe of this place")


def _one_by_one(body: Body, dim: Dim, s: Scatter) -> list[Line]:
    """All indices one after another, each for those outer points whose place it says."""
    chosen = _loop(body, dim, s.stage.axes, s.choosing, keep=True)
    rest = _loop(body, dim, s.stage.axes, (*s.storing, s.store))
    if s.shared:
        at = body.index(s.store.mask[0].index)
        rest = [Line(f"if ({at} >= low) & ({at} < high):"), *TRITON.indent(rest)]
    loop = [*chosen, *rest, NEXT]
    for axis in s.stage.axes:
        loop = [Line(f"for {axis.name} in range(0, {axis.extent}):"), *TRITON.indent(loop)]
    return loop


def _chosen(body: Body, dim: Dim, s: Scatter) -> list[Line]:
    """A tile of indices at a time: those within the program's range are counted, and taken one
    after another."""
    (step,) = s.stage.axes
    tile = Dim("t", (step,), "IDS")
    mark = body.mark()
    body.enter(tile)
    body.emit(s.choosing)
    place = body.variable(s.place)
    if not body.value_dims(s.place):
        place = f"tl.broadcast_to({place}, [IDS])"
    body.leave(tile, mark)
    found = [replace(line, text=_renamed(line.text, step.name)) for line in body.lines]
    place, body.lines = _renamed(place, step.name), []
    again = [] if s.needs_only_place else s.choosing
    if not again:
        body.given(s.place)
    inside = replace(s.store, mask=())
    rest = _loop(body, dim, s.stage.axes, (*again, *s.storing, inside))
    wide = ".to(tl.int64)" * body.kernel.index64
    taken = [
        Line("taken = here & (order == k)"),
        Line(f"{step.name} = tl.sum(tl.where(taken, t, 0), 0)"),
    ]
    if not again:
        taken.append(Line(f"{s.place!r} = tl.sum(tl.where(taken, place, 0), 0)"))
    loop = [
        Line(f"t = start + tl.arange(0, IDS){wide}"),
        Line(f"in_t = t < {step.extent}"),
        *found,
        Line(f"place = {place}"),
        Line("here = in_t & (place >= low) & (place < high)"),
        Line("order = tl.cumsum(here.to(tl.int32), 0)"),
        Line("for k in range(1, tl.max(order, 0) + 1):"),
        *TRITON.indent([*taken, *rest, NEXT]),
    ]
    return [Line(f"for start in range(0, {step.extent}, IDS):"), *TRITON.indent(loop)]


def _renamed(text: str, step: str) -> str:
    """A line of a tile of indices, whose values have names of their own."""
    return re.sub(rf"\bv(?=\d)|\b{step}\b", lambda m: "w" if m[0] == "v" else "t", text)


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
