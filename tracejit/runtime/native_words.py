"""The C functions of `codegen/c_words.py`, loaded once a process."""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Callable

from tracejit.codegen.c_words import SOURCE
from tracejit.errors import TracejitError
from tracejit.forks import own_lock
from tracejit.runtime.c_compiler import load_library, locked_function

_lock = own_lock(sys.modules[__name__], "_lock", threading.Lock)


def load_words() -> tuple[Callable, ...] | None:
    """`tj_same`, `tj_again`, `tj_count`, `tj_arrays`; None where there is no C compiler. They keep
    Python's lock, so that nothing changes meanwhile."""
    with _lock:
        return _loaded()


@functools.cache
def load_early() -> None:
    """Begin that, beside what else a first call does."""
    threading.Thread(target=load_words, daemon=True).start()


@functools.cache
def _loaded() -> tuple[Callable, ...] | None:
    try:
        library = load_library(SOURCE)
    except (TracejitError, OSError):
        return None
    number, flag = ctypes.c_int64, ctypes.c_int
    return (
        locked_function(library, "tj_same", flag, *[number] * 2),
        locked_function(library, "tj_again", ctypes.py_object, number),
        locked_function(library, "tj_count", flag, *[number] * 6),
        locked_function(library, "tj_arrays", flag, ctypes.py_object, *[number] * 5),
    )
