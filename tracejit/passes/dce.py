"""Dead code elimination."""

from __future__ import annotations

from dataclasses import replace

from tracejit.ir.graph import Graph, Node, Value


def dce(graph: Graph) -> Graph:
    """Drop nodes whose results nobody reads."""
    live = set(graph.outputs())
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if not live.isdisjoint(node.outs):
            live.update([a for a in node.args if a.__class__ is Value])
            kept.append(node)
    return replace(graph, nodes=tuple(reversed(kept)))
