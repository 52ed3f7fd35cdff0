"""Replays: what a call does once a guard has accepted it, as one generated Python function.

In: what was captured, the guard that was armed for it, its program. Out: `Replay.run`, straight
lines that check indices, compute the host's numbers, take memory for the outputs, run the plan and
commit its effects. An exception leaves everything as before, or comes after all is done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tracejit.capture.captured import Captured
from tracejit.capture.commit import commit_lines, leaver
from tracejit.capture.guards import Armed, Guard
from tracejit.ir.graph import Graph
from tracejit.ir.hostcode import HostCode, host_names
from tracejit.runtime.interrupts import uninterrupted
from tracejit.runtime.program import Program

# (outside tensors, runtime scalars, the tensors' addresses), as a guard finds them -> the result
Run = Callable[[list, list, list], object]


@dataclass(frozen=True)
class Replay:
    """An armed replay of something compiled: its guard, and `run` for what the guard found."""

    guard: Guard
    run: Run
    compiled: object
    guard_text: str
    text: str  # of `run`


def replay(
    armed: Armed,
    compiled: object,
    captured: Captured,
    program: Program,
    final: Graph,
    backwards: list,
    step: object,
) -> Replay:
    """The replay of a captured step.

    step: where a function (final, inputs, outputs) may be as `observer`, else None. It is called
        before the plan runs, and what it returns after the commit.
    """
    names = host_names() | {
        "after": armed.after,
        "backwards": backwards,
        "final": final,
        "places": armed.places,
        "step": step,
        "uninterrupted": uninterrupted,
    }
    lines = []
    for i, bound in enumerate(captured.bounds):
        names[f"bound{i}"] = bound
        lines.append(f"bound{i}.check(reals)")
    if armed.after is not None:
        lines.append("after(scalars)")
    leaving = leaver(captured)
    if leaving is not None:
        names["leaver"] = leaving
        lines.append("leaving = leaver(reals)")
    code = HostCode()
    scalars = {v: f"scalars[{i}]" for i, v in enumerate(captured.scalar_values)}
    host = code.add(captured.host_nodes, captured.host_results, scalars)
    params = [
        f"{'addresses' if kind == 'tensor' else 'scalars'}[{i}]" for kind, i in captured.sources
    ]
    run, outputs = program.inlined(params, "()" if leaving is None else "leaving", code)
    names |= run.names
    commit = commit_lines(captured, outputs, host, armed.places, names)
    inputs = [f"{'reals' if kind == 'tensor' else 'scalars'}[{i}]" for kind, i in captured.sources]
    lines += [
        *code.lines,
        *run.gather,
        *(["cells = places.cells"] if captured.host_writes else []),
        "seen = step.observer",
        "if seen is not None:",
        f"    seen = seen(final, [{', '.join(inputs)}], [{', '.join(outputs)}])",
    ]
    if run.ran is None:
        lines += ["with uninterrupted():", *_indented([run.run, *commit])]
    else:
        again = [f"if {run.ran}:", "    with uninterrupted():", *_indented(_indented(commit))]
        lines += ["try:", *_indented([run.run, *commit])]
        lines += ["except BaseException:", *_indented([*again, "raise"])]
    lines += ["if seen is not None:", "    seen()", "return returned"]
    body = "\n".join(_indented(lines))
    text = f"def replay(reals, scalars, addresses):\n{body}\n"
    exec(compile(text, "<tracejit replay>", "exec"), names)
    return Replay(armed.guard, names["replay"], compiled, armed.text, text)


def _indented(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]
