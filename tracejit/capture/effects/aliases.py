"""What stands in places of the user's while a step is traced, and answers runtime scalars.

Functions of math under other names than math's (`from math import sqrt`), and those of `random` and
`numpy.random`: the functions of the modules are wrappers then (`python/mathematics.py`,
`python/generators.py`), and the proof finds where else the step can
reach one, in a global name, a variable of a closure, an attribute or an item. Tables that a runtime
integer may be looked up in (`python/tables.py`). Both are as they were when the trace is over.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from tracejit.capture.effects.variables import Variable
from tracejit.capture.python import generators
from tracejit.capture.python.leftovers import replace_object
from tracejit.capture.python.mathematics import WRAPPERS, is_function
from tracejit.capture.python.references import ALONE, count
from tracejit.capture.python.tables import copied, is_table
from tracejit.forks import own_lock

_lock = own_lock(sys.modules[__name__], "_lock", threading.Lock)
_users: Counter[tuple[int, object]] = Counter()  # traces that need the wrapper in a place


@contextmanager
def aliased(places: Iterable[Variable]) -> Iterator[None]:
    """Functions of math are wrappers in these places."""
    taken = []
    with _lock:
        for place in places:
            function = place.held()
            if _users[place.id]:
                function = getattr(function, "__wrapped__", function)
            wrapper = _wrapper_of(function)
            if wrapper is not None:
                taken.append((place, function, wrapper))
                _users[place.id] += 1
                place.set(wrapper)
    try:
        yield
    finally:
        with _lock:
            for place, function, wrapper in taken:
                _users[place.id] -= 1
                if not _users[place.id] and place.held() is wrapper:
                    place.set(function)


def _wrapper_of(function: object) -> Callable | None:
    if is_function(function):
        return WRAPPERS[function.__name__]
    return generators.wrapper_of(function)


@contextmanager
def looked_up(places: Sequence[Variable]) -> Iterator[None]:
    """What stands for tables is in these places."""
    taken = []
    with _lock:
        for place in places:
            table = place.held()
            if is_table(table):  # else another trace has a copy there
                taken.append((place, table, copied(table)))
                place.set(taken[-1][2])
    try:
        yield
    finally:
        with _lock:
            while taken:
                place, table, copy = taken.pop()
                if place.held() is copy:
                    place.set(table)
                if count(copy) > ALONE:
                    replace_object(copy, table)
