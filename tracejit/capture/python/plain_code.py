"""Functions that compute with tensors and do nothing else: the backward of a custom Function.

In: a class of autograd functions. Out: what its derivative reads of Python besides its arguments. A
trace that goes as an earlier one does not run it: what it would do follows from its arguments, and
from that.
"""

from __future__ import annotations

import builtins
import dis
import functools
import math
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType

import torch
from torch.autograd.function import Function

from tracejit.capture.python import mathematics
from tracejit.capture.python.bytecode import contents
from tracejit.capture.trace.table import RULES

_VALUES = (bool, int, float, str, type(None), torch.dtype, torch.device)
_BUILTINS = frozenset(
    getattr(builtins, name)
    for name in (
        *("range", "len", "zip", "enumerate", "abs", "min", "max", "sum", "tuple", "list", "any"),
        *("all", "float", "int", "bool", "isinstance", "reversed", "round", "slice", "pow", "set"),
        *("ValueError", "TypeError", "RuntimeError", "NotImplementedError", "AssertionError"),
        *("map", "filter", "sorted", "divmod", "dict", "iter", "next"),
    )
)
_OF_TORCH = frozenset({torch.no_grad, torch.enable_grad, torch.Size, torch.Tensor})
_MODULES = frozenset(
    {torch, torch.nn, torch.nn.functional, torch.special, torch.linalg, torch.fft, math}
)
# what changes something that outlives a call, or comes by what is not spelled
_OUT_OF_BOUNDS = frozenset(
    {
        *("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_ATTR", "DELETE_ATTR", "STORE_NAME", "LOAD_NAME"),
        *("IMPORT_NAME", "IMPORT_FROM", "IMPORT_STAR", "LOAD_BUILD_CLASS", "YIELD_VALUE", "SEND"),
        *("DELETE_NAME", "DELETE_DEREF", "LOAD_CLASSDEREF", "GET_AWAITABLE", "SETUP_ANNOTATIONS"),
    }
)
_WRAPPED_BY = ("torch.autograd.function", "torch.amp.autocast_mode")
_held: dict[int, object] = {}  # what is told by its identity stays alive


def reads_of(cls: type[Function]) -> tuple | None:
    """What the backward of a custom Function reads besides its arguments: plain values, and numbers
    that tell the functions apart; None if it may do more than compute with tensors."""
    found: list[object] = []
    for name in ("backward", "vjp"):
        function = getattr(cls, name)
        if function is getattr(Function, name):
            continue
        while type(function) is FunctionType and _wraps(function):
            function = function.__wrapped__
        if type(function) is not FunctionType or not _read(function, found, 0):
            return None
    return tuple(found)


def _wraps(function: FunctionType) -> bool:
    """Whether a function is one of torch's around a user's: `@once_differentiable`."""
    return function.__globals__.get("__name__") in _WRAPPED_BY and hasattr(function, "__wrapped__")


def _read(function: FunctionType, found: list[object], depth: int) -> bool:
    code = function.__code__
    names = _names(code)
    if names is None or depth > 3 or function.__defaults__ or function.__kwdefaults__:
        return False
    found.append(_identity(code))
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    for kind, name, attributes in names:
        if kind == "cell" and name not in cells:
            continue  # a variable of the function's own
        if kind == "cell":
            x = contents(cells[name])
        else:
            x = function.__globals__.get(name, getattr(builtins, name, function))
        for attribute in attributes:
            if not isinstance(x, ModuleType) or x not in _MODULES:
                break
            x = getattr(x, attribute, function)
        if not _is_plain(x, found, depth):
            return False
    return True


def _is_plain(x: object, found: list[object], depth: int) -> bool:
    if type(x) in _VALUES:
        found.append(x)
        return True
    if type(x) is FunctionType and not (x.__module__ or "").startswith("torch"):
        return _read(x, found, depth + 1)
    try:
        known = x in _BUILTINS or x in _OF_TORCH or x in RULES or mathematics.is_function(x)
    except TypeError:  # what has no hash
        return False
    if known:
        found.append(_identity(x))
    return known


def _identity(x: object) -> int:
    _held[id(x)] = x
    return id(x)


@functools.lru_cache(1000)
def _names(code: CodeType) -> tuple[tuple[str, str, tuple[str, ...]], ...] | None:
    """What code reads by name, of globals and of cells, with the attributes that it asks of each at
    once; None if it does what is not to be followed."""
    found: dict[tuple[str, str, tuple[str, ...]], None] = {}
    instructions = [*dis.get_instructions(code)]
    for i, x in enumerate(instructions):
        if x.opname in _OUT_OF_BOUNDS:
            return None
        if x.opname == "STORE_DEREF" and x.argval in code.co_freevars:
            return None
        if x.opname in ("LOAD_GLOBAL", "LOAD_DEREF"):
            kind = "global" if x.opname == "LOAD_GLOBAL" else "cell"
            found[kind, x.argval, tuple(_attributes(instructions[i + 1 :]))] = None
    for inner in code.co_consts:
        if type(inner) is CodeType:
            theirs = _names(inner)
            if theirs is None:
                return None
            found |= dict.fromkeys(theirs)
    return tuple(found)


def _attributes(instructions: list[dis.Instruction]) -> Iterator[str]:
    for x in instructions:
        if x.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            return
        yield x.argval
