"""Checkpointed regions: what a backward reads of one is computed again, and kept nowhere between.

In: the nodes of a step, and for each region that a backward comes to a `Revisit`. Out: the nodes
with copies of some of the region's, which stand before the first node of its backward. They read
what comes into the region by `after`, so no later pass merges them with what they are copies of.

Not in the pipeline: capture calls `computed_again` when a backward has been emitted; `kept` undoes
it, for steps in which nothing is to be computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import field, replace

from tracejit.ir.graph import Arg, Graph, Node, Value
from tracejit.ir.ops import OPS
from tracejit.ir.types import Type
from tracejit.passes.rewrite import substituted
from tracejit.records import dataclass

_KEPT_WITH_WEIGHTS = ("alias", "cast")  # beside movement: a weight is cast once in a step
_PRODUCTS = ("contraction", "attention")


@dataclass(slots=True)
class Revisit:
    """A backward comes to a region: whose values are numbered from `first` up to `stop`.

    start, end: the nodes of its backward, by their positions. trigger: a value that is there when
    that begins. products: products of matrices are kept.
    """

    first: int
    stop: int
    start: int
    end: int
    trigger: Value
    products: bool = False


@dataclass(slots=True)
class Copies:
    """What `computed_again` has made: the copies of nodes, and what they are copies of; and what
    was kept for them instead of what they compute."""

    of: dict[Value, Value] = field(default_factory=dict)
    instead: dict[Value, None] = field(default_factory=dict)  # no longer read by the backward
    inputs: dict[Value, None] = field(default_factory=dict)


def computed_again(
    nodes: Sequence[Node],
    revisits: Iterable[Revisit],
    weights: Collection[Value],
    new: Callable[[Type], Value],
    line: Callable[[str], str] = str,
) -> tuple[list[Node], Copies]:
    """The nodes, with what the revisits compute again. They are in the order in which they began;
    of nested regions the outer one's comes first. `weights`: params that nothing is gained by
    waiting for; `new` makes a value, `line` says where a copy comes from."""
    found, copies = list(nodes), Copies()
    made = {out: node for node in nodes for out in node.outs}
    pending = list(revisits)
    while pending:  # the last one first: what it computes again may be read from one around it
        revisit = pending.pop()
        region = _Region(revisit, made, weights, new)
        span = found[revisit.start : revisit.end]
        wanted = region.wanted(span)
        if not wanted:
            continue
        before = [n for n in found[: revisit.start] if n.out in wanted]
        again = region.copied(before, line)
        span = [substituted(node, region.instead) for node in span]
        made |= {out: node for node in (*again, *span) for out in node.outs}
        found[revisit.start : revisit.end] = again + span
        copies.of |= {copy: value for value, copy in region.instead.items()}
        copies.instead |= dict.fromkeys(region.instead)
        copies.inputs |= dict.fromkeys(region.late)
        for other in pending:
            if other.end > revisit.start:
                other.end += len(again)
    return found, copies


class _Region:
    """One region, as it is computed again."""

    def __init__(
        self,
        revisit: Revisit,
        made: Mapping[Value, Node],
        weights: Collection[Value],
        new: Callable[[Type], Value],
    ):
        self.revisit, self.made, self.weights, self.new = revisit, made, weights, new
        self.instead: dict[Value, Value] = {}  # the copies
        self.late: dict[Value, Value] = {}  # what comes into the region, when it is read again
        self._shared: dict[Value, bool] = {}

    def wanted(self, span: Iterable[Node]) -> set[Value]:
        """The values of the region that these nodes need."""
        pending = [v for node in span for v in node.inputs]
        found: set[Value] = set()
        while pending:
            value = pending.pop()
            if value not in found and self._is_copied(value):
                found.add(value)
                pending += self.made[value].inputs
        return found

    def _is_copied(self, value: Value) -> bool:
        node = self.made.get(value)
        if node is None or not self.revisit.first <= value.id < self.revisit.stop:
            return False
        kept = node.is_ordered or self.revisit.products and node.op.family in _PRODUCTS
        return not kept and not self._is_shared(value)

    def _is_shared(self, value: Value) -> bool:
        """Whether a value is there all the time, or costs nothing: a weight, also a cast one, a
        constant, or a number of the host."""
        known = self._shared.get(value)
        if known is None:
            node = self.made.get(value)
            if value.type.is_host or node is None:
                known = value.type.is_host or value in self.weights
            else:
                free = node.op.family == "movement" or node.op.name in _KEPT_WITH_WEIGHTS
                known = not node.inputs or free and all(map(self._is_shared, node.inputs))
            self._shared[value] = known
        return known

    def copied(self, nodes: Iterable[Node], line: Callable[[str], str]) -> list[Node]:
        """Copies of nodes, and before them what they read from outside of the region."""
        after: list[Node] = []
        again: list[Node] = []

        def use(arg: Arg) -> Arg:
            if not isinstance(arg, Value):
                return arg
            if arg in self.instead:
                return self.instead[arg]
            if self._is_shared(arg) or arg == self.revisit.trigger:
                return arg
            if arg not in self.late:
                self.late[arg] = out = self.new(arg.type)
                args = (arg, self.revisit.trigger)
                after.append(Node(OPS["after"], args, (), (out,), line(where)))
            return self.late[arg]

        for node in nodes:
            where = node.where
            args = tuple(map(use, node.args))
            outs = tuple(self.new(out.type) for out in node.outs)
            again.append(replace(node, args=args, outs=outs, where=line(where)))
            self.instead.update(zip(node.outs, outs, strict=True))
        return after + again


def computed(node: Node) -> int:
    """The bytes that a node computes."""
    free = node.op.family in ("movement", "source", "host", "order") or node.op.name == "alias"
    return 0 if free else node.out.type.nbytes


def kept(graph: Graph) -> Graph:
    """The graph in which nothing waits: what would be computed again is kept, as passes merge it
    with what it is a copy of."""
    alias = OPS["alias"]
    if all(node.op.name != "after" for node in graph.nodes):
        return graph
    nodes = tuple(
        replace(node, op=alias, args=node.args[:1]) if node.op.name == "after" else node
        for node in graph.nodes
    )
    return replace(graph, nodes=nodes)
