"""A list that a step appends to and looks at: `losses.append(loss.item())`, `losses[-1]`.

It is longer in each call, so what it holds is no part of a plan. While a step is traced, a
`History` stands in its place: its length, its entries and its sum are runtime scalars, read when a
call starts. What is appended goes into the list as well, which it looks at: that may have other
names, by which the step appends to it too.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

from tracejit.capture.trace.scalars import TracedFloat, TracedInt, pinned, plain

# what code may do with such a list by its name, besides to append to it
LOOKS = frozenset(
    {"subscript", "item", "test", "is None", *("len()", "bool()", "sum()", "min()", "max()")}
)
_NUMBERS = frozenset({int, float, TracedFloat, TracedInt})
_WHOLE = "it reads all of a list that it appends to; read its length, its sum or single entries"


class History(list):
    """Stands for a list `of` numbers, and perhaps of other things.

    `scalar(number, key)` makes a runtime scalar of what the list says at a key when a call starts:
    an entry (from the end if the key is negative), or "len()", "sum()", "min()", "max()".
    `taken(why)`: what it gives to Python cannot be followed.
    """

    __slots__ = ("_before", "_known", "_scalar", "_taken", "of")

    def __init__(
        self, of: list, scalar: Callable[[float, int | str], object], taken: Callable[[str], None]
    ):
        super().__init__(of)
        self.of, self._scalar, self._taken = of, scalar, taken
        self._before = len(of)
        self._known: dict[int | str, object] = {}

    def over(self) -> None:
        """The trace is over: a list like any other."""
        self._scalar, self._taken = (lambda number, key: number), (lambda why: None)
        self._known.clear()

    def append(self, x: object) -> None:
        list.append(self, x)
        self.of.append(x)

    def length(self) -> object:
        """`len` of it."""
        return self._length_before() + (len(self.of) - self._before)

    def total(self, start: object = 0) -> object:
        """`sum` of it."""
        before, added = self._parts()
        if type(start) is not int or start or not self._countable(before):
            return sum([*before, *added], start)
        total = self._read("sum()", sum(map(plain, before)))
        for x in added:
            total = total + x
        return total

    def lowest(self) -> object:
        """`min` of it."""
        return self._extreme(min, "min()", operator.lt)

    def highest(self) -> object:
        """`max` of it."""
        return self._extreme(max, "max()", operator.gt)

    def _extreme(self, of: Callable, key: str, beyond: Callable) -> object:
        before, added = self._parts()
        if not self._countable(before):
            return of([*before, *added])
        if self._length_before() > 0:  # a decision
            found = self._read(key, of(map(plain, before)))
        elif added:
            found, *added = added
        else:
            return of(())  # ValueError
        for x in added:
            if beyond(x, found):  # a decision
                found = x
        return found

    def _countable(self, before: list) -> bool:
        """Whether there are only numbers in it; else its contents are taken."""
        if {*map(type, before)} <= _NUMBERS:
            return True
        self._taken(_WHOLE)
        return False

    def _parts(self) -> tuple[list, list]:
        """What it held before, and what was appended."""
        return self.of[: self._before], self.of[self._before :]

    def _read(self, key: int | str, number: float) -> object:
        if key not in self._known:
            self._known[key] = self._scalar(number, key)
        return self._known[key]

    def _length_before(self) -> object:
        return self._read("len()", self._before)

    def _entry(self, key: int) -> object:
        """An entry of what it held before; a negative key is from its end."""
        x = plain(self.of[key if key >= 0 else self._before + key])
        if type(x) in (int, float):
            return self._read(key, x)
        self._taken("it reads an entry of a list that it appends to, and that is no number")
        return x

    def __len__(self) -> int:
        return pinned(self.length())

    def __bool__(self) -> bool:
        return len(self.of) > self._before or bool(self._length_before() > 0)

    def __getitem__(self, i: object) -> object:
        if type(i) is slice:
            return self._slice(*map(pinned, (i.start, i.stop, i.step)))
        i = operator.index(pinned(i))
        added = len(self.of) - self._before
        if i < 0 and -i <= added:
            return self.of[i]
        key = i if i >= 0 else i + added
        if self._length_before() >= (key + 1 if key >= 0 else -key):  # a decision
            return self._entry(key)
        if key >= 0:
            pinned(self._length_before())
        return self.of[i]  # IndexError perhaps

    def _slice(self, start: int | None, stop: int | None, step: int | None) -> list:
        if stop is None and step in (None, 1) and type(start) is int and start < 0:
            before, added = self._parts()
            wanted = -start - len(added)
            if wanted <= 0:
                return added[start:]
            if self._length_before() >= wanted:  # a decision
                return [*(self._entry(k) for k in range(-wanted, 0)), *added]
            length = pinned(self._length_before())
            return [*(self._entry(k) for k in range(-length, 0)), *added]
        self._taken(_WHOLE)
        return self.of[start:stop:step]

    def __reduce_ex__(self, protocol: int) -> tuple:
        self._taken(_WHOLE)
        return list, (self.of,)

    def __iter__(self) -> object:
        self._taken(_WHOLE)
        return iter(self.of)


def _on_both(name: str) -> Callable:
    method = getattr(list, name)

    def on_both(self: History, *args: object, **kwargs: object) -> object:
        self._taken("it changes a list that it also appends to")
        method(self, *args, **kwargs)
        return method(self.of, *args, **kwargs)

    return on_both


for _name in (
    *("extend", "insert", "remove", "pop", "clear", "sort", "reverse"),
    *("__setitem__", "__delitem__", "__iadd__", "__imul__"),
):
    setattr(History, _name, _on_both(_name))


# ---- what stands for functions of Python


def length(x: object, /) -> object:
    """`len`"""
    return x.length() if type(x) is History else len(x)


def total(items: object, /, start: object = 0) -> object:
    """`sum`"""
    return items.total(start) if type(items) is History else sum(items, start)


def lowest(*args: object, **kwargs: object) -> object:
    """`min`"""
    alone = len(args) == 1 and not kwargs and type(args[0]) is History
    return args[0].lowest() if alone else min(*args, **kwargs)


def highest(*args: object, **kwargs: object) -> object:
    """`max`"""
    alone = len(args) == 1 and not kwargs and type(args[0]) is History
    return args[0].highest() if alone else max(*args, **kwargs)


STANDINS: dict[str, Callable] = {"len": length, "sum": total, "min": lowest, "max": highest}
