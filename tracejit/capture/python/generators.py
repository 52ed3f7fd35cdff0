"""The functions of `random` and `numpy.random` while a step is traced.

Each one that draws a number is a wrapper then, as those of math are (`mathematics.py`). Called in
a traced step it draws the number as an event of the trace, like torch's draws, and returns it as
`.item()` would. All other calls go to the function itself.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch
from torch.overrides import _get_current_function_mode_stack

from tracejit.capture.functions.sampling import number_drawn
from tracejit.capture.python import profiler
from tracejit.capture.trace.active import TraceMode, current
from tracejit.capture.trace.scalars import TracedFloat, TracedInt, pinned
from tracejit.capture.trace.sources import FLOATS, INTEGERS, NUMPY, PYTHON, Source, is_usual
from tracejit.capture.trace.trace import Trace

_MODULES = {"random": random, "numpy.random": np.random}
_NO_NUMBERS = frozenset({"size", "dtype"})
_WHOLE = 1 << 62  # integers below it are drawn as such


def _given(
    source: Source, name: str, args: tuple, kwargs: dict
) -> tuple[tuple[str, ...], tuple] | None:
    """The names of the last numbers, and all numbers, of a call that draws a number; None for any
    other one."""
    most = FLOATS[source.module].get(name)
    whole = most is None
    if whole:
        most = INTEGERS[source.module][name]
    if source is NUMPY:
        kwargs = {k: x for k, x in kwargs.items() if not (k == "size" and x is None)}
    if len(args) + len(kwargs) > most or not _NO_NUMBERS.isdisjoint(kwargs):
        return None
    numbers = (*args, *kwargs.values())
    if not all(type(x) in (int, float, bool, TracedFloat, TracedInt) for x in numbers):
        return None
    if whole:
        numbers = tuple(map(pinned, numbers))
        if not all(-_WHOLE < x < _WHOLE for x in numbers) or (
            name == "getrandbits" and numbers > (62,)
        ):
            return None
    return tuple(kwargs), numbers


def _wrapper(source: Source, name: str, original: Callable) -> Callable:
    @functools.wraps(original)
    def wrapper(*args: object, **kwargs: object) -> object:
        t = current()
        if t is None:
            return original(*args, **kwargs)
        given = _given(source, name, args, kwargs) if _is_open(t) else None
        if given is None:
            if _is_scheduled(t):  # a replay may call it sooner
                t.journal.forget()
                t.scalars.taken(f"a scheduler draws by {source.module}.{name}")
            return elsewhere((source.module, name), original, args, kwargs)
        whole = name in INTEGERS[source.module]
        names, numbers = given
        return _drawn(t, source.module, name, whole, names, *numbers).item()

    return wrapper


def elsewhere(of: tuple[str, str], original: Callable, args: tuple, kwargs: dict) -> object:
    """A call that is no event of the trace. The proof hears of it (`proof/watch.py`)."""
    return original(*map(pinned, args), **{k: pinned(x) for k, x in kwargs.items()})


def _drawn(t: Trace, *what: object) -> torch.Tensor:
    """The number in a tensor. How the function computes it is its own affair."""
    paused = profiler.pause()
    try:
        return t.mode.compared(number_drawn, what)
    finally:
        if paused:
            profiler.go_on()


def _is_open(t: Trace) -> bool:
    """Whether a draw can be an event of the trace here: not inside another function mode, such as
    vmap's, nor where a scheduler computes, which a replay calls again."""
    if not torch._C._is_torch_function_mode_enabled() or not is_usual():
        return False
    return isinstance(_get_current_function_mode_stack()[-1], TraceMode) and not _is_scheduled(t)


def _is_scheduled(t: Trace) -> bool:
    """Whether a scheduler's step runs."""
    return t.hyperparameters is not None and t.hyperparameters.inside


# (module, name, the function, its wrapper)
_WRAPPED: tuple[tuple[ModuleType, str, Callable, Callable], ...] = tuple(
    (_MODULES[source.module], name, original, _wrapper(source, name, original))
    for source in (PYTHON, NUMPY)
    for name, original in source.functions.items()
)
_PLACES = [(vars(module), *of) for module, *of in _WRAPPED]  # a setattr takes twice as long
_BY_ID = {id(original): wrapper for _, _, original, wrapper in _WRAPPED}
_AT = {(id(module), name): original for module, name, original, _ in _WRAPPED}


def wrapper_of(x: object) -> Callable | None:
    """The wrapper of a function of these modules; None for anything else."""
    return _BY_ID.get(id(x))


def is_at_home(holder: object, name: object, x: object) -> bool:
    """Whether x is such a function, in the module itself, where a wrapper stands for it."""
    return x is not None and isinstance(holder, ModuleType) and _AT.get((id(holder), name)) is x


def install() -> None:
    """Put the wrappers in place, where nobody has put another function."""
    for names, name, original, wrapper in _PLACES:
        if names.get(name) is original:
            names[name] = wrapper


def remove() -> None:
    """Put the functions themselves back."""
    for names, name, original, wrapper in _PLACES:
        if names.get(name) is wrapper:
            names[name] = original
