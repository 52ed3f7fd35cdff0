"""Batches ahead of time: a thread fetches the next ones while the step runs, and copies to a GPU
overlap with its work.

    loader → thread: next(), staged in pinned memory → copies on a stream of their own → batches

Copies are given by the thread that takes the batches, when it takes one: that of the next batch is
under way while the step works on this one. Each copy waits for what was given before to the stream
that the batch is used on, whose memory it gets; that stream waits for the copy. Staging memory is
filled again only when the copy from it is known to be over.
"""

from __future__ import annotations

import copy
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from tracejit.records import dataclass
from tracejit.runtime.select import gpu

if TYPE_CHECKING:
    from tracejit.runtime.device import Device, Event

_ALIGNED = 128  # bytes, of each tensor in staging memory
_PATIENCE = 10.0  # seconds that an early exit waits for the loader


def prefetch(
    loader: Iterable, device: str | torch.device | None = None, *, depth: int = 2
) -> Prefetch:
    """The batches of a loader, on a device, fetched ahead of the step.

    loader: anything to iterate over, as often as it can be. Its batches are tensors in dicts, lists
        and tuples; what else is in them stays as it is.
    device: "cuda", "cuda:1", "cpu"; by default the GPU, if there is one. On the CPU nothing is
        copied; the loader's own work, such as collating, overlaps with the step. `str()` says so.
    depth:  how many batches are ahead of the one that is used.

    A loader's exception is raised where its batch would be, after those before it. Leaving the loop
    early stops the thread. Raises ValueError for a depth below 1, BackendUnavailable where the GPU
    cannot be used, and TypeError for a tensor that is sparse or has a history of its own.

    The loader runs in a thread. If it draws from torch's default generator for each batch, as
    random transforms do without worker processes, these draws come between those of the step at
    other places than without prefetching; give it a generator of its own.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if depth < 1:
        raise ValueError(f"depth is at least 1, not {depth}")
    name = str(device)
    return Prefetch(loader, None if name == "cpu" else gpu(name), name, depth)


class Prefetch:
    """What `prefetch` returns. Each iteration over it is one over the loader."""

    def __init__(self, loader: Iterable, device: Device | None, name: str, depth: int):
        self._loader, self._device, self._name, self.depth = loader, device, name, depth

    def __len__(self) -> int:
        return len(self._loader)

    def __str__(self) -> str:
        ahead = f"{self.depth} batch{'es' * (self.depth > 1)} ahead"
        if self._device is None:
            return f"prefetch on the CPU: the loader runs in a thread, {ahead}; nothing is copied"
        return (
            f"prefetch to {self._name}: the loader runs in a thread, {ahead}; copies from pinned "
            "memory on a stream of their own"
        )

    def __iter__(self) -> Iterator:
        source = iter(self._loader)  # in the caller's thread, as without prefetching
        if self._device is None:
            return _fetched(source, self.depth)
        return _copied(source, self._device, self.depth)


# ---- the thread


@dataclass(frozen=True)
class _Failed:
    error: BaseException


_END = object()


class _Worker:
    """A thread that fetches batches, at most `depth` that were not taken, and prepares them."""

    def __init__(self, source: Iterator, depth: int, prepare: Callable[[object], object]):
        self._source, self._prepare = source, prepare
        self._room, self._ready = threading.Semaphore(depth), queue.SimpleQueue()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="tracejit prefetch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            self._room.acquire()
            if self._stopped:
                return
            try:
                found = self._prepare(next(self._source))
            except StopIteration:
                found = _END
            except BaseException as error:  # raised where the batch would be
                found = _Failed(error)
            self._ready.put(found)
            if found is _END or isinstance(found, _Failed):
                return

    def take(self, *, wait: bool) -> object:
        """The next batch, `_END`, or an exception; None if there is none yet and nobody waits."""
        try:
            return self._ready.get(block=wait)
        except queue.Empty:
            return None

    def taken(self) -> None:
        """There is room for another batch."""
        self._room.release()

    def stop(self) -> None:
        """Fetch nothing more, and let go of the loader."""
        self._stopped = True
        self._room.release()
        self._thread.join(_PATIENCE)
        self._source = None


def _fetched(source: Iterator, depth: int) -> Iterator:
    """The batches as they are."""
    worker = _Worker(source, depth, lambda batch: (batch,))
    try:
        while (found := worker.take(wait=True)) is not _END:
            if isinstance(found, _Failed):
                raise found.error
            worker.taken()
            yield found[0]
            del found
    finally:
        worker.stop()


# ---- copies to a GPU


@dataclass(frozen=True)
class _Leaf:
    """Stands for the k-th tensor of a batch."""

    index: int


@dataclass(frozen=True)
class _Staged:
    """A batch in pinned memory: its structure, its tensors there, and the memory."""

    structure: object
    tensors: Sequence[torch.Tensor]
    memory: torch.Tensor | None


@dataclass(frozen=True)
class _Flight:
    """A batch that is being copied, and the event behind the copies."""

    batch: object
    staged: _Staged
    event: Event


class _Staging:
    """Pinned memory, used again when it is given back."""

    def __init__(self, device: Device):
        self._device, self._lock = device, threading.Lock()
        self._free: list[torch.Tensor] = []

    def take(self, nbytes: int) -> torch.Tensor:
        """The smallest that is free and large enough, or new memory."""
        with self._lock:
            fitting = [m for m in self._free if m.nbytes >= nbytes]
            if fitting:
                memory = min(fitting, key=lambda m: m.nbytes)
                self._free = [m for m in self._free if m is not memory]
                return memory
            self._free.clear()  # all are too small
        return self._device.pinned(nbytes)

    def give(self, memory: torch.Tensor | None) -> None:
        if memory is not None:
            with self._lock:
                self._free.append(memory)

    def stage(self, batch: object) -> _Staged:
        """Copy the tensors of a batch into pinned memory, laid out as they are."""
        tensors: list[torch.Tensor] = []
        structure = _mapped(batch, lambda x: _leaf(x, tensors))
        starts, total = [], 0
        for x in tensors:
            starts.append(total)
            total += -(-x.nbytes // _ALIGNED) * _ALIGNED
        memory = self.take(total) if total else None
        staged = []
        for x, start in zip(tensors, starts, strict=True):
            strides = torch.empty_like(x, device="meta").stride()  # without gaps and overlaps
            into = torch.empty_strided(x.shape, strides, dtype=x.dtype, device="meta")
            if x.nbytes:
                raw = memory[start : start + x.nbytes].view(x.dtype)
                into = raw.as_strided(x.shape, strides)
                into.copy_(x)
            staged.append(into)
        return _Staged(structure, staged, memory)


def _leaf(x: torch.Tensor, into: list[torch.Tensor]) -> object:
    """A tensor of the CPU's is to be copied; others stay."""
    if x.device.type != "cpu":
        return x
    if x.layout is not torch.strided:
        raise TypeError(
            f"a batch has a tensor of shape {list(x.shape)} that is sparse ({x.layout}); make it "
            "dense in the loader"
        )
    if x.requires_grad:
        raise TypeError(
            f"a batch has a tensor of shape {list(x.shape)} that requires grad, and a copy of it "
            "would have no history; detach() it in the loader"
        )
    into.append(x)
    return _Leaf(len(into) - 1)


def _copied(source: Iterator, device: Device, depth: int) -> Iterator:
    """The batches on a GPU."""
    staging = _Staging(device)
    worker = _Worker(source, depth, staging.stage)
    flights: deque[_Flight] = deque()
    used: deque[_Flight] = deque()  # handed out; their staging memory may still be read
    last = None  # what came after the last batch
    try:
        while True:
            while last is None and len(flights) < depth:
                found = worker.take(wait=not flights)
                if found is None:
                    break
                if isinstance(found, _Staged):
                    flights.append(_fly(found, device))
                else:
                    last = found
            if not flights:
                if isinstance(last, _Failed):
                    raise last.error
                return
            flight = flights.popleft()
            flight.event.hold()
            while len(used) >= depth:
                _land(used.popleft(), staging)
            worker.taken()
            used.append(_Flight(None, flight.staged, flight.event))
            batch = flight.batch
            del flight
            yield batch
            del batch
    finally:
        worker.stop()
        for flight in flights:
            flight.event.hold()  # its memory goes back to the stream in use
        for flight in (*used, *flights):
            _land(flight, staging)


def _fly(staged: _Staged, device: Device) -> _Flight:
    """Give the copies of a batch to the stream beside."""
    targets = [
        device.empty_strided(x.shape, x.stride(), x.dtype) for x in staged.tensors
    ]  # of the stream in use: what was there before may still be read
    before, event = device.event(), device.event()
    before.record()
    with device.beside():
        before.hold()
        for target, x in zip(targets, staged.tensors, strict=True):
            if x.nbytes:
                device.upload(target, x)
        event.record()
    batch = _mapped(staged.structure, lambda x: x, lambda leaf: targets[leaf.index])
    return _Flight(batch, staged, event)


def _land(flight: _Flight, staging: _Staging) -> None:
    """The staging memory of a batch is free once its copies are over."""
    flight.event.wait()
    staging.give(flight.staged.memory)


def _mapped(
    x: object,
    tensor: Callable[[torch.Tensor], object],
    leaf: Callable[[_Leaf], object] | None = None,
) -> object:
    """The same structure of dicts, lists and tuples with other tensors in it."""

    def again(item: object) -> object:
        return _mapped(item, tensor, leaf)

    if isinstance(x, torch.Tensor):
        return tensor(x)
    if isinstance(x, _Leaf) and leaf is not None:
        return leaf(x)
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*map(again, x))
    if type(x) in (list, tuple):
        return type(x)(map(again, x))
    if isinstance(x, Mapping):
        made = {} if type(x) is dict else copy.copy(x)
        for key, item in x.items():
            made[key] = again(item)
        return made
    return x
