"""The seam to a GPU: all that the launch path asks of a device.

There are two: `cuda_device.py`, torch's CUDA runtime and Triton's driver, and `fake_device.py`, on
which the tests prove the order of launches, copies and events without a GPU. What is allocated,
copied and recorded goes to the current stream of the device, which is the caller's to set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from tracejit.ir.process_groups import Memory, Space
from tracejit.records import dataclass
from tracejit.runtime.triton_launch import DevicePointer, LoadedLaunch


@dataclass(frozen=True)
class Properties:
    """What kernels are chosen by."""

    name: str
    arch: int  # 90 for sm_90
    multiprocessors: int
    shared_bytes: int  # of shared memory that one program may use


@dataclass(frozen=True)
class LoadedKernel:
    """A compiled kernel on its device: `run(grid, 1, 1, stream, function, packed, None, None, None,
    *arguments)` launches it, with integers for pointers."""

    run: Callable[..., None]
    function: object
    packed: object


class Event(Protocol):
    """A point in the work of a stream."""

    def record(self) -> None:
        """Stand behind all that was given to the current stream so far."""

    def wait(self) -> None:
        """Hold the host until that is done; at once if the event was never recorded."""

    def hold(self) -> None:
        """Hold what is given to the current stream from now on until that is done; not if the
        event was never recorded."""


class Waited(Protocol):
    """Something that is under way."""

    def wait(self) -> None: ...


class Clock(Protocol):
    """Times between marks on the current stream."""

    def mark(self) -> None: ...

    def seconds(self) -> list[float]:
        """The time from each mark to the next; waits for the last."""


class Device(Protocol):
    """A GPU, as far as launches need it. Tensors of its memory stand for their addresses."""

    name: str
    number: int  # of the device, as `here` says it

    def properties(self) -> Properties: ...

    def here(self) -> int:
        """The number of the device that the calling thread launches on."""

    def entered(self) -> AbstractContextManager:
        """The calling thread launches, and Triton compiles, for this device."""

    def current_stream(self) -> int:
        """The handle of the current stream."""

    def capturing(self) -> bool:
        """Whether the current stream records a graph instead of running."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Bytes of the device, aligned to 128, which go back in the order of the stream."""

    def empty_strided(
        self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype
    ) -> torch.Tensor:
        """A new tensor on the device."""

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Bytes of the host that the device can reach by itself."""

    def upload(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy pinned bytes to as many of the device, in the order of the stream: the host may not
        change them before an event behind the copy has passed."""

    def download(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy a tensor of the device to a pinned one like it: the host may not read it before an
        event behind the copy has passed."""

    def duplicate(self, target: torch.Tensor, address: int) -> None:
        """Copy bytes of the device that lie at an address to as many others, in the order of the
        stream."""

    def communicate(
        self,
        what: str,
        begin: Callable[[Space], Waited],
        reads: Sequence[Memory],
        result: Memory,
    ) -> Waited:
        """Begin a collective of torch.distributed on memory of the device, behind what was given to
        the current stream. `wait()` of what is returned holds the then current stream, not the
        host, until it is over."""

    def event(self) -> Event: ...

    def aside(self) -> AbstractContextManager:
        """Another stream is the current one: behind all that was given to the present one, which
        in turn waits for it at the end."""

    def beside(self) -> AbstractContextManager:
        """Another stream is the current one, in no order with the present one but by events."""

    def graph_of(self, give: Callable[[], None]) -> Callable[[], None]:
        """Capture what a function gives to the current stream, which is not the default one. What
        is returned gives all of it to the stream that is the current one then."""

    def clock(self) -> Clock: ...

    def load(self, launch: LoadedLaunch, pointers: Sequence[DevicePointer]) -> LoadedKernel:
        """Compile a launch's kernel for pointers aligned like these, and bring it to the device."""
