"""Who makes and who reads each value of a graph, whatever movement lies in between."""

from __future__ import annotations

from collections.abc import Sequence

from tracejit.ir.graph import Arg, Graph, Node, Value

Axes = tuple[int, ...]
Reader = tuple[Node, int, Axes]


class Unknown(Exception):
    """A value is not made, or not read, in the way that was asked for."""


class Readers:
    """Who makes and who reads each value of a graph.

    Values are told apart by their roots: what is reshaped is the same, as long as its elements stay
    in order. What has its axes in another order is a view of its root: the order of axes, those of
    extent 1 left out; () if they are in order. With `casts`, a float of another width is the same.
    """

    def __init__(self, graph: Graph, *, casts: bool = False):
        self.graph, self.made, self.casts = graph, graph.producers(), casts
        self.roots: dict[Value, Value] = {}
        self.views: dict[Value, tuple[Value, Axes]] = {}
        self.readers: dict[Value, list[Reader]] = {}
        for node in graph.nodes:
            if not self._moves(node):
                for k, arg in enumerate(node.args):
                    if isinstance(arg, Value):
                        root, axes = self.view(arg)
                        self.readers.setdefault(root, []).append((node, k, axes))
        self.outputs = {self.view(v)[0] for v in graph.outputs()}

    def _moves(self, node: Node) -> bool:
        """Note the root of a reshape's result, of a permute's, or of a cast's."""
        if node.op.name == "cast":
            (x,) = node.args
            same = self.casts and isinstance(x, Value) and not x.type.is_host
            if not (same and x.type.dtype.is_float and node.out.type.dtype.is_float):
                return False
            if x in self.views:
                self.views[node.out] = self.views[x]
            else:
                self.roots[node.out] = self.root(x)
            return True
        if node.op.name == "reshape":
            (x,), shape = node.args, node.out.type.shape
            if x not in self.views:
                self.roots[node.out] = self.root(x)
            elif _extents(shape) == _extents(x.type.shape):
                self.views[node.out] = self.views[x]
            else:
                return False
        elif node.op.name == "permute":
            (x,) = node.args
            of, axes = self.views.get(x, (x, ()))
            places = [k for k, n in enumerate(x.type.shape) if n != 1]
            order = tuple(places.index(a) for a in node.attr("axes") if a in places)
            order = tuple((axes or range(len(places)))[k] for k in order)
            if order == tuple(range(len(order))):
                self.roots[node.out] = self.root(of)
            else:
                self.views[node.out] = of, order
        return node.op.name in ("reshape", "permute")

    def root(self, value: Value) -> Value:
        return self.roots.get(value, value)

    def view(self, value: Value) -> tuple[Value, Axes]:
        """The root of a value, and how the value views it."""
        of, axes = self.views.get(value, (value, ()))
        return self.root(of), axes

    def is_turned(self, value: Value, of: Value) -> bool:
        """Whether a value is another with its last two axes exchanged."""
        rank = len(_extents(value.type.shape))
        (one, a), (other, b) = (
            (x, y or tuple(range(rank))) for x, y in map(self.view, (value, of))
        )
        turned = value.type.shape[-2:] == of.type.shape[:-3:-1]
        return turned and one == other and a == (*b[:-2], b[-1], b[-2])

    def read(self, value: Value) -> list[tuple[Node, int]]:
        """The nodes that read a value, and as which operand; none may view it otherwise."""
        found = self.readers.get(self.root(value), [])
        if any(axes for *_, axes in found):
            raise Unknown
        return [(node, at) for node, at, _ in found]

    def producer(self, value: Arg, *names: str) -> Node:
        """The node of a primitive that computes a value."""
        node = self.made.get(self.root(value)) if isinstance(value, Value) else None
        if node is None or (names and node.op.name not in names):
            raise Unknown
        return node

    def same(self, one: Arg, other: Arg) -> bool:
        values = isinstance(one, Value) and isinstance(other, Value)
        return values and self.root(one) == self.root(other)


def _extents(shape: Sequence[int]) -> list[int]:
    """The extents that say how elements lie."""
    return [n for n in shape if n != 1]
