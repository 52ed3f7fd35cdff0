"""Collectives among the launches of a plan: the pieces of a plan between them.

In: the calls of a plan in their order, and a function that makes a run of some of them. Out: a
`Pieces`: what a call does, in turn, as one Python function. Only the last piece writes what the
user has, so a collective that fails leaves everything as it was.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence

import torch

from tracejit.ir import process_groups
from tracejit.ir.process_groups import HOST, Memory, Space, Started
from tracejit.ir.torch_types import TO_TORCH
from tracejit.records import dataclass
from tracejit.runtime.device import Device
from tracejit.schedule.collectives import START
from tracejit.schedule.kernel import Kernel

# what failed calls have worked in: collectives of theirs may still be under way
_ABANDONED: list[object] = []


@dataclass(frozen=True, slots=True)
class Collective:
    """One half of a collective: what to do, on memory of so many bytes each."""

    name: str
    phase: str
    attrs: dict[str, object]
    dtype: torch.dtype
    nbytes: tuple[int, ...]  # of the operands, and of the result
    where: str

    @classmethod
    def of(cls, kernel: Kernel) -> Collective:
        """That of a kernel."""
        call, dtype = kernel.call, kernel.buffers[-1].dtype
        sizes = tuple(math.prod(shape) * dtype.itemsize for shape in call.shapes)
        return cls(call.op.name, call.phase, dict(call.attrs), TO_TORCH[dtype], sizes, call.where)

    @property
    def key(self) -> int:
        """Which of a plan's collectives it is a half of."""
        return self.attrs["number"]

    def start(self, addresses: Sequence[int], space: Space = HOST) -> Started:
        """Start it."""
        *operands, result = self.memory(addresses)
        return process_groups.start(
            self.name, self.attrs, self.dtype, operands, result, self.where, space
        )

    def memory(self, addresses: Sequence[int]) -> list[Memory]:
        """That of its operands, and of its result."""
        return [*zip(addresses, self.nbytes, strict=True)]


def run_alone(collective: Collective, addresses: Sequence[int]) -> None:
    """A half of a collective where nothing runs beside it: the first one does it all."""
    if collective.phase == START:
        collective.start(addresses).wait()


class Half:
    """One half of a collective among the launches on a GPU, which is called as a kernel's launcher
    is: the addresses come after nine arguments. What is under way is shared by all halves of a
    plan: per collective those of calls that have begun, the last of which is waited for. A call
    that fails in between leaves its own there, since the engine may still use the memory."""

    def __init__(self, collective: Collective, device: Device, under_way: dict[int, list]):
        self._collective, self._device, self._under_way = collective, device, under_way

    def __call__(self, *given: object) -> None:
        collective, addresses = self._collective, given[9:]
        if collective.phase != START:
            self._under_way[collective.key].pop().wait()
            return
        *reads, result = collective.memory(addresses)
        begun = self._device.communicate(
            collective.name, lambda space: collective.start(addresses, space), reads, result
        )
        self._under_way.setdefault(collective.key, []).append(begun)


class Pieces:
    """A call of a plan with collectives. `steps`: functions from the words of its kernels, or a
    half of a collective with (position among the addresses, bytes from there) of its memory."""

    def __init__(self, steps: Sequence[tuple], count: int, run: Callable):
        self.steps, self._count, self._run = steps, count, run
        self._packs = [step[1].pack for step in steps if step[0] is None]
        self._last = steps[-1][0] is None

    def begin(self, threads: int, *given: object) -> list:
        """What a call needs: words for each run of kernels, and the addresses."""
        return [[pack(0, threads, *given) for pack in self._packs], given[: self._count], False]

    def drive(self, call: list) -> None:
        """Make a call."""
        words, addresses, _ = call
        under_way: dict[int, Started] = {}
        rest = iter(words)
        try:
            for collective, what in self.steps:
                if collective is None:
                    self._run(what.at, next(rest))
                elif collective.phase == START:
                    at = [addresses[i] + offset for i, offset in what]
                    under_way[collective.key] = collective.start(at)
                else:
                    under_way.pop(collective.key).wait()
        except BaseException:
            if under_way:
                _ABANDONED.append((sys._getframe(1).f_locals, under_way))
            raise
        call[2] = True

    def ran(self, call: list) -> bool:
        """Whether a call has come to its end."""
        return bool(call[0][-1][0]) if self._last else call[2]
