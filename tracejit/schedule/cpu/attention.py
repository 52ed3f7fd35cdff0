"""How attention is cut on the CPU: blocks of queries and keys, threads, memory of each chunk.

In: a Kernel whose only stage has an Attend, with plain numbers as sizes, and how wide the machine's
vectors are. Out: its `Blocks`; and `Attention`, the kernel's geometry under them, which the printer
reads too. Scores exist for one block of queries and keys at a time, in a cache.

Forward, a unit of work is a block of queries. It walks the keys that it sees, block by block, with
the maximum and the sum of each row so far. Keys (turned) and values are packed once for each batch
that a chunk works on. Of gradients, a unit is a whole batch: it walks blocks of keys, and for each
the blocks of queries that see it, and adds up dq in memory of the chunk's, so nothing is computed
twice and the order of all sums is fixed.
"""

from __future__ import annotations

import math
from dataclasses import replace

from tracejit.ir.types import f32, f64
from tracejit.schedule.cpu.cost import GRAIN
from tracejit.schedule.cpu.plan import LINE, Blocks, CpuKernel
from tracejit.schedule.cpu.registers import accumulators
from tracejit.schedule.kernel import Attend, Kernel

BLOCK = 64  # queries, and keys, of a block: its scores, and the operands beside them, fit a cache
CHUNKS = 32  # each works in memory of its own
VECTORS = 2  # of a micro-kernel's block: all widths are few vectors


def has_attention(kernel: Kernel) -> bool:
    """Whether a kernel computes attention."""
    return bool(kernel.stages) and kernel.stages[0].attend is not None


def cut_attention(kernel: CpuKernel, vector_bytes: int) -> CpuKernel:
    """Choose the blocks of attention, and how it is dealt to threads."""
    if not has_attention(kernel.kernel):
        return kernel
    attend = kernel.kernel.stages[0].attend
    lanes = vector_bytes // accumulator(attend).itemsize
    rows = min(accumulators(vector_bytes) // VECTORS, attend.m.extent)
    m = min(BLOCK, attend.m.extent)
    n = min(BLOCK, -(-attend.n.extent // lanes) * lanes)
    blocks = Blocks(vector_bytes, rows, m, n, 1)
    whole = Attention(kernel.kernel, blocks)
    m, n, c, d = (a.extent for a in attend.axes)
    work = whole.batches * m * n * (c + d + 16) * 2 // lanes
    chunks = max(1, min(whole.units, work // GRAIN, CHUNKS))
    return replace(kernel, blocks=replace(blocks, chunks=chunks))


def accumulator(attend: Attend):
    """The dtype that attention computes in."""
    return f64 if attend.side("q").value.dtype is f64 else f32


class Attention:
    """The geometry of a kernel's attention under its blocks."""

    def __init__(self, kernel: Kernel, blocks: Blocks):
        self.kernel, self.blocks = kernel, blocks
        (self.stage,) = kernel.stages
        self.attend = self.stage.attend
        self.m, self.n, self.c, self.d = self.attend.axes
        self.batch = self.stage.axes
        self.batches = math.prod(a.extent for a in self.batch)
        self.acc = accumulator(self.attend)
        self.lanes = blocks.vector_bytes // self.acc.itemsize
        self.row_blocks = -(-self.m.extent // blocks.m)
        self.column_blocks = -(-self.n.extent // blocks.n)
        self.all_rows = self.row_blocks * blocks.m
        self.all_columns = self.column_blocks * blocks.n
        self.wide_c, self.wide_d = (
            -(-a.extent // self.lanes) * self.lanes for a in (self.c, self.d)
        )

    @property
    def units(self) -> int:
        """Of work that is dealt to chunks."""
        return self.batches * (self.row_blocks if self.attend.is_forward else 1)

    def wants(self, name: str) -> bool:
        """Whether a primitive is among the results."""
        return self.attend.result(name) is not None

    @property
    def arrays(self) -> dict[str, int]:
        """The elements of each array that a chunk works in, whole vectors."""
        m, n = self.blocks.m, self.blocks.n
        c, d, wide_c, wide_d = self.c.extent, self.d.extent, self.wide_c, self.wide_d
        sizes = {"scores": m * n}
        if self.attend.is_forward:
            sizes |= {"turned_k": self.column_blocks * c * n, "some_q": m * wide_c}
            sizes |= {"tops": m, "sums": m}
            if self.wants("attention"):
                sizes |= {"all_v": self.all_columns * wide_d, "mix": m * wide_d}
        else:
            sizes |= {"turned_k": c * n, "all_q": self.all_rows * wide_c}
            sizes |= {"all_lse": self.all_rows, "all_g": self.all_rows * wide_d}
            if self.wants("attention_dv"):
                sizes["dv"] = n * wide_d
            if self.wants("attention_dk") or self.wants("attention_dq"):
                sizes |= {"turned_v": d * n, "all_delta": self.all_rows, "slopes": m * n}
            if self.wants("attention_dk"):
                sizes["dk"] = n * wide_c
            if self.wants("attention_dq"):
                sizes |= {"some_k": n * wide_c, "all_dq": self.all_rows * wide_c}
        line = LINE // self.acc.itemsize
        return {name: -(-size // line) * line for name, size in sizes.items()}

    @property
    def per_chunk(self) -> int:
        """Elements that a chunk works in."""
        return sum(self.arrays.values())

    @property
    def scratch_bytes(self) -> int:
        return self.blocks.chunks * self.per_chunk * self.acc.itemsize
