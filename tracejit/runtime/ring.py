"""Pinned memory of the host, through which numbers go to a device and come back."""

from __future__ import annotations

import ctypes
import struct
from collections import deque

import torch

from tracejit.errors import CaptureError
from tracejit.runtime.device import Device, Event

_SLOTS = 4  # copies that may be under way before the host waits for the first
_KEPT = 16  # slots in reserve for graphs that callers capture


class _Slot:
    """Pinned memory for one copy, and the event behind that copy."""

    __slots__ = ("memory", "address", "event")

    def __init__(self, memory: torch.Tensor, event: Event | None = None):
        self.memory, self.address, self.event = memory, memory.data_ptr(), event

    def fill(self, words: bytes) -> None:
        """Put bytes there."""
        ctypes.memmove(self.address, words, len(words))


_OF_GRAPHS: list[_Slot] = []  # which graphs of callers copy, as long as they run


class Ring:
    """Slots that are used in turn, on any stream: each again only when its last copy is over."""

    def __init__(self, device: Device, nbytes: int):
        self._device = device
        whole = device.pinned((_SLOTS + _KEPT) * nbytes)
        memory = [whole[i : i + nbytes] for i in range(0, len(whole), nbytes)]
        self._slots = deque(_Slot(x, device.event()) for x in memory[:_SLOTS])
        self._reserve = [_Slot(x) for x in memory[_SLOTS:]]

    def upload(self, target: torch.Tensor, words: bytes) -> None:
        """Copy bytes to a device, in the order of its current stream."""
        slot = self._slots[0]
        slot.event.wait()
        self._slots.rotate(-1)
        slot.fill(words)
        self._device.upload(target, slot.memory)
        slot.event.record()

    def upload_captured(self, target: torch.Tensor, words: bytes) -> None:
        """The same for a graph that the caller captures: the bytes stay as they are now."""
        if not self._reserve:
            raise CaptureError(
                reason=f"more than {_KEPT} graphs with numbers of one plan were captured",
                remedy="Capture the step once and replay that graph",
            )
        slot = self._reserve.pop()
        _OF_GRAPHS.append(slot)
        slot.fill(words)
        self._device.upload(target, slot.memory)


_FORMATS = {
    torch.float64: "d",
    torch.float32: "f",
    torch.float16: "e",
    torch.int64: "q",
    torch.int32: "i",
    torch.int16: "h",
    torch.int8: "b",
    torch.uint8: "B",
    torch.bool: "?",
}


def read_element(device: Device, tensor: torch.Tensor) -> float | int | bool:
    """The one element of a tensor on a device; waits for what computes it, and for no more."""
    if device.capturing():
        raise CaptureError(
            reason="the step reads a value of a tensor, which is not computed during a capture",
            remedy="Return the tensor instead, or call the step outside the capture",
        )
    memory, event = device.pinned(tensor.element_size()), device.event()
    device.download(memory.view(tensor.dtype).view(tensor.shape), tensor)
    event.record()
    event.wait()
    words = ctypes.string_at(memory.data_ptr(), tensor.element_size())
    if tensor.dtype is torch.bfloat16:  # the upper half of a float32
        return struct.unpack("f", b"\0\0" + words)[0]
    return struct.unpack(_FORMATS[tensor.dtype], words)[0]
