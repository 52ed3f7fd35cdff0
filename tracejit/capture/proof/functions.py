"""What a guard says of user functions: their code, cells, defaults, attributes and globals."""

from __future__ import annotations

import builtins
import math
from collections.abc import Iterable
from functools import partial
from types import CellType, CodeType, FunctionType, ModuleType

from tracejit.capture.effects.variables import Variable
from tracejit.capture.proof.classes import Classes
from tracejit.capture.proof.guard_text import unbound
from tracejit.capture.proof.kinds import C_FUNCTIONS, cached_text, known_callable
from tracejit.capture.proof.watch import origin
from tracejit.capture.python import generators
from tracejit.capture.python.bytecode import asks, codes, is_value, scan
from tracejit.capture.python.doubts import Doubt

_MAX_CACHED = 300  # arguments and results that a cache keeps, in a guard


class Functions(Classes):
    """The lines of a guard about functions and what they read."""

    def __init__(self, names: frozenset[str] | None, ran: Iterable[CodeType] | None):
        super().__init__(names, ran)
        self.root: FunctionType | None = None  # the step, which sees floats as runtime scalars
        self.codes: set[CodeType] = set()  # the user code that the guard accounts for
        self.doubts: list[Doubt] = []  # what of it keeps the step from being replayed if it runs
        mine = [c for c in self.ran or () if origin(c) == "user"]
        self._asked = ran is None or any(map(asks, mine))

    def function(self, function: FunctionType, path: str) -> None:
        """A user function: its code, cells, defaults and globals (its identity is the caller's)."""
        if not self._seen(function):
            self._in_turn(partial(self._function, function, path))

    def _function(self, function: FunctionType, path: str) -> None:
        k, code = self.constant(function), function.__code__
        mine = origin(code) == "user"
        if mine:
            self.check(f"{k}.__code__ is {self.constant(code)}", f"the code of {path} changed")
            self.codes.update(codes(code))
        root = function is self.root
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            self._cell(name, cell, root=root)
        if not mine:
            return
        for kind, defaults in (
            ("default", function.__defaults__),
            ("kwdefault", function.__kwdefaults__),
        ):
            if defaults:
                place = f"{k}.__{kind}s__"
                self.check(
                    f"len({place} or ()) == {len(defaults)}", f"the {kind}s of {path} changed"
                )
                items = defaults.items() if kind == "kwdefault" else enumerate(defaults)
                for i, x in items:
                    name = i if kind == "kwdefault" else self._parameter(function, i)
                    self.visit(x, f"{place}[{i!r}]", f"the default of {name}", (kind, k, i))
        if self._asked:
            attributes = f"[*{k}.__dict__] == {[*function.__dict__]!r}"
            self.check(attributes, f"{path} has other attributes now")
        for name in self._named(function.__dict__):
            at = f"{k}.__dict__[{name!r}]"
            self._attribute(function, name, at, f"{path}.{name}")
        if self.ran is None or not self.ran.isdisjoint(codes(code)):
            self._globals(function)

    def _attribute(self, x: object, name: str, at: str, path: str) -> None:
        """An attribute of what is guarded by its identity."""
        self.visit(x.__dict__[name], at, path, place=Variable(x.__dict__, name, path))

    def _parameter(self, function: FunctionType, i: int) -> str:
        code = function.__code__
        first = code.co_argcount - len(function.__defaults__)
        return code.co_varnames[first + i]

    def _cell(self, name: str, cell: CellType, *, root: bool = False) -> None:
        try:
            value = cell.cell_contents
        except ValueError:
            self.names["unbound"] = unbound  # the step may catch the error of reading it
            self.check(f"unbound({self.constant(cell)})", f"{name} is bound now")
            return
        at = f"{self.constant(cell)}.cell_contents"
        place = Variable(cell, None, name)
        if type(value) in (float, tuple):
            self._number(("cell", self.constant(cell)), value, at, name, root, place)
        elif not self._seen(cell):
            self.visit(value, at, name, owned=False, place=place)

    def _number(
        self, key: tuple, x: object, at: str, path: str, root: bool, place: Variable
    ) -> None:
        """A float, or a tuple perhaps of floats, in a variable: the step itself sees a runtime
        scalar there, and the functions that it calls a number, good for its value only."""
        if (key, root) not in self._visited:
            self._visited.add((key, root))
            self.visit(x, at, path, key if root else None, owned=False, place=place)

    def _wrapper(self, x: object, at: str, path: str) -> None:
        parts = ("__func__", "fget", "fset", "fdel", "func", "args", "keywords")
        for name in parts:
            part = getattr(x, name, None)
            if name == "func" and isinstance(part, C_FUNCTIONS) and not known_callable(part):
                # C calls it: no profiler sees that, and it may read a runtime scalar's value
                self.refuse(
                    f"{path} wraps {part.__qualname__}, which is not known to be pure", path
                )
            if part is not None:
                self.visit(part, f"{at}.{name}", path)

    def _cached(self, x: object, results: list, at: str, path: str) -> None:
        """A function that keeps its results: as if it ran, and it has kept nothing else since."""
        function = x.__wrapped__
        few = len(results) <= _MAX_CACHED
        if not (few and isinstance(function, FunctionType) and all(map(is_value, results))):
            why = "whose cache holds much, or more than plain values"
            self.refuse(f"it reads {path}, {why}; call it outside the step", path)
        elif origin(function.__code__) == "user":
            self.names["cached_text"] = cached_text
            self.check(f"cached_text({at}) == {cached_text(x)!r}", f"the cache of {path} changed")
            self.function(function, path)
            self._globals(function)

    def _globals(self, function: FunctionType) -> None:
        scanned = scan(function)
        for why in scanned.refusals:
            self.refuse(why)
        self.doubts += scanned.doubts
        for read in scanned.reads:
            k = self.constant(read.holder)
            number = type(read.value) in (float, tuple)
            if not number and (id(read.holder), read.key) in self._visited:
                continue
            self._visited.add((id(read.holder), read.key))
            if read.missing:
                where = f"vars({k})" if isinstance(read.holder, ModuleType) else k
                self.check(f"{read.key!r} not in {where}", f"{read.path} is defined now")
                continue
            if read.builtin:
                self.check(f"{read.key!r} not in {k}", f"{read.path} is a global name now")
                at = f"{self.constant(builtins)}.{read.key}"
            elif isinstance(read.holder, ModuleType):
                at = f"{k}.{read.key}"
            else:
                at = f"{k}[{read.key!r}]"
            if isinstance(read.value, ModuleType):  # what is read of it is the next read
                self.expect(f"{at} is {self.constant(read.value)}", read.path, read.value, at)
            elif number:
                root = function is self.root
                place = Variable(read.holder, read.key, read.path)
                self._number(("global", k, read.key), read.value, at, read.path, root, place)
            elif read.holder is math or generators.is_at_home(
                read.holder, read.key, read.value
            ):  # a wrapper while the step is traced
                self.expect(f"{at} is {self.constant(read.value)}", read.path, read.value, at)
            else:
                place = None if read.builtin else Variable(read.holder, read.key, read.path)
                self.visit(read.value, at, read.path, owned=False, place=place)
