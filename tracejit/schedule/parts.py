"""Sums in two steps, for GPUs: few programs would have long loops.

In: a Graph, and by value the axis of the channels, which lie last in memory. A sum over all other
axes of an image has one result for each channel. It becomes sums over stretches of places, which
are added up. So does a sum down the columns of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tracejit.ir.graph import Builder, Graph, Node, Value, next_id
from tracejit.ir.ops import OPS
from tracejit.ir.types import contiguous_strides, f32
from tracejit.schedule.images import LEAST
from tracejit.schedule.index import Indices, extents_of, flatten, identity, operand_indices
from tracejit.schedule.kernel import Mod

SUMS = 16384  # results of the first sums that keep a GPU busy: 32 a program, 4 programs an SM
SHORT = 64  # places that each of them has at least
FEW = 512  # rows that a program goes over by itself
RUN = 32  # columns that a program takes side by side


def parted(graph: Graph, last: Mapping[int, int]) -> Graph:
    """The graph with such sums in two steps."""
    return _Parting(graph, last).run()


class _Parting:
    def __init__(self, graph: Graph, last: Mapping[int, int]):
        self.graph, self.last = graph, last
        self.b = Builder(next_id(graph.values()))
        self.producer = {node.out.id: node for node in graph.nodes}
        self.strides = {p.value.id: p.strides for p in graph.params}

    def run(self) -> Graph:
        ways = (self._image, self._columns)
        for node in self.graph.nodes:
            if node.op.name != "reduce_sum" or not any(way(node) for way in ways):
                self.b.nodes.append(node)
        return replace(self.graph, nodes=tuple(self.b.nodes))

    def _image(self, node: Node) -> bool:
        """Emit a sum over the places of images in two steps; False where it stays one."""
        x, axes = node.args[0], node.attr("axes")
        shape, channel = x.type.shape, self.last.get(x.id)
        kept = [k for k in range(len(shape)) if k not in axes and shape[k] > 1]
        if kept != [channel] or shape[channel] < LEAST:
            return False
        places = math.prod(shape[k] for k in axes)
        wanted = min(SUMS // shape[channel], places // SHORT)
        cut = _cut([shape[k] for k in axes], wanted)
        if math.prod(cut) < 2:
            return False
        whole: list[int] = []  # the shape with each axis that is cut as two
        first: list[int] = []
        second: list[int] = []
        parts = dict(zip(axes, cut, strict=True))
        for k, n in enumerate(shape):
            if k not in parts:
                whole.append(n)
                continue
            second += [len(whole) - len(first)] * (parts[k] > 1)
            whole += [parts[k]] * (parts[k] > 1)
            first += [len(whole)] * (parts[k] < n)
            whole += [n // parts[k]] * (parts[k] < n)
        self._twice(node, x, tuple(whole), tuple(first), tuple(second))
        return True

    def _columns(self, node: Node) -> bool:
        """The same for a sum over the first axes whose neighbours lie along the last one."""
        x, axes = node.args[0], node.attr("axes")
        shape = x.type.shape
        split = len(axes)
        if tuple(sorted(axes)) != tuple(range(split)) or split == len(shape):
            return False
        rows, columns = math.prod(shape[:split]), math.prod(shape[split:])
        stretch = _stretch(rows, columns)
        if rows <= FEW or stretch >= rows or not self._lies_along(x, shape):
            return False
        parts = -(-rows // stretch)
        self.b.line = node.where
        x = self.b.reshape(x, shape=(rows, *shape[split:])) if split > 1 else x
        if parts * stretch > rows:
            none = (0,) * len(x.type.shape)
            high = (parts * stretch - rows, *none[1:])
            x = self.b.pad(x, low=none, high=high, interior=none, value=_nothing(x))
        self._twice(node, x, (parts, stretch, *shape[split:]), (1,), (0,))
        return True

    def _twice(
        self,
        node: Node,
        x: Value,
        whole: tuple[int, ...],
        first: tuple[int, ...],
        second: tuple[int, ...],
    ) -> None:
        """Emit a sum in two steps; of half types what is added is not rounded in between."""
        b, narrow = self.b, x.type.dtype.narrow
        b.line = node.where
        x = b.cast(x, dtype=f32) if narrow else x
        x = b.reshape(x, shape=whole) if whole != x.type.shape else x
        y = b.reduce_sum(x, axes=first)
        if narrow:
            y, kind = b.reduce_sum(y, axes=second), (("dtype", node.out.type.dtype),)
            b.nodes.append(Node(OPS["cast"], (y,), kind, node.outs, b.line))
        else:
            b.nodes.append(replace(node, args=(y,), attrs=(("axes", second),)))

    def _lies_along(self, value: Value, shape: Sequence[int]) -> bool:
        """Whether what a value is computed from lies along its last axis."""
        at, extents = identity(shape), extents_of(shape)
        long = [k for k, n in enumerate(shape) if n > 1]
        while (node := self.producer.get(value.id)) is not None:
            if node.op.family == "movement":
                at, _ = operand_indices(node, at, extents)
                value = node.args[0]
            elif node.op.family == "elementwise":
                same = [v for v in node.inputs if v.type.shape == value.type.shape]
                if not same:
                    return False
                value = same[0]
            else:
                break
        strides = self.strides.get(value.id) or contiguous_strides(value.type.shape)
        return bool(long) and _unit(at, strides) == f"i{long[-1]}"


def _nothing(x: Value) -> float | int:
    """What changes no sum, not even the sign of a zero."""
    return -0.0 if x.type.dtype.is_float else 0


def _unit(at: Indices, strides: Sequence[int]) -> str | None:
    """The axis whose neighbours lie side by side, if there is one: all of them, or RUN at a time,
    as the columns of several heads do."""
    units = [atom for atom, c in flatten(at, tuple(strides)).terms if c == 1]
    if len(units) != 1:
        return None
    (unit,) = units
    if isinstance(unit, Mod) and unit.by >= RUN and len(unit.index.terms) == 1:
        unit = unit.index.terms[0][0]
    return unit if isinstance(unit, str) else None


def _stretch(rows: int, columns: int) -> int:
    """How many rows are added up at a time, so that there are SUMS results: a number that divides
    the rows, if one is near."""
    most = max(SHORT, rows * max(1, columns) // SUMS)
    return next((n for n in range(most, most // 2, -1) if rows % n == 0), most)


def _cut(extents: Sequence[int], wanted: int) -> list[int]:
    """Into how many parts each axis is cut, the first axes first, so that there are about so many
    parts in all."""
    found = []
    for n in extents:
        most = max(wanted, 1)
        parts = max(d for d in range(1, n + 1) if n % d == 0 and d <= most)
        found.append(parts)
        wanted //= parts
    return found
