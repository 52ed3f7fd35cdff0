"""Runtime integers among the arguments of a torch call.

Next to a tensor of floats an int computes as a float does, so there it becomes one. Next to
a tensor of integers, and in a new one, it is a number that the plan is given. As an index, or as
the start of a slice of a fixed length, it says where a view lies (`views.py`). Anywhere else, as a
size or an axis, it is part of what the call does: it is pinned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from tracejit.capture.trace.scalars import TracedInt, is_runtime, pinned, plain, to_float
from tracejit.capture.trace.state import TraceState
from tracejit.capture.trace.tensor import TO_IR
from tracejit.ir.graph import Node, Value
from tracejit.ir.types import DType, b1, i32, i64

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


# those that take a tensor of no axes in the place of the number, the second operand
_NEXT_TO_INTEGERS = frozenset(
    {
        *("add", "radd", "iadd", "sub", "rsub", "isub", "subtract"),
        *("mul", "rmul", "imul", "multiply"),
        *("eq", "ne", "lt", "le", "gt", "ge"),
        *("not_equal", "less", "less_equal", "greater", "greater_equal"),
    }
)
_QUOTIENTS = frozenset({"div", "truediv", "rdiv", "rtruediv", "divide", "true_divide"})
_FACTORIES = frozenset({"full", "full_like", "new_full", "tensor", "as_tensor", "scalar_tensor"})
_EXACT = 2**53  # below it a float, which is what a plan is given, tells an int


def settled(t: TraceState, func: Callable, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of a call, with what each runtime integer is there: a float, a place, a tensor
    of no axes, or a plain int."""
    given = (*args, *kwargs.values())
    if not any(map(_holds_integer, given)):
        return args, kwargs
    name = func.__name__
    if name in ("select", "narrow") or name in _FACTORIES:
        return args, kwargs
    if name in ("__getitem__", "__setitem__"):
        into, index, *value = args
        return (into, _index(index), *(_held_by(t, into, x) for x in value)), kwargs
    called, convert = name.removeprefix("_foreach_").strip("_"), _pinned
    if any(map(_is_float, _tensors(given))):
        convert = _as_floats if called in _WITH_OPERANDS else _pinned
    elif called in _QUOTIENTS and "rounding_mode" not in kwargs:
        convert = _as_floats
    elif called == "fill":
        args = (args[0], *(_held_by(t, args[0], x) for x in args[1:]))
    elif called in _NEXT_TO_INTEGERS and len(args) == 2:
        args = tuple([_next_to(t, *pair) for pair in (args, args[::-1])])[::-1]
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


def fits(x: TracedInt, dtype: DType) -> bool:
    """Whether a tensor of integers holds a runtime integer, as a decision; not asked of others."""
    if dtype is i64:
        return -_EXACT < x < _EXACT
    return dtype is i32 and -(2**31) <= x < 2**31


def held(x: object, dtype: DType) -> object:
    """A number as a new tensor of a dtype takes it: a runtime integer stays one, or is a float,
    where the plan can be given it."""
    if not is_runtime(x) or type(x) is not TracedInt:
        return plain(x) if type(x) is TracedInt else x
    if dtype.is_float:
        return to_float(x)
    return x if fits(x, dtype) else x.pin()


def _held_by(t: TraceState, into: torch.Tensor, x: object) -> object:
    """A number that is written into a tensor."""
    if type(x) is not TracedInt or into.dtype not in TO_IR:
        return x
    number = held(x, TO_IR[into.dtype])
    return _tensor(t, number, into) if type(number) is TracedInt else number


def _next_to(t: TraceState, tensor: object, x: object) -> object:
    """The second operand of an operation, next to a tensor of integers with axes, or of i64."""
    if type(x) is not TracedInt or not isinstance(tensor, torch.Tensor) or not is_runtime(x):
        return x
    dtype = TO_IR.get(tensor.dtype)
    if dtype is not i64 and not (tensor.ndim and dtype in (i32, b1)):
        return x
    return _tensor(t, x, tensor) if fits(x, i64 if dtype is b1 else dtype) else x


def _tensor(t: TraceState, x: TracedInt, like: torch.Tensor) -> torch.Tensor:
    """A runtime integer as a tensor of no axes."""
    return t.fresh(t.b.full(x.value, shape=(), dtype=i64, device=str(like.device)))


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
