"""Calls whose launches wait for each other: `step.run(k, data)`.

Inside of `together` the launches of a plan's calls wait, until all calls are there; then one kernel
does them all (`many_steps.py`). What a call does in Python is done at once. Outputs are held until
the launch, so that nobody else is given their memory before. Where somebody needs a result, or
other work comes in between, what waits is launched first. Launches of plans that do not fit do not
wait.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

HELD = 64 << 20  # bytes of outputs that wait

Row = tuple["bytes | None", tuple[int, ...]]  # the scalars of a call, and its bases

active = 0  # threads in which calls may wait: nearly always none
_here = threading.local()
_lock = threading.Lock()


class Many(Protocol):
    """Launches calls on a stream."""

    most: int

    def __call__(self, state: object, rows: Sequence[Row]) -> None: ...


class Waiting:
    """The calls that wait in a thread: of one plan, on one stream, with buffers aligned alike."""

    def __init__(self, calls: int):
        self.calls = calls
        self._many: Many | None = None
        self._state: object = None
        self._rows: list[Row] = []
        self._alone: Callable | None = None  # launches a call that has no company
        self._held: list[torch.Tensor] = []
        self._bytes = 0

    def hold(self, tensor: torch.Tensor) -> None:
        """An output of a call that may be about to wait."""
        self._held.append(tensor)
        self._bytes += tensor.untyped_storage().nbytes()

    def put(
        self, many: Many, alone: Callable, state: object, words: bytes | None, bases: tuple
    ) -> None:
        """The launches of a call wait; `alone` would make them."""
        if many is not self._many or state is not self._state:
            self.launch()
        self._many, self._alone, self._state = many, alone, state
        self._rows.append((words, bases))
        if len(self._rows) == many.most or self._bytes > HELD:
            self.launch()
            self._held, self._bytes = [], 0

    def launch(self) -> None:
        """Launch what waits. Outputs stay held: some may be those of a call that has begun."""
        rows, self._rows = self._rows, []
        if len(rows) == 1:
            self._alone(self._state, *rows[0])
        elif rows:
            self._many(self._state, rows)


def here() -> Waiting | None:
    """The calls that wait in this thread, if any may."""
    return getattr(_here, "waiting", None)


def settle() -> None:
    """Launch what waits in this thread, where work of another kind comes next; later calls do not
    wait."""
    found = here()
    if found is not None:
        _leave()
        found.launch()


def launch() -> None:
    """Launch what waits in this thread: somebody needs it."""
    found = here()
    if found is not None:
        found.launch()


@contextlib.contextmanager
def together(calls: int) -> Iterator[None]:
    """The launches of so many calls of this thread may wait for each other; they are all on their
    streams at the end."""
    global active
    if calls < 2 or here() is not None:
        yield
        return
    with _lock:
        active += 1
    _here.waiting = Waiting(calls)
    try:
        yield
    finally:
        settle()


def _leave() -> None:
    global active
    _here.waiting = None
    with _lock:
        active -= 1
