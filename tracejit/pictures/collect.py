"""From what a step has compiled to a `Picture`.

In: a `Drawn`, the sections of a step that was called, and their ledger. Out: pure data.
Kernels are found at the nodes that they compute by the values' numbers, which the schedule keeps.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import CodeType

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
from tracejit.pictures.sections import Section
from tracejit.records import dataclass
from tracejit.schedule.kernel import Kernel
from tracejit.schedule.traffic import operations_in
from tracejit.tables import duration, size

LANGUAGES = {".c": "C", ".py": "Triton"}


@dataclass(frozen=True)
class Drawn:
    """A step to be drawn. `code`: of its function. `ledger`: of the sections' programs."""

    name: str
    sections: Sequence[Section]
    code: CodeType
    ledger: Ledger
    notes: Sequence[str] = ()


def picture(subject: Drawn) -> Picture:
    """The picture of a step."""
    costs, drawn = _Costs(subject.ledger), _Collector(subject.code)
    kernels: list[PictureKernel] = []
    for section in subject.sections:
        first, program = len(kernels), section.program
        by = computed_by(section.graph, program).items()
        computed = {value: tuple(first + n for n in numbers) for value, numbers in by}
        sources, lines = program.loaded.sources, program.loaded.lines()
        for source, where, runs in zip(sources, lines, running(program), strict=True):
            language = LANGUAGES.get(getattr(source, "suffix", ""), "IR")
            name, (cost, seconds) = f"k{len(kernels)}", costs.of(runs)
            kernels.append(PictureKernel(name, tuple(where), source.text, language, cost, seconds))
        drawn.add(section, computed)
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
    """Collects the nodes of several sections."""

    def __init__(self, code: CodeType):
        self.nodes: list[PictureNode] = []
        self._files = _Files(code)
        self._inputs: dict[str, int] = {}  # name -> node
        self._results: list[list[int]] = []  # of each section: the node of each result

    def add(self, section: Section, computed: Mapping[Value, Sequence[int]]) -> None:
        """The graph of a section: an input stands right before what reads it first."""
        graph, at = section.graph, self._given(section)
        lanes = phases(graph)
        if section.outside:
            lanes = dict.fromkeys(lanes, BACKWARD)
        called = {
            p.value: x if isinstance(x, str) else self.nodes[at[p.value]].name
            for p, x in zip(graph.params, section.inputs, strict=True)
        }
        roots, owners = roots_of(graph, called), owners_of(graph, called)
        leaves = _leaves(section, called)

        def add(value: Value, node: PictureNode) -> None:
            at[value] = len(self.nodes)
            self.nodes.append(replace(node, leaves=leaves.get(value, ())))

        first = len(self.nodes)
        for node in graph.nodes:
            lane, out = lanes[node.out], node.out
            way, kind = module_of(node, roots)
            if not way and lane == UPDATE:
                way = owners.get(out, ())
            line = self._files.line(node.where)
            fields = {"lane": lane, "module": way, "kind": kind, "line": line}
            operands = tuple(dict.fromkeys(node.inputs))
            for value in operands:
                if value not in at:
                    own = {"module": owners.get(value, ())} if lane == UPDATE else {}
                    add(value, _shown(value, called[value], "input", **fields | own))
                    self._inputs[called[value]] = at[value]
            one = _shown(out, f"{node.op.name}_{len(self.nodes)}", node.op.name, **fields)
            one = replace(
                one,
                attrs=_attributes(node),
                operands=tuple(at[v] for v in operands),
                kernels=tuple(computed.get(out, ())),
                free=node.op.family in FREE,
            )
            add(out, one)
        for value, fates in leaves.items():  # of what was there before
            if value in at and at[value] < first:
                node = self.nodes[at[value]]
                more = dict.fromkeys((*node.leaves, *fates))
                self.nodes[at[value]] = replace(node, leaves=tuple(more))
        self._results.append([at.get(r.value, -1) for r in graph.results])

    def _given(self, section: Section) -> dict[Value, int]:
        """The inputs of a section that are nodes already."""
        found: dict[Value, int] = {}
        for param, source in zip(section.graph.params, section.inputs, strict=True):
            if isinstance(source, str):
                there = self._inputs.get(source, -1)
            else:
                there = self._results[source[0]][source[1]]
            if there >= 0:
                found[param.value] = there
        return found


def _leaves(section: Section, called: Mapping[Value, str]) -> dict[Value, tuple[str, ...]]:
    """What becomes of values when a section is over."""
    found: dict[Value, list[str]] = {}
    for result, fate in zip(section.graph.results, section.results, strict=True):
        if fate:
            found.setdefault(result.value, []).append(fate)
    for write in section.graph.writes:
        found.setdefault(write.value, []).append(f"writes {called[write.target]}")
    return {value: tuple(dict.fromkeys(texts)) for value, texts in found.items()}


def _shown(value: Value, name: str, op: str, **fields: object) -> PictureNode:
    t = value.type
    return PictureNode(name, op, str(t), t.shape, t.dtype.name, t.nbytes, **fields)


def _attributes(node: Node) -> str:
    """How a node reads in the IR, without the values: literals and attributes."""
    args = [print_arg(a) for a in node.args if not isinstance(a, Value)]
    for key, value in node.attrs:
        args.append(f"{key}={'…' if isinstance(value, Graph) else print_literal(value)}")
    return ", ".join(args)
