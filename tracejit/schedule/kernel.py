"""The Kernel: what one launch does, free of any target language.

A Kernel is an outer iteration domain and an ordered list of stages. A stage loops over inner axes
(none: it runs once per outer point) and holds a body of scalar SSA: loads, computation, stores, and
reductions over the stage's axes, whose results later stages see. A stage that ends with a `Sort` is
followed by one that stores the order. A stage may start with a `Dot`:
its axes are then (batch…, m, n), and the contraction's value at (…, m, n) is the first value of the
body. Or with an `Attend`: then its axes are the batch, and its body stores results of attention. A
full reduction is a kernel with no outer axes.

    kernel(b0: f32 r, b1: f32 r, b2: f32 w, b3: f32 w; n0, …; s0) over () {
      stage (i0: n0) {
        v4: f32 = load b0[i0]
        v5: f32 = maximum(v4, 0.0)               # step.py:12
        …
        store b2[i0] <- v9
        v8: f32 = reduce_sum v7
      }
      stage () {
        store b3[0] <- v8
      }
    }

Sizes (extents, strides, offsets, divisors) are *names* bound per call, so that one kernel serves
many shapes; the number 1 as a coefficient and 0 as an offset stay literal, because they decide how
code is generated. During scheduling sizes are plain ints; `schedule.parametrize` names them.

Kernels that need not wait for each other may share a launch: a Kernel is then nothing but its
`parts`, each a kernel of its own, which run side by side in any order; in a `foreach` all parts are
one kernel over other memory (`foreach.py`). What a library of the host computes is a `call`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tracejit.ir.literals import print_literal
from tracejit.ir.ops import Op
from tracejit.ir.ops.attention import FORWARD
from tracejit.ir.types import DType
from tracejit.records import dataclass, record
from tracejit.schedule.call import HostCall

Size = int | str

FOLDS = {"": "<-", "add": "+=", "mul": "*=", "max": "max=", "min": "min="}  # how stores print
COMMENT_COLUMN = 64  # the widest line that still moves all comments to its right


@record
class Axis:
    """A loop: its variable ("i0") and extent."""

    name: str
    extent: Size


@record
class Index:
    """A sum of `atom * coefficient` plus an offset. Atoms: axis names, FloorDiv, Mod, Var.

    A Var is an i64 value of the body, for what is only known when the kernel runs (gather).
    """

    terms: tuple[tuple[Atom, Size], ...] = ()
    offset: Size = 0


@record
class FloorDiv:
    """index // by"""

    index: Index
    by: Size


@record
class Mod:
    """index % by"""

    index: Index
    by: Size


Atom = "str | FloorDiv | Mod | Var"


@record
class Bound:
    """The condition 0 <= index < high and index % step == 0."""

    index: Index
    high: Size
    step: Size = 1


Mask = tuple[Bound, ...]  # a conjunction; () is always true


@record
class Var:
    """A scalar SSA value of a body; numbered as the IR value that it stands for where possible."""

    id: int
    dtype: DType

    def __repr__(self) -> str:
        return f"v{self.id}"


@dataclass(frozen=True, slots=True)
class Scalar:
    """A runtime scalar (float64 in the call's table), by its name in the kernel ("s0")."""

    name: str

    def __repr__(self) -> str:
        return self.name


Operand = Var | Scalar | int | float | bool


@record
class Load:
    """out = buffer[index] where the mask holds, else 0."""

    out: Var
    buffer: str
    index: Index
    mask: Mask = ()
    where: str = ""


@record
class Compute:
    """out = op(*args, **attrs), an element-wise primitive or `full`."""

    out: Var
    op: Op
    args: tuple[Operand, ...]
    attrs: tuple[tuple[str, object], ...] = ()
    where: str = ""


@record
class Position:
    """out = the value of an index, as a number of out's dtype (iota)."""

    out: Var
    index: Index
    where: str = ""


@dataclass(frozen=True, slots=True)
class InBounds:
    """out = whether the mask holds, as a bool."""

    out: Var
    mask: Mask
    where: str = ""


@record
class Store:
    """buffer[index] = value where the mask holds; or, by `fold`, what is there and the value: their
    sum ("add") or product ("mul"), rounded to the buffer's dtype each time, or the larger ("max")
    or smaller one."""

    buffer: str
    index: Index
    value: Operand
    where: str = ""
    mask: Mask = ()
    fold: str = ""


@record
class Reduce:
    """out = value reduced by op (reduce_sum, reduce_max, reduce_min) over the stage's axes.

    Narrow floats accumulate in float32 and round once; `out` is visible to later stages.
    """

    out: Var
    op: Op
    value: Operand
    where: str = ""


@dataclass(frozen=True, slots=True)
class Sort:
    """out = where the stage's axis has the value that comes first in order, second, … at the points
    of the next stage's axis: equal values keep their order, and NaN is the largest."""

    out: Var
    value: Operand
    descending: bool
    topk: str = ""  # "sorted" or "unsorted": as torch's topk has equal values
    where: str = ""


Statement = Load | Compute | Position | InBounds | Store | Reduce | Sort


@dataclass(frozen=True, slots=True)
class Dot:
    """out[…, m, n] = sum over k of a[…, m, k] * b[…, k, n].

    `a` and `b` are straight-line prologues (no Store, no Reduce) over the stage's axes and `k`.
    `batch` names the stage's leading axes; `m` and `n` are the last two axes (an extent-1 m or n
    keeps its axis). Accumulation is float32 (float64 for f64, int64 for integers).
    """

    out: Var
    k: Axis
    a: tuple[Statement, ...]
    a_value: Operand
    b: tuple[Statement, ...]
    b_value: Operand
    where: str = ""


@dataclass(frozen=True, slots=True)
class Side:
    """An operand as straight-line statements (no Store, no Reduce), and the value among them."""

    body: tuple[Statement, ...]
    value: Operand


# operands of an attention, in order
OF_FORWARD = ("q", "k", "v", "bias")
OF_GRADIENTS = (*OF_FORWARD, "lse", "delta", "g")


@dataclass(frozen=True, slots=True)
class Attend:
    """Results of attention over m queries and n keys, of width c; v and the result have width d.

    `results` are primitives (`ir.ops.attention`) with their variables, all forward or all
    gradients; `sides` their operands, and of dropout the noise behind them: q (m, c), k (n, c),
    v (n, d), bias (m, n), lse (m), delta (m), g (m, d), noise (m, n), each over the stage's axes,
    the batch, too. The stage's body is nothing but the stores of the results.
    """

    results: tuple[tuple[Op, Var], ...]
    m: Axis
    n: Axis
    c: Axis
    d: Axis
    causal: bool
    scale: float
    sides: tuple[Side, ...]
    where: str = ""

    @property
    def axes(self) -> tuple[Axis, ...]:
        return self.m, self.n, self.c, self.d

    @property
    def is_forward(self) -> bool:
        return self.results[0][0].name in FORWARD

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sides."""
        plain = OF_FORWARD if self.is_forward else OF_GRADIENTS
        return plain if len(self.sides) == len(plain) else (*plain, "noise")

    @property
    def over(self) -> tuple[tuple[Axis, ...], ...]:
        """The axes of each side, besides the batch."""
        m, n, c, d = self.axes
        over = {"q": (m, c), "k": (n, c), "v": (n, d), "g": (m, d), "lse": (m,), "delta": (m,)}
        return tuple(over.get(name, (m, n)) for name in self.names)

    def side(self, name: str) -> Side:
        """The operand of a name."""
        return self.sides[self.names.index(name)]

    @property
    def is_noisy(self) -> bool:
        """Whether weights are multiplied by noise."""
        return self.names[-1] == "noise"

    def result(self, name: str) -> Var | None:
        """The variable of a primitive, if it is among the results."""
        return next((var for op, var in self.results if op.name == name), None)


def axes_of_result(attend: Attend, name: str) -> tuple[Axis, ...]:
    """The axes of a result besides the batch."""
    m, n, c, d = attend.axes
    return {
        "attention": (m, d),
        "attention_lse": (m,),
        "attention_dq": (m, c),
        "attention_dk": (n, c),
        "attention_dv": (n, d),
    }[name]


@dataclass(frozen=True, slots=True)
class Stage:
    """One loop nest over `axes` inside each outer point. It starts with at most one of a `Dot` and
    an `Attend`.

    `in_order`: its points run one after another, since values say where they store (scatter). What
    it stores in belongs to the outer point alone.
    """

    axes: tuple[Axis, ...]
    body: tuple[Statement, ...]
    dot: Dot | None = None
    in_order: bool = False
    attend: Attend | None = None


@record
class Buffer:
    """A pointer parameter: name ("b0"), element type, access "r", "w" or "rw"."""

    name: str
    dtype: DType
    access: str


@dataclass(frozen=True, slots=True)
class Part:
    """A kernel beside others: what its parameters, in order, are called in the launch's kernel."""

    kernel: Kernel
    buffers: tuple[str, ...]
    sizes: tuple[str, ...]
    scalars: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One launch. `index64`: some index, or the number of a point of a domain that is counted
    through, may exceed 2**31 - 1, so both are 64-bit.

    With `parts` there are no axes and stages. What one part writes, no other reads or writes. Nor
    are there any with a `call`. The parts of a `foreach` have the same kernel.
    """

    buffers: tuple[Buffer, ...]
    sizes: tuple[str, ...]
    scalars: tuple[str, ...]
    axes: tuple[Axis, ...]
    stages: tuple[Stage, ...]
    index64: bool = False
    parts: tuple[Part, ...] = ()
    call: HostCall | None = None
    foreach: bool = False

    @property
    def statements(self) -> Iterator[Statement | Dot | Attend]:
        """All statements; a Dot or Attend follows those of its operands."""
        for part in self.parts[:1] if self.foreach else self.parts:
            yield from part.kernel.statements
        for stage in self.stages:
            if stage.dot is not None:
                yield from (*stage.dot.a, *stage.dot.b, stage.dot)
            if stage.attend is not None:
                yield from (s for side in stage.attend.sides for s in side.body)
                yield stage.attend
            yield from stage.body

    @property
    def sort(self) -> Sort | None:
        """What the first stage ends with, if the kernel sorts."""
        last = self.stages[0].body[-1:] if self.stages else ()
        return last[0] if last and isinstance(last[0], Sort) else None

    @property
    def lines(self) -> tuple[str, ...]:
        """The user's lines that it computes, as file:line, in order."""
        places = [s.where for s in self.statements] if self.call is None else [self.call.where]
        return tuple(dict.fromkeys(where for where in places if where))

    def __str__(self) -> str:
        """The user's lines as aligned comments; `kernel_text` says the grammar and reads it."""
        rows: list[tuple[str, str]] = []
        for stage in self.stages:
            order = " in order" if stage.in_order else ""
            rows.append((f"  stage {_axes(stage.axes)}{order} {{", ""))
            if stage.dot is not None:
                dot = stage.dot
                rows.append((f"    dot {_var(dot.out)} over {_axes((dot.k,))} {{", ""))
                rows += [(f"      {_statement(s)}", s.where) for s in dot.a]
                rows.append(("      |", ""))
                rows += [(f"      {_statement(s)}", s.where) for s in dot.b]
                rows.append((f"    }} {_operand(dot.a_value)}, {_operand(dot.b_value)}", dot.where))
            if stage.attend is not None:
                rows += _attend(stage.attend)
            rows += [(f"    {_statement(s)}", s.where) for s in stage.body]
            rows.append(("  }", ""))
        width = min(max((len(row) for row, where in rows if where), default=0), COMMENT_COLUMN)
        buffers = [f"{b.name}: {b.dtype} {b.access}" for b in self.buffers]
        name = "kernel64" if self.index64 else "kernel"
        together = "for each" if self.foreach else "side by side"
        domain = together if self.parts else f"over {_axes(self.axes)}"
        if self.call is not None:
            domain = "by the host"
            rows.append((f"  {self.call}", self.call.where))
        lines = [f"{name}({_lists(buffers, self.sizes, self.scalars)}) {domain} {{"]
        for part in self.parts:
            lists = _lists(part.buffers, part.sizes, part.scalars)
            text = (
                str(part.kernel).splitlines() if part is self.parts[-1] or not self.foreach else ""
            )
            lines += [f"  part ({lists}) {{", *(f"    {line}" for line in text), "  }"]
        lines += [f"{row:<{width}}  # {where}" if where else row for row, where in rows]
        return "\n".join([*lines, "}"])


def _attend(attend: Attend) -> list[tuple[str, str]]:
    """The rows of an attention: each side ends with its value."""
    results = ", ".join(f"{op.name} {_var(var)}" for op, var in attend.results)
    how = f"causal={attend.causal} scale={print_literal(attend.scale)}"
    rows = [(f"    attend {results} over {_axes(attend.axes)} {how} {{", "")]
    for side in attend.sides:
        rows += [(f"      {_statement(s)}", s.where) for s in side.body]
        rows.append((f"      | {_operand(side.value)}", ""))
    return [*rows, ("    }", attend.where)]


def _lists(*lists: Sequence[str]) -> str:
    """`a, b; c`: lists apart, empty ones at the end left out."""
    texts = [", ".join(names) for names in lists]
    while texts and not texts[-1]:
        texts.pop()
    return "; ".join(texts)


def _axes(axes: tuple[Axis, ...]) -> str:
    return f"({', '.join(f'{a.name}: {a.extent}' for a in axes)})"


def _var(var: Var) -> str:
    return f"{var!r}: {var.dtype}"


def _operand(operand: Operand) -> str:
    return repr(operand) if isinstance(operand, Var | Scalar) else print_literal(operand)


def _index(index: Index) -> str:
    parts = []
    for atom, c in index.terms:
        if isinstance(atom, str | Var):
            text = atom if isinstance(atom, str) else repr(atom)
        else:
            inner = _index(atom.index)
            if " " in inner:
                inner = f"({inner})"
            text = f"{inner} {'//' if isinstance(atom, FloorDiv) else '%'} {atom.by}"
        if c != 1:
            text = f"{text if isinstance(atom, str | Var) else f'({text})'} * {c}"
        parts.append(text)
    if index.offset != 0 or not parts:
        parts.append(str(index.offset))
    return " + ".join(parts)


def _mask(mask: Mask) -> str:
    rows = []
    for bound in mask:
        step = "" if bound.step == 1 else f" step {bound.step}"
        rows.append(f"0 <= {_index(bound.index)} < {bound.high}{step}")
    return " and ".join(rows) or "true"


def _statement(s: Statement) -> str:
    if isinstance(s, Store):
        into = f"{s.buffer}[{_index(s.index)}] {FOLDS[s.fold]}"
        inside = f" if {_mask(s.mask)}" if s.mask else ""
        return f"store {into} {_operand(s.value)}{inside}"
    if isinstance(s, Load):
        right = f"load {s.buffer}[{_index(s.index)}]" + (f" if {_mask(s.mask)}" if s.mask else "")
    elif isinstance(s, Compute):
        args = [_operand(a) for a in s.args]
        args += [f"{key}={print_literal(value)}" for key, value in s.attrs]
        right = f"{s.op.name}({', '.join(args)})"
    elif isinstance(s, Position):
        right = f"position {_index(s.index)}"
    elif isinstance(s, InBounds):
        right = f"inbounds {_mask(s.mask)}"
    elif isinstance(s, Sort):
        right = f"order {_operand(s.value)}{' descending' * s.descending}"
        right += f" topk {s.topk}" * bool(s.topk)
    else:
        right = f"{s.op.name} {_operand(s.value)}"
    return f"{_var(s.out)} = {right}"
