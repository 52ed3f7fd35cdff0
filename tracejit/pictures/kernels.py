"""Which kernels compute which values of a graph.

A schedule gives what a kernel computes the numbers of the graph's values, as far as there are any.
What the CPU's passes make of its launches has other numbers here and there; but it writes the same
buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tracejit.ir.graph import Graph, Node, Value
from tracejit.runtime.program import Program
from tracejit.schedule.kernel import (
    Attend,
    Compute,
    Dot,
    FloorDiv,
    Index,
    Kernel,
    Load,
    Mod,
    Reduce,
    Sort,
    Store,
    Var,
)
from tracejit.schedule.plan import Launch, PlanBuffer
from tracejit.schedule.traffic import bound

FREE = ("movement", "source")  # families of primitives that no kernel is needed for
_OF_DOT, _OF_SORT = "matmul", "argsort"


@dataclass(frozen=True)
class Running:
    """What one source of a program runs: kernels with plain sizes, and what the plan calls the
    buffers that they write. `launched`: it is one of the plan's launches."""

    kernels: tuple[Kernel, ...]
    writes: frozenset[str]
    launched: bool


def running(program: Program) -> list[Running]:
    """Of each source of a program, in order."""
    cpu = getattr(program.loaded, "plan", None)
    if not hasattr(cpu, "calls"):
        launches = program.plan.launches
        whole = len(launches) == len(program.loaded.sources)  # numpy runs parts one by one
        if not whole:
            launches = [one for launch in launches for one in launch.alone()]
        return [_of_launch(launch, whole=whole) for launch in launches]
    found = []
    for call in cpu.calls:
        kernel = cpu.kernels[call.kernel]
        both = [kernel, *([] if kernel.columns is None else [kernel.columns])]
        writes = _writes(kernel.kernel, call.buffers)
        if kernel.columns is not None:
            names = dict(zip((b.name for b in kernel.bound), call.buffers, strict=True))
            outs = (names.get(b.name) for b in kernel.columns.kernel.buffers if "w" in b.access)
            writes |= {name for name in outs if name is not None}
        found.append(Running(tuple(one.kernel for one in both), writes, launched=False))
    return found


def _of_launch(launch: Launch, *, whole: bool) -> Running:
    kernels = tuple(bound(one)[0] for one in launch.alone())
    return Running(kernels, _writes(launch.kernel, launch.buffers), launched=whole)


def computed_by(graph: Graph, program: Program) -> dict[Value, list[int]]:
    """For each value that kernels compute, the numbers of the sources that do."""
    plan, made = program.plan, {node.out.id: node for node in graph.nodes}
    buffers = {b.name: b for b in plan.buffers}
    parts = [
        (_writes(one.kernel, one.buffers), _values(graph, made, one, buffers))
        for launch in plan.launches
        for one in launch.alone()
    ]
    found: dict[Value, list[int]] = {}
    for number, source in enumerate(running(program)):
        values = {v for kernel in source.kernels for v in _numbered(made, kernel)}
        for writes, some in parts:
            if writes & source.writes:
                values |= some
        for value in values:
            found.setdefault(value, []).append(number)
    return found


def _writes(kernel: Kernel, buffers: tuple[str, ...]) -> frozenset[str]:
    if kernel.call is not None:
        return frozenset(buffers[-1:])
    pairs = zip(kernel.buffers, buffers, strict=False)  # what it works in besides comes last
    return frozenset(name for b, name in pairs if "w" in b.access)


def _values(
    graph: Graph, made: Mapping[int, Node], launch: Launch, buffers: Mapping[str, PlanBuffer]
) -> set[Value]:
    """The values that a launch computes."""
    kernel = launch.kernel
    found = set(_numbered(made, kernel))
    if kernel.call is not None:
        name, where = kernel.call.op.name, kernel.call.where
        return {n.out for n in graph.nodes if n.op.name == name and n.where == where}
    shapes = {
        b.name: buffers[name].type.shape
        for b, name in zip(kernel.buffers, launch.buffers, strict=True)
    }
    lines = set(kernel.lines)
    looked_up = {
        shapes[s.buffer] for s in kernel.statements if isinstance(s, Load) and _computed(s.index)
    }
    stored = {
        shapes[s.buffer]
        for s in kernel.statements
        if isinstance(s, Store) and (s.fold or _computed(s.index))
    }
    for node in graph.nodes:
        if node.where not in lines:
            continue
        gathers = node.op.name == "gather" and node.inputs[0].type.shape in looked_up
        scatters = node.op.name == "scatter" and node.out.type.shape in stored
        if gathers or scatters or (node.op.name == "scan" and launch.loop is not None):
            found.add(node.out)
    return found


def _numbered(made: Mapping[int, Node], kernel: Kernel) -> Iterator[Value]:
    """The values that are computed under their own number, by their own operation."""
    for s in kernel.statements:
        match s:
            case Compute() | Reduce():
                results = [(s.op.name, s.out)]
            case Dot():
                results = [(_OF_DOT, s.out)]
            case Sort():
                results = [(_OF_SORT, s.out)]
            case Attend():
                results = [(op.name, out) for op, out in s.results]
            case _:
                continue
        for name, out in results:
            node = made.get(out.id)
            if node is not None and (node.op.name, node.where) == (name, s.where):
                yield node.out


def _computed(index: Index) -> bool:
    """Whether a place depends on a value."""
    return any(
        isinstance(atom, Var) or (isinstance(atom, FloorDiv | Mod) and _computed(atom.index))
        for atom, _ in index.terms
    )
