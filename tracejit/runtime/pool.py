"""The process's pool of threads, which runs the plans of the C executor: loaded once."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable

from tracejit.codegen.c_pool import POOL_SOURCE
from tracejit.forks import own_lock
from tracejit.runtime.c_compiler import load_library

_lock = own_lock(sys.modules[__name__], "_lock", threading.Lock)


@functools.cache
def _loaded() -> ctypes.CDLL:
    return load_library(POOL_SOURCE)


def load_pool() -> ctypes.CDLL:
    """What runs plans, with the pool of threads."""
    with _lock:
        return _loaded()


@functools.cache
def _within() -> Callable[..., bool]:
    function = load_pool()["tj_pool_within"]
    function.restype = ctypes.c_bool
    function.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 4]
    return function


def within(address: int, count: int, itemsize: int, last: int) -> bool:
    """Whether integers of 4 or 8 bytes lie in [0, last], which such an integer holds. All threads
    look."""
    return _within()(address, count, itemsize, last, len(os.sched_getaffinity(0)))
