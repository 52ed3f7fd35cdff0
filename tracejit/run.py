"""What a call does once its plan is known, as one generated Python function.

In: what was captured, and its program. Out: a `Run`, straight lines that check indices, compute the
host's numbers, take memory for the outputs, run the plan and commit the effects. First runs, reruns
and replays all go through it. An exception leaves everything as before, or comes after all is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tracejit.capture.effects.captured import Captured
from tracejit.capture.effects.commit import commit_lines, may_repeat, reusable_gradients
from tracejit.capture.effects.effects import Call
from tracejit.capture.proof.guards import Armed, Guard, Places
from tracejit.ir.graph import Graph
from tracejit.ir.hostcode import HostCode, host_names
from tracejit.runtime.interrupts import uninterrupted
from tracejit.runtime.program import Program

# (outside tensors, runtime scalars, the tensors' addresses, the call) -> the result
Function = Callable[[list, list, list, Call], object]


@dataclass
class Hooks:
    """`observer(final graph, inputs, outputs)` is called before a plan runs. It returns a function,
    which is called after the commit."""

    observer: Callable | None = None


@dataclass(frozen=True)
class Run:
    """What calls of one captured step do."""

    function: Function
    text: str


@dataclass(frozen=True)
class Replay:
    """An armed replay of something compiled: its guard, the run for calls that the guard accepts,
    and the `Call` with all objects that a replay needs besides tensors and scalars."""

    guard: Guard
    guard_text: str
    run: Run
    compiled: object
    call: Call


def generate(
    captured: Captured,
    program: Program,
    final: Graph,
    backwards: list,
    hooks: Hooks,
    armed: Armed | None = None,
    *,
    checking: Callable | None = None,
) -> Run:
    """The function of a captured step: of traced calls, or of replays where `armed` is given.

    A replay makes the calls again that the trace made untraced (a scheduler's step), and uses
    the numbers that its guard has read. `checking(inputs, errors)` raises one of the errors of
    the step's checks; it is asked before anything is written.
    """
    places = None if armed is None else armed.places
    names = host_names() | {
        **{"final": final, "hooks": hooks, "backwards": backwards, "places": places},
        **{"uninterrupted": uninterrupted, "after": armed and armed.after},
    }
    before = []
    for i, bound in enumerate(captured.bounds):
        names[f"bound{i}"] = bound
        before.append(f"bound{i}.check(reals)")
    if names["after"] is not None:
        before.append("after(scalars)")  # once indices are known to be right
    if captured.checks is not None:
        names |= {"checking": checking, "errors": captured.checks.errors}
        check = f"checking([{_inputs(captured.checks.sources)}], errors)"
        sources = captured.checks.sources
        late = any(k == "scalar" and captured.paths[i][0] == "after" for k, i in sources)
        before.insert(len(before) if late else len(captured.bounds), check)
    reusable = reusable_gradients(captured)
    if reusable is not None:
        names["reusable_gradients"] = reusable
        before.append("reusable = reusable_gradients(reals)")
    code = HostCode()
    scalars = {v: f"scalars[{i}]" for i, v in enumerate(captured.scalars)}
    host = code.add(captured.host_nodes, captured.effects.host, scalars)
    params = [
        f"{'addresses' if kind == 'tensor' else 'scalars'}[{i}]" for kind, i in captured.sources
    ]
    run, outputs = program.inlined(params, "()" if reusable is None else "reusable", code)
    names |= run.names
    commit = commit_lines(
        captured,
        outputs,
        host,
        cell=lambda i: _cell(places, i),
        grad_on=armed is not None and torch.is_grad_enabled(),
        names=names,
    )
    if places is not None and captured.effects.host_writes:
        before.append("cells = places.cells")
    before += [
        *code.lines,
        *run.gather,
        "seen = hooks.observer",
        "if seen is not None:",
        f"    seen = seen(final, [{_inputs(captured.sources)}], [{', '.join(outputs)}])",
    ]
    lines = ["try:", *_indented(before), "except BaseException:", "    call.undo()", "    raise"]
    work = [run.run, *commit]
    if run.ran is None or not may_repeat(captured.effects):
        lines += ["with uninterrupted():", *_indented(work)]
    else:
        again = [f"if {run.ran}:", "    with uninterrupted():", *_indented(_indented(commit))]
        again += ["else:", "    call.undo()", "raise"]
        lines += ["try:", *_indented(work), "except BaseException:", *_indented(again)]
    lines += ["if seen is not None:", "    seen()", "return returned"]
    text = "\n".join(["def perform(reals, scalars, addresses, call):", *_indented(lines), ""])
    exec(compile(text, "<tracejit run>", "exec"), names)
    return Run(names.pop("perform"), text)


def _inputs(sources: Sequence[tuple[str, int]]) -> str:
    """The inputs of a graph, by where they come from."""
    return ", ".join(f"{'reals' if kind == 'tensor' else 'scalars'}[{i}]" for kind, i in sources)


def _cell(places: Places | None, index: int) -> str | None:
    cell = None if places is None else places.cell(index)
    return None if cell is None else f"cells[{cell}]"


def _indented(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]
