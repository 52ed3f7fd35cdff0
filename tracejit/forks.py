"""Processes that fork: a child is to find no trace of another thread's half done, and no lock that
nobody will give back.

A fork waits, for a while, until no other thread traces or compiles: what is patched meanwhile would
stay patched in the child. Locks that others hold at that moment are new ones there.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from threading import get_ident
from typing import TypeVar
from weakref import WeakKeyDictionary

Lock = TypeVar("Lock")
PATIENCE = 10.0  # seconds that a fork waits for other threads

_gate = threading.Condition(threading.Lock())
_inside: dict[int, int] = {}  # by thread: blocks of `enter`
_owners: WeakKeyDictionary[object, tuple[str, Callable]] = WeakKeyDictionary()


def enter() -> None:
    """This thread begins what a fork has to wait for."""
    me = get_ident()
    with _gate:
        _inside[me] = _inside.get(me, 0) + 1


def leave() -> None:
    """And has done it."""
    me = get_ident()
    with _gate:
        _inside[me] -= 1
        if not _inside[me]:
            del _inside[me]
            _gate.notify_all()


def own_lock(owner: object, name: str, make: Callable[[], Lock]) -> Lock:
    """Give an object, or a module, a lock as its attribute: one that is free in a child, unless the
    forking thread holds it."""
    lock = make()
    setattr(owner, name, lock)
    _owners[owner] = name, make
    return lock


def _before() -> None:
    me, last = get_ident(), time.monotonic() + PATIENCE
    _gate.acquire()  # held until the fork is over: nobody begins anything
    while any(other != me for other in _inside):
        if not _gate.wait(last - time.monotonic()):
            break


def _in_child() -> None:
    global _gate
    _gate, me = threading.Condition(threading.Lock()), get_ident()
    for other in [x for x in _inside if x != me]:
        del _inside[other]
    for owner, (name, make) in list(_owners.items()):
        lock = getattr(owner, name)
        if lock.acquire(blocking=False):
            lock.release()
        else:
            setattr(owner, name, make())


def _in_parent() -> None:
    _gate.release()


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
