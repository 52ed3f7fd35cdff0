"""How a running result takes in one more element, as statements of a kernel.

float32 is combined in float64, as eager does on a CPU: what is carried from step to step in a
register is rounded only where it is stored. `codegen/triton_scan.py` reads these statements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tracejit.ir.graph import Node
from tracejit.ir.ops import OPS
from tracejit.ir.types import DType, b1, f32, f64
from tracejit.records import dataclass
from tracejit.schedule.kernel import Compute, InBounds, Mask, Operand, Statement, Var


@dataclass
class Combining:
    """Appends the statements of a node's step to a body; `var` makes a variable of a dtype."""

    var: Callable[[DType], Var]
    node: Node
    body: list[Statement]

    def total(self, so_far: Var, values: Sequence[Operand], inside: Mask) -> Operand:
        """What is stored: `so_far`, which is 0 where `inside` does not hold, and the values."""
        kind = self.node.out.type
        attrs = dict(self.node.attrs)
        combine = attrs.get("combine", self.node.op.name)
        if combine in ("max", "min"):
            (value,) = values
            return self._extremum(combine, so_far, value, inside)
        dtype = f64 if kind.dtype is f32 else kind.dtype
        before, *values = (self._cast(v, dtype) for v in (so_far, *values))
        if combine == "cumsum":
            total = self._emit("add", dtype, before, *values)
        else:
            total = self._first(
                getattr(self, f"_{combine}")(dtype, before, *values), values, inside
            )
        return self._cast(total, kind.dtype)

    def _emit(self, name: str, dtype: DType, *args: Operand) -> Var:
        out = self.var(dtype)
        self.body.append(Compute(out, OPS[name], args, (), self.node.where))
        return out

    def _cast(self, value: Operand, dtype: DType) -> Operand:
        if not isinstance(value, Var) or value.dtype is dtype:
            return value
        out = self.var(dtype)
        attrs = (("dtype", dtype),)
        self.body.append(Compute(out, OPS["cast"], (value,), attrs, self.node.where))
        return out

    def _first(self, total: Var, values: Sequence[Operand], inside: Mask) -> Var:
        """The total, but the last value itself where there is nothing before it."""
        condition = self.var(b1)
        self.body.append(InBounds(condition, inside, self.node.where))
        return self._emit("where", total.dtype, condition, total, values[-1])

    def _mul(self, dtype: DType, before: Operand, value: Operand) -> Var:
        return self._emit("mul", dtype, before, value)

    def _recurrence(self, dtype: DType, before: Operand, factor: Operand, term: Operand) -> Var:
        return self._emit("add", dtype, self._emit("mul", dtype, factor, before), term)

    def _logaddexp(self, dtype: DType, before: Operand, value: Operand) -> Var:
        """The larger, and log1p of the exponential of how much the other is less."""
        most = self._emit("maximum", dtype, before, value)
        least = self._emit("minimum", dtype, before, value)
        less = self._emit("exp", dtype, self._emit("sub", dtype, least, most))
        total = self._emit("add", dtype, most, self._emit("log1p", dtype, less))
        infinite = self._emit("eq", b1, self._emit("abs", dtype, most), float("inf"))
        alike = self._emit("and", b1, self._emit("eq", b1, least, most), infinite)
        return self._emit("where", dtype, alike, most, total)

    def _extremum(self, combine: str, before: Var, value: Operand, inside: Mask) -> Var:
        dtype = before.dtype
        own = self._emit("ge" if combine == "max" else "le", b1, value, before)
        if dtype.is_float:
            own = self._emit("or", b1, own, self._emit("ne", b1, value, value))
        return self._first(self._emit("where", dtype, own, value, before), (value,), inside)
