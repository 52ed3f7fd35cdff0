"""Splitting a Graph where Python reads values in the middle of a step.

`segments` takes the graph of a whole step and, for each value that is read early, its cone: the
graph of that value alone. Each cone becomes a segment, which runs first; what it computes and later
segments need is carried over. What costs nothing to say again (movement, constants, host
arithmetic) is said again instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tracejit.ir.graph import Graph, Node, Param, Value
from tracejit.records import dataclass

_FREE = frozenset({"movement", "source", "host"})


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a step: its graph, and which earlier segment computes each value that is carried
    over: these are its last params, in this order."""

    graph: Graph
    carried: dict[Value, int]


def segments(whole: Graph, cones: Sequence[Graph]) -> list[Segment]:
    """The segments of a step: one per cone, with its one result; then the rest, with the step's
    results and writes. The cones are in the order in which their values are read, and share their
    values with the whole."""
    owner: dict[Value, int] = {}  # what a segment computes and later ones may ask for
    found = []
    for k, graph in enumerate((*cones, whole)):
        outputs = set(graph.outputs())
        ordered = {node.out for node in graph.nodes if node.is_ordered}
        nodes, carried = _needed(graph, outputs | ordered, owner)
        for node in nodes:
            if not _is_free(node):
                owner[node.out] = k
        used = outputs | {v for node in nodes for v in node.inputs}
        used |= {w.target for w in graph.writes}
        params = [p for p in graph.params if p.value in used] + [Param(v) for v in carried]
        part = replace(graph, params=tuple(params), nodes=tuple(nodes))
        found.append(Segment(part, {v: owner[v] for v in carried}))
    return found


def _is_free(node: Node) -> bool:
    return node.op.family in _FREE or node.op.name == "alias"


def _needed(
    graph: Graph, outputs: set[Value], owner: dict[Value, int]
) -> tuple[list[Node], list[Value]]:
    """The nodes that compute the outputs, and the values that earlier segments have for them."""
    live, nodes, carried = set(outputs), [], []
    for node in reversed(graph.nodes):
        if node.out not in live:
            continue
        if node.out in owner:
            carried.append(node.out)
        else:
            live.update(node.inputs)
            nodes.append(node)
    return nodes[::-1], carried[::-1]
