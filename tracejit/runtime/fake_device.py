"""A GPU that is none, for tests: tensors of the CPU stand for its memory, and what is wrong in the
order of launches, copies and events is a `Fault`.

Triton's own specialization and ptxas are real. Each launch is run at its addresses by the numpy
executor, at once; a clock per stream tells whether that order was certain. Memory that the path
allocates comes from pools of streams, as torch's caching allocator has them, and is NaN at first. A
copy to the host arrives when the host waits for it; a copy from the host must find the same bytes
there until it is known to be over. While a graph is captured nothing runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from tracejit.ir.process_groups import HOST as HOST_MEMORY
from tracejit.ir.process_groups import Memory, Space
from tracejit.records import dataclass
from tracejit.runtime.device import LoadedKernel, Properties, Waited
from tracejit.runtime.fake_clock import HOST, Clocks, Fault, Times
from tracejit.runtime.fake_launch import FakeLaunch, fake_driver
from tracejit.runtime.triton_api import active, load_kernel, require_compiler
from tracejit.runtime.triton_launch import DevicePointer, LoadedLaunch

_SHARED = {80: 166912, 90: 232448, 100: 232448}  # bytes that a program may use
_ALIGNED = 128
_UNSET = 0xFF  # every byte of memory that nothing was written to: NaN
_FIRST_NUMBER = 1000  # of fake devices, for what Triton remembers of devices

Work = Callable[[int], None]  # does something on the stream of that handle


@dataclass(eq=False)
class Graph:
    """What was captured on a stream: work in order, with what the log says of it."""

    stream: int = 0
    work: list[tuple[str, Work]] = field(default_factory=list)


@dataclass
class _Block:
    """Memory in use: where, how much, of which pool, and streams that said they use it too."""

    address: int
    nbytes: int
    pool: object
    memory: np.ndarray
    used_on: set[int] = field(default_factory=set)


class FakeDevice:
    """One fake GPU; see `Device`. `log` tells what was given to its streams.

    target:   "sm_90", what kernels are compiled for.
    compiled: whether they are compiled at all; else their launches are only checked and run.
    """

    def __init__(self, target: str = "sm_90", *, compiled: bool = True):
        self.arch = int(target.removeprefix("sm_"))
        self.name, self.number, self.compiled = (
            f"fake:{target}",
            _FIRST_NUMBER + self.arch,
            compiled,
        )
        self.log: list[str] = []
        self.clocks = Clocks()
        self.device = self.number  # that is current
        self._stream, self._streams = 0, 1
        self._graph: Graph | None = None
        self._aside: int | None = None
        self._beside: int | None = None
        self._engine: int | None = None  # the stream of collectives
        self._blocks: dict[int, _Block] = {}
        self._free: dict[tuple, list[np.ndarray]] = {}
        self._parked: list[
            tuple[Times, tuple, np.ndarray]
        ] = []  # until streams are known to be done
        self._pinned: dict[int, torch.Tensor] = {}
        self._sources: list[tuple[int, int, int, bytes]] = []  # stream, time, address, bytes
        self._arriving: list[tuple[int, int, torch.Tensor, torch.Tensor]] = []

    # ---- the seam

    def properties(self) -> Properties:
        """Those of an H200."""
        return Properties(self.name, self.arch, 132, _SHARED[self.arch])

    def here(self) -> int:
        """The device that is current; `elsewhere` sets another."""
        return self.device

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """This device is current, for Triton too."""
        before, self.device = self.device, self.number
        try:
            yield
        finally:
            self.device = before

    def current_stream(self) -> int:
        """0, or what `on` has set."""
        return self._stream

    def capturing(self) -> bool:
        """Within `capture`."""
        return self._graph is not None

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Bytes from the pool of the stream, or of the graph that is captured."""
        if self._graph is not None and self._graph.stream != self._stream:
            raise Fault("an allocation outside the pool of the graph that is captured")
        pool = self._stream if self._graph is None else self._graph
        self._unpark()
        free = self._free.get((pool, nbytes))
        memory = free.pop() if free else np.empty(nbytes + _ALIGNED, np.uint8)
        start = -memory.ctypes.data % _ALIGNED
        whole = memory[start : start + nbytes]
        whole[:] = _UNSET
        block = _Block(whole.ctypes.data, nbytes, pool, memory)
        if nbytes:
            self._blocks[block.address] = block
            weakref.finalize(whole, self._freed, block).atexit = False
        return torch.from_numpy(whole)

    def empty_strided(
        self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype
    ) -> torch.Tensor:
        """A tensor of the same memory."""
        if 0 in shape:
            return torch.empty_strided(shape, strides, dtype=dtype)
        count = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        bytes_of = self.allocate(count * dtype.itemsize)
        return bytes_of.view(dtype).as_strided(tuple(shape), tuple(strides)).data

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Memory of the host that copies may go through."""
        self._not_captured("allocating pinned memory")
        memory = torch.full((nbytes,), _UNSET, dtype=torch.uint8)
        self._pinned[memory.data_ptr()] = memory
        return memory

    def upload(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """The bytes must be the same until the copy is known to be over."""
        nbytes, start, address = source.nbytes, source.data_ptr(), target.data_ptr()
        pageable = not self._is_pinned(source)
        if pageable:
            self._not_captured("a pageable copy")

        def work(stream: int) -> None:
            self.clocks.writes(stream, address, nbytes, "the copy")
            ctypes.memmove(address, start, nbytes)
            now = self.clocks.times(stream)[stream]
            if not pageable:
                self._sources.append((stream, now, start, ctypes.string_at(start, nbytes)))

        kind = "pageable, which waits" if pageable else "pinned"
        self._give(f"copy {nbytes} bytes to the device ({kind})", work)
        if pageable:
            self._host_learns(self.clocks.times(self._stream))

    def download(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """The bytes arrive when the host waits."""
        if not self._is_pinned(target):
            raise Fault("a copy to memory of the host that is not pinned")

        def work(stream: int) -> None:
            self.clocks.reads(stream, source.data_ptr(), source.nbytes, "the copy to the host")
            now = self.clocks.times(stream)[stream]
            self._arriving.append((stream, now, target, source.clone()))
            ctypes.memset(target.data_ptr(), _UNSET, target.nbytes)

        self._give(f"copy {source.nbytes} bytes to the host", work)

    def duplicate(self, target: torch.Tensor, address: int) -> None:
        """A copy within the device."""
        nbytes, start = target.nbytes, target.data_ptr()

        def work(stream: int) -> None:
            self.clocks.reads(stream, address, nbytes, "the copy")
            self.clocks.writes(stream, start, nbytes, "the copy")
            ctypes.memmove(start, address, nbytes)

        self._give(f"copy {nbytes} bytes within the device", work)

    def communicate(
        self,
        what: str,
        begin: Callable[[Space], Waited],
        reads: Sequence[Memory],
        result: Memory,
    ) -> Communicated:
        """On a stream of its own, behind the current one. What the engine does it does at once."""
        self._not_captured("a collective")
        if self._engine is None:
            self._engine = self.stream()
        event = self.event()
        event.record()

        def work(stream: int) -> None:
            for place in reads:
                self.clocks.reads(stream, *place, what)
            self.clocks.writes(stream, *result, what)
            for place in (*reads, result):
                self.check_memory(*place, what)
            begin(HOST_MEMORY).wait()

        with self.on(self._engine), self.entered():
            event.hold()
            self._give(f"{what} of {sum(n for _, n in reads)} bytes", work)
            event.record()
        return Communicated(self, what, event)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """A stream of its own, between two events."""
        self._not_captured("events between streams")
        if self._aside is None:
            self._aside = self.stream()
        event = self.event()
        event.record()
        try:
            with self.on(self._aside), self.entered():  # as torch.cuda.stream does
                event.hold()
                yield
        finally:
            with self.on(self._aside):
                event.record()
            event.hold()

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """A stream of its own."""
        if self._beside is None:
            self._beside = self.stream()
        with self.on(self._beside), self.entered():
            yield

    def graph_of(self, give: Callable[[], None]) -> Callable[[], None]:
        """What is given is captured, not run."""
        if self._stream == 0:
            raise Fault("a capture on the default stream, which cannot be captured")
        self.log.append(f"stream {self._stream}: capture")
        with self.capture() as graph:
            give()
        if not graph.work:
            raise Fault("a graph of nothing")
        return lambda: self.replay(graph)

    def event(self) -> FakeEvent:
        """An event, which has not been recorded."""
        return FakeEvent(self)

    def clock(self) -> _Clock:
        """The host's clock."""
        return _Clock()

    def load(self, launch: LoadedLaunch, pointers: Sequence[DevicePointer]) -> LoadedKernel:
        """Compile for the target, as Triton would on such a device; `run` is checked and run by
        numpy."""
        self._not_captured("loading a kernel")
        name = launch.source.name
        loaded = LoadedKernel(None, name, name)
        if self.compiled:
            require_compiler(self.name)
            with active(fake_driver(self.number, self.arch, _SHARED[self.arch])):
                loaded = load_kernel(launch, pointers)
        aligned = [pointer.address % 16 == 0 for pointer in pointers]
        run = FakeLaunch(self, launch, aligned, loaded.function, loaded.packed)
        return LoadedKernel(run, loaded.function, loaded.packed)

    # ---- what users of a device do

    def stream(self) -> int:
        """A new stream."""
        self._streams += 1
        return self._streams - 1

    @contextlib.contextmanager
    def on(self, stream: int) -> Iterator[None]:
        """The stream is the current one."""
        before, self._stream = self._stream, stream
        try:
            yield
        finally:
            self._stream = before

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Another device is the current one."""
        before, self.device = self.device, self.number + 1
        try:
            yield
        finally:
            self.device = before

    def synchronize(self) -> None:
        """The host waits for all streams."""
        self._not_captured("waiting for the device")
        self.log.append("the host waits for the device")
        for stream in range(self._streams):
            self._host_learns(self.clocks.times(stream))

    def uses(
        self, *tensors: torch.Tensor, writes: bool = False, work: Callable = lambda: None
    ) -> None:
        """An eager function on the current stream, which reads or overwrites tensors."""

        def on_stream(stream: int) -> None:
            act = self.clocks.writes if writes else self.clocks.reads
            for tensor in tensors:
                act(stream, tensor.data_ptr(), tensor.nbytes, "an eager function")
            work()

        self._give(f"an eager function {'writes' if writes else 'reads'}", on_stream)

    def record_stream(self, tensor: torch.Tensor, stream: int) -> None:
        """`Tensor.record_stream`: the memory is used again only after the stream's work so far, as
        of when it becomes free."""
        self._blocks[tensor.untyped_storage().data_ptr()].used_on.add(stream)

    @contextlib.contextmanager
    def capture(self) -> Iterator[Graph]:
        """`torch.cuda.graph` on the current stream: what is given to it is captured, not run."""
        self._not_captured("a capture")
        self._graph = graph = Graph(stream=self._stream)
        try:
            yield graph
        finally:
            self._graph = None

    def replay(self, graph: Graph) -> None:
        """Give all of a graph to the current stream."""
        self._not_captured("replaying a graph")
        self.log.append(f"stream {self._stream}: launch a graph")
        for text, work in graph.work:
            self._give(f"of a graph: {text}", work)

    # ---- order

    def _give(self, text: str, work: Work) -> None:
        """Something is given to the current stream."""
        if self._graph is not None:
            if self._stream != self._graph.stream:
                raise Fault(f"{text} while the graph of another stream is captured")
            self._graph.work.append((text, work))
            return
        stream = self._stream
        self.log.append(f"stream {stream}: {text}")
        self._check_sources()
        self.clocks.learn(stream, self.clocks.times(HOST))
        self.clocks.tick(stream)
        work(stream)

    def give_launch(self, text: str, stream: int, work: Work) -> None:
        """A launch on a stream, which must be the current one of the current device."""
        if self.device != self.number:
            raise Fault(f"{text} while device {self.device} is the current one")
        if stream != self._stream:
            raise Fault(f"{text} on stream {stream} while stream {self._stream} is the current one")
        self._give(text, work)

    def _host_learns(self, times: Mapping[object, int]) -> None:
        """The host has waited: copies to it arrive, those from it are over."""
        self._check_sources()
        self.clocks.learn(HOST, times)
        over = partial(self.clocks.knows, HOST)
        self._sources = [s for s in self._sources if not over(s[0], s[1])]
        for stream, at, target, values in self._arriving:
            if over(stream, at):
                target.copy_(values)
        self._arriving = [a for a in self._arriving if not over(a[0], a[1])]

    def _check_sources(self) -> None:
        for stream, _, address, content in self._sources:
            if ctypes.string_at(address, len(content)) != content:
                raise Fault(
                    f"the host has changed pinned memory at {address:#x} that a copy on stream "
                    f"{stream} may still read: no event was waited for"
                )

    def _not_captured(self, what: str) -> None:
        if self._graph is not None:
            raise Fault(f"{what} while a graph is captured, which ends the capture with an error")

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return any(at <= start and end <= at + x.nbytes for at, x in [*self._pinned.items()])

    # ---- memory

    def _freed(self, block: _Block) -> None:
        """Nobody holds a block any more."""
        del self._blocks[block.address]
        key = block.pool, block.nbytes
        others = {s: self.clocks.times(s) for s in block.used_on if s != block.pool}
        if others:
            needed = {s: times.get(s, 0) for s, times in others.items()}
            self._parked.append((needed, key, block.memory))
        else:
            self._free.setdefault(key, []).append(block.memory)

    def _unpark(self) -> None:
        """Blocks go back to their pools when streams that used them are known to be done."""
        kept = []
        for needed, key, memory in self._parked:
            if all(self.clocks.knows(HOST, s, t) for s, t in needed.items()):
                self._free.setdefault(key, []).append(memory)
            else:
                kept.append((needed, key, memory))
        self._parked = kept

    def check_memory(self, start: int, nbytes: int, what: str) -> None:
        """Memory from a pool is used within one block of it that is in use. What a graph works in
        stays the graph's."""
        starts = sorted(self._blocks)
        i = bisect_right(starts, start) - 1
        if i >= 0:
            block = self._blocks[starts[i]]
            end = block.address + block.nbytes
            if start < end < start + nbytes:
                raise Fault(f"{what} goes {start + nbytes - end} bytes beyond its memory")
        free = [m for (pool, _), x in self._free.items() if type(pool) is int for m in x]
        for memory in (*free, *(m for _, _, m in self._parked)):
            low = memory.ctypes.data
            if low <= start < low + memory.nbytes and nbytes:
                raise Fault(f"{what} uses memory at {start:#x} that was given back")


@dataclass
class Communicated:
    """A collective on the stream of collectives."""

    device: FakeDevice
    what: str
    event: FakeEvent

    def wait(self) -> None:
        """The current stream waits."""
        self.device.log.append(f"stream {self.device.current_stream()}: needs {self.what}")
        self.event.hold()


class FakeEvent:
    """An event of a fake device. It passes when the host waits for it, never by itself."""

    def __init__(self, device: FakeDevice):
        self._device = device
        self._times: Times | None = None

    def record(self) -> None:
        """Stand on the current stream."""
        device = self._device
        device._not_captured("an event for the host")
        device.log.append(f"stream {device.current_stream()}: event")
        self._times = device.clocks.times(device.current_stream())

    def wait(self) -> None:
        """The host waits."""
        self._device._not_captured("waiting for an event")
        if self._times is not None:
            self._device._host_learns(self._times)

    def hold(self) -> None:
        """The current stream waits: `Stream.wait_event`."""
        device = self._device
        device.log.append(f"stream {device.current_stream()}: waits for an event")
        device.clocks.learn(device.current_stream(), self._times or {})


class _Clock:
    """The time between marks on the host, where the work is done."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [b - a for a, b in pairwise(self._marks)]
