"""Copies of single objects, and making the objects what they were: lists, dicts, slots, arrays."""

from __future__ import annotations

import functools
import operator
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Collection
from types import BuiltinFunctionType, CellType, MemberDescriptorType

import numpy as np

from tracejit.capture.python.classes import is_heap_type

UNSET = object()  # in place of what a variable or slot does not hold


class Copies(list):
    """A list of ours: it is left alone where intermediates are taken out of lists."""


class Spaces(dict):
    """A dict of ours, likewise."""


def make_so(put: Callable, drop: Callable, of: object, now: dict, before: dict) -> None:
    """Make the names that something has those of before."""
    for name in [k for k in dict.keys(now) if k not in before]:
        drop(of, name)
    for name, value in dict.items(before):
        if dict.get(now, name, UNSET) is not value:
            put(of, name, value)


def base_of(x: object) -> type:
    return next(base for base in (dict, list) if isinstance(x, base))


def identical(a: Collection[object], b: Collection[object]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def refill(x: list | deque | bytearray | array, copy: object) -> None:
    if isinstance(x, deque):
        deque.clear(x)
        deque.extend(x, copy)
    else:
        kind = next(base for base in (list, bytearray, array) if isinstance(x, base))
        kind.__setitem__(x, slice(None), copy)


def cell_value(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return UNSET


def copy_of(x: list | deque | bytearray | array) -> object:
    return [*deque.__iter__(x)] if isinstance(x, deque) else x[:]


def saved_array(x: np.ndarray) -> Callable[[], None]:
    return functools.partial(np.copyto, x, x.copy())


def saved_cache(x: Callable) -> Callable[[], None]:
    return functools.partial(_forget, x, x.cache_info())


def _forget(cached: Callable, before: tuple) -> None:
    """Empty a cache of results in which there may be some of a trace that failed."""
    if cached.cache_info() != before:
        cached.cache_clear()


def checksum(x: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(x).view(np.uint8))


@functools.cache
def slots_of(cls: type) -> list[MemberDescriptorType]:
    """The slots of the instances of a Python class."""
    return [
        member
        for base in cls.__mro__
        if is_heap_type(base)
        for member in vars(base).values()
        if type(member) is MemberDescriptorType
    ]


def read_slot(member: MemberDescriptorType, x: object) -> object:
    try:
        return member.__get__(x)
    except AttributeError:
        return UNSET


def held_by(x: BuiltinFunctionType) -> list[object]:
    """The container that a method in C changes, kept by itself: `append = kept.append`."""
    held = x.__self__
    return [held] if isinstance(held, (list, dict, set, deque, bytearray)) else []
