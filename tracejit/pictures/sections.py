"""What a call of a step runs, as sections: graphs with their programs, and how they are joined.

A step is one section; where Python reads values in the middle, one for each that is read first, and
the rest. Backwards outside the step that have run follow.
"""

from __future__ import annotations

from collections.abc import Sequence

from tracejit.capture.effects.captured import Captured
from tracejit.capture.effects.effects import slots
from tracejit.capture.trace.cuts import Source
from tracejit.ir.graph import Graph
from tracejit.parts import Parts
from tracejit.pipeline import Backward
from tracejit.records import dataclass
from tracejit.runtime.program import Program

Input = str | tuple[int, int]  # a name, or a result of an earlier section


@dataclass(frozen=True)
class Section:
    """A graph and what runs it. Of each input, where it comes from; of each result, what becomes of
    it, "" for what only later sections read."""

    graph: Graph
    program: Program
    inputs: Sequence[Input]
    results: Sequence[str]
    outside: bool = False


class Sections:
    """Makes the sections of a step.

    captured:  of the call that ran last. names: of the inputs of its graph.
    backwards: those that have run, with their numbers among the captured effects' `outside`.
    """

    def __init__(
        self,
        captured: Captured,
        names: Sequence[str],
        program: Program,
        parts: Parts | None,
        backwards: Sequence[tuple[int, Backward]],
    ):
        self.captured, self.parts = captured, parts
        self.names = names or [f"input_{i}" for i in range(len(captured.sources))]
        self.found: list[Section] = []
        fates = [self._fate(i) for i in range(len(captured.graph.results))]
        if parts is None:
            self.places = [(0, i) for i in range(len(fates))]  # of the step's results
            self.found.append(Section(program.graph, program, self.names, fates))
        else:
            self._add_parts(parts, fates)
        for number, backward in backwards:
            self._add_backward(number, backward)

    def _add_parts(self, parts: Parts, fates: Sequence[str]) -> None:
        """The stages, then the rest."""
        stages, last = parts.stages, len(parts.stages)
        self.places = [
            (last, k) if of == "rest" else (stages.index(of), k) for of, k in parts.results
        ]
        fate_at = dict(zip(self.places, fates, strict=True))
        for n, (k, stage) in enumerate(zip(parts.cuts, stages, strict=True)):
            sources = self.captured.cuts[k].sources
            inputs = [
                self._input(sources[i]) if of == "cone" else (stages.index(of), i)
                for of, i in stage.inputs
            ]
            graph = stage.program.graph
            own = ["read by Python"]
            own += [fate_at.get((n, i), "") for i in range(1, len(graph.results))]
            self.found.append(Section(graph, stage.program, inputs, own))
        position = {p.value: i for i, p in enumerate(self.captured.graph.params)}
        inputs = [
            self._input(self.captured.sources[position[x]])
            if of == "param"
            else (stages.index(of), x)
            for of, x in parts.inputs
        ]
        graph = parts.program.graph
        rest = [fate_at.get((last, i), "") for i in range(len(graph.results))]
        self.found.append(Section(graph, parts.program, inputs, rest))

    def _add_backward(self, number: int, backward: Backward) -> None:
        """A backward outside: it reads a gradient, and what the step has kept for it."""
        node, graph = self.captured.effects.outside[number], backward.program.graph
        inputs: list[Input] = ["gradient" if not number else f"gradient {number + 1}"]
        for kind, index in node.saved:
            known = kind == "real" or index >= len(self.places)
            inputs.append(self._name_of((kind, index)) if known else self.places[index])
        inputs += [f"number {k}" for k in range(len(graph.params) - len(inputs))]
        fates = [f"gradient of {self._name_of(place)}" for place in node.inputs]
        self.found.append(Section(graph, backward.program, inputs, fates, outside=True))

    def _input(self, source: Source) -> Input:
        """Where an input comes from: what a stage has read is that stage's first result."""
        kind, index = source
        path = self.captured.paths[index] if kind == "scalar" else ()
        if path and path[0] == "cut" and self.parts is not None and path[1] in self.parts.cuts:
            return self.parts.cuts.index(path[1]), 0
        pairs = zip(self.captured.sources, self.names, strict=True)
        return next((name for s, name in pairs if s == source), f"{kind} {index}")

    def _name_of(self, place: tuple[str, int]) -> str:
        """What a tensor is called: an outside one, or one that the step made."""
        kind, index = place
        if kind != "real":
            return f"result {index}"
        name = self._input(("tensor", index))
        return name if isinstance(name, str) else f"tensor {index}"

    def _fate(self, result: int) -> str:
        """What becomes of a result of the step."""
        effects = self.captured.effects
        made = [i for i, m in enumerate(effects.made) if (m.kind, m.index) == ("output", result)]
        for of, one in effects.grads:
            if one in made:
                return f"gradient of {self._name_of(('real', of))}"
        if result >= len(self.captured.graph.results) - len(self.captured.late):
            return "read by Python"
        return "returned" if {*made}.intersection(slots(effects.returned)) else "kept"
