"""The C functions of `codegen/c_words.py`, loaded once a process."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

from tracejit.codegen.c_words import SOURCE
from tracejit.errors import TracejitError
from tracejit.runtime.c_compiler import load_library


@functools.cache
def load_words() -> tuple[Callable[..., int], Callable[..., int]] | None:
    """`tj_same` and `tj_count`, of addresses and numbers; None where there is no C compiler. They
    keep Python's lock, so that nothing changes meanwhile."""
    try:
        library = load_library(SOURCE)
    except (TracejitError, OSError):
        return None
    return _function(library, "tj_same", 2), _function(library, "tj_count", 6)


def _function(library: ctypes.CDLL, name: str, count: int) -> Callable[..., int]:
    address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    made = ctypes.PYFUNCTYPE(ctypes.c_int, *[ctypes.c_int64] * count)(address)
    made.library = library
    return made
