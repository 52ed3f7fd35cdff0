"""Sums over the places of images, cut into parts: on a GPU few programs would have long loops.

In: a Graph, and by value the axis of the channels, which lie last in memory. A sum over all other
axes has one result for each channel. It becomes sums over stretches of places, which are added up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tracejit.ir.graph import Builder, Graph, Node, next_id
from tracejit.ir.ops import OPS
from tracejit.ir.types import f32
from tracejit.schedule.images import LEAST

SUMS = 8192  # results of the first sums that keep a GPU busy
SHORT = 64  # places that each of them has at least


def parted(graph: Graph, last: Mapping[int, int]) -> Graph:
    """The graph with its long sums over places in two steps."""
    b = Builder(next_id(graph.values()))
    for node in graph.nodes:
        if node.op.name != "reduce_sum" or not _part(b, node, last):
            b.nodes.append(node)
    return replace(graph, nodes=tuple(b.nodes))


def _part(b: Builder, node: Node, last: Mapping[int, int]) -> bool:
    """Emit a sum in two steps; False where it stays one."""
    x, axes = node.args[0], node.attr("axes")
    shape, channel = x.type.shape, last.get(x.id)
    kept = [k for k in range(len(shape)) if k not in axes and shape[k] > 1]
    if kept != [channel] or shape[channel] < LEAST:
        return False
    places = math.prod(shape[k] for k in axes)
    wanted = min(SUMS // shape[channel], places // SHORT)
    cut = _cut([shape[k] for k in axes], wanted)
    if math.prod(cut) < 2:
        return False
    b.line = node.where
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
    narrow = x.type.dtype.narrow  # then what is added is not rounded in between
    x = b.cast(x, dtype=f32) if narrow else x
    y = b.reduce_sum(b.reshape(x, shape=tuple(whole)), axes=tuple(first))
    if narrow:
        y = b.reduce_sum(y, axes=tuple(second))
        b.nodes.append(
            Node(OPS["cast"], (y,), (("dtype", node.out.type.dtype),), node.outs, b.line)
        )
    else:
        b.nodes.append(replace(node, args=(y,), attrs=(("axes", tuple(second)),)))
    return True


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
