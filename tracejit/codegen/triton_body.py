"""Statements of a Kernel's body as lines of Triton.

`Body` prints loads, computations and stores over the dims of a tile. It remembers which indices and
masks it used: `Body.prelude` defines just these. Values keep the Kernel's names (v7); a value
printed before is reused, not printed again.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from tracejit.codegen.language import Line, grouped, strip
from tracejit.codegen.row_passes import row_of
from tracejit.codegen.statements import Printer, all_statements, operand_dtype, values_of
from tracejit.codegen.triton_text import (
    TRITON,
    Dim,
    compute_type,
    fold_of,
    unravel,
)
from tracejit.errors import InvalidGraph
from tracejit.ir.types import DType, b1, f64, round_to
from tracejit.schedule.kernel import (
    Axis,
    Bound,
    Compute,
    FloorDiv,
    InBounds,
    Index,
    Kernel,
    Load,
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


class Body(Printer):
    """Prints the statements of one generated function; `lines` is what it has printed."""

    language = TRITON

    def __init__(self, kernel: Kernel):
        super().__init__(kernel)
        self.dims: dict[str, Dim] = {}
        self.axis_text: dict[str, tuple[str, Dims]] = {}
        self.lines: list[Line] = []
        self.used: set[str] = set()  # axes, masks and flat indices
        self.used_scalars: dict[str, Line] = {}
        self.scalar_places: dict[str, object] = {}  # where they do not lie in the kernel's order
        self.rows: frozenset[str] = frozenset()  # axes along rows from a multiple of UNIT on
        self.is_end = False  # what is printed now is of the ends of such rows
        self._values: dict[int, tuple[str, Dims]] = {}
        self._literals: dict[int, object] = {}
        self._known: dict[tuple, tuple[str, Dims]] = {}  # what was printed, by content
        self._read: dict[str, set[str]] = {}  # per buffer, its loads since the last barrier
        self._made_of: dict[str, frozenset[str]] = {}  # per name, the loads whose elements it is of
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

    def take(self, name: str) -> tuple[dict, dict]:
        """What is known that varies over a dim, which is forgotten; `put` brings it back."""
        taken: tuple[dict, dict] = ({}, {})
        for known, own in zip((self._values, self._known), taken, strict=True):
            own.update({key: entry for key, entry in known.items() if name in entry[1]})
            for key in own:
                del known[key]
        return taken

    def put(self, taken: tuple[dict, dict]) -> None:
        """Know again what was taken."""
        self._values.update(taken[0])
        self._known.update(taken[1])

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

    def given(self, out: Var) -> None:
        """A number that is there already, whatever it was loaded from."""
        self.define(out, NO_DIMS)

    def variable(self, var: Var) -> str:
        return self._defined(var)[0]

    def _defined(self, var: Var) -> tuple[str, Dims]:
        if var.id not in self._values:
            raise InvalidGraph(reason=f"{var!r} is read where it is not defined")
        return self._values[var.id]

    def resolve(self, arg: Operand) -> Operand:
        return self._literals.get(arg.id, arg) if isinstance(arg, Var) else arg

    def is_literal(self, arg: Operand) -> bool:
        """Whether an operand is a number known when the kernel is printed."""
        return not isinstance(self.resolve(arg), Var | Scalar)

    def scalar(self, scalar: Scalar, dtype: DType) -> str:
        kind = compute_type(dtype)
        several = len(self._scalar_types[scalar.name]) > 1
        name = f"{scalar.name}_{kind.removeprefix('tl.')}" if several else scalar.name
        at = self.scalar_places.get(scalar.name, self.kernel.scalars.index(scalar.name))
        place = f"scalars + {at}" if at else "scalars"
        convert = "" if dtype is f64 else f".to({kind})"
        self.used_scalars[name] = Line(f"{name} = tl.load({place}){convert}")
        return name

    def scalar_lines(self) -> list[Line]:
        """Definitions of the runtime scalars that were used."""
        return [self.used_scalars[name] for name in sorted(self.used_scalars)]

    def axis(self, name: str) -> str:
        if name not in self.axis_text:
            raise InvalidGraph(reason=f"axis {name} is used outside its stage")
        text = self.axis_text[name][0]
        self.used.add(text)
        return text

    def quotient(self, atom: FloorDiv | Mod, inner: str) -> str:
        return f"({grouped(inner)} {'//' if isinstance(atom, FloorDiv) else '%'} {atom.by})"

    def open_ends(self, bound: Bound) -> tuple[bool, bool]:
        return _may_be_negative(bound.index), True

    def position(self, s: Position) -> str:
        text, kind = self.index(s.index), compute_type(s.out.dtype)
        if not self.index_dims(s.index):
            return f"tl.full((), {text}, {kind})"
        return f"({text}).to({kind})" if " " in text else f"{text}.to({kind})"

    def needs_type(self, template: str, dtype: DType, values: Sequence[Operand]) -> bool:
        """Operators and tl.where give literals the type of the other operand, exactly. Functions
        get them as constants of a guessed type: fp32 or int32 where the number has a normal fp32
        value.
        """
        if all(not self.is_literal(v) for v in values):
            return dtype is b1  # of a condition
        if dtype is b1 or all(self.is_literal(v) for v in values):
            return True
        if not re.search(r"\bt[jl]\.(?!where)", template):
            return False
        takes_bare = dtype.kind == "f" and dtype is not f64 and re.match(_TAKES_BARE, template)
        return (
            not takes_bare or self.is_literal(values[0]) or not _is_normal(self.resolve(values[1]))
        )

    # --- over which dims ----------------------------------------------------------------------

    def index_dims(self, *indices: Index) -> Dims:
        """The dims that indices vary over."""
        dims = NO_DIMS
        for index in indices:
            for atom, _ in index.terms:
                if isinstance(atom, str):
                    dims |= self.axis_text[atom][1]
                elif isinstance(atom, Var):
                    dims |= self.value_dims(atom)
                else:
                    dims |= self.index_dims(atom.index)
        return dims

    def value_dims(self, *args: Operand) -> Dims:
        """The dims that operands vary over."""
        found = [self.resolve(arg) for arg in args]
        return NO_DIMS.union(*(self._defined(v)[1] for v in found if isinstance(v, Var)))

    def load_dims(self, s: Load) -> Dims:
        """The dims that a load varies over."""
        return self.index_dims(s.index, *(bound.index for bound in s.mask))

    def _dims(self, s: Load | Compute | Position | InBounds) -> Dims:
        if isinstance(s, Compute):
            return self.value_dims(*s.args)
        if isinstance(s, Load):
            return self.load_dims(s)
        if isinstance(s, Position):
            return self.index_dims(s.index)
        return self.index_dims(*(bound.index for bound in s.mask))

    # --- statements ---------------------------------------------------------------------------

    def emit(self, statements: Iterable[Statement]) -> list[Reduce]:
        """Print statements in order; reductions are left to the caller, who knows the loop."""
        reductions = []
        for s in statements:
            if isinstance(s, Reduce):
                reductions.append(s)
            else:
                self.lines += self.lines_of(s)
        return reductions

    def assign(
        self, s: Load | Compute | Position | InBounds, text: str, key: tuple = ()
    ) -> list[Line]:
        """`out = text`, unless the same thing has a name already."""
        dims = self._dims(s)
        if text.isidentifier():
            self.define(s.out, dims, text)
            return []
        key = key or (text,)
        if self._reuse(s.out, key):
            return []
        self._known[key] = (self.define(s.out, dims), dims)
        return [Line(f"{s.out!r} = {text}", s.where)]

    def _reuse(self, out: Var, key: tuple) -> bool:
        """Whether the same thing was printed before, which is then `out` too."""
        if key not in self._known:
            return False
        name, dims = self._known[key]
        self.define(out, dims, name)
        return True

    def _hinted(self, index: Index, text: str) -> str:
        """An index's text, with what is known of where it lies."""
        if not self.rows or self.is_end or row_of(index, self.rows) is None:
            return text
        return f"tl.multiple_of({text}, [1, UNIT])"

    def load_text(self, s: Load, zero_outside: bool = False) -> tuple[list[Line], str]:
        """The lines before a load, and the load in its memory type; zero where the mask, or the
        tile with `zero_outside`, ends."""
        index, dims = self.index(s.index), self.load_dims(s)
        conditions = self.conditions(s.mask)
        pointer = s.buffer if index == "0" else f"{s.buffer} + {self._hinted(s.index, index)}"
        if dims != self.index_dims(s.index):
            pointer = f"tl.broadcast_to({pointer}, {self.shape(dims)})"
        masks = [mask] if (mask := self.mask(dims)) else []
        before = []
        if conditions:
            name = f"{s.out!r}_in"
            before.append(Line(f"{name} = {strip(' & '.join(conditions))}"))
            masks.append(name)
        options = f", mask={' & '.join(masks)}" if masks else ""
        other = ", other=0" if options and (s.mask or zero_outside) else ""
        return before, f"tl.load({pointer}{options}{other})"

    def load(self, s: Load) -> list[Line]:
        key = ("load", s.buffer, self.index(s.index), self.conditions(s.mask))
        if self._reuse(s.out, key):
            return []
        self._read.setdefault(s.buffer, set()).add(repr(s.out))
        self._made_of[repr(s.out)] = frozenset([repr(s.out)])
        before, text = self.load_text(s)
        if s.out.dtype.narrow:
            text += ".to(tl.float32)"
        return [*before, *self.assign(s, text, key)]

    def compute(self, s: Compute) -> list[Line]:
        if s.op.name in ("full", "alias") and self.is_literal(s.args[0]):
            value = np.asarray(self.resolve(s.args[0]))
            self._literals[s.out.id] = round_to(value, s.out.dtype).item()
            return []
        made_of = frozenset().union(*map(self._loads_of, s.args))
        lines = super().compute(s)
        self._made_of.setdefault(self.variable(s.out), made_of)
        return lines

    def _loads_of(self, arg: Operand) -> frozenset[str]:
        """The loads that an operand's elements are made of, each of the same element."""
        arg = self.resolve(arg)
        if not isinstance(arg, Var):
            return frozenset()
        return self._made_of.get(self.variable(arg), frozenset())

    def store(self, s: Store) -> list[Line]:
        dtype, text = self.buffers[s.buffer], self.index(s.index)
        everything = frozenset(self.dims)
        pointer = s.buffer if text == "0" else f"{s.buffer} + {self._hinted(s.index, text)}"
        if self.index_dims(s.index) != everything:
            pointer = f"tl.broadcast_to({pointer}, {self.shape(everything)})"
        value = self.operand(s.value, dtype, typed=dtype is f64)
        masks = [self.mask(everything), *self.conditions(s.mask)]
        options = f", mask={' & '.join(filter(None, masks))}" if any(masks) else ""
        before = []
        if s.fold:
            wide = ".to(tl.float32)" if dtype.narrow else ""
            before.append(Line(f"there = tl.load({pointer}{options}){wide}"))
            value = self.folded(s.fold, "there", value, dtype)
        self._known = {
            key: known for key, known in self._known.items() if key[:2] != ("load", s.buffer)
        }
        lines = [*before, Line(f"tl.store({pointer}, {value}{options})", s.where)]
        if self._read.get(s.buffer, set()) - self._loads_of(s.value):
            # Threads may hold other elements here than they have loaded: all must be done.
            lines.insert(0, Line("tl.debug_barrier()"))
            self._read.clear()
        return lines

    def online(self, most: str, total: str, value: str) -> str:
        """The statement that takes a value into a maximum, and into the sum of exponentials that is
        relative to it."""
        return f"{most}, {total} = online_sum({most}, {total}, {value})"

    # --- reductions ---------------------------------------------------------------------------

    def reduced_value(self, reduce: Reduce, over: Dims) -> str:
        """The value to reduce, with neutral elements where the tile ends in the dims `over`."""
        fold = fold_of(reduce)
        value = self.operand(reduce.value, reduce.out.dtype, typed=True)
        if fold.type != compute_type(reduce.out.dtype):
            value = f"{value}.to({fold.type})"
        return self.where_inside(value, fold.neutral, over, self.value_dims(reduce.value))

    def where_inside(self, value: str, neutral: str, over: Dims, dims: Dims) -> str:
        """A value that varies over some dims as a tile over `over`, neutral where that ends."""
        mask = self.mask(over)
        text = f"tl.where({mask}, {value}, {neutral})" if mask else value
        masked = {name for name in over if not self.dims[name].full}
        shaped = over <= dims | masked
        return text if shaped else f"tl.broadcast_to({text}, {self.shape(over)})"


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


def scalar_types(kernel: Kernel) -> dict[str, Counter]:
    """The Triton types that each runtime scalar is used in."""
    found: dict[str, Counter] = {name: Counter() for name in kernel.scalars}
    stored = {b.name: b.dtype for b in kernel.buffers}
    for statement in all_statements(kernel):
        if isinstance(statement, Compute):
            values, dtype = values_of(statement), operand_dtype(statement)
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
