"""Cuts: values of tensors that Python reads in the middle of a step.

A trace computes nothing, so a value that Python asks for is computed apart: its cone, the graph of
this value alone, runs on the inputs as they are. Nothing has been written yet, so it has the value
that eager would show. A number goes on as a runtime scalar; a truth value is a
decision on one; what the Python does with any other form of the values is unknown (`opaque`), and
keeps the step in rerun.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

import numpy as np
import torch

from tracejit.capture.trace import location
from tracejit.capture.trace.draws import Sampled
from tracejit.capture.trace.scalars import Path, TracedFloat, pinned
from tracejit.capture.trace.tensor import TO_IR, Handle
from tracejit.capture.trace.trace import Trace
from tracejit.ir import host_memory
from tracejit.ir.graph import Graph, Value
from tracejit.ir.types import Type
from tracejit.passes.cone import cone
from tracejit.records import dataclass


class Stage(Protocol):
    """Computes the value of a cut, and what the rest of the step needs besides: see parts.py."""

    inputs: Sequence[tuple]  # ("cone", k): the k-th input of the cut; or (stage, k): a result
    width: int  # how many results there are by now

    def run(self, inputs: Sequence) -> list[torch.Tensor]:
        """The value, and all that is carried over."""


# ("tensor", outside tensor), ("scalar", k), ("found", k): the k-th tensor that cuts have found, or
# ("draw", k): what the k-th of the trace's draws has drawn
Source = tuple[str, int]


class Search(Protocol):
    """Finds tensors in a value, on its device. How long the first one is depends on what is in the
    value, and is part of the step. Equal searches find the same."""

    remedy: ClassVar[str]  # what to write instead, where that varies

    def __call__(self, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors."""


@dataclass(eq=False, slots=True)
class Cut:
    """A value that is read in the middle of a step, the n-th of a trace: a number, which becomes
    the runtime scalar of path ("cut", n); or one in which a `search` finds `found` tensors, the
    first of length `count`."""

    graph: Graph  # computes the value, its one result
    sources: tuple[Source, ...]  # per param of it
    where: str  # the user's line
    search: Search | None = None
    found: int = 0
    count: int | None = None
    stage: Stage | None = None  # what computes it together with what the rest of the step needs
    drawn: int = 0  # how many draws come before it

    @property
    def value(self) -> Value:
        """The value, as the graph of the step names it too."""
        return self.graph.results[0].value


def number_of(t: Trace, handle: Handle) -> float | bool:
    """The number in a tensor of one element: a runtime scalar, or a plain bool."""
    value = t.read(handle)
    known = _known(t, value)
    if handle.dtype.kind == "b":
        return known != 0.0  # a decision
    return pinned(known) if t.scalars.pins_integers and handle.dtype.kind != "f" else known


def is_true(t: Trace, value: Value) -> bool:
    """Whether a value of one bool is true in this call: a decision."""
    return _known(t, value) != 0.0


def _known(t: Trace, value: Value) -> float:
    if value not in t.read_numbers:
        t.read_numbers[value] = _number(t, value)
    return t.read_numbers[value]


def _number(t: Trace, value: Value) -> float:
    cut = _cut(t, value)
    number = t.journal.known_number()
    if number is None:
        found = _run(t, cut)
        with torch._C.DisableTorchFunction():
            number = host_memory.read(found)
    t.cuts.append(cut)
    path: Path = ("cut", len(t.cuts) - 1)
    return t.scalar(number, path)


def values_of(t: Trace, handle: Handle, how: str, convert: Callable[[torch.Tensor], object]):
    """What `convert` makes of a real tensor with the values of a tensor; `how` says what is asked
    for. Python may do anything with it, so the step is not replayed."""
    cut = _cut(t, t.read(handle))
    t.scalars.taken(f"it reads {how} at {cut.where}; return the tensor and do that outside")
    return t.journal.found_values(cut, convert, convert(_run(t, cut)))


def plain_number_of(t: Trace, handle: Handle) -> float:
    """The number in a tensor of one element, as a plain float."""
    number = number_of(t, handle)
    if type(number) is TracedFloat:
        return t.journal.found_plain(number.value, float(number))
    return float(number)


@dataclass(frozen=True, slots=True)
class Selected:
    """The elements that a condition selects, in row-major order: the position of each, i64[count];
    and of all elements which one of these they are, or -1, i64[numel]."""

    positions: Value
    ranks: Value


def selected_by(t: Trace, condition: Value) -> Selected:
    """The elements that a condition, a b1 value, selects in this call. How many is part of the
    step: another number leads to another plan."""
    selected = Selected(*searched(t, condition, Elements()))
    t.ranges[selected.positions] = 0, max(condition.type.numel - 1, 0)
    return selected


def searched(t: Trace, value: Value, search: Search) -> tuple[Value, ...]:
    """What a search finds in a value, in this call: inputs of the graph."""
    draws = isinstance(search, Sampled)
    known = None if draws else t.searched.get((value, search))
    if known is not None:
        return known
    cut = _cut(t, value)
    found = t.draws.do(search, [_run(t, cut)]) if draws else search(_run(t, cut))
    cut.search, cut.found, cut.count = search, len(found), len(found[0])
    t.cuts.append(cut)
    params = []
    for tensor in found:
        params.append(t.b.param(Type(TO_IR[tensor.dtype], tuple(tensor.shape), value.type.device)))
        t.found.append((params[-1], tensor))
    t.journal.found_tensors(cut)
    if not draws:  # else what is drawn next of the same values is something else
        t.searched[value, search] = tuple(params)
    return tuple(params)


@dataclass(frozen=True, slots=True)
class Elements:
    """The search for what `Selected` describes, in a bool tensor."""

    remedy: ClassVar[str] = (
        "Compute with all elements, and leave out what is not selected: torch.where(mask, x, 0), "
        "(x * mask).sum() / mask.sum()"
    )

    def __call__(self, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Positions and ranks."""
        flat = value.detach().cpu().numpy().reshape(-1)
        positions = np.flatnonzero(flat)
        ranks = np.where(flat, np.cumsum(flat, dtype=np.int64) - 1, -1)
        return tuple(torch.from_numpy(x).to(value.device) for x in (positions, ranks))


def _cut(t: Trace, value: Value) -> Cut:
    whole = t.b.graph("value", (), ())
    graph, kept = cone(whole, [value], "value")
    sources = sources_of(t)
    inputs = tuple(sources[whole.params[i].value] for i in kept)
    return Cut(graph, inputs, location.short(), drawn=len(t.draws.events))


def sources_of(t: Trace) -> dict[Value, Source]:
    """Where each input of the graph comes from."""
    position = {id(x): i for i, x in enumerate(t.inputs.tensors)}
    sources = {s.param: ("tensor", position[id(s.real)]) for s in t.inputs.storages}
    sources |= {v: ("scalar", k) for k, (v, _) in enumerate(t.scalars.params)}
    sources |= {v: ("found", k) for k, (v, _) in enumerate(t.found)}
    return sources | {v: ("draw", k) for k, v in t.draws.values.items()}


def _run(t: Trace, cut: Cut) -> torch.Tensor:
    """The values of a cut, computed now."""
    given = {
        "tensor": t.inputs.tensors,
        "scalar": [number for _, number in t.scalars.params],
        "found": [tensor for _, tensor in t.found],
        "draw": t.draws.given,
    }
    inputs = [given[kind][i] for kind, i in cut.sources]
    with torch._C.DisableTorchFunction():
        return t.evaluate(cut.graph, inputs)
