"""Which kernels compute which values of a graph.

A schedule gives what a kernel computes the numbers of the graph's values, as far as there are any.
What the CPU's passes make of its launches has other numbers here and there; but it writes the same
buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tracejit.ir.graph import Graph, Node, Value
from tracejit.records import dataclass
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
from tracejit.schedule.plan import Launch, Plan
from tracejit.schedule.tasks import RUNNING
from tracejit.schedule.traffic import bound

FREE = ("movement", "source", "order")  # families of primitives that no kernel is needed for
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
    launches = [one for launch in plan.launches for one in launch.alone()]
    parts = [set(_numbered(made, one.kernel)) for one in launches]
    _add_placed(graph, plan, launches, parts)
    loops = _loops(graph, plan)
    for one, values in zip(launches, parts, strict=True):
        if one.loop in loops:
            values.add(loops[one.loop])
    writes = [_writes(one.kernel, one.buffers) for one in launches]
    found: dict[Value, list[int]] = {}
    for number, source in enumerate(running(program)):
        values = {v for kernel in source.kernels for v in _numbered(made, kernel)}
        for written, some in zip(writes, parts, strict=True):
            if written & source.writes:
                values |= some
        for value in values:
            found.setdefault(value, []).append(number)
    return found


def _writes(kernel: Kernel, buffers: tuple[str, ...]) -> frozenset[str]:
    if kernel.call is not None:
        return frozenset(buffers[-1:])
    pairs = zip(kernel.buffers, buffers, strict=False)  # what it works in besides comes last
    return frozenset(name for b, name in pairs if "w" in b.access)


def _add_placed(
    graph: Graph, plan: Plan, launches: Sequence[Launch], parts: Sequence[set[Value]]
) -> None:
    """Add what has no variable of its own: loads and stores at places that are computed, sums in
    order, calls of the host. They are known by line and by the shape of the memory; by the line
    alone where only a part of that is read."""
    places = [_places(plan, one) for one in launches]
    for node in graph.nodes:
        name, shape = node.op.name, node.out.type.shape
        if name == "gather":
            shape = node.inputs[0].type.shape
        here = [k for k, (lines, of) in enumerate(places) if node.where in lines and name in of]
        exact = [k for k in here if shape in places[k][1][name]]
        for k in exact or here:
            parts[k].add(node.out)


def _places(plan: Plan, launch: Launch) -> tuple[set[str], dict[str, set[tuple[int, ...]]]]:
    """The lines of a launch, and the shapes of the memory that it gathers from, scatters to, sums
    up in; of what the host computes."""
    kernel = launch.kernel
    shapes = {b.name: b.type.shape for b in plan.buffers}
    if kernel.call is not None:
        return {kernel.call.where}, {kernel.call.op.name: {shapes[launch.buffers[-1]]}}
    of = {b.name: shapes[n] for b, n in zip(kernel.buffers, launch.buffers, strict=True)}
    found: dict[str, set[tuple[int, ...]]] = {}
    for stage in kernel.stages:
        for s in stage.body:
            if stage.in_order and isinstance(s, Store):
                for name in RUNNING:
                    found.setdefault(name, set()).add(of[s.buffer])
    for s in kernel.statements:
        if isinstance(s, Load) and _computed(s.index):
            found.setdefault("gather", set()).add(of[s.buffer])
        elif isinstance(s, Store) and (s.fold or _computed(s.index)):
            found.setdefault("scatter", set()).add(of[s.buffer])
    return set(kernel.lines), found


def _loops(graph: Graph, plan: Plan) -> dict[int, Value]:
    """The loop that each scan of a graph became. Those at one line are in the same order."""
    lines: dict[int, set[str]] = {}
    for launch in plan.launches:
        if launch.loop is not None:
            lines.setdefault(launch.loop, set()).update(launch.kernel.lines)
    found: dict[int, Value] = {}
    for node in graph.nodes:
        if node.op.name == "scan":
            free = (n for n in lines if n not in found and node.where in lines[n])
            number = next(free, None)
            if number is not None:
                found[number] = node.out
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
            if node is None or node.op.family in FREE:
                continue
            if (node.op.name, node.where) == (name, s.where):
                yield node.out


def _computed(index: Index) -> bool:
    """Whether a place depends on a value."""
    return any(
        isinstance(atom, Var) or (isinstance(atom, FloorDiv | Mod) and _computed(atom.index))
        for atom, _ in index.terms
    )
