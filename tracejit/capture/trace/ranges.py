"""Between which numbers the elements of a value lie, as far as its computation tells.

In: a value of a trace. Out: the least and the greatest number that an element may be, infinite
where nothing is known; NaN is left out of account. Rules note what the primitives alone do not
tell, such as the range of a softmax, in `Trace.ranges`.
"""

from __future__ import annotations

import math

import numpy as np

from tracejit.capture.trace.state import TraceState
from tracejit.ir.graph import Arg, Node, Value
from tracejit.ir.types import DType, round_to

Range = tuple[float, float]
ALL: Range = (-math.inf, math.inf)
_DEPTH = 50  # of nodes that are looked through
_SAME = frozenset({"alias", "reshape", "permute", "expand", "slice", "flip", "window"})
_SAME |= {"reduce_max", "reduce_min"}
_KNOWN = {"sqrt": (0, math.inf), **dict.fromkeys(("tanh", "erf", "sin", "cos", "sign"), (-1, 1))}


def interval(t: TraceState, value: Value) -> Range:
    """The least and the greatest number among the elements of a value."""
    return _interval(t, value, _DEPTH)


def _interval(t: TraceState, value: Arg, depth: int) -> Range:
    if not isinstance(value, Value):
        return (-math.inf, math.inf) if value != value else (value, value)
    if value.type.is_host:
        return ALL
    found = t.ranges.get(value)
    if found is None:
        node, dtype = t.producers.get(value), value.type.dtype
        found = limits(dtype)
        if node is not None and depth:
            operands = [_interval(t, a, depth - 1) for a in node.args]
            computed = _computed(node, operands)
            if computed is not None:
                found = _held(*computed, dtype)
        t.ranges[value] = found
    return found


def limits(dtype: DType) -> Range:
    """What a dtype holds."""
    if dtype.kind not in "iu":
        return (0, 1) if dtype.kind == "b" else ALL
    info = np.iinfo(dtype.compute)
    return info.min, info.max


def _held(low: float, high: float, dtype: DType) -> Range:
    """A range as values of a dtype: rounded, or all where integers might wrap."""
    if dtype.is_float:
        with np.errstate(over="ignore"):
            kept = round_to(np.array([low, high], dtype.compute), dtype)
        return float(kept[0]), float(kept[1])
    whole = limits(dtype)
    return (low, high) if whole[0] <= low and high <= whole[1] else whole


def _hull(*ranges: Range) -> Range:
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _computed(node: Node, operands: list[Range]) -> Range | None:
    """The range of a node's result before it is rounded; None where that is not known."""
    match node.op.name, operands:
        case "full", [only]:
            return only
        case "iota", []:
            return 0, max(node.out.type.shape[node.attr("axis")] - 1, 0)
        case "cast", [only]:
            turned = node.inputs[0].type.dtype.is_float and not node.out.type.dtype.is_float
            return None if turned else only
        case "where", [_, a, b]:
            return _hull(a, b)
        case "gather", [source, _]:
            return _hull(source, (0, 0))  # what an index out of range reads
        case "scatter", [before, _, source] if node.attr("combine") == "last":
            return _hull(before, source)
        case "unwindow", [only]:
            return _hull(only, (0, 0))
        case "pad", [only]:
            fill = node.attr("value")
            return _hull(only, (fill, fill))
        case "maximum", [a, b]:
            return max(a[0], b[0]), max(a[1], b[1])
        case "minimum", [a, b]:
            return min(a[0], b[0]), min(a[1], b[1])
        case "exp", [(_, high)]:
            return 0, 1 if high <= 0 else math.inf
        case "neg", [(low, high)]:
            return -high, -low
        case "abs", [(low, high)]:
            return max(low, -high, 0), max(-low, high)
        case "add", [a, b]:
            return _finite(a[0] + b[0], a[1] + b[1])
        case "sub", [a, b]:
            return _finite(a[0] - b[1], a[1] - b[0])
        case ("mul" | "div") as name, [a, b] if name == "mul" or b[0] > 0:
            return _corners(name, a, b)
        case "mod", [_, (low, high)] if low > 0:
            return 0, high - (0 if node.out.type.dtype.is_float else 1)
        case "floordiv", [(low, high), (by, same)] if by == same > 0 and math.isfinite(high - low):
            return low // by, high // by
        case name, [only] if name in _SAME:
            return only
    return _KNOWN.get(node.op.name)


def _finite(low: float, high: float) -> Range | None:
    return None if low != low or high != high else (low, high)


def _corners(name: str, a: Range, b: Range) -> Range | None:
    """The extremes of products or quotients are those of the ends; none where 0 meets infinity."""
    found = [x * y if name == "mul" else x / y for x in a for y in b]
    return None if any(x != x for x in found) else (min(found), max(found))
