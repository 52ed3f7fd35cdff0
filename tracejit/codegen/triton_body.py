"""Statements of a Kernel's body as lines of Triton.

`Body` prints loads, computations and stores over the dims of a tile and remembers what it used, so
that `Body.prelude` defines exactly the indices and masks that are needed. Values keep the names
that the Kernel gives them (v7); a value printed before is reused, not printed again.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from tracejit.codegen.language import Line, strip
from tracejit.codegen.triton_text import (
    TRITON,
    Dim,
    compute_type,
    fold_of,
    literal,
    rounded,
    unravel,
)
from tracejit.errors import InvalidGraph
from tracejit.ir.types import DType, b1, f64, round_to
from tracejit.schedule.kernel import (
    Atom,
    Axis,
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
    Reduce,
    Scalar,
    Statement,
    Store,
    Var,
)
from tracejit.schedule.sizes import is_negative

Dims = frozenset[str]  # names of the dims that a value varies over
NO_DIMS: Dims = frozenset()

_TAKES_BARE = r"tj\.(maximum|minimum|div|pow)\("  # take a bare fp32 literal as second operand


class Body:
    """Prints the statements of one generated function; `lines` is what it has printed."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.buffers = {b.name: b for b in kernel.buffers}
        self.dims: dict[str, Dim] = {}
        self.axis_text: dict[str, tuple[str, Dims]] = {}
        self.lines: list[Line] = []
        self.used: set[str] = set()  # axes, masks and flat indices
        self.used_scalars: dict[str, Line] = {}
        self._values: dict[int, tuple[str, Dims]] = {}
        self._literals: dict[int, object] = {}
        self._known: dict[tuple, tuple[str, Dims]] = {}  # what was printed, by content
        self._scalar_types = scalar_types(kernel)

    # --- what the tile looks like -------------------------------------------------------------

    def enter(self, *dims: Dim) -> None:
        """Work over these dims from now on."""
        for dim in dims:
            self.dims[dim.name] = dim
            for axis in dim.axes:
                index = ("0", NO_DIMS) if axis.extent == 1 else (axis.name, frozenset([dim.name]))
                self.axis_text[axis.name] = index

    def same_axes(self, axes: Sequence[Axis], dim: Dim) -> None:
        """Let the axes of a later stage be the indices that `dim` already has."""
        for axis, first in zip(axes, dim.axes, strict=True):
            self.axis_text[axis.name] = self.axis_text[first.name]

    def leave(self, dim: Dim, mark: tuple | None = None) -> None:
        """Work without a dim again; with `mark`, forget what was printed since, in its loop."""
        del self.dims[dim.name]
        if mark is not None:
            self._values, self._literals, self._known = (dict(part) for part in mark)

    def mark(self) -> tuple:
        """What is known now, for `leave`."""
        return dict(self._values), dict(self._literals), dict(self._known)

    def mask(self, dims: Dims) -> str:
        """The condition that an element of a tile over `dims` exists."""
        names = [d.mask for name, d in self.dims.items() if name in dims and not d.full]
        self.used.update(names)
        return " & ".join(names)

    def shape(self, dims: Dims) -> str:
        """The shape of a tile over all dims of the moment, 1 where it does not vary."""
        blocks = [d.block if d.name in dims else "1" for d in self.dims.values()]
        if [d.place for d in self.dims.values()] == ["[:, None]"]:
            blocks.append("1")  # between the loops of a rows kernel: a column
        return f"[{', '.join(blocks)}]"

    def prelude(self, dim: Dim, index: str) -> list[Line]:
        """Definitions of a dim's indices and mask, those that were used."""
        axes = dim.real_axes
        wanted = {a.name for a in axes} & self.used
        if not wanted and dim.mask not in self.used:
            return []
        lines = [Line(f"{dim.variable} = {index}"), *unravel(axes, dim.variable, wanted)]
        if dim.mask in self.used:
            lines.append(Line(f"{dim.mask} = {dim.variable} < {dim.extent}"))
        return lines

    # --- operands -----------------------------------------------------------------------------

    def define(self, out: Var, dims: Dims, text: str = "") -> str:
        """Bind a value to a name (its own by default)."""
        self._literals.pop(out.id, None)
        self._values[out.id] = (text or repr(out), dims)
        return text or repr(out)

    def operand(self, arg: Operand, dtype: DType, typed: bool = False) -> tuple[str, Dims]:
        """An operand as text, with the dims it varies over."""
        arg = self.resolve(arg)
        if isinstance(arg, Var):
            if arg.id not in self._values:
                raise InvalidGraph(reason=f"{arg!r} is read where it is not defined")
            return self._values[arg.id]
        if isinstance(arg, Scalar):
            return self._scalar(arg, dtype), NO_DIMS
        return literal(arg, dtype, typed), NO_DIMS

    def resolve(self, arg: Operand) -> Operand:
        """The literal that a value is known to be, else the operand itself."""
        return self._literals.get(arg.id, arg) if isinstance(arg, Var) else arg

    def is_literal(self, arg: Operand) -> bool:
        """Whether an operand is a number known when the kernel is printed."""
        return not isinstance(self.resolve(arg), Var | Scalar)

    def _scalar(self, scalar: Scalar, dtype: DType) -> str:
        """The name of a runtime scalar converted to the type it is used in."""
        kind = compute_type(dtype)
        several = len(self._scalar_types[scalar.name]) > 1
        name = f"{scalar.name}_{kind.removeprefix('tl.')}" if several else scalar.name
        slot = self.kernel.scalars.index(scalar.name)
        place = f"scalars + {slot}" if slot else "scalars"
        convert = "" if dtype is f64 else f".to({kind})"
        self.used_scalars[name] = Line(f"{name} = tl.load({place}){convert}")
        return name

    def scalar_lines(self) -> list[Line]:
        """Definitions of the runtime scalars that were used."""
        return [self.used_scalars[name] for name in sorted(self.used_scalars)]

    def index(self, index: Index) -> tuple[str, Dims]:
        """An index expression and the dims it varies over."""
        parts: list[str] = []
        dims = NO_DIMS
        for atom, coefficient in index.terms:
            text, atom_dims = self._atom(atom)
            if text == "0":
                continue
            dims |= atom_dims
            parts.append(text if coefficient == 1 else f"{text} * {coefficient}")
        if index.offset != 0:
            parts.append(str(index.offset))
        return " + ".join(parts) or "0", dims

    def _atom(self, atom: Atom) -> tuple[str, Dims]:
        if isinstance(atom, Var):
            return self.operand(atom, atom.dtype)
        if isinstance(atom, str):
            if atom not in self.axis_text:
                raise InvalidGraph(reason=f"axis {atom} is used outside its stage")
            text, dims = self.axis_text[atom]
            self.used.add(text)
            return text, dims
        text, dims = self.index(atom.index)
        if text == "0":
            return "0", NO_DIMS
        text = f"({text})" if " " in text else text
        return f"({text} {'//' if isinstance(atom, FloorDiv) else '%'} {atom.by})", dims

    def bounds(self, mask: Mask) -> tuple[tuple[str, ...], Dims]:
        """The conditions of a mask, and the dims they vary over."""
        conditions, dims = [], NO_DIMS
        for bound in mask:
            text, bound_dims = self.index(bound.index)
            dims |= bound_dims
            inner = f"({text})" if " " in text else text
            if _may_be_negative(bound.index):
                conditions.append(f"({text} >= 0)")
            conditions.append(f"({text} < {bound.high})")
            if bound.step != 1:
                conditions.append(f"({inner} % {bound.step} == 0)")
        return tuple(conditions), dims

    # --- statements ---------------------------------------------------------------------------

    def emit(self, statements: Iterable[Statement]) -> list[Reduce]:
        """Print statements in order; reductions are left to the caller, who knows the loop."""
        reductions = []
        for statement in statements:
            if isinstance(statement, Reduce):
                reductions.append(statement)
            else:
                _EMIT[type(statement)](self, statement)
        return reductions

    def assign(self, out: Var, text: str, dims: Dims, where: str, key: tuple = ()) -> None:
        """Print `out = text`, unless the same thing has a name already."""
        key = key or (text,)
        if not self._reuse(out, key):
            self.lines.append(Line(f"{out!r} = {text}", where))
            self._known[key] = (self.define(out, dims), dims)

    def _reuse(self, out: Var, key: tuple) -> bool:
        """Whether the same thing was printed before, which is then `out` too."""
        if key not in self._known:
            return False
        name, dims = self._known[key]
        self.define(out, dims, name)
        return True

    def load_text(self, statement: Load, zero_outside: bool = False) -> tuple[str, Dims]:
        """A load in its memory type; zero where the mask, or the tile with `zero_outside`, ends."""
        index, dims = self.index(statement.index)
        conditions, mask_dims = self.bounds(statement.mask)
        pointer = statement.buffer if index == "0" else f"{statement.buffer} + {index}"
        if not mask_dims <= dims:
            dims |= mask_dims
            pointer = f"tl.broadcast_to({pointer}, {self.shape(dims)})"
        masks = [mask] if (mask := self.mask(dims)) else []
        if conditions:
            name = f"{statement.out!r}_in"
            self.lines.append(Line(f"{name} = {strip(' & '.join(conditions))}"))
            masks.append(name)
        options = f", mask={' & '.join(masks)}" if masks else ""
        other = ", other=0" if options and (statement.mask or zero_outside) else ""
        return f"tl.load({pointer}{options}{other})", dims

    def _load(self, statement: Load) -> None:
        key = ("load", statement.buffer, self.index(statement.index), self.bounds(statement.mask))
        if self._reuse(statement.out, key):
            return
        text, dims = self.load_text(statement)
        if statement.out.dtype.narrow:
            text += ".to(tl.float32)"
        self.assign(statement.out, text, dims, statement.where, key)

    def _compute(self, statement: Compute) -> None:
        op, out, args = statement.op, statement.out, statement.args
        if op.name in ("full", "alias") and self.is_literal(args[0]):
            value = np.asarray(self.resolve(args[0]))
            self._literals[out.id] = round_to(value, out.dtype).item()
            return
        values = args[1:] if op.name == "where" else args
        dtype = next((a.dtype for a in values if isinstance(a, Var)), out.dtype)
        template = TRITON.template(op, dtype.kind)
        typed = self._needs_typed(template, dtype, values)
        operands = [
            self.operand(a, b1 if op.name == "where" and i == 0 else dtype, typed)
            for i, a in enumerate(args)
        ]
        dims = NO_DIMS.union(*(d for _, d in operands))
        text = template.format(*(t for t, _ in operands), T=compute_type(out.dtype))
        if op.name == "cast" and compute_type(dtype) == compute_type(out.dtype):
            text = operands[0][0]
        exact = not op.rounds and all(isinstance(a, Var) for a in values)
        widened = op.name == "cast" and (dtype is out.dtype or not out.dtype.narrow)
        if not exact and not widened:
            text = rounded(strip(text), out.dtype)
        if text.isidentifier():
            self.define(out, dims, text)
        else:
            self.assign(out, strip(text), dims, statement.where)

    def _needs_typed(self, template: str, dtype: DType, values: Sequence[Operand]) -> bool:
        """Whether a bare literal would be taken for another type.

        Operators and tl.where give literals the type of the other operand, exactly. Functions get
        them as constants of a guessed type: fp32 or int32 where the number has a normal fp32 value.
        """
        if dtype is b1 or all(self.is_literal(v) for v in values):
            return True
        if not re.search(r"\bt[jl]\.(?!where)", template):
            return False
        takes_bare = dtype.kind == "f" and dtype is not f64 and re.match(_TAKES_BARE, template)
        return (
            not takes_bare or self.is_literal(values[0]) or not _is_normal(self.resolve(values[1]))
        )

    def _position(self, statement: Position) -> None:
        text, dims = self.index(statement.index)
        kind = compute_type(statement.out.dtype)
        if dims:
            text = f"({text}).to({kind})" if " " in text else f"{text}.to({kind})"
        else:
            text = f"tl.full((), {text}, {kind})"
        self.assign(statement.out, rounded(text, statement.out.dtype), dims, statement.where)

    def _in_bounds(self, statement: InBounds) -> None:
        conditions, dims = self.bounds(statement.mask)
        text = " & ".join(conditions) or "tl.full((), True, tl.int1)"
        self.assign(statement.out, strip(text), dims, statement.where)

    def _store(self, statement: Store) -> None:
        buffer = self.buffers[statement.buffer]
        text, dims = self.index(statement.index)
        everything = frozenset(self.dims)
        pointer = buffer.name if text == "0" else f"{buffer.name} + {text}"
        if dims != everything:
            pointer = f"tl.broadcast_to({pointer}, {self.shape(everything)})"
        value, _ = self.operand(statement.value, buffer.dtype, typed=buffer.dtype is f64)
        mask = self.mask(everything)
        options = f", mask={mask}" if mask else ""
        self.lines.append(Line(f"tl.store({pointer}, {value}{options})", statement.where))
        self._known = {
            key: known for key, known in self._known.items() if key[:2] != ("load", buffer.name)
        }

    # --- reductions ---------------------------------------------------------------------------

    def reduced_value(self, reduce: Reduce, over: Dims) -> str:
        """The value to reduce, with neutral elements where the tile ends in the dims `over`."""
        fold = fold_of(reduce)
        value, _ = self.operand(reduce.value, reduce.out.dtype, typed=True)
        if fold.type != compute_type(reduce.out.dtype):
            value = f"{value}.to({fold.type})"
        mask = self.mask(over)
        return f"tl.where({mask}, {value}, {fold.neutral})" if mask else value


_EMIT = {
    Load: Body._load,
    Compute: Body._compute,
    Position: Body._position,
    InBounds: Body._in_bounds,
    Store: Body._store,
}


def _may_be_negative(index: Index) -> bool:
    """Whether an index is more than a sum of what is not negative: axes times positive sizes."""
    below = [atom.index for atom, _ in index.terms if isinstance(atom, FloorDiv | Mod)]
    return (
        index.offset != 0
        or any(isinstance(atom, Var) or is_negative(c) for atom, c in index.terms)
        or any(map(_may_be_negative, below))
    )


def _is_normal(value: Operand) -> bool:
    """Whether Triton takes a literal for fp32 (all but those that fp32 would round to 0 or inf)."""
    if isinstance(value, Var | Scalar):
        return True
    number = abs(float(value))
    return not math.isfinite(number) or number == 0.0 or 2.0**-126 <= number < 2.0**128


def all_statements(kernel: Kernel) -> Iterable[Statement]:
    """Every statement of a kernel, prologues included."""
    for stage in kernel.stages:
        if stage.dot is not None:
            yield from stage.dot.a
            yield from stage.dot.b
        yield from stage.body


def scalar_types(kernel: Kernel) -> dict[str, Counter]:
    """The Triton types that each runtime scalar is used in."""
    found: dict[str, Counter] = {name: Counter() for name in kernel.scalars}
    stored = {b.name: b.dtype for b in kernel.buffers}
    for statement in all_statements(kernel):
        if isinstance(statement, Compute):
            values = statement.args[1:] if statement.op.name == "where" else statement.args
            vars_ = [a.dtype for a in values if isinstance(a, Var)]
            dtype = vars_[0] if vars_ else statement.out.dtype
        elif isinstance(statement, Store):
            values, dtype = (statement.value,), stored[statement.buffer]
        elif isinstance(statement, Reduce):
            values, dtype = (statement.value,), statement.out.dtype
        else:
            continue
        for value in values:
            if isinstance(value, Scalar):
                found[value.name][compute_type(dtype)] += 1
    return found
