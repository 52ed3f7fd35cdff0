"""Runtime scalars that user code has kept after a trace: they become plain numbers there.

State variables and results are plain by themselves. What a step puts anywhere else, a new key of a
dict or a list that it also reads, is found as the collector finds it, by a walk over the heap. That
takes long, so it is done for the first few traces of a step only.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Sequence
from types import CellType, FrameType

from tracejit.capture.python.references import LOOPED, count
from tracejit.capture.trace.scalars import is_traced, plain


def kept(numbers: Sequence[object]) -> list[object]:
    """Those of the numbers that somebody holds besides this sequence."""
    return [x for x in numbers if count(x) > LOOPED]


def make_plain(numbers: list[object]) -> None:
    """Put plain numbers in the place of runtime scalars, in everything that holds some."""
    for holder in gc.get_referrers(*numbers):
        if holder is numbers or isinstance(holder, FrameType):
            continue
        if isinstance(holder, dict):
            if any(map(is_traced, holder)):
                items = [(plain(k), plain(x)) for k, x in holder.items()]
                holder.clear()
                holder.update(items)
            else:
                items_plain(holder)
        elif isinstance(holder, (list, deque)):
            items_plain(holder)
        elif isinstance(holder, set):
            numbers_in_it = [x for x in holder if is_traced(x)]
            holder.difference_update(numbers_in_it)
            holder.update(map(plain, numbers_in_it))
        elif isinstance(holder, CellType):
            holder.cell_contents = plain(holder.cell_contents)
        elif isinstance(getattr(holder, "__dict__", None), dict):
            items_plain(holder.__dict__)


def items_plain(holder: dict | list | deque) -> None:
    """Put plain numbers in the place of runtime scalars among the items of a container."""
    items = holder.items() if isinstance(holder, dict) else enumerate(holder)
    for key, x in [*items]:
        if is_traced(x):
            holder[key] = plain(x)
