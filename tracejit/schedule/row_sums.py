"""Sums of everything that is made of numbers for each row: first of each row, on a GPU.

In: a Graph. Out: the same, where a sum over all elements, some of which are numbers for each row of
them (a mean, a maximum, a sum), is a sum of the rows' sums. A kernel that has a row and its numbers
at hand adds it up; the sum of everything would read all of it once more, and the numbers for each
element.
"""

from __future__ import annotations

import math
from dataclasses import replace

from tracejit.ir.graph import Builder, Graph, Node, next_id
from tracejit.ir.ops import OPS
from tracejit.ir.types import f32

ROWS = 128  # that keep a GPU busy
LONG = 128  # elements of a row at least

Rows = frozenset[tuple[tuple[int, ...], tuple[int, ...]]]  # shapes, and which axes are the rows'


def sums_of_rows(graph: Graph) -> Graph:
    """The graph with its sums of everything in two steps where rows have numbers."""
    b = Builder(next_id(graph.values()))
    made_of: dict[int, Rows] = {}
    for node in graph.nodes:
        if node.op.family not in ("elementwise", "movement", "reduce"):
            b.nodes.append(node)
            continue
        known = (made_of.get(v.id, frozenset()) for v in node.inputs)
        rows: Rows = frozenset().union(*known)
        if node.op.name != "reduce_sum" or not _in_two(b, node, rows):
            b.nodes.append(node)
        if node.op.family == "reduce":
            rows |= {(node.args[0].type.shape, node.attr("axes"))}
        if rows:
            made_of |= {out.id: rows for out in node.outs}
    return replace(graph, nodes=tuple(b.nodes))


def _in_two(b: Builder, node: Node, rows: Rows) -> bool:
    """Emit a sum of everything as one of the rows' sums; False where it stays one."""
    (x,), numel = node.args, node.args[0].type.numel
    fit = [one for one in rows if math.prod(one[0]) == numel and len(one[1]) < len(one[0])]
    if node.out.type.shape or not fit:
        return False
    # of a sum of everything the elements may be read in another shape
    shape, along = max(fit, key=lambda one: (one[0] == x.type.shape, _length(one), one))
    if not LONG <= _length((shape, along)) <= numel // ROWS:
        return False
    b.line = node.where
    narrow = x.type.dtype.narrow  # then what is added is not rounded in between
    x = b.reshape(x, shape=shape) if shape != x.type.shape else x
    y = b.reduce_sum(b.cast(x, dtype=f32) if narrow else x, axes=along)
    rest = tuple(range(len(y.type.shape)))
    if narrow:
        y = b.reduce_sum(y, axes=rest)
        dtype = (("dtype", node.out.type.dtype),)
        b.nodes.append(Node(OPS["cast"], (y,), dtype, node.outs, b.line))
    else:
        b.nodes.append(replace(node, args=(y,), attrs=(("axes", rest),)))
    return True


def _length(one: tuple[tuple[int, ...], tuple[int, ...]]) -> int:
    """The elements of a row."""
    shape, along = one
    return math.prod(shape[k] for k in along)
