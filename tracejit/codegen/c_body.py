"""Statements of a Kernel's body as lines of C, over loop variables named as the Kernel's axes.

Sizes are plain numbers here: a C unit belongs to one plan. Values keep the Kernel's names (v7),
reduced values too. bf16 and f16 are floats, rounded after every operation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import copy

from tracejit.codegen.c_text import C, literal, loaded, memory_type, stored, value_type
from tracejit.codegen.language import Line
from tracejit.codegen.statements import Printer
from tracejit.ir.types import DType, f64
from tracejit.schedule import index as indices
from tracejit.schedule.cpu.access import has_value
from tracejit.schedule.kernel import (
    Bound,
    Compute,
    FloorDiv,
    InBounds,
    Index,
    Kernel,
    Load,
    Mod,
    Position,
    Reduce,
    Scalar,
    Sort,
    Statement,
    Store,
    Var,
)


class Body(Printer):
    """Prints statements. `axis_text` says what an axis is called where the name is not its own;
    `local` names the buffers that are arrays of the function itself."""

    language = C

    def __init__(
        self, kernel: Kernel, extents: Mapping[str, int], local: frozenset[str] = frozenset()
    ):
        super().__init__(kernel)
        self.extents = extents
        self.local = local
        self.axis_text: dict[str, str] = {}

    def index(self, index: Index, replaced: Mapping[str, str] | None = None) -> str:
        """An index; `replaced` has texts for some axes ("0" drops the term)."""
        if not replaced:
            return super().index(index)
        other = copy(self)
        other.axis_text = self.axis_text | replaced
        return other.index(index)

    def axis(self, name: str) -> str:
        return self.axis_text.get(name, name)

    def variable(self, var: Var) -> str:
        return repr(var)

    def scalar(self, scalar: Scalar, dtype: DType) -> str:
        return repr(scalar) if dtype is f64 else f"({value_type(dtype)}){scalar!r}"

    def quotient(self, atom: FloorDiv | Mod, inner: str) -> str:
        low, high = self.bounds(atom.index)
        quotient = isinstance(atom, FloorDiv)
        if low < 0:
            return f"tj_{'floordiv' if quotient else 'mod'}_int({inner}, {atom.by})"
        sign = "/" if quotient else "%"
        if high < 1 << 31:  # 32 bits: a division that vectorises
            return f"(int64_t)((uint32_t)({inner}) {sign} {atom.by})"
        return f"(({inner}) {sign} {atom.by})"

    def bounds(self, index: Index) -> tuple[float, float]:
        """The least and the greatest value of an index; infinite where a value takes part."""
        if has_value(index):
            return -math.inf, math.inf
        return indices.bounds(index, self.extents)

    def open_ends(self, bound: Bound) -> tuple[bool, bool]:
        low, high = self.bounds(bound.index)
        return low < 0, high >= bound.high

    def position(self, s: Position) -> str:
        return f"({value_type(s.out.dtype)})({self.index(s.index)})"

    def load(self, s: Load) -> list[Line]:
        text = loaded(f"{s.buffer}[{self.index(s.index)}]", self.buffers[s.buffer])
        if s.mask:
            text = f"{self.condition(s.mask)} ? {text} : {literal(0, s.out.dtype)}"
        return self.assign(s, text)

    def store(self, s: Store) -> list[Line]:
        place = f"{s.buffer}[{self.index(s.index)}]"
        text = f"{place} = {self.stored(s, place)};"
        return [Line(f"if ({self.condition(s.mask)}) {text}" if s.mask else text, s.where)]

    def stored(self, s: Store, place: str = "") -> str:
        """The value of a store as an element of memory: what `place` has then, if it folds."""
        dtype = self.buffers[s.buffer]
        text = self.operand(s.value, dtype)
        if s.fold:
            text = self.folded(s.fold, loaded(place, dtype), text, dtype)
        return stored(text, dtype)

    def assign(self, s: Load | Compute | Position | InBounds, text: str) -> list[Line]:
        return [Line(f"const {value_type(s.out.dtype)} {s.out!r} = {text};", s.where)]

    def lines(self, statements: Iterable[Statement]) -> list[Line]:
        """Statements in order, reductions and sorting left to the caller."""
        return [x for s in statements if not isinstance(s, Reduce | Sort) for x in self.lines_of(s)]


def is_independent(body: Sequence[Statement], vector_axis: str) -> bool:
    """Whether no two iterations of a loop over an axis can conflict in memory: each stores at
    other elements, which may lie between two of the next one's, and loads from a stored buffer
    only at its own element."""
    stores = {s.buffer: s for s in body if isinstance(s, Store)}
    for s in body:
        if isinstance(s, Store):
            step, other = dict(s.index.terms).get(vector_axis, 0), stores[s.buffer].index
            apart = abs(s.index.offset - other.offset)
            if s.index.terms != other.terms or apart >= abs(step):
                return False
            if not all(isinstance(atom, str) for atom, _ in s.index.terms):
                return False
        if isinstance(s, Load) and s.buffer in stores and s.index != stores[s.buffer].index:
            return False
    return True


def pointers(kernel: Kernel) -> list[Line]:
    """The fields of a kernel's struct: its buffers and scalars."""
    lines = []
    for b in kernel.buffers:
        const = "" if "w" in b.access else "const "
        lines.append(Line(f"{const}{memory_type(b.dtype)} *{b.name};"))
    if kernel.scalars:
        lines.append(Line(f"double {', '.join(kernel.scalars)};"))
    return lines


def opened(kernel: Kernel, body: Sequence[Statement], struct: str) -> list[Line]:
    """Locals of a task for what its statements use. Different buffers of a kernel never overlap
    where one of them is written (the scheduler sees to that), hence `restrict`."""
    used = {s.buffer for s in body if isinstance(s, Load | Store)}
    scalars = set()
    for s in body:
        args = s.args if isinstance(s, Compute) else (getattr(s, "value", None),)
        scalars |= {a.name for a in args if isinstance(a, Scalar)}
    lines = [Line(f"struct {struct} *const at = arguments;")]
    for b in kernel.buffers:
        if b.name in used:
            const = "" if "w" in b.access else "const "
            lines.append(
                Line(f"{const}{memory_type(b.dtype)} *restrict const {b.name} = at->{b.name};")
            )
    lines += [Line(f"const double {s} = at->{s};") for s in kernel.scalars if s in scalars]
    return lines
