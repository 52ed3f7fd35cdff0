"""Smaller and smaller programs and graphs that still go wrong in the same way.

    a Program that goes wrong → one call, or few, of small tensors → its graph, of few nodes

What goes wrong is a symptom: "differs", "raises KeyError in lower", "dies by SIGSEGV", "hangs". A
candidate is kept if it has the same one; it is tried in a child process, since it may crash there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from tracejit.capture.capture import capture_call
from tracejit.equality import array_of
from tracejit.errors import (
    OF_EAGER,
    BackendUnavailable,
    CannotFallBack,
    DerivativeError,
    DtypeError,
    LeakedTracer,
    ReplayNotArmed,
    SideEffectError,
    UnsupportedOperation,
    ValueDependentError,
)
from tracejit.ir.graph import Graph, Param, Result
from tracejit.ir.text import parse
from tracejit.ir.torch_types import TO_TORCH
from tracejit.passes import dce, optimize
from tracejit.records import dataclass
from tracejit.runtime.program import Program as Loaded
from tracejit.runtime.select import executor_for
from tracejit.schedule import schedule
from tracejit.verify.blame import Reference, laid_out
from tracejit.verify.children import Ended, in_child
from tracejit.verify.recording import Call, Program

DIFFERS = "differs"
_REFUSALS = (UnsupportedOperation, ValueDependentError, LeakedTracer, SideEffectError)
_REFUSALS += (CannotFallBack, ReplayNotArmed, BackendUnavailable, DtypeError, DerivativeError)
_REFUSED = {kind.__name__ for kind in (*OF_EAGER, *_REFUSALS)}
_HARNESS = ("testing.py", "equality.py")
_PATIENCE = 60.0  # seconds for one candidate
_SMALL = (1, 2, 3)  # sizes that are tried in place of a size


@dataclass(frozen=True)
class Judge:
    """Says what goes wrong with a program or graph, and for how long there is time to ask.

    options: passed to `tracejit.compile`, without what it does where it refuses.
    ends:    by `time.monotonic`, when the search is to end.
    check:   raises AssertionError for a step that differs from eager: (step, arguments, …).
    """

    options: dict
    ends: float
    check: Callable

    def late(self) -> bool:
        """Whether the search is to end with what it has."""
        return time.monotonic() > self.ends

    def of_program(self, program: Program, arguments: Sequence[torch.Tensor] | None = None) -> str:
        """The symptom of a program; "" where it has none, or eager refuses it."""
        text, options = program.text(), self.options
        given = program.arguments() if arguments is None else list(arguments)

        def work() -> str:
            step = compiled_text(text)
            try:
                step(*[copy_of(x) for x in given])
            except Exception:
                return ""
            self.check(step, lambda: given, calls=1, on_unsupported="raise", **options)
            return ""

        return symptom(in_child(work, _PATIENCE))

    def of_graph(self, graph: Graph, inputs: Sequence[np.ndarray | float]) -> str:
        """The symptom of a captured graph: what its plan gives, against the evaluator of the IR."""
        return symptom(in_child(lambda: self._differs(graph, inputs) * DIFFERS, _PATIENCE))

    def _differs(self, graph: Graph, inputs: Sequence[np.ndarray | float]) -> bool:
        given = self.options["backend"], self.options["fuse"]
        try:
            right = _reference(graph, inputs)
        except Exception:  # it is no graph
            return False
        return graph_differs(graph, inputs, *given, right=right)


def graph_differs(
    graph: Graph,
    inputs: Sequence[np.ndarray | float],
    backend: str = "auto",
    fuse: bool = True,
    *,
    right: Reference | None = None,
) -> bool:
    """Whether the plan of a captured graph gives something else than the evaluator of the IR. A
    minimal program that is a graph asks this."""
    right = right or _reference(graph, inputs)
    plan = schedule(optimize(graph), fuse=fuse)
    copies = [
        x if isinstance(x, float) else laid_out(p, x.clone())
        for p, x in zip(graph.params, _tensors(graph, inputs), strict=True)
    ]
    found = Loaded(plan, executor_for(backend, "cpu", "highest")).function()(copies)
    target = {p.value: x for p, x in zip(graph.params, copies, strict=True)}
    found = [*found, *(target[w.target] for w in graph.writes)]
    ends = [r.value for r in graph.results] + [w.value for w in graph.writes]
    return any(right.far(v, x, sure=True) for v, x in zip(ends, found, strict=True))


def _reference(graph: Graph, inputs: Sequence[np.ndarray | float]) -> Reference:
    return Reference(graph, _tensors(graph, inputs))


def _tensors(graph: Graph, inputs: Sequence[np.ndarray | float]) -> list[torch.Tensor | float]:
    return [
        x
        if isinstance(x, float)
        else torch.from_numpy(np.array(x)).to(TO_TORCH[p.value.type.dtype])
        for p, x in zip(graph.params, inputs, strict=True)
    ]


def symptom(ended: Ended) -> str:
    """What a child's end says."""
    if ended.died:
        return ended.died
    error = ended.raised
    if error is None:
        return str(ended.value)
    if is_refusal(error.kind):
        return ""
    if error.kind == "AssertionError" and error.file in _HARNESS:
        return DIFFERS
    if error.module in _HARNESS:  # eager, or its run in float64
        return ""
    return f"raises {error.kind} in {error.function}"


def is_refusal(kind: str) -> bool:
    """Whether errors of a class say what a step may not do: they are no fault of ours."""
    return kind in _REFUSED


def compiled_text(text: str, file: str = "<the program>", line: int = 1) -> Callable:
    """The function of a program's text, which begins in a line of a file."""
    space: dict[str, object] = {"torch": torch, "__name__": "minimal"}
    exec(compile("\n" * (line - 1) + text, file, "exec"), space)
    return space["step"]


def copy_of(t: torch.Tensor) -> torch.Tensor:
    """An input once more."""
    return t.detach().clone().requires_grad_(t.requires_grad)


# ---- programs


def smallest(
    program: Program, known: str, judge: Judge, lines: Sequence[str]
) -> tuple[Program, str] | None:
    """A small program with the symptom of all of it, and that; None where there is none. `known` is
    the step's symptom. Calls of `lines` are tried first."""
    whole = judge.of_program(program)
    wanted = whole or known
    for candidate in singles(program, lines):
        if judge.late():
            break
        if judge.of_program(candidate) == wanted:
            return smaller_sizes(candidate, wanted, judge), wanted
    if not whole:
        return None
    return smaller_sizes(fewer_calls(program, wanted, judge), wanted, judge), wanted


def singles(program: Program, lines: Sequence[str]) -> Iterator[Program]:
    """Each call alone, with its derivative where it has one, those of `lines` first."""
    calls = sorted(program.calls, key=lambda call: call.line not in lines)
    seen: set[tuple] = set()
    for call in calls:
        key = call.text, *(_like(program.values[v]) for v in call.uses)
        if key in seen or not (call.uses or call.gives) or ".backward(" in call.text:
            continue
        seen.add(key)
        yield program.of([call])
        derived = with_derivative(program, call)
        if derived is not None:
            yield derived


def with_derivative(program: Program, call: Call) -> Program | None:
    """A call, and a backward from what it gives."""
    given = next((v for v in call.gives if v is not None and v in program.leaves), None)
    if given is None or not call.grad or not program.leaves.intersection(call.uses):
        return None
    back = Call("{0}.backward(torch.ones_like({0}))", (given,), (), line=call.line)
    return program.of([call, back])


def _like(t: torch.Tensor) -> tuple:
    return tuple(t.shape), t.dtype


def fewer_calls(program: Program, wanted: str, judge: Judge) -> Program:
    """Delta debugging: chunks of calls are left out, and what they gave becomes an input; then a
    call's result is replaced by one of its operands."""
    size = max(len(program.calls) // 2, 1)
    while not judge.late():
        at, calls = 0, program.calls
        while at < len(program.calls) and not judge.late():
            calls = program.calls
            candidate = program.of([*calls[:at], *calls[at + size :]])
            if candidate.calls and judge.of_program(candidate) == wanted:
                program = candidate
            else:
                at += size
        if size == 1:
            break
        size = max(size // 2, 1)
    changed = True
    while changed and not judge.late():
        changed = False
        for number in range(len(program.calls)):
            for candidate in bridged(program, number):
                if judge.of_program(candidate) == wanted:
                    program, changed = candidate, True
                    break
            if changed:
                break
    return program


def bridged(program: Program, number: int) -> Iterator[Program]:
    """The program without a call, whose result is one of its operands instead."""
    call = program.calls[number]
    if len(call.gives) != 1 or call.gives[0] is None:
        return
    given = call.gives[0]
    for v in call.uses:
        if _like(program.values[v]) == _like(program.values[given]):
            rest = [
                replace(c, uses=tuple(v if u == given else u for u in c.uses))
                for i, c in enumerate(program.calls)
                if i != number
            ]
            yield program.of(rest)


def smaller_sizes(program: Program, wanted: str, judge: Judge) -> Program:
    """The program with smaller inputs: sizes that are equal become smaller together."""
    sizes = sorted({n for v in program.inputs for n in program.values[v].shape}, reverse=True)
    for n in sizes:
        for few in _SMALL:
            if few >= n or judge.late():
                break
            values = {v: _cut(program.values[v], n, few) for v in program.inputs}
            candidate = replace(program, values=program.values | values)
            if judge.of_program(candidate) == wanted:
                program = candidate
                break
    return program


def _cut(t: torch.Tensor, n: int, few: int) -> torch.Tensor:
    cut = t[tuple(slice(few) if size == n else slice(None) for size in t.shape)]
    return cut.clone(memory_format=torch.contiguous_format)


# ---- graphs


def graph_of(
    of: Program | Callable, file: str = "", line: int = 1
) -> tuple[str, list[np.ndarray | float]]:
    """The captured graph of a program, or a step without arguments, as text, and its inputs; ""
    where there is none. The program's text begins in a `line` of a file."""

    def work() -> tuple:
        program = isinstance(of, Program)
        step = compiled_text(of.text(), file, line) if program else of
        done = capture_call(step, tuple(of.arguments()) if program else (), {})
        lists = {"tensor": done.call.reals, "scalar": done.call.scalars}
        inputs = [
            lists[kind][i] if kind in lists else _drawn(p)
            for p, (kind, i) in zip(done.captured.graph.params, done.captured.sources, strict=True)
        ]
        arrays = [float(x) if isinstance(x, float) else array_of(x) for x in inputs]
        return str(done.captured.graph), arrays

    ended = in_child(work, _PATIENCE)
    return ended.value if ended.value is not None else ("", [])


def _drawn(p: Param) -> torch.Tensor:
    kind = p.value.type
    return torch.zeros(kind.shape, dtype=TO_TORCH[kind.dtype])


def smallest_graph(
    text: str, inputs: Sequence[np.ndarray | float], judge: Judge
) -> tuple[str, list[np.ndarray | float], str]:
    """The least graph whose plan goes wrong as that of a captured one does, its inputs, and the
    symptom; that is "" where the plan is right for what was captured."""
    graph, given = parse(text), list(inputs)
    wanted = judge.of_graph(graph, given)
    if not wanted:
        return text, given, ""
    ends = [(r, None) for r in graph.results] + [(None, w) for w in graph.writes]
    if len(ends) > 1:
        for r, w in ends:
            one = replace(graph, results=(r,) if r else (), writes=(w,) if w else ())
            one, few = _used(one, given)
            if judge.of_graph(one, few) == wanted:
                graph, given = one, few
                break
    changed = True
    while changed and not judge.late():
        changed = False
        for candidate, few in _without_a_node(graph, given):
            if judge.of_graph(candidate, few) == wanted:
                graph, given, changed = candidate, few, True
                break
    return str(graph.canonical()), given, wanted


def _without_a_node(graph: Graph, inputs: list) -> Iterator[tuple[Graph, list]]:
    """Graphs in which a value is an input, or the last node is left out."""
    right = _reference(graph, inputs)
    ends = {r.value for r in graph.results} | {w.value for w in graph.writes}
    for node in reversed(graph.nodes):
        if node.is_ordered or len(node.outs) != 1:
            continue
        out = node.out
        if out in ends:  # what it is computed from is returned instead
            for value in node.inputs:
                if not value.type.is_host and not graph.writes:
                    one = replace(graph, results=(Result(value),))
                    if value in {n.out for n in graph.nodes}:
                        yield _used(one, inputs)
            continue
        x = right.values.get(out)
        if x is None:
            continue
        x = float(x) if out.type.is_host else np.ascontiguousarray(x)
        nodes = tuple(n for n in graph.nodes if n is not node)
        params = (*graph.params, Param(out))
        yield _used(replace(graph, nodes=nodes, params=params), [*inputs, x])


def _used(graph: Graph, inputs: list) -> tuple[Graph, list]:
    """A graph without nodes and params that nobody reads."""
    graph = dce(graph)
    read = {v for n in graph.nodes for v in n.inputs} | {r.value for r in graph.results}
    read |= {v for w in graph.writes for v in (w.target, w.value)}
    pairs = [(p, x) for p, x in zip(graph.params, inputs, strict=True) if p.value in read]
    return replace(graph, params=tuple(p for p, _ in pairs)), [x for _, x in pairs]
