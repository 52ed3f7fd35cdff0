"""The part of a Graph that some of its values need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tracejit.ir.graph import Graph, Result, Value
from tracejit.passes.dce import live


def cone(graph: Graph, values: Sequence[Value], name: str) -> tuple[Graph, tuple[int, ...]]:
    """The graph that computes just `values`, and which of the params of `graph` it has, in order.

    Its results are the values, in fresh memory, and it writes nothing. What it reads of a param is
    what the param holds before the step, as everywhere in a graph.
    """
    nodes = tuple(live(graph.nodes, values))
    alone = replace(graph, name=name, nodes=nodes, results=tuple(map(Result, values)), writes=())
    read = {a for node in alone.nodes for a in node.inputs}.union(values)
    kept = tuple(i for i, p in enumerate(graph.params) if p.value in read)
    return replace(alone, params=tuple(graph.params[i] for i in kept)), kept
