"""Which values that Python reads stand behind what, and which may be read after the plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tracejit.capture.effects.effects import Effects, HostSlot
from tracejit.capture.trace.scalars import Path
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Arg, Node, Value

Behind = Mapping[object, frozenset[int]]

_NEVER_RAISES = frozenset({"host_add", "host_sub", "host_mul", "host_neg", "host_abs", "host_f32"})


def cuts_behind(
    scalars: Sequence[Value],
    paths: Sequence[Path],
    nodes: Sequence[Node],
    callbacks: Sequence[Sequence[Arg]] = (),
) -> dict[object, frozenset[int]]:
    """The runtime scalars that are cuts, and all host values that depend on some: on which.

    callbacks: per callback, the host values among its arguments. What it leaves depends on these,
        and on those of all callbacks before it.
    """
    behind: dict[object, frozenset[int]] = {}
    for value, path in zip(scalars, paths, strict=True):
        if path[0] == "cut":
            behind[value] = frozenset({path[1]})
    if not behind:
        return behind
    _go_on(behind, nodes)
    for n, of in enumerate(cuts_of_callbacks(behind, callbacks)):
        left = [v for v, path in zip(scalars, paths, strict=True) if path[:2] == ("after", n)]
        if of and left:
            behind |= dict.fromkeys(left, of)
            _go_on(behind, nodes)
    return behind


def cuts_of_callbacks(
    behind: Behind, callbacks: Sequence[Sequence[Arg]]
) -> Iterable[frozenset[int]]:
    """The cuts that have to be read before each callback may run."""
    so_far: frozenset[int] = frozenset()
    for arguments in callbacks:
        so_far |= among(behind, arguments)
        yield so_far


def _go_on(behind: dict[object, frozenset[int]], nodes: Iterable[Node]) -> None:
    for node in nodes:
        if node.op.family == "host" and (of := among(behind, node.args)):
            behind[node.out] = of


def among(behind: Behind, values: Iterable[object]) -> frozenset[int]:
    """The cuts that any of the values depends on."""
    return frozenset().union(*(behind.get(v, ()) for v in values))


def late_cuts(t: Trace, effects: Effects) -> tuple[int, ...]:
    """The cuts that nothing depends on but what the step returns or stores: no decision, no kernel,
    no draw, no arithmetic that may raise. They are results of the plan: `return loss.item()` needs
    no second one. What a callback that is given such a value leaves may be returned or stored in
    Python's objects."""
    if not t.cuts:
        return ()
    scalars = [value for value, _ in t.scalars.params]
    callbacks = [[effects.host[i] for _, i in places] for places in effects.callbacks]
    behind = cuts_behind(scalars, t.scalars.paths, t.b.nodes, callbacks)
    early = {k for k, cut in enumerate(t.cuts) if cut.count is not None}
    for node in t.b.nodes:
        if node.op.name not in _NEVER_RAISES:
            early |= among(behind, node.args)
    for event in t.draws.events:
        early |= among(behind, event.numbers)
    for p in t.scalars.predicates:
        early |= among(behind, (p.left, p.right))
    if any(callbacks):
        needed = cuts_of_callbacks(behind, callbacks)
        for callback, of in zip(t.hyperparameters.callbacks, needed, strict=True):
            if not callback.of_torch_alone:  # it may turn out that a replay cannot make the call
                early |= of
        left = left_by_callbacks(scalars, t.scalars.paths, t.b.nodes, behind)
        early |= among(left, _made(effects))
    return tuple(k for k in range(len(t.cuts)) if k not in early)


def left_by_callbacks(
    scalars: Sequence[Value], paths: Sequence[Path], nodes: Sequence[Node], behind: Behind
) -> dict[object, frozenset[int]]:
    """What callbacks leave that are given values of tensors, and all host values that depend on
    it: on which cuts."""
    found = {
        value: behind[value]
        for value, path in zip(scalars, paths, strict=True)
        if path[0] == "after" and value in behind
    }
    if found:
        _go_on(found, nodes)
    return found


def behind_callbacks(
    scalars: Sequence[Value], paths: Sequence[Path], nodes: Sequence[Node]
) -> set[object]:
    """What callbacks leave, and all host values that depend on it."""
    found: set[object] = {
        value for value, path in zip(scalars, paths, strict=True) if path[0] == "after"
    }
    for node in nodes if found else ():
        if node.op.family == "host" and not found.isdisjoint(node.args):
            found.update(node.outs)
    return found


def _made(effects: Effects) -> list[Arg]:
    """The host results that tensors are made of or written with."""
    used = {i for _, i in (*effects.host_writes, *effects.hosts)}
    used.update(i for node in effects.outside for i in node.hosts)
    used.update(m.offset.index for m in effects.made if isinstance(m.offset, HostSlot))
    return [effects.host[i] for i in used]
