"""Floats that Python computes anew on every call: `0.1 * 0.99**n` of a counter, `math.sqrt(step)`.

They reach the graph as literals, so each value would be a plan of its own. Once a few graphs differ
in nothing but the values of float literals, those that differ become runtime scalars of one plan.
It reruns the Python on every call: a replay cannot know what Python would compute.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import field, replace

from tracejit.capture.effects.captured import Captured, graph_key
from tracejit.errors import InvalidGraph
from tracejit.ir.graph import Builder, Graph, Node, Param, Value, next_id
from tracejit.ir.types import HOST_SCALAR
from tracejit.records import dataclass

_ENOUGH = 3  # plans of their own, before one is made for all values
_REMEMBERED = 64

Place = tuple[int, int]  # a node's position, and that of the operand


@dataclass(slots=True)
class _Family:
    """Graphs that differ in float literals only."""

    first: dict[Place, str]  # the literals of the first one, by repr: -0.0 and NaN count
    varying: set[Place] = field(default_factory=set)
    count: int = 0


class Literals:
    """What one compiled step remembers of the float literals of its graphs."""

    def __init__(self) -> None:
        self._families: OrderedDict[tuple, _Family] = OrderedDict()
        self._first: Graph | None = None  # a step's first graph, as long as it is the only one

    def generalize(self, captured: Captured) -> tuple[Captured, list[float]] | None:
        """Called for a graph without a plan: the same step with the literals that vary as runtime
        scalars, and the values of these in this call; None if they are to stay literals."""
        if captured.effects.outside or captured.checks:  # their graphs repeat the literals
            return None
        if not self._families:  # most steps have one graph, of which nothing need be known
            if self._first is None:
                self._first = captured.graph
                return None
            self._noted(self._first, _float_literals(self._first))
            self._first = None
        literals = _float_literals(captured.graph)
        family = self._noted(captured.graph, literals)
        family.varying |= {p for p, x in literals.items() if family.first[p] != repr(x)}
        if family.count <= _ENOUGH or not family.varying:
            return None
        chosen = [p for p in literals if p in family.varying]
        graph, values = _with_scalars(captured, chosen)
        first = len(captured.scalars)
        sources = tuple(("scalar", first + k) for k in range(len(chosen)))
        paths = tuple(("computed", f"literal {k}") for k in range(len(chosen)))
        general = replace(
            captured,
            graph=graph,
            scalars=captured.scalars + values,
            sources=captured.sources + sources,
            paths=captured.paths + paths,
            key=replace(captured.key, graph=graph_key(graph)),
        )
        return general, [literals[p] for p in chosen]

    def _noted(self, graph: Graph, literals: dict[Place, float]) -> _Family:
        blank = graph_key(_replaced(graph, dict.fromkeys(literals, 0.0)))
        family = self._families.setdefault(
            blank, _Family({p: repr(x) for p, x in literals.items()})
        )
        self._families.move_to_end(blank)
        if len(self._families) > _REMEMBERED:
            self._families.popitem(last=False)
        family.count += 1
        return family


def _float_literals(graph: Graph) -> dict[Place, float]:
    """The float literals among operands that may as well be runtime scalars."""
    return {
        (i, k): x
        for i, node in enumerate(graph.nodes)
        for k, x in enumerate(node.args)
        if type(x) is float and _may_vary(node, k)
    }


def _may_vary(node: Node, k: int) -> bool:
    types = [a.type if isinstance(a, Value) else a for a in node.args]
    types[k] = HOST_SCALAR
    try:
        return node.op.result_type(tuple(types), dict(node.attrs)) == node.out.type
    except InvalidGraph:
        return False


def _replaced(graph: Graph, operands: dict[Place, Value | float]) -> Graph:
    changed: dict[int, list] = {}
    for (i, k), operand in operands.items():
        changed.setdefault(i, list(graph.nodes[i].args))[k] = operand
    nodes = (
        replace(node, args=tuple(changed[i])) if i in changed else node
        for i, node in enumerate(graph.nodes)
    )
    return replace(graph, nodes=tuple(nodes))


def _with_scalars(captured: Captured, places: list[Place]) -> tuple[Graph, tuple[Value, ...]]:
    """The graph with runtime scalars, as further inputs, in place of literals. They are none of the
    step's values: numbers that only results depend on are not in the graph."""
    graph = captured.graph
    made = (v for n in captured.host_nodes for v in n.outs)
    new = Builder(next_id([*graph.values(), *captured.scalars, *made])).value
    values = tuple(new(HOST_SCALAR) for _ in places)
    graph = _replaced(graph, dict(zip(places, values, strict=True)))
    return replace(graph, params=(*graph.params, *map(Param, values))), values
