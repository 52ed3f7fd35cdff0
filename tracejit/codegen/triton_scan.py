"""Kernels of running results (sums, products, extrema, log-sums, recurrences), as Triton functions.

A program takes BLOCK_O rows, and walks their elements BLOCK_I at a time: `kernels/scan.py` combines
those of a tile as a tree, and the last of them is carried to the next tile. No atomics.
"""

from __future__ import annotations

from tracejit.codegen.language import Line
from tracejit.codegen.triton_body import Body
from tracejit.codegen.triton_forms import Function, MakeBody, lanes, program_number
from tracejit.codegen.triton_text import TRITON, Dim, compute_type
from tracejit.ir.types import DType
from tracejit.records import dataclass
from tracejit.schedule.cpu.access import variables
from tracejit.schedule.kernel import (
    Compute,
    Kernel,
    Operand,
    Stage,
    Statement,
    Store,
    Var,
)


@dataclass(frozen=True)
class Running:
    """A stage with a running result taken apart. `function` of kernels/scan.py combines `values`,
    which the statements `before` compute, to `total` of `dtype`; `rounds` makes of it what is
    stored, if that is something else."""

    before: tuple[Statement, ...]
    function: str
    values: tuple[Operand, ...]
    total: Var
    rounds: tuple[Statement, ...]
    store: Store

    @property
    def dtype(self) -> DType:
        return self.total.dtype


def running_of(stage: Stage) -> Running:
    """Read what `schedule/running.py` has written."""
    *body, store = stage.body
    made = {s.out: s for s in body}
    last = made[store.value]
    rounded = isinstance(last, Compute) and last.op.name == "cast"
    total = last.args[0] if rounded else store.value
    function, values = _combined(made, made[total])
    wanted, before = {v for v in values if isinstance(v, Var)}, []
    for s in reversed(body):
        if s.out in wanted:
            wanted.update(variables(s))
            before.insert(0, s)
    return Running(tuple(before), function, values, total, (last,) * rounded, store)


def _combined(made: dict[Var, Statement], top: Compute) -> tuple[str, tuple[Operand, ...]]:
    """The function, and its values, of the statement that makes a total."""
    if top.op.name == "add":
        return "running_sum", top.args[1:]
    _, combined, value = top.args  # where there is something before, and the value elsewhere
    how = made[combined]
    if how.op.name == "mul":
        return "running_product", (value,)
    if how.op.name == "add":
        return "recurrence", (made[how.args[0]].args[0], value)
    condition = made[how.args[0]]
    if condition.op.name == "or":
        condition = made[condition.args[0]]
    named = {"ge": "running_max", "le": "running_min", "and": "running_log_sum"}
    return named[condition.op.name], (value,)


def scan(kernel: Kernel, variant: str = "", part: str = "", make: MakeBody = Body) -> Function:
    """The function of a kernel with a running result along an axis."""
    body, (stage,) = make(kernel), kernel.stages
    one, kind = running_of(stage), compute_type(running_of(stage).dtype)
    outer = Dim("o", kernel.axes, "BLOCK_O", "[:, None]")
    inner = Dim("i", stage.axes, "BLOCK_I", "[None, :]")
    body.enter(outer, inner)
    body.emit(one.before)
    everywhere = frozenset(body.dims)
    values = []
    for value in one.values:
        text = body.operand(value, one.dtype, typed=True)
        values.append(f"tl.broadcast_to({text}, {body.shape(everywhere)}).to({kind})")
    names = [f"x{k}" for k in range(len(values))]
    body.lines += [Line(f"{x} = {text}") for x, text in zip(names, values, strict=True)]
    inside = body.mask(everywhere)
    args = ", ".join([*names, "total", "start > 0", inside])
    body.lines.append(Line(f"{one.total!r} = {one.function}({args})", one.store.where))
    body.define(one.total, everywhere)
    body.lines.append(Line(f"total = last_column({one.total!r})"))
    body.emit((*one.rounds, one.store))
    loop = [*body.prelude(inner, f"start + {lanes(inner, kernel.index64)}"), *body.lines]
    index = f"{program_number(kernel, part)} * BLOCK_O + {lanes(outer)}"
    lines = [
        *body.prelude(outer, index),
        *body.scalar_lines(),
        Line(f"total = tl.zeros([BLOCK_O, 1], {kind})"),
        Line(f"for start in range(0, {inner.extent}, BLOCK_I):"),
        *TRITON.indent(loop),
    ]
    return Function(
        tuple(lines), ("BLOCK_O", "BLOCK_I"), calls=("scan.last_column", f"scan.{one.function}")
    )
