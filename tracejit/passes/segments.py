"""Splitting a Graph where Python read values in the middle of a step.

`segments` takes the graph of a whole step and, for each value that is read early, its cone: the
graph of that value alone. Each cone becomes a graph of its own, which runs first; what it computes
and later ones need is a result of it and an input there. What costs nothing to say again (movement,
constants, host arithmetic) is said again instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tracejit.ir.graph import Graph, Node, Param, Result, Value

_FREE = frozenset({"movement", "source", "host"})


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a step: its graph, and where the inputs come from that earlier segments computed:
    per such param, (segment, result of that segment)."""

    graph: Graph
    carried: dict[Value, tuple[int, int]]


def segments(whole: Graph, cones: Sequence[Graph]) -> list[Segment]:
    """The segments of a step: one per cone, then the rest, which has the step's results and writes.

    The cones have one result each, in the order in which they were read, and share their values
    with the whole. A segment's first result is the value that is read.
    """
    owner: dict[Value, int] = {}  # values that a segment computes for later ones, if they ask
    wanted: list[dict[Value, int]] = []  # per segment: the values carried from it -> the result
    made: list[tuple[Graph, dict[Value, tuple[int, int]]]] = []
    for k, graph in enumerate((*cones, whole)):
        outputs = [r.value for r in graph.results] + [w.value for w in graph.writes]
        nodes, carried = _needed(graph, outputs, owner)
        places: dict[Value, tuple[int, int]] = {}
        for value in carried:
            results = wanted[owner[value]]
            places[value] = owner[value], results.setdefault(value, len(results))
        for node in nodes:
            if not _is_free(node):
                owner.setdefault(node.out, k)
        targets = {w.target for w in graph.writes}
        used = targets | {v for node in nodes for v in node.inputs} | set(outputs)
        params = tuple(p for p in graph.params if p.value in used)
        params += tuple(Param(v) for v in carried)
        part = Graph(graph.name, params, tuple(nodes), graph.results, graph.writes)
        wanted.append({r.value: i for i, r in enumerate(graph.results)})
        made.append((part, places))
    found = []
    for (graph, places), results in zip(made, wanted, strict=True):
        known = len(graph.results)
        more = tuple(Result(v) for v, i in results.items() if i >= known)
        part = Graph(graph.name, graph.params, graph.nodes, (*graph.results, *more), graph.writes)
        found.append(Segment(part, places))
    return found


def _is_free(node: Node) -> bool:
    return node.op.family in _FREE or node.op.name == "alias"


def _needed(
    graph: Graph, outputs: Sequence[Value], owner: dict[Value, int]
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
