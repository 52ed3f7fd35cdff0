"""Where the nodes of a step's graph belong: forward, backward or update; to which module.

What a trace has noted counts first (`capture.trace.location.Line`): derivative formulas and torch's
optimizers are known, and so is the module that was called. The rest is told from the graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from tracejit.ir.graph import Graph, Node, Value
from tracejit.pictures.picture import BACKWARD, FORWARD, UPDATE

Way = tuple[str, ...]

_LIKE = ("elementwise", "host", "source")  # what an update written by hand consists of


def phases(graph: Graph) -> dict[Value, str]:
    """The phase of each node's result."""
    marked = {n.out: getattr(n.where, "phase", "") for n in graph.nodes}
    if BACKWARD not in marked.values():
        return _by_hand(graph, marked)
    last = {w.value for w in graph.writes}
    readers = _readers(graph)
    after: set[Value] = set()  # computed of gradients, before something is updated by it
    for node in graph.nodes:
        if not marked[node.out] and any(
            marked.get(v) == BACKWARD or (v in after and v not in last) for v in node.inputs
        ):
            after.add(node.out)
    before: set[Value] = set()  # what derivatives are computed of
    for node in reversed(graph.nodes):
        out = node.out
        if not marked[out] and out not in last:
            ways = [r.out for r in readers.get(out, ())]
            if any(marked[v] == BACKWARD or v in before for v in ways):
                before.add(out)
    found: dict[Value, str] = {}
    for node in graph.nodes:
        out = node.out
        if marked[out]:
            found[out] = marked[out]
        elif out in after:
            found[out] = BACKWARD if out in before else UPDATE
        else:
            found[out] = FORWARD
    _pull(graph, found, marked, readers)
    return found


def _pull(
    graph: Graph,
    found: dict[Value, str],
    marked: Mapping[Value, str],
    readers: Mapping[Value, Sequence[Node]],
) -> None:
    """What stands behind the first derivative, in no module, and is there for updates alone is
    part of them: learning rates, the zeros of cleared gradients."""
    begun = next(i for i, n in enumerate(graph.nodes) if marked[n.out] == BACKWARD)
    returned = {r.value for r in graph.results}
    for node in reversed(graph.nodes[begun:]):
        out = node.out
        if found[out] == FORWARD and not _module(node) and out not in returned:
            ways = {found[r.out] for r in readers.get(out, ())}
            if ways <= {UPDATE}:
                found[out] = UPDATE


def _by_hand(graph: Graph, marked: Mapping[Value, str]) -> dict[Value, str]:
    """The phases of a step without derivatives of ours. An update that is written out is what is
    done element by element to something of a parameter's shape before it is written there. What is
    there for that, and not for the results, is the backward pass."""
    made = graph.producers()
    update = {v for v, phase in marked.items() if phase}
    for write in graph.writes:
        pending = [write.value]
        while pending:
            node = made.get(pending.pop())
            if node is None or node.out in update or _module(node):
                continue
            if node.op.family in _LIKE and node.out.type.shape in (write.target.type.shape, ()):
                update.add(node.out)
                pending += node.inputs
    forward = {r.value for r in graph.results}
    for node in reversed(graph.nodes):
        if node.out in forward:
            forward.update(node.inputs)
    readers, found = _readers(graph), {}
    for node in reversed(graph.nodes):
        ways = {found[r.out] for r in readers.get(node.out, ())}
        if node.out in forward or not update or not graph.results or _module(node):
            found[node.out] = FORWARD
        elif node.out in update:
            found[node.out] = UPDATE
        else:
            found[node.out] = BACKWARD if ways else FORWARD
    return found


def _readers(graph: Graph) -> dict[Value, list[Node]]:
    found: dict[Value, list[Node]] = {}
    for node in graph.nodes:
        for value in node.inputs:
            found.setdefault(value, []).append(node)
    return found


# ---- modules


def _module(node: Node) -> tuple[int, str, str, str] | None:
    return getattr(node.where, "module", None)


def module_of(node: Node, roots: Mapping[int, str]) -> tuple[Way, str]:
    """The way to the module that a node stands in, and that module's class."""
    module = _module(node)
    if module is None:
        return (), ""
    number, _, way, kind = module
    return (*roots[number].split("."), *(way.split(".") if way else ())), kind


def roots_of(graph: Graph, called: Mapping[Value, str]) -> dict[int, str]:
    """What the user's code calls the outermost modules, by their number: as the parameters are
    called that nodes of theirs read; the class where there are none."""
    votes: dict[int, Counter[str]] = {}
    classes: dict[int, str] = {}
    for node in graph.nodes:
        module = _module(node)
        if module is None:
            continue
        number, kind, way, _ = module
        classes.setdefault(number, kind)
        for name in filter(None, map(called.get, node.inputs)):
            head, dot, _ = name.partition(f".{way}." if way else name.rpartition(".")[2])
            if dot and head.rstrip("."):
                votes.setdefault(number, Counter())[head.rstrip(".")] += 1
    found: dict[int, str] = {}
    for number, kind in classes.items():
        name = votes[number].most_common(1)[0][0] if number in votes else kind
        found[number] = name if name not in found.values() else f"{name} ({number + 1})"
    return found


def owners_of(graph: Graph, called: Mapping[Value, str]) -> dict[Value, Way]:
    """Of what serves the update of one parameter alone, the way to it. Its gradient and what an
    optimizer keeps for it are called after it."""
    reached: dict[Value, set[str]] = {}
    for write in graph.writes:
        reached.setdefault(write.value, set()).add(owner(called.get(write.target, "")))
    for node in reversed(graph.nodes):
        here = reached.get(node.out, set())
        for value in node.inputs:
            reached.setdefault(value, set()).update(here)
    return {v: _way(next(iter(x))) for v, x in reached.items() if len(x) == 1 and x != {""}}


def owner(name: str) -> str:
    """`model.0.weight` of `model.0.weight.grad` and `optimizer.state[model.0.weight].exp_avg`."""
    _, state, rest = name.partition(".state[")
    if state:
        return rest.rpartition("]")[0]
    return name.removesuffix(".grad")


def _way(name: str) -> Way:
    return tuple(name.split("."))
