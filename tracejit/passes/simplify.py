"""Simplification: rules that are exact for every input (NaN, infinities, both zeros), in one sweep.

What is not here is not exact: x + 0.0 loses the sign of -0.0, x * 0.0 the NaN, and so does a float
sum over one element, which is 0.0 for -0.0.
"""

from __future__ import annotations

from tracejit.ir.graph import Arg, Graph, Node, Value
from tracejit.ir.ops import OPS
from tracejit.passes.fold import FOLD, constant, full_like, same_bits
from tracejit.passes.rewrite import Made, rewrite, table

RESHAPE = OPS["reshape"]


def identity_op(node: Node, made: Made) -> Value:
    """An alias is its operand."""
    return node.args[0]


def times_one(node: Node, made: Made) -> Value | None:
    """x * 1 and 1 * x are x."""
    x, z = node.args
    return x if _is_one(z) else z if _is_one(x) else None


def right_one(node: Node, made: Made) -> Value | None:
    """x / 1 and x ** 1 are x."""
    x, one = node.args
    return x if _is_one(one) else None


def _is_one(arg: Arg) -> bool:
    return arg.__class__ is not Value and arg == 1


def twice(node: Node, made: Made) -> Value | None:
    """neg(neg(x)) and not(not(x)) are x."""
    inner = made.get(node.args[0])
    return inner.args[0] if inner is not None and inner.op is node.op else None


def same_type(node: Node, made: Made) -> Value | None:
    """A cast, reshape or expand to the operand's own type is the operand."""
    x = node.args[0]
    return x if x.type == node.out.type else None


def composed(node: Node, made: Made) -> Node | None:
    """Of two reshapes or two expands in a row, the last decides."""
    inner = made.get(node.args[0])
    if inner is None or inner.op is not node.op:
        return None
    return Node(node.op, inner.args, node.attrs, node.outs, node.where)


def permute_in_order(node: Node, made: Made) -> Value | None:
    """A permute that leaves the axes in order is its operand."""
    axes = node.attr("axes")
    return node.args[0] if axes == tuple(range(len(axes))) else None


def permute_composed(node: Node, made: Made) -> Node | None:
    """Two permutes in a row are one."""
    inner = made.get(node.args[0])
    if inner is None or inner.op is not node.op:
        return None
    before = inner.attr("axes")
    axes = tuple(before[a] for a in node.attr("axes"))
    return Node(node.op, inner.args, (("axes", axes),), node.outs, node.where)


def slice_of_all(node: Node, made: Made) -> Value | None:
    """A slice that takes everything is its operand."""
    return node.args[0] if node.args[0].type.shape == node.out.type.shape else None


def pad_by_nothing(node: Node, made: Made) -> Value | None:
    """A pad of the same shape is its operand."""
    return node.args[0] if node.args[0].type.shape == node.out.type.shape else None


def equal_branches(node: Node, made: Made) -> Node | Value | None:
    """`where` with the same value in both branches is that value."""
    _, a, b = node.args
    if a.__class__ is Value and a == b:
        return a
    x, y = constant(a, made), constant(b, made)
    return full_like(node, x) if x is not None and y is not None and same_bits(x, y) else None


def reduce_nothing(node: Node, made: Made) -> Node | Value | None:
    """A maximum or minimum (of integers: a sum) over axes of extent 1, or none, is a reshape."""
    x = node.args[0]
    if node.op.name == "reduce_sum" and x.type.dtype.is_float:
        return None
    if any(x.type.shape[a] != 1 for a in node.attr("axes")):
        return None
    return Node(RESHAPE, (x,), (("shape", node.out.type.shape),), node.outs, node.where)


IDENTITIES = {
    "alias": (identity_op,),
    "mul": (times_one,),
    "div": (right_one,),
    "pow": (right_one,),
    "neg": (twice,),
    "not": (twice,),
    "cast": (same_type,),
    "reshape": (same_type, composed),
    "expand": (same_type, composed),
    "permute": (permute_in_order, permute_composed),
    "slice": (slice_of_all,),
    "pad": (pad_by_nothing,),
    "where": (equal_branches,),
    "reduce_sum": (reduce_nothing,),
    "reduce_max": (reduce_nothing,),
    "reduce_min": (reduce_nothing,),
}

RULES = table(IDENTITIES, FOLD)


def simplify(graph: Graph) -> Graph:
    """Fold constants, apply exact identities and merge equal nodes, in one forward sweep."""
    return rewrite(graph, RULES)
