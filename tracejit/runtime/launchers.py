"""Which launcher a call takes: by how its buffers are aligned, and by what a stream has seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol
from weakref import WeakMethod

import torch

from tracejit.runtime import waiting
from tracejit.runtime.device import Device
from tracejit.runtime.graphs import Give, Maker, Replays
from tracejit.runtime.launches import Calls, Launches, Place, StreamState, Table
from tracejit.runtime.many_steps import Many

MAX_LAUNCHERS = 32  # whose arguments and graphs are kept for a stream
ALIGNED = 16  # bytes: how well Triton wants to know where a pointer points

OF_GRAPHS: list[torch.Tensor | None] = []  # what graphs of callers copy, as long as they run


class OfPlan(Protocol):
    """What makes the launchers of a plan: see `LaunchedPlan`."""

    device: Device

    def launches(self, places: Sequence[Place], residues: Sequence[int]) -> Launches: ...

    def maker(self, places: Sequence[Place], residues: Sequence[int]) -> Maker | None: ...

    def many(self, places: Sequence[Place], residues: Sequence[int], calls: int) -> Many | None: ...

    def failed(self, number: int, error: Exception) -> Exception: ...


class Launcher:
    """`launcher(state, words, bases)` gives what runs a plan on the stream of `state`: its launches
    one by one, or a graph of them. It compiles what is missing, and writes nothing."""

    def __init__(
        self,
        launches: Launches,
        maker: Maker | None,
        failed: WeakMethod,  # of the plan, whose streams hold launchers
        mark: Callable[[], None] | None,
        many: Callable[[int], Many | None],
    ):
        self.launched, self._maker, self._failed, self._mark = launches, maker, failed, mark
        self._many, self._of_many = many, {}

    def __call__(self, state: StreamState, words: bytes | None, bases: tuple[int, ...]) -> Give:
        calls, replays = self._of_stream(state)
        if waiting.active and (others := waiting.here()) is not None:
            if state.kept and self._mark is None:
                if others.calls not in self._of_many:
                    self._of_many = {others.calls: self._many(others.calls)}
                many = self._of_many[others.calls]
                if many is not None:
                    many.prepare(state)
                    return partial(others.put, many, calls)
            others.launch()
        return calls if replays is None else replays(words, bases) or calls

    def _of_stream(self, state: StreamState) -> tuple[Calls, Replays | None]:
        found = state.calls.get(self)
        if found is None:
            launched = self.launched
            table = Table(launched.indirect) if launched.indirect else None
            calls = Calls(launched, state, self._failed, self._mark, table)
            if not state.kept:
                OF_GRAPHS.append(launched.constant)
            graphed = state.kept and self._maker is not None
            found = state.calls[self] = calls, Replays(self._maker) if graphed else None
            if len(state.calls) > MAX_LAUNCHERS:  # of functions that were generated anew
                del state.calls[next(iter(state.calls))]
        return found


class Fitting:
    """Gives the launcher of a plan, with buffers at some places, for the bases that a call is given
    (the first ones): there is one for each way in which they are aligned. The plan's own are."""

    def __init__(
        self,
        plan: OfPlan,
        places: Sequence[Place],
        mark: Callable[[], None] | None = None,
    ):
        self._plan, self._places, self._mark = plan, places, mark
        self._count = 1 + max((base for base, _ in places), default=-1)
        self._known: dict[tuple[int, ...], Launcher] = {}
        self._last: tuple[tuple[int, ...] | None, Launcher | None] = (None, None)

    def __call__(self, near: tuple[int, ...]) -> Launcher:
        last = self._last
        if near is last[0]:
            return last[1]
        residues = tuple([base % ALIGNED for base in near])
        found = self._known.get(residues)
        if found is None:
            found = self._known[residues] = self._made(residues)
        self._last = near, found
        return found

    def _made(self, residues: tuple[int, ...]) -> Launcher:
        plan = self._plan
        whole = residues + (0,) * (self._count - len(residues))
        launches = plan.launches(self._places, whole)
        maker = plan.maker(self._places, whole) if self._mark is None else None
        if maker is not None and getattr(plan.device, "ahead", False):
            for moved in maker.likely():
                maker.launches(moved)
        many = partial(weakly(plan.many), self._places, whole)
        return Launcher(launches, maker, WeakMethod(plan.failed), self._mark, many)


def weakly(method: Callable) -> Callable:
    """A method that does not hold its plan, whose streams hold it."""
    found = WeakMethod(method)
    return lambda *given: found()(*given)
