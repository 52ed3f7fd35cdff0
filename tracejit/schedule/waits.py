"""What waits for what, though it does not read it: see `ir/ops/order.py`.

In: a Graph and its Analysis. Out: for each task that is computed of an `after`, the values that are
to be there first. That is about memory alone: what is computed is right in any order.
"""

from __future__ import annotations

from tracejit.ir.graph import Graph
from tracejit.schedule.tasks import Analysis

NOTHING: frozenset[int] = frozenset()


def waits(graph: Graph, analysis: Analysis) -> dict[int, frozenset[int]]:
    """By the value of a task, the values (of tasks) that it waits for."""
    if all(node.op.name != "after" for node in graph.nodes):
        return {}
    passed: dict[int, frozenset[int]] = {}  # by value, for those who read it
    found: dict[int, frozenset[int]] = {}
    for node in graph.nodes:
        what = NOTHING.union(*(passed.get(v.id, NOTHING) for v in node.inputs))
        if node.op.name == "after":
            origin = analysis.origins.get(analysis.resolve(node.args[1]).id)
            if origin is not None and origin.main is not None:
                what |= {origin.main.id}
        out = analysis.resolve(node.out)
        if not what:
            continue
        if node.op.name != "after" and analysis.is_task(out):
            found[out.id] = what
        else:
            passed[node.out.id] = what
    return found
