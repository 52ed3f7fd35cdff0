"""The guard lines of objects: their classes, attributes, slots, and what they hold as containers.

`heap.py` walks through the rest, and calls `_object` for what is no value, tensor or container.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from enum import Enum
from types import CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace

import torch
from torch.autograd.function import Function
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tracejit.capture.effects.variables import (
    Attributes,
    Variable,
    has_attributes,
)
from tracejit.capture.proof.asked import asked_of
from tracejit.capture.proof.functions import Functions
from tracejit.capture.proof.kinds import (
    C_FUNCTIONS,
    CONTAINERS,
    WRAPPERS,
    cached_values,
    constant,
    instead_of,
    is_data,
    known_callable,
    library,
    logs,
    plain_object,
    pure_type,
    shows_only,
)
from tracejit.capture.proof.pure import pure_numpy
from tracejit.capture.proof.watch import origin
from tracejit.capture.python import mathematics
from tracejit.capture.python.bytecode import is_value
from tracejit.capture.python.classes import is_heap_type, module_of, slots


class Objects(Functions):
    """How a walk guards objects. It is a base of `Walk`, which has the rest."""

    def _object(
        self, x: object, at: str, path: str, owned: bool, found: Variable | None = None
    ) -> None:
        if found is not None and has_attributes(x):
            self.containers.append((found, x))
            self.assigned.append(found)
        if type(x) is MethodType:
            self._method(x, at, path)
            return
        if not owned and is_data(x) and not self._seen(x):  # a batch: made anew for each call
            place = self._found(x, at)
            self._keep.append(x)
            self._instance(x, place, path, owned=False)
            return
        place = self.constant(x)
        self.expect(f"{at} is {place}", path, x, at)
        if mathematics.is_function(x):
            why = f"it reads {path}, which is math.{x.__name__} by another name"
            self.unasked.append(why)
            self.about[why] = path
        self.asks_numpy |= pure_numpy(x)
        if known_callable(x) or constant(x) or shows_only(x, self.wanted) or self._was_seen(x):
            return
        if isinstance(x, FunctionType):
            self.reentrant |= x is self.root
            if origin(x.__code__) == "user" or x.__closure__:
                self.function(x, path)
        elif self._seen(x):
            return
        elif isinstance(x, type):
            self._class(x)
            if not is_heap_type(x) and not pure_type(x):
                self.refuse(f"it uses {path}, a type that is not known to be pure", path)
        elif isinstance(x, (Enum, ModuleType)):
            if isinstance(x, Enum) or not library(x):
                for name in ("_value_", *self._named(vars(x))):  # what is read as x.name
                    if name in vars(x):
                        inner = f"{self.constant(vars(x))}[{name!r}]"
                        self.visit(vars(x)[name], inner, f"{path}.{name.strip('_')}")
        elif isinstance(x, (*C_FUNCTIONS, CodeType, torch.Generator)):  # its calls are seen
            if isinstance(getattr(x, "__self__", None), CONTAINERS):  # items.append
                self.visit(x.__self__, f"{place}.__self__", path.rpartition(".")[0] or path)
        elif isinstance(x, weakref.ref):  # a guard would keep alive what it refers to
            # of a scheduler, which holds it too; to a tensor that is found elsewhere as well
            if isinstance(x(), Optimizer) or id(x()) in self.tensors:
                self.visit(x(), f"{place}()", path)
            else:
                self.refuse(f"it reads {path}, a weak reference", path)
        elif isinstance(x, logging.Logger):
            self.names["logs"] = logs
            self.check(f"logs({place}) == {logs(x)!r}", f"{path} takes other messages now")
            self._class(type(x))
        elif isinstance(x, WRAPPERS):
            self._wrapper(x, place, path)
        elif (results := cached_values(x)) is not None:
            self._cached(x, results, place, path)
        elif isinstance(x, CellType):
            self._cell(path, x)
        elif module_of(type(x)).startswith("tracejit") and callable(getattr(x, "_step", None)):
            self.visit(x._step, f"{place}._step", path)  # a compiled step inside: inlined
            for name in self._named(x.user_attributes()):  # step.calls += 1
                self._attribute(x, name, f"{place}.{name}", f"{path}.{name}")
        elif plain_object(x):
            self._instance(x, place, path)
        else:
            what = f"an object of type {type(x).__name__}"
            self.refuse(f"it reads {path}, {what}: {instead_of(x)}", path)

    def _method(self, x: MethodType, at: str, path: str) -> None:
        if isinstance(x.__self__, type) and x.__func__ is Function.apply.__func__:
            self.visit(x.__self__, f"{at}.__self__", path.removesuffix(".apply"))
            return
        at = self.local(at)
        method = f"type({at}) is {self.constant(MethodType)}"
        self.expect(f"{method} and {at}.__func__ is {self.constant(x.__func__)}", path, x, at)
        self.visit(x.__self__, f"{at}.__self__", path.rpartition(".")[0] or f"{path}.__self__")
        if isinstance(x.__func__, FunctionType):
            self.function(x.__func__, path)

    def _instance(self, x: object, at: str, path: str, *, owned: bool = True) -> None:
        cls = type(x)
        self.check(f"type({at}) is {self.constant(cls)}", f"{path} has another class now")
        self._class(cls)
        attributes = x.__dict__ if cls.__dictoffset__ else None
        if attributes is not None:
            if owned:
                place = self.constant(attributes)
                self.check(f"{at}.__dict__ is {place}", f"{path} has other attributes now")
            else:
                place = self._found(attributes, f"{at}.__dict__")
            names = f"[*{place}] == {self.constant([*attributes])}"
            self.check(names, f"{path} has other attributes now")
            own = not isinstance(x, LRScheduler)  # which is called as it is
            if isinstance(x, Optimizer):
                self.groups.update(map(id, x.param_groups))
            named = self._named(attributes)
            if self._compared and isinstance(x, SimpleNamespace):
                named = [*attributes]
            elif isinstance(x, LRScheduler) and self._of_schedulers is not None:
                named = asked_of(self, x, place, path, self._of_schedulers)
            for name in named:
                self.visit(
                    attributes[name],
                    f"{place}[{name!r}]",
                    f"{path}.{name}",
                    ("entry", id(attributes), name),
                    owned=owned,
                    place=self._item(attributes, name, f"{path}.{name}", owned) if own else None,
                )
        named = self._named(slots(cls))
        inside = Attributes(x)
        if named and not owned:
            self.names["Attributes"] = Attributes
            self._constants[id(inside)] = self.local(f"Attributes({at})")
            self._keep.append(inside)
        for name in named:
            if hasattr(x, name):
                shown = f"{path}.{name}"
                place = self._item(inside, name, shown, owned)
                self.visit(getattr(x, name), f"{at}.{name}", shown, owned=owned, place=place)
            else:
                self.check(f"not hasattr({at}, {name!r})", f"{path}.{name} is set now")
        for base in CONTAINERS:
            if isinstance(x, base):
                self._contents(base, x, at, path, owned)
                break

    def _contents(self, base: type, x, at: str, path: str, owned: bool) -> None:
        """What an instance of a subclass of a container holds as that container."""
        if issubclass(base, dict):
            base = dict
            keys = [*dict.keys(x)]
            self.expect(f"[*dict.keys({at})] == {self.constant(keys)}", path, x, at)
            if not all(is_value(k) for k in keys):
                what = f"{path}, a {type(x).__name__}, has keys that are no plain values"
                return self.refuse(what, path)
            items = [(k, dict.__getitem__(x, k)) for k in keys]
        elif issubclass(base, (set, frozenset)):
            return self.refuse(f"it reads {path}, an object of type {type(x).__name__}", path)
        else:
            length = base.__len__(x)
            same = f"{self.constant(base.__len__)}({at}) == {length}"
            self.check(same, f"{path} has another length")
            items = [(i, base.__getitem__(x, i)) for i in range(length)]
        get = self.constant(base.__getitem__)
        for k, item in items:
            shown = f"{path}[{k!r}]"
            counted = type(x) is Counter and type(k) in (str, int)
            mine = self._item(x, k, shown, owned) if counted else None
            self.visit(item, f"{get}({at}, {k!r})", shown, owned=owned, place=mine)
