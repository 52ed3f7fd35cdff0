"""The programs of one compiled step: found for a captured step, or built by the `Pipeline`.

    Captured → pipeline → Compiled

A program serves every capture with the same graph, alignment of inputs, and executor.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import field
from types import FunctionType

from tracejit.capture.effects.captured import Captured, Key, graph_key
from tracejit.capture.effects.eager import EagerCost
from tracejit.capture.effects.effects import Call
from tracejit.capture.literals import Literals
from tracejit.capture.python.memory import MANY
from tracejit.errors import WrongResult
from tracejit.ir import exchange
from tracejit.ir.graph import Graph
from tracejit.options import Options
from tracejit.parts import Parts, Stages
from tracejit.pipeline import Backward, Checking, Pipeline, Stats
from tracejit.records import dataclass
from tracejit.run import Hooks, Run, generate
from tracejit.runtime.agreement import Agreement
from tracejit.runtime.memory import Memory
from tracejit.runtime.native_words import load_early
from tracejit.runtime.program import Program

MAX_PROGRAMS = 64  # per step; the least recently used goes first
_MANY_COUNTS = 4  # from so many numbers of found elements on, at one place, it is said


@dataclass
class Compiled:
    """A program with the graphs that it came from."""

    key: tuple
    program: Program
    final: Graph
    backwards: list[Backward] = field(default_factory=list)
    names: tuple[str, ...] = ()  # of the graph's inputs, as the user's code calls them
    backend: str = ""  # the executor's
    eager: EagerCost = EagerCost()  # of the captured step that it was built for
    runs: dict[tuple, Run] = field(default_factory=dict)  # captured key, in part -> what calls do
    checking: Checking | None = None  # runs before it
    seen: dict[Key, int] = field(default_factory=dict)  # captured key -> times traced
    parts: dict[tuple, Parts] = field(default_factory=dict)  # the program in segments
    used: int = 0  # when it ran last
    kept: bool = True  # until there are too many
    wrong: WrongResult | None = None  # a verified call has differed from eager

    def run_of(self, captured: Captured, hooks: Hooks) -> Run:
        """What traced calls of a captured step do."""
        key = captured.key.graph, captured.key.effects
        run = self.runs.get(key)
        if run is None:
            parts = self.program, self.final, self.backwards, hooks
            run = generate(captured, *parts, checking=self.checking)
            _put(self.runs, key, run)
        return run

    def traced(self, captured: Captured) -> int:
        """How often the same was captured, this time included."""
        count = self.seen.pop(captured.key, 0) + 1
        _put(self.seen, captured.key, count)
        return count


def _put(bounded: dict, key: object, value: object) -> None:
    """Add an item; the oldest one goes when there are too many."""
    bounded[key] = value
    if len(bounded) > MAX_PROGRAMS:
        del bounded[next(iter(bounded))]


class Programs:
    """Finds or builds the program of a captured step.

    dropped: called with what is forgotten when there are more than MAX_PROGRAMS.
    """

    def __init__(
        self,
        function: FunctionType,
        stats: Stats,
        options: Options,
        dropped: Callable[[Compiled], None],
    ):
        self._kept: dict[tuple, Compiled] = {}
        self._uses = 0
        self.name = function.__name__ if function.__name__.isidentifier() else "step"
        where = f"{function.__code__.co_filename}:{function.__code__.co_firstlineno}"
        self.pipeline = Pipeline(self.name, where, stats, options)
        self.stats, self.dropped = stats, dropped
        self.agreement: Agreement | None = None  # of the ranks, where a plan has collectives
        self._literals = Literals()
        self._memory = Memory()  # of all programs that run in calls of the step
        self._counts: dict[tuple, set[int]] = {}  # by place and search: how much was found there
        self.varying = ""  # where that varies much, and what to do
        part = weakref.WeakMethod(self.part)
        self._stages = Stages(lambda graph, what: part()(graph, what))

    @property
    def kept(self) -> list[Compiled]:
        """The programs that there are, the one used last at the end."""
        return sorted(self._kept.values(), key=lambda x: x.used)

    def used(self, compiled: Compiled) -> None:
        """A program has run."""
        self._uses += 1
        compiled.used = self._uses

    def find(
        self, captured: Captured, call: Call, names: Callable[[Captured, Call], tuple[str, ...]]
    ) -> tuple[Compiled, Captured]:
        """The program of a captured step. Where its graph's varying literals become scalars, it is
        another captured step, and the scalars of the call grow. `names` names the graph's inputs
        where a program is built."""
        executor = self.pipeline.executor(captured.graph)
        aligned = tuple([t.data_ptr() % 16 == 0 for t in call.reals])
        backward = tuple(graph_key(node.graph) for node in captured.effects.outside)
        checks = None if captured.checks is None else graph_key(captured.checks.graph)
        key = (captured.key.graph, backward, aligned, executor, checks)
        found = self._kept.get(key)
        if found is None:
            general = self._literals.generalize(captured)
            if general is not None:
                captured, more = general
                call.scalars.extend(more)
                key = (captured.key.graph, *key[1:])
                found = self._kept.get(key)
        if found is not None:
            self.used(found)
            self.stats.reruns += 1
            return found, captured
        backwards = [
            Backward(self.pipeline, node.graph, executor) for node in captured.effects.outside
        ]
        if len(call.reals) >= MANY:
            load_early()
        named = names(captured, call)
        self._note_counts(captured)
        built = self.pipeline.build(captured.graph, executor, self._memory, names=named)
        made = executor.name, captured.eager
        compiled = Compiled(key, *built, backwards, named, *made)
        self.agreement = compiled.program.agreement or self.agreement
        if not compiled.program.computes:  # nobody will call them
            for backward in backwards:
                backward.build()
                backward.program.rehearse()
        if captured.checks is not None:
            compiled.checking = Checking(self.pipeline, captured.checks, executor)
        self._kept[key] = compiled
        self.used(compiled)
        while len(self._kept) > MAX_PROGRAMS:
            dropped = self._kept.pop(self.kept[0].key)
            dropped.kept = False
            self.dropped(dropped)
        return compiled, captured

    def say_to_ranks(self, what: str, *, fails: bool = False) -> None:
        """Say that this rank runs no plan in this call, if plans of the step have collectives, or
        it has asked the others: to wait for it would be in vain."""
        if self.agreement is not None:
            self.agreement.otherwise(what, fails=fails)
        elif groups := exchange.asked():
            exchange.otherwise(groups, self.name, what, fails=fails)

    def _note_counts(self, captured: Captured) -> None:
        """Take note of how much the cuts of a new program have found."""
        for cut in captured.cuts:
            if cut.search is None or self.varying:
                continue
            counts = self._counts.setdefault((cut.where, cut.search), set())
            counts.add(cut.count)
            if len(counts) >= _MANY_COUNTS:
                so_far = ", ".join(map(str, sorted(counts)))
                self.varying = (
                    f"makes a plan for each number of elements that it finds at {cut.where} "
                    f"({so_far} so far). {cut.search.remedy}"
                )

    def parts(self, compiled: Compiled, captured: Captured, cuts: Sequence[int]) -> Parts | None:
        """A captured step in segments that end with some of its cuts."""
        if not cuts:
            return None
        key = captured.key, tuple(cuts)
        found = compiled.parts.get(key)
        if found is None:
            found = self._stages.parts_of(captured, cuts)
            if not found.program.computes:  # nobody will run them
                for stage in found.stages:
                    stage.build()
            _put(compiled.parts, key, found)
        return found

    def part(self, graph: Graph, what: str) -> Program:
        """The program of a part of a step."""
        build, executor = self.pipeline.build, self.pipeline.executor(graph)
        return build(graph, executor, self._memory, what, counted=False)[0]
