"""Which attributes of schedulers a watched trace asks for.

A scheduler's step is called again by a replay and changes the scheduler. So only what the step
itself reads of it may be guarded, even where code computes the names of attributes: while a trace
is watched, schedulers note by which name they are asked.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.optim.lr_scheduler import LRScheduler

from tracejit.capture.python.origins import origin
from tracejit.capture.trace.active import current

_lock = threading.Lock()
_notes: dict[int, Callable[[str], None]] = {}  # by thread


def _getattribute(self: LRScheduler, name: str) -> object:
    note = _notes.get(threading.get_ident())
    asked = note is not None and origin(sys._getframe(1).f_code) != "tracejit"
    # the rates of a scheduler that was stepped are those of the groups, as they are now
    if asked and not (name == "_last_lr" and _was_stepped(self)):
        note(name)
    return object.__getattribute__(self, name)


def _was_stepped(scheduler: LRScheduler) -> bool:
    """Whether the step has stepped a scheduler, which tells the rates of its groups then."""
    t = current()
    return t is not None and t.hyperparameters is not None and t.hyperparameters.stepped(scheduler)


@contextmanager
def noted(note: Callable[[str], None]) -> Iterator[None]:
    """Call `note` with each name by which this thread asks for an attribute of a scheduler."""
    me = threading.get_ident()
    with _lock:
        before = _notes.get(me)
        _notes[me] = note
        LRScheduler.__getattribute__ = _getattribute
    try:
        yield
    finally:
        with _lock:
            if before is None:
                del _notes[me]
            else:
                _notes[me] = before
            if not _notes:
                del LRScheduler.__getattribute__
