"""Kernels that sort, as Triton functions.

ranked    the place of an element in the order is how many of its row stand before it. A program
          finds the places of a block of a row's elements, by comparing them with all of the row,
          OTHERS at a time. Each element goes to a place of its own: no atomics.
network   a row that fits a tile is one program's, which sorts it (`kernels/order.py`).
"""

from __future__ import annotations

import re
from dataclasses import replace

from tracejit.codegen.language import Line
from tracejit.codegen.triton_body import NO_DIMS, Body
from tracejit.codegen.triton_forms import Function, MakeBody, lanes, program_number
from tracejit.codegen.triton_text import TRITON, Dim, unravel
from tracejit.ir.types import b1
from tracejit.schedule.kernel import Bound, Index, Kernel


def sort(kernel: Kernel, variant: str = "", part: str = "", make: MakeBody = Body) -> Function:
    """The function of a kernel whose first stage ends with a Sort."""
    if variant == "network":
        return _network(kernel, part, make(kernel))
    body, (values, ordered) = make(kernel), kernel.stages
    (along,), how = values.axes, kernel.sort
    n, i = along.extent, along.name
    mine, other = (Dim(name, (along,), block) for name, block in (("x", "BLOCK"), ("y", "OTHERS")))
    for axis in kernel.axes:
        body.axis_text[axis.name] = ("0" if axis.extent == 1 else axis.name, NO_DIMS)

    def row(dim: Dim) -> tuple[list[Line], str]:
        """The statements for a block of the row, and their value as a tile."""
        before = body.mark()
        body.enter(dim)
        body.axis_text[i] = (i if dim is mine else "other", frozenset([dim.name]))
        body.emit(values.body[:-1])
        text = body.operand(how.value, how.value.dtype, typed=True)
        if how.value.dtype is b1:
            text = f"{text}.to(tl.int32)"
        if not body.value_dims(how.value):
            text = f"tl.broadcast_to({text}, [{dim.block}])"
        lines, body.lines = body.lines, []
        body.leave(dim, before)
        return lines, text

    first, value = row(mine)
    first += [Line(f"value = {value}"), Line(f"at = {i}")]
    rest, value = row(other)
    # Names of their own: what a loop assigns keeps its type.
    rest = [replace(line, text=_renamed(line.text)) for line in rest]
    values = f"({_renamed(value)})[None, :], value[:, None]"
    args = f"{values}, other[None, :] < at[:, None], {how.descending}"
    rest += [
        Line(f"before = tj.stands_before({args}) & in_y[None, :]", how.where),
        Line("rank += tl.sum(before.to(tl.int32), axis=1)"),
    ]
    (store,) = ordered.body
    place, count = next(((a.name, a.extent) for a in ordered.axes), ("place", 1))
    body.axis_text[place] = ("place", frozenset(["x"]))
    body.enter(mine)
    body.define(how.out, frozenset(["x"]), "at.to(tl.int64)")
    body.emit([replace(store, mask=(Bound(Index(((place, 1),)), count),))])
    last, body.lines = body.lines, []
    body.leave(mine)
    wanted = {a.name for a in kernel.axes if a.name in body.used}
    lines = [
        Line(f"program = {program_number(kernel, part)}"),
        *([Line(f"row = program // tl.cdiv({n}, BLOCK)")] if wanted else []),
        *unravel([a for a in kernel.axes if a.extent != 1], "row", wanted),
        *body.scalar_lines(),
        Line(f"{i} = program % tl.cdiv({n}, BLOCK) * BLOCK + tl.arange(0, BLOCK)"),
        Line(f"in_x = {i} < {n}"),
        *first,
        Line("rank = tl.zeros([BLOCK], tl.int32)"),
        Line(f"for start in range(0, {n}, OTHERS):"),
        *TRITON.indent(
            [Line("other = start + tl.arange(0, OTHERS)"), Line(f"in_y = other < {n}"), *rest]
        ),
        Line(f"place = rank{'.to(tl.int64)' if kernel.index64 else ''}"),
        *last,
    ]
    return Function(tuple(lines), ("BLOCK", "OTHERS"))


def _network(kernel: Kernel, part: str, body: Body) -> Function:
    """A row to a program."""
    (values, ordered), how = kernel.stages, kernel.sort
    (along,) = values.axes
    for axis in kernel.axes:
        body.axis_text[axis.name] = ("0" if axis.extent == 1 else axis.name, NO_DIMS)
    dim = Dim("x", (along,))
    body.enter(dim)
    body.axis_text[along.name] = (along.name, frozenset(["x"]))
    body.emit(values.body[:-1])
    value = body.operand(how.value, how.value.dtype, typed=True)
    if how.value.dtype is b1:
        value = f"{value}.to(tl.int32)"
    if not body.value_dims(how.value):
        value = f"tl.broadcast_to({value}, [BLOCK])"
    order = f"order = places_in_order({value}, in_x, {how.descending})"
    body.lines.append(Line(order, how.where))
    first, body.lines = body.lines, []
    body.leave(dim)
    body.enter(dim)
    (store,) = ordered.body
    place, count = next(((a.name, a.extent) for a in ordered.axes), ("place", 1))
    body.axis_text[place] = (along.name, frozenset(["x"]))
    body.define(how.out, frozenset(["x"]), "order.to(tl.int64)")
    body.emit([replace(store, mask=(Bound(Index(((place, 1),)), count),))])
    last, body.lines = body.lines, []
    wanted = {a.name for a in kernel.axes if a.name in body.used}
    lines = [
        *([Line(f"row = {program_number(kernel, part)}")] if wanted else []),
        *unravel([a for a in kernel.axes if a.extent != 1], "row", wanted),
        *body.scalar_lines(),
        Line(f"{along.name} = {lanes(dim, kernel.index64)}"),
        Line(f"in_x = {along.name} < {along.extent}"),
        *first,
        *last,
    ]
    return Function(tuple(lines), ("BLOCK",), calls=("order.places_in_order",))


def _renamed(text: str) -> str:
    return re.sub(r"\bv(?=\d)", "w", text)
