"""Random numbers that a loop over time draws, in one memory.

In: the graph of a step, where its inputs come from, and what it does with generators. Out: the same
with one input for all draws of a place in a loop's body, whose rows they are. So a pass finds rows
of one tensor in what the repetitions read, and makes a loop of them (`passes/roll.py`). The order
in which numbers are drawn stays: a draw fills its row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tracejit.capture.trace.cuts import Source
from tracejit.capture.trace.draws import Draw, Event, Together
from tracejit.ir.graph import Arg, Builder, Graph, Node, Param, Value
from tracejit.ir.types import Type
from tracejit.passes.repeats import LEAST, find_runs
from tracejit.passes.rewrite import substituted, with_nodes
from tracejit.passes.roll import FEW, roll_up

Sources = tuple[Source, ...]
Events = tuple[Event, ...]


def draws_together(
    graph: Graph, sources: Sources, events: Events, host: Sequence[Node], next_id: int
) -> tuple[Graph, Sources, Events]:
    """The three with one input for what a loop reads row by row. `host` is the
    arithmetic of numbers, `next_id` that of a new value."""
    if len(graph.nodes) < FEW or sum(kind == "draw" for kind, _ in sources) < LEAST:
        return graph, sources, events
    groups = _groups(graph, sources, events, {n.out: n for n in host})
    if not groups or not find_runs(graph.nodes):
        return graph, sources, events
    found = _joined(graph, sources, events, groups, next_id)
    read = Counter(node.args[0] for node in roll_up(found[0]).nodes if node.op.name == "slice")
    params = zip(found[0].params, found[1], strict=True)
    wholes = {k: p.value for p, (of, k) in params if of == "draw"}
    looped = [rows for k, rows in enumerate(groups, len(events)) if read[wholes[k]] < LEAST]
    if looped == groups:
        return found
    if not looped:  # layers, say, which read weights of their own
        return graph, sources, events
    return _joined(graph, sources, events, looped, next_id)


def _groups(
    graph: Graph, sources: Sources, events: Events, host: Mapping[Value, Node]
) -> list[list[int]]:
    """Draws of the same numbers that are read first by the same line of the user's, in the same
    way: by their places among the events."""
    drawn = {p.value: k for p, (of, k) in zip(graph.params, sources, strict=True) if of == "draw"}
    found: dict[tuple, list[int]] = {}
    for node in graph.nodes:
        for at, arg in enumerate(node.args):
            k = drawn.pop(arg, None) if arg.__class__ is Value else None
            event = None if k is None else events[k]
            if isinstance(event, Draw) and event.fill != "randperm":
                numbers = tuple([_number(x, host) for x in event.numbers])
                kind = event.fill, numbers, event.type, event.strides, event.generator
                found.setdefault((node.op.name, str(node.where), at, *kind), []).append(k)
    return [sorted(x) for x in found.values() if len(x) >= LEAST]


def _number(x: Arg, host: Mapping[Value, Node]) -> object:
    """What a number is; equal ones are computed alike."""
    node = host.get(x) if x.__class__ is Value else None
    if node is None:
        return repr(x)
    return node.op.name, node.attrs, *(_number(a, host) for a in node.args)


def _joined(
    graph: Graph, sources: Sources, events: Events, groups: Sequence[Sequence[int]], next_id: int
) -> tuple[Graph, Sources, Events]:
    """The three with one input for each group, and its event, after all others."""
    values = {k: p for p, (of, k) in zip(graph.params, sources, strict=True) if of == "draw"}
    kept = dict(zip(graph.params, sources, strict=True))
    b = Builder(next_id)
    instead: dict[Value, Value] = {}
    more: list[Event] = []
    for rows in groups:
        one = events[rows[0]]
        shape = one.type.shape
        strides = values[rows[0]].strides
        whole = Together(
            tuple(rows),
            Type(one.type.dtype, (len(rows), *shape), one.type.device),
            (one.type.numel, *one.strides),
            one.generator,
        )
        param = Param(b.value(whole.type), None if strides is None else whole.strides)
        kept[param] = "draw", len(events) + len(more)
        more.append(whole)
        for at, k in enumerate(rows):
            del kept[values[k]]
            zeros, steps = (0,) * len(shape), (1,) * (1 + len(shape))
            row = b.slice(param.value, starts=(at, *zeros), stops=(at + 1, *shape), steps=steps)
            instead[values[k].value] = b.reshape(row, shape=shape)
    nodes = [*b.nodes, *(substituted(node, instead) for node in graph.nodes)]
    graph = with_nodes(replace(graph, params=tuple(kept)), nodes, instead)
    return graph, tuple(kept.values()), (*events, *more)
