"""One plan of a loaded step: whether it takes a call, and what the call does.

In: a SavedPlan, the state that the plans of the step share, and the arguments of calls. Out: why a
call is not for this plan, or a function that runs it. Calls run the same generated function as
replays do (`run.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import itemgetter

import numpy as np
import torch

from tracejit.capture.effects.captured import Captured
from tracejit.capture.effects.effects import Call
from tracejit.capture.proof.guards import Armed, condition
from tracejit.capture.proof.places import Places
from tracejit.capture.python.counters import Elements
from tracejit.capture.python.memory import MANY
from tracejit.capture.signature import Fielded, Keyed, Listed
from tracejit.capture.trace.scalars import same_number
from tracejit.ir import host_memory
from tracejit.ir.graph import Graph, Value, print_arg
from tracejit.ir.hostcode import HostCode, host_names
from tracejit.ir.torch_types import TO_IR, TO_TORCH
from tracejit.parts import Stage, Stages
from tracejit.pipeline import Backward, Checking, Pipeline
from tracejit.records import dataclass
from tracejit.run import Hooks, generate
from tracejit.runtime.memory import Memory
from tracejit.runtime.program import Program
from tracejit.saved.record import (
    GivenNumber,
    GivenTensor,
    GivenValue,
    Place,
    SavedPlan,
    Spec,
)
from tracejit.saved.schedules import Schedules, Stepping
from tracejit.saved.searches import with_checks

Ready = Callable[[], object]
_MOST_RUNS = 8  # of one plan, by the alignment of its inputs
_READ = ("cut", "item")  # places of numbers that a run asks for

_LATER = (
    "Where calls come like this, as after one that skipped its update, make such a call before the "
    "step is saved, so that the file has a plan for it"
)
_IS_SET = (
    "{name}.grad is set, and the plan is for none: call zero_grad() if it is to be cleared, as the "
    f"step itself may do first. {_LATER}"
)
_IS_NONE = (
    "{name}.grad is None, and the plan is for one that is set: set it, by "
    "load_state_dict({{'{name}.grad': …}}, strict=False), to zeros if it is to be added to. "
    f"{_LATER}"
)

_ASKED = (
    "{name} comes from a schedule of the step's own ({kind}), which no file keeps: pass it, as "
    "lr=…, or the rates of all groups, as lr=[…]"
)


@dataclass(slots=True)
class State:
    """What the plans of a loaded step share."""

    tensors: dict[str, torch.Tensor]
    numbers: dict[str, int | float]
    generators: list[torch.Generator]
    schedules: Schedules
    lists: dict[str, list]  # what is appended to them, since they were loaded
    asked: Mapping[str, str]  # numbers that each call is given, and the schedule they are of


@dataclass(slots=True)
class _Inputs:
    """What a call brings, as it is found."""

    tensors: list
    scalars: list
    named: dict[str, int | float]  # numbers that this call has others of


class Mismatch(Exception):
    """Why a call is not for a plan."""


class LoadedPlan:
    """A plan and its compiled forms."""

    def __init__(
        self, plan: SavedPlan, state: State, pipeline: Pipeline, precision: str, memory: Memory
    ):
        self.plan, self.state, self.pipeline, self.precision = plan, state, pipeline, precision
        captured = replace(plan.captured, paths=tuple(map(_path, plan.scalars)))
        self.captured = with_checks(captured, pipeline.name)
        self._memory = memory
        self._names = [a.name for a in plan.arguments]
        self._by_place = [a.name for a in plan.arguments if a.positional]
        by_kind = {kind: [] for kind in ("number", "constant", "item")}
        for k, place in enumerate(plan.scalars):
            by_kind.get(place.kind, []).append((k, place.key))
        self._numbered, self._constants = by_kind["number"], by_kind["constant"]
        self._numbers = [name for _, name in self._numbered]
        self._counters, self._items = _counters(plan, by_kind["item"])
        self._elements: Elements | None = None  # the counters, at `_at`
        self._at: list[int] | None = None  # where the tensors of the last call lie
        self._decide = _decisions(plan, self.captured)
        self._stages: dict[int, Stage] = {}  # of all compiled forms
        self._runs: dict[tuple, tuple[Callable, Places, Call]] = {}
        owned = [(k, p.key) for k, (p, _) in enumerate(plan.tensors) if p.kind == "state"]
        self._owned = [k for k, _ in owned]
        self._get_owned = _getter([name for _, name in owned])
        self._aliased = {m.index for m in plan.captured.effects.made if m.kind == "alias"}

    def call_text(self, name: str) -> str:
        """A call that the plan takes, as text: `step(x: f32[64,10], lr=0.1)`."""
        parts = [f"{a.name}: {self._tree_text(a.tree)}" for a in self.plan.arguments]
        known = _short_names(self.state.numbers)
        for number in self._numbers:
            now = self.state.numbers[number]
            shown = "float" if number in self.state.asked else repr(now)
            parts.append(f"{known.get(number, number)}={shown}")
        return f"{name}({', '.join(parts)})"

    def _tree_text(self, tree: object) -> str:
        match tree:
            case GivenTensor(None):
                return "a tensor"
            case GivenTensor(index):
                return str(self.plan.tensors[index][1])
            case GivenNumber(_, whole):
                return "int" if whole else "float"
            case GivenValue(value):
                return repr(value)
            case Listed(kind, items):
                inner = ", ".join(map(self._tree_text, items))
                return f"[{inner}]" if kind is list else f"({inner})"
            case Keyed(items):
                pairs = (f"{k!r}: {self._tree_text(x)}" for k, x in items)
                return f"{{{', '.join(pairs)}}}"
            case Fielded(kind, items, _):
                return f"{kind}({', '.join(f'{k}={self._tree_text(x)}' for k, x in items)})"
        raise AssertionError(tree)

    # ---- a call

    def bind(self, args: tuple, kwargs: dict[str, object]) -> Ready | str:
        """A function that does a call, or why this plan does not take it."""
        plan = self.plan
        found = _Inputs([None] * len(plan.tensors), [None] * len(plan.scalars), {})
        try:
            for tree, x, name in self._arguments(args, kwargs, found):
                self._take(tree, x, name, found)
            self._fill(found)
            reals, scalars = found.tensors, found.scalars
            addresses = [t.data_ptr() for t in reals]
            if addresses != self._at:
                self._moved(reals, addresses)
            self._fill_numbers(found)
            why = self._decide(scalars)
            if why:
                return why
            function, places, call = self._run_for(reals, addresses)
            if addresses == places.good:
                addresses = places.good
            else:
                if places.shared:
                    return "two of its tensors share memory"
                why = places.against(addresses)
                if why:
                    return why
        except Mismatch as mismatch:
            return str(mismatch)
        del found

        def run() -> object:
            numbers, tensors = self.state.numbers, self.state.tensors
            if self.plan.callbacks:
                call.undo = self.state.schedules.remembered()
            holders = [numbers, tensors, *self.state.lists.values()]
            return function(reals, scalars, addresses, holders, call)

        return run

    def _arguments(self, args: tuple, kwargs: dict[str, object], found: _Inputs) -> list[tuple]:
        """Each argument of the plan, what is given for it, and its name."""
        if len(args) > len(self._by_place):
            raise Mismatch(
                f"it takes {len(self._by_place)} arguments by place "
                f"({', '.join(self._by_place)}), and was given {len(args)}"
            )
        given = dict(zip(self._by_place, args, strict=False))
        short = None
        for name, x in kwargs.items():
            if name in given:
                raise Mismatch(f"{name} is given twice")
            if name in self._names:
                given[name] = x
                continue
            short = _full_names([*self.state.numbers]) if short is None else short
            places = short.get(name, ())
            if not places:
                raise Mismatch(f"it has no argument and no number {name}")
            if isinstance(x, (list, tuple)) and {*places} <= self.state.asked.keys():
                if len(x) != len(places):
                    raise Mismatch(f"{name} are {len(places)} rates, not {len(x)}")
                found.named.update(zip(places, x, strict=True))  # as `get_last_lr()` gives them
                continue
            if len(places) > 1:
                raise Mismatch(f"{name} may be one of {', '.join(places)}: give the whole name")
            found.named[places[0]] = x
        for name in self._names:
            if name not in given:
                raise Mismatch(f"its argument {name} is missing")
        return [(a.tree, given[a.name], a.name) for a in self.plan.arguments]

    def otherwise(self) -> str:
        """What is to be said where a decision on a value has come out in another way than here.
        What the stages have kept for other plans is let go."""
        for stage in self._stages.values():
            stage.kept = None
        c = self.captured
        where = ", ".join(dict.fromkeys(c.cuts[k].where for k in c.early))
        counts = ", ".join(str(cut.count) for cut in c.cuts if cut.search is not None)
        more = f"; it is for {counts} elements that are found" if counts else ""
        return f"it decides by values that it reads at {where}, and this plan is for others{more}"

    def _take(self, tree: object, x: object, name: str, found: _Inputs) -> None:
        """Look at what is given, and keep what the plan takes of it."""
        match tree:
            case GivenTensor(index):
                if not isinstance(x, torch.Tensor):
                    raise Mismatch(f"{name} is a tensor, not {_shown(x)}")
                if index is not None:
                    _check(x, self.plan.tensors[index][1], name)
                    if index in self._aliased and x.storage_offset():
                        raise Mismatch(f"{name} starts within its memory: pass {name}.clone()")
                    found.tensors[index] = x
            case GivenNumber(index, whole):
                found.scalars[index] = _number(x, whole, name)
            case GivenValue(value):
                if type(x) is not type(value) or not (x == value or (x != x and value != value)):
                    raise Mismatch(f"{name} is {value!r}, not {_shown(x)}")
            case Listed(kind, items):
                if type(x) is not kind or len(x) != len(items):
                    raise Mismatch(f"{name} is a {kind.__name__} of {len(items)}, not {_shown(x)}")
                for i, (item, part) in enumerate(zip(items, x, strict=True)):
                    self._take(item, part, f"{name}[{i}]", found)
            case Keyed(items):
                if type(x) is not dict or [*x] != [key for key, _ in items]:
                    keys = ", ".join(repr(key) for key, _ in items)
                    raise Mismatch(f"{name} is a dict of {keys} in this order, not {_shown(x)}")
                for key, item in items:
                    self._take(item, x[key], f"{name}[{key!r}]", found)
            case Fielded(kind, items, listed):
                parts = _fields_of(x, [key for key, _ in items], listed)
                if parts is None:
                    keys = ", ".join(key for key, _ in items)
                    raise Mismatch(
                        f"{name} is a {kind} with {keys}, or a dict of these, not {_shown(x)}"
                    )
                for (key, item), part in zip(items, parts, strict=True):
                    self._take(item, part, f"{name}.{key}", found)

    def _fill(self, found: _Inputs) -> None:
        """The inputs that are state."""
        tensors = found.tensors
        for k, tensor in zip(self._owned, self._get_owned(self.state.tensors), strict=True):
            tensors[k] = tensor
        for owner, grad in self.captured.grads_read:
            now = tensors[owner].grad
            if (now is None) != (grad is None):
                name = self.plan.tensors[owner][0].key
                raise Mismatch((_IS_SET if grad is None else _IS_NONE).format(name=name))
            if grad is not None and grad >= 0:
                _check(now, self.plan.tensors[grad][1], "a gradient")
                tensors[grad] = now

    def _fill_numbers(self, found: _Inputs) -> None:
        """The runtime scalars that no argument gives."""
        scalars, tensors, numbers = found.scalars, found.tensors, self.state.numbers
        for k, name in self._numbered:
            now = numbers[name]
            if name in self.state.asked and name not in found.named:
                raise Mismatch(_ASKED.format(name=name, kind=self.state.asked[name]))
            scalars[k] = _number(found.named.get(name, now), type(now) is int, name)
        for k, x in self._constants:
            scalars[k] = x
        for k, index in self._items:
            scalars[k] = host_memory.read(tensors[index])
        if self._elements is not None:
            for (k, _), x in zip(self._counters, self._elements.read(), strict=True):
                scalars[k] = x

    def _moved(self, reals: list[torch.Tensor], addresses: list[int]) -> None:
        """Tensors lie elsewhere than in the last call: the state may be of another layout."""
        self._at = None
        for k in self._owned:
            place, spec = self.plan.tensors[k]
            _check(reals[k], spec, place.key)
        if self._counters:
            first = self._counters[0][1]
            at = np.array([addresses[index] for _, index in self._counters], np.int64)
            self._elements = Elements(at, host_memory.cell_type(reals[first]))
        self._at = addresses

    def prepared(self, like: list[torch.Tensor]) -> list[Stage]:
        """Compile it for inputs like some tensors; the stages compile themselves when asked."""
        self._build(like)
        return [*self._stages.values()]

    def _stepping(self) -> Stepping:
        """The calls of schedulers."""
        plan = self.plan
        left = [(k, *p.key) for k, p in enumerate(plan.scalars) if p.kind == "after"]
        operands = plan.captured.effects.callbacks
        return Stepping(self.state.schedules, plan.callbacks, operands, left)

    # ---- compiled forms

    def _run_for(
        self, reals: list[torch.Tensor], addresses: list[int]
    ) -> tuple[Callable, Places, Call]:
        """The function for inputs that are so aligned."""
        key = tuple([a % 16 == 0 for a in addresses])
        known = self._runs.get(key)
        if known is None:
            if len(self._runs) >= _MOST_RUNS:
                self._runs.clear()
            known = self._runs[key] = self._build(reals)
        return known

    def _build(self, reals: list[torch.Tensor]) -> tuple[Callable, Places, Call]:
        pipeline, captured = self.pipeline, self.captured
        executor = pipeline.executor(captured.graph, self.precision)
        if captured.early:

            def part(graph: Graph, what: str) -> Program:
                return pipeline.build(graph, executor, self._memory, what, counted=False)[0]

            parts = Stages(part).parts_of(captured, captured.early)
            self._stages |= {id(stage): stage for stage in parts.stages}
            program, final = parts.program, captured.graph
        else:
            program, final = pipeline.build(captured.graph, executor, self._memory)
            parts = None
        nodes = captured.effects.outside
        backwards = [Backward(pipeline, node.graph, executor) for node in nodes]
        checking = None
        if captured.checks is not None:
            checking = Checking(pipeline, captured.checks, executor)
        places = Places(reals)
        armed = Armed(lambda *_: "", "", [], places, self._stepping())
        with torch.no_grad():  # its lines put themselves in grad mode
            run = generate(
                captured, program, final, backwards, Hooks(), armed, parts, checking=checking
            )
        generators = [self.state.generators[k] for k in self.plan.generators]
        return run.function, places, Call([], [], given=captured.given, generators=generators)


def _counters(
    plan: SavedPlan, items: list[tuple[int, int]]
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Of the scalars that are elements of tensors those that are read together: the step counters
    of an optimizer, if they are many. And the others."""
    dtypes = {plan.tensors[index][1].dtype for _, index in items}
    on_cpu = all(plan.tensors[index][1].device == "cpu" for _, index in items)
    if len(items) < MANY or len(dtypes) > 1 or not on_cpu:
        return [], items
    cell = host_memory.cell_type(torch.empty(1, dtype=TO_TORCH[dtypes.pop()]))
    return (items, []) if Elements.known(cell) else ([], items)


def _getter(names: list[str]) -> Callable[[dict], tuple]:
    """A function that takes some items of a dict."""
    if len(names) > 1:
        return itemgetter(*names)
    return lambda found: tuple([found[name] for name in names])


def _path(place: Place) -> tuple:
    """The path of a runtime scalar, as far as a run needs it."""
    if place.kind == "after":
        n, name = place.key
        return "after", n, ("number", name)
    return (place.kind, place.key) if place.kind in _READ else ("given", place.key)


def _check(tensor: torch.Tensor, spec: Spec, name: str) -> None:
    """Raise Mismatch unless a tensor is as the plan takes it."""
    if (
        tensor.dtype is TO_TORCH[spec.dtype]
        and tensor.shape == spec.shape
        and tensor.stride() == spec.strides
        and tensor.requires_grad is spec.requires_grad
        and tensor.layout is torch.strided
        and str(tensor.device) == spec.device
        and not (tensor.is_conj() or tensor.is_neg())
    ):
        return
    if tensor.layout is not torch.strided or tensor.dtype not in TO_IR:
        raise Mismatch(f"{name} is {tensor.dtype}, {tensor.layout}, and the plan takes {spec}")
    kind = TO_IR[tensor.dtype], tuple(tensor.shape), tensor.stride(), str(tensor.device)
    raise Mismatch(f"{name} is {Spec(*kind, tensor.requires_grad)}, and the plan takes {spec}")


def _fields_of(x: object, names: list[str], listed: bool) -> list[object] | None:
    """The fields of an object that may be of any class, of a dict, or of a tuple where the step was
    given one; None if it has others."""
    if isinstance(x, (list, tuple)):
        return [*x] if listed and len(x) == len(names) else None
    if isinstance(x, Mapping):
        return [x[name] for name in names] if x.keys() == {*names} else None
    missing = object()
    found = [getattr(x, name, missing) for name in names]
    return None if any(part is missing for part in found) else found


def _number(x: object, whole: bool, name: str) -> int | float:
    if whole and type(x) is int:
        return x
    if not whole and type(x) in (int, float):
        return float(x)
    raise Mismatch(f"{name} is {'an int' if whole else 'a float'}, not {_shown(x)}")


def _shown(x: object) -> str:
    if isinstance(x, torch.Tensor):
        return f"a tensor of shape {[*x.shape]}"
    if isinstance(x, (list, tuple, dict)):
        return f"a {type(x).__name__} of {len(x)}"
    text = repr(x)
    return text if len(text) < 60 else f"a {type(x).__name__}"


def _full_names(names: list[str]) -> dict[str, list[str]]:
    """By each name that a number may be given by, short or whole, which it may be."""
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        for way in {name, name.rpartition(".")[2]}:
            found.setdefault(way, []).append(name)
    return found


def _short_names(names: dict[str, int | float]) -> dict[str, str]:
    """A short name for each number that has one of its own."""
    ways = _full_names([*names])
    return {ns[0]: way for way, ns in ways.items() if len(ns) == 1 and way.isidentifier()}


def _decisions(plan: SavedPlan, c: Captured) -> Callable[[list], str]:
    """A function of the runtime scalars: why a decision on them comes out otherwise, or nothing.
    Those on values that the step computes are taken in its run."""
    later = c.decides
    predicates = [p for p in c.predicates if p not in later]
    wanted = [side for p in predicates for side in (p.left, p.right)]
    code = HostCode()
    at = {value: f"scalars[{k}]" for k, value in enumerate(c.scalars)}
    found = code.add(c.host_nodes, wanted, at)
    names = {value: place.key for value, place in zip(c.scalars, plan.scalars, strict=True)}
    lines = [*code.lines]
    for i, p in enumerate(predicates):
        test = condition(p, *found[2 * i : 2 * i + 2])
        sides = [
            names.get(x, "a number computed of such") if isinstance(x, Value) else print_arg(x)
            for x in (p.left, p.right)
        ]
        relation = {"is": "is the same as"}.get(p.relation, p.relation)
        said = f"{sides[0]} {relation} {sides[1]} is not {p.outcome}, as it is for this plan"
        lines.append(f"if not ({test}): return {said!r}")
    body = "".join(f"    {line}\n" for line in [*lines, "return ''"])
    namespace = host_names() | {"same_number": same_number}
    exec(compile(f"def decide(scalars):\n{body}", "<tracejit loaded>", "exec"), namespace)
    decide = namespace["decide"]

    def decisions(scalars: list) -> str:
        try:
            return decide(scalars)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            return f"its numbers do not go together ({error})"

    return decisions if predicates else lambda scalars: ""
