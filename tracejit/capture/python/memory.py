"""The memory of the process as words, to look at many objects at once.

In: addresses of objects that are alive, and at which words behind them something is said. Out: the
words of all of them, which numpy gathers in one loop. Where CPython and torch say what is for those
who ask to find out (`words.py`, `counters.py`). The same in C, where there is a compiler, is given
by whoever can load it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from tracejit.records import dataclass

MANY = 24  # tensors or dicts, from which on they are looked at together
BASE = 16  # where arrays of all memory start: not at NULL
TUPLE = 3  # words of a tuple before its items
_NO_ITEMS = np.zeros(0, np.int64)


class Memory:
    """All memory of the process, as an array of some type. Only what is alive may be used."""

    def __init__(self, kind: str, *, writable: bool = True):
        shape = ((1 << 47) // np.dtype(kind).itemsize - BASE,)
        at = {"data": (BASE, not writable), "shape": shape}
        self.__array_interface__ = {**at, "typestr": kind, "version": 3}


words = np.asarray(Memory("<i8", writable=False))


@functools.cache
def _column(offsets: tuple[int, ...]) -> np.ndarray:
    return (np.array(offsets) - (BASE >> 3))[:, None]


def index(addresses: np.ndarray, offsets: tuple[int, ...]) -> np.ndarray:
    """Where the words at some offsets behind addresses are: a row for each offset."""
    return (addresses >> 3) + _column(offsets)


def at(addresses: np.ndarray, offsets: tuple[int, ...]) -> np.ndarray:
    """These words."""
    return words[index(addresses, offsets)]


def objects(items: tuple) -> np.ndarray:
    """The addresses of the items of a tuple, as long as it is alive."""
    if not items:
        return _NO_ITEMS
    first = (id(items) - BASE) // 8 + TUPLE
    return words[first : first + len(items)]


@dataclass(frozen=True, eq=False)
class Native:
    """The functions of `codegen/c_words.py`, of addresses and numbers."""

    same: Callable[..., int]
    again: Callable[..., tuple | None]
    count: Callable[..., int]
    arrays: Callable[..., int]


_loader: list[Callable[[], tuple | None]] = []


def load_with(loader: Callable[[], tuple | None]) -> None:
    """Say what loads the C functions, when they are needed first; it gives None if it cannot."""
    _loader[:] = [loader]


@functools.cache
def native() -> Native | None:
    """The C functions; None where numpy has to do."""
    found = _loader[0]() if _loader else None
    return None if found is None else Native(*found)
