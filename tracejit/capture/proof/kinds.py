"""What kinds of objects a walk of the heap meets: what it can see into, and what is only data."""

from __future__ import annotations

import collections
import dataclasses
import functools
import gc
import io
import logging
import operator
import random
import re
import struct
import sys
import typing
from collections import OrderedDict, defaultdict, deque
from collections.abc import Generator, Iterable, Iterator
from types import (
    BuiltinFunctionType,
    FunctionType,
    GenericAlias,
    MappingProxyType,
    MethodDescriptorType,
    ModuleType,
    SimpleNamespace,
    UnionType,
    WrapperDescriptorType,
)

import numpy as np
import torch
from torch.torch_version import TorchVersion

from tracejit.capture.functions.collectives import ENGINE
from tracejit.capture.proof.pure import PURE_BUILTINS, pure_numpy
from tracejit.capture.python.bytecode import is_value
from tracejit.capture.python.classes import is_heap_type, is_stream, module_of
from tracejit.capture.trace.scalars import plain
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
    {
        *("torch", "builtins", "collections", "abc", "typing", "enum", "functools", "contextlib"),
        "numpy",
    }
)


_STREAMS_TELL = ("closed", "encoding", "errors", "newlines", "line_buffering", "write_through")


def shows_only(x: object, names: frozenset[str] | None) -> bool:
    """Whether something is a standard stream, of which code that may read attributes of these names
    (None: any) reads nothing: it calls its methods, which is seen as `print` is."""
    if not is_stream(x) or names is None:
        return False
    return names.isdisjoint((*_STREAMS_TELL, *getattr(x, "__dict__", ())))


def is_data(x: object) -> bool:
    """Whether an object is what it holds: its identity matters no more than a dict's."""
    if isinstance(x, type) or not plain_object(x):
        return False
    if dataclasses.is_dataclass(x) or isinstance(x, (*CONTAINERS, SimpleNamespace)):
        return True
    attributes = vars(x) if type(x).__dictoffset__ else {}
    held = [i for part in [*attributes.values()] for i in _items(part)]
    simple = all(isinstance(i, torch.Tensor) or is_value(i) for i in held)
    return simple and any(isinstance(i, torch.Tensor) for i in held)


def _items(x: object) -> Iterable[object]:
    """The items of a container, or x alone."""
    if type(x) in (list, tuple):
        return x
    return x.values() if type(x) is dict else (x,)


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
    if pure_numpy(x):
        return True
    try:
        return x in PURE_BUILTINS or x in RULES
    except TypeError:
        return False


def pure_type(x: type) -> bool:
    """Whether making an instance of a type of C does nothing else."""
    return (
        x in PURE_BUILTINS
        or module_of(x).partition(".")[0] in _PURE_TYPES
        or (x.__module__ == "numpy" and issubclass(x, _OF_NUMPY) and not issubclass(x, np.memmap))
        or issubclass(x, (BaseException, SimpleNamespace))
    )


_PURE_TYPES = frozenset(
    {"torch", "itertools", "collections", "operator", "_struct", "re", "functools"}
)
_OF_NUMPY = (np.generic, np.dtype, np.ndarray, np.broadcast)
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_INSTEAD = (  # of an object that a guard cannot see into
    (np.ndarray, "make it a tensor outside the step"),
    ((io.IOBase, Generator), "use it outside the step"),
    (_GENERATORS, "draw the numbers outside the step"),
    (Iterator, "take its next item outside the step and pass it"),
)


def instead_of(x: object) -> str:
    """What to write where a step reads an object that a guard cannot see into."""
    found = [text for kinds, text in _INSTEAD if isinstance(x, kinds)]
    return found[0] if found else "keep what the step needs of it in numbers, tensors or containers"


_CONSTANTS = (re.Pattern, struct.Struct, np.dtype, torch.finfo, torch.iinfo, TorchVersion)
_CONSTANTS += (operator.itemgetter, GenericAlias, UnionType, typing.TypeVar, typing.ParamSpec)
_CONSTANTS += (type(typing.Any), type(typing.Optional), *ENGINE)


def logs(logger: logging.Logger) -> tuple:
    """All that decides which messages a logger takes. One that is taken is seen to be written."""
    return logger.getEffectiveLevel(), logger.disabled, logger.manager.disable


def constant(x: object) -> bool:
    """Whether an object of C always is what it is, and its methods compute."""
    return isinstance(x, _CONSTANTS)


def cached_values(x: object) -> list | None:
    """The arguments and results that a function under `functools.lru_cache` keeps; None if x is
    none. Runtime scalars of earlier traces among them are plain floats by now."""
    if type(x) is not _CACHED:
        return None
    found: list = []
    unbounded = x.cache_info().maxsize is None
    for held in gc.get_referents(x):
        if type(held) is dict and held is not x.__dict__ and unbounded:
            found += [part for item in held.copy().items() for part in item]  # threads add to it
        elif not unbounded and type(held) not in (type, dict, FunctionType, object):
            found.append(held)  # of its entries, which no collector tracks
    if len(found) != 2 * x.cache_info().currsize:
        found.append(_CACHED)  # among them is one that is no plain value
    return [_without_loggers(plain(x)) for x in found]


def _without_loggers(x: object) -> object:
    """What a cache keeps, where `logger.warn_once(text)` says something only once."""
    if type(x) is tuple:
        return tuple(map(_without_loggers, x))
    return x.name if isinstance(x, logging.Logger) else x


def cached_text(x: object) -> list[str]:
    """The same as text: a cache that was cleared and filled anew may hold other results."""
    return [repr(value) for value in cached_values(x)]


_CACHED = type(functools.lru_cache(lambda: None))


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
