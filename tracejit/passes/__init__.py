"""Passes over the Graph, each a function Graph -> Graph, and `optimize`, which runs them in order.

fold.py      rules about constants
simplify.py  exact identities; the pass that applies both and merges equal nodes
rewrite.py   the engine: one forward sweep that reaches the normal form
dce.py       the pass that drops what nobody reads
cone.py      not in the pipeline: the part of a graph that some of its values need
"""

from __future__ import annotations

from collections.abc import Callable

from tracejit import knobs
from tracejit.ir.graph import Graph, verify
from tracejit.passes.dce import dce
from tracejit.passes.simplify import simplify

# Folding, identities and merging each make work for the others (a folded 1.0 makes x * 1.0, whose
# removal makes two nodes equal, which makes `where` of equal branches), so they share one sweep:
# run apart, they would need repeating until nothing changes. Only then is it known who is unread.
PIPELINE = (simplify, dce)


def optimize(graph: Graph, on_pass: Callable[[str, Graph], None] | None = None) -> Graph:
    """Run PIPELINE once and return the canonical graph.

    `on_pass(name, graph)` sees each pass's result, verified when knobs.verify() says so.
    """
    for run in PIPELINE:
        graph = run(graph)
        if knobs.verify():
            verify(graph)
        if on_pass is not None:
            on_pass(run.__name__, graph)
    return graph.canonical()
