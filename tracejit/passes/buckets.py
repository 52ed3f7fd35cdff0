"""Reductions put together: many small all_reduces of one kind become a few larger ones.

    for p in model.parameters(): dist.all_reduce(p.grad)

is one message for each parameter, in an order in which the last gradient to come goes first.
Reductions that follow each other and do not depend on each other are one run: no rank can tell in
which order they are made. They are put in buckets in the order in which their operands are
computed, the first bucket small, so that each starts while others are still computed. All ranks do
this alike, as their runs are alike; where they are not, they raise before anything is sent: `of`
says which reductions of the step a bucket holds, and in which order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tracejit.ir.graph import Builder, Graph, Node, Value, next_id
from tracejit.passes.rewrite import substituted, with_nodes

FIRST = 1 << 20  # bytes of the first bucket, as DistributedDataParallel has them
OTHER = 25 << 20


def put_in_buckets(graph: Graph) -> Graph:
    """Make buckets of reductions that do not depend on each other."""
    if sum(map(_is_alone, graph.nodes)) < 2:
        return graph
    return _Buckets(graph).run()


def _is_alone(node: Node) -> bool:
    """Whether a node is a reduction of one tensor, of no module's gradients in particular."""
    if not node.is_ordered or node.op.name != "all_reduce" or len(node.args) != 1:
        return False
    return not dict(node.attrs).get("of")


def _kind(node: Node) -> tuple:
    attrs = dict(node.attrs)
    return attrs["by"], attrs["group"], node.out.type.dtype, node.out.type.device


class _Buckets:
    def __init__(self, graph: Graph):
        self.graph = graph
        self.b = Builder(next_id(graph.values()))
        self.nodes: list[Node] = []
        self.at: dict[Value, int] = {}  # where a value is computed
        self.instead: dict[Value, Value] = {}
        self.open: list[Node] = []  # a run of reductions
        self.waiting: list[Node] = []  # that depend on one of them
        self.behind: set[Value] = set()  # what all of these compute
        self.merged = False

    def run(self) -> Graph:
        for position, node in enumerate(self.graph.nodes):
            self.at.update(dict.fromkeys(node.outs, position))
            depends = not self.behind.isdisjoint(node.inputs)
            if node.is_ordered:
                joins = _is_alone(node) and not depends
                if self.open and not (joins and _kind(node) == _kind(self.open[0])):
                    self._close()
                if _is_alone(node):
                    self.open.append(node)
                    self.behind.update(node.outs)
                    continue
            elif depends:
                self.waiting.append(node)
                self.behind.update(node.outs)
                continue
            self.nodes.append(self._now(node))
        self._close()
        if not self.merged:
            return self.graph
        return with_nodes(self.graph, self.nodes, self.instead)

    def _now(self, node: Node) -> Node:
        return substituted(node, self.instead) if self.instead else node

    def _close(self) -> None:
        """The run is over: its buckets, and what has waited for them."""
        numbers = [node.attr("number") for node in self.open]
        order = sorted(self.open, key=lambda node: self.at.get(node.args[0], -1))
        for bucket, number in zip(_cut(order), numbers, strict=False):
            self._emit(bucket, number)
        self.nodes += [self._now(node) for node in self.waiting]
        self.open, self.waiting, self.behind = [], [], set()

    def _emit(self, bucket: Sequence[Node], number: int) -> None:
        first = bucket[0]
        attrs = {**dict(first.attrs), "number": number}
        numbers = [node.attr("number") for node in bucket]
        if numbers != [number]:  # which they are is compared by the ranks: their order is no other
            attrs["of"] = ",".join(map(str, numbers))
        if len(bucket) == 1:
            self.nodes.append(replace(self._now(first), attrs=tuple(attrs.items())))
            return
        self.merged = True
        self.b.line = first.where
        operands = [self.instead.get(node.args[0], node.args[0]) for node in bucket]
        flat, at = self.b.emit(first.op, *operands, **attrs), 0
        for node in bucket:
            count = node.out.type.numel
            part = self.b.slice(flat, starts=(at,), stops=(at + count,), steps=(1,))
            self.instead[node.out] = part
            at += count
        self.nodes += self.b.nodes
        self.b.nodes.clear()


def _cut(run: Sequence[Node]) -> list[list[Node]]:
    """Reductions in buckets, each full when it has reached its size."""
    found: list[list[Node]] = []
    size = 0
    for node in run:
        if not found or size >= (FIRST if len(found) == 1 else OTHER):
            found.append([])
            size = 0
        found[-1].append(node)
        size += node.out.type.nbytes
    return found
