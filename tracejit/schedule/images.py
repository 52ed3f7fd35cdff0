"""Convolutions as GPUs want them: products over windows take the channels of one tap in turn.

In: a Graph, in which a convolution and its gradients are products over windows (`matmul` of values
that `window` nodes made). Out: an `Arranged` graph that computes the same.

- k goes over (tap, channel) instead of (channel, tap). So where a tap has a multiple of a tile's
  depth of channels, a tile lies within one tap, and what it reads lies side by side in images whose
  channels are last. The weights that such products read are copied into that order, once for all.
- The gradient of weights has its columns in that order.
- `last` has the axis of channels of the values that products read and make: `layouts.py` goes on
  from there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from tracejit.ir.graph import Builder, Graph, Node, Value, next_id
from tracejit.ir.ops import OPS
from tracejit.records import dataclass
from tracejit.schedule.index import Indices, operand_indices
from tracejit.schedule.kernel import FloorDiv, Index, Mod, Var
from tracejit.schedule.tasks import dot_indices

LEAST = 16  # channels from which on they lie last


@dataclass(frozen=True, slots=True)
class Arranged:
    """`copies`: aliases that are values of their own in memory; `last`: by value, the axis of the
    channels."""

    graph: Graph
    copies: frozenset[int]
    last: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Read:
    """What an operand of a product reads: the first value that no movement made, where, and the
    movement from there to the operand."""

    base: Value
    at: Indices
    chain: tuple[Node, ...]


def arranged(graph: Graph) -> Arranged:
    """The graph with its products over windows in the order of channels."""
    if not any(node.op.name == "matmul" for node in graph.nodes):
        return Arranged(graph, frozenset(), {})
    return _Arranging(graph).run()


class _Arranging:
    def __init__(self, graph: Graph):
        self.graph = graph
        self.b = Builder(next_id(graph.values()))
        self.producer = {node.out.id: node for node in graph.nodes}
        self.strides = {p.value.id: p.strides for p in graph.params}
        self.copies: dict[int, Value] = {}  # by weight, its copy in the weight's own order of axes
        self.images: dict[int, Value] = {}  # by image, the same in memory
        self.copied: set[int] = set()
        self.last: dict[int, int] = {}

    def run(self) -> Arranged:
        for node in self.graph.nodes:
            if node.op.name != "matmul" or not self._product(node):
                self.b.nodes.append(node)
        graph = replace(self.graph, nodes=tuple(self.b.nodes))
        return Arranged(graph, frozenset(self.copied), self.last)

    def _product(self, node: Node) -> bool:
        """Emit a product over windows in another order; False where it stays as it is."""
        a, b, extents = dot_indices(node)
        if 0 in extents.values():
            return False
        rank = len(node.out.type.shape)
        m, n, k = (f"i{rank - 2 + j}" for j in range(3))
        left, right = (
            self._read(arg, at, extents) for arg, at in zip(node.args, (a, b), strict=True)
        )
        self.b.line = node.where
        if taps := channels_of(right, k, n):
            self._noted(right.base, 1)
            self._noted(node.out, rank - 2)
            return self._forward(self._stored(node, right, taps), left, taps)
        if channels_of(left, m, k) == 1 and (taps := channels_of(right, n, k)):
            self._noted(left.base, 1)
            self._noted(right.base, 1)
            return self._of_weights(self._stored(node, right, taps), taps)
        return False

    def _stored(self, node: Node, image: Read, taps: int) -> Node:
        """The product, with its image stored first where element-wise work makes it: that would be
        done again, and its operands be read again, for each tap."""
        base = image.base
        made = self.producer.get(base.id)
        if taps == 1 or made is None or made.op.family != "elementwise":
            return node
        if base.id not in self.images:
            copy = self.images[base.id] = self.b.alias(base)
            self.copied.add(copy.id)
            self._noted(copy, 1)
        found = self.images[base.id]
        for moved in image.chain:
            found = self.b.emit(moved.op, found, **dict(moved.attrs))
        return replace(node, args=(node.args[0], found))

    def _noted(self, value: Value, axis: int) -> None:
        self.last.setdefault(value.id, axis)

    def _read(self, value: Value, at: Indices, extents: Mapping[str, int]) -> Read:
        chain = []
        while (node := self.producer.get(value.id)) and node.op.family == "movement":
            at, _ = operand_indices(node, at, extents)
            chain.append(node)
            value = node.args[0]
        return Read(value, at, tuple(reversed(chain)))

    def _forward(self, node: Node, left: Read, taps: int) -> bool:
        """Images through weights, or gradients of results through the same weights."""
        a, b = node.args
        depth = a.type.shape[-1]
        channels = depth // taps
        if taps == 1 or channels < LEAST:
            return False
        a = self._taps_first(self._of_copy(left, a), -1, channels, taps)
        b = self._taps_first(b, -2, channels, taps)
        self.b.nodes.append(replace(node, args=(a, b)))
        return True

    def _of_weights(self, node: Node, taps: int) -> bool:
        """The gradient of weights: columns of (tap, channel)."""
        a, b = node.args
        columns = node.out.type.shape[-1]
        channels = columns // taps
        if taps == 1 or channels < LEAST:
            return False
        w = self.b.matmul(a, self._taps_first(b, -1, channels, taps))
        w = self._taps_first(w, -1, taps, channels)  # back again
        self.b.nodes.append(Node(OPS["reshape"], (w,), (("shape", w.type.shape),), node.outs))
        return True

    def _taps_first(self, x: Value, axis: int, channels: int, taps: int) -> Value:
        """An axis of (channel, tap) as one of (tap, channel)."""
        shape = x.type.shape
        axis %= len(shape)
        before, after = shape[:axis], shape[axis + 1 :]
        x = self.b.reshape(x, shape=(*before, channels, taps, *after))
        order = (*range(axis), axis + 1, axis, *range(axis + 2, len(shape) + 1))
        return self.b.reshape(self.b.permute(x, axes=order), shape=shape)

    def _of_copy(self, read: Read, operand: Value) -> Value:
        """The operand, read from a copy of the weights whose input channels are last."""
        w = read.base
        shape, strides = w.type.shape, self.strides.get(w.id)
        if len(shape) < 3 or shape[1] < LEAST or math.prod(shape[2:]) == 1:
            return operand
        if strides is not None and strides[1] == 1:
            return operand
        if w.id not in self.copies:
            there = (0, *range(2, len(shape)), 1)
            back = (0, len(shape) - 1, *range(1, len(shape) - 1))
            copy = self.b.alias(self.b.permute(w, axes=there))
            self.copied.add(copy.id)
            self.copies[w.id] = self.b.permute(copy, axes=back)
        found = self.copies[w.id]
        for node in read.chain:
            found = self.b.emit(node.op, found, **dict(node.attrs))
        return found


def channels_of(read: Read, channel: str, place: str) -> int:
    """How many taps an image is read with whose channels are those of an axis, and whose places
    are those of another; 0 if the operand reads no image so."""
    if len(read.at) not in (3, 4, 5):
        return 0
    images, channels, *places = read.at
    if not axes_of(images) <= {place} or not any(place in axes_of(x) for x in read.at):
        return 0
    if any(not axes_of(x) <= {place, channel} for x in places):
        return 0
    taps = 0
    for atom, c in channels.terms:
        if atom == channel and c == 1:
            taps = 1
        elif c == 1 and isinstance(atom, FloorDiv) and atom.index == Index(((channel, 1),)):
            taps = atom.by
        elif isinstance(atom, str) and atom != place and atom != channel:
            continue  # the group
        else:
            return 0
    return taps


def axes_of(index: Index) -> set[str]:
    """The axes that an index depends on."""
    found: set[str] = set()
    for atom, _ in index.terms:
        if isinstance(atom, str):
            found.add(atom)
        elif isinstance(atom, FloorDiv | Mod):
            found |= axes_of(atom.index)
        elif isinstance(atom, Var):
            found.add(repr(atom))
    return found
