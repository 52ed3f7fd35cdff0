"""The memory of programs: what plans work in, and outputs, which belong to whoever holds them.

The programs of one step share a `Memory`. What their plans work in while they run is shared more
widely: on the CPU by all of the process.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Sequence
from functools import partial
from sys import getrefcount
from weakref import WeakValueDictionary

import torch

from tracejit.ir.torch_types import TO_TORCH
from tracejit.ir.types import contiguous_strides
from tracejit.runtime import waiting
from tracejit.runtime.device import Device
from tracejit.schedule.plan import PlanBuffer

_users = torch._C._storage_Use_Count


class Memory:
    """Memory for programs that run one after another."""

    def __init__(self) -> None:
        self._arenas: dict[str, StreamArenas] = {}
        self._outputs: dict[tuple, OutputMemory] = {}

    def arena(self, device: Device | None) -> Arena | StreamArenas:
        """What plans on a device work in; on the CPU where there is none."""
        if device is None:
            return _arenas.setdefault("cpu", Arena())
        return self._arenas.setdefault(device.name, StreamArenas(device))

    def outputs(
        self, buffers: Sequence[PlanBuffer], device: Device | None
    ) -> list[OutputMemory] | list[FreshMemory]:
        """Memory for outputs. On the CPU it is shared between plans. Plans of one step have much
        the same outputs, such as a model's gradients: the n-th output of a type has the same memory
        in all."""
        if device is not None:
            return [FreshMemory(buffer, device) for buffer in buffers]
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

    def __init__(self) -> None:
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
        memory = torch.empty(nbytes, dtype=torch.uint8)
        return memory.data_ptr(), nbytes, memory


class StreamArenas:
    """The same on a device, where kernels may still run when a plan has returned: of each stream,
    in whose order its memory is used again."""

    MAX_STREAMS = 16  # the least recently added go first

    def __init__(self, device: Device):
        self._device = device
        self._free: OrderedDict[int, list[tuple]] = OrderedDict()

    def take(self, nbytes: int) -> tuple[int, int, torch.Tensor, int | None]:
        """(the address, the size, the memory, the stream) of at least some bytes."""
        device = self._device
        stream = None if device.capturing() else device.current_stream()
        free = self._free.get(stream)
        held = free.pop() if free else None
        if held is not None and held[1] >= nbytes:
            return held
        held = None  # freed before there is more
        memory = device.allocate(nbytes)
        return memory.data_ptr(), nbytes, memory, stream

    def give(self, held: tuple[int, int, torch.Tensor, int | None]) -> None:
        """Give back what `take` has returned. What a graph works in, which the caller captures, is
        the graph's."""
        stream = held[3]
        if stream is None:
            return
        self._free.setdefault(stream, []).append(held)
        while len(self._free) > self.MAX_STREAMS:
            self._free.popitem(last=False)


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


class FreshMemory:
    """Memory for one output on a device. It is new for each call, and goes back to where it comes
    from in the order of streams: a reader on another stream may hold on to it (`record_stream`),
    and a graph that the caller captures has its own."""

    def __init__(self, buffer: PlanBuffer, device: Device):
        shape, dtype = buffer.type.shape, TO_TORCH[buffer.type.dtype]
        strides = buffer.strides or contiguous_strides(shape)
        self._new = partial(device.empty_strided, shape, strides, dtype)

    def take(self, reusable: Collection[int]) -> tuple[torch.Tensor, int]:
        """A new tensor, and its address."""
        tensor = self._new()
        if waiting.active and (others := waiting.here()) is not None:
            others.hold(tensor)
        return tensor, tensor.data_ptr()


class _Kept:
    """Memory that may be handed out again."""

    __slots__ = ("memory", "address", "storage", "number", "alone")

    def __init__(self, memory: torch.Tensor):
        self.memory, self.address = memory, memory.data_ptr()
        self.storage = memory.untyped_storage()
        self.number = self.storage._cdata
        # tensors on the storage, and references to the Python object that stands for it
        self.alone = _users(self.number) + getrefcount(self.storage)
