"""Dead code elimination."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from tracejit.ir.graph import Graph, Node, Value


def dce(graph: Graph) -> Graph:
    """Drop nodes whose results nobody reads, but for collectives, which do something besides."""
    ordered = (node.out for node in graph.nodes if node.is_ordered)
    return replace(graph, nodes=tuple(live(graph.nodes, (*graph.outputs(), *ordered))))


def live(nodes: Sequence[Node], wanted: Iterable[Value]) -> list[Node]:
    """The nodes that some values are computed by."""
    read = set(wanted)
    kept: list[Node] = []
    for node in reversed(nodes):
        if not read.isdisjoint(node.outs):
            read.update([a for a in node.args if a.__class__ is Value])
            kept.append(node)
    return kept[::-1]
