"""Runtime integers among the arguments of a torch call.

Next to a tensor of floats an int computes as a float does, so there it becomes one. As an index, or
as the start of a slice of a fixed length, it says where a view lies (`views.py`). Anywhere else, as
a size, an axis, next to a tensor of integers, or in place of a new tensor's number, it is part of
what the call does: it is pinned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from tracejit.capture.trace.scalars import TracedInt, pinned, to_float
from tracejit.capture.trace.state import TraceState
from tracejit.capture.trace.tensor import TO_IR
from tracejit.ir.graph import Node, Value

_OPERATORS = ("add", "sub", "mul", "div", "truediv", "pow")
# functions whose numbers are operands, by name, without the signs of other spellings of them
_WITH_OPERANDS = frozenset(
    {
        *_OPERATORS,
        *(f"{side}{name}" for side in "ri" for name in _OPERATORS),
        *("subtract", "multiply", "divide", "true_divide", "float_power"),
        *("eq", "ne", "lt", "le", "gt", "ge"),
        *("not_equal", "less", "less_equal", "greater", "greater_equal"),
        *("clamp", "clamp_min", "clamp_max", "clip", "lerp", "addcmul", "addcdiv"),
        *("fill", "masked_fill"),
    }
)
_LISTS = frozenset({list, tuple})


def settled(func: Callable, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of a call, with a float or a plain int for each runtime integer."""
    given = (*args, *kwargs.values())
    if not any(map(_holds_integer, given)):
        return args, kwargs
    name = func.__name__
    if name in ("select", "narrow"):
        return args, kwargs
    if name in ("__getitem__", "__setitem__"):
        into, index, *value = args
        change = to_float if _is_float(into) else pinned
        return (into, _index(index), *map(change, value)), kwargs
    among = name.removeprefix("_foreach_").strip("_") in _WITH_OPERANDS
    convert = _as_floats if among and any(map(_is_float, _tensors(given))) else _pinned
    return tuple(map(convert, args)), {k: convert(x) for k, x in kwargs.items()}


def difference(t: TraceState, a: TracedInt, b: TracedInt) -> int | None:
    """a - b, if it is the same whatever the two are."""
    terms, constant = _sum(t, a.value)
    others, less = _sum(t, b.value)
    return constant - less if terms == others else None


Terms = dict[Value, int]  # how often a sum has a value


def _sum(t: TraceState, wanted: Value) -> tuple[Terms, float]:
    """A host value as a sum of others and a constant."""
    pending = [wanted]
    while wanted not in t.sums:
        x = pending[-1]
        node = t.producers.get(x)
        missing = () if node is None else [v for v in node.inputs if v not in t.sums]
        if missing:
            pending += missing
            continue
        t.sums[x] = ({x: 1}, 0) if node is None else _sum_of(t, node)
        pending.pop()
    return t.sums[wanted]


def _sum_of(t: TraceState, node: Node) -> tuple[Terms, float]:
    """What a node of host arithmetic computes, given the sums that its operands are."""
    name = node.op.name
    parts = [t.sums[arg] if isinstance(arg, Value) else ({}, arg) for arg in node.args]
    exact = type(t.scalars.numbers.get(node.out)) is int  # floats are rounded
    if exact and name in ("host_add", "host_sub"):
        (terms, constant), (more, least) = parts
        return _total(terms, more, 1 if name == "host_add" else -1, constant, least)
    if exact and name == "host_mul" and not all(terms for terms, _ in parts):
        (terms, constant), (_, by) = parts if parts[0][0] else reversed(parts)
        return _total({}, terms, by, 0, constant)
    alike = name, *((frozenset(terms.items()), constant) for terms, constant in parts)
    return {t.alike.setdefault(alike, node.out): 1}, 0


def _total(a: Terms, b: Terms, times: float, constant: float, more: float) -> tuple[Terms, float]:
    """(a + constant) + times · (b + more)"""
    sums = {x: a.get(x, 0) + times * b.get(x, 0) for x in (*a, *b)}
    return {x: n for x, n in sums.items() if n}, constant + times * more


def _holds_integer(x: object) -> bool:
    if type(x) is slice:
        x = (x.start, x.stop, x.step)
    elif isinstance(x, torch.Size):
        return False
    return any(map(_holds_integer, x)) if type(x) in _LISTS else type(x) is TracedInt


def _tensors(xs: tuple | list) -> Iterator[torch.Tensor]:
    for x in xs:
        if isinstance(x, torch.Tensor):
            yield x
        elif type(x) in _LISTS:
            yield from _tensors(x)


def _is_float(x: torch.Tensor) -> bool:
    return x.dtype in TO_IR and TO_IR[x.dtype].is_float


def _pinned(x: object) -> object:
    if type(x) is slice:
        return slice(*map(pinned, (x.start, x.stop, x.step)))
    return type(x)(map(_pinned, x)) if type(x) in _LISTS else pinned(x)


def _index(x: object) -> object:
    """What is between the brackets: a view may start where an integer says."""
    if type(x) is tuple:
        return tuple(map(_index, x))
    return _pinned(x) if type(x) is list else x


def _as_floats(x: object) -> object:
    return type(x)(map(_as_floats, x)) if type(x) in _LISTS else to_float(x)
