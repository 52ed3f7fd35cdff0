"""Runtime scalars that user code has kept after a trace: they become plain numbers there.

State variables and results are plain by themselves. What a step puts anywhere else, a new key of a
dict or a list that it also reads, is found as the collector finds it, by a walk over the heap. That
takes long, so it is done for the first few traces of a step only.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Sequence
from types import CellType, FrameType

from tracejit.capture.python.classes import slots
from tracejit.capture.python.references import LOOPED, count
from tracejit.capture.trace.scalars import is_traced, plain


def kept(numbers: Sequence[object]) -> list[object]:
    """Those of the numbers that somebody holds besides this sequence."""
    return [x for x in numbers if count(x) > LOOPED]


def make_plain(numbers: list[object]) -> None:
    """Put plain numbers in the place of runtime scalars, in everything that holds some."""
    instead: dict[int, object] = {}  # new tuples for old ones, by identity
    left = list(numbers)
    while left:
        left = _replaced(left, numbers, instead)


def _replaced(old: list[object], numbers: list[object], instead: dict[int, object]) -> list[object]:
    """Replace runtime scalars, and tuples that hold some, in what holds them; returns the tuples
    that have to be replaced after that."""

    def new(x: object) -> object:
        return plain(x) if is_traced(x) else instead.get(id(x), x)

    tuples: list[object] = []
    for holder in gc.get_referrers(*old):
        if holder is old or holder is numbers or isinstance(holder, FrameType):
            continue
        if isinstance(holder, tuple):
            instead[id(holder)] = tuple.__new__(type(holder), map(new, holder))
            tuples.append(holder)
        elif isinstance(holder, dict):
            if any(new(k) is not k for k in holder):
                items = [(new(k), new(x)) for k, x in holder.items()]
                holder.clear()
                holder.update(items)
            else:
                _items(holder, new)
        elif isinstance(holder, (list, deque)):
            _items(holder, new)
        elif isinstance(holder, set):
            before = [x for x in holder if new(x) is not x]
            holder.difference_update(before)
            holder.update(map(new, before))
        elif isinstance(holder, CellType):
            holder.cell_contents = new(holder.cell_contents)
        elif not is_traced(holder):
            if isinstance(getattr(holder, "__dict__", None), dict):
                _items(holder.__dict__, new)
            for name in slots(type(holder)):
                x = getattr(holder, name, None)
                if new(x) is not x:
                    object.__setattr__(holder, name, new(x))
    return tuples


def replace_object(old: object, new: object) -> None:
    """Put one object in the place of another in everything that holds that."""
    left, instead = [old], {id(old): new}
    while left:
        left = _replaced(left, left, instead)


def items_plain(holder: dict | list | deque) -> None:
    """Put plain numbers in the place of runtime scalars among the items of a container."""
    _items(holder, plain)


def _items(holder: dict | list | deque, new: Callable[[object], object]) -> None:
    items = holder.items() if isinstance(holder, dict) else enumerate(holder)
    for key, x in [*items]:
        if new(x) is not x:
            holder[key] = new(x)
