"""What runs before the rest of a step, where Python reads values in the middle of it.

In a trace each value is computed apart when it is asked for (`Values`). A replay runs the segments
of the step in turn (`Parts`), and computes nothing twice.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from tracejit.capture.effects.captured import Captured, graph_key
from tracejit.ir.graph import Graph
from tracejit.ir.on_tensors import on_numpy
from tracejit.passes.segments import Segment, segments
from tracejit.runtime.program import Program

Function = Callable[[Sequence], list[torch.Tensor]]  # from a graph's inputs to its results
MakeProgram = Callable[[Graph, str], Program]

_REMEMBERED = 256


class Values:
    """Computes values that Python reads in traces.

    on_numpy: whether a value is computed by numpy the first time; many are asked for just once.
    """

    def __init__(self, make: MakeProgram, *, on_numpy: bool):
        self._make, self._on_numpy = make, on_numpy
        self._functions: dict[tuple, Function | None] = {}  # by what a graph computes
        self._by_id: dict[int, tuple[Graph, Function]] = {}

    def __call__(self, graph: Graph, inputs: Sequence[torch.Tensor | float]) -> torch.Tensor:
        """The one result of a graph. A profiler of the trace does not see this."""
        profile = sys.getprofile()
        sys.setprofile(None)
        try:
            return self._computed(graph, inputs)
        finally:
            sys.setprofile(profile)

    def _computed(self, graph: Graph, inputs: Sequence[torch.Tensor | float]) -> torch.Tensor:
        known = self._by_id.get(id(graph))
        if known is None:
            key = graph_key(graph)
            if self._on_numpy and key not in self._functions:
                _remember(self._functions, key, None)
                return on_numpy(graph, inputs)
            function = self._functions.get(key)
            if function is None:
                function = self._make(graph, " of a value").function()
                _remember(self._functions, key, function)
            known = graph, function
            _remember(self._by_id, id(graph), known)
        return known[1](inputs)[0]


def _remember(bounded: dict, key: object, value: object) -> None:
    bounded[key] = value
    if len(bounded) > _REMEMBERED:
        del bounded[next(iter(bounded))]


@dataclass(frozen=True, slots=True)
class Parts:
    """A step in segments.

    first:    the segments that end with a value for Python, and a function for each.
    rest:     the rest, and its program.
    results:  where each result of the step's graph is: ("part", segment, result) or
        ("rest", result).
    """

    first: tuple[tuple[Segment, Function], ...]
    rest: Segment
    program: Program
    results: tuple[tuple, ...]


def parts_of(captured: Captured, make: MakeProgram) -> Parts:
    """The segments of a captured step with early cuts, compiled."""
    early = [cut.graph for k, cut in enumerate(captured.cuts) if k not in captured.late]
    *first, rest = segments(captured.graph, early)
    kept, results = [], []
    for result in rest.graph.results:
        if result.value in rest.carried and result.strides is None:  # it is there already
            results.append(("part", *rest.carried[result.value]))
        else:
            results.append(("rest", len(kept)))
            kept.append(result)
    rest = replace(rest, graph=replace(rest.graph, results=tuple(kept)))
    functions = tuple((part, make(part.graph, " of a value").function()) for part in first)
    return Parts(functions, rest, make(rest.graph, " after it"), tuple(results))
