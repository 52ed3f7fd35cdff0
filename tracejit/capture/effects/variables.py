"""State variables: places of the user's Python that a step assigns, one call after another.

A counter on an object, a moving average in a dict, the latest hidden state in a list, a variable of
a closure. The proof finds them (`proof/prover.py`): places that a step reads and leaves changed.
From then on a number there is a runtime scalar while the step's Python runs, and what the step
leaves there is a store among its effects. Until the commit the place holds what it held before. So
it is with lists that a step only appends to: a record of losses. If the step looks at its length or
at entries too, a `History` stands for the list meanwhile.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import is_dataclass, replace
from types import CellType, SimpleNamespace

import torch

from tracejit.capture.effects.effects import instance_of, is_attributes, is_named
from tracejit.capture.python.histories import History
from tracejit.capture.python.kept import APPEND, KEYED, RETURNED, Kept, Keyed
from tracejit.capture.python.leftovers import items_plain
from tracejit.capture.trace.scalars import is_traced, plain
from tracejit.records import dataclass


class Attributes:
    """The attributes of a class, or those in the slots of an object, as items."""

    __slots__ = ("owner",)

    def __init__(self, owner: object):
        self.owner = owner

    def __getitem__(self, name: str) -> object:
        try:
            if isinstance(self.owner, type):
                return vars(self.owner)[name]
            return object.__getattribute__(self.owner, name)
        except AttributeError as error:
            raise KeyError(name) from error

    def __setitem__(self, name: str, x: object) -> None:
        (type if isinstance(self.owner, type) else object).__setattr__(self.owner, name, x)


# kinds of holders
ASSIGNED = (dict, list, deque, OrderedDict, defaultdict, Counter, CellType, Attributes)
Holder = dict | list | deque | CellType | Attributes


def identity(holder: Holder, key: object) -> tuple[int, object]:
    """What tells a place apart, as long as its holder lives."""
    owner = holder.owner if type(holder) is Attributes else holder
    return id(owner), key if type(key) in (str, int) else id(key)


Scalar = Callable[..., object]
KINDS = (int, float, bool, str, type(None))  # of what a variable may hold, besides a tensor


@dataclass(frozen=True, slots=True, eq=False)
class Variable:
    """A place that holds a value: `holder[key]`, or the contents of a cell, whose key is None."""

    holder: Holder
    key: object
    path: str  # what reasons call it
    lasting: bool = True  # the holder is the same in other calls

    @property
    def id(self) -> tuple[int, object]:
        """What tells it apart, as long as the holder lives."""
        return identity(self.holder, self.key)

    def released(self) -> Variable:
        """The same place without a holder that is this call's only."""
        return self if self.lasting else replace(self, holder={})

    def get(self) -> object:
        """What it holds; LookupError or ValueError if it holds nothing."""
        return self.holder.cell_contents if self.is_cell else self.holder[self.key]

    def held(self) -> object:
        """What it holds; None if it holds nothing."""
        try:
            return self.get()
        except (LookupError, ValueError):
            return None

    def set(self, x: object) -> None:
        """Let it hold x."""
        if self.is_cell:
            self.holder.cell_contents = x
        else:
            self.holder[self.key] = x

    def changed(self, before: object) -> bool:
        """Whether it holds something else now, which it may hold again and again. A runtime scalar
        is something else, even if its number is the same this time."""
        try:
            now = self.get()
        except (LookupError, ValueError):
            return False
        return may_vary(plain_tuple(now)) and (holds_traced(now) or not same(before, now))

    def holds_integer(self) -> bool:
        """Whether it holds an int now, or a tuple that has one."""
        try:
            return _has_integer(self.get())
        except (LookupError, ValueError):
            return False

    @property
    def is_cell(self) -> bool:
        """Whether it is a variable of a closure."""
        return type(self.holder) is CellType

    @property
    def kind(self) -> str:
        """Whose name its key is: "cell", "global", or "attribute" (or it is an item)."""
        if self.is_cell:
            return "cell"
        named = type(self.holder) is dict and "__builtins__" in self.holder
        return "global" if named else "attribute"


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """A list that the step appends to and does nothing else with, or only looks at; or a dict that
    it puts something into by keys that are texts of runtime scalars, and does nothing else with."""

    items: list | dict
    place: Variable  # where it is found
    looked_at: bool = False

    def released(self) -> Record:
        """The same without a list that is this call's only."""
        if self.place.lasting:
            return self
        return replace(self, items=type(self.items)(), place=self.place.released())


def may_vary(x: object) -> bool:
    """Whether a variable may hold x: a plain value, a tensor, or a tuple of such."""
    if is_tuple(x):
        return all(map(may_vary, x))
    return type(x) in KINDS or isinstance(x, torch.Tensor)


def holds_traced(x: object) -> bool:
    """Whether x is a runtime scalar, or a tuple with such in it."""
    return any(map(holds_traced, x)) if is_tuple(x) else is_traced(x)


def is_tuple(x: object) -> bool:
    """Whether x is a tuple of no more than its items, with names or without."""
    return isinstance(x, tuple) and (type(x) is tuple or is_named(type(x)))


def plain_tuple(x: object) -> object:
    """A value, or a tuple of such, without runtime scalars."""
    return like(x, map(plain_tuple, x)) if is_tuple(x) else plain(x)


def _has_integer(x: object) -> bool:
    return any(map(_has_integer, x)) if is_tuple(x) else type(plain(x)) is int


def like(x: tuple, items: Iterable) -> tuple:
    """A tuple of the class of x."""
    items = tuple(items)
    return items if type(x) is tuple else instance_of(type(x), items)


def _scalars(x: object, variable: Variable, scalar: Scalar, *inner: int) -> object:
    """Runtime scalars in the place of the numbers of x; x itself where there are none."""
    if type(x) in (int, float):
        return scalar(x, variable, *inner)
    if not is_tuple(x):
        return x
    found = [_scalars(item, variable, scalar, *inner, i) for i, item in enumerate(x)]
    return x if all(a is b for a, b in zip(x, found, strict=True)) else like(x, found)


def is_remade(before: object, now: object) -> bool:
    """Whether a list, dict or object of attributes has been replaced by a new one, as it may be in
    each call."""
    if now is before or type(now) is not type(before):
        return False
    if has_attributes(now):
        return all(map(_is_part, vars(now).values()))
    if not before and not now:
        return getattr(now, "default_factory", None) is getattr(before, "default_factory", None)
    return type(now) in (list, dict) and all(map(_is_part, _items(now)))


def has_attributes(x: object) -> bool:
    """Whether a dataclass's object or a namespace has all that it has in its `__dict__`."""
    kind = type(x)
    return (is_dataclass(kind) or kind is SimpleNamespace) and is_attributes(kind)


def _items(x: list | dict) -> Iterable:
    return x.values() if isinstance(x, dict) else x


def _is_part(x: object) -> bool:
    x = plain(x)
    return may_vary(x) or (type(x) in (list, dict) and all(map(_is_part, _items(x))))


def same(a: object, b: object) -> bool:
    """Whether a variable has not changed."""
    if a is b or type(a) is not type(b):
        return a is b
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) in KINDS and (a == b or a != a)


@dataclass(slots=True)
class _Held:
    """A variable of one trace: what it held before, and the runtime scalar in its place."""

    variable: Variable
    before: object
    traced: object
    count: int  # of what its holder held


class Variables:
    """The state variables of one trace."""

    def __init__(self, known: Sequence[Variable], records: Sequence[Record]):
        self._known, self._records = known, records
        self._held: list[_Held] = []
        self._lengths: list[tuple[list, int]] = []
        self._keyed: list[tuple[Variable, Keyed]] = []
        self._taken: Callable[[str], None] = lambda why: None
        self._histories: list[tuple[Variable, History]] = []

    def start(self, scalar: Scalar, taken: Callable[[str], None]) -> None:
        """Let places of numbers hold runtime scalars, which `scalar(number, variable, *inner)`
        makes; `inner` leads to it in a tuple. `taken(why)`: what Python does cannot be followed."""
        records = [record.items for record in self._records]
        self._lengths = [(items, len(items)) for items in records if type(items) is list]
        self._taken = taken
        for place, items in ((r.place, r.items) for r in self._records if type(r.items) is dict):
            if place.held() is items:
                self._keyed.append((place, Keyed(items)))
                place.set(self._keyed[-1][1])
        for place, items in ((r.place, r.items) for r in self._records if r.looked_at):

            def said(number: float, key: int | str, of: list = items) -> object:
                return scalar(number, Variable(of, key, ""))

            if place.held() is items:
                self._histories.append((place, History(items, said, taken)))
                place.set(self._histories[-1][1])
        for variable in self._known:
            try:
                before = plain_tuple(variable.get())
            except (LookupError, ValueError):
                continue
            traced = _scalars(before, variable, scalar)
            self._held.append(_Held(variable, before, traced, _count(variable.holder)))
            if traced is not before:
                variable.set(traced)

    def finish(
        self, texts: Sequence[Kept] = ()
    ) -> tuple[list[tuple[Holder, object, object]], list[Kept]]:
        """Put back what was there before; returns what the step has left in the place of that: the
        holder, the key or APPEND, and the value; and those of the texts of runtime scalars that
        are not where they are said to be kept."""
        stores = []
        kept: dict[object, list[Kept]] = {}
        for text in texts:
            if text.target != RETURNED:
                kept.setdefault(text.target, []).append(text)
        looked_at = {id(history.of) for _, history in self._histories}
        self._end_histories()
        for items, length in self._lengths:
            added, made = items[length:], kept.get((id(items), APPEND), ())
            if made and id(items) not in looked_at and (joints := _joints(added, made)):
                added = joints
                del kept[id(items), APPEND]
            stores += [(items, APPEND, x) for x in added]
            del items[length:]
        self._end_keyed()
        for _, keyed in self._keyed:
            found = keyed.stores(kept.get((id(keyed.of), KEYED), ())) if keyed.is_alone else []
            if found:
                stores += [(keyed.of, key, x) for key, x in found]
                kept.pop((id(keyed.of), KEYED), None)
                keyed.put_back()
            elif keyed.assigned or not keyed.is_alone:
                self._taken("it puts something into a dict by keys that are not known")
            keyed.over()
        found = None  # which holds intermediates
        for held in self._held:
            variable = held.variable
            made = kept.get(variable.id, ())
            try:
                now = variable.get()
            except (LookupError, ValueError):
                continue
            joint = next(filter(None, (text.joint(now) for text in reversed(made))), None)
            if _count(variable.holder) != held.count:  # its items have moved
                items_plain(variable.holder)
            elif joint is not None:
                del kept[variable.id]
                stores.append((variable.holder, variable.key, joint))
                variable.set(held.before)
            elif now is held.traced:
                variable.set(held.before)
            elif held.traced is not held.before or not same(now, held.before):
                stores.append((variable.holder, variable.key, now))
                variable.set(held.before)
            held.traced = None
        return stores, [text for made in kept.values() for text in made]

    def undo(self) -> None:
        """Put back what was there before."""
        self._end_histories()
        for items, length in self._lengths:
            del items[length:]
        self._end_keyed()
        for _, keyed in self._keyed:
            keyed.put_back()
        for held in self._held:
            if _count(held.variable.holder) == held.count:
                held.variable.set(held.before)
            else:
                items_plain(held.variable.holder)

    def _end_keyed(self) -> None:
        for place, keyed in self._keyed:
            if place.held() is keyed:
                place.set(keyed.of)

    def _end_histories(self) -> None:
        for place, history in self._histories:
            history.over()
            if place.held() is history:
                place.set(history.of)
        self._histories.clear()


def _joints(added: list, texts: Sequence[Kept]) -> list:
    """What was appended to a list, with the texts of runtime scalars as their parts; nothing if
    they cannot be told from others."""
    strings = [i for i, x in enumerate(added) if type(x) is str]
    joints = [text.joint(added[i]) for i, text in zip(strings, texts, strict=False)]
    if len(strings) != len(texts) or None in joints:
        return []
    found = dict(zip(strings, joints, strict=True))
    return [found.get(i, x) for i, x in enumerate(added)]


def _count(holder: Holder) -> int:
    return 0 if type(holder) in (CellType, Attributes) else len(holder)
