"""Which attributes of schedulers a watched trace asks for.

A scheduler's step is called again by a replay and changes the scheduler. So only what the step
itself reads of it may be guarded, even where code computes the names of attributes: while a trace
is watched, schedulers note by which name they are asked. What it reads of a scheduler that it has
stepped is what that call has left, and no state of Python before the call: only rates can be told.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

from torch.optim.lr_scheduler import LRScheduler

from tracejit.capture.effects.hyperparameters import Hyperparameters, tells_rates
from tracejit.capture.python.origins import origin
from tracejit.capture.trace.active import current
from tracejit.forks import own_lock

_RATES = "_last_lr"  # what get_last_lr() returns
_lock = own_lock(sys.modules[__name__], "_lock", threading.Lock)
# by thread: takes a name, and the line of code where it is one that the scheduler's step may change
_notes: dict[int, Callable[[str, FrameType | None], None]] = {}


class Guarded(Protocol):
    """What lines of a guard are added to: a `Walk`."""

    def check(self, condition: str, why: str) -> None:
        """One more line."""


def _getattribute(self: LRScheduler, name: str) -> object:
    note = _notes.get(threading.get_ident())
    asked = note is not None and origin(sys._getframe(1).f_code) != "tracejit"
    # the rates of a scheduler that was stepped are those of the groups, as they are now
    if asked and not (name == _RATES and _was_stepped(self)):
        note(name, sys._getframe(1) if _is_left(self, name) else None)
    return object.__getattribute__(self, name)


def _was_stepped(scheduler: LRScheduler) -> bool:
    """Whether the step has stepped a scheduler, which tells the rates of its groups then."""
    state = _hyperparameters()
    return state is not None and state.stepped(scheduler)


def _is_left(scheduler: LRScheduler, name: str) -> bool:
    """Whether a call that the step has made may have left something else in an attribute."""
    if (
        name == "optimizer"
        or name != "__dict__"
        and name not in object.__getattribute__(scheduler, "__dict__")
    ):
        return False
    state = _hyperparameters()
    return state is not None and state.left(scheduler)


def _hyperparameters() -> Hyperparameters | None:
    """Those of the trace that runs on this thread."""
    t = current()
    return None if t is None else t.hyperparameters


def asked_of(
    w: Guarded, scheduler: LRScheduler, place: str, path: str, names: Collection[str]
) -> list[str]:
    """The attributes of a scheduler that a step asks for and a guard has to look at. The rates that
    it tells are those of its groups, as long as they are equal."""
    named = [name for name in vars(scheduler) if name in names]
    if _RATES in named and tells_rates(scheduler):
        named.remove(_RATES)
        groups = f"{place}['optimizer'].param_groups"
        same = f"{place}[{_RATES!r}] == [group['lr'] for group in {groups}]"
        w.check(same, f"{path}.{_RATES} are not the rates of its groups now")
    return named


@contextmanager
def noted(note: Callable[[str, FrameType | None], None]) -> Iterator[None]:
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
