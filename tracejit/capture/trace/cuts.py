"""Cuts: values of tensors that Python reads in the middle of a step.

A trace computes nothing, so a value that Python asks for is computed apart: its cone, the graph of
this value alone, runs on the inputs as they are. Nothing has been written yet, so it has the value
that eager would show. A number of floating point goes on as a runtime scalar; a truth value is a
decision on one; what the Python does with any other form of the values is unknown (`opaque`), and
keeps the step in rerun.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tracejit.capture.trace import location
from tracejit.capture.trace.scalars import Path, Predicate
from tracejit.capture.trace.tensor import Handle
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Graph, Value
from tracejit.passes.cone import cone


class Stage(Protocol):
    """Computes the value of a cut, and what the rest of the step needs besides: see parts.py."""

    inputs: Sequence[tuple]  # ("cone", k): the k-th input of the cut; or (stage, k): a result

    def run(self, inputs: Sequence) -> list[torch.Tensor]:
        """The value, and all that is carried over."""


Source = tuple[str, int]  # ("tensor", outside tensor) or ("scalar", k)


@dataclass(eq=False, slots=True)
class Cut:
    """A number that Python read: the runtime scalar of path ("cut", n) is the n-th of a trace."""

    graph: Graph  # computes the value, its one result
    sources: tuple[Source, ...]  # per param of it
    where: str  # the user's line
    stage: Stage | None = None  # what computes it together with what the rest of the step needs

    @property
    def value(self) -> Value:
        """The value, as the graph of the step names it too."""
        return self.graph.results[0].value


def number_of(t: Trace, handle: Handle) -> float | int | bool:
    """The number in a tensor of one element: a TracedFloat, or a plain int or bool."""
    value = t.read(handle)
    known = t.read_numbers.get(value)
    if known is None:
        known = t.read_numbers[value] = _number(t, value)
    kind = handle.dtype.kind
    if kind == "f":
        return known
    if kind == "b":
        return known != 0.0  # a decision
    number = float.__pos__(known)
    t.scalars.decide(Predicate("is", known.value, number, True))
    return int(number)


def _number(t: Trace, value: Value) -> float:
    cut = _cut(t, value)
    number = t.journal.known_number()
    if number is None:
        number = float(_run(t, cut).item())
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
    plain = float(number)
    return t.journal.found_plain(number.value, plain) if handle.dtype.is_float else plain


def _cut(t: Trace, value: Value) -> Cut:
    whole = t.b.graph("value", (), ())
    graph, kept = cone(whole, [value], "value")
    position = {id(x): i for i, x in enumerate(t.inputs.tensors)}
    sources = {s.param: ("tensor", position[id(s.real)]) for s in t.inputs.storages}
    sources |= {v: ("scalar", k) for k, (v, _) in enumerate(t.scalars.params)}
    found = tuple(sources[whole.params[i].value] for i in kept)
    return Cut(graph, found, location.short())


def _run(t: Trace, cut: Cut) -> torch.Tensor:
    """The values of a cut, computed now."""
    tensors, numbers = t.inputs.tensors, t.scalars.params
    inputs = [tensors[i] if kind == "tensor" else numbers[i][1] for kind, i in cut.sources]
    with torch._C.DisableTorchFunction():
        return t.evaluate(cut.graph, inputs)
