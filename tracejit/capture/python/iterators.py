"""How far an iterator, a generator or a file has got, and putting it back there.

`Progress` takes note of one before the step's Python runs. `rewind` puts it back, and `lost` tells
whether it has got further and cannot be put back: a generator, an iterator that is used up.
"""

from __future__ import annotations

import gc
import io
import itertools
import operator
from collections import deque
from types import AsyncGeneratorType, CoroutineType, GeneratorType

_Bytes = io.BytesIO | io.StringIO
GENERATORS = (GeneratorType, CoroutineType, AsyncGeneratorType)
# their `__reduce__` tells where they are, and `__setstate__` takes that
_REWOUND = (
    *map(type, map(iter, ([], (), range(0), range(1 << 99), "", b"", bytearray()))),
    type(reversed([])),
)
_REDUCED = (
    *_REWOUND,
    *(enumerate, zip, map, filter, reversed),
    *(v for v in vars(itertools).values() if isinstance(v, type) and hasattr(v, "__next__")),
    *(type(iter(deque())), type(reversed(deque()))),
)
_COUNTED = tuple(
    type(iter(x))
    for d in ({}, dict.fromkeys("a"))
    for x in (d.keys(), d.values(), d.items(), {1}, frozenset())
)
KINDS = (*GENERATORS, *_REDUCED, *_COUNTED, io.IOBase)


class Progress:
    """Where one iterator, generator or file is."""

    __slots__ = ("of", "before")

    def __init__(self, of: object):
        self.of, self.before = of, _state(of)

    @property
    def lost(self) -> bool:
        """Whether it is elsewhere now and cannot be put back; also where that cannot be told."""
        now = _state(self.of)
        if self.before is None or now is None:
            return True
        if _same(self.before, now):
            return False
        if isinstance(self.of, io.IOBase):
            return not isinstance(self.of, _Bytes) and self.of.writable()
        if type(self.of) not in _REWOUND or len(self.before) != 3:
            return True
        return len(now) != 3 and not self._at_end

    @property
    def _at_end(self) -> bool:
        """Whether a list's iterator had given all items: to find that out again does no harm."""
        _, of, index = self.before
        return hasattr(of[0], "__len__") and index >= len(of[0])

    def rewind(self) -> None:
        """Put it back, unless it is lost."""
        of = self.of
        if self.before is None or _same(self.before, _state(of)):
            return
        if type(of) in _REWOUND:
            of.__setstate__(self.before[2])
        elif isinstance(of, _Bytes):
            content, at = self.before
            of.seek(0)
            of.truncate()
            of.write(content)
            of.seek(at)
        elif isinstance(of, io.IOBase) and not of.closed:
            of.seek(self.before[0])

    def within(self) -> list[object]:
        """What it holds, which a step can reach through it."""
        if isinstance(self.of, io.IOBase):
            return []
        return gc.get_referents(self.of)


def _state(x: object) -> tuple | None:
    """What tells two moments of an iterator apart; None if nothing does."""
    if isinstance(x, GENERATORS):
        frame = getattr(x, "gi_frame", None) or getattr(x, "cr_frame", None)
        # its variables, and the iterators of the loops that it is in
        return (0, *gc.get_referents(x)) if frame is None else (frame.f_lasti, *gc.get_referents(x))
    try:
        if isinstance(x, _Bytes):
            return x.getvalue(), x.tell()
        if isinstance(x, io.IOBase):
            return ("closed",) if x.closed else (x.tell(),)
        if type(x) in _COUNTED:
            return (operator.length_hint(x),)
        return tuple([_part(part) for part in x.__reduce__()])
    except (TypeError, OSError, ValueError):
        return None


def _part(x: object) -> object:
    if type(x) is tuple:
        return tuple([_part(item) for item in x])
    if type(x) in _COUNTED or type(x) in _REDUCED:  # perhaps made anew for this answer
        return _state(x)
    return x


def _same(a: object, b: object) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if type(a) is tuple:
        return len(a) == len(b) and all(map(_same, a, b))
    if type(a) is list:  # what is left of an iterator that is used up, made anew
        return not a and not b
    return type(a) in (int, str, bytes) and a == b
