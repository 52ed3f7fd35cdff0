"""Activations that are made again for a backward instead of being kept for it.

In: a Graph. A product over windows in the backward (the gradient of a convolution's weights) reads
what a normalization has made of an earlier product, and that product is kept for the gradient of
the normalization anyway. Then the step keeps the product alone: what has been made of it with one
number for each channel is made once more when the first of those gradients is wanted. Out: the
graph with such nodes twice. The copies read the product by `after` (`ir/ops/order.py`).

`recompute.py` has what kernels compute again for themselves. A product reads its operand at many
points, so here the operand is stored twice, and memory is saved in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from tracejit.ir.graph import Arg, Builder, Graph, Node, Value, next_id
from tracejit.ir.ops import OPS
from tracejit.schedule.tasks import CHEAP_LIMIT, node_cost

LEAST = 1 << 16  # bytes of an activation that it is worth while for
SMALL = 8  # times smaller than an activation are the numbers that it is made with


def made_again(graph: Graph) -> Graph:
    """The graph in which such activations are made twice."""
    if all(node.op.name != "window" for node in graph.nodes):
        return graph
    return _Again(graph).run()


class _Again:
    def __init__(self, graph: Graph):
        self.graph = graph
        self.nodes = list(graph.nodes)
        self.at = {out: i for i, node in enumerate(graph.nodes) for out in node.outs}
        self.readers: dict[Value, list[int]] = {}
        for i, node in enumerate(graph.nodes):
            for value in dict.fromkeys(node.inputs):
                self.readers.setdefault(value, []).append(i)
        self.kept = {x.value for x in (*graph.results, *graph.writes)}
        self.b = Builder(next_id(graph.values()))
        self.copies: dict[Value, Node] = {}
        self.spans: list[tuple[int, int]] = []  # of the nodes that read copies and what these await

    def run(self) -> Graph:
        for root, (start, read) in self._found().items():
            self._copy(root, start, read)
        if not self.copies:
            return self.graph
        nodes = _in_order(self.nodes, self.copies)
        return replace(self.graph, nodes=nodes)

    def _found(self) -> dict[Value, tuple[int, Value]]:
        """By product, the node after which what is made of it is made again, and what is read."""
        found: dict[Value, tuple[int, Value]] = {}
        for node in self.graph.nodes:
            if node.op.family != "contraction":
                continue
            for arg, other in (node.args, node.args[::-1]):
                path = self._path(arg)
                if path is None or (start := self.at.get(self._behind(other))) is None:
                    continue
                root, made = path
                worth = made.type.nbytes >= LEAST and root not in found
                if worth and self._depends(start, made) and self._is_kept(root, made, start):
                    found[root] = start, arg
        return found

    def _path(self, value: Value) -> tuple[Value, Value] | None:
        """What a product reads through windows: the value that it is made of by operations of one
        tensor, and what is stored of these, which is the last one with numbers of its own."""
        made, windows = None, False
        while (step := self._step(value)) is not None:
            node = self.nodes[self.at[value]]
            windows = windows or node.op.name == "window"
            if made is None and node.op.family == "elementwise" and len(node.inputs) > 1:
                made = value
            value = step
        return (value, made) if windows and made is not None else None

    def _step(self, value: Value) -> Value | None:
        """The one tensor of its size that a value is made of, element by element."""
        at = self.at.get(value)
        if at is None or value in self.kept:
            return None
        node = self.nodes[at]
        if node.op.name == "alias" or (node.op.family == "movement" and node.op.name != "unwindow"):
            return node.args[0]
        if node.op.family != "elementwise":
            return None
        large = {a: None for a in node.inputs if not a.type.is_host and not self._is_small(a, node)}
        return next(iter(large)) if len(large) == 1 else None

    def _is_small(self, value: Value, reader: Node) -> bool:
        return self._behind(value).type.numel * SMALL <= reader.out.type.numel

    def _behind(self, value: Arg) -> Arg:
        """What a value is a movement of."""
        while isinstance(value, Value) and (at := self.at.get(value)) is not None:
            if self.nodes[at].op.family != "movement":
                break
            value = self.nodes[at].args[0]
        return value

    def _depends(self, at: int, value: Value) -> bool:
        """Whether what a node computes depends on a value."""
        found = {value}
        for node in self.nodes[self.at[value] + 1 : at + 1]:
            if any(v in found for v in node.inputs):
                found.update(node.outs)
        return any(out in found for out in self.nodes[at].outs)

    def _is_kept(self, root: Value, made: Value, start: int) -> bool:
        """Whether what is behind an activation is read after `start` in any case."""
        value = made
        while value is not root:
            value, above = self._step(value), value
            path = self.at[above]
            if any(i > start and i != path for i in self.readers[value]):
                return True
        return root in self.kept or root not in self.at

    def _copy(self, root: Value, start: int, read: Value) -> None:
        """Make once more what is made of a value, for those who read it after `start`, unless that
        takes too many operations for what is `read`."""
        made = self._made_of(root, start)
        while self.at[read] > start:
            read = self._step(read)
        if read not in made:
            return
        trigger = self._trigger(made, start)
        if any(first <= start < last for first, last in self.spans):
            return  # what comes before `start` may wait for what comes after it
        early = self._before(trigger, start)
        late = {
            v: [i for i in self.readers.get(v, ()) if i > start and i not in early] for v in made
        }
        changed = {i for readers in late.values() for i in readers}
        if not changed:
            return
        wanted = {v for v in made if late[v]}
        pending = list(wanted)
        while pending:
            below = self._step(pending.pop())
            if below in made and below not in wanted:
                wanted.add(below)
                pending.append(below)
        out = self.b.value(root.type)
        where = self.nodes[min(self.readers[root])].where
        self.copies[out] = Node(OPS["after"], (root, trigger), (), (out,), where)
        instead = {root: out}
        for value in sorted(wanted, key=self.at.__getitem__):
            instead[value] = out = self.b.value(value.type)
            self.copies[out] = _reading(self.nodes[self.at[value]], instead, (out,))
        del instead[root]
        for i in changed:
            self.nodes[i] = _reading(self.nodes[i], instead, self.nodes[i].outs)
        self.spans.append((min(changed), self.at[trigger]))

    def _trigger(self, made: Iterable[Value], start: int) -> Value:
        """What the copies wait for: the first gradient that meets them element by element. So they
        are made where it is read. Else it is what meets them in the product."""
        late = set(made)
        for node in self.nodes[start + 1 :]:
            if not any(v in late for v in node.inputs):
                continue
            if self._step(node.out) in late:
                late.add(node.out)
            elif node.op.family == "elementwise":
                others = [v for v in node.inputs if v not in late and not self._is_small(v, node)]
                found = [self._behind(v) for v in others]
                if found and all(self.at.get(v, -1) >= start for v in found):
                    return max(found, key=self.at.__getitem__)
        return self.nodes[start].out

    def _before(self, trigger: Value, start: int) -> set[int]:
        """The nodes after `start` that a value depends on, and its own."""
        found: set[int] = set()
        pending, seen = [trigger], {trigger}
        while pending:
            value = pending.pop()
            at = self.at.get(value, -1)
            node = self.nodes[at] if at > start else self.copies.get(value)
            if at > start:
                found.add(at)
            if node is not None:
                pending += [v for v in node.inputs if v not in seen]
                seen.update(node.inputs)
        return found

    def _made_of(self, root: Value, start: int) -> dict[Value, int]:
        """What is made of a value before `start`, with the operations that it takes."""
        made = {root: 0}
        pending = [root]
        while pending:
            value = pending.pop()
            for i in self.readers.get(value, ()):
                node = self.nodes[i]
                if i >= start or len(node.outs) != 1 or self._step(node.out) is not value:
                    continue
                work = node_cost(node) if node.op.family == "elementwise" else 0
                if node.out not in made and made[value] + work <= CHEAP_LIMIT:
                    made[node.out] = made[value] + work
                    pending.append(node.out)
        del made[root]
        return made


def _reading(node: Node, instead: Mapping[Value, Value], outs: tuple[Value, ...]) -> Node:
    """A node that reads these values instead of its own, with such results."""
    args = tuple(instead.get(a, a) if isinstance(a, Value) else a for a in node.args)
    return replace(node, args=args, outs=outs)


def _in_order(nodes: Sequence[Node], copies: Mapping[Value, Node]) -> tuple[Node, ...]:
    """The nodes in their order, with the copies, each after those whose results it reads."""
    made = {out: node for node in nodes for out in node.outs} | copies
    done: set[Value] = set()
    found: list[Node] = []
    for first in nodes:
        pending = [first]
        while pending:
            node = pending[-1]
            missing = [v for v in node.inputs if v in made and v not in done]
            if missing:
                pending += (made[v] for v in missing)
                continue
            pending.pop()
            if node.outs[0] not in done:
                done.update(node.outs)
                found.append(node)
    return tuple(found)
