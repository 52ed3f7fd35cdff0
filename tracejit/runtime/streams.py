"""Many numbers of torch's generator of the CPU by one call of C, the same that torch would draw.

In: what is to be drawn into which memory. Out: a function of the generator that draws it, some 15
times as fast as torch's own loops. It is used only where a trial shows that torch draws the same
here: with Intel's library on Intel's CPUs it does not.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Sequence

import torch

from tracejit.codegen.c_random import BELOW, DOUBLES, FLOATS, SOURCE
from tracejit.errors import TracejitError
from tracejit.records import dataclass
from tracejit.runtime.c_compiler import load_library, locked_function

WORTH = 256  # numbers; fewer are drawn by torch as fast
_UNIFORM = {torch.float32: FLOATS, torch.float64: DOUBLES}
_TRIED = 1500  # numbers


class _Draw(ctypes.Structure):
    _fields_ = (
        ("out", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("kind", ctypes.c_int64),
        ("below", ctypes.c_int64),
    )


@dataclass(frozen=True)
class Stream:
    """A tensor without gaps that is filled in the order of its memory: a bool one with whether
    numbers are below a chance, which is None if each call gives it, a float one with numbers."""

    into: torch.Tensor
    chance: float | None = 0.0

    @property
    def kind(self) -> int:
        return BELOW if self.into.dtype is torch.bool else _UNIFORM[self.into.dtype]


def threshold(chance: float) -> int:
    """The number that 53 random bits are below with a chance."""
    if not 0 <= chance <= 1:
        raise RuntimeError(f"bernoulli_ expects p to be in [0, 1], but got p={chance}")
    return math.ceil(math.ldexp(chance, 53))


def filler(streams: Sequence[Stream]) -> Callable[..., None]:
    """A function of a generator, and of the chances that are not known, which fills all tensors in
    turn. The generator goes on as if torch had drawn."""
    draw = _function()
    table = (_Draw * len(streams))()
    for item, s in zip(table, streams, strict=True):
        item.out, item.count, item.kind = s.into.data_ptr(), s.into.numel(), s.kind
        item.below = 0 if s.chance is None else threshold(s.chance)
    open_ones = [item for item, s in zip(table, streams, strict=True) if s.chance is None]
    at, count, kept = ctypes.addressof(table), len(streams), (table, streams)

    def fill(generator: torch.Generator, *chances: float, kept: object = kept) -> None:
        for item, chance in zip(open_ones, chances, strict=True):
            item.below = threshold(chance)
        state = generator.get_state()
        draw(state.data_ptr(), at, count)
        generator.set_state(state)

    return fill


@functools.cache
def _function() -> Callable[[int, int, int], None]:
    """The C function. It keeps Python's lock, so that no other thread draws meanwhile."""
    types = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64
    return locked_function(load_library(SOURCE), "tj_draw", None, *types)


@functools.cache
def available() -> bool:
    """Whether the C function can be had and draws what torch draws."""
    try:
        _function()
    except (TracejitError, OSError):
        return False
    mine, its = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    for dtype in (torch.bool, torch.float32, torch.float64):
        a, b = torch.empty(_TRIED, dtype=dtype), torch.empty(_TRIED, dtype=dtype)
        filler([Stream(a, 0.3)])(mine)
        b.bernoulli_(0.3, generator=its) if dtype is torch.bool else b.uniform_(generator=its)
        if not (torch.equal(a, b) and torch.equal(mine.get_state(), its.get_state())):
            return False
    return True
