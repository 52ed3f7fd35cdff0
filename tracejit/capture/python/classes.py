"""What CPython knows of a class besides what Python shows."""

from __future__ import annotations

import io
import sys

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE


def module_of(cls: type) -> str:
    """The module of a class; "" where its `__module__` is not the name of one."""
    module = cls.__module__
    return module if isinstance(module, str) else ""


def is_heap_type(cls: type) -> bool:
    """Whether a class was made by a class statement, or like one; most types of C were not."""
    return cls.__flags__ & _HEAP_TYPE != 0


def slots(cls: type) -> list[str]:
    """The attributes of instances that are no items of their dict."""
    found: list[str] = []
    for base in cls.__mro__:
        names = vars(base).get("__slots__", ())
        for name in [names] if isinstance(names, str) else names:
            private = name.startswith("__") and not name.endswith("__")
            found.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return [name for name in found if name not in ("__dict__", "__weakref__")]


def is_stream(x: object) -> bool:
    """Whether something is where `print` shows what it is given, or may be."""
    streams = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    return isinstance(x, io.TextIOBase) and any(x is stream for stream in streams)
