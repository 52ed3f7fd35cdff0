"""What CPython knows of a class besides what Python shows."""

from __future__ import annotations

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE


def is_heap_type(cls: type) -> bool:
    """Whether a class was made by a class statement, or like one; most types of C were not."""
    return cls.__flags__ & _HEAP_TYPE != 0
