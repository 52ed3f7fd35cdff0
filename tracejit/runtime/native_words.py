"""The C functions of `codegen/c_words.py`, loaded once a process."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

from tracejit.codegen.c_words import SOURCE
from tracejit.errors import TracejitError
from tracejit.runtime.c_compiler import load_library, locked_function


@functools.cache
def load_words() -> tuple[Callable[..., int], Callable[..., int]] | None:
    """`tj_same` and `tj_count`, of addresses and numbers; None where there is no C compiler. They
    keep Python's lock, so that nothing changes meanwhile."""
    try:
        library = load_library(SOURCE)
    except (TracejitError, OSError):
        return None
    number = ctypes.c_int64
    same = locked_function(library, "tj_same", ctypes.c_int, *[number] * 2)
    return same, locked_function(library, "tj_count", ctypes.c_int, *[number] * 6)
