"""What `type(x)` and `float(x)` say of a trace's stand-ins: what eager would have.

Neither can be told by an object what to say. So while a step is traced, these names stand for
`asked` and `as_float` in the globals of the user's code that the step leads to: the modules of its
functions and objects, and what these import. They go when the trace is over. `type(x) is
torch.Tensor` then holds, as libraries write it, and `float(loss)` stays a runtime scalar. `float`
is left alone in modules that do more with it than to call it or to ask `isinstance`.
"""

from __future__ import annotations

import dis
import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, FunctionType, ModuleType
from typing import Generic, TypeVar

import numpy as np
import torch

from tracejit.capture.python import histories, profiler
from tracejit.capture.python.bytecode import codes
from tracejit.capture.python.kept import Keyed
from tracejit.capture.python.numerics import TracedFloat64
from tracejit.capture.python.tables import STAND_FOR
from tracejit.capture.trace.active import current
from tracejit.capture.trace.scalars import TracedFloat, TracedInt, is_runtime, to_float
from tracejit.capture.trace.tensor import TracedTensor
from tracejit.forks import own_lock

T = TypeVar("T")

_STANDS_FOR = {
    **{TracedTensor: torch.Tensor, TracedInt: int},
    **{TracedFloat: float, TracedFloat64: np.float64},
    **STAND_FOR,
    Keyed: dict,
}
_LIBRARIES = frozenset({"torch", "numpy", "tracejit", "triton"}) | sys.stdlib_module_names


class _StandIn(type):
    """The class of a stand-in, which is its base for whoever compares or asks."""

    def __instancecheck__(cls, x: object) -> bool:
        return isinstance(x, cls.__base__)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, cls.__base__)

    def __eq__(cls, other: object) -> bool:
        return other is cls.__base__ or other is cls

    def __hash__(cls) -> int:
        return hash(cls.__base__)


class _Asked(_StandIn):
    """The class of `asked`."""

    def __call__(cls, *args: object, **named: object) -> type:
        if len(args) != 1:
            return type(*args, **named)
        kind = type(args[0])
        return _STANDS_FOR.get(kind, kind)


class asked(type, metaclass=_Asked):
    """`type`, which says of what stands for a tensor or float in a trace that it is one."""


class _AsFloat(_StandIn):
    """The class of `as_float`."""

    def __call__(cls, *args: object) -> float:
        if len(args) == 1:
            x = args[0]
            if type(x) is TracedTensor or (isinstance(x, torch.Tensor) and current() is not None):
                x = x.item()
            if is_runtime(x):
                return to_float(x)
            return float(x)
        return float(*args)


class as_float(float, metaclass=_AsFloat):
    """`float`, which leaves a number of a trace what it is."""


_STANDINS = {"type": asked, "float": as_float}


# ---- whose code it is

Needed = list[tuple[dict, str]]  # namespaces, each with a name that it needs

_MANY = 1000  # namespaces of which something is remembered


class _PerNamespace(Generic[T]):
    """What is computed of a namespace, remembered as long as that has as many names."""

    def __init__(self, compute: Callable[[dict], T]) -> None:
        self._compute = compute
        self._known: dict[int, tuple[dict, int, T]] = {}

    def __call__(self, namespace: dict) -> T:
        known = self._known.get(id(namespace))
        if known is None or known[0] is not namespace or known[1] != len(namespace):
            if len(self._known) >= _MANY:
                self._known.clear()
            known = namespace, len(namespace), self._compute(namespace)
            self._known[id(namespace)] = known
        return known[2]


def _namespaces(start: Iterable[object]) -> Needed:
    """The globals that functions and objects of the user lead to, where the code needs a name."""
    found: dict[tuple[int, str], tuple[dict, str]] = {}
    for x in start:
        needed = []
        for namespace in _own(x):
            needed += _leads_to(namespace)
        if type(x) is FunctionType:  # which may have been made in another one
            uses = _uses(x.__code__) | _uses_in(x.__globals__)
            needed += [(x.__globals__, name) for name in _needs(uses)]
        found |= {(id(namespace), name): (namespace, name) for namespace, name in needed}
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


@_PerNamespace
def _leads_to(namespace: dict) -> Needed:
    """What is needed in a namespace and in those that it imports from."""
    found, seen, pending = [], {id(namespace)}, [namespace]
    while pending:
        here = pending.pop()
        found += [(here, name) for name in _needs(_uses_in(here))]
        for x in list(here.values()):
            name = _module_name(x)
            module = None if _is_library(name) else sys.modules.get(name)
            if module is not None and id(vars(module)) not in seen:
                seen.add(id(vars(module)))
                pending.append(vars(module))
    return found


def _module_name(x: object) -> object:
    """The module of an object, or of its class. No code of the user's runs for that."""
    kind = type(x)
    if kind in (FunctionType, ModuleType):
        return vars(x).get("__name__") if kind is ModuleType else x.__module__
    return type.__getattribute__(x if issubclass(kind, type) else kind, "__module__")


def _codes_in(namespace: dict) -> Iterator[CodeType]:
    """The code of functions and of classes' methods in a namespace, decorated ones too; of those
    that look names up there: imported ones do so in their own."""
    for x in list(namespace.values()):
        methods = [x]
        if issubclass(type(x), type):  # whose own `__getattribute__` is not to run
            methods = list(type.__getattribute__(x, "__dict__").values())
        for f in methods:
            if type(f) in (property, staticmethod, classmethod):
                f = f.fget if type(f) is property else f.__func__
            while type(f) is FunctionType:
                if f.__globals__ is namespace:
                    yield f.__code__
                f = f.__dict__.get("__wrapped__")


def _needs(uses: frozenset[str]) -> list[str]:
    """The names that code needs to stand for something else."""
    return [name for name in _STANDINS if name in uses and f"all of {name}" not in uses]


@_PerNamespace
def _uses_in(namespace: dict) -> frozenset[str]:
    """What the code in a namespace uses."""
    return frozenset().union(*map(_uses, _codes_in(namespace)))


@functools.lru_cache(1000)
def _uses(code: CodeType) -> frozenset[str]:
    """Which of the names code uses: "float" where it is called, "all of float" where it may be
    passed on, or compared with a class."""
    found = set()
    for c in codes(code):
        if "type" in c.co_names:
            found.add("type")
        if "float" not in c.co_names:
            continue
        if not {"type", "__class__"}.isdisjoint(c.co_names):
            found.add("all of float")
        asked_for = 0  # instructions since `isinstance` was named
        for name, called in _loads(c):
            asked_for = 0 if name == "isinstance" else asked_for + 1
            if name == "float":
                found.add("float" if called or asked_for < _NEAR else "all of float")
    return frozenset(found)


def _loads(code: CodeType) -> Iterator[tuple[str | None, bool]]:
    """Per instruction: the name of a global that it loads, and whether that is to be called. (`dis`
    takes ten times as long, which counts in libraries of thousands of functions.)"""
    instructions, more = code.co_code, 0
    for i in range(0, len(instructions), 2):
        opcode, arg = instructions[i], instructions[i + 1] | more
        more = arg << 8 if opcode == _EXTENDED else 0
        if opcode == _LOAD_GLOBAL:
            yield code.co_names[arg >> 1], bool(arg & 1)
        elif opcode == _LOAD_NAME:
            yield code.co_names[arg], False
        elif opcode not in (_EXTENDED, _CACHE):
            yield None, False


_EXTENDED, _CACHE = dis.opmap["EXTENDED_ARG"], dis.opmap["CACHE"]
_LOAD_GLOBAL, _LOAD_NAME = dis.opmap["LOAD_GLOBAL"], dis.opmap["LOAD_NAME"]


_NEAR = 8


# ---- in place for the time of a trace

_lock = own_lock(sys.modules[__name__], "_lock", threading.Lock)
_users: Counter[tuple[int, str]] = Counter()  # traces that need a name in a namespace


@contextmanager
def standins(start: Sequence[object], *, with_histories: bool = False) -> Iterator[None]:
    """`type` and `float` say what eager would, in the code that some functions and objects lead
    to. With histories, so do the functions that these answer, in the modules of these objects."""
    instead = _STANDINS
    with _lock:
        with profiler.suspended():
            found = _namespaces(start)
            if with_histories:
                instead = _STANDINS | histories.STANDINS
                own = {id(namespace): namespace for x in start for namespace in _own(x)}
                found += [(n, name) for n in own.values() for name in histories.STANDINS]
        needed = [
            (namespace, name)
            for namespace, name in found
            if namespace.get(name, instead[name]) is instead[name]
        ]
        for namespace, name in needed:
            _users[id(namespace), name] += 1
            namespace[name] = instead[name]
    try:
        yield
    finally:
        with _lock:
            for namespace, name in needed:
                _users[id(namespace), name] -= 1
                if not _users[id(namespace), name]:
                    del _users[id(namespace), name]
                    if namespace.get(name) is instead[name]:
                        del namespace[name]
