"""What a call does once a guard has accepted it, or once its trace has come to a known end, as one
generated Python function.

In: what was captured, its program, the guard that was armed for it. Out: `Replay.run` and
`Rerun.run`, straight lines that check indices, compute the host's numbers, take memory for the
outputs, run the plan and commit its effects. An exception leaves everything as before, or comes
after all is done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tracejit.capture.effects.captured import Captured
from tracejit.capture.effects.commit import commit_lines, is_odd, leaver
from tracejit.capture.proof.guards import Armed, Guard, Places
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
    names = {"after": armed.after, "backwards": backwards, "places": armed.places}
    before, end = _lines(captured, program, final, step, armed.places, names)
    if armed.after is not None:
        before.insert(len(captured.bounds), "after(scalars)")  # once indices are known to be right
    if captured.host_writes:
        before.append("cells = places.cells")
    text = _text("replay(reals, scalars, addresses)", [*before, *end])
    return Replay(armed.guard, _made(text, names), compiled, armed.text, text)


@dataclass(frozen=True)
class Rerun:
    """What a call does whose trace has come to a known end.

    run: (outside tensors, runtime scalars, the tensors' addresses, the tree to return, what is
        stored, undo) -> the result. `undo` is called if nothing has been written when it fails.
    """

    run: Callable[[list, list, list, object, tuple, Callable], object]
    compiled: object


def rerun(
    compiled: object, captured: Captured, program: Program, final: Graph, step: object
) -> Rerun | None:
    """The rerun of a captured step, or None where its effects are rare ones."""
    if is_odd(captured):
        return None
    names: dict[str, object] = {}
    before, end = _lines(captured, program, final, step, None, names)
    lines = ["try:", *_indented(before), "except BaseException:", "    undo()", "    raise", *end]
    text = _text("rerun(reals, scalars, addresses, tree, stores, undo)", lines)
    return Rerun(_made(text, names), compiled)


def _lines(
    captured: Captured,
    program: Program,
    final: Graph,
    step: object,
    places: Places | None,
    names: dict[str, object],
) -> tuple[list[str], list[str]]:
    """Lines that put everything in place, and lines that run the plan, commit and return."""
    names |= host_names() | {"final": final, "step": step, "uninterrupted": uninterrupted}
    lines = []
    for i, bound in enumerate(captured.bounds):
        names[f"bound{i}"] = bound
        lines.append(f"bound{i}.check(reals)")
    leaving = leaver(captured, listed=places is None)
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
    commit = commit_lines(captured, outputs, host, places, names)
    inputs = [f"{'reals' if kind == 'tensor' else 'scalars'}[{i}]" for kind, i in captured.sources]
    lines += [
        *code.lines,
        *run.gather,
        "seen = step.observer",
        "if seen is not None:",
        f"    seen = seen(final, [{', '.join(inputs)}], [{', '.join(outputs)}])",
    ]
    if run.ran is None:
        end = ["with uninterrupted():", *_indented([run.run, *commit])]
    else:
        again = [f"if {run.ran}:", "    with uninterrupted():", *_indented(_indented(commit))]
        if places is None:
            again += ["else:", "    undo()"]
        end = ["try:", *_indented([run.run, *commit])]
        end += ["except BaseException:", *_indented([*again, "raise"])]
    return lines, [*end, "if seen is not None:", "    seen()", "return returned"]


def _text(signature: str, lines: list[str]) -> str:
    return "\n".join([f"def {signature}:", *_indented(lines), ""])


def _made(text: str, names: dict[str, object]) -> Callable:
    """The function of a text."""
    exec(compile(text, "<tracejit replay>", "exec"), names)
    return names[text[4 : text.index("(")]]


def _indented(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]
