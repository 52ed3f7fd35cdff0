"""A saved step for another device: the same graphs, with other devices in their types.

In: a SavedStep, and "cpu" or "cuda:0". Out: one whose tensors are there. Counters that the host
reads and writes stay on the CPU. On a GPU nothing looks at values that eager refuses on a CPU only,
as in any step there.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from tracejit.capture.effects.captured import Captured
from tracejit.capture.trace.draws import Draw, Event, Together
from tracejit.ir.graph import Graph, Node, Param, Result, Value, Write
from tracejit.ir.types import Type
from tracejit.saved.archive import Damaged
from tracejit.saved.record import SavedGenerator, SavedPlan, SavedStep


def moved(step: SavedStep, device: str | torch.device) -> SavedStep:
    """The step for a device. Raises Damaged where there is none of it there."""
    to = torch.device(device)
    if to.type not in ("cpu", "cuda"):
        raise Damaged(f"no plan is for {to}: only for cpu and cuda")
    to = f"cuda:{to.index or 0}" if to.type == "cuda" else "cpu"
    generators = tuple(_generator(generator, to) for generator in step.generators)
    return replace(step, generators=generators, plans=tuple(_plan(plan, to) for plan in step.plans))


def devices_of_state(step: SavedStep) -> dict[str, str]:
    """Where each tensor of the state lies, by name. Raises Damaged where plans differ in it."""
    found: dict[str, str] = {}
    for plan in step.plans:
        for place, spec in plan.tensors:
            if place.kind == "state" and found.setdefault(place.key, spec.device) != spec.device:
                raise Damaged(f"{place.key} is on {spec.device} and on {found[place.key]}")
    for name, grad in step.gradients.items():
        found.setdefault(grad, found.get(name, "cpu"))
    return found


def _generator(generator: SavedGenerator, to: str) -> SavedGenerator:
    if generator.device == to:
        return generator
    if generator.state is not None:
        raise Damaged(
            f"it draws from a generator of one's own on {generator.device}, whose state says "
            f"nothing on {to}"
        )
    return SavedGenerator(to, None)


def _plan(plan: SavedPlan, to: str) -> SavedPlan:
    stays = _of_the_host(plan)
    tensors = tuple(
        (place, spec if k in stays else replace(spec, device=to))
        for k, (place, spec) in enumerate(plan.tensors)
    )
    c = plan.captured
    outside = tuple(replace(node, graph=_graph(node.graph, to)) for node in c.effects.outside)
    cuts = tuple(replace(cut, graph=_graph(cut.graph, to)) for cut in c.cuts)
    captured = replace(
        c,
        cuts=cuts,
        graph=_graph(c.graph, to),
        effects=replace(c.effects, outside=outside),
        draws=tuple(_event(event, to) for event in c.draws),
        bounds=c.bounds if to == "cpu" else (),
        checks=_checks(c, to),
    )
    return replace(plan, tensors=tensors, captured=captured)


def _of_the_host(plan: SavedPlan) -> set[int]:
    """The tensors that only the host reads and writes: step counters of an optimizer."""
    c = plan.captured
    checks = () if c.checks is None else c.checks.sources
    cuts = [source for cut in c.cuts for source in cut.sources]
    in_graphs = {index for kind, index in (*c.sources, *checks, *cuts) if kind == "tensor"}
    numbers = {place.key for place in plan.scalars if place.kind == "item"}
    numbers |= {index for index, _ in c.effects.host_writes}
    return {k for k in numbers - in_graphs if plan.tensors[k][1].device == "cpu"}


def _checks(c: Captured, to: str):
    if c.checks is None or to != "cpu":
        return None
    return replace(c.checks, graph=_graph(c.checks.graph, to))


def _event(event: Event, to: str) -> Event:
    drawn = isinstance(event, (Draw, Together))
    return replace(event, type=_type(event.type, to)) if drawn else event


def _type(type: Type, to: str) -> Type:
    return type if type.is_host else replace(type, device=to)


def _graph(graph: Graph, to: str) -> Graph:
    """The graph with its tensors on a device."""
    known: dict[Value, Value] = {}

    def value(x: object) -> object:
        if not isinstance(x, Value):
            return x
        if x not in known:
            known[x] = Value(x.id, _type(x.type, to))
        return known[x]

    def node(n: Node) -> Node:
        attrs = []
        for name, x in n.attrs:
            if isinstance(x, Graph):
                x = _graph(x, to)
            attrs.append((name, to if name == "device" else x))
        args, outs = tuple(map(value, n.args)), tuple(map(value, n.outs))
        return Node(n.op, args, tuple(attrs), outs, n.where)

    return Graph(
        graph.name,
        tuple(Param(value(p.value), p.strides) for p in graph.params),
        tuple(map(node, graph.nodes)),
        tuple(Result(value(r.value), r.strides) for r in graph.results),
        tuple(Write(value(w.target), value(w.value)) for w in graph.writes),
    )
