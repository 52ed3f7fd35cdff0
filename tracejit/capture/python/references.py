"""Reference counts of CPython, calibrated when this module is imported.

How many references a value has that nobody else holds depends on where it is counted from. Each
number here is measured on an object in just that position, not written down.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

count = sys.getrefcount


def _in_list() -> int:
    held = [object()]
    return count(held[0])


def _looped() -> int:
    held = [object()]
    return next(count(x) for x in held)


ALONE = _in_list()  # references to an item of a list that nobody else holds
LOOPED = _looped()  # the same, counted in a comprehension over the list


def is_alone(objects: Sequence[object], at: int) -> bool:
    """Whether nobody but a list holds its item."""
    return count(objects[at]) <= ALONE


def _gradient() -> tuple[int, int]:
    owner = torch.zeros(1, requires_grad=True)
    owner.grad = torch.zeros(1)
    grad = owner.grad
    return count(grad), grad._use_count()


# references to a local that is a `.grad` nobody else holds: in Python, and in C++
GRADIENT = _gradient()
