"""What `type(x)` and `x.__class__` say of a trace's stand-ins: the class that eager would have.

`type` cannot be told by an object what to say. So while a step is traced, the name `type` stands
for `asked` in the globals of the user's code that the step leads to: the modules of its functions
and objects, and what these import. It goes when the trace is over. `is`, `==` and `in` then work,
as libraries write them: `type(x) is torch.Tensor`.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType, ModuleType

import torch

from tracejit.capture.python.bytecode import codes
from tracejit.capture.trace.scalars import TracedFloat
from tracejit.capture.trace.tensor import TracedTensor

_STANDS_FOR = {TracedTensor: torch.Tensor, TracedFloat: float}
_LIBRARIES = frozenset({"torch", "numpy", "tracejit", "triton"}) | sys.stdlib_module_names


class _Asked(type):
    """The class of `asked`."""

    def __call__(cls, *args: object, **named: object) -> type:
        if len(args) != 1:
            return type(*args, **named)
        kind = type(args[0])
        return _STANDS_FOR.get(kind, kind)

    def __instancecheck__(cls, x: object) -> bool:
        return isinstance(x, type)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, type)

    def __eq__(cls, other: object) -> bool:
        return other is type or other is cls

    def __hash__(cls) -> int:
        return hash(type)


class asked(type, metaclass=_Asked):
    """`type`, which says of what stands for a tensor or float in a trace that it is one."""


# ---- whose code it is

_found: dict[int, tuple[dict, int, list[dict]]] = {}  # by a namespace: its size, and what it needs
_MANY = 1000  # of these are remembered


def _namespaces(start: Iterable[object]) -> list[dict]:
    """The globals that functions and objects of the user lead to, where the code names `type`."""
    found: dict[int, dict] = {}
    for x in start:
        for namespace in _own(x):
            known = _found.get(id(namespace))
            if known is None or known[0] is not namespace or known[1] != len(namespace):
                if len(_found) >= _MANY:
                    _found.clear()
                known = namespace, len(namespace), list(_reached(namespace))
                _found[id(namespace)] = known
            found |= {id(n): n for n in known[2]}
        if type(x) is FunctionType and _names_type(x.__code__):
            found[id(x.__globals__)] = x.__globals__  # of a function made in another
    return list(found.values())


def _own(x: object) -> Iterator[dict]:
    """The globals of a function, or of an object's classes."""
    if type(x) is FunctionType:
        if not _is_library(x.__module__):
            yield x.__globals__
    elif type(x) not in (ModuleType, dict, list, tuple):
        for name in map(_module_name, type(x).__mro__):
            if not _is_library(name) and name in sys.modules:
                yield vars(sys.modules[name])


def _is_library(name: object) -> bool:
    return not isinstance(name, str) or name.partition(".")[0] in _LIBRARIES


def _reached(namespace: dict) -> Iterator[dict]:
    """Namespaces whose code names `type`, among one and those that it imports from."""
    seen, pending = {id(namespace)}, [namespace]
    while pending:
        current = pending.pop()
        if any(map(_names_type, _codes_in(current))):
            yield current
        for x in list(current.values()):
            name = _module_name(x)
            module = None if _is_library(name) else sys.modules.get(name)
            if module is not None and id(vars(module)) not in seen:
                seen.add(id(vars(module)))
                pending.append(vars(module))


def _module_name(x: object) -> object:
    """The module of an object, or of its class. No code of the user's runs for that."""
    kind = type(x)
    if kind in (FunctionType, ModuleType):
        return vars(x).get("__name__") if kind is ModuleType else x.__module__
    return type.__getattribute__(x if issubclass(kind, type) else kind, "__module__")


def _codes_in(namespace: dict) -> Iterator[CodeType]:
    """The code of functions and of classes' methods in a namespace, decorated ones too."""
    for x in list(namespace.values()):
        methods = list(vars(x).values()) if issubclass(type(x), type) else [x]
        for f in methods:
            if type(f) in (property, staticmethod, classmethod):
                f = f.fget if type(f) is property else f.__func__
            while type(f) is FunctionType:
                yield f.__code__
                f = f.__dict__.get("__wrapped__")


def _names_type(code: CodeType) -> bool:
    return any("type" in c.co_names for c in codes(code))


# ---- in place for the time of a trace

_lock = threading.Lock()
_users: Counter[int] = Counter()  # traces that need a namespace to have it, by its identity


@contextmanager
def standins(start: Iterable[object]) -> Iterator[None]:
    """`type` says what eager would, in the code that some functions and objects lead to."""
    with _lock:
        namespaces = [n for n in _namespaces(start) if n.get("type", asked) is asked]
        for namespace in namespaces:
            _users[id(namespace)] += 1
            namespace["type"] = asked
    try:
        yield
    finally:
        with _lock:
            for namespace in namespaces:
                _users[id(namespace)] -= 1
                if not _users[id(namespace)]:
                    del _users[id(namespace)]
                    if namespace.get("type") is asked:
                        del namespace["type"]
