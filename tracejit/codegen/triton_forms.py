"""Kernels without a contraction as Triton functions, one printer per form.

sort        its first stage ends with a Sort (`triton_sort.py`)
scatter     its last stage runs in order (`triton_scatter.py`)
scan        so does its only stage, with a running result along its axis (`triton_scan.py`)
pointwise   outer axes only: a flat block of the domain per program
reduce      no outer axes, one stage with inner axes: a bounded number of programs walk the domain;
            the last one to finish folds the partials in fixed order and runs the tail stages
rows        everything else (`triton_rows.py`)

Each printer returns a `Function`; `triton.emit` puts the module around it. With `part` (its number
as a suffix) a kernel shares its launch with others: its programs are those from FIRST on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tracejit.codegen.language import Line
from tracejit.codegen.triton_body import NO_DIMS, Body
from tracejit.codegen.triton_text import TRITON, Dim, fold_of
from tracejit.errors import InvalidGraph
from tracejit.records import dataclass
from tracejit.schedule.kernel import Kernel, Reduce, Stage

HEADER_BYTES = 16  # the workspace starts with the counter; the partials follow
PARTIAL_BYTES = 8  # per program and reduction: enough for every accumulator
FOLD_BLOCK = 256  # partials folded at a time

MakeBody = Callable[[Kernel], Body]  # who counts what is printed has a Body of its own (work.py)


@dataclass(frozen=True)
class Function:
    """A generated function's lines, its constants besides the kernel's sizes, and its imports.

    `imports` are names of tracejit.kernels.reduce.
    `calls` are other functions of tracejit.kernels: "scan.running_sum".
    """

    lines: tuple[Line, ...]
    constants: tuple[str, ...]
    imports: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    has_workspace: bool = False  # whatever it imports

    @property
    def works(self) -> bool:
        """Whether it takes a workspace."""
        return self.has_workspace or bool(self.imports)


def form_of(kernel: Kernel) -> str:
    """Which printer a kernel needs: pointwise, reduce, rows, scatter, scan, sort,
    matmul, attention, joint for several, or foreach for rows of one kind."""
    if kernel.parts:
        return "foreach" if kernel.foreach else "joint"
    if any(stage.dot is not None for stage in kernel.stages):
        return "matmul"
    if any(stage.attend is not None for stage in kernel.stages):
        return "attention"
    if kernel.sort is not None:
        return "sort"
    if any(stage.in_order for stage in kernel.stages):
        return "scatter" if kernel.stages[-1].body[-1].mask else "scan"
    inner = [stage for stage in kernel.stages if stage.axes]
    if not inner:
        return "pointwise"
    alone = not kernel.axes and kernel.stages[0].axes and len(inner) == 1
    if alone and any(isinstance(s, Reduce) for s in inner[0].body):
        return "reduce"
    return "rows"


def pointwise(kernel: Kernel, variant: str = "", part: str = "", make: MakeBody = Body) -> Function:
    """One flat block of the outer domain per program; a kernel without axes is one program. With
    the variant "tiled" a block has rows, so that numbers for each column are loaded once."""
    body = make(kernel)
    dim = Dim("x", kernel.axes)
    if not dim.axes:
        for stage in kernel.stages:
            without_reductions(body, stage)
        return Function((*body.scalar_lines(), *body.lines), ())

    if variant == "tiled":
        return _tiled(body, kernel, part)

    def block(dim: Dim) -> None:
        body.enter(dim)
        for stage in kernel.stages:
            without_reductions(body, stage)

    lines = _flat(body, dim, f"{program_number(kernel, part)} * BLOCK", variant == "ragged", block)
    return Function((*body.scalar_lines(), *lines), ("BLOCK",))


def _tiled(body: Body, kernel: Kernel, part: str) -> Function:
    """A block of rows and columns per program."""
    *outer, inner = kernel.axes
    o = Dim("o", tuple(outer), "BLOCK_O", "[:, None]")
    i = Dim("i", (inner,), "BLOCK_I", "[None, :]")
    body.enter(o, i)
    for stage in kernel.stages:
        without_reductions(body, stage)
    across = f"(({inner.extent} + BLOCK_I - 1) // BLOCK_I)"
    lines = [
        Line(f"block = {program_number(kernel, part)}"),
        *body.prelude(o, f"block // {across} * BLOCK_O + {lanes(o)}"),
        *body.prelude(i, f"block % {across} * BLOCK_I + {lanes(i)}"),
        *body.scalar_lines(),
        *body.lines,
    ]
    return Function(tuple(lines), ("BLOCK_O", "BLOCK_I"))


def reduce(kernel: Kernel, variant: str = "", part: str = "", make: MakeBody = Body) -> Function:
    """A full reduction with its element-wise stores and its tail in one launch."""
    body = make(kernel)
    main, *tail = kernel.stages
    dim = Dim("x", main.axes)
    reductions = [s for s in main.body if isinstance(s, Reduce)]
    totals = {r: f"{r.out!r}_{fold_of(r).kind}" for r in reductions}
    starts = []
    for r in reductions:
        fold = fold_of(r)
        starts.append(Line(f"{totals[r]} = tl.full([BLOCK], {fold.neutral}, {fold.type})"))

    def block(dim: Dim) -> None:
        body.enter(dim)
        for r in body.emit(main.body):
            value = body.reduced_value(r, frozenset([dim.name]))
            body.lines.append(Line(fold_of(r).combine(totals[r], value), r.where))

    loop = _flat(body, dim, "(step * PROGRAMS + pid) * BLOCK", variant == "ragged", block)
    last, imports = last_program(body, reductions, totals, tail, "PROGRAMS")
    lines = [
        Line(f"pid = {program_number(kernel, part)}"),
        *body.scalar_lines(),
        *starts,
        Line("for step in range(STEPS):"),
        *TRITON.indent(loop),
        *last,
    ]
    return Function(tuple(lines), ("BLOCK", "PROGRAMS", "STEPS"), imports)


def _flat(
    body: Body, dim: Dim, first: str, ragged: bool, block: Callable[[Dim], None]
) -> list[Line]:
    """The lines of one flat block, which starts at the element `first`; `block` prints them.

    Of a `ragged` domain, whose size is no multiple of a 128-bit access, only the last block has a
    mask: under one that ends within an access the hardware's accesses would all be narrow.
    """

    if not ragged:
        return block_lines(body, dim, f"{first} + {lanes(dim)}", block)
    index = f"first + {lanes(dim)}"
    return [
        Line(f"first = {first}"),
        Line(f"if first <= {dim.extent} - BLOCK:"),
        *TRITON.indent(block_lines(body, replace(dim, full=True, counted=False), index, block)),
        Line("else:"),
        *TRITON.indent(block_lines(body, dim, index, block)),
    ]


def block_lines(body: Body, dim: Dim, index: str, block: Callable[[Dim], None]) -> list[Line]:
    """The lines of a flat block, whose elements are at `index`; `block` prints its statements."""
    before = body.mark()
    block(dim)
    lines = [*body.prelude(dim, index), *body.lines]
    body.lines = []
    body.used.clear()
    body.leave(dim, before)
    return lines


def last_program(
    body: Body,
    reductions: list[Reduce],
    totals: dict[Reduce, str],
    tail: list[Stage],
    programs: str,
) -> tuple[list[Line], tuple[str, ...]]:
    """Publish each reduction's tile total; the last program folds them and runs the tail."""
    lines, collects = [], []
    for position, r in enumerate(reductions):
        fold = fold_of(r)
        name = f"{r.out!r}_partials"
        offset = f"workspace + {HEADER_BYTES}"
        if position:
            offset += f" + {PARTIAL_BYTES * position} * {programs}"
        lines.append(Line(f"{name} = ({offset}).to(tl.pointer_type({fold.type}))"))
        lines.append(Line(f"publish({name}, {fold.tile}({totals[r]}), pid)"))
        total = fold.finish(f"{fold.collect}({name}, {programs}, {FOLD_BLOCK})")
        collects.append(Line(f"{r.out!r} = {total}", r.where))
        body.define(r.out, NO_DIMS)
    for stage in tail:
        without_reductions(body, stage)
    lines.append(Line(f"if is_last(workspace.to(tl.pointer_type(tl.int32)), {programs}):"))
    lines += TRITON.indent([*collects, *body.lines])
    body.lines = []
    return lines, ("is_last", "publish", *sorted({fold_of(r).collect for r in reductions}))


def can_persist(kernel: Kernel) -> bool:
    """Whether all inner stages run over one domain, so that one tile may serve them all."""
    extents = {tuple(a.extent for a in stage.axes) for stage in kernel.stages if stage.axes}
    return len(extents) == 1


def without_reductions(body: Body, stage: Stage) -> None:
    """A stage that runs once per outer point."""
    if stage.axes or body.emit(stage.body):
        raise InvalidGraph(reason="a reduction needs a stage with axes")


def lanes(dim: Dim, wide: bool = False) -> str:
    """The positions of a block's elements within it."""
    return f"tl.arange(0, {dim.block}){dim.place}" + (".to(tl.int64)" if wide else "")


def program_number(kernel: Kernel, part: str) -> str:
    """The number of a program among those of the kernel."""
    number = "(tl.program_id(0) - FIRST)" if part else "tl.program_id(0)"
    return f"{number}.to(tl.int64)" if kernel.index64 else number
