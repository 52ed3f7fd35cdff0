"""Functions of math under other names than math's: `from math import sqrt`.

While a step is traced, the functions of the module are wrappers (`python/mathematics.py`). The
proof finds where else the step can reach one: in a global name, a variable of a closure, an
attribute or an item. There the wrapper stands too, until the trace is over.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from tracejit.capture.effects.variables import Variable
from tracejit.capture.python.mathematics import ORIGINALS, WRAPPERS, is_function

_lock = threading.Lock()
_users: Counter[tuple[int, object]] = Counter()  # traces that need the wrapper in a place


@contextmanager
def aliased(places: Iterable[Variable]) -> Iterator[None]:
    """Functions of math are wrappers in these places."""
    taken = []
    with _lock:
        for place in places:
            function = _held(place)
            name = getattr(function, "__name__", "")
            if is_function(function) or (_users[place.id] and function is WRAPPERS.get(name)):
                taken.append((place, name))
                _users[place.id] += 1
                place.set(WRAPPERS[name])
    try:
        yield
    finally:
        with _lock:
            for place, name in taken:
                _users[place.id] -= 1
                if not _users[place.id] and _held(place) is WRAPPERS[name]:
                    place.set(ORIGINALS[name])


def _held(place: Variable) -> object:
    try:
        return place.get()
    except (LookupError, ValueError):
        return None
