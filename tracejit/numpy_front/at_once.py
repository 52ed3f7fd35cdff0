"""Replays of a step over numpy arrays that make no tensors.

In: a replay, and a call that it has just made, whose arrays are arguments themselves. Out: an
`AtOnce`, which makes later calls like that one: one call of C reads types, shapes and addresses of
the arrays in their objects, the replay's guard is asked about tensors of its own that are like
those of the call, and the plan needs addresses alone.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Collection
from types import FunctionType

import numpy as np
import torch

from tracejit.capture.proof.places import Places
from tracejit.capture.proof.settings import NUMPY_ERRORS
from tracejit.capture.python.bytecode import contents
from tracejit.capture.python.memory import TUPLE, native, words
from tracejit.numpy_front.core import TO_TORCH
from tracejit.run import OTHERWISE, Replay

NOT_SO = object()  # of a call that is not like it
_RAISING = {"raise", "call", "print", "log"}
_PLAIN = frozenset((str, bytes, int, bool, float, complex, type(None)))
_DATA, _AXES, _LENGTHS, _STRIDES, _DTYPE, _FLAGS = 2, 3, 4, 5, 7, 8  # words of an array
_HALF = (1 << 32) - 1  # of a word: an int
_ALIGNED, _WRITEABLE = 0x100, 0x400  # flags


class _Wanted(ctypes.Structure):
    """`struct wanted` of `codegen/c_words.py`."""

    _fields_ = [(name, ctypes.c_int64) for name in ("place", "dtype", "axes", "sizes")]


@functools.cache
def _reads() -> Callable[..., int] | None:
    """What reads arrays, where numpy keeps them as it always has, and there is a C compiler."""
    for x in (np.zeros((3, 2), np.float32)[:, 1:], np.zeros((4, 1, 5)).T, np.zeros(())):
        at = _words(id(x), _FLAGS + 1)
        said = at[_DATA], at[_AXES] & _HALF, at[_DTYPE], at[_FLAGS] & _HALF
        if said != (x.ctypes.data, x.ndim, id(x.dtype), x.flags.num):
            return None
        for word, wanted in ((_LENGTHS, x.shape), (_STRIDES, x.strides)):
            if tuple(_words(at[word], x.ndim)) != wanted:
                return None
    found = native()
    return None if found is None else found.arrays


def _words(address: int, count: int) -> list[int]:
    start = address // 8 - 2 if count else 0
    return words[start : start + count].tolist()


class AtOnce:
    """Calls like one that `replay` has made: the same arguments are arrays, with the same shapes,
    strides and dtypes, and the function has the same code, defaults and variables."""

    def __init__(
        self,
        users: FunctionType,
        names: Collection[str],
        replay: Replay,
        args: tuple,
        reads: Callable[..., int],
    ):
        self.replay, self._users, self._names, self._reads = replay, users, names, reads
        self._code, self._defaults = users.__code__, users.__defaults__
        self._variables = variables(users, names)
        places = [i for i, x in enumerate(args) if type(x) is np.ndarray]
        self._numbers = [i for i in range(len(args)) if i not in places]
        self._like = [_like(x) if type(x) is np.ndarray else None for x in args]
        self._tensors = [self._like[i] for i in places]
        self._sizes = [np.array([*args[i].shape, *args[i].strides], np.int64) for i in places]
        self._dtypes = [args[i].dtype for i in places]  # held: another would lie there
        rows = [
            (TUPLE + i, id(dtype), args[i].ndim, sizes.ctypes.data)
            for i, dtype, sizes in zip(places, self._dtypes, self._sizes, strict=True)
        ]
        self._wanted, self._found = (_Wanted * len(rows))(*rows), (ctypes.c_int64 * len(rows))()
        tables = map(ctypes.addressof, (self._wanted, self._found))
        self._asked = id(np.ndarray), _ALIGNED | _WRITEABLE, len(rows), *tables
        self._count = len(args)
        self._asks_errors = NUMPY_ERRORS.text in replay.guard_text
        self._order: list[int] = []  # of the guard's tensors: which argument each is
        self._apart = Places([])

    @classmethod
    def of(
        cls, users: FunctionType, names: Collection[str], replay: Replay, args: tuple
    ) -> AtOnce | None:
        """What makes calls like one that was just replayed; None if nothing can."""
        held = [*variables(users, names), *(users.__defaults__ or ())]
        kinds = {*map(type, held), *map(type, args)} - {np.ndarray, type(np)}
        if not kinds <= _PLAIN or any(type(x) is np.ndarray or _other(x) for x in held):
            return None
        reads = _reads()
        if reads is None or users.__kwdefaults__ or not _by_address(replay):
            return None
        made = cls(users, names, replay, args, reads)
        found = made._ask(args)
        if type(found) is str:
            return None
        argument = {id(x): k for k, x in enumerate(made._tensors)}
        made._order = [argument[id(tensor)] for tensor in found[0]]
        made._apart = Places(found[0])
        return made

    def __call__(self, args: tuple) -> object:
        """What the replay returns; NOT_SO, with nothing done, for a call of another kind."""
        users = self._users
        same = users.__code__ is self._code and users.__defaults__ is self._defaults
        if not same or users.__kwdefaults__ or len(args) != self._count:
            return NOT_SO
        for now, before in zip(variables(users, self._names), self._variables, strict=True):
            if now is not before and (type(now) is not type(before) or now != before):
                return NOT_SO
        if not self._reads(args, *self._asked):
            return NOT_SO
        lie = [*self._found]
        addresses, apart = [lie[k] for k in self._order], self._apart
        if addresses != apart.good and apart.against(addresses):
            return NOT_SO
        found = self._ask(args)
        if type(found) is str or not (self._asks_errors or only_warns()):
            return NOT_SO
        reals, scalars, _, holders = found
        replay = self.replay
        returned = replay.run.function(reals, scalars, addresses, holders, replay.call)
        return NOT_SO if returned is OTHERWISE else returned

    def _ask(self, args: tuple) -> tuple | str:
        """What the guard says of tensors like the arrays, and of the other arguments."""
        given = [*self._like]
        for i in self._numbers:
            given[i] = args[i]
        return self.replay.guard(given, {})


def _by_address(replay: Replay) -> bool:
    """Whether it needs no more of the outside tensors than where they lie."""
    counts = ("bump(", "def ", "seen = seen(")
    lines = (line.strip() for line in replay.run.text.splitlines())
    if any("reals" in line and not line.startswith(counts) for line in lines):
        return False
    elements = any(word in replay.guard_text for word in ("cells[", "elements[", "item("))
    return not (elements or replay.decides or replay.cuts)


def only_warns() -> bool:
    """Whether numpy does no more than warn of errors."""
    return _RAISING.isdisjoint(np.geterr().values())


def variables(users: FunctionType, names: Collection[str]) -> list[object]:
    """What the globals that a function names hold, and its closure."""
    return [*map(users.__globals__.get, names), *map(contents, users.__closure__ or ())]


def _other(x: object) -> bool:
    return type(x) is type(np) and x is not np


def _like(x: np.ndarray) -> torch.Tensor:
    """A tensor like an array; what is in it does not matter."""
    strides = [step // x.itemsize for step in x.strides]
    return torch.empty_strided(x.shape, strides, dtype=TO_TORCH[x.dtype])
