"""The memory of programs: what plans work in, and outputs, which belong to whoever holds them.

The programs of one step share a `Memory`. What their plans work in while they run is shared more
widely: on the CPU by all of the process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from sys import getrefcount
from weakref import WeakValueDictionary

import torch

from tracejit.ir.torch_types import TO_TORCH
from tracejit.ir.types import contiguous_strides
from tracejit.schedule.plan import PlanBuffer

_users = torch._C._storage_Use_Count


class Memory:
    """Memory for programs that run one after another."""

    def __init__(self) -> None:
        self._arenas: dict[str, Arena] = {}
        self._outputs: dict[tuple, OutputMemory] = {}

    def arena(self, device: str) -> Arena:
        """What plans on a device work in."""
        if device != "cpu":  # where kernels may still run when a plan has returned
            return self._arenas.setdefault(device, Arena(device))
        return _arenas.setdefault(device, Arena(device))

    def outputs(self, buffers: Sequence[PlanBuffer]) -> list[OutputMemory]:
        """Memory for outputs, shared between plans. Plans of one step have much the same outputs,
        such as a model's gradients: the n-th output of a type has the same memory in all."""
        found, seen = [], Counter()
        for buffer in buffers:
            kind = buffer.type, buffer.strides
            key = *kind, seen[kind]
            seen[kind] += 1
            if key not in self._outputs:
                self._outputs[key] = OutputMemory(buffer)
            found.append(self._outputs[key])
        return found


class Arena:
    """Memory that is used while a plan runs. A run takes it and gives it back, with another if
    there are several at a time; each grows to what the largest plan needs."""

    def __init__(self, device: str):
        self.device = device
        self._free: list[tuple[int, int, torch.Tensor | None]] = []
        self.give = self._free.append

    def take(self, nbytes: int) -> tuple[int, int, torch.Tensor]:
        """(the address, the size, the memory) of at least some bytes."""
        try:
            held = self._free.pop()
        except IndexError:
            held = 0, -1, None
        if held[1] >= nbytes:
            return held
        held = None  # freed before there is more
        memory = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        return memory.data_ptr(), nbytes, memory


_arenas: WeakValueDictionary[str, Arena] = WeakValueDictionary()  # as long as there are programs


class OutputMemory:
    """Memory for one output, which the caller keeps: reused when nobody holds it any more."""

    KEPT = 2  # a gradient of the last step is held while the next one is written

    def __init__(self, buffer: PlanBuffer):
        self.shape = buffer.type.shape
        self.strides = buffer.strides or contiguous_strides(buffer.type.shape)
        self.options = {
            "dtype": TO_TORCH[buffer.type.dtype],
            "device": torch.device(buffer.type.device),
        }
        self.kept: list[_Kept] = []
        self.used = False  # memory was taken before

    def take(self, reusable: Collection[int]) -> tuple[torch.Tensor, int]:
        """A tensor that shares memory with no other that the caller could hold, and its address.

        reusable: storages where an output may be written. Each has one holder outside, which is
            not read while the plan runs and lets go of it afterwards.
        The first memory is not kept here, because many plans run just once, such as the one that
        makes an optimizer's state.
        """
        for kept in self.kept:
            held = _users(kept.number) + getrefcount(kept.storage) - kept.alone
            if held <= 0:
                return kept.memory.data, kept.address
            if held == 1 and kept.number in reusable:
                self.kept = [kept]  # one is enough from now on
                return kept.memory.data, kept.address
        memory = torch.empty_strided(self.shape, self.strides, **self.options)
        if not self.used or len(self.kept) >= self.KEPT:
            self.used = True
            return memory, memory.data_ptr()
        self.kept.append(_Kept(memory))
        return memory.data, memory.data_ptr()


class _Kept:
    """Memory that may be handed out again."""

    __slots__ = ("memory", "address", "storage", "number", "alone")

    def __init__(self, memory: torch.Tensor):
        self.memory, self.address = memory, memory.data_ptr()
        self.storage = memory.untyped_storage()
        self.number = self.storage._cdata
        # tensors on the storage, and references to the Python object that stands for it
        self.alone = _users(self.number) + getrefcount(self.storage)
