"""What runs before the rest of a step, where Python reads values in the middle of it.

In a first trace each value is computed apart when it is asked for (`Values`). Later calls run the
step in segments: a `Stage` for each value that is read before the rest, then the rest. Steps that
begin alike share their stages, whatever Python decides afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from tracejit.capture.effects.captured import Captured, graph_key
from tracejit.capture.python import profiler
from tracejit.capture.trace import location
from tracejit.errors import ValueDependentError
from tracejit.ir.graph import Graph, Param, Result, Value
from tracejit.ir.on_tensors import on_numpy, results_on_numpy
from tracejit.passes.segments import Segment, segments
from tracejit.records import dataclass
from tracejit.runtime.program import Program

Function = Callable[[Sequence], list[torch.Tensor]]  # from a graph's inputs to its results
MakeProgram = Callable[[Graph, str], Program]

_REMEMBERED = 256


def _function(graph: Graph, program: Program) -> Function:
    """What computes a graph: its program, or numpy where that is for a GPU that is not here."""
    run = program.function()
    if program.computes:
        return run

    def compute(inputs: Sequence) -> list[torch.Tensor]:
        for x in inputs:
            if isinstance(x, torch.Tensor) and x.is_meta:
                raise ValueDependentError(
                    where=location.full(),
                    function="the step",
                    shape=list(x.shape),
                    remedy="Build it with tensors on the CPU: meta tensors have no values",
                )
        run(inputs)  # for what it loads
        return results_on_numpy(graph, inputs)

    return compute


def _of_a_value(graph: Graph, make: MakeProgram) -> Program:
    """The program of a value that Python reads, after which the call goes on."""
    program = make(graph, " of a value")
    if program.agreement is not None:
        program.agreement.goes_on = True
    return program


def _remember(bounded: dict, key: object, value: object) -> None:
    bounded[key] = value
    if len(bounded) > _REMEMBERED:
        del bounded[next(iter(bounded))]


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
        with profiler.suspended():
            return self._computed(graph, inputs)

    def _computed(self, graph: Graph, inputs: Sequence[torch.Tensor | float]) -> torch.Tensor:
        known = self._by_id.get(id(graph))
        if known is None:
            key = graph_key(graph)
            apart = any(node.is_ordered for node in graph.nodes)  # ranks compare before a program
            if self._on_numpy and key not in self._functions and not apart:
                _remember(self._functions, key, None)
                return on_numpy(graph, inputs)
            function = self._functions.get(key)
            if function is None:
                function = _function(graph, _of_a_value(graph, self._make))
                _remember(self._functions, key, function)
            known = graph, function
            _remember(self._by_id, id(graph), known)
        return known[1](inputs)[0]


class Stage:
    """The segment that ends with one value for Python. `run` returns that, and after it what later
    segments have asked for with `carry`.

    inputs: per param of its graph, ("cone", k): what the k-th param of the value's cone is; or
        (stage, k): the k-th result of an earlier stage.
    """

    def __init__(self, cone: Graph, graph: Graph, inputs: Sequence[tuple], make: MakeProgram):
        self.inputs = tuple(inputs)
        self.program: Program | None = None
        self._values = [node.out for node in cone.nodes]
        self._graph, self._make = graph, make
        self._results: dict[int, int] = {}  # position among the cone's nodes -> the result
        self._function: Function | None = None
        self.kept: tuple | None = None  # of this call, where another plan may ask again

    @property
    def width(self) -> int:
        """The number of results, which grows with `carry`."""
        return len(self._graph.results)

    def carry(self, position: int) -> int:
        """The result that has the value of a node of the cone; there may be a new one."""
        index = self._results.get(position)
        if index is None:
            value = self._values[position]
            known = [r.value for r in self._graph.results]
            if value in known:
                index = known.index(value)
            else:
                index = len(known)
                results = (*self._graph.results, Result(value))
                self._graph = replace(self._graph, results=results)
                self._function = None
            self._results[position] = index
        return index

    def run(self, inputs: Sequence) -> list[torch.Tensor]:
        """The results for some inputs; a list that grows with `carry`, between calls."""
        self.build()
        return self._function(inputs)

    def build(self) -> None:
        """Compile it, unless that is done."""
        if self._function is None:
            self.program = _of_a_value(self._graph, self._make)
            self._function = _function(self._graph, self.program)

    def read(self, result: torch.Tensor) -> float:
        """The one element of a result of the latest run: an int for an integer, else a float."""
        number = self.program.read(result)
        return float(number) if type(number) is bool else number

    def run_once(self, inputs: Sequence) -> list[torch.Tensor]:
        """`run`, or what it gave in this call already, for the same inputs."""
        kept = self.kept
        if kept is None or not all(map(_same, kept[0], inputs)):
            kept = self.kept = inputs, self.run(inputs)
        return kept[1]


def _same(a: object, b: object) -> bool:
    """Whether two inputs are the same; what two replays have drawn or found lies apart."""
    if a is b:
        return True
    both = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return torch.equal(a, b) if both else a == b


@dataclass(frozen=True, slots=True)
class Parts:
    """A step in segments.

    cuts:     which cuts of the step they end with.
    stages:   a stage for each of them.
    inputs:   per param of the rest's graph: ("param", value), or (stage, result).
    program:  the rest's.
    results:  where each result of the step's graph is: (stage, result), or ("rest", result).
    """

    cuts: tuple[int, ...]
    stages: tuple[Stage, ...]
    inputs: tuple[tuple, ...]
    program: Program
    results: tuple[tuple, ...]


class Stages:
    """The stages of one step, and how it is put together of them."""

    def __init__(self, make: MakeProgram):
        self._make = make
        self._stages: dict[tuple, Stage] = {}

    def parts_of(self, captured: Captured, cuts: Sequence[int]) -> Parts:
        """A captured step in segments that end with some of its cuts; compiles the rest."""
        cones = [captured.cuts[k].graph for k in cuts]
        *first, rest = segments(captured.graph, cones)
        positions = [{node.out: i for i, node in enumerate(cone.nodes)} for cone in cones]
        stages: list[Stage] = []

        def carried(segment: Segment) -> list[tuple]:
            return [
                (stages[k], stages[k].carry(positions[k][v])) for v, k in segment.carried.items()
            ]

        for cone, segment in zip(cones, first, strict=True):
            key = graph_key(cone), tuple(stages)
            stage = self._stages.get(key)
            if stage is None:
                place = {p.value: i for i, p in enumerate(cone.params)}
                own = segment.graph.params[: len(segment.graph.params) - len(segment.carried)]
                inputs = [("cone", place[p.value]) for p in own] + carried(segment)
                stage = Stage(cone, segment.graph, inputs, self._make)
                _remember(self._stages, key, stage)
            stages.append(stage)
        own = rest.graph.params[: len(rest.graph.params) - len(rest.carried)]
        kept, results = [], []
        for result in rest.graph.results:
            k = rest.carried.get(result.value)
            if k is not None and result.strides is None:  # it is there already
                results.append((stages[k], stages[k].carry(positions[k][result.value])))
            else:
                results.append(("rest", len(kept)))
                kept.append(result)
        graph = _without_unread(replace(rest.graph, results=tuple(kept)), len(own))
        still = {p.value for p in graph.params[len(own) :]}
        needed = replace(rest, carried={v: k for v, k in rest.carried.items() if v in still})
        inputs = [("param", p.value) for p in own] + carried(needed)
        program = self._make(graph, " after it")
        return Parts(tuple(cuts), tuple(stages), tuple(inputs), program, tuple(results))


def _without_unread(graph: Graph, first: int) -> Graph:
    """The graph without the params, from the first one given on, that nothing reads."""
    read: set[Value] = {v for node in graph.nodes for v in node.inputs} | set(graph.outputs())
    more: tuple[Param, ...] = tuple(p for p in graph.params[first:] if p.value in read)
    return replace(graph, params=graph.params[:first] + more)
