"""Running results along few long rows, cut into stretches: on a GPU each row is one program's.

In: a Graph. Out: the same, where such a result is computed along stretches of a row; then of the
stretches' last elements, which are what each stretch has before it; and both are combined. A
product may leave the range of the numbers between stretches though no result does, so products and
recurrences stay as they are.

The first few elements of long rows in order (topk) are found in two steps likewise: those of each
stretch, and then of these. To sort is to compare each element with all of its row, or stretch.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from tracejit.ir.graph import Builder, Graph, Node, Value, next_id
from tracejit.ir.ops import OPS
from tracejit.ir.ops.movement import part
from tracejit.ir.ops.running import before
from tracejit.ir.types import DType, b1, i64

ROWS = 128  # rows that keep a GPU busy
SHORT = 2048  # elements of a stretch at least
STRETCHES = 512  # in all
SORTED = 1024  # elements of a stretch at least of which the first ones are found
SORTED_AT_ONCE = 8192  # elements of a row that a program sorts


def stretched(graph: Graph) -> Graph:
    """The graph with its running results along few long rows in three steps."""
    b = Builder(next_id(graph.values()))
    for node in graph.nodes:
        steps = {"cumsum": _stretch, "accumulate": _stretch, "argsort": _first_of_stretches}
        if not (cut := steps.get(node.op.name)) or not cut(b, node):
            b.nodes.append(node)
    return replace(graph, nodes=tuple(b.nodes))


def _stretch(b: Builder, node: Node) -> bool:
    """Emit a running result in three steps; False where it stays one."""
    (x,), axis = node.args, node.attr("axis")
    combine = dict(node.attrs).get("combine", "add")
    shape, dtype = x.type.shape, x.type.dtype
    n, rows = shape[axis], math.prod(shape) // max(1, shape[axis])
    if combine == "mul" or not 0 < rows <= ROWS or n < 2 * SHORT:
        return False
    b.line = node.where
    size = max(SHORT, 1 << (max(1, rows * n // STRETCHES) - 1).bit_length())
    count, fill = -(-n // size), _neutral(combine, dtype)
    if count < 2:
        return False
    ends = [count * size - n if k == axis else 0 for k in range(len(shape))]
    none = (0,) * len(shape)
    x = b.pad(x, low=none, high=tuple(ends), interior=none, value=fill) if any(ends) else x
    whole = x.type.shape
    x = b.reshape(x, shape=(*shape[:axis], count, size, *shape[axis + 1 :]))
    attrs = {key: value for key, value in node.attrs if key != "axis"}
    running = getattr(b, node.op.name)
    y = running(x, axis=axis + 1, **attrs)
    total = running(part(b, y, axis + 1, size - 1, 1), axis=axis, **attrs)
    y = _combined(b, combine, b.expand(before(b, total, axis, fill), shape=y.type.shape), y)
    if not any(ends):
        b.nodes.append(Node(OPS["reshape"], (y,), (("shape", whole),), node.outs, b.line))
        return True
    y = b.reshape(y, shape=whole)
    kept = (("starts", none), ("stops", shape), ("steps", (1,) * len(shape)))
    b.nodes.append(Node(OPS["slice"], (y,), kept, node.outs, b.line))
    return True


def _first_of_stretches(b: Builder, node: Node) -> bool:
    """Emit the places of the first elements in order in two steps; False where it stays one."""
    (x,), axis, k = node.args, node.attr("axis"), node.attr("count")
    if not _stretch_of(x.type.shape[axis], k):
        return False
    b.line = node.where
    places, order = _first(b, x, axis, k, node.attr("descending"))
    b.nodes.append(Node(OPS["gather"], (places, order), (("axis", axis),), node.outs, b.line))
    return True


def _first(b: Builder, x: Value, axis: int, k: int, descending: bool) -> tuple[Value, Value]:
    """The places of the first elements of all stretches, and which of them are first in order."""
    shape = x.type.shape
    size = _stretch_of(shape[axis], k)
    count = -(-shape[axis] // size)
    ends = tuple(count * size - n if i == axis else 0 for i, n in enumerate(shape))
    none = (0,) * len(shape)
    if any(ends):  # equal ones keep their order: what is put behind them never comes before them
        last = _last_in_order(x.type.dtype, descending)
        x = b.pad(x, low=none, high=ends, interior=none, value=last)
    before, behind = shape[:axis], shape[axis + 1 :]
    x = b.reshape(x, shape=(*before, count, size, *behind))
    first = b.argsort(x, axis=axis + 1, count=k, descending=descending, topk="")
    here = first.type
    number = b.iota(axis=axis, shape=here.shape, dtype=i64, device=here.device)
    found = (*before, count * k, *behind)
    places = b.reshape(b.add(first, b.mul(number, size)), shape=found)
    values = b.reshape(b.gather(x, first, axis=axis + 1), shape=found)
    if _stretch_of(count * k, k):
        args = _first(b, values, axis, k, descending)
        order = b.gather(*args, axis=axis)
    else:
        order = b.argsort(values, axis=axis, count=k, descending=descending, topk="")
    return places, order


def _stretch_of(n: int, k: int) -> int:
    """The length of the stretches of a row of n that leave at most half of its elements, as first
    ones of some stretch; 0 where a program sorts the row, or there are none."""
    size = max(SORTED, 1 << max(0, 2 * k - 1).bit_length())
    cut = k > 0 and n > SORTED_AT_ONCE and 2 * size <= n and size <= SORTED_AT_ONCE
    return size if cut else 0


def _last_in_order(dtype: DType, descending: bool) -> float | int | bool:
    """A value that no other one comes behind."""
    if dtype.is_float:
        return -math.inf if descending else math.nan
    if dtype is b1:
        return not descending
    limits = np.iinfo(dtype.compute)
    return limits.min if descending else limits.max


def _neutral(combine: str, dtype: DType) -> float | int:
    """What changes nothing of what it is combined with: not even the sign of a zero."""
    if combine == "add":
        return -0.0 if dtype.is_float else 0
    if dtype.is_float:
        return math.inf if combine == "min" else -math.inf
    limits = np.iinfo(dtype.compute)
    return limits.max if combine == "min" else limits.min


def _combined(b: Builder, combine: str, x: Value, y: Value) -> Value:
    """What stands before stretches, and their own results."""
    if combine == "add":
        return b.add(x, y)
    if combine == "logaddexp":
        most, least = b.maximum(x, y), b.minimum(x, y)
        alike = b.and_(b.eq(least, most), b.eq(b.abs(most), math.inf))
        return b.where(alike, most, b.add(most, b.log1p(b.exp(b.sub(least, most)))))
    own = b.ge(y, x) if combine == "max" else b.le(y, x)
    own = b.or_(own, b.ne(y, y)) if y.type.dtype.is_float else own
    return b.where(own, y, x)
