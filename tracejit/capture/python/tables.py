"""Lists, tuples, dicts and sets of the user's that a runtime integer looks something up in.

C looks up an entry by the plain number: `rates[self.n]` would be good for one n only. So while a
step is traced, a copy stands in the place of a table (`effects/aliases.py`), which answers a
runtime scalar itself: what it finds among numbers is a runtime scalar too, and whether something is
there is a decision. A copy is an instance of a subclass; it stands only where code does nothing
with it by which that shows (`uses.py`). What code does to it all the same happens to the table, and
what it asks it the table answers.
Nothing can stand for a set that is written in the code (`n in {4, 8}`): a runtime scalar that is
asked for its hash looks whether that is why.
"""

from __future__ import annotations

import dis
import functools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from types import CodeType

from tracejit.capture.trace.scalars import TracedFloat, TracedInt, is_runtime, plain

MOST = 1024  # entries of a table
# what code may do with a table by its name
SHOWS_NOTHING = frozenset(
    {
        *("subscript", "item", "contains", "test", "is None", "iterate"),
        *("get", "keys", "values", "items", "index", "count"),
        *(
            "len()",
            "bool()",
            "sum()",
            "min()",
            "max()",
            "list()",
            "tuple()",
            "sorted()",
            "enumerate()",
        ),
    }
)


def is_table(x: object) -> bool:
    """Whether x is something that a number may be looked up in."""
    if type(x) not in _COPIES or not 1 <= len(x) <= MOST:
        return False
    return _numbers([*x]) if type(x) is not dict else any(type(k) is int for k in x)


def _numbers(items: Sequence[object]) -> bool:
    """Whether all items are ints, or all are floats that have a text."""
    kinds = {*map(type, items)}
    return kinds == {int} or (kinds == {float} and all(map(math.isfinite, items)))


def _keys(items: Iterable[object]) -> list[float]:
    """What a number can be equal to."""
    return [k for k in items if type(k) in (int, float, bool) and k == k]


def _position(x: object, keys: list[float]) -> object:
    """The place of a runtime scalar among some keys, as one; -1 if it is not there."""
    number = plain(x)
    at = keys.index(number) if number in keys else -1
    return x.live.traced(at, x.live.arithmetic("host_find", x.value, *keys))


def found_in(x: object, items: Iterable[object]) -> bool:
    """`x in items`, of a runtime scalar: a decision."""
    keys = _keys(items)
    return bool(keys) and _position(x, keys) >= 0


def _picked(table: Sequence[float], i: object) -> object:
    """`table[i]` at a runtime integer that is inside."""
    return i.live.traced(table[plain(i)], i.live.arithmetic("host_pick", i.value, *table))


def _entry(table: list | tuple, i: object) -> object:
    """`table[i]` at a runtime integer."""
    if not (i >= -len(table) and i < len(table)):  # decisions
        return table[plain(i)]  # IndexError
    return _picked(table, i) if _numbers(table) else table[i.pin()]  # it may have changed


def _is_index(i: object) -> bool:
    return type(i) is TracedInt and is_runtime(i)


class _List(list):
    __slots__ = ("of",)  # the table itself

    def __getitem__(self, i: object) -> object:
        return _entry(self.of, i) if _is_index(i) else self.of[i]


class _Tuple(tuple):
    of = property(lambda self: (*self,))

    def __getitem__(self, i: object) -> object:
        return _entry(self.of, i) if _is_index(i) else tuple.__getitem__(self, i)


class _Dict(dict):
    __slots__ = ("of",)

    def __getitem__(self, key: object) -> object:
        if not is_runtime(key):
            return self.of[key]
        keys = _keys(self.of)
        at = _position(key, keys) if keys else -1
        if not at >= 0:  # a decision
            return self.of[plain(key)]  # KeyError
        values = [self.of[k] for k in keys]
        return _picked(values, at) if _numbers(values) else values[at.pin()]

    def get(self, key: object, default: object = None) -> object:
        if not is_runtime(key):
            return self.of.get(key, default)
        return self[key] if found_in(key, self.of) else default

    def __contains__(self, key: object) -> bool:
        return found_in(key, self.of) if is_runtime(key) else key in self.of


class _Set(set):
    __slots__ = ("of",)

    def __contains__(self, x: object) -> bool:
        return found_in(x, sorted(_keys(self.of))) if is_runtime(x) else x in self.of


class _FrozenSet(frozenset):
    of = property(lambda self: frozenset([*self]))

    def __contains__(self, x: object) -> bool:
        contains = frozenset.__contains__
        return found_in(x, sorted(_keys(self))) if is_runtime(x) else contains(self, x)


_COPIES = {list: _List, tuple: _Tuple, dict: _Dict, set: _Set, frozenset: _FrozenSet}


def copied(table: object) -> object:
    """What stands for a table."""
    copy = _COPIES[type(table)](table)
    if not isinstance(table, (tuple, frozenset)):
        copy.of = table
    return copy


def _on_both(kind: type, name: str) -> Callable:
    method = getattr(kind, name)

    def on_both(self: object, *args: object, **kwargs: object) -> object:
        method(self, *args, **kwargs)
        return method(self.of, *args, **kwargs)

    return on_both


def _of_the_table(kind: type, name: str) -> Callable:
    method = getattr(kind, name)
    return lambda self, *args: method(self.of, *args)


_CHANGES = {
    list: (
        *("append", "extend", "insert", "remove", "pop", "clear", "sort", "reverse"),
        *("__setitem__", "__delitem__", "__iadd__", "__imul__"),
    ),
    dict: (
        *("update", "setdefault", "pop", "popitem", "clear", "__setitem__", "__delitem__"),
        "__ior__",
    ),
    set: (
        *("add", "update", "remove", "discard", "pop", "clear", "difference_update"),
        *("intersection_update", "symmetric_difference_update"),
        *("__iand__", "__ior__", "__isub__", "__ixor__"),
    ),
}
for _kind, _names in _CHANGES.items():
    for _name in _names:
        setattr(_COPIES[_kind], _name, _on_both(_kind, _name))
_ASKED = {
    list: ("__len__", "__iter__", "__contains__", "__reversed__", "__eq__", "__ne__", "count"),
    dict: ("__len__", "__iter__", "__reversed__", "__eq__", "__ne__", "keys", "values", "items"),
    set: ("__len__", "__iter__", "__eq__", "__ne__"),
}
for _kind, _names in _ASKED.items():
    for _name in _names:
        setattr(_COPIES[_kind], _name, _of_the_table(_kind, _name))
for _kind, _copy in _COPIES.items():
    _copy.__reduce_ex__ = lambda self, protocol, kind=_kind: (kind, (self.of,))
STAND_FOR: dict[type, type] = {copy: kind for kind, copy in _COPIES.items()}


# ---- sets in the code


@functools.lru_cache(1000)
def _set_at(code: CodeType, offset: int) -> list[float] | None:
    """The numbers in the constant set in which an instruction looks for something, if it does."""
    before = None
    for x in dis.get_instructions(code):
        if x.offset == offset:
            items = before.argval if before and before.opname == "LOAD_CONST" else None
            if x.opname != "CONTAINS_OP" or type(items) is not frozenset:
                return None
            whole = not any(isinstance(k, (tuple, frozenset)) for k in items)
            return sorted(_keys(items)) if whole else None
        before = x
    return None


def _hash(self: TracedInt | TracedFloat) -> int:
    if self.live is not None:
        frame = sys._getframe(1)
        items = _set_at(frame.f_code, frame.f_lasti)
        if items is not None:
            found_in(self, items)  # a decision
            return hash(plain(self))
    return hash(self.pin())


TracedInt.__hash__ = TracedFloat.__hash__ = _hash
