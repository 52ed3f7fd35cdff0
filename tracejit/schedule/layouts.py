"""The layouts of intermediates on a GPU: channels last, from convolution to convolution.

In: the nodes of a schedule, and the axis of channels of what convolutions read and make. Out: the
strides of the values that are stored in the arena. What lies between two convolutions has its
channels last too, whatever element-wise work, reshape or sum makes it. Inputs and outputs stay as
they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from tracejit.ir.graph import Node, Value
from tracejit.schedule.images import LEAST

Axes = Mapping[int, int]


class Layouts:
    """The axis of channels by value; `strides_of` says how a value lies."""

    def __init__(self, nodes: Sequence[Node], last: Axes):
        self.last = dict(last)
        if last:
            self._spread(nodes)

    def strides_of(self, value: Value) -> tuple[int, ...] | None:
        """The strides of a value in the arena; None for row by row."""
        axis, shape = self.last.get(value.id), value.type.shape
        if axis is None or shape[axis] < LEAST or math.prod(shape[axis + 1 :]) == 1:
            return None
        strides, step = [0] * len(shape), 1
        for k in (axis, *(k for k in reversed(range(len(shape))) if k != axis)):
            strides[k] = step
            step *= shape[k]
        return tuple(strides)

    def _spread(self, nodes: Sequence[Node]) -> None:
        """Go from value to value as far as the axis of channels stays an axis."""
        beside: dict[int, list[tuple[int, dict[int, int]]]] = {}
        for node in nodes:
            for x, y, axes in _same_axes(node):
                beside.setdefault(x.id, []).append((y.id, axes))
                back = {there: here for here, there in axes.items()}
                beside.setdefault(y.id, []).append((x.id, back))
        waiting = list(self.last)
        while waiting:
            id = waiting.pop()
            for other, axes in beside.get(id, ()):
                axis = axes.get(self.last[id])
                if axis is not None and other not in self.last:
                    self.last[other] = axis
                    waiting.append(other)


def _same_axes(node: Node) -> Iterable[tuple[Value, Value, dict[int, int]]]:
    """Pairs of an operand and the result, with the axes that are the same in both."""
    out, name, family = node.out, node.op.name, node.op.family
    if family == "elementwise":
        for x in node.inputs:
            if x.type.shape == out.type.shape:
                yield x, out, {k: k for k in range(len(out.type.shape))}
        return
    if family not in ("movement", "reduce", "order"):
        return
    x = node.args[0]
    shape, new = x.type.shape, out.type.shape
    if name == "permute":
        yield x, out, {axis: k for k, axis in enumerate(node.attr("axes"))}
    elif name == "reshape":
        yield x, out, _kept(shape, new)
    elif family == "reduce":
        kept = [k for k in range(len(shape)) if k not in node.attr("axes")]
        yield x, out, {axis: k for k, axis in enumerate(kept)}
    else:
        yield x, out, {k: k for k in range(len(shape)) if shape[k] == new[k]}


def _kept(shape: Sequence[int], new: Sequence[int]) -> dict[int, int]:
    """The axes that a reshape leaves as they are."""
    places = {}
    before = 1
    for k, n in enumerate(new):
        if n > 1:
            places[before, n] = k
        before *= n
    found, before = {}, 1
    for k, n in enumerate(shape):
        if (before, n) in places:
            found[k] = places[before, n]
        before *= n
    return found
