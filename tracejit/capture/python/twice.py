"""What Python would do twice if a function ran twice, as a checkpointed one does in eager.

A profile of its one run tells which user code ran, and which containers that code has changed.
"""

from __future__ import annotations

import dis
import functools
import sys
from types import CodeType, FrameType

from tracejit.capture.python.origins import origin

_STORES = frozenset({"STORE_ATTR", "STORE_GLOBAL", "STORE_SUBSCR", "DELETE_ATTR", "DELETE_SUBSCR"})
_MAKERS = frozenset({"__init__", "__new__", "__post_init__"})  # of objects that are new
_CONTAINERS = (list, dict, set)
_CHANGES = frozenset(
    {
        *("append", "extend", "insert", "pop", "remove", "clear", "sort", "reverse"),
        *("add", "discard", "update", "setdefault", "popitem"),
    }
)
_ALONE = 3  # references to a container that nobody else has: here, the loop's, the question's


@functools.lru_cache(4096)
def _store(code: CodeType) -> int | None:
    """The first line of a function that assigns to something that may outlive it."""
    if code.co_name in _MAKERS:
        return None
    line = code.co_firstlineno
    for x in dis.get_instructions(code):
        line = x.starts_line or line
        outer = x.opname == "STORE_DEREF" and x.argval in code.co_freevars
        if outer or x.opname in _STORES:
            return line
    return None


class Run:
    """A profile of one run; `profile` is the profiler."""

    def __init__(self) -> None:
        self._where = ""  # the first assignment
        self._changed: dict[int, tuple[object, str]] = {}

    def profile(self, frame: FrameType, event: str, arg: object) -> None:
        """See `sys.setprofile`."""
        code = frame.f_code
        if event == "call" and not self._where and origin(code) == "user":
            line = _store(code)
            if line is not None:
                self._where = f"{code.co_filename}:{line}"
        elif event == "c_call" and arg.__name__ in _CHANGES and origin(code) == "user":
            owner = arg.__self__
            if isinstance(owner, _CONTAINERS):
                self._changed.setdefault(id(owner), (owner, f"{code.co_filename}:{frame.f_lineno}"))

    def effect(self) -> str:
        """Where it did something that lasts, once it is over; empty if nowhere."""
        changed, self._changed = [*self._changed.values()], {}
        while changed:
            owner, where = changed.pop()
            if sys.getrefcount(owner) >= _ALONE and not self._where:
                self._where = where
        return self._where
