"""`python -m tracejit bisect`: a step that is wrong, shrunk to a small program and graph.

    a step → called under verification → what is wrong, and in which call
           → that call's torch calls as a program → the least one that is wrong in the same way
           → its graph → the least graph that is

All of it runs in child processes (`verify/children.py`), so that a step which crashes this hard can
be shrunk too, and nothing that calls change is left. Where a call is no program of torch calls, or
that program is right, the captured graph is shrunk alone.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from tracejit.compile import CompiledStep
from tracejit.compile import compile as compile_step
from tracejit.errors import WrongResult
from tracejit.ir.text import parse
from tracejit.options import Options
from tracejit.records import dataclass
from tracejit.testing import assert_equal_to_eager
from tracejit.verify.children import in_child
from tracejit.verify.recording import CannotRecord, Program, recorded
from tracejit.verify.shrink import (
    DIFFERS,
    Judge,
    graph_of,
    is_refusal,
    smallest,
    smallest_graph,
    symptom,
)

CALLS = 4  # of the step: traces, and replays
_LONGEST = 600.0  # seconds for the calls
_FEW = 400  # numbers that a program has in its text


@dataclass(frozen=True)
class Wrong:
    """What is wrong with a step: in words, in which call, and the user's line, where known."""

    what: str
    symptom: str
    call: int
    line: str = ""


@dataclass(frozen=True)
class Bisected:
    """A step that was bisected.

    wrong:   what is wrong; None where nothing is.
    note:    what else there is to say.
    program: the small program, as a script; "" where there is none.
    graph:   the small graph, as text; "" likewise.
    calls:   torch calls of the program, before and after; nodes: of the graph.
    data:    tensors that the script loads, where they are too large for its text.
    """

    wrong: Wrong | None
    note: str = ""
    program: str = ""
    graph: str = ""
    calls: tuple[int, int] = (0, 0)
    nodes: tuple[int, int] = (0, 0)
    data: Sequence[torch.Tensor] = ()


def bisected(step: CompiledStep, seconds: float, path: Path) -> Bisected:
    """Shrink a step, of calls without arguments. `path` is where its script will be."""
    import torch._dynamo  # noqa: F401  by torch's modes, in each child where it is not there: 2 s

    options = {
        f.name: getattr(step.options, f.name)
        for f in dataclasses.fields(step.options)
        if f.name in ("fuse", "keep_grads", "backend", "remat")
    }
    plain = step.__wrapped__
    wrong, note = what_is_wrong(plain, options)
    if wrong is None:
        return Bisected(None, note)
    options.pop("keep_grads")
    judge = Judge(options, time.monotonic() + seconds, assert_equal_to_eager)
    program, note = _program(plain, wrong.call)
    found = None if program is None else smallest(program, wrong.symptom, judge, (wrong.line,))
    if found is None:
        return _by_graph(plain, wrong, note or "its torch calls alone are right", judge)
    small, wanted = found
    text, inputs = graph_of(small, path.name, _SCRIPT.partition("{step}")[0].count("\n") + 1)
    before = len(parse(text).nodes) if text else 0
    if text:
        text, inputs, of_graph = smallest_graph(text, inputs, judge)
        if not of_graph:
            note = "the plan is right for this graph: capture is wrong, in a rule or a derivative"
    seeded = _seeded(small)
    if judge.of_program(small, _made(seeded)) == wanted:
        made, data = "\n".join(f"        {x}," for x in seeded), []
    else:
        made, data = _stored(small.arguments(), path)
    script = _SCRIPT.format(
        head=_head(wanted),
        more="from pathlib import Path\n\n" if data else "",
        step=small.text(),
        made=made,
        options="".join(
            f", {f.name}={json.dumps(x) if isinstance(x, str) else x}"
            for f in dataclasses.fields(Options)
            if (x := options.get(f.name, f.default)) != f.default
        ),
    )
    return Bisected(
        wrong,
        note,
        script,
        text,
        (len(program.calls), len(small.calls)),
        (before, len(parse(text).nodes) if text else 0),
        data,
    )


def what_is_wrong(plain: Callable, options: dict) -> tuple[Wrong | None, str]:
    """Call a step under verification: what is wrong, if anything is, or why that is not known."""

    def call(until: int) -> Callable[[], tuple | str]:
        def work() -> tuple | str:
            step = compile_step(plain, on_unsupported="raise", **options)
            for number in range(until):
                try:
                    step.verify()
                except WrongResult as error:
                    return str(error).partition("\nevidence: ")[0], number, error.fields["line"]
            return "; ".join(step.certificate().unverified)

        return work

    ended = in_child(call(CALLS), _LONGEST)
    found = symptom(ended)
    if isinstance(ended.value, tuple):
        what, number, line = ended.value
        return Wrong(what, DIFFERS, number, Path(line).name), ""
    if ended.raised is None and not ended.died:
        return None, f"not compared: {ended.value}" if ended.value else ""
    if ended.raised is not None:
        if is_refusal(ended.raised.kind):
            return None, f"the step is refused, and runs eagerly: {ended.raised.text}"
        of_eager = in_child(lambda: [plain() for _ in range(CALLS)] and None, _LONGEST)
        if of_eager.raised is not None:
            return None, f"the step itself raises {of_eager.raised.kind}: {of_eager.raised.text}"
        found = f"raises {ended.raised.kind}: {ended.raised.text}"
    first = next((n for n in range(1, CALLS) if not _fine(in_child(call(n), _LONGEST))), CALLS)
    return Wrong(f"the compiled step {found}", found, first - 1), ""


def _fine(ended: object) -> bool:
    return ended.raised is None and not ended.died


def _program(plain: Callable, call: int) -> tuple[Program | None, str]:
    """The torch calls of one call, after those before it; or why there is no such program."""

    def work() -> Program | str:
        for _ in range(call):
            plain()
        try:
            return recorded(plain)
        except CannotRecord as error:
            return str(error)

    ended = in_child(work, _LONGEST)
    if isinstance(ended.value, Program):
        return ended.value, ""
    return None, ended.value or "its torch calls cannot be written down"


def _by_graph(plain: Callable, wrong: Wrong, note: str, judge: Judge) -> Bisected:
    """Shrink the captured graph of the step."""
    text, inputs = graph_of(plain)
    if not text:
        return Bisected(wrong, f"{note}, and it has no graph; it was not shrunk")
    before = len(parse(text).nodes)
    text, inputs, wanted = smallest_graph(text, inputs, judge)
    if not wanted:
        return Bisected(wrong, f"{note}, and so is the plan of its graph; it was not shrunk")
    values = ",\n    ".join(_literal(x) for x in inputs)
    script = _GRAPH_SCRIPT.format(
        head=_head(wanted),
        graph=text,
        inputs=values,
        options=", ".join(repr(judge.options[k]) for k in ("backend", "fuse")),
    )
    return Bisected(wrong, note, script, text, (0, 0), (before, len(parse(text).nodes)))


_SCRIPT = '''\
"""{head}"""

{more}import torch

from tracejit.testing import assert_equal_to_eager


{step}

def arguments():
    torch.manual_seed(0)
    return [
{made}
    ]


if __name__ == "__main__":
    assert_equal_to_eager(step, arguments, calls=1, on_unsupported="raise"{options})
    print("equal to eager")
'''
_GRAPH_SCRIPT = '''\
"""{head}"""

from numpy import array, bool_, float32, float64, int64  # noqa: F401

from tracejit.ir.text import parse
from tracejit.verify.shrink import graph_differs

GRAPH = """
{graph}
"""
INPUTS = [
    {inputs},
]

if __name__ == "__main__":
    assert not graph_differs(parse(GRAPH), INPUTS, {options}), "the plan gives something else"
    print("the plan is right")
'''


def _head(wanted: str) -> str:
    what = "differs from eager" if wanted == DIFFERS else wanted
    return f"Compiled, this {what}. Run it to see: it is equal to eager once that is mended."


def _seeded(program: Program) -> list[str]:
    """The inputs as expressions, floats by a seed."""
    found = []
    for x in program.arguments():
        if x.is_floating_point():
            shape = ", ".join(map(str, x.shape)) or "()"
            kind = "" if x.dtype is torch.float32 else f", dtype={x.dtype}"
            found.append(f"torch.randn({shape}{kind}){'.requires_grad_()' * x.requires_grad}")
        else:
            found.append(f"torch.tensor({x.tolist()}, dtype={x.dtype})")
    return found


def _made(expressions: Sequence[str]) -> list[torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [eval(x, {"torch": torch}) for x in expressions]


def _stored(inputs: Sequence[torch.Tensor], path: Path) -> tuple[str, list[torch.Tensor]]:
    """The inputs with the values that they have, in the text, or in a file beside it."""
    if sum(x.numel() for x in inputs) > _FEW:
        name = path.with_suffix(".pt").name
        return (
            f"        *torch.load(Path(__file__).with_name({name!r})),",
            list(inputs),
        )
    rows = [
        f"        torch.tensor({x.tolist()}, dtype={x.dtype})"
        f"{'.requires_grad_()' * x.requires_grad},"
        for x in inputs
    ]
    text = "\n".join(rows).replace("nan", 'float("nan")').replace("inf", 'float("inf")')
    return text, []


def _literal(x: np.ndarray | float) -> str:
    if isinstance(x, float):
        return repr(x)
    with np.printoptions(threshold=1 << 30, floatmode="unique"):
        return repr(np.asarray(x))
