"""What kinds of objects a walk of the heap meets: what it can see into, and what is only data."""

from __future__ import annotations

import collections
import dataclasses
import functools
import sys
from collections import OrderedDict, defaultdict, deque
from types import (
    BuiltinFunctionType,
    FunctionType,
    MappingProxyType,
    MethodDescriptorType,
    ModuleType,
    SimpleNamespace,
    WrapperDescriptorType,
)

from tracejit.capture.proof.watch import PURE_BUILTINS
from tracejit.capture.python.classes import is_heap_type
from tracejit.capture.trace.table import RULES

CONTAINERS = (list, tuple, dict, set, frozenset, deque, OrderedDict, defaultdict)
WRAPPERS = (staticmethod, classmethod, property, functools.partial, functools.cached_property)
C_FUNCTIONS = (
    *(BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType),
    collections._tuplegetter,  # an attribute of a namedtuple
)
SLOT = (type(FunctionType.__code__), type(FunctionType.__globals__))  # getset and member
CLASS_NOISE = frozenset(
    {
        *("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__slots__"),
        *("_abc_impl", "__dataclass_fields__", "__dataclass_params__", "__orig_bases__"),
    }
)

_LIBRARIES = frozenset(
    {"torch", "builtins", "collections", "abc", "typing", "enum", "functools", "contextlib"}
)


def is_data(x: object) -> bool:
    """Whether an object is what it holds: its identity matters no more than a dict's."""
    if isinstance(x, type) or not plain_object(x):
        return False
    return dataclasses.is_dataclass(x) or isinstance(x, (*CONTAINERS, SimpleNamespace))


def library_module(name: str) -> bool:
    """Whether classes of a module are taken as they are, but for the functions that ran."""
    root = name.partition(".")[0]
    return root in _LIBRARIES


def library(module: ModuleType) -> bool:
    """Whether a module is taken as it is: Python's own, torch, numpy."""
    root = module.__name__.partition(".")[0]
    return root in sys.stdlib_module_names or root in ("torch", "numpy", "tracejit")


def known_callable(x: object) -> bool:
    """Whether x is a builtin known to be pure, or a torch function that has a rule."""
    if is_heap_type(type(x)) and not isinstance(x, type):
        return False  # its __hash__ may be anything
    try:
        return x in PURE_BUILTINS or x in RULES
    except TypeError:
        return False


def pure_type(x: type) -> bool:
    """Whether making an instance of a type of C does nothing else."""
    if x in CONTAINERS:
        return True
    return x in PURE_BUILTINS or x.__module__.startswith("torch") or issubclass(x, BaseException)


def slots(cls: type) -> list[str]:
    """The attributes of instances that are no items of their dict."""
    found: list[str] = []
    for base in cls.__mro__:
        names = vars(base).get("__slots__", ())
        for name in [names] if isinstance(names, str) else names:
            private = name.startswith("__") and not name.endswith("__")
            found.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return [name for name in found if name not in ("__dict__", "__weakref__")]


def plain_object(x: object) -> bool:
    """Whether all that x holds can be seen from Python: its class and bases are Python's, but for
    object and the containers."""
    if type(x) is SimpleNamespace:
        return True
    return (
        is_heap_type(type(x))
        and all(
            base is object or base in CONTAINERS or (is_heap_type(base) and not _made_in_c(base))
            for base in type(x).__mro__
        )
        and not isinstance(x, MappingProxyType)
    )


def _made_in_c(cls: type) -> bool:
    """Whether a class comes from C, whose instances may hold what Python cannot see."""
    c_methods = (MethodDescriptorType, WrapperDescriptorType)
    return any(isinstance(f, c_methods) and f.__objclass__ is cls for f in vars(cls).values())
