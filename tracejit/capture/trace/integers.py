"""Runtime integers among the arguments of a torch call.

Next to a tensor of floats an int computes as a float does, so there it becomes one. Anywhere else,
as a size, an axis, an index, next to a tensor of integers, or in place of a new tensor's number, it
is part of what the call does: it is pinned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from tracejit.capture.trace.scalars import TracedInt, pinned, to_float
from tracejit.capture.trace.tensor import TO_IR

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
    convert = _pinned
    if any(TO_IR[x.dtype].is_float for x in _tensors(given) if x.dtype in TO_IR):
        name = func.__name__
        if name.removeprefix("_foreach_").strip("_") in _WITH_OPERANDS:
            convert = _as_floats
        elif name == "__setitem__":
            return (args[0], _pinned(args[1]), to_float(args[2])), kwargs
    return tuple(map(convert, args)), {k: convert(x) for k, x in kwargs.items()}


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


def _pinned(x: object) -> object:
    if type(x) is slice:
        return slice(*map(pinned, (x.start, x.stop, x.step)))
    return type(x)(map(_pinned, x)) if type(x) in _LISTS else pinned(x)


def _as_floats(x: object) -> object:
    return type(x)(map(_as_floats, x)) if type(x) in _LISTS else to_float(x)
