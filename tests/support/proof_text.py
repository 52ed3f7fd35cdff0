"""Texts of what the proof of a replay and the memory of traces are made of, to be read in tests.

In: a step and its arguments. Out: the guard lines of what it can reach, what ran, the events of a
trace, the tree of several traces, and the matcher of a recorded call. Line numbers count from the
step's first statement, and names of objects are explained in a legend.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from inspect import getsource
from textwrap import dedent
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MappingProxyType,
    MethodType,
    ModuleType,
)

import torch

from tracejit.capture import functions  # noqa: F401
from tracejit.capture.bind import bind, run, unwrap
from tracejit.capture.effects.collect import Finished, finish
from tracejit.capture.follow.events import (
    Arithmetic,
    Call,
    Decision,
    Known,
    Many,
    New,
    Number,
    Outside,
    Point,
    Same,
    ScalarCame,
)
from tracejit.capture.follow.matchers import _Lines
from tracejit.capture.follow.recall import End, Recall
from tracejit.capture.proof.guard_text import NumberLine
from tracejit.capture.proof.guards import Armed, arm, reasons_against, survey
from tracejit.capture.proof.watch import Seen, origin, watch
from tracejit.capture.python.bytecode import Scanned
from tracejit.capture.trace.table import function_name
from tracejit.capture.trace.tensor import TO_IR
from tracejit.capture.tracer import Tracer
from tracejit.garbage import uncollected


def trace(
    step: Callable, *args: object, recall: Recall | None = None, watched: bool = False
) -> tuple[Finished, Seen | None, Tracer]:
    """One trace of a step, as a compiled step makes it: under a profiler, or recorded."""
    function, bound_to = unwrap(step)
    tracer = Tracer(recall, follow=False)
    bound = bind(tracer.trace, function, bound_to + args, {})
    with uncollected() as young:
        with watch(watched) as ran:
            returned = [run(tracer, bound, function)]
        done = finish(tracer.trace, function.__name__, returned, young)
        tracer.trail.close(done.captured, done.call, done.made_of)
    return done, ran, tracer


# ---- names and lines


def source(case: Callable) -> str:
    """The text of a test's case, without its decorators."""
    lines = dedent(getsource(case)).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("def "))
    return "\n".join(lines[first:]) + "\n\n"


def shown(x: object) -> str:
    """What a name of a guard or a matcher stands for."""
    if isinstance(x, CodeType):
        return f"the code of {x.co_qualname}"
    if isinstance(x, (FunctionType, BuiltinFunctionType, MethodType, type)):
        return x.__qualname__.rpartition("<locals>.")[2]
    if isinstance(x, ModuleType):
        return f"the module {x.__name__}"
    if isinstance(x, torch.Tensor):
        return f"a tensor of shape {list(x.shape)}"
    if isinstance(x, dict) and "__builtins__" in x:
        return "the globals of " + x["__name__"]
    if isinstance(x, MappingProxyType):
        return f"what a class of {x['__module__']} holds"
    if type(x) in (int, float, str, bool, tuple, list, range, slice, torch.dtype, torch.Size):
        return repr(x)
    return f"a {type(x).__name__}"


def relative(text: str, step: Callable) -> str:
    """A text whose lines of the step's file count from the step's first statement."""
    code = unwrap(step)[0].__code__
    file = code.co_filename.rpartition("/")[2]
    before = min(n for *_, n in code.co_lines() if n and n > code.co_firstlineno) - 1
    return re.sub(rf"{re.escape(file)}:(\d+)", lambda m: f"line {int(m[1]) - before}", text)


def numbered(lines: list[str], names: dict[str, object], prefix: str) -> str:
    """The lines with their names numbered as they come, and a legend of these."""
    order: dict[str, str] = {}

    def again(match: re.Match) -> str:
        return order.setdefault(match[0], f"{prefix}{len(order)}")

    body = [re.sub(rf"\b{prefix}\d+\b", again, line) for line in lines]
    legend = [f"{new}: {shown(names[old])}" for old, new in order.items()]
    return "\n".join([*body, *(["where", *legend] if legend else [])])


# ---- what a step can reach, and what of it ran


def guard_lines(step: Callable, *args: object) -> str:
    """The lines of a guard about the Python state that a step can reach, after one watched trace;
    without those about torch's modes and functions, which every guard has."""
    function, bound_to = unwrap(step)
    _, ran, _ = trace(step, *args, watched=True)
    walk = survey(function, bound_to + args, {}, ran)
    first = next(i for i, x in enumerate(walk.lines) if "keyword arguments changed" in str(x)) + 1
    lines = []
    for line in walk.lines[first:]:
        if isinstance(line, NumberLine):
            roles = [key[0] for key in line.keys if key is not None]
            what = "text of runtime scalars" if type(line.value) is str else "a runtime scalar"
            role = f"or {what}, {', '.join(dict.fromkeys(roles))}" if roles else "fixed"
            lines.append(f"{line.at} is {line.value!r} {role}: {line.path}")
        elif "was replaced: one of" not in line and "torch.Tensor was changed" not in line:
            lines.append(line)
    return numbered(lines, walk.names, "k") + "".join(f"\nrefused: {r}" for r in walk.refusals)


def armed(step: Callable, *args: object) -> Armed:
    """The guard of a step, after two traces."""
    function, bound_to = unwrap(step)
    _, ran, _ = trace(step, *args, watched=True)
    walk = survey(function, bound_to + args, {}, ran)
    done, again, _ = trace(step, *args, watched=True)
    assert reasons_against(walk, again, done.captured) == []
    found = arm(walk, function, done.captured, done.call)
    assert isinstance(found, Armed), found
    return found


def what_ran(step: Callable, *args: object) -> str:
    """What a watched trace saw of a step: user code, names of torch, refusals."""
    _, ran, _ = trace(step, *args, watched=True)
    mine = [code.co_qualname for code in ran.codes if origin(code) == "user"]
    mine = [name.rpartition("<locals>.")[2] for name in mine]
    torchs = {
        holder.get("__name__", "torch.Tensor"): names for holder, names in ran.places.values()
    }
    lines = [f"runs {', '.join(mine)}"]
    lines += [f"of {holder}: {', '.join(sorted(torchs[holder]))}" for holder in sorted(torchs)]
    lines += ["computes names of attributes"] * ran.computes_names
    lines += [f"refused: {why}" for why in ran.refusals]
    return relative("\n".join(lines), step)


def what_is_read(scanned: Scanned, step: Callable) -> str:
    """The outside names that bytecode reads."""
    lines = []
    for read in scanned.reads:
        kind = "missing" if read.missing else "builtin" if read.builtin else shown(read.value)
        lines.append(f"{read.path}: {kind}")
    return relative(
        "\n".join(
            [
                *lines,
                *(f"refused: {w}" for w in scanned.refusals),
                *(f"refused if it runs: {d.why}" for d in scanned.doubts),
            ]
        ),
        step,
    )


# ---- events


def told(x: object) -> str:
    """An argument or a result without its tensors."""
    match x:
        case Known(at):
            return f"#{at}"
        case Outside(at, meta):
            flags = ", requires grad" * meta.requires_grad + ", a view" * (meta.memory != at)
            return f"#{at} outside {dtype_of(meta.dtype)}{list(meta.shape)}{flags}"
        case New(at, _, geometry):
            return f"#{at} new {geometry[3]}{list(geometry[0])}"
        case Number(value):
            return str(value)
        case Same(value):
            return str(value) if type(value) is torch.dtype else repr(value)
        case Many(kind, items):
            return f"{kind.__name__}({', '.join(map(told, items))})"
    raise TypeError(x)


def dtype_of(dtype: torch.dtype) -> str:
    return TO_IR[dtype].name


def event_text(event: object) -> str:
    """One event of a trace."""
    match event:
        case ScalarCame(path, kind, value):
            return f"{value} came in, {kind.__name__}: {' '.join(map(str, path))}"
        case Arithmetic(op, args, value):
            return f"{value} = {op}({', '.join(map(told, args))})"
        case Decision(p):
            return f"{p.left} {p.relation} {p.right} is {p.outcome}"
        case Call():
            split = len(event.args) - len(event.names)
            given = [told(x) for x in event.args[:split]]
            given += [
                f"{name}={told(x)}" for name, x in zip(event.names, event.args[split:], strict=True)
            ]
            text = f"{function_name(event.func)}({', '.join(given)}) -> {told(event.result)}"
            if not event.grad_on:
                text += " without grad"
            return text + "".join(f"\n    finds {found_text(x)}" for x in event.found)
    raise TypeError(event)


def found_text(what: tuple) -> str:
    """What a rule found outside."""
    match what:
        case ("grad", owner, grad):
            return f"the grad of #{owner}: {'None' if grad is None else told(grad)}"
        case ("item", tensor, value):
            return f"{value}, the number of #{tensor}"
        case ("host", node):
            return f"{node.out} = {node.op.name}({', '.join(map(str, node.args))})"
        case ("decision", p):
            return f"{p.left} {p.relation} {p.right} is {p.outcome}"
    raise TypeError(what)


def end_text(end: End) -> str:
    """The end of a path."""
    made = ", ".join(f"#{at} is made {index}" for at, index in end.made.items())
    returned = str(end.captured.effects).splitlines()[-2].strip()
    text = f"end: {returned}; {made or 'nothing is made'}"
    if end.escaped:
        text += "; kept: " + ", ".join(f"#{at}" for at, _ in end.escaped)
    return text


def tree_lines(point: Point) -> list[str]:
    """What a step remembers of its traces from a point on; branches are indented."""
    lines: list[str] = []
    while len(point.events) == 1 and not point.ends:
        (event,) = point.events
        lines += event_text(event).splitlines()
        point = event.then
    lines += [end_text(end) for end in point.ends]
    for event in point.events:
        branch = [*event_text(event).splitlines(), *tree_lines(event.then)]
        lines += ["either", *(f"  {line}" for line in branch)]
    return lines


def remembered(runs: list[tuple | Callable[[], object]]) -> str:
    """The tree after these traces, each a step with its arguments; or what comes between them."""
    recall = Recall()
    for one in runs:
        if callable(one):
            one()
        else:
            trace(*one, recall=recall)
    values: dict[str, str] = {}
    text = "\n".join(tree_lines(recall.root()))
    return re.sub(r"%\d+", lambda m: values.setdefault(m[0], f"%{len(values)}"), text)


def calls_of(step: Callable, *args: object) -> list[Call]:
    """The recorded torch calls of a trace."""
    _, _, tracer = trace(step, *args, recall=Recall())
    return [event for event in tracer.trail.events if type(event) is Call]


def matcher_text(call: Call) -> str:
    """The function that tells whether a call is this recorded one, and answers it."""
    lines = _Lines(call)
    lines.function()
    legend = [f"p{i}: {parameter(x)}" for i, x in enumerate(lines.values)]
    return "\n".join([*lines.lines, "where", *legend])


def parameter(x: object) -> str:
    """What differs among the matchers of one form."""
    if isinstance(x, (Known, Outside, New, Number, Same, Many)):
        return told(x)
    if type(x).__name__ == "TensorMeta":
        return f"{dtype_of(x.dtype)}{list(x.shape)}"
    return found_text(x) if type(x) is tuple and x[0] in ("host", "decision", "item") else str(x)
