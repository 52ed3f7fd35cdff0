"""Reductions in C: how values accumulate in a vector loop, outside it, and over chunks.

A float32 sum accumulates in float32 lanes over at most BLOCK elements, and these partial sums in
float64: its error does not grow with the number of blocks. Maximum and minimum keep a NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field

from tracejit.codegen.c_body import Body
from tracejit.codegen.c_text import rounded, value_type
from tracejit.codegen.language import Line
from tracejit.ir.types import DType, b1, f64
from tracejit.records import dataclass
from tracejit.schedule.kernel import Reduce

_LOWEST = {"i64": "INT64_MIN", "i32": "INT32_MIN", "i16": "INT16_MIN", "i8": "INT8_MIN", "u8": "0"}
_HIGHEST = {"i64": "INT64_MAX", "i32": "INT32_MAX", "i16": "INT16_MAX", "i8": "INT8_MAX"}


@dataclass(frozen=True)
class Fold:
    """How one Reduce accumulates: C types of the accumulator in a vector loop (`lane`) and outside
    it (`total`), the neutral element, and the texts of steps."""

    reduce: Reduce
    kind: str  # "sum", "max", "min", "any", "all"
    lane: str
    total: str
    neutral: str

    @property
    def name(self) -> str:
        """v12 → the number that its accumulators are named after."""
        return str(self.reduce.out.id)

    @property
    def is_float(self) -> bool:
        return self.reduce.out.dtype.is_float

    @property
    def watches_nan(self) -> bool:
        """Whether the vector loop notes a NaN apart, which comparisons would lose."""
        return self.is_float and self.kind in ("max", "min")

    def step(self, target: str, value: str) -> str:
        """target ← target and value, for a vector loop; a NaN is noted apart."""
        if self.kind == "sum":
            return f"{target} += {value};"
        if self.kind in ("any", "all"):
            return f"{target} {'|' if self.kind == 'any' else '&'}= {value};"
        sign = ">" if self.kind == "max" else "<"
        return f"{target} = {value} {sign} {target} ? {value} : {target};"

    def merge(self, target: str, value: str) -> str:
        """target ← target and value, where a NaN must survive by itself."""
        if not self.watches_nan:
            return self.step(target, value)
        sign = ">" if self.kind == "max" else "<"
        test = f"({value} {sign} {target}) | ({value} != {value})"
        return f"{target} = {test} ? {value} : {target};"

    def clause(self, target: str) -> str:
        """The OpenMP clause for an accumulator in a vector loop."""
        sign = {"sum": "+", "any": "|", "all": "&"}.get(self.kind, self.kind)
        return f"reduction({sign}:{target})"

    def result(self, total: str) -> str:
        """The reduced value from its total."""
        dtype = self.reduce.out.dtype
        text = total if self.total == value_type(dtype) else f"({value_type(dtype)}){total}"
        return rounded(text, dtype)


def fold_of(reduce: Reduce) -> Fold:
    """How a reduction accumulates."""
    dtype, kind = reduce.out.dtype, reduce.op.name.removeprefix("reduce_")
    if dtype is b1:
        kind = "all" if kind == "min" else "any"
        return Fold(reduce, kind, "uint8_t", "uint8_t", "1" if kind == "all" else "0")
    if kind == "sum":
        if not dtype.is_float:
            return Fold(reduce, kind, "int64_t", "int64_t", "0")
        return Fold(reduce, kind, "double" if dtype is f64 else "float", "double", "0")
    plain = value_type(dtype)
    return Fold(reduce, kind, plain, plain, _neutral(kind, dtype))


@dataclass(frozen=True)
class Lanes:
    """What reductions put around and into a vector loop: accumulators before it, steps at the end
    of its body, clauses of its pragma, and their merging into the totals (r…) after it."""

    before: list[Line] = field(default_factory=list)
    steps: list[Line] = field(default_factory=list)
    clauses: list[str] = field(default_factory=list)
    after: list[Line] = field(default_factory=list)


def lanes_of(folds: Sequence[Fold], body: Body) -> Lanes:
    """The accumulators (t…) of reductions in a vector loop."""
    lanes = Lanes()
    for f in folds:
        lane, value = f"t{f.name}", body.operand(f.reduce.value, f.reduce.out.dtype)
        lanes.before.append(Line(f"{f.lane} {lane} = {f.neutral};"))
        lanes.clauses.append(f.clause(lane))
        lanes.steps.append(Line(f.step(lane, value), f.reduce.where))
        if f.watches_nan:
            lanes.before.append(Line(f"int n{f.name} = 0;"))
            lanes.clauses.append(f"reduction(|:n{f.name})")
            lanes.steps.append(Line(f"n{f.name} |= {value} != {value};"))
            lanes.after.append(Line(f"if (n{f.name}) {lane} = NAN;"))
        lanes.after.append(Line(f.merge(f"r{f.name}", lane)))
    return lanes


def _neutral(kind: str, dtype: DType) -> str:
    if dtype.is_float:
        return "-INFINITY" if kind == "max" else "INFINITY"
    if kind == "max":
        return _LOWEST[dtype.name]
    return _HIGHEST.get(dtype.name, "UINT8_MAX")
