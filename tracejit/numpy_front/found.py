"""Whether a step is one over numpy arrays: asked once, before its first trace. No rule is loaded
for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np
import torch

from tracejit.capture.python.bytecode import contents, names_in

_DEEP = 4  # containers in each other
_WIDE = 200  # items of a container


def reads_arrays(function: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether a step has numpy arrays among its arguments, closure variables and the globals that
    it names, and nothing of torch's."""
    names = names_in(function.__code__).globals
    roots = [*args, *kwargs.values(), *map(contents, function.__closure__ or ())]
    roots += [*map(function.__globals__.get, names), *(function.__defaults__ or ())]
    roots += (function.__kwdefaults__ or {}).values()
    found = False
    for x in _leaves(roots, 0):
        if isinstance(x, (torch.Tensor, torch.nn.Module, torch.optim.Optimizer)):
            return False
        if type(x) is ModuleType and x.__name__.partition(".")[0] == "torch":
            return False
        found = found or type(x) is np.ndarray
    if found or np not in _modules(function):
        return found
    return _through_objects(roots)


def _modules(function: Callable) -> list[object]:
    """The modules that the step's own module names: one that has no numpy computes with none."""
    return [x for x in [*function.__globals__.values()] if type(x) is ModuleType]


def _through_objects(roots: list) -> bool:
    """Whether there are arrays in attributes of objects, or in variables of helpers, and nothing of
    torch's anywhere."""
    from tracejit.numpy_front.places import Reached

    reached = Reached(roots)
    if reached.of_torch:
        return False
    held = [x for at in reached.holders for x in (at.values() if isinstance(at, dict) else at)]
    held += [contents(at) if key is None else at[key] for at, key in reached.variables]
    return any(type(x) is np.ndarray for x in _leaves(held, 0))


def _leaves(items: list | tuple, depth: int) -> Iterator[object]:
    for x in items[:_WIDE]:
        if type(x) in (list, tuple, dict) and depth < _DEEP:
            yield from _leaves([*x.values()] if type(x) is dict else x, depth + 1)
        else:
            yield x
