"""A plan as one CUDA graph: what would be many launches is given to the stream at once.

A graph launches with the arguments of its capture. So what moves between calls (outputs, arguments,
parameters that were replaced) its kernels find through a table of addresses in device memory, which
also holds the scalars: one copy refreshes it, if anything in it has changed. What stays is an
argument, as in plain launches. A graph works in counters and a table of its own.

A plan with collectives is a graph for each stretch of kernels between them. A collective itself is
not captured: NCCL allows it, if all ranks do it in the same calls, and graphs are each rank's own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import pairwise

import torch

from tracejit.errors import OF_RANKS, LaunchError
from tracejit.ir.process_groups import silent
from tracejit.records import dataclass
from tracejit.runtime.device import Device
from tracejit.runtime.launches import (
    COPY,
    GRAPH,
    Calls,
    Failed,
    Launches,
    StreamState,
    Table,
    picking,
)
from tracejit.runtime.ring import Ring

CALLS = 3  # plain calls before a capture, which show what moves
MAX_CAPTURES = 3  # of one plan on one stream; in the last one, all is found through the table

Give = Callable[[StreamState, "bytes | None", tuple[int, ...]], None]


@dataclass(frozen=True)
class Maker:
    """What graphs of a plan are made of.

    launches: of the plan, with kernels that find some of its bases through the table.
    memory:   for counters and partials, at 0, and a table of so many bytes.
    scalars:  the bytes of scalars in the table.
    written:  per base that is overwritten in place, its bytes.
    fresh:    the bases that are new in each call.
    inputs:   those of inputs.
    halves:   the launches that are halves of collectives, which no graph has.
    refused:  told why there is no graph; raises where there must be one.
    """

    device: Device
    launches: Callable[[frozenset[int]], Launches]
    memory: Callable[[int], tuple[torch.Tensor | None, torch.Tensor | None]]
    scalars: int
    written: Mapping[int, int]
    fresh: frozenset[int]
    inputs: frozenset[int]
    halves: frozenset[int]
    failed: Failed
    refused: Callable[[Exception], None]

    def likely(self) -> set[frozenset[int]]:
        """Which bases will have moved when a graph is made: of inputs none; or those that are not
        overwritten, such as a batch, which is another one each time."""
        return {self.fresh, self.fresh.union(self.inputs).difference(self.written)}


class Replays:
    """Decides when the launches of a plan on one stream become a graph, and when they do not."""

    __slots__ = ("graph", "_maker", "_moved", "_last", "_waits", "_captures")

    def __init__(self, maker: Maker):
        self.graph: Graph | None = None
        self._maker = maker
        self._moved = set(maker.fresh)  # bases that were elsewhere in another call
        self._last: tuple[int, ...] | None = None
        self._waits, self._captures = CALLS, 0

    def __call__(self, words: bytes | None, bases: tuple[int, ...]) -> Give | None:
        """What takes the place of the launches of a call, which has changed nothing yet."""
        graph = self.graph
        if graph is not None:
            if bases is graph.bases or graph.fits(bases):
                return graph
            self._note(graph.first, bases)
            self.graph, self._last, self._waits = None, bases, CALLS
            return None
        if self._captures == MAX_CAPTURES:
            return None
        if self._last is not None:
            self._note(self._last, bases)
        self._last = bases
        self._waits -= 1
        if self._waits >= 0:
            return None
        self._captures += 1
        if self._captures == MAX_CAPTURES:
            self._moved.update(range(len(bases)))
        try:
            self.graph = Graph(self._maker, frozenset(self._moved), words, bases)
        except Exception as error:
            self._captures = MAX_CAPTURES
            self._maker.refused(error)
        return self.graph

    def _note(self, before: tuple[int, ...], now: tuple[int, ...]) -> None:
        if before is not now:
            self._moved.update([i for i, x in enumerate(before) if x != now[i]])


class Graph:
    """A captured plan: `graph(state, words, bases)` takes the place of its launches.

    The kernels run once while it is made, on another stream, so that all that a first launch does
    is done: on copies of what they overwrite, so that no update happens twice. Nothing is
    communicated then.
    """

    __slots__ = ("first", "_launches", "_state", "_failed", "_fixed", "_places")
    __slots__ += ("_table", "_calls", "_steps")

    def __init__(
        self, maker: Maker, moved: frozenset[int], words: bytes | None, bases: tuple[int, ...]
    ):
        device = maker.device
        self._failed, self.first = maker.failed, bases
        self._launches = launches = maker.launches(moved)
        self._fixed = picking([i for i in range(len(bases)) if i not in moved])
        self._places = self._fixed(bases)
        self._table = Table(launches.indirect)
        nbytes = 8 * len(launches.indirect) + maker.scalars
        memory = maker.memory(nbytes)
        ring = Ring(device, nbytes) if nbytes else None
        scratch = {i: _like(device, bases[i], n) for i, n in maker.written.items()}
        warm = [scratch[i].data_ptr() if i in scratch else x for i, x in enumerate(bases)]
        with device.aside():
            for i, copy in scratch.items():
                device.duplicate(copy, bases[i])
            state = StreamState(device.current_stream(), memory, ring and ring.upload)
            self._calls = calls = Calls(launches, state, maker.failed)
            with silent() if maker.halves else nullcontext():
                calls(state, self._table(words, tuple(warm)), tuple(warm))
            self._steps: list[tuple[int, int] | Callable[[], None]] = []
            if not maker.halves:
                self._steps.append(device.graph_of(lambda: calls(state, state.words, bases)))
            for first, last, of_kernels in stretches(len(launches.runs), maker.halves):
                if of_kernels:
                    self._steps.append(device.graph_of(partial(calls.some, first, last, bases)))
                else:
                    self._steps.append((first, last))
        self._state = state

    @property
    def bases(self) -> tuple[int, ...] | None:
        """Those of the last call."""
        return self._table.bases

    def fits(self, bases: tuple[int, ...]) -> bool:
        """Whether all that does not move is where it was."""
        return self._fixed(bases) == self._places

    def __call__(self, state: StreamState, words: bytes | None, bases: tuple[int, ...]) -> None:
        n, own = COPY, self._state
        try:
            given = self._table(words, bases)
            if given != own.words:
                own.upload(given)
            n = GRAPH
            for step in self._steps:
                if type(step) is tuple:
                    self._calls.some(*step, bases)
                else:
                    step()
        except (LaunchError, *OF_RANKS):
            raise  # it has its name
        except Exception as error:
            raise self._failed()(n, error) from error


def stretches(count: int, halves: Collection[int]) -> list[tuple[int, int, bool]]:
    """The launches of a plan with collectives in stretches, from one to another: of kernels, or of
    halves of collectives. None where there are no halves."""
    if not halves:
        return []
    cuts = [n for n in range(1, count) if (n in halves) != (n - 1 in halves)]
    return [(a, b, a not in halves) for a, b in pairwise([0, *cuts, count])]


def _like(device: Device, address: int, nbytes: int) -> torch.Tensor:
    """Memory that is aligned to 16 bytes as an address is."""
    return device.allocate(nbytes + address % 16)[address % 16 :]
