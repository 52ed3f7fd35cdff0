"""The Python state that a step can read, walked before a trace and written down as guard code.

From the arguments, closure cells, defaults and globals of the step, `Walk` follows containers,
objects, classes and user functions. An attribute is followed if code that ran names it; before it
is known what ran, all attributes are. Everything found becomes a line of the guard:

value      a number, string, bool, None, dtype, range, … : its type and value
tensor     its type, and that it is found at all its places; it is fetched anew, and `guards.py`
           adds the metadata of those that the graph reads
container  list, tuple, dict, set, deque: its identity (its type, in arguments), length and keys
object     its identity and its attributes; a Python class: its identity and what is named of it
function   its identity, code, cells, defaults and globals

An object that no line can describe is a refusal, and the step then reruns its Python. The guard
describes the state *before* the trace. So it fails after the trace exactly if the step changed it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from types import CodeType

import torch

from tracejit.capture.effects.fields import has_numbers
from tracejit.capture.effects.variables import (
    ASSIGNED,
    Attributes,
    Record,
    Variable,
    is_tuple,
    may_vary,
)
from tracejit.capture.proof.guard_text import NumberLine, short
from tracejit.capture.proof.kinds import (
    CONTAINERS,
)
from tracejit.capture.proof.looks import looked_at, tables_among
from tracejit.capture.proof.objects import Objects
from tracejit.capture.proof.watch import origin
from tracejit.capture.python import generators, mathematics
from tracejit.capture.python.bytecode import compares, is_tensor, is_value
from tracejit.capture.python.doubts import template
from tracejit.capture.python.tables import is_table
from tracejit.capture.python.words import attributes
from tracejit.capture.trace.scalars import Path, is_traced, plain

HOOKS_OF_TENSORS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_MAX_PLACES = 100_000  # values in one guard; what is larger reruns


class Walk(Objects):
    """The lines of a guard about Python state, and what keeps that state from being guarded."""

    def __init__(
        self,
        names: frozenset[str] | None,
        ran: Iterable[CodeType] | None,
        records: Iterable[Record] = (),
        remade: Collection[str] = (),
        of_schedulers: Collection[str] | None = None,
    ):
        super().__init__(names, ran)
        self._of_schedulers = of_schedulers  # the attributes that the step asks for; None: unknown
        self.lasting = True  # what is visited is the same in other calls
        self._remade = remade
        self._records = {record.place.path for record in records}
        self.tensors: dict[int, str] = {}  # id(tensor) -> expression
        self.paths: dict[int, str] = {}  # id(tensor) -> what reasons call it
        self.all_tensors: list[torch.Tensor] = []
        self.of_dicts: dict[str, dict] = {}  # lines that hold as long as nobody changes a dict
        self.bare: dict[int, list[str]] = {}  # id(tensor) -> lines: its class, no attributes
        self.held: list[tuple[Variable, object]] = []  # places that the step may assign, and what
        self.records: list[Record] = []  # the lists and dicts that the step only adds to
        self.lists: list[tuple[Record, list | dict]] = []  # others, and what they held
        self.integers: dict[Path, int] = {}  # among the arguments
        self.found: list[str] = []  # locals of containers and objects that are looked up
        self.assigned: list[Variable] = []  # places that the step may assign, whatever they hold
        self.containers: list[tuple[Variable, object]] = []  # where lists and dicts are
        self.groups: set[int] = set()  # param groups, by identity: they have runtime scalars anyway
        self.places: dict[int, Variable | None] = {}  # where dicts are, as `looks.Places`
        self._count = 0
        mine = [c for c in self.ran or () if origin(c) == "user"]
        self._compared = ran is None or any(map(compares, mine))
        self.aliases: list[Variable] = []  # places of functions of math, besides math's
        self.looked_up: list[Variable] = []  # where a copy may stand for a table
        # places of what a number may be looked up in, by its identity
        self.tables: dict[int, list[Variable | None]] = {}
        self.templates: list[str] = []  # places of strings that % may format
        self.unasked: list[str] = []  # such functions where no wrapper can stand for them
        self.asks_numpy = False  # which may raise where a setting says so
        self.reentrant = False  # the step can reach itself, and sees plain floats then

    # ---- values

    def visit(
        self,
        x: object,
        at: str,
        path: str,
        key: tuple | None = None,
        *,
        owned: bool = True,
        place: Variable | None = None,
    ) -> None:
        """Guard x, the value of the expression `at`.

        place: where x is, if the step may assign it.

        owned: whoever holds x is guarded by its identity, so x is known by its identity too. Else x
            may be another object on each call, such as an argument.
        """
        self._count += 1
        if is_table(x):
            self.tables.setdefault(id(x), []).append(place)
        if self._count > _MAX_PLACES:
            self.refuse(f"it can reach more than {_MAX_PLACES} values")
            return
        if place is not None and type(place.holder) not in ASSIGNED:
            place = None
        if place is not None:
            x = self._place(place, x)
            owned = owned and path not in self._remade
        variable = ("entry", id(place.holder), place.key) if place is not None else None
        if type(x) is float:
            self.lines.append(NumberLine(at, x, path, (key, variable)))
        elif type(x) in (int, str) and variable is not None:
            if template(x):
                self.templates.append(path)
            self.lines.append(NumberLine(at, x, path, (None, variable)))
        elif type(x) is int and key is not None and key[0] in ("arg", "kwarg"):
            self.integers[key] = x
            self.lines.append(NumberLine(at, x, path, (key, None)))
        elif type(x) is int and _in_tuple(key):
            self.lines.append(NumberLine(at, x, path, (key, None)))
        elif type(x) is tuple and variable is not None and is_value(x) and not has_numbers(x):
            self.lines.append(NumberLine(at, x, path, (None, variable)))
        elif variable is not None and is_tuple(x) and may_vary(x):
            self._tuple(x, at, path, variable, owned)
        elif key is not None and (has_numbers(x) or (type(x) is tuple and _in_tuple(key))):
            self._tuple(x, at, path, key, owned)
        elif is_value(x):
            self._value(x, at, path)
        elif is_tensor(x):
            self._tensor(x, at, path)
        elif self._can_be_aliased(x, place):
            self.expect(f"{at} is {self.constant(x)}", path, x, at)
            self.aliases.append(place)
        elif type(x) in CONTAINERS:
            self._container(x, at, path, key, owned, place)
        else:
            self._object(x, at, path, owned, place)

    def _can_be_aliased(self, x: object, place: Variable | None) -> bool:
        """Whether a wrapper can stand where a function of math is, or of `random`. In a class it
        would be a method."""
        return (
            place is not None
            and type(place.holder) is not Attributes
            and (mathematics.is_function(x) or generators.wrapper_of(x) is not None)
        )

    def _item(self, holder: object, key: object, path: str, owned: bool) -> Variable:
        return Variable(holder, key, path, owned or self.lasting)

    def _place(self, place: Variable, x: object) -> object:
        """Take note of a place that the step may assign; returns what it holds."""
        if is_traced(x):  # kept from an earlier call
            x = plain(x)
            place.set(x)
        if may_vary(x):
            self.assigned.append(place)
            self.held.append((place, x))
        return x

    def _found(self, x: object, at: str) -> str:
        """A local for an object that is looked up in each call. A second way to it must lead to the
        same object."""
        name = self._constants[id(x)] = self.local(at)
        self.found.append(name)
        self._keep.append(x)
        return name

    def walked(self) -> None:
        """All has been looked at: let go of empty containers that the step will let go of, so that
        nothing lives on that it puts there. Tables are those that code only looks something up in.
        """
        # what dataclasses generate compares and prints
        mine = (code for code in self.codes if code.co_filename != "<string>")
        codes = frozenset(mine).union(self.ran or ())
        tables = () if self.ran is None else self.tables.values()
        self.looked_up = tables_among(tables, self.places, codes)
        self.records = looked_at(self.records, self.places, codes, self._remade)
        gone = [x for place, x in self.containers if place.path in self._remade and not x]
        self.containers = [(p, x) for p, x in self.containers if all(x is not y for y in gone)]
        self._keep = [x for x in self._keep if all(x is not y for y in gone)]
        for x in gone:
            self._constants.pop(id(x), None)
            self._visited.discard(id(x))
            self.places.pop(id(x), None)

    def holder(self, x: object) -> str:
        """An expression of the holder of a state variable, in this call."""
        return self._constants.get(id(x)) or self.constant(x)

    def owner(self, x: object) -> str:
        """An expression of that holder, or of the object whose attributes it is."""
        return self.holder(x.owner if type(x) is Attributes else x)

    def _value(self, x: object, at: str, path: str) -> None:
        if x is None or x is True or x is False or x is ...:
            self.expect(f"{at} is {x!r}", path, x, at)
            return
        if template(x):
            self.templates.append(path)
        self.number(x, at, path)

    def path_of(self, x: torch.Tensor) -> str:
        """What reasons call a tensor."""
        return self.paths.get(id(x), "a tensor that is a key")

    def _tensor(self, x: torch.Tensor, at: str, path: str) -> None:
        known = self.tensors.get(id(x))
        self.paths.setdefault(id(x), path)
        if known is not None:
            self.expect(f"{at} is {known}", path, x, at)
            return
        self.all_tensors.append(x)
        self._keep.append(x)
        known = self.local(at)
        self.expect(f"type({known}) is {self.constant(type(x))}", path, x, known)
        self.bare.setdefault(id(x), []).append(self.lines[-1])
        self.tensors[id(x)] = known
        self._attributes_of_tensor(x, known, path)

    def _attributes_of_tensor(self, x: torch.Tensor, at: str, path: str) -> None:
        there = attributes(x)
        if self._asked:
            names = [*there]
            same = f"[*{at}.__dict__] == {names!r}" if names else f"not {at}.__dict__"
            self.check(same, f"{path} has other attributes now")
            if not names:
                self.bare.setdefault(id(x), []).append(self.lines[-1])
        if there and not self._seen(there):
            for name in self._named(there):
                self.visit(there[name], f"{at}.__dict__[{name!r}]", f"{path}.{name}")
        for name in HOOKS_OF_TENSORS if x.requires_grad and x.is_leaf else ():
            if hooks := getattr(x, name):
                self.visit(hooks, f"{at}.{name}", f"{path}.{name}", owned=False)

    def _tuple(self, x: tuple, at: str, path: str, key: tuple, owned: bool) -> None:
        self._class(type(x))
        at, kind = self.local(at), self.constant(type(x))
        self.expect(f"type({at}) is {kind} and len({at}) == {len(x)}", path, x, at)
        for i, item in enumerate(x):
            self.visit(item, f"{at}[{i}]", f"{path}[{i}]", (*key, i), owned=owned)

    def _container(
        self, x, at: str, path: str, key: tuple | None, owned: bool, found: Variable | None = None
    ) -> None:
        if type(x) is tuple and not owned:
            self._tuple(x, at, path, key or (), owned)
            return
        if owned or self._was_seen(x):
            place = self.constant(x)
            self.expect(f"{at} is {place}", path, x, at)
            if self._seen(x):
                if isinstance(x, dict):
                    self.places[id(x)] = None
                if any(x is record.items for record in self.records):
                    self.refuse(f"it appends to {path}, and has it by another name too", path)
                return
        else:
            self._seen(x)
            place = self._found(x, at)
            self.expect(f"type({place}) is {self.constant(type(x))}", path, x, place)
        if found is not None and type(x) in (list, dict, defaultdict):
            self.containers.append((found, x))
            self.assigned.append(found)
        if isinstance(x, dict):
            self.places[id(x)] = found
        if found is not None and type(x) in (list, dict) and found.path in self._records:
            self.records.append(Record(x, found))
            return
        if isinstance(x, dict):
            at, first = place, len(self.lines)
            self._keys(x, place, path)
            self._of_dict(first, "if not (", x, place)
            if isinstance(x, defaultdict):
                factory = f"{place}.default_factory"
                self.check(f"{factory} is {self.constant(x.default_factory)}", f"{path} changed")
            for k, item in [*x.items()]:  # other threads may add to it meanwhile
                name = repr(k) if type(k) in (str, int, bool) else self.constant(k)
                inner = ("entry", id(x), k) if type(k) in (str, int) else None
                shown = f"{path}[{short(k) if isinstance(k, torch.Tensor) else k!r}]"
                mine = self._item(x, k, shown, owned) if inner or is_tensor(k) else None
                at, first = f"{place}[{name}]", len(self.lines)
                self.visit(item, at, shown, inner, owned=owned, place=mine)
                if is_tensor(item) and self.tensors[id(item)] != name:
                    self._of_dict(first, f"{self.tensors[id(item)]} = {at}", x, place)
                elif type(item) in (dict, list):
                    self._of_dict(first, f"if not ({at} is {self.holder(item)})", x, place)
        elif isinstance(x, (set, frozenset)):
            if all(is_value(item) for item in x):
                self.expect(f"{place} == {self.constant(type(x)(x))}", path, x, place)
            else:
                self.expect(f"[*map(id, {place})] == {[*map(id, x)]}", path, x, place)
                for item in x:
                    self.visit(item, self.constant(item), f"an element of {path}")
        else:
            self.expect(f"len({place}) == {len(x)}", path, x, place)
            for i, item in enumerate(x):
                inner = (*key, i) if key else None
                at, shown = f"{place}[{i}]", f"{path}[{i}]"
                mine = self._item(x, i, shown, owned)
                self.visit(item, at, shown, inner, owned=owned, place=mine)
        if type(x) in (list, dict) and found is not None:
            self.lists.append((Record(x, found), x.copy()))

    def _of_dict(self, first: int, start: str, x: dict, place: str) -> None:
        """Take note of a line that asks nothing but what a dict holds which the guard knows."""
        known = type(x) in (dict, defaultdict) and self.names.get(place) is x
        if known and first < len(self.lines) and str(self.lines[first]).startswith(start):
            self.of_dicts[self.lines[first]] = x

    def _keys(self, x: dict, at: str, path: str) -> None:
        if not x:
            self.expect(f"not {at}", path, x, at)
        elif all(type(k) is str for k in x):
            self.expect(f"[*{at}] == {self.constant([*x])}", path, x, at)
        elif all(is_value(k) for k in x):
            same = f"[*{at}] == {self.constant([*x])} and [*map(type, {at})]"
            self.expect(f"{same} == {self.constant([*map(type, x)])}", path, x, at)
        else:
            self.expect(f"[*map(id, {at})] == {self.constant([*map(id, x)])}", path, x, at)
            for k in x:
                name = self.constant(k)
                if is_tensor(k) and self.tensors.setdefault(id(k), name) != name:
                    self.expect(f"{self.tensors[id(k)]} is {name}", path, k, self.tensors[id(k)])
                elif is_tensor(k):
                    self.all_tensors.append(k)
                    self._attributes_of_tensor(k, name, f"a key of {path}")
                else:
                    self.visit(k, name, f"a key of {path}")


def _in_tuple(key: tuple | None) -> bool:
    """Whether a key is that of an item of a tuple which a state variable holds."""
    return key is not None and key[0] == "entry" and len(key) > 3
