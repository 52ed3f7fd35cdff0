"""Passes over the Graph, each a function Graph -> Graph, and `optimize`, which runs them in order.

roll.py      the pass that makes loops of bodies that are repeated
repeats.py   where they are; columns.py, rows.py, totals.py: what they read, and what they add to
rolled.py    what stands in their place; ladders.py: in that of stacks of their results
fold.py      rules about constants
simplify.py  exact identities; the pass that applies both and merges equal nodes
rewrite.py   the engine: one forward sweep that reaches the normal form
dce.py       the pass that drops what nobody reads
attention.py the pass that makes primitives of attention that is written out
buckets.py   the pass that puts reductions over ranks together
vocabulary.py  the pass that computes logits of a large vocabulary part by part
cone.py      not in the pipeline: the part of a graph that some of its values need
checkpoints.py  not in the pipeline either: checkpointed regions, computed again for a backward
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tracejit import knobs
from tracejit.ir.graph import Graph, Node, verify
from tracejit.passes.attention import find_attention
from tracejit.passes.buckets import put_in_buckets
from tracejit.passes.dce import dce
from tracejit.passes.roll import roll_up
from tracejit.passes.simplify import simplify
from tracejit.passes.vocabulary import split_rows

# Folding, identities and merging each make work for the others (a folded 1.0 makes x * 1.0, whose
# removal makes two nodes equal, which makes `where` of equal branches), so they share one sweep:
# run apart, they would need repeating until nothing changes. Only then is it known who is unread,
# and only of what is left whether a row leaves the place where it is computed.
# What is repeated becomes a loop before all that, so that no other pass meets it more than once.
PIPELINE = (roll_up, simplify, dce, find_attention, split_rows, put_in_buckets)


def optimize(graph: Graph, on_pass: Callable[[str, Graph], None] | None = None) -> Graph:
    """Run PIPELINE once and return the canonical graph.

    `on_pass(name, graph)` sees each pass's result, verified when knobs.verify() says so. The bodies
    of loops come after `roll_up`, which makes some, and before the others.
    """
    for run in PIPELINE:
        graph = run(graph)
        if knobs.verify():
            verify(graph)
        if on_pass is not None:
            on_pass(run.__name__, graph)
        if run is roll_up:
            graph = _with_bodies(graph)
    return graph.canonical()


def _of_body(graph: Graph) -> Graph:
    """The same for the body of a loop; it has no loop itself."""
    for run in PIPELINE[1:]:
        graph = run(graph)
        if knobs.verify():
            verify(graph)
    return graph.canonical()


def _with_bodies(graph: Graph) -> Graph:
    """The graph with the bodies of its loops optimized."""

    def changed(node: Node) -> Node:
        attrs = ((k, _of_body(v) if isinstance(v, Graph) else v) for k, v in node.attrs)
        return replace(node, attrs=tuple(attrs))

    if not any(node.op.family == "loop" for node in graph.nodes):
        return graph
    nodes = tuple(changed(node) if node.op.family == "loop" else node for node in graph.nodes)
    return replace(graph, nodes=nodes)
