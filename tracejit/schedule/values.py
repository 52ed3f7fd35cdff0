"""What a kernel's body computes: the elements of values, evaluated where they are read.

Movement nodes only change the indices on the way down to the loads. Each body has a `Scope`, which
knows what has been computed in it.
"""

from __future__ import annotations

import math
from dataclasses import field

from tracejit.ir.graph import Node, Value
from tracejit.ir.ops import OPS
from tracejit.ir.ops.indexing import missing
from tracejit.ir.types import DType, b1, contiguous_strides
from tracejit.records import dataclass
from tracejit.schedule.index import Indices, bounds, flatten, operand_indices
from tracejit.schedule.kernel import (
    Bound,
    Compute,
    InBounds,
    Index,
    Load,
    Mask,
    Operand,
    Position,
    Scalar,
    Statement,
    Var,
)
from tracejit.schedule.plan import PlanBuffer
from tracejit.schedule.tasks import Analysis, Task

LARGEST = 2**31 - 1  # of 32-bit indices


@dataclass(slots=True)
class Memory:
    """Where values live: param and realized values by id, and all buffers by plan name."""

    located: dict[int, str]
    buffers: dict[str, PlanBuffer]

    def strides(self, name: str) -> tuple[int, ...]:
        """Strides in elements of a buffer."""
        buffer = self.buffers[name]
        if buffer.strides is not None:
            return buffer.strides
        return contiguous_strides(buffer.type.shape)


@dataclass(slots=True)
class Scope:
    """A body under construction, and the values it has computed: (indices, mask, operand)."""

    extents: dict[str, int]
    body: list[Statement] = field(default_factory=list)
    known: dict[int, list[tuple[Indices, Mask, Operand]]] = field(default_factory=dict)
    loads: dict[tuple[str, Index, Mask], Var] = field(default_factory=dict)
    masks: dict[int, Mask] = field(default_factory=dict)  # of masked loads, by variable


class Values:
    """Evaluates values within a kernel of tasks, and notes which buffers and scalars it takes."""

    def __init__(self, tasks: list[Task], analysis: Analysis, memory: Memory):
        self.analysis, self.memory = analysis, memory
        self.tasks = sorted(tasks, key=lambda t: t.order)
        self.own = {t.value.id: t for t in self.tasks if t.kind != "store"}
        self.buffers: dict[str, tuple[str, set[str]]] = {}  # plan name → (kernel name, accesses)
        self.scalars: dict[int, tuple[str, Value]] = {}
        self.reduced: dict[int, Var] = {}
        self.used: set[int] = set()
        self.next_var = 1 + max(
            [t.value.id for t in self.tasks] + [d.top.id for t in self.tasks for d in t.demands]
        )
        self.big = False

    def _var(self, value: Value, dtype: DType | None = None) -> Var:
        """A fresh variable, numbered as the value if that number is free."""
        number = value.id
        if number in self.used:
            number, self.next_var = self.next_var, self.next_var + 1
        self.used.add(number)
        return Var(number, dtype or value.type.dtype)

    def _buffer(self, plan: str, access: str) -> str:
        name, accesses = self.buffers.setdefault(plan, (f"b{len(self.buffers)}", set()))
        accesses.add(access)
        return name

    def _operand(self, arg: object) -> Operand:
        """A literal as it is, a host value as a runtime scalar."""
        if not isinstance(arg, Value):
            return arg
        name, _ = self.scalars.setdefault(arg.id, (f"s{len(self.scalars)}", arg))
        return Scalar(name)

    def _check(self, index: Index, scope: Scope) -> None:
        """Note whether an index outgrows 32 bits."""
        if not self.big and bounds(index, scope.extents)[1] > LARGEST:
            self.big = True

    def _value(self, value: Value, at: Indices, mask: Mask, scope: Scope) -> Operand:
        """A variable that holds the value's element at the given indices."""
        if value.id in self.reduced:
            return self.reduced[value.id]
        for known_at, known_mask, operand in scope.known.get(value.id, ()):
            if known_at == at and known_mask == mask:
                return operand
        operand = self._evaluate(value, at, mask, scope)
        scope.known.setdefault(value.id, []).append((at, mask, operand))
        return operand

    def _evaluate(self, value: Value, at: Indices, mask: Mask, scope: Scope) -> Operand:
        if value.id in self.analysis.params:
            return self._load(value, at, mask, scope)
        main = self.analysis.origins[value.id].main
        inside = main is not None and main.id in self.own
        if not inside and value.id in self.memory.located:
            return self._load(value, at, mask, scope)
        node = self.analysis.producer[value.id]
        name, family = node.op.name, node.op.family
        if family == "movement":
            below, bound = operand_indices(node, at, scope.extents)
            source = self._value(node.args[0], below, mask + bound, scope)
            return self._padded(node, source, mask + bound, bound, scope) if bound else source
        if name == "alias":
            return self._value(node.args[0], at, mask, scope)
        if name == "iota":
            out = self._var(value)
            scope.body.append(Position(out, at[node.attr("axis")], node.where))
            return out
        if name == "full":
            out = self._var(value)
            scope.body.append(Compute(out, node.op, (self._operand(node.args[0]),), (), node.where))
            return out
        if name == "gather":
            return self._gathered(node, at, mask, scope)
        assert family == "elementwise", f"{name} is read outside its kernel"
        args = tuple(
            self._value(a, at, mask, scope)
            if isinstance(a, Value) and not a.type.is_host
            else self._operand(a)
            for a in node.args
        )
        out = self._var(value)
        scope.body.append(Compute(out, node.op, args, node.attrs, node.where))
        return out

    def _gathered(self, node: Node, at: Indices, mask: Mask, scope: Scope) -> Operand:
        """The operand where the index value says, read only where that is in range."""
        source, axis = node.args[0], node.attr("axis")
        position = self._value(node.args[1], at, mask, scope)
        scope.extents = {**scope.extents, position: source.type.shape[axis]}
        where = Index(((position, 1),))
        bound = (Bound(where, source.type.shape[axis]),)
        below = (*at[:axis], where, *at[axis + 1 :])
        found = self._value(source, below, mask + bound, scope)
        return self._filled(node, found, bound, missing(source.type.dtype), scope)

    def _load(self, value: Value, at: Indices, mask: Mask, scope: Scope) -> Var:
        plan = self.memory.located[value.id]
        index = flatten(at, self.memory.strides(plan))
        name = self._buffer(plan, "r")
        key = (name, index, mask)
        if key not in scope.loads:
            self._check(index, scope)
            out = self._var(value)
            scope.loads[key] = out
            if mask:
                scope.masks[out.id] = mask
            producer = self.analysis.producer.get(value.id)
            scope.body.append(Load(out, name, index, mask, producer.where if producer else ""))
        return scope.loads[key]

    def _padded(
        self, node: Node, source: Operand, mask: Mask, bound: Mask, scope: Scope
    ) -> Operand:
        """The operand inside the bounds, the fill outside; a masked load gives +0 by itself."""
        fill = node.attr("value") if node.op.name == "pad" else 0
        free = fill == 0 and math.copysign(1.0, fill) > 0
        if free and isinstance(source, Var) and scope.masks.get(source.id) == mask:
            return source
        return self._filled(node, source, bound, fill, scope)

    def _filled(
        self, node: Node, source: Operand, bound: Mask, fill: object, scope: Scope
    ) -> Operand:
        """The source inside the bounds, the fill outside."""
        condition = self._var(node.out, b1)
        scope.body.append(InBounds(condition, bound, node.where))
        out = self._var(node.out)
        scope.body.append(Compute(out, OPS["where"], (condition, source, fill), (), node.where))
        return out
