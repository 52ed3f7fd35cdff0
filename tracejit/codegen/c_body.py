"""Statements of a Kernel's body as lines of C, over loop variables named as the Kernel's axes.

Sizes are plain numbers here: a C unit belongs to one plan. Values keep the Kernel's names (v7),
reduced values too. bf16 and f16 are floats, rounded after every operation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from tracejit.codegen.c_text import (
    Line,
    literal,
    loaded,
    memory_type,
    rounded,
    stored,
    strip,
    value_type,
)
from tracejit.ir.ops.elementwise import UNROUNDED
from tracejit.ir.types import DType, b1, f64
from tracejit.schedule import index as indices
from tracejit.schedule.cpu.access import has_value
from tracejit.schedule.kernel import (
    Compute,
    FloorDiv,
    InBounds,
    Index,
    Kernel,
    Load,
    Mask,
    Operand,
    Position,
    Reduce,
    Scalar,
    Statement,
    Store,
    Var,
)


class Body:
    """Prints statements. `axis_text` says what an axis is called where the name is not its own;
    `local` names the buffers that are arrays of the function itself."""

    def __init__(
        self, kernel: Kernel, extents: Mapping[str, int], local: frozenset[str] = frozenset()
    ):
        self.kernel = kernel
        self.extents = extents
        self.local = local
        self.buffers = {b.name: b.dtype for b in kernel.buffers}
        self.axis_text: dict[str, str] = {}

    # --- indices

    def index(self, index: Index, replaced: Mapping[str, str] | None = None) -> str:
        """An index; `replaced` has texts for some axes ("" drops the term)."""
        texts = self.axis_text | dict(replaced or {})
        parts = []
        for atom, c in index.terms:
            if isinstance(atom, Var):
                text = repr(atom)
            elif isinstance(atom, str):
                text = texts.get(atom, atom)
            else:
                text = self._quotient(atom, texts)
            if text:
                parts.append(text if c == 1 else f"{_grouped(text)} * {c}")
        if index.offset or not parts:
            parts.append(str(index.offset))
        return " + ".join(parts).replace("+ -", "- ")

    def _quotient(self, atom, texts: Mapping[str, str]) -> str:
        inner = self.index(atom.index, texts)
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

    def condition(self, mask: Mask) -> str:
        """Whether a mask holds; conditions that the ranges imply are left out."""
        parts = []
        for bound in mask:
            text = self.index(bound.index)
            low, high = self.bounds(bound.index)
            if low < 0:
                parts.append(f"({text} >= 0)")
            if high >= bound.high:
                parts.append(f"({text} < {bound.high})")
            if bound.step != 1:
                parts.append(f"(({text}) % {bound.step} == 0)")  # where it is not negative
        return " & ".join(parts) or "true"

    # --- operands

    def operand(self, arg: Operand, dtype: DType) -> str:
        """An operand as text of a dtype's value type."""
        if isinstance(arg, Var):
            return repr(arg)
        if isinstance(arg, Scalar):
            return repr(arg) if dtype is f64 else f"({value_type(dtype)}){arg!r}"
        text = literal(arg, dtype)
        return f"({text})" if text.startswith("-") else text

    # --- statements

    def lines(self, statements: Iterable[Statement]) -> list[Line]:
        """Statements in order, reductions left to the caller."""
        out = []
        for statement in statements:
            if not isinstance(statement, Reduce):
                out.append(self._statement(statement))
        return out

    def _statement(self, s: Statement) -> Line:
        if isinstance(s, Store):
            return Line(f"{self._element(s)} = {self.stored(s)};", s.where)
        if isinstance(s, Load):
            dtype = self.buffers[s.buffer]
            text = loaded(f"{s.buffer}[{self.index(s.index)}]", dtype)
            if s.mask:
                text = f"{self.condition(s.mask)} ? {text} : {literal(0, s.out.dtype)}"
        elif isinstance(s, Compute):
            text = self._compute(s)
        elif isinstance(s, Position):
            text = rounded(f"({value_type(s.out.dtype)})({self.index(s.index)})", s.out.dtype)
        else:
            assert isinstance(s, InBounds)
            text = self.condition(s.mask)
        return Line(f"const {value_type(s.out.dtype)} {s.out!r} = {strip(text)};", s.where)

    def _element(self, s: Store) -> str:
        return f"{s.buffer}[{self.index(s.index)}]"

    def stored(self, s: Store) -> str:
        """The value of a store as an element of memory."""
        dtype = self.buffers[s.buffer]
        return stored(self.operand(s.value, dtype), dtype)

    def _compute(self, s: Compute) -> str:
        args, out = s.args, s.out.dtype
        if s.op.name == "full":
            return rounded(self.operand(args[0], out), out)
        values = args[1:] if s.op.name == "where" else args
        dtype = next((a.dtype for a in values if isinstance(a, Var)), out)
        template = s.op.template("c", dtype.kind)
        template = template.replace("{f}", "" if dtype is f64 else "f")
        template = template.replace("{T}", value_type(out))
        operands = [
            self.operand(a, b1 if s.op.name == "where" and i == 0 else dtype)
            for i, a in enumerate(args)
        ]
        text = template.format(*operands)
        if s.op.name in UNROUNDED and all(isinstance(a, Var) for a in values):
            return text
        if s.op.name == "cast" and dtype is out:
            return text
        return rounded(text, out)


def _grouped(text: str) -> str:
    return f"({text})" if " " in text and not text.startswith("(") else text


def is_independent(body: Sequence[Statement], vector_axis: str) -> bool:
    """Whether the iterations of a loop over an axis surely touch no common memory but to read:
    what is stored is stored at a different element each time, and loaded at that element only."""
    stores = {s.buffer: s for s in body if isinstance(s, Store)}
    for s in body:
        if isinstance(s, Store):
            if dict(s.index.terms).get(vector_axis, 0) == 0 or s.index != stores[s.buffer].index:
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
