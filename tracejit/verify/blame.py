"""Where a wrong plan goes wrong: the first launch, the IR node, the user's line.

    a run that differed from eager → the stage whose output is wrong, given a right input
    kernels   the evaluator of the IR gives other results for the run's inputs than the plan did
    passes    it gives other results for the final graph than for the captured one
    inputs    a replay ran on other numbers than a trace of the same call reads, or another graph
    rules     the captured graph computes something else than eager: `rules.py` says which call
    effects   all that was computed is right, and something else was done with it

Each is a search for the first node that is wrong; nothing here changes the user's state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from tracejit.equality import EPS, array_of
from tracejit.ir.graph import Graph, Node, Param, Result, Value
from tracejit.ir.interp import evaluate
from tracejit.ir.magnitudes import magnitudes
from tracejit.ir.torch_types import TO_TORCH
from tracejit.ir.types import contiguous_strides
from tracejit.passes import optimize
from tracejit.pictures.kernels import computed_by
from tracejit.quotes import Place, quote, quoted
from tracejit.records import dataclass
from tracejit.runtime.executor import Executor
from tracejit.runtime.numpy_executor import NumpyExecutor
from tracejit.runtime.program import Program
from tracejit.schedule import schedule

_SECONDS = 30.0  # after which a search ends with what it has
_OFF = 64.0  # eps of its norm by which a value may be off
_SURELY = 2.0**14  # and by which one that is surely wrong is
_MOST = 400  # nodes of a graph that are tried one by one


@dataclass(frozen=True)
class Blame:
    """What went wrong.

    stage:   "kernels", "passes", "inputs", "rules" or "effects".
    what:    in one sentence.
    line:    the user's line, file:line; "" where none is known.
    node:    the IR node, as text.
    launch:  the launch that computes it, with the name of its kernel.
    graph:   the least graph that still goes wrong, as text, where one was found.
    free:    why eager's result is not the only right one; "" where it is.
    """

    stage: str
    what: str
    line: str = ""
    node: str = ""
    launch: str = ""
    graph: str = ""
    free: str = ""

    def __str__(self) -> str:
        parts = [f"{self.stage}: {self.what}"]
        parts += [f"the first wrong launch is {self.launch}"] if self.launch else []
        parts += [f"IR node {self.node}"] if self.node else []
        parts += [f"at {self.line}{quote(self.line) or quoted(self.line)}"] if self.line else []
        return "; ".join(parts)


def line_of(node: Node) -> str:
    """The user's line of a node, with its whole path where that is known."""
    where = node.where
    path = getattr(where, "file", "")
    if not (path and where):
        return str(where or "")
    line = Place(f"{path}:{where.rpartition(':')[2]}")
    line.code, line.offset = where.code, where.offset
    return line


def text_of(node: Node) -> str:
    """A node as the IR prints it, without its line."""
    args = ", ".join(repr(a) if isinstance(a, Value) else str(a) for a in node.args)
    return f"{node.out!r}: {node.out.type} = {node.op.name}({args})"


class Reference:
    """What the evaluator of the IR gives for every value of a graph, and the values' magnitudes."""

    def __init__(self, graph: Graph, inputs: Sequence[torch.Tensor | float]):
        arrays = [array_of(x) for x in inputs]
        nodes = [node for node in graph.nodes if not node.is_ordered]
        every = replace(graph, results=tuple(Result(n.out) for n in nodes), writes=())
        found = evaluate(every, arrays)[0]
        self.values: dict[Value, np.ndarray] = dict(zip((n.out for n in nodes), found, strict=True))
        params = (p.value for p in graph.params)
        self.values |= dict(zip(params, arrays, strict=True))
        self._sizes = magnitudes(every, arrays)

    def far(self, value: Value, a: np.ndarray | torch.Tensor | float, sure: bool) -> bool:
        """Whether something differs from a value by more than rounding; surely so, or at all."""
        size = float(np.linalg.norm(np.asarray(self._sizes.get(value, 0.0), np.float64)))
        return far(array_of(a), self.values[value], value, size, sure=sure)


def far(
    a: np.ndarray | float, b: np.ndarray | float, value: Value, size: float, *, sure: bool
) -> bool:
    """Whether two arrays for a value of some magnitude differ by more than rounding."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        return True
    if a.dtype.kind not in "fc":
        return not np.array_equal(a, b)
    with np.errstate(all="ignore"):
        finite = np.isfinite(b)
        if not np.array_equal(np.isfinite(a), finite):
            return True
        off = np.linalg.norm(np.where(finite, a - b, 0).ravel().astype(np.float64))
        norm = np.linalg.norm(np.where(finite, b, 0).ravel().astype(np.float64))
    eps = 2.0**-52 if value.type.is_host else EPS[TO_TORCH[value.type.dtype]]
    own, growth = (_SURELY, 16.0) if sure else (_OFF, 4.0)
    return bool(off > own * eps * norm + 1e-30 and (off > growth * eps * size or not size < np.inf))


# ---- kernels


def of_graphs(
    raw: Graph, program: Program, executor: Executor, inputs: Sequence[torch.Tensor | float]
) -> Blame | None:
    """Blame for what comes after capture: the kernels of a program, or the passes before it."""
    found = of_kernels(program, executor, inputs)
    return of_passes(raw, program.graph, inputs) if found is None else found


def of_kernels(
    program: Program, executor: Executor, inputs: Sequence[torch.Tensor | float]
) -> Blame | None:
    """Blame for a plan that computes something else than its graph says; None if it does not.

    The primitives are run one kernel each, then the cones of one node after another as they are
    fused, then the plan as it is: by the executor, and by numpy, which tells a printer's fault from
    a schedule's.
    """
    graph, ends = program.graph, time.monotonic() + _SECONDS
    right = Reference(graph, inputs)
    end = wrong_output(graph, inputs, right, executor)
    if end is None:
        return None
    executors = {"numpy": NumpyExecutor(), executor.name: executor}
    for name, make in executors.items():
        node = first_wrong_primitive(graph, inputs, right, make)
        if node is not None:
            by = "the schedule" if name == "numpy" else f"the printer for {name}"
            return _in_launch(program, node, f"{by} gets {node.op.name} wrong")
    for name, make in executors.items():
        node = wrong_output(graph, inputs, right, make)
        if node is None:
            continue
        found = first_wrong_cone(graph, inputs, right, make, ends)
        by = "the schedule" if name == "numpy" else f"what {name} makes of the schedule"
        if found is not None:
            node, cone = found
            blame = _in_launch(program, node, f"{by} is wrong where primitives are fused")
            return replace(blame, graph=str(cone.canonical()))
        return _in_launch(program, node, f"{by} is wrong in the plan as a whole")
    return _in_launch(program, end, "the plan is not wrong each time")


def first_wrong_primitive(
    graph: Graph,
    inputs: Sequence[torch.Tensor | float],
    right: Reference,
    executor: Executor,
) -> Node | None:
    """The first node that is wrong where each primitive is a kernel of its own."""
    nodes = [n for n in graph.nodes if not n.out.type.is_host and n.out in right.values]
    every = replace(graph, results=tuple(Result(n.out) for n in nodes), writes=())
    try:
        found = _run(every, inputs, executor, fuse=False)
    except Exception:  # what is wrong may not even run
        return None
    for sure in (True, False):  # what is off by rounding may come before what is wrong
        for node, tensor in zip(nodes, found, strict=True):
            if right.far(node.out, tensor, sure):
                return node
    return None


def first_wrong_cone(
    graph: Graph,
    inputs: Sequence[torch.Tensor | float],
    right: Reference,
    executor: Executor,
    ends: float,
) -> tuple[Node, Graph] | None:
    """The first node whose cone is wrong as it is fused, and that cone."""
    nodes = [n for n in graph.nodes if not n.out.type.is_host and n.out in right.values]
    if len(nodes) > _MOST:
        return None
    for node in nodes:
        if time.monotonic() > ends:
            return None
        cone = cone_of(graph, node.out)
        kept = {p.value for p in cone.params}
        given = [x for p, x in zip(graph.params, inputs, strict=True) if p.value in kept]
        try:
            tensor = _run(cone, given, executor, fuse=True)[0]
        except Exception:
            return node, cone
        if right.far(node.out, tensor, sure=False):
            return node, cone
    return None


def cone_of(graph: Graph, value: Value) -> Graph:
    """What computes one value of a graph."""
    needed, nodes = {value}, []
    for node in reversed(graph.nodes):
        if not needed.isdisjoint(node.outs):
            needed.update(node.inputs)
            nodes.append(node)
    params = tuple(p for p in graph.params if p.value in needed)
    return replace(
        graph, params=params, nodes=tuple(reversed(nodes)), results=(Result(value),), writes=()
    )


def wrong_output(
    graph: Graph,
    inputs: Sequence[torch.Tensor | float],
    right: Reference,
    executor: Executor,
) -> Node | None:
    """The node of the first result or write that the plan gets wrong."""
    copies = [laid_out(p, x) for p, x in zip(graph.params, inputs, strict=True)]
    pairs = zip(copies, inputs, strict=True)
    copies = [a.clone() if a is b and isinstance(a, torch.Tensor) else a for a, b in pairs]
    made = graph.producers()
    ends = [r.value for r in graph.results] + [w.value for w in graph.writes]
    found = _run(graph, copies, executor, fuse=True)
    position = {p.value: i for i, p in enumerate(graph.params)}
    found += [copies[position[w.target]] for w in graph.writes]
    for sure in (True, False):
        wrong = {v for v, t in zip(ends, found, strict=True) if right.far(v, t, sure)}
        if wrong:
            first = next((n.out for n in graph.nodes if n.out in wrong), None)
            return made.get(first) or graph.nodes[-1]
    return None


def _run(
    graph: Graph, inputs: Sequence[torch.Tensor | float], executor: Executor, *, fuse: bool
) -> list[torch.Tensor]:
    program = Program(schedule(graph, fuse=fuse), executor)
    pairs = zip(graph.params, inputs, strict=True)
    return program.function()([laid_out(p, x) for p, x in pairs])


def laid_out(param: Param, x: torch.Tensor | float) -> torch.Tensor | float:
    """An input with the strides that a plan reads it by; itself, if it has them."""
    if not isinstance(x, torch.Tensor):
        return x
    shape = param.value.type.shape
    strides = param.strides or contiguous_strides(shape)
    if x.stride() == tuple(strides) or not x.numel():
        return x
    size = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    memory = x.new_zeros(size)
    once = [min(n, 1) if step == 0 else n for n, step in zip(shape, strides, strict=True)]
    memory.as_strided(once, strides).copy_(x[tuple(slice(n) for n in once)])
    return memory.as_strided(shape, strides)


def _in_launch(program: Program, node: Node, what: str) -> Blame:
    """Blame for a node of the final graph, with the launch that computes it."""
    launch = ""
    try:
        numbers = computed_by(program.graph, program).get(node.out)
        if numbers:
            source = program.loaded.sources[numbers[0]]
            launch = f"{numbers[0]} ({source.name})"
    except Exception:  # a wrong plan may not be told apart
        launch = ""
    return Blame("kernels", what, line_of(node), text_of(node), launch)


# ---- passes


def of_passes(raw: Graph, final: Graph, inputs: Sequence[torch.Tensor | float]) -> Blame | None:
    """Blame for a final graph that computes something else than the captured one."""
    arrays = [array_of(x) for x in inputs]
    if not _differ(raw, final, arrays):
        return None
    stages: list[tuple[str, Graph]] = [("", raw)]
    optimize(raw, lambda name, graph: stages.append((name, graph)))
    pairs = zip(stages, stages[1:], strict=False)
    steps = [
        (name, before) for (_, before), (name, after) in pairs if _differ(before, after, arrays)
    ]
    name, before = steps[0] if steps else ("the bodies of loops", raw)
    ends = time.monotonic() + _SECONDS
    for node in before.nodes[:_MOST]:
        if node.out.type.is_host or node.is_ordered or time.monotonic() > ends:
            continue
        cone = cone_of(before, node.out)
        kept = {p.value for p in cone.params}
        given = [x for p, x in zip(before.params, arrays, strict=True) if p.value in kept]
        if _differ(cone, optimize(cone), given):
            what = f"the pass {name} changes what is computed"
            return Blame("passes", what, line_of(node), text_of(node), graph=str(cone.canonical()))
    what = f"the pass {name} changes what is computed or written"
    right, made = Reference(before, arrays), before.producers()
    after = dict([("the bodies of loops", final), *stages])[name]
    ends = [r.value for r in before.results] + [w.value for w in before.writes]
    for v, x in zip(ends, sum(evaluate(after, arrays), []), strict=False):
        if right.far(v, x, sure=False) and v in made:
            return Blame("passes", what, line_of(made[v]), text_of(made[v]))
    return Blame("passes", what)


def _differ(a: Graph, b: Graph, arrays: Sequence) -> bool:
    right = Reference(a, arrays)
    ends = [r.value for r in a.results] + [w.value for w in a.writes]
    found = sum(evaluate(b, arrays), [])
    return len(ends) != len(found) or any(
        right.far(v, x, sure=False) for v, x in zip(ends, found, strict=True)
    )


# ---- inputs


def of_inputs(
    fresh: Callable[[], tuple[Graph, Sequence[torch.Tensor | float | None]] | None],
    raw: Graph,
    inputs: Sequence[torch.Tensor | float],
    names: Sequence[str],
) -> Blame | None:
    """Blame for a replay of a graph that a trace of the same call does not give, or on other
    inputs. `fresh` makes that trace."""
    now = fresh()
    if now is None:
        return None
    graph, given = now
    for a, b in zip(raw.nodes, graph.nodes, strict=False):
        literals = [x for x in a.args if not isinstance(x, Value)]
        others = [x for x in b.args if not isinstance(x, Value)]
        same = (a.op.name, a.attrs, a.out.type) == (b.op.name, b.attrs, b.out.type)
        if len(literals) != len(others):  # some of its literals have become scalars
            continue
        if not same or repr(literals) != repr(others):
            what = "the replay is of another graph than the step would be now: a stale guard"
            return Blame("inputs", what, line_of(b), f"{text_of(a)}, now {text_of(b)}")
    if len(raw.nodes) != len(graph.nodes):
        longer = max((raw, graph), key=lambda g: len(g.nodes))
        node = longer.nodes[min(len(raw.nodes), len(graph.nodes))]
        what = "the replay is of another graph than the step would be now: a stale guard"
        return Blame("inputs", what, line_of(node), text_of(node))
    if len(given) != len(inputs):
        return None
    for i, (a, b) in enumerate(zip(inputs, given, strict=True)):
        if b is None:
            continue
        value = raw.params[i].value
        same = type(a) is type(b) and np.array_equal(array_of(a), array_of(b), equal_nan=True)
        if not same:
            name = names[i] if i < len(names) else f"input {i}"
            reader = next((n for n in raw.nodes if value in n.inputs), None)
            said = f"{a!r}, now {b!r}" if isinstance(a, float) else "another tensor"
            what = f"the replay took {name} to be {said}"
            if reader is None:
                return Blame("inputs", what)
            return Blame("inputs", what, line_of(reader), text_of(reader))
    return None
