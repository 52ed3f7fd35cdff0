"""Counters in memory: of the writes to tensors, of the states of dicts, of optimizers' steps; and
what lists hold.

Each of many is read or set where it stands, all in one loop of numpy or by one call of C. Where
they are is found out first, as in `words.py`; what is not found is asked of torch and Python.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from ctypes import c_double, c_float
from operator import itemgetter

import numpy as np
import torch

from tracejit.capture.python import memory
from tracejit.capture.python.memory import BASE, TUPLE, Memory, at, objects, words
from tracejit.capture.python.words import IMPL, known, zeros

_COUNTER, _WRITES = 5, 4  # of a TensorImpl; and there the count of writes, 4 bytes a step
_STATE = 3  # of a dict: the number of its state
_SIZE, _ITEMS = 2, 3  # of a list: how many items it has, and where they are
_ONE = np.uint32(1)
_COUNTS = np.asarray(Memory("<u4"))
_ELEMENTS = {c_float: np.asarray(Memory("<f4")), c_double: np.asarray(Memory("<f8"))}


class Bump:
    """Counts a write to some of the tensors of a tuple, as torch's `increment_version` does."""

    def __init__(self, indices: Sequence[int]):
        self._at = np.array(indices)
        self._given = self._at.ctypes.data, len(indices), IMPL, _COUNTER, 4 * _WRITES
        self._get = itemgetter(*indices)
        self._known, self._native = counted(), memory.native()  # found out now, not in a replay

    def __call__(self, tensors: tuple) -> None:
        if not (type(tensors) is tuple and self._known and self._counts(tensors)):
            torch._C._increment_version(self._get(tensors))

    def _counts(self, tensors: tuple) -> bool:
        """Count in memory, if all have a counter: those of inference mode have none."""
        if self._native is not None:
            return self._native.count(id(tensors) + 8 * TUPLE, *self._given) == 1
        (impls,) = at(objects(tensors).take(self._at), (IMPL,))
        (counters,) = at(impls, (_COUNTER,))
        if not counters.all():
            return False
        places = _writes_at(counters)
        _COUNTS[places] = _COUNTS.take(places) + _ONE
        return True


def _writes_at(counters: np.ndarray) -> np.ndarray:
    """Where counters have their numbers."""
    return (counters >> 2) + (_WRITES - BASE // 4)


class Elements:
    """The one element of each of some CPU tensors, which lie at these addresses."""

    def __init__(self, addresses: np.ndarray, kind: type):
        self._memory, self._kind = _ELEMENTS[kind], kind
        size = self._memory.itemsize
        self._at = addresses // size - BASE // size
        aligned = not (addresses % size).any()  # else numpy cannot take them
        self._cells = [] if aligned else [kind.from_address(x) for x in addresses.tolist()]

    @staticmethod
    def known(kind: type | None) -> bool:
        """Whether elements of a ctypes type can be read so."""
        return kind in _ELEMENTS

    def read(self) -> list[float]:
        """The numbers; where they are all the same it is one object."""
        if self._cells:
            return [cell.value for cell in self._cells]
        found = self._memory.take(self._at)
        cells, size = found.tobytes(), found.itemsize
        if cells == cells[:size] * len(found):
            return [found.item(0)] * len(found)
        return found.tolist()

    def fill(self, number: float) -> None:
        """Set all of them to a number, which is rounded to their type."""
        for cell in self._cells:
            cell.value = number
        if not self._cells:
            self._memory[self._at] = self._kind(number).value


class Containers:
    """Dicts and lists, and whether they were changed. CPython numbers the states of dicts, and uses
    no number twice; of lists, where the items are is asked. `kept` is for whoever asks: the states,
    and what was found then, which stays alive, so that nothing else is where it was."""

    def __init__(self, dicts: Sequence[dict], lists: Sequence[list] = ()):
        self._of = dicts, lists  # which stay alive
        self._at = (np.array([*map(id, dicts)], np.int64) >> 3) - (BASE >> 3) + _STATE
        self._lists = [(id(x) - BASE) // 8 for x in lists]
        self.kept: tuple[bytes, tuple] | None = None

    @classmethod
    def of(cls, dicts: Sequence[dict], lists: Sequence[list] = ()) -> Containers | None:
        """None where these words are not to be found."""
        return cls(dicts, lists) if numbered() and listed() else None

    def now(self) -> bytes:
        """Their states."""
        found = words.take(self._at).tobytes()
        for place in self._lists:
            size, first = words.item(place + _SIZE), (words.item(place + _ITEMS) - BASE) // 8
            found += words[first : first + size].tobytes() if size else b""
        return found


@functools.cache
def numbered() -> bool:
    """Whether dicts have a number that is another one after each change."""
    if not known():
        return False
    one, other = [1], [1]  # equal, not the same
    changes: list[Callable[[dict], object]] = [
        lambda d: d.__setitem__("a", other),
        lambda d: d.__setitem__("b", one),
        lambda d: d.__delitem__("b"),
        lambda d: d.update(a=one),
        lambda d: d.pop("a"),
        lambda d: d.setdefault("a", one),
        lambda d: d.popitem(),
        lambda d: d.__ior__({"a": other, "b": one}),
        lambda d: d.pop("a"),
        lambda d: d.clear(),
    ]
    for d in ({"a": one}, defaultdict(list, a=one), vars(Memory("<i8"))):
        d["a"] = one
        asked = Containers([d])
        for change in changes:
            before = asked.now()
            if asked.now() != before:  # nothing has changed yet
                return False
            change(d)
            if asked.now() == before:
                return False
    return True


@functools.cache
def listed() -> bool:
    """Whether the items of lists are where they should be."""
    if not known():
        return False
    x: list[object] = [1.5, "a"]
    (size, first), asked = (
        at(np.array([id(x)]), (_SIZE, _ITEMS))[:, 0].tolist(),
        Containers([], [x]),
    )
    if size != 2 or first % 8 or not 1 << 16 < first < 1 << 47:
        return False
    for change in (lambda: x.append(2), lambda: x.extend(range(100)), x.pop, x.reverse, x.clear):
        if asked.now() != np.array([*map(id, x)], np.int64).tobytes():
            return False
        change()
    return asked.now() == b""


@functools.cache
def counted() -> bool:
    """Whether counts of writes are where they should be."""
    if not known():
        return False
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        with torch.inference_mode():
            without = zeros(2)
        if at(np.array([without._cdata]), (_COUNTER,)).any():
            return False
        with torch.inference_mode(False):
            one, other = zeros(3, 4), torch.nn.Parameter(zeros(2))
        for count in (0, 3):
            while one._version < count:
                torch._C._increment_version((one,))
            impls = np.array([x._cdata for x in (one, one.view(12), other, other.detach())])
            (counters,) = at(impls, (_COUNTER,))
            one_at, same_at, other_at, again_at = counters.tolist()
            apart = one_at == same_at != other_at == again_at
            if not (
                apart and all(x % 8 == 0 and 1 << 16 < x < 1 << 47 for x in (one_at, other_at))
            ):
                return False  # no pointers
            if _COUNTS.take(_writes_at(counters)).tolist() != [count, count, 0, 0]:
                return False
    return True
