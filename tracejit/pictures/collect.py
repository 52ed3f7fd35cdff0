"""From what a step has compiled to a `Picture`.

In: a `Drawn`, the graphs and programs of a step that was called, and its ledger. Out: pure data.
Kernels are found at the nodes that they compute by the values' numbers, which the schedule keeps.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import CodeType

from tracejit.capture.effects.captured import Captured
from tracejit.capture.effects.effects import slots
from tracejit.ir.graph import Graph, Node, Value, print_arg
from tracejit.ir.literals import print_literal
from tracejit.ledger import KernelCost, LaunchCost, Ledger
from tracejit.pictures.kernels import FREE, Running, computed_by, running
from tracejit.pictures.phases import module_of, owners_of, phases, roots_of
from tracejit.pictures.picture import (
    BACKWARD,
    UPDATE,
    Line,
    Picture,
    PictureKernel,
    PictureNode,
)
from tracejit.runtime.program import Program
from tracejit.schedule.kernel import Kernel
from tracejit.schedule.traffic import operations_in
from tracejit.tables import duration, size

LANGUAGES = {".c": "C", ".py": "Triton"}


@dataclass(frozen=True)
class Drawn:
    """A step to be drawn.

    captured: of the call that ran last.
    graphs:   final graphs, that of the step first, then those of backwards outside.
    outside:  which of the captured effects' `outside` these others are.
    programs: what runs each of the graphs.
    names:    of the inputs of the first graph.
    code:     of the step's function.
    ledger:   of these programs, in this order.
    """

    name: str
    captured: Captured
    graphs: Sequence[Graph]
    outside: Sequence[int]
    programs: Sequence[Program]
    names: Sequence[str]
    code: CodeType
    ledger: Ledger
    notes: Sequence[str] = ()


def picture(subject: Drawn) -> Picture:
    """The picture of a step."""
    costs, drawn = _Costs(subject.ledger), _Collector(subject)
    kernels: list[PictureKernel] = []
    for number, (graph, program) in enumerate(zip(subject.graphs, subject.programs, strict=True)):
        first = len(kernels)
        by = computed_by(graph, program).items()
        computed = {value: tuple(first + n for n in numbers) for value, numbers in by}
        sources, lines = program.loaded.sources, program.loaded.lines()
        for source, where, runs in zip(sources, lines, running(program), strict=True):
            language = LANGUAGES.get(getattr(source, "suffix", ""), "IR")
            name, (cost, seconds) = f"k{len(kernels)}", costs.of(runs)
            kernels.append(PictureKernel(name, tuple(where), source.text, language, cost, seconds))
        if number:
            drawn.add_outside(graph, subject.outside[number - 1], computed)
        else:
            drawn.add(graph, computed)
    code, ledger = subject.code, subject.ledger
    said = ("mode", "launches", "bytes", "flops", "here", "memory", f"on {ledger.gpu}")
    return Picture(
        name=subject.name,
        device=ledger.device,
        home=Line(code.co_filename, code.co_firstlineno, code.co_qualname),
        summary=tuple((name, text) for name, text in ledger.summary() if name in said),
        nodes=tuple(drawn.nodes),
        kernels=tuple(kernels),
        notes=tuple(subject.notes),
    )


class _Files:
    """Lines as they are shown. A text names a file without its folder: where nothing more is known
    it is that of the step's function, if the name is its."""

    def __init__(self, code: CodeType):
        self._home = code.co_filename

    def line(self, where: str) -> Line | None:
        """The line that a node's `where` stands for."""
        name, _, number = where.rpartition(":")
        if not number.isdigit():
            return None
        file = getattr(where, "file", "")
        if not file:
            file = self._home if os.path.basename(self._home) == name else name
        return Line(file, int(number), getattr(where, "function", ""))


class _Costs:
    """The figures of each kernel, in the order of a ledger."""

    def __init__(self, ledger: Ledger):
        self._here, self._launches = list(ledger.kernels), list(ledger.launches)
        self._gpu, self._on_cpu = ledger.gpu, ledger.device == "cpu"

    def of(self, source: Running) -> tuple[tuple[tuple[str, str], ...], float | None]:
        """Those of the next source, and the seconds that it takes."""
        here = self._here.pop(0) if self._on_cpu else None
        there = self._launch(source) if source.launched else None
        said: list[tuple[str, str]] = []
        if here is not None:
            said += self._of_cpu(here, source.kernels)
        if there is not None:
            said += self._of_gpu(there)
        seconds = here.measured if here is not None else None
        if seconds is None and there is not None:
            seconds = there.measured or there.seconds
        return tuple(dict(said).items()), seconds

    def _launch(self, source: Running) -> LaunchCost | None:
        """What was said of a launch: nothing where it has no programs."""
        lines = tuple(dict.fromkeys(line for one in source.kernels for line in one.lines))
        if self._launches and self._launches[0].lines == lines:
            return self._launches.pop(0)
        return None

    def _of_cpu(self, cost: KernelCost, kernels: Sequence[Kernel]) -> Iterator[tuple[str, str]]:
        work = sum(map(operations_in, kernels))
        yield "bytes", f"{size(cost.bytes)} at least"
        yield "operations", f"{work:,}"
        if cost.measured:
            rate = f"{cost.bytes / cost.measured / 1e9:.3g} GB/s"
            yield "time here", duration(cost.measured)
            yield "rate", f"{rate}, {_flops(work, cost.measured)}"

    def _of_gpu(self, cost: LaunchCost) -> Iterator[tuple[str, str]]:
        yield "bytes", f"{size(cost.bytes)} at least, {size(cost.issued_bytes)} issued"
        yield "operations", f"{cost.operations:,}"
        yield f"time on {self._gpu}", f"{duration(cost.seconds)} predicted, by {cost.bound}"
        if cost.measured:
            yield "time here", duration(cost.measured)
        if cost.times > 1:
            yield "launched", f"{cost.times} times"


def _flops(operations: int, seconds: float) -> str:
    return f"{operations / seconds / 1e9:.3g} GFLOP/s"


class _Collector:
    """Collects the nodes of several graphs."""

    def __init__(self, subject: Drawn):
        self.nodes: list[PictureNode] = []
        self._files = _Files(subject.code)
        self._names, self._captured = subject.names, subject.captured
        self._results: list[int] = []  # of the step: the node of each
        self._real: dict[int, int] = {}  # outside tensor -> its input's node

    def add(self, graph: Graph, computed: Mapping[Value, Sequence[int]]) -> None:
        """The graph of the step itself."""
        names = self._names or [f"input_{i}" for i in range(len(graph.params))]
        called = dict(zip((p.value for p in graph.params), names, strict=True))
        leaves: dict[Value, list[str]] = {}
        for i, result in enumerate(graph.results):
            leaves.setdefault(result.value, []).append(self._fate(i))
        for write in graph.writes:
            leaves.setdefault(write.value, []).append(f"writes {called[write.target]}")
        at = self._walk(graph, called, phases(graph), owners_of(graph, called), leaves, computed)
        self._results = [at.get(r.value, -1) for r in graph.results]
        for param, (kind, index) in zip(graph.params, self._captured.sources, strict=True):
            if kind == "tensor" and param.value in at:
                self._real[index] = at[param.value]

    def add_outside(
        self, graph: Graph, number: int, computed: Mapping[Value, Sequence[int]]
    ) -> None:
        """A backward outside the step: what it reads of the step are nodes already."""
        node = self._captured.effects.outside[number]
        given: dict[Value, int] = {}
        called = {graph.params[0].value: "gradient"}
        for param, (kind, index) in zip(graph.params[1:], node.saved, strict=False):
            there = self._real.get(index, -1) if kind == "real" else self._results[index]
            if there >= 0:
                given[param.value] = there
            called[param.value] = self._name_of((kind, index))
        leaves: dict[Value, list[str]] = {}
        for result, place in zip(graph.results, node.inputs, strict=True):
            leaves.setdefault(result.value, []).append(f"gradient of {self._name_of(place)}")
        lanes = dict.fromkeys((n.out for n in graph.nodes), BACKWARD)
        self._walk(graph, called, lanes, {}, leaves, computed, given)

    def _name_of(self, place: tuple[str, int]) -> str:
        """What a tensor is called: an outside one, or one that the step made."""
        if place[0] != "real":
            return f"result {place[1]}"
        sources = self._captured.sources
        known = [n for n, s in zip(self._names, sources, strict=True) if s == ("tensor", place[1])]
        return known[0] if known else f"tensor {place[1]}"

    def _fate(self, result: int) -> str:
        """What becomes of a result of the step."""
        effects = self._captured.effects
        made = [i for i, m in enumerate(effects.made) if (m.kind, m.index) == ("output", result)]
        for of, one in effects.grads:
            if one in made:
                return f"gradient of {self._name_of(('real', of))}"
        if result >= len(self._captured.graph.results) - len(self._captured.late):
            return "read as a number"
        return "returned" if {*made}.intersection(slots(effects.returned)) else "kept"

    def _walk(
        self,
        graph: Graph,
        called: Mapping[Value, str],
        lanes: Mapping[Value, str],
        owners: Mapping[Value, tuple[str, ...]],
        leaves: Mapping[Value, Sequence[str]],
        computed: Mapping[Value, Sequence[int]],
        given: Mapping[Value, int] | None = None,
    ) -> dict[Value, int]:
        """Add the nodes of a graph: an input stands right before what reads it first. Returns the
        node of each value."""
        roots, at = roots_of(graph, called), dict(given or {})

        def add(value: Value, node: PictureNode) -> None:
            at[value] = len(self.nodes)
            self.nodes.append(replace(node, leaves=tuple(dict.fromkeys(leaves.get(value, ())))))

        for number, node in enumerate(graph.nodes):
            lane, out = lanes[node.out], node.out
            way, kind = module_of(node, roots)
            if not way and lane == UPDATE:
                way = owners.get(out, ())
            line = self._files.line(node.where)
            fields = {"lane": lane, "module": way, "kind": kind, "line": line}
            operands = tuple(dict.fromkeys(node.inputs))
            for value in operands:
                if value not in at:
                    text = called.get(value) or f"input_{value.id}"
                    own = {"module": owners.get(value, ())} if lane == UPDATE else {}
                    add(value, _shown(value, text, "input", **fields | own))
            one = _shown(out, f"{node.op.name}_{number}", node.op.name, **fields)
            one = replace(
                one,
                attrs=_attributes(node),
                operands=tuple(at[v] for v in operands),
                kernels=tuple(computed.get(out, ())),
                free=node.op.family in FREE,
            )
            add(out, one)
        return at


def _shown(value: Value, name: str, op: str, **fields: object) -> PictureNode:
    t = value.type
    return PictureNode(name, op, str(t), t.shape, t.dtype.name, t.nbytes, **fields)


def _attributes(node: Node) -> str:
    """How a node reads in the IR, without the values: literals and attributes."""
    args = [print_arg(a) for a in node.args if not isinstance(a, Value)]
    for key, value in node.attrs:
        args.append(f"{key}={'…' if isinstance(value, Graph) else print_literal(value)}")
    return ", ".join(args)
