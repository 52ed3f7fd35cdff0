"""The process's pool of threads, which runs the plans of the C executor: loaded once."""

from __future__ import annotations

import ctypes
import functools
import threading

from tracejit.codegen.c_pool import POOL_SOURCE
from tracejit.runtime.c_compiler import load_library

_lock = threading.Lock()


@functools.cache
def _loaded() -> ctypes.CDLL:
    return load_library(POOL_SOURCE)


def load_pool() -> ctypes.CDLL:
    """What runs plans, with the pool of threads."""
    with _lock:
        return _loaded()
