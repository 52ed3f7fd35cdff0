"""Guards: generated Python that decides whether a call may be replayed, and fetches its inputs.

`survey` walks what the step can read before a trace; `arm` completes that with what the trace
turned out to need, as one function `guard(args, kwargs)`. It returns (outside tensors, runtime
scalars, addresses, holders), or the text of the first condition that failed: about what, the old
value, the new one. Asked with `deciding=False` it leaves out the decisions on numbers: whether the
call may be replayed once they come out so. A guard keeps nothing from one run to the next, but for
what it found out about a set of addresses (alignment, overlap): that is used again while the
addresses stay the same.
"""

from __future__ import annotations

import copyreg
import os
from collections.abc import Callable, Collection, Sequence
from operator import itemgetter
from types import FunctionType

import torch
from torch.autograd import forward_ad

from tracejit.capture.effects.captured import OPAQUE, Captured
from tracejit.capture.effects.effects import Call
from tracejit.capture.effects.variables import Record, identity
from tracejit.capture.proof import callbacks
from tracejit.capture.proof.guard_text import NumberLine
from tracejit.capture.proof.heap import Walk
from tracejit.capture.proof.kept_texts import kept_texts
from tracejit.capture.proof.many import (
    FOUND,
    guard_containers,
    guard_grads,
    guard_metadata,
    written_out,
)
from tracejit.capture.proof.places import Places, guard_places, read_elements
from tracejit.capture.proof.records import numbers_of_records
from tracejit.capture.proof.settings import NUMPY_ERRORS
from tracejit.capture.proof.watch import Seen, origin
from tracejit.capture.python.bytecode import line_of
from tracejit.capture.python.doubts import template
from tracejit.capture.python.global_hooks import CALLED
from tracejit.capture.trace import autocast
from tracejit.capture.trace.scalars import Path, Predicate
from tracejit.ir.graph import Arg
from tracejit.ir.hostcode import HostCode, host_names
from tracejit.records import dataclass

# (args, kwargs) -> (outside tensors, runtime scalars, the tensors' addresses, the holders of state
# variables), or what failed
Guard = Callable[..., tuple[list, list, list, list] | str]
_SIGNS = {"lt": "<", "le": "<=", "eq": "==", "ne": "!=", "gt": ">", "ge": ">="}  # else: "is"
_UNASKED = (  # C code would read the value of a runtime scalar without asking it
    "which may take a runtime scalar for a constant: call it outside the step",
    "which may take a runtime scalar for a constant; call it as an attribute of math",
)


def survey(
    function: FunctionType,
    args: tuple,
    kwargs: dict,
    ran: Seen | None,
    records: Sequence[Record] = (),
    remade: Collection[str] = (),
) -> Walk:
    """The guard lines about Python state, as it is before a trace of `function(*args, **kwargs)`.

    `ran` is what an earlier trace ran: only what its code names is followed. Without it everything
    is, and the guard is wider than it has to be. What lists hold that it only appends to, the
    `records`, is not asked; nor which list or dict is at the paths of `remade` ones.
    """
    if ran is None:
        w = Walk(None, None, records, remade)
    else:
        w = Walk(ran.names(), ran.codes, records, remade, ran.of_schedulers)
    w.root = function
    _modes(w)
    w.check(f"len(args) == {len(args)}", "the number of arguments changed")
    w.check(f"[*kwargs] == {w.constant([*kwargs])}", "the keyword arguments changed")
    parameters = function.__code__.co_varnames[: function.__code__.co_argcount]
    w.lasting = False
    for i, x in enumerate(args):
        name = parameters[i] if i < len(parameters) else i
        w.visit(x, f"args[{i}]", f"argument {name}", ("arg", i), owned=False)
    for name, x in kwargs.items():
        at = f"kwargs[{name!r}]"
        w.visit(x, at, f"argument {name}", ("kwarg", name), owned=False)
    w.lasting = True
    w.function(function, function.__qualname__)
    if ran is not None:
        _torch_functions(w, ran)
        _settings(w, ran)
    w.walked()
    return w


def _modes(w: Walk) -> None:
    """Guard the modes of torch that decide what its functions do."""
    w.names |= {
        "grad_on": torch.is_grad_enabled,
        "default_dtype": torch.get_default_dtype,
        "precision": torch._C._get_float32_matmul_precision,
        "autocast": torch._C._is_any_autocast_enabled,
        "autocast_state": autocast.state,
        "function_modes": torch._C._len_torch_function_stack,
        "default_device": torch.get_default_device,
        "saved_hooks": torch._C._autograd._top_saved_tensors_default_hooks,
        "inference": torch.is_inference_mode_enabled,
        "anomaly": torch.is_anomaly_enabled,
        "forward_ad": forward_ad,
    }
    precision = torch._C._get_float32_matmul_precision()
    w.check(f"grad_on() is {torch.is_grad_enabled()}", "grad mode changed")
    w.check(f"default_dtype() is {w.constant(torch.get_default_dtype())}", "default dtype changed")
    w.check(f"precision() == {precision!r}", "torch.get_float32_matmul_precision changed")
    casts = autocast.state()
    asked = "not autocast()" if casts is None else f"autocast_state() == {w.constant(casts)}"
    w.check(asked, "autocast changed")
    w.check("not inference()", "inference mode is on")
    w.check("not anomaly()", "anomaly mode is on")
    w.check("forward_ad._current_level < 0", "forward-mode differentiation is on")
    modes = torch._C._len_torch_function_stack()  # a default device is one
    w.check(f"function_modes() == {modes}", "the default device or a torch function mode changed")
    if modes:
        device = w.constant(torch.get_default_device())
        w.check(f"default_device() == {device}", "the default device changed")
    w.check("saved_hooks(True) is None", "hooks on saved tensors are active")
    for module, name in CALLED:
        hooks = getattr(module, name)
        w.check(f"[*{w.constant(hooks)}] == {[*hooks]}", f"torch's {name} changed")


def _torch_functions(w: Walk, ran: Seen) -> None:
    """Guard that torch's functions that ran are still found under their names."""
    for holder, names in ran.places.values():
        found = sorted(names.intersection(holder))
        if found:
            get = itemgetter(*found)
            where = holder.get("__name__", "torch.Tensor")
            why = f"a function of {where} was replaced: one of {', '.join(found)}"
            w.check(f"{w.constant(get)}({w.constant(holder)}) == {w.constant(get(holder))}", why)
    copyreg._slotnames(torch.Tensor)  # kept on the class, as the first torch.save would do
    methods = vars(torch.Tensor)  # most are inherited: a replacement is a new name
    w.check(f"len({w.constant(methods)}) == {len(methods)}", "torch.Tensor was changed")


def _settings(w: Walk, ran: Seen) -> None:
    """Guard the settings of the process that functions which ran have asked for."""
    asked = ran.settings
    if w.asks_numpy:
        asked = asked | {NUMPY_ERRORS.text: NUMPY_ERRORS}
    for text, setting in asked.items():
        now = f"{w.constant(setting)}.now()"
        w.check(f"{now} == {w.constant(setting.now())}", f"the setting {text} changed")


def reasons_against(walk: Walk, ran: Seen, captured: Captured) -> list[str]:
    """Why the step of a trace cannot be replayed whatever its state is; empty if it can."""
    mine = [code for code in ran.codes if origin(code) == "user"]

    def located(why: str) -> str:
        return line_of(walk.about.get(why, ""), mine) + why

    reasons = [*ran.refusals, *doubtful(walk, ran), *map(located, walk.refusals), *captured.opaque]
    for code in mine:
        if code not in walk.codes:
            at = f"{os.path.basename(code.co_filename)}:{code.co_firstlineno}: "
            name = f"{ran.codes[code]}.{code.co_name}"
            reasons.append(f"{at}it runs {name}, which was not found before the call")
    if captured.paths:
        reasons += [f"{what}, {_UNASKED[' by another' in what]}" for what in ran.unasked]
        if not ran.unasked:
            reasons += [f"{located(what)}, {_UNASKED[True]}" for what in walk.unasked]
    if captured.effects.escaped:
        reasons.append("it stores an intermediate tensor in a Python object")
    if OPAQUE in captured.given:
        reasons.append("it returns an object that is neither a tensor nor a plain value")
    return list(dict.fromkeys(reasons))


def doubtful(walk: Walk, ran: Seen) -> list[str]:
    """The doubtful lines that a trace came by. One that formats with % what may be a string counts
    where a template for it is within reach."""
    mine = [code for code in ran.codes if origin(code) == "user"]
    templates = [*walk.templates, *(x for code in mine for x in code.co_consts if template(x))]
    return [
        f"{os.path.basename(d.code.co_filename)}:{d.line}: {d.why}"
        for d in walk.doubts
        if (d.sure or templates) and ran.passed.has(d)
    ]


@dataclass(frozen=True)
class Armed:
    """What a replay asks of Python: whether it may go on, with what, and what it calls again."""

    guard: Guard
    text: str  # of the guard
    found: list[int]  # the ids of the tensors that the walk found
    places: Places  # of the outside tensors, as the guard saw them last
    callbacks: callbacks.Repeated  # what it calls again, which completes the scalars


def arm(walk: Walk, function: FunctionType, captured: Captured, call: Call) -> Armed | str:
    """The guard of a captured step, or the reason why there is none."""
    reason = callbacks.against(captured, call)
    if reason:
        return reason
    scalars, shown = _decide_numbers(walk, function, captured, call)
    scalars |= numbers_of_records(walk, captured.paths, call)
    places = Places(call.reals)
    reason, tensors = _guard_tensors(walk, captured, call, places)
    if reason:
        return reason
    reached = {id(variable.holder) for variable in walk.assigned}
    reached.update(id(record.items) for record in walk.records)
    if any(id(call.holders[i]) not in reached for i, _, _ in captured.effects.stores):
        return "it assigns to a place that is not guarded"
    unread = _unread(captured)
    scalars |= read_elements(walk, captured.paths, call, places)
    for path in captured.paths:
        if path[0] == "held":
            scalars[path] = walk.constant(call.scalars[captured.paths.index(path)])
        elif path[0] in ("after", "cut") or (path not in scalars and path in unread):
            scalars[path] = "None"
        elif path not in scalars:
            return _unknown(path)
    walk.lines.append(f"scalars = [{', '.join(filter(None, map(scalars.get, captured.paths)))}]")
    before = len(walk.lines)
    _guard_predicates(walk, captured, shown)
    if len(walk.lines) > before:
        walk.lines[before:] = ["if deciding:", *(f"    {x}" for x in walk.lines[before:])]
    stored = {walk.owner(call.holders[i]) for i, _, _ in captured.effects.stores}
    if stored and walk.found:  # what it assigns in one it would read in the other
        names = sorted(stored.union(walk.found))
        apart = f"len({{*map(id, ({', '.join(names)},))}}) == {len(names)}"
        walk.check(apart, "two containers that the step can tell apart are one now")
    everything = "".join(f"{at}, " for at in walk.tensors.values())
    reals = {id(t): t.untyped_storage()._cdata for t in call.reals}
    lie_apart = len(set(reals.values())) == len(reals)  # which the guard sees from their memory
    if not (lie_apart and reals.keys() >= walk.tensors.keys()):
        apart = f"len({{*map(id, ({everything}))}}) == {len(walk.tensors)}"
        walk.check(apart, "two tensors that the step can tell apart are one now")
    walk.lines.append(f"{FOUND}found += map(id, ({everything}))")
    holders = ", ".join(map(walk.holder, call.holders))
    walk.lines.append(f"return {tensors}, scalars, addresses, [{holders}]")
    lines, functions = written_out(walk)
    body = "\n".join(f"        {line}" for line in lines)
    walk.names["missing"] = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
    text = (
        f"{functions}def guard(args, kwargs, found=None, deciding=True):\n    try:\n{body}\n"
        "    except missing as error:\n"
        "        return f'something that the step reads is gone ({error!r})'\n"
    )
    namespace = dict(walk.names)
    exec(compile(text, "<tracejit guard>", "exec"), namespace)
    again = callbacks.Repeated(captured, call)
    return Armed(namespace["guard"], text, [*walk.tensors], places, again)


def _unknown(path: Path) -> str:
    """Why a replay cannot know a runtime scalar."""
    if path[0] == "computed":
        return (
            "Python computes a number in it that is another one in each call, of something that a "
            "replay does not read; pass that number as an argument, or keep it in a tensor"
        )
    return f"a runtime scalar has no path: {path}"


def _unread(captured: Captured) -> set[Path]:
    """The runtime scalars that nothing was computed from: of an optimizer that did not run."""
    read = {value for node in captured.host_nodes for value in node.args}
    read.update(side for p in captured.predicates for side in (p.left, p.right))
    read.update(captured.effects.host)
    read.update(x for event in captured.draws for x in event.numbers)
    checked = () if captured.checks is None else captured.checks.sources
    planned = {index for kind, index in (*captured.sources, *checked) if kind == "scalar"}
    return {
        path
        for i, (path, value) in enumerate(zip(captured.paths, captured.scalars, strict=True))
        if i not in planned and value not in read
    }


def pinned_stores(captured: Captured, call: Call) -> tuple[set[tuple], set[tuple[tuple, float]]]:
    """The state variables, by `Variable.id`, whose number was taken as a plain one and which hold
    another one afterwards; and those of which a number was computed that was, with that number."""
    stored = {(i, key) for i, key, _ in captured.effects.stores}
    behind = {
        value: {identity(call.holders[path[1]], path[2])}
        for value, path in zip(captured.scalars, captured.paths, strict=True)
        if path[0] == "entry" and path[1:3] in stored
    }
    for node in captured.host_nodes if behind else ():
        of = set().union(*(behind.get(x, ()) for x in node.args))
        behind[node.out] = of
    direct, derived = set(), set()
    for p in captured.predicates:
        if p.relation == "is" and p.left in captured.scalars:
            direct |= behind.get(p.left, set())
        elif p.relation == "is":
            derived |= {(id_, p.right) for id_ in behind.get(p.left, ())}
    return direct, derived


def pinned_arguments(captured: Captured) -> set[Path]:
    """The arguments whose number was taken as a plain one."""
    paths = dict(zip(captured.scalars, captured.paths, strict=True))
    return {paths[p.left] for p in captured.predicates if p.relation == "is" and p.left in paths}


def _decide_numbers(
    walk: Walk, function: FunctionType, captured: Captured, call: Call
) -> tuple[dict[Path, str], dict[Path, str]]:
    """Turn the lines of numbers into checks: of the type for a runtime scalar, else of the value.
    Returns the expressions of the runtime scalars among them, and what reasons call them."""
    place = _scalar_places(walk, function, call)
    inner = ("cell", "global", "default", "kwdefault")  # seen as they are where the step is called
    wanted = {place(p): p for p in captured.paths if not (walk.reentrant and p[0] in inner)}
    scalars: dict[Path, str] = {}
    shown: dict[Path, str] = {}
    lines, walk.lines = walk.lines, []
    made = {("entry", id(place.holder), place.key) for place in kept_texts(captured, call)}
    lines.reverse()
    while lines:
        line = lines.pop()
        if not isinstance(line, NumberLine):
            walk.lines.append(line)
            continue
        of = line.keys[1]
        if type(line.value) is tuple and any(key[: len(of)] == of for key in wanted):
            at = walk.local(line.at)
            size = f"type({at}) is tuple and len({at}) == {len(line.value)}"
            walk.expect(size, line.path, line.value, at)
            lines += reversed(line.items(at))
            continue
        if not made.isdisjoint(line.keys):
            continue  # which nobody reads
        paths = [wanted[key] for key in line.keys if key in wanted]
        if paths:
            at = walk.local(line.at)
            scalars |= dict.fromkeys(paths, at)
            shown |= dict.fromkeys(paths, line.path)
            walk.expect(f"type({at}) is {type(line.value).__name__}", line.path, line.value, at)
        else:
            walk.number(line.value, line.at, line.path)
    return scalars, shown


def _scalar_places(walk: Walk, function: FunctionType, call: Call) -> Callable[[tuple], tuple]:
    """From the path of a runtime scalar to the key that the walk gave to its place."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))

    def place(path: tuple) -> tuple:
        kind = path[0]
        if kind == "cell":
            return ("cell", walk.constant(cells[path[1]]))
        if kind == "global":
            return ("global", walk.constant(function.__globals__), path[1])
        if kind in ("default", "kwdefault"):
            return (kind, walk.constant(function), *path[1:])
        if kind == "entry":
            return ("entry", id(call.holders[path[1]]), *path[2:])
        return path

    return place


def _guard_tensors(w: Walk, captured: Captured, call: Call, places: Places) -> tuple[str, str]:
    """Guard the metadata of every outside tensor; returns a reason if one cannot be reached, and an
    expression of all of them."""
    grad_of = {g: i for i, g in captured.grads_read if g is not None}
    fetched: set[int] = set()  # what is looked up as the .grad of its owner
    owners: dict[str, str] = {}  # of these
    there: list[str] = []
    for i, tensor in enumerate(call.reals):
        at = w.tensors.get(id(tensor))
        if at is None and i in grad_of:
            owner = w.tensors.get(id(call.reals[grad_of[i]]))
            if owner is not None:
                if owner in owners:  # a gradient's own
                    there += guard_grads(w, owners)
                    owners = {}
                at = w.local_name()
                owners[at] = owner
                fetched.add(i)
                w.tensors[id(tensor)] = at
                w.paths[id(tensor)] = f"{w.path_of(call.reals[grad_of[i]])}.grad"
        if at is None:
            return (
                f"a tensor of shape {list(tensor.shape)} comes from a place that is not guarded",
                "",
            )
    there += guard_grads(w, owners)
    guard_containers(w, _assigned(w, captured, call))
    tensors = guard_metadata(w, call.reals, there)
    for i, grad in captured.grads_read:
        at = w.tensors[id(call.reals[i])]
        if grad is None:
            w.check(f"{at}.grad is None", "a .grad that was None when traced is set")
        elif grad < 0:
            w.check(f"{at}.grad is not None", "a .grad that the step asks for is None")
        elif grad not in fetched or grad_of[grad] != i:
            own = w.tensors[id(call.reals[grad])]
            w.check(f"{at}.grad is {own}", "a .grad was replaced")
    guard_places(w, call, places)
    return "", tensors


def _assigned(w: Walk, captured: Captured, call: Call) -> set[int]:
    """The dicts, by identity, in which a call may find other numbers than the last one did."""
    holders = {i for i, _, _ in captured.effects.stores}
    holders |= {path[1] for path in captured.paths if path[0] == "entry"}
    return w.groups.union(id(call.holders[i]) for i in holders)


def condition(predicate: Predicate, left: str, right: str) -> str:
    """A decision that came out as it did, as an expression; it may name `same_number`."""
    sign = _SIGNS.get(predicate.relation)
    test = f"{left} {sign} {right}" if sign else f"same_number({left}, {right})"
    return test if predicate.outcome else f"not ({test})"


def _guard_predicates(w: Walk, captured: Captured, shown: dict[Path, str]) -> None:
    """Every decision that Python took on a runtime scalar must come out the same."""
    later = captured.decides
    predicates = [p for p in captured.predicates if p not in later]
    wanted: list[Arg] = []
    for predicate in predicates:
        wanted += (predicate.left, predicate.right)
    names = {v: f"scalars[{i}]" for i, v in enumerate(captured.scalars)}
    code = HostCode()
    found = code.add(captured.host_nodes, wanted, names)
    w.lines += code.lines
    w.names |= host_names()
    conditions: dict[str, Predicate] = {}
    for i, predicate in enumerate(predicates):
        conditions[condition(predicate, *found[2 * i : 2 * i + 2])] = predicate
    paths = dict(zip(captured.scalars, captured.paths, strict=True))
    for test, predicate in conditions.items():
        path = shown.get(paths.get(predicate.left))
        if predicate.relation == "is" and path is not None:  # the number itself was taken
            w.expect(test, path, predicate.right, names[predicate.left])
        else:
            relation = predicate.relation
            w.check(test, f"a decision on a runtime scalar ({relation}) came out otherwise")
