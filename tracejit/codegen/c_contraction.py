"""A contraction as its tasks are printed: names and texts beside the geometry of its tiling.

In: a Kernel whose first stage has a Dot, and its Tiling. Out: what c_matmul, c_micro and c_pack
share.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from tracejit.codegen.c_body import Body
from tracejit.codegen.c_loops import unravelled
from tracejit.codegen.c_text import value_type
from tracejit.codegen.language import Line
from tracejit.records import dataclass
from tracejit.schedule.cpu import digits, tiles
from tracejit.schedule.cpu.access import contiguity, extents_of
from tracejit.schedule.cpu.digits import Digits, over_digits, taken_apart
from tracejit.schedule.cpu.loops import Loop
from tracejit.schedule.cpu.plan import Tiling
from tracejit.schedule.cpu.tiles import plain
from tracejit.schedule.kernel import Axis, Kernel, Statement


@dataclass(frozen=True)
class Apart:
    """Statements over the digits of axes, and how they are printed."""

    axes: tuple[Digits, ...]
    statements: tuple[Statement, ...]
    body: Body


class Contraction(tiles.Contraction):
    """A contraction that is printed: `name` starts the names of its functions, `a_load` and
    `b_load` are what micro-kernels read where it lies."""

    def __init__(self, kernel: Kernel, name: str, tiling: Tiling):
        super().__init__(kernel, tiling)
        self.name = name
        self.body = Body(kernel, extents_of(kernel))
        self.type = value_type(self.acc)
        dot = self.dot
        direct = tiling.a == "direct" and self.windows is None
        self.a_load = plain(dot.a, dot.a_value, self.acc) if direct else None
        self.b_load = None
        if tiling.packed_from and not self.panels:
            self.b_load = plain(dot.b, dot.b_value, self.acc, self.n.name)

    @property
    def panels(self) -> bool:
        """Whether each tile, or slice of k, packs its own part of B pass by pass."""
        return self.tiling.way == "panels" or self.slices_of_panels

    @cached_property
    def turned(self) -> bool:
        """Whether the body goes along the rows of a tile rather than its columns."""
        if self.windows is None and self.tiling.way != "slices":
            return False
        of_m, of_n = found = taken_apart((self.m, self.n), self.stage.body)
        body = over_digits(self.stage.body, found, self.body.extents)

        def along(axis: Digits) -> int:
            fastest = axis.digits[0]
            return contiguity(Axis(fastest.name, fastest.extent), body)

        return along(of_m) > along(of_n)

    @property
    def turned_step(self) -> int:
        """From one column of a turned tile to the next."""
        return -(-self.tiling.tile_rows // self.lanes) * self.lanes

    def apart(self, axes: Sequence[Axis], statements: Sequence[Statement]) -> Apart | None:
        """Statements over the digits of axes; None where no axis falls into several."""
        found = self.over_digits(axes, statements)
        return None if all(len(d.digits) == 1 for d in found.axes) else found

    def over_digits(self, axes: Sequence[Axis], statements: Sequence[Statement]) -> Apart:
        """Statements over the digits of axes, of which each has at least one."""
        found, extents = taken_apart(axes, statements), self.body.extents
        body = Body(self.kernel, {**extents, **digits.extents_of(found)})
        return Apart(found, over_digits(statements, found, extents), body)

    def batch_of(self, unit: str, each: int) -> list[Line]:
        """`slot`, the batch of a unit's number in this round, and its axes."""
        if not self.batch:
            return []
        lines = [Line(f"const int64_t slot = {unit} / {each};")]
        index = "slot"
        if self.round < self.batches:
            index = f"(at->round * {self.round} + slot)"
            lines.append(Line(f"if ({index} >= {self.batches}) break;"))
        return lines + unravelled([Loop(axis) for axis in self.batch], index)

    @property
    def slot(self) -> str:
        """Where the packed operands of a unit's batch start, as a term of an address."""
        return f" + slot * {self.per_batch}" if self.batch else ""
