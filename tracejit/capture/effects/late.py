"""Which values that Python reads stand behind what, and which may be read after the plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tracejit.capture.trace.scalars import Path
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Node, Value

Behind = Mapping[object, frozenset[int]]

_NEVER_RAISES = frozenset({"host_add", "host_sub", "host_mul", "host_neg", "host_abs", "host_f32"})


def cuts_behind(
    scalars: Iterable[Value], paths: Iterable[Path], nodes: Iterable[Node]
) -> dict[object, frozenset[int]]:
    """The runtime scalars that are cuts, and all host values that depend on some: on which."""
    behind: dict[object, frozenset[int]] = {}
    for value, path in zip(scalars, paths, strict=True):
        if path[0] == "cut":
            behind[value] = frozenset({path[1]})
    if behind:
        for node in nodes:
            if node.op.family == "host" and (of := among(behind, node.args)):
                behind[node.out] = of
    return behind


def among(behind: Behind, values: Iterable[object]) -> frozenset[int]:
    """The cuts that any of the values depends on."""
    return frozenset().union(*(behind.get(v, ()) for v in values))


def late_cuts(t: Trace) -> tuple[int, ...]:
    """The cuts that nothing depends on but what the step returns or stores: no decision, no kernel,
    no draw, no arithmetic that may raise. They are results of the plan: `return loss.item()` needs
    no second one."""
    if not t.cuts:
        return ()
    scalars = [value for value, _ in t.scalars.params]
    behind = cuts_behind(scalars, t.scalars.paths, t.b.nodes)
    early = {k for k, cut in enumerate(t.cuts) if cut.count is not None}
    for node in t.b.nodes:
        if node.op.name not in _NEVER_RAISES:
            early |= among(behind, node.args)
    for event in t.draws.events:
        early |= among(behind, event.numbers)
    for p in t.scalars.predicates:
        early |= among(behind, (p.left, p.right))
    return tuple(k for k in range(len(t.cuts)) if k not in early)
