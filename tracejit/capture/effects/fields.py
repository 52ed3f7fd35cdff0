"""Objects among the arguments of a step that are no more than their attributes, as batches are.

In: an argument. Out: what it has, what holds that, and whether there are tensors or floats in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from types import FunctionType, ModuleType, SimpleNamespace

import torch

from tracejit.capture.effects.effects import has_plain_objects, is_named_tuple
from tracejit.capture.effects.variables import Attributes, Holder
from tracejit.capture.python.classes import slots

MANY = 1000  # items; more are data
PLAIN = (bool, int, float, str, type(None))
_OWNERS = (torch.nn.Module, torch.optim.Optimizer, type, ModuleType, FunctionType, str)


def is_its_attributes(x: object) -> bool:
    """Whether an object of the user's has all that it has in its `__dict__` and its slots, so that
    another one with the same attributes is like it."""
    kind = type(x)
    if isinstance(x, _OWNERS) or (kind is not SimpleNamespace and not has_plain_objects(kind)):
        return False
    held = vars(x) if kind.__dictoffset__ else {}
    return type(held) is dict and len(held) <= MANY


def attributes_of(x: object) -> dict[str, object]:
    """The attributes of such an object, those in slots first."""
    found = {}
    for name in slots(type(x)):
        with suppress(AttributeError):  # an empty slot
            found[name] = object.__getattribute__(x, name)
    return found | (vars(x) if type(x).__dictoffset__ else {})


def holder_of(x: object, name: str) -> Holder:
    """What holds an attribute of such an object, as a state variable has it."""
    return Attributes(x) if name in slots(type(x)) else vars(x)


def holds_tensors(x: object) -> bool:
    """Whether an object has tensors in it, as a batch has; those of modules and optimizers are
    theirs."""
    pending, seen = [x], set()
    while pending and len(seen) < MANY:
        x = pending.pop()
        if isinstance(x, torch.Tensor):
            return True
        if id(x) in seen or isinstance(x, _OWNERS):
            continue
        seen.add(id(x))
        if isinstance(x, dict):
            pending += x.values()
        elif isinstance(x, (list, tuple)):
            pending += x
        else:
            attributes = x.__dict__ if type(x).__dictoffset__ else {}
            pending += attributes.values() if isinstance(attributes, dict) else ()
            pending += (getattr(x, name, None) for name in slots(type(x)))
    return False


def has_float_fields(values: Sequence[object]) -> bool:
    """Whether one of these arguments is a container or object with floats and tensors in it."""
    containers = (x for x in values if not isinstance(x, (*PLAIN, *_OWNERS, torch.Tensor)))
    return any(_holds_floats(x) and holds_tensors(x) for x in containers)


def _holds_floats(x: object, depth: int = 3) -> bool:
    if type(x) is float:
        return True
    if depth == 0 or isinstance(x, (*PLAIN, *_OWNERS, torch.Tensor)):
        return False
    if isinstance(x, (list, tuple, dict)):
        items = [*x.values()] if isinstance(x, dict) else x
    else:
        items = [*attributes_of(x).values()] if is_its_attributes(x) else []
    return len(items) <= MANY and any(_holds_floats(item, depth - 1) for item in items)


def has_numbers(x: object) -> bool:
    """Whether an argument is a tuple, with names or not, with floats in it."""
    if type(x) is tuple:
        return any(type(item) in (float, tuple) for item in x)
    return is_named_tuple(type(x)) and any(type(item) is float for item in x)
