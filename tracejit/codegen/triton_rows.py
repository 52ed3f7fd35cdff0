"""Kernels over rows, as Triton functions: a program holds BLOCK_O outer points.

persistent   all inner elements of the points are one tile: what an earlier stage has loaded or
             computed is used again
looped       each stage walks the inner elements BLOCK_I at a time, in as few passes as
             `row_passes.py` finds: sums of exponentials go with the maximum that they are relative
             to (`kernels/online.py`)
peeled       the elements of a row that 128-bit accesses reach are the tile, from its first multiple
             of 16 bytes on; those before and behind, fewer than 2 * UNIT, are a small tile, the
             ends, whose values have names of their own. A row that begins or ends within an access
             would else be read element by element.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from tracejit.codegen.language import Line
from tracejit.codegen.row_passes import (
    Online,
    few_passes,
    is_root,
    moving_in,
    online_sums,
    row_accesses,
)
from tracejit.codegen.triton_body import Body
from tracejit.codegen.triton_forms import (
    Function,
    MakeBody,
    lanes,
    program_number,
    without_reductions,
)
from tracejit.codegen.triton_text import TRITON, Dim, fold_of
from tracejit.schedule.kernel import Kernel, Reduce, Stage, Var

ENDS = "2 * UNIT"  # elements of the ends


def rows(kernel: Kernel, variant: str = "", part: str = "", make: MakeBody = Body) -> Function:
    """Outer points by inner elements."""
    looped, peeled = "looped" in variant, "peeled" in variant
    if looped:
        kernel = few_passes(kernel)
    body = make(kernel)
    outer = Dim("o", kernel.axes, "BLOCK_O", "[:, None]")
    body.enter(outer)
    ends = _Ends(body, kernel) if peeled else None
    middle = (_looped if looped else _persistent)(body, kernel, ends)
    index = f"{program_number(kernel, part)} * BLOCK_O + {lanes(outer)}"
    lines = [*body.prelude(outer, index), *body.scalar_lines()]
    lines += [*(ends.lines if ends else ()), *middle]
    constants = ("BLOCK_O", "BLOCK_I", *(["UNIT"] if peeled else []))
    calls = ("online.online_sum",) * looped * bool(online_sums(kernel))
    return Function(tuple(lines), constants, calls=calls)


class _Ends:
    """What is printed for the ends of rows, beside the body's own values; `lines` define them."""

    def __init__(self, body: Body, kernel: Kernel):
        self.body = body
        stage = next(stage for stage in kernel.stages if stage.axes)
        (self.axis,) = (a for a in stage.axes if a.extent != 1)
        start = row_accesses(kernel)[0][1]
        body.rows = frozenset(a.name for s in kernel.stages for a in s.axes if a.extent != 1)
        self.known: tuple = ({}, {})
        self.names: set[str] = set()
        wide = ".to(tl.int64)" * kernel.index64
        row, n = body.index(start), self.axis.extent
        self.lines = [
            Line(f"head = (0 - ({row})) & (UNIT - 1)"),
            Line(f"middle = ({n} - head) // UNIT * UNIT"),
            Line(f"at = tl.arange(0, {ENDS})[None, :]{wide}"),
            Line("j = tl.where(at < UNIT, at, head + middle - UNIT + at)"),
            Line(f"in_j = tl.where(at < UNIT, at < head, j < {n})"),
        ]

    def emit(self, stage: Stage) -> list[tuple[Reduce, str]]:
        """Print a stage for the ends: its reductions, and what they are there, as columns. The
        stage's axes are those of the dim now."""
        body = self.body
        own, body.lines, body.is_end = body.lines, [], True
        body.put(self.known)
        inner = Dim("i", stage.axes, ENDS, "[None, :]")
        body.enter(inner)
        found = []
        for r in body.emit(stage.body):
            value = body.reduced_value(r, frozenset("i"))
            found.append((r, f"{fold_of(r).tile}({value}, 1)[:, None]"))
        body.leave(inner)
        self.known = body.take("i")
        self.names |= {name for part in self.known for name, _ in part.values()}
        lines = [replace(line, text=self.named(line.text)) for line in body.lines]
        body.lines, body.is_end = [*own, *lines], False
        return [(r, self.named(text)) for r, text in found]

    def named(self, text: str) -> str:
        """A text with the names of the ends."""

        def name(match: re.Match) -> str:
            word = match[0]
            if word in ("in_i", self.axis.name):
                return "in_j" if word == "in_i" else "j"
            return f"w{word[1:]}" if word.removesuffix("_in") in self.names else word

        return re.sub(rf"\b(in_i|{self.axis.name}|v\d+(_in)?)\b", name, text)


def _index(body: Body, inner: Dim, start: str, ends: _Ends | None) -> list[Line]:
    """Definitions of the elements of a block of rows, and which of them exist."""
    block = f"{start}{lanes(inner, body.kernel.index64)}"
    if ends is None:
        return body.prelude(inner, block)
    return [
        Line(f"lane = {block}"),
        Line(f"{ends.axis.name} = head + lane"),
        Line("in_i = lane < middle"),
    ]


def _result(r: Reduce, totals: Sequence[str]) -> Line:
    """A reduction from the totals of the tile and of the ends."""
    fold = fold_of(r)
    total = totals[0] if len(totals) == 1 else fold.both(*totals)
    return Line(f"{r.out!r} = {fold.finish(total)}", r.where)


def _persistent(body: Body, kernel: Kernel, ends: _Ends | None) -> list[Line]:
    """All stages on one tile."""
    inner = next(Dim("i", s.axes, "BLOCK_I", "[None, :]") for s in kernel.stages if s.axes)
    for stage in kernel.stages:
        if not stage.axes:
            without_reductions(body, stage)
            continue
        body.enter(inner)
        body.same_axes(stage.axes, inner)
        totals: dict[Var, list[str]] = {}
        reductions = body.emit(stage.body)
        for r in reductions:
            value = body.reduced_value(r, frozenset("i"))
            totals[r.out] = [f"{fold_of(r).tile}({value}, 1)[:, None]"]
        body.leave(inner)
        if ends is not None:
            own = body.take("i")
            for r, total in ends.emit(stage):
                totals[r.out].append(total)
            body.put(own)
        for r in reductions:
            body.lines.append(_result(r, totals[r.out]))
            body.define(r.out, frozenset("o"))
    return [*_index(body, inner, "", ends), *body.lines]


def _looped(body: Body, kernel: Kernel, ends: _Ends | None) -> list[Line]:
    """A loop for each stage that cannot go with an earlier one."""
    sums = online_sums(kernel)
    lines: list[Line] = []
    for position, stage in enumerate(kernel.stages):
        body.lines = []
        if not stage.axes:
            without_reductions(body, stage)
        elif position in sums:
            _finished(body, stage, sums[position], ends)
        else:
            beside = [one for one in sums.values() if one.stage == position]
            _loop(body, stage, beside, ends)
        lines += body.lines
    return lines


def _loop(body: Body, stage: Stage, beside: Sequence[Online], ends: _Ends | None) -> None:
    """The loop of a stage over blocks of its inner elements, with the sums that go beside its
    maxima."""
    inner = Dim("i", stage.axes, "BLOCK_I", "[None, :]")
    moving = moving_in(stage)
    body.emit(s for s in stage.body if not is_root(s) and s.out not in moving)
    before, body.lines, mark = body.lines, [], body.mark()
    body.enter(inner)
    starts, totals = [], {}
    reductions = body.emit(s for s in stage.body if is_root(s) or s.out in moving)
    for r in reductions:
        fold = fold_of(r)
        total = f"{r.out!r}_{fold.kind}"
        starts.append(Line(f"{total} = tl.full([BLOCK_O, BLOCK_I], {fold.neutral}, {fold.type})"))
        value = body.reduced_value(r, frozenset("i"))
        with_it = [one for one in beside if one.most == r.out]
        for one in with_it:
            name = f"{one.total!r}_sum"
            starts.append(Line(f"{name} = tl.zeros([BLOCK_O, BLOCK_I], {fold.type})"))
            body.lines.append(Line(body.online(total, name, value), r.where))
        if not with_it:
            body.lines.append(Line(fold.combine(total, value), r.where))
        totals[r.out] = [f"{fold.tile}({total}, 1)[:, None]"]
    loop = [*_index(body, inner, "start + ", ends), *body.lines]
    body.leave(inner, mark)
    head = Line(f"for start in range(0, {inner.extent}, BLOCK_I):")
    body.lines = [*before, *starts, head, *TRITON.indent(loop)]
    if ends is not None:
        for r, total in ends.emit(stage):
            totals[r.out].append(total)
    for r in reductions:
        body.lines.append(_result(r, totals[r.out]))
        body.define(r.out, frozenset("o"))


def _finished(body: Body, stage: Stage, one: Online, ends: _Ends | None) -> None:
    """The sum of a stage from what its lanes have summed up beside the maximum, each relative to
    its own."""
    (r,) = (s for s in stage.body if isinstance(s, Reduce))
    body.emit(one.before)
    relative = f"{one.most!r}_max - {body.operand(one.less, r.out.dtype)}"
    totals = [f"tj.reduce_sum({one.total!r}_sum * tj.exp({relative}), 1)[:, None]"]
    if ends is not None:
        totals += [total for _, total in ends.emit(stage)]
    body.lines.append(_result(r, totals))
    body.define(r.out, frozenset("o"))
