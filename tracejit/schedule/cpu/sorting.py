"""How rows are sorted on the CPU: how they are dealt to threads, and the memory of each chunk.

In: a Kernel that sorts, with plain numbers as sizes. A chunk makes the items of one row after
another (`codegen/c_moves.py`), sorts them within two arrays of its own, and stores their places.
"""

from __future__ import annotations

import math
from dataclasses import replace

from tracejit.schedule.cpu.cost import chunks_of, weight
from tracejit.schedule.cpu.loops import Loop, dealt
from tracejit.schedule.cpu.plan import CpuKernel, Nest
from tracejit.schedule.kernel import Kernel

PASSES = 16  # accesses of an item while it is sorted, roughly
MOST = 64 << 20  # bytes that all chunks work in, unless they are few
FEW = 8  # chunks


def key_bits(kernel: Kernel) -> int:
    """Of what orders as the values do."""
    dtype = kernel.sort.value.dtype
    return 64 if dtype.itemsize == 8 else 32


def chunk_bytes(kernel: Kernel) -> int:
    """What a chunk works in: two arrays of a row's items, each a key and a place."""
    (along,) = kernel.stages[0].axes
    return 2 * along.extent * (16 if key_bits(kernel) == 64 else 8)


def deal_sorted(kernel: CpuKernel) -> CpuKernel:
    """Walk a kernel that sorts row by row."""
    if kernel.kernel.sort is None:
        return kernel
    return replace(kernel, outer=_dealt(kernel.kernel), inner=(None, None))


def _dealt(kernel: Kernel) -> Nest:
    """Rows one by one, in chunks."""
    rows = math.prod(a.extent for a in kernel.axes)
    (along,) = kernel.stages[0].axes
    work = rows * along.extent * (weight(kernel.stages[0].body) + PASSES)
    most = max(FEW, MOST // chunk_bytes(kernel))
    return Nest("", 1, dealt([Loop(a) for a in kernel.axes], min(chunks_of(rows, work), most))[2])
