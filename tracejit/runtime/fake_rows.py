"""A `foreach` on a fake device: what its tables say is checked, and done by numpy row by row."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np

from tracejit.codegen.triton_foreach import (
    ALIGNED,
    WORDS,
    WORDS_OF_FOLD,
    is_reduced,
    workspace_of,
)
from tracejit.ir.types import Type
from tracejit.runtime.fake_clock import Fault
from tracejit.runtime.numpy_kernel import Run
from tracejit.runtime.triton_launch import LoadedLaunch
from tracejit.schedule.foreach import columns_of, rows_of
from tracejit.schedule.plan import Launch, PlanBuffer

Place = tuple[int, int]  # an address, and how many bytes from there


class Rows:
    """What a launch of a foreach does: the pieces of memory that it finds through its tables."""

    def __init__(self, launch: LoadedLaunch, what: str):
        self._launch, self._what = launch, what
        self._kernel = launch.launch.kernel
        self._columns = columns_of(self._kernel)
        self._reduced = is_reduced(self._kernel)
        self._counts = rows_of(self._kernel, launch.launch.sizes)
        self._runs: dict[int, Run] = {}  # by the number of elements
        self._work: list[tuple[int, int, list[int]]] = []  # row, elements, addresses

    def read(self, addresses: int, chunks: int) -> tuple[list[Place], list[tuple[Place, str]]]:
        """Read the tables: where they are, and the pieces of memory with "r", "w" or "rw"."""
        columns, grid = self._columns, self._launch.geometry.grid[0]
        count = grid * (WORDS_OF_FOLD if self._reduced else WORDS)
        words = np.array((ctypes.c_int64 * count).from_address(chunks)).reshape(grid, -1)
        table = (ctypes.c_uint64 * columns.words).from_address(addresses)
        self._work, pieces = [], []
        for row, first, end in self._pieces(words):
            n, places = end - first, []
            for j, buffer in enumerate(columns.kernel.buffers):
                at, size = table[columns.place(columns.buffers, j, row)], buffer.dtype.itemsize
                is_flat = columns.flat[j]
                at += first * size if is_flat else 0
                places.append(at)
                pieces.append(((at, (n if is_flat else 1) * size), buffer.access))
                self._check_wide(at, end, is_flat)
            self._work.append((row, n, places))
        return [(addresses, 8 * columns.words), (chunks, 8 * count)], pieces

    def _pieces(self, words: np.ndarray) -> list[tuple[int, int, int]]:
        """What the chunks of each row cover: (row, first element, the one behind the last)."""
        found: list[tuple[int, int, int]] = []
        for row, group in itertools.groupby(words.tolist(), key=lambda chunk: chunk[0]):
            some = list(group)
            for before, after in itertools.pairwise(some):
                if before[2] != after[1]:
                    raise Fault(f"{self._what}: the chunks of row {row} do not meet: {some}")
            found.append((row, some[0][1], some[-1][2]))
            if not 0 <= found[-1][1] <= found[-1][2] <= self._counts[row]:
                raise Fault(f"{self._what}: chunks beyond row {row}: {found[-1]}")
            if self._reduced:
                self._check_folded(row, some)
        return found

    def _check_folded(self, row: int, chunks: list[list[int]]) -> None:
        """A reduced row is whole, and its partials have their places."""
        count, partials = len(chunks), chunks[0][3]
        numbers = [[partials, number, count] for number in range(count)]
        size = workspace_of(self._kernel, self._launch.launch.sizes)
        inside = 4 * len(self._counts) <= partials <= size - 8 * count
        whole = (chunks[0][1], chunks[-1][2]) == (0, self._counts[row])
        if [chunk[3:] for chunk in chunks] != numbers or not whole or not inside:
            raise Fault(f"{self._what}: row {row} is not reduced as a whole: {chunks}")

    def _check_wide(self, at: int, end: int, is_flat: bool) -> None:
        """What Triton was told of addresses and chunks is true."""
        wide = self._launch.constants["WIDE"]
        if wide > 1 and ((is_flat and at % ALIGNED) or end % wide):
            raise Fault(f"{self._what} moves {at:#x} in wide accesses up to element {end}")

    def run(self, scalars: list[float]) -> None:
        """Do what was read."""
        columns = self._columns
        for row, n, places in self._work:
            if n not in self._runs:
                self._runs[n] = self._made(n)
            mine = [
                scalars[columns.place(columns.scalars, j, row)] for j in range(len(columns.scalars))
            ]
            self._runs[n](places, mine)

    def _made(self, n: int) -> Run:
        """The kernel of a row of so many elements."""
        kernel = self._columns.kernel
        buffers = {
            b.name: PlanBuffer(b.name, "arena", Type(b.dtype, (n if is_flat else 1,)))
            for b, is_flat in zip(kernel.buffers, self._columns.flat, strict=True)
        }
        launch = Launch(kernel, tuple(buffers), (n,), tuple(range(len(kernel.scalars))))
        return Run(launch, buffers, [*range(len(kernel.buffers))])

    def counters(self) -> int:
        """How many counters lie at the start of the workspace."""
        return self._columns.rows if self._reduced else 0
