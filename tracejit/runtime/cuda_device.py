"""NVIDIA's GPUs behind the seam: torch's CUDA runtime, and Triton's driver for kernels.

Nothing here computes with torch: memory is allocated, copied, and ordered by its streams.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise

import torch

from tracejit.errors import BackendUnavailable
from tracejit.ir.process_groups import Memory, Space, Started
from tracejit.runtime.device import Event, LoadedKernel, Properties
from tracejit.runtime.triton_api import load_kernel, require_compiler
from tracejit.runtime.triton_launch import DevicePointer, LoadedLaunch


@functools.cache
def cuda_device(name: str) -> CudaDevice:
    """The GPU of a name ("cuda:0"); raises BackendUnavailable where it cannot be used."""
    if torch.version.hip is not None:
        raise BackendUnavailable(
            backend="triton",
            reason="this PyTorch is built for AMD's GPUs (ROCm), and the kernels are generated and "
            "checked for NVIDIA's",
            remedy="Run the step on the CPU, or uncompiled",
        )
    if not torch.cuda.is_available():
        raise BackendUnavailable(
            backend="triton",
            reason="there is no CUDA device",
            remedy='Move the tensors to a GPU, or use backend="interpret"',
        )
    require_compiler("triton")
    return CudaDevice(torch.device(name).index or 0)


class CudaDevice:
    """One GPU; see `Device`."""

    def __init__(self, number: int):
        self.name, self.number = f"cuda:{number}", number
        self.here = torch._C._cuda_getDevice
        self.current_stream = functools.partial(torch._C._cuda_getCurrentRawStream, number)
        self._device = torch.device("cuda", number)
        self._aside: torch.cuda.Stream | None = None
        self._beside: torch.cuda.Stream | None = None

    @functools.cache  # noqa: B019  there is one device of a number, which lasts
    def properties(self) -> Properties:
        """What the runtime says of the GPU."""
        found = torch.cuda.get_device_properties(self.number)
        return Properties(
            found.name,
            10 * found.major + found.minor,
            found.multi_processor_count,
            found.shared_memory_per_block_optin,
        )

    def entered(self) -> AbstractContextManager:
        """Make this the current device, which Triton compiles for."""
        return torch.cuda.device(self.number)

    def capturing(self) -> bool:
        """Whether torch captures a graph on the current stream."""
        if self.here() == self.number:
            return torch._C._cuda_isCurrentStreamCapturing()
        with self.entered():
            return torch._C._cuda_isCurrentStreamCapturing()

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Bytes from torch's caching allocator, which is ordered by the current stream."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def empty_strided(
        self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype
    ) -> torch.Tensor:
        """A tensor from the same allocator."""
        return torch.empty_strided(shape, strides, dtype=dtype, device=self._device)

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Page-locked memory."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def upload(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """An asynchronous copy on the current stream."""
        target.copy_(source, non_blocking=True)

    download = upload

    def duplicate(self, target: torch.Tensor, address: int) -> None:
        """An asynchronous copy on the current stream."""
        target.copy_(self._bytes((address, len(target))))

    def _bytes(self, memory: Memory) -> torch.Tensor:
        return torch.as_tensor(_Bytes(*memory), device=self._device)

    def communicate(
        self, what: str, begin: Callable[[Space], Started], reads: object, result: object
    ) -> Started:
        """The engine itself puts it on a stream of its own, behind the current one, which its
        `wait` lets wait."""
        with self.entered():
            return begin(_Memory(self))

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """A stream of our own, between two events."""
        if self._aside is None:
            self._aside = torch.cuda.Stream(self._device)
        before = torch.cuda.current_stream(self._device)
        self._aside.wait_stream(before)
        try:
            with torch.cuda.stream(self._aside):
                yield
        finally:
            before.wait_stream(self._aside)

    def beside(self) -> AbstractContextManager:
        """A stream of our own."""
        if self._beside is None:
            self._beside = torch.cuda.Stream(self._device)
        return torch.cuda.stream(self._beside)

    def graph_of(self, give: Callable[[], None]) -> Callable[[], None]:
        """A graph of torch's with a pool of its own. Other threads may go on meanwhile: a pinned
        allocation of a data loader's would end a capture that is global."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            give()
        except BaseException:
            with contextlib.suppress(Exception):  # the first one tells more
                graph.capture_end()
            raise
        graph.capture_end()
        return graph.replay

    def event(self) -> Event:
        """An event without timing."""
        return _Event(self._device)

    def clock(self) -> _Clock:
        """A clock of events."""
        return _Clock(self._device)

    def load(self, launch: LoadedLaunch, pointers: Sequence[DevicePointer]) -> LoadedKernel:
        """Compile for this GPU, and load."""
        with self.entered():
            return load_kernel(launch, pointers)


class _Bytes:
    """Memory of the device at an address, for torch, which does not own it."""

    def __init__(self, address: int, nbytes: int):
        self.__cuda_array_interface__ = {
            **{"shape": (nbytes,), "typestr": "|u1", "data": (address, False)},
            **{"strides": None, "version": 3},
        }


class _Memory:
    """The memory of a GPU, for collectives."""

    def __init__(self, device: CudaDevice):
        self._device = device
        number = device.number
        self.of_barrier = {"device_ids": [number], "device": torch.device("cuda", number)}

    def tensor(self, memory: Memory, dtype: torch.dtype) -> torch.Tensor:
        if not memory[1]:
            return torch.empty(0, dtype=dtype, device=self._device.name)
        return self._device._bytes(memory).view(dtype)

    def copy(self, to: int, memory: Memory) -> None:
        self._device._bytes((to, memory[1])).copy_(self._device._bytes(memory))


class _Event:
    """An event that stands on the current stream of its device."""

    __slots__ = ("_device", "_event", "_recorded")

    def __init__(self, device: torch.device):
        self._device, self._event, self._recorded = device, torch.cuda.Event(), False

    def record(self) -> None:
        self._event.record(torch.cuda.current_stream(self._device))
        self._recorded = True

    def wait(self) -> None:
        if self._recorded:
            self._event.synchronize()

    def hold(self) -> None:
        if self._recorded:
            torch.cuda.current_stream(self._device).wait_event(self._event)


class _Clock:
    """Events with times, in a row."""

    def __init__(self, device: torch.device):
        self._device = device
        self._marks: list[torch.cuda.Event] = []

    def mark(self) -> None:
        self._marks.append(torch.cuda.Event(enable_timing=True))
        self._marks[-1].record(torch.cuda.current_stream(self._device))

    def seconds(self) -> list[float]:
        self._marks[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(self._marks)]
