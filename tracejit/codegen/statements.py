"""The statement printer: Loads, computations, stores of a Kernel's body → lines of a language.

In: statements in order. Out: their lines, each with the user's line beside it. What all languages
have in common is printed here, in the words of a `Language`: indices, conditions, operands,
templates, and where a result is rounded. A printer of a language is a subclass that says how its
axes, runtime scalars, quotients, positions, loads and stores look, and what naming a value means.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tracejit.codegen.language import Language, Line, grouped, strip
from tracejit.ir.ops import OPS
from tracejit.ir.types import DType, b1, f64
from tracejit.schedule.kernel import (
    Bound,
    Compute,
    FloorDiv,
    InBounds,
    Index,
    Kernel,
    Load,
    Mask,
    Mod,
    Operand,
    Position,
    Scalar,
    Statement,
    Store,
    Var,
)


class Printer:
    """Prints the statements of a kernel, reductions left to the caller, who knows the loop."""

    language: Language

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.buffers = {b.name: b.dtype for b in kernel.buffers}

    # --- what a language says itself ----------------------------------------------------------

    def axis(self, name: str) -> str:
        """An axis's index; "0" drops the term."""
        raise NotImplementedError

    def variable(self, var: Var) -> str:
        """The name of a value."""
        raise NotImplementedError

    def scalar(self, scalar: Scalar, dtype: DType) -> str:
        """A runtime scalar in the type that values of a dtype are computed in."""
        raise NotImplementedError

    def quotient(self, atom: FloorDiv | Mod, inner: str) -> str:
        """A quotient or remainder of the index whose text is `inner`, as one operand."""
        raise NotImplementedError

    def open_ends(self, bound: Bound) -> tuple[bool, bool]:
        """Whether an index may be negative, and whether it may reach the bound's end."""
        raise NotImplementedError

    def position(self, s: Position) -> str:
        """An index as a value of the statement's dtype, not yet rounded."""
        raise NotImplementedError

    def load(self, s: Load) -> list[Line]:
        """The lines of a load."""
        raise NotImplementedError

    def store(self, s: Store) -> list[Line]:
        """The lines of a store."""
        raise NotImplementedError

    def assign(self, s: Load | Compute | Position | InBounds, text: str) -> list[Line]:
        """The lines that make `text` the statement's value."""
        raise NotImplementedError

    def resolve(self, arg: Operand) -> Operand:
        """The literal that a value is known to be, else the operand itself."""
        return arg

    def needs_type(self, template: str, dtype: DType, values: Sequence[Operand]) -> bool:
        """Whether a bare literal in a template would be taken for another type."""
        return False

    # --- what they have in common -------------------------------------------------------------

    def index(self, index: Index) -> str:
        """An index expression."""
        parts = []
        for atom, coefficient in index.terms:
            if isinstance(atom, str):
                text = self.axis(atom)
            elif isinstance(atom, Var):
                text = self.operand(atom, atom.dtype)
            else:
                text = self.index(atom.index)
                if text != "0":
                    text = self.quotient(atom, text)
            if text != "0":
                if coefficient != 1:
                    text = f"{grouped(text) if isinstance(atom, str) else text} * {coefficient}"
                parts.append(text)
        if index.offset != 0 or not parts:
            parts.append(str(index.offset))
        return " + ".join(parts).replace("+ -", "- ")

    def conditions(self, mask: Mask) -> tuple[str, ...]:
        """The conditions of a mask, but for those that the ranges imply."""
        found = []
        for bound in mask:
            text = self.index(bound.index)
            negative, beyond = self.open_ends(bound)
            if negative:
                found.append(f"({text} >= 0)")
            if beyond:
                found.append(f"({text} < {bound.high})")
            if bound.step != 1:  # where it is not negative
                found.append(f"({grouped(text)} % {bound.step} == 0)")
        return tuple(found)

    def condition(self, mask: Mask) -> str:
        """Whether a mask holds."""
        return " & ".join(self.conditions(mask)) or self.language.true

    def operand(self, arg: Operand, dtype: DType, typed: bool = False) -> str:
        """An operand as text, of the type that values of a dtype are computed in."""
        arg = self.resolve(arg)
        if isinstance(arg, Var):
            return self.variable(arg)
        if isinstance(arg, Scalar):
            return self.scalar(arg, dtype)
        return self.language.literal(arg, dtype, typed)

    def expression(self, s: Compute) -> str:
        """The value of a computation, rounded to its dtype unless its operands' values fit it."""
        op, out, values = s.op, s.out.dtype, values_of(s)
        dtype = operand_dtype(s)
        template = self.language.template(op, dtype, out)
        typed = self.needs_type(template, dtype, values)
        operands = [self.operand(a, b1, typed) for a in s.args[: len(s.args) - len(values)]]
        operands += [self.operand(a, dtype, typed) for a in values]
        kind = self.language.type_of(out)
        if op.name == "cast" and kind == self.language.type_of(dtype):
            text = operands[0]
        else:
            text = template.format(*operands, T=kind, f="" if dtype is f64 else "f")
        fits = op.name == "cast" and dtype is out
        if fits or (not op.rounds and all(isinstance(a, Var) for a in values)):
            return text
        return self.language.rounded(text, out)

    def folded(self, fold: str, there: str, value: str, dtype: DType) -> str:
        """What is in memory and a value as one, by the fold of a store."""
        op = OPS[{"add": "add", "mul": "mul", "max": "maximum", "min": "minimum"}[fold]]
        text = self.language.template(op, dtype, dtype).format(
            there, value, T=self.language.type_of(dtype), f="" if dtype is f64 else "f"
        )
        return self.language.rounded(text, dtype) if op.rounds else text

    def compute(self, s: Compute) -> list[Line]:
        """The lines of a computation."""
        return self.assign(s, strip(self.expression(s)))

    def lines_of(self, s: Statement) -> list[Line]:
        """The lines of a statement that is no reduction."""
        if isinstance(s, Compute):
            return self.compute(s)
        if isinstance(s, Load):
            return self.load(s)
        if isinstance(s, Store):
            return self.store(s)
        if isinstance(s, Position):
            return self.assign(s, strip(self.language.rounded(self.position(s), s.out.dtype)))
        assert isinstance(s, InBounds)
        return self.assign(s, strip(self.condition(s.mask)))


def values_of(s: Compute) -> tuple[Operand, ...]:
    """The operands of one dtype: all but the condition of a `where`."""
    return s.args[1:] if s.op.name == "where" else s.args


def operand_dtype(s: Compute) -> DType:
    """The dtype of a computation's values; literals and runtime scalars take it."""
    return next((a.dtype for a in values_of(s) if isinstance(a, Var)), s.out.dtype)


def all_statements(kernel: Kernel) -> Iterator[Statement]:
    """Every statement of a kernel, prologues included."""
    for stage in kernel.stages:
        if stage.dot is not None:
            yield from stage.dot.a
            yield from stage.dot.b
        if stage.attend is not None:
            yield from (s for side in stage.attend.sides for s in side.body)
        yield from stage.body
