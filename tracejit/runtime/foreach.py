"""The launches of a `foreach`, and the tables that they read: chunks of rows, and addresses."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from tracejit.codegen.triton_foreach import ALIGNED, chunks_of, constants_of
from tracejit.runtime.device import Device
from tracejit.runtime.launches import STREAM
from tracejit.runtime.triton_launch import LoadedLaunch
from tracejit.schedule.foreach import Columns, columns_of


def table_of(launch: LoadedLaunch) -> list[int]:
    """Which of the plan's buffers its table of addresses has, in order."""
    kernel = launch.launch.kernel
    columns = columns_of(kernel)
    at = {buffer.name: i for buffer, i in zip(kernel.buffers, launch.buffers, strict=True)}
    table = [0] * columns.words
    for row, part in enumerate(kernel.parts):
        for j, name in enumerate(part.buffers):
            table[columns.place(columns.buffers, j, row)] = at[name]
    return table


def launches_of(
    launch: LoadedLaunch, table: Sequence[int]
) -> list[tuple[LoadedLaunch, np.ndarray]]:
    """One or two launches, each with its chunks, for the addresses in a table (or what they are
    behind a multiple of 16 bytes): in wide accesses, and of all that is not aligned."""
    kernel, sizes = launch.launch.kernel, launch.launch.sizes
    columns = columns_of(kernel)
    chunks = chunks_of(kernel, sizes, [_is_aligned(columns, table, i) for i in range(columns.rows)])
    return [
        (
            replace(
                launch,
                geometry=replace(launch.geometry, grid=(len(some),)),
                constants=constants_of(kernel, sizes, wide),
            ),
            some,
        )
        for some, wide in zip(chunks, (True, False), strict=True)
        if len(some)
    ]


def _is_aligned(columns: Columns, table: Sequence[int], row: int) -> bool:
    """Whether all that has an element for each of the row's starts at a multiple of 16 bytes."""
    return all(
        table[columns.place(columns.buffers, j, row)] % ALIGNED == 0
        for j, is_flat in enumerate(columns.flat)
        if is_flat
    )


def both(
    first: Callable[..., None], second: Callable[..., None], split: int
) -> Callable[..., None]:
    """What launches two kernels on one stream: it is given the arguments of both, those of the
    second from `split` on, where the stream is missing."""

    def run(*given: object) -> None:
        rest = given[split:]
        first(*given[:split])
        second(*rest[:STREAM], given[STREAM], *rest[STREAM + 1 :])

    return run


class Constant:
    """What stays the same on the device: chunks, one launch's after another's."""

    def __init__(self) -> None:
        self._words: list[np.ndarray] = []
        self._count = 0

    def add(self, chunks: np.ndarray) -> int:
        """At which byte these are, a multiple of 16."""
        words = chunks.ravel()
        padded = np.concatenate([words, np.zeros(len(words) % 2, np.int64)])
        at, self._count = 8 * self._count, self._count + len(padded)
        self._words.append(padded)
        return at

    def pinned(self, device: Device) -> torch.Tensor | None:
        """All of it, in memory from which it can be copied at any time."""
        if not self._words:
            return None
        words = np.concatenate(self._words)
        memory = device.pinned(words.nbytes)
        ctypes.memmove(memory.data_ptr(), words.ctypes.data, words.nbytes)
        return memory


def placed(device: Device, memory: torch.Tensor) -> torch.Tensor:
    """A copy on the device, in the order of the current stream."""
    found = device.allocate(len(memory))
    device.upload(found, memory)
    return found
