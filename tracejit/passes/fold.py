"""Rules about constants: `full` nodes of a literal, and the literals themselves.

Only what IEEE arithmetic fixes to the bit is computed here; exp, pow and the like are left to the
device, whose last bit may differ from numpy's. A sum of a constant, whose order nobody fixes, is
the number nearest to the exact one.
"""

from __future__ import annotations

import math

import numpy as np

from tracejit.ir.graph import Arg, Node, Value
from tracejit.ir.ops import BITS, OPS
from tracejit.ir.types import DType, round_to
from tracejit.passes.rewrite import Made

FULL = OPS["full"]
Literal = int | float | bool


def constant(arg: Arg, made: Made) -> Literal | None:
    """The number that every element of an operand is, if that is known."""
    if arg.__class__ is not Value:
        return arg
    node = made.get(arg)
    if node is None or node.op is not FULL or isinstance(node.args[0], Value):
        return None
    return typed(node.args[0], arg.type.dtype)


def typed(value: Literal, dtype: DType) -> Literal:
    """A literal as an element of `dtype`; f32 and f64 keep the digits they were written with."""
    if dtype.kind == "f" and not dtype.narrow:
        return float(value)
    with np.errstate(all="ignore"):
        return round_to(np.asarray(value), dtype).item()


def same_bits(a: Literal, b: Literal) -> bool:
    """Whether two literals of one dtype are the same number, telling 0.0 from -0.0."""
    return (a == b and math.copysign(1, a) == math.copysign(1, b)) or (a != a and b != b)


def full_like(node: Node, value: Literal) -> Node:
    """`full` of the node's result type, in its place."""
    kind = node.out.type
    attrs = (("shape", kind.shape), ("dtype", kind.dtype), ("device", kind.device))
    return Node(FULL, (value,), attrs, node.outs, node.where)


def fold_exact(node: Node, made: Made) -> Node | None:
    """An exact op of constants is a constant."""
    operands = []
    for arg in node.args:
        value = constant(arg, made)
        if value is None:
            return None
        is_tensor = arg.__class__ is Value
        operands.append(np.full(1, value, arg.type.dtype.compute) if is_tensor else value)
    if node.op.name == "cast" and not _cast_is_defined(operands[0], node.out.type.dtype):
        return None
    with np.errstate(all="ignore"):
        result = round_to(node.op.eval(*operands, **dict(node.attrs)), node.out.type.dtype)
    return full_like(node, result.item())


def _cast_is_defined(x: np.ndarray, dtype: DType) -> bool:
    """Whether all platforms agree: not for a float beyond the integers of `dtype`."""
    if x.dtype.kind != "f" or dtype.kind not in "iu":
        return True
    limits = np.iinfo(dtype.compute)
    return bool(np.all((x >= limits.min) & (x <= limits.max - 1)))


def literal_operands(node: Node, made: Made) -> Node | None:
    """A constant tensor operand is a literal, as long as another tensor remains."""
    args = list(node.args)
    start = 1 if node.op.name == "where" else 0  # the condition stays
    tensors = [
        i
        for i in range(start, len(args))
        if args[i].__class__ is Value and not args[i].type.is_host
    ]
    changed = False
    for i in reversed(tensors):
        if len(tensors) == 1:
            break
        value = constant(args[i], made)
        if value is not None:
            args[i], changed = value, True
            tensors.remove(i)
    return Node(node.op, tuple(args), node.attrs, node.outs, node.where) if changed else None


def constant_condition(node: Node, made: Made) -> Node | Value | None:
    """`where` of a constant condition is one of its branches."""
    condition = constant(node.args[0], made)
    if condition is None:
        return None
    chosen = node.args[1 if condition else 2]
    if isinstance(chosen, Value) and not chosen.type.is_host:
        return chosen
    return Node(FULL, (chosen,), full_like(node, 0).attrs, node.outs, node.where)


def moved_constant(node: Node, made: Made) -> Node | None:
    """A movement of a constant is a constant (a runtime scalar's too)."""
    source = made.get(node.args[0])
    if source is None or source.op is not FULL:
        return None
    return Node(FULL, source.args, full_like(node, 0).attrs, node.outs, node.where)


def padded_constant(node: Node, made: Made) -> Node | None:
    """A constant padded with itself is a constant. `unwindow` has 0 where no window is."""
    value = constant(node.args[0], made)
    fill = node.attr("value") if node.op.name == "pad" else 0
    if value is None or not same_bits(value, typed(fill, node.out.type.dtype)):
        return None
    return full_like(node, value)


def extremum_of_constant(node: Node, made: Made) -> Node | None:
    """The maximum and the minimum of a constant are that constant."""
    value = constant(node.args[0], made)
    return None if value is None else full_like(node, value)


def sum_of_constant(node: Node, made: Made) -> Node | None:
    """A sum of one constant is a product, rounded once; not of integers that it may leave."""
    value, source = constant(node.args[0], made), node.args[0].type
    if value is None or source.dtype.kind == "b":
        return None
    count = math.prod(source.shape[a] for a in node.attr("axes"))
    if not source.dtype.is_float and abs(value) * count > 2 ** (8 * source.dtype.itemsize - 1) - 1:
        return None
    with np.errstate(all="ignore"):
        exact = round_to(np.asarray(value), source.dtype).item() * count if count else 0
        return full_like(node, round_to(np.asarray(exact + 0), source.dtype).item())


ELEMENTWISE = {name: op for name, op in OPS.items() if op.family == "elementwise"}
EXACT = tuple(name for name, op in ELEMENTWISE.items() if op.exact is BITS)
LITERAL_OPERANDS = tuple(n for n, op in ELEMENTWISE.items() if len(op.vjp) == 2 or n == "where")
MOVEMENT = tuple(name for name, op in OPS.items() if op.family == "movement")

FOLD = {
    **dict.fromkeys(EXACT, (fold_exact,)),
    **{name: (literal_operands,) for name in LITERAL_OPERANDS if name not in EXACT},
    **{name: (fold_exact, literal_operands) for name in LITERAL_OPERANDS if name in EXACT},
    "where": (constant_condition, literal_operands),
    **dict.fromkeys(MOVEMENT, (moved_constant,)),
    "pad": (padded_constant,),
    "unwindow": (padded_constant,),
    "reduce_max": (extremum_of_constant,),
    "reduce_min": (extremum_of_constant,),
    "reduce_sum": (sum_of_constant,),
}
