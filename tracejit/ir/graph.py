"""The Graph: linear SSA over primitives, pure, with writes to real tensors as explicit outputs.

Value, Node and Graph are frozen data. A `Builder` appends nodes, running each primitive's `infer`.
Arguments of a node are Values, Python literals (int, float, bool), or *host* Values: scalar
float64 runtime values computed on the host. Literals and host values broadcast; nothing else does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from tracejit.errors import InvalidGraph
from tracejit.ir.literals import print_literal
from tracejit.ir.ops import OPS, Op
from tracejit.ir.types import Type
from tracejit.records import dataclass, record


@record
class Value:
    """One SSA value."""

    id: int
    type: Type

    def __hash__(self) -> int:
        return self.id

    def __repr__(self) -> str:
        return f"%{self.id}"


Arg = Value | int | float | bool


@record
class Node:
    """One application of a primitive: `outs = op(*args, **attrs)`; `where` is the user's line."""

    op: Op
    args: tuple[Arg, ...]
    attrs: tuple[tuple[str, object], ...]
    outs: tuple[Value, ...]
    where: str = ""

    @property
    def out(self) -> Value:
        """The result of a node that has one."""
        return self.outs[0]

    @property
    def is_ordered(self) -> bool:
        """Whether it does something besides its results: it is never dropped, merged or repeated,
        and runs in its order with others like it."""
        return self.op.family == "collective"

    def attr(self, name: str) -> object:
        for key, value in self.attrs:
            if key == name:
                return value
        raise KeyError(name)

    @property
    def inputs(self) -> tuple[Value, ...]:
        """The arguments that are Values."""
        return tuple([a for a in self.args if a.__class__ is Value])


@record
class Param:
    """A graph input with its memory layout; `strides` in elements, None for row-major."""

    value: Value
    strides: tuple[int, ...] | None = None


@record
class Result:
    """A value returned in fresh memory of the given strides (None for row-major)."""

    value: Value
    strides: tuple[int, ...] | None = None


@record
class Write:
    """`target` (a graph input) is overwritten in place by `value` when the step commits."""

    target: Value
    value: Value


@dataclass(frozen=True, slots=True)
class Graph:
    """A whole step, or the body of a loop, which is an attribute of its node and canonical.
    Equality is structural; `canonical` numbers values by first appearance."""

    name: str
    params: tuple[Param, ...]
    nodes: tuple[Node, ...]
    results: tuple[Result, ...]
    writes: tuple[Write, ...]

    def __str__(self) -> str:
        """Values numbered by definition, the user's lines as comments; `ir.text` reads it back."""
        return self.text()

    def text(self, names: Sequence[str] = ()) -> str:
        """The same, with `names` for the params, if they are given, in place of their numbers. A
        long list of named params has a line for each."""
        graph = self.canonical()
        called = dict(zip((p.value for p in graph.params), names, strict=True)) if names else {}

        def shown(arg: Arg) -> str:
            return called[arg] if isinstance(arg, Value) and arg in called else print_arg(arg)

        params = [f"{shown(p.value)}: {p.value.type}{_layout(p)}" for p in graph.params]
        head = f"{graph.name}({', '.join(params)}) {{"
        if names and len(head) > 100:
            head = "\n".join([f"{graph.name}(", *(f"    {p}," for p in params), ") {"])
        rows = []
        bodies: dict[Graph, str] = {}
        for node in graph.nodes:
            operands = [shown(a) for a in node.args]
            for key, value in node.attrs:
                if isinstance(value, Graph):
                    text = bodies.setdefault(value, f"body{len(bodies)}")
                else:
                    text = print_literal(value)
                operands.append(f"{key}={text}")
            left = ", ".join(f"{out}: {out.type}" for out in node.outs)
            rows.append((f"  {left} = {node.op.name}({', '.join(operands)})", node.where))
        width = min(max((len(row) for row, _ in rows), default=0), 72)
        lines = [head]
        lines += [f"{row:<{width}}  # {where}" if where else row for row, where in rows]
        if graph.results:
            results = ", ".join(f"{shown(r.value)}{_layout(r)}" for r in graph.results)
            lines.append(f"  return {results}")
        lines += [f"  write {shown(w.target)} <- {shown(w.value)}" for w in graph.writes]
        for body, name in bodies.items():
            first, *rest = str(replace(body, name=name)).splitlines()
            lines += [f"  body {first}", *(f"  {line}" for line in rest)]
        return "\n".join([*lines, "}"])

    def values(self) -> Iterator[Value]:
        """Every value, in order of definition."""
        for param in self.params:
            yield param.value
        for node in self.nodes:
            yield from node.outs

    def outputs(self) -> Iterator[Value]:
        """Every value that must exist when the step is over."""
        for result in self.results:
            yield result.value
        for write in self.writes:
            yield write.value

    def producers(self) -> dict[Value, Node]:
        """The node that defines each non-param value."""
        return {out: node for node in self.nodes for out in node.outs}

    def canonical(self) -> Graph:
        """The same graph with values numbered 0, 1, 2, … in order of definition."""
        number: dict[int, Value] = {}  # by the ids so far

        def define(value: Value) -> Value:
            number[value.id] = new = Value(len(number), value.type)
            return new

        def use(value: Value) -> Value:
            return number[value.id]

        params = tuple([Param(define(p.value), p.strides) for p in self.params])
        nodes = []
        for n in self.nodes:
            args = tuple([number[a.id] if a.__class__ is Value else a for a in n.args])
            outs = tuple([define(out) for out in n.outs])
            nodes.append(Node(n.op, args, n.attrs, outs, n.where))
        results = tuple([Result(use(r.value), r.strides) for r in self.results])
        writes = tuple([Write(use(w.target), use(w.value)) for w in self.writes])
        return Graph(self.name, params, tuple(nodes), results, writes)


def next_id(values: Iterable[Value]) -> int:
    """The first id above those of all these values: for a value that is new among them."""
    return 1 + max((v.id for v in values), default=-1)


def print_arg(arg: Arg) -> str:
    """Text of a node's argument."""
    return repr(arg) if isinstance(arg, Value) else print_literal(arg)


def _layout(place: Param | Result) -> str:
    return "" if place.strides is None else f" strides {print_literal(place.strides)}"


class Builder:
    """Appends nodes to a graph under construction; `b.mul(x, 2.0)` emits one primitive.

    `line` is stamped on each node; `on_emit`, when set, sees every node as it is appended, and
    `instead`, when set, says for each operand which value is taken in its place.
    """

    def __init__(self, first_id: int = 0):
        self.params: list[Param] = []
        self.nodes: list[Node] = []
        self.line = ""  # stamped on each node: the user's file:line
        self.on_emit: Callable[[Node], None] | None = None
        self.instead: Callable[[Value], Value] | None = None
        self.next_id = first_id

    def value(self, type: Type) -> Value:
        """A fresh value that nothing defines yet."""
        out = Value(self.next_id, type)
        self.next_id += 1
        return out

    def param(self, type: Type, strides: tuple[int, ...] | None = None) -> Value:
        """Declare a graph input."""
        value = self.value(_TYPES.setdefault(type, type))  # one object, for `_inferred`
        if len(_TYPES) > _MAX_INFERRED:
            _TYPES.clear()
        self.params.append(Param(value, strides))
        return value

    def emit(self, op: Op, *args: Arg, **attrs: object) -> Value:
        """Append `op(*args, **attrs)` and return its (single) result."""
        if self.instead is not None:
            args = tuple([self.instead(a) if type(a) is Value else a for a in args])
        items = tuple(attrs.items())
        out = Value(self.next_id, _inferred(op, args, attrs, items))
        self.next_id += 1
        node = Node(op, args, items, (out,), self.line)
        self.nodes.append(node)
        if self.on_emit is not None:
            self.on_emit(node)
        return out

    def __getattr__(self, name: str) -> Callable[..., Value]:
        op = OPS.get(name.removesuffix("_"))  # b.and_, b.or_, b.not_: Python keywords
        if op is None:
            raise AttributeError(f"no primitive named {name!r}")

        self.__dict__[name] = emit = partial(self.emit, op)
        return emit

    def graph(
        self, name: str, results: tuple[Result, ...] = (), writes: tuple[Write, ...] = ()
    ) -> Graph:
        """Freeze what has been built."""
        return Graph(name, tuple(self.params), tuple(self.nodes), results, writes)


_INFERRED: dict[tuple, tuple[Type, tuple]] = {}  # with the operands, so that their ids stay theirs
_TYPES: dict[Type, Type] = {}
_MAX_INFERRED = 20_000


def _inferred(op: Op, args: tuple[Arg, ...], attrs: dict[str, object], items: tuple) -> Type:
    """`op.result_type`, remembered: a step that is traced again asks the same questions."""
    operands = [id(a.type) if type(a) is Value else (type(a), a) for a in args]
    key = (op.name, *operands, items)
    try:
        known = _INFERRED.get(key)
    except TypeError:  # an attribute without a hash: `result_type` says what is wrong with it
        return op.result_type(tuple(a.type if type(a) is Value else a for a in args), attrs)
    if known is None:
        types = tuple(a.type if type(a) is Value else a for a in args)
        found = op.result_type(types, attrs)
        known = _TYPES.setdefault(found, found), types  # one object, so that readers are known too
        if len(_INFERRED) >= _MAX_INFERRED:
            _INFERRED.clear()
        _INFERRED[key] = known
    return known[0]


def verify(graph: Graph) -> None:
    """Check SSA order, that every node's type is what `infer` gives, and the outputs' layouts."""
    known: set[Value] = set()
    numbers: set[int] = set()

    def define(value: Value) -> None:
        if value.id in numbers:
            raise InvalidGraph(reason=f"{value} is defined twice")
        numbers.add(value.id)
        known.add(value)

    for param in graph.params:
        define(param.value)
        _check_strides("input", param)
    for node in graph.nodes:
        for arg in node.inputs:
            if arg not in known:
                raise InvalidGraph(reason=f"{node.op.name} reads {arg} before its definition")
        types = tuple(a.type if isinstance(a, Value) else a for a in node.args)
        expected = (node.op.result_type(types, dict(node.attrs)),)
        found = tuple(out.type for out in node.outs)
        if found != expected:
            raise InvalidGraph(
                reason=f"{', '.join(map(repr, node.outs))} = {node.op.name} has types "
                f"{', '.join(map(str, found))}; infer gives {', '.join(map(str, expected))}"
            )
        for out in node.outs:
            define(out)
    for value in graph.outputs():
        if value not in known:
            raise InvalidGraph(reason=f"output {value} is not defined")
    for result in graph.results:
        _check_strides("result", result)
    _check_writes(graph)


def _check_strides(role: str, place: Param | Result) -> None:
    rank = len(place.value.type.shape)
    if place.strides is not None and len(place.strides) != rank:
        raise InvalidGraph(
            reason=f"{role} {place.value} of {rank} axes has strides {place.strides}"
        )


def _check_writes(graph: Graph) -> None:
    params = {p.value for p in graph.params}
    written: set[Value] = set()
    for write in graph.writes:
        if write.target not in params:
            raise InvalidGraph(reason=f"write to {write.target}, which is not an input")
        if write.target in written:
            raise InvalidGraph(reason=f"input {write.target} is written twice")
        written.add(write.target)
        if write.target.type != write.value.type:
            raise InvalidGraph(
                reason=f"write of {write.value.type} into an input of {write.target.type}"
            )
