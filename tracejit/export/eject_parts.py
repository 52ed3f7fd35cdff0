"""The programs of a call of an ejected step: what comes before a value that Python reads, one that
tells whether eager would refuse what the step computes, and the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tracejit.capture.effects.captured import Captured
from tracejit.ir.graph import Graph
from tracejit.parts import Parts, Stages
from tracejit.pipeline import Pipeline
from tracejit.records import dataclass
from tracejit.runtime.executor import Executor
from tracejit.runtime.memory import Memory
from tracejit.runtime.program import Program

Expression = Callable[[str, int], str]  # of a source


@dataclass(frozen=True)
class EjectedParts:
    """parts: the segments, where values are read before the rest. checks: tells what is refused."""

    rest: Program
    parts: Parts | None
    checks: Program | None

    @property
    def programs(self) -> list[Program]:
        """All of them, in the order in which they run."""
        stages = () if self.parts is None else self.parts.stages
        checks = () if self.checks is None else (self.checks,)
        return [*(stage.program for stage in stages), *checks, self.rest]

    def inputs(self, captured: Captured, of: Expression, results: dict[object, list[str]]):
        """Per param of the rest's graph an expression. `results` are those of the stages."""
        if self.parts is None:
            return [of(*source) for source in captured.sources]
        sources = {}
        for each in (captured, *captured.cuts):
            values = (p.value for p in each.graph.params)
            sources.update(zip(values, each.sources, strict=True))
        return [
            of(*sources[x]) if kind == "param" else results[kind][x]
            for kind, x in self.parts.inputs
        ]

    def results(self, of_rest: Sequence[str], results: dict[object, list[str]]) -> list[str]:
        """The results of the step's graph."""
        if self.parts is None:
            return [*of_rest]
        found = self.parts.results
        return [of_rest[i] if of == "rest" else results[of][i] for of, i in found]


def parts_of(captured: Captured, pipeline: Pipeline, executor: Executor) -> EjectedParts:
    """Compile them."""

    def make(graph: Graph, what: str = "") -> Program:
        return pipeline.build(graph, executor, Memory(), what)[0]

    checks = None if captured.checks is None else make(captured.checks.graph)
    if not captured.early:
        return EjectedParts(make(captured.graph), None, checks)
    parts = Stages(make).parts_of(captured, captured.early)
    for stage in parts.stages:
        stage.build()
    return EjectedParts(parts.program, parts, checks)
