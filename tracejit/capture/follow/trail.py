"""A trace that goes as an earlier one went: the same calls get the same answers without rules.

What a trace does is a function of the calls that reach it: torch functions with their arguments,
arithmetic and decisions on runtime scalars, and what they find outside (metadata of tensors, their
`.grad`, numbers). `Recall` keeps the calls of earlier traces as a tree with a `Captured` step at
the end of each path. A `Trail` follows it: it compares each call and hands out proxies without data
or history. If the tree does not know a call, the trail runs the rules for all calls so far, around
the proxies that the user's Python already holds. Then the trace goes on as an ordinary one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode

from tracejit.capture.follow.events import (
    UNKNOWN,
    Arithmetic,
    Call,
    Decision,
    Drawn,
    Event,
    Found,
    Input,
    Known,
    Many,
    New,
    Number,
    Outside,
    Point,
    Read,
    Same,
    ScalarCame,
    TensorMeta,
    container,
    items_of,
    news,
    same,
)
from tracejit.capture.follow.recall import Recall
from tracejit.capture.follow.recorder import Recorder, without_holder
from tracejit.capture.trace import autocast
from tracejit.capture.trace.bounds import Bound, Check
from tracejit.capture.trace.cuts import Cut, Stage
from tracejit.capture.trace.draws import Sampled
from tracejit.capture.trace.inputs import Regions
from tracejit.capture.trace.scalars import RELATIONS, Path, Predicate, is_traced
from tracejit.capture.trace.tensor import Geometry, TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.errors import TracejitError
from tracejit.ir import host_memory
from tracejit.ir.graph import Arg, Node, Value

_NUMBERS = ("item", "cut")  # what a call finds that is a runtime scalar


class Trail(Recorder):
    """One trace on its way through the tree of earlier traces, and the record of its own events."""

    def __init__(self, trace: Trace, recall: Recall | None, *, follow: bool):
        useful = recall is not None and recall.begin()
        root = recall.root() if useful else Point()
        self.point = root
        self.following = follow and bool(root.events)
        super().__init__(trace, recall, root, recording=useful and not self.following)
        self.modes = torch._C._len_torch_function_stack()  # how many see torch calls here
        self.scalars: list[float] = []  # the runtime scalars while following
        self.given: dict[int, TracedTensor] = {}  # those that rules get again, by their number
        self._numbers: dict[tuple, float] = {}  # of cuts
        self._outputs: dict[Stage, list[torch.Tensor]] = {}  # the results of stages that have run
        self._known: deque[float] = deque()  # the numbers of cuts whose rule runs late
        self.numbers: dict[Value, float] = {}  # the runtime scalars, once the trace is over
        self._found_in: dict[Cut, tuple[torch.Tensor, ...]] = {}
        self._regions: Regions | None = None  # of what was met, where memory is not torch's own
        self._answer: object = None  # what a call got for Python

    # ---- following

    def matches(self, recorded: object, x: object) -> bool:
        """Whether an argument is what it was; takes note of it."""
        kind = recorded.__class__
        if kind is Known:
            return self.objects[recorded.at] is x
        if kind is Same:
            return recorded.x is x or same(recorded.x, x)
        if kind is Many:
            if type(x) is not recorded.kind:
                return False
            items = items_of(x)
            return len(items) == len(recorded.items) and all(
                map(self.matches, recorded.items, items)
            )
        if kind is Number:
            return is_traced(x) and x.scalars is self.t.scalars and x.value == recorded.value
        return kind is Outside and self.meet(x, recorded.meta)

    def meet(self, x: torch.Tensor, meta: TensorMeta) -> bool:
        """Take note of a tensor from outside if it is a new one that looks so."""
        at = len(self.objects)
        if id(x) in self.ids or not meta.fits(x):
            return False
        storage = x.untyped_storage()
        lent = not storage.resizable()  # as `borrowed` tells it
        if (lent or self._regions is not None) and not self._lies_apart(x):
            return False
        if self._memory.setdefault(storage._cdata, at) != meta.memory:
            self._memory = {s: i for s, i in self._memory.items() if i < at}
            return False
        self.ids[id(x)] = at
        self.objects.append(x)
        return True

    def _lies_apart(self, x: torch.Tensor) -> bool:
        """Whether a tensor lies nowhere that another one does whose torch storage is another."""
        if self._regions is None:
            self._regions = Regions()
            for other in self.objects:
                if type(other) is not TracedTensor:
                    self._regions.add(other)
        return self._regions.add(x)

    def back(self, objects: int, scalars: int) -> object:
        """A call is another one after all: forget what was noted. Returns UNKNOWN."""
        for x in self.objects[objects:]:
            del self.ids[id(x)]
        del self.objects[objects:], self.scalars[scalars:]
        self._memory = {s: i for s, i in self._memory.items() if i < objects}
        return UNKNOWN

    def finds(self, what: tuple) -> bool:
        """Whether a rule would find the same number, or decide the same; takes note of it."""
        kind, *what = what
        if kind == "item":
            tensor, value = what
            self.t.scalars.numbers[value] = host_memory.read(self.objects[tensor])
            self.scalars.append(self.t.scalars.numbers[value])
            return True
        if kind == "cut":
            cut, inputs, value = what
            number = self.t.scalars.numbers[value] = self._number_of(cut, inputs)
            self.t.scalars.read.add(value)
            self.scalars.append(number)
            return True
        if kind == "tensors":
            return self._searches(*what)
        if kind == "draw":
            event, generator = what
            self.t.draws.position(generator)
            self.t.draws.do(event, [self._number(x) for x in event.numbers])
            return True
        if kind == "plain":
            self._answer = self.t.scalars.numbers[what[0]]
            return True
        if kind == "values":
            cut, inputs, convert = what
            self._answer = convert(self._run(cut, inputs))
            return True
        return self.computes(what[0]) if kind == "host" else self._holds(what[0])

    def _searches(self, cut: Cut, inputs: tuple) -> bool:
        """Whether tensors are found as long as they were; takes note of them."""
        if cut.stage is not None:
            value = self._staged(cut.stage, inputs)[0]
        else:
            value = self._run(cut, inputs)
        if isinstance(cut.search, Sampled):
            self.t.draws.position(cut.search.known.generator)
            found = self.t.draws.do(cut.search, [value])
        else:
            found = cut.search(value)
        self._found_in[cut] = found
        return len(found[0]) == cut.count

    @property
    def found(self) -> list[torch.Tensor]:
        """What the cuts of this way have found."""
        if not self._found_in:
            return []
        return [x for _, cut, *_ in self._cuts() for x in self._found_in.get(cut, ())]

    def _cuts(self) -> Iterator[tuple]:
        """The cuts of this way, as they were found."""
        for event in self.events:
            if type(event) is Call:
                yield from (x for x in event.found if x[0] in ("cut", "tensors"))

    def _number_of(self, cut: Cut, inputs: tuple[Input, ...]) -> float:
        """The number of a cut; calls that differ in what is decided by it ask several times."""
        if cut.stage is not None:
            return host_memory.read(self._staged(cut.stage, inputs)[0])
        key = len(self.objects), id(cut.graph)
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = host_memory.read(self._run(cut, inputs))
        return number

    def _staged(self, stage: Stage, inputs: tuple[Input, ...]) -> list[torch.Tensor]:
        """The results of a stage, from the inputs of its value. A plan that was built since it ran
        may ask for more of them."""
        found = self._outputs.get(stage)
        if found is None or len(found) < stage.width:
            given = self._given(inputs)
            found = self._outputs[stage] = stage.run(
                [given[k] if of == "cone" else self._outputs[of][k] for of, k in stage.inputs]
            )
        return found

    def staged(self, stages: Sequence[Stage]) -> list[list[torch.Tensor]]:
        """The results of the stages of this way, which later traces ask instead of their cuts."""
        results = []
        for (_, cut, inputs, *_), stage in zip(self._cuts(), stages, strict=True):
            cut.stage = stage
            results.append(self._staged(stage, inputs))
        return results

    def _given(self, inputs: tuple[Input, ...]) -> list[torch.Tensor | float]:
        numbers = self.numbers or self.t.scalars.numbers
        found = self.found if any(type(x) is Found for x in inputs) else ()
        given = []
        for x in inputs:
            if type(x) is int:
                given.append(self.objects[x])
            elif type(x) is Drawn:
                given.append(self.t.draws.given[x.k])
            else:
                given.append(found[x.k] if type(x) is Found else numbers[x])
        return given

    def _run(self, cut: Cut, inputs: tuple[Input, ...]) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            return self.t.evaluate(cut.graph, self._given(inputs))

    def known_number(self) -> float | None:
        """The number that Python has read here already, where rules run late."""
        return self._known.popleft() if self._known else None

    def computes(self, node: Node) -> bool:
        """Whether arithmetic on runtime scalars gives a number again; takes note of it."""
        try:
            number = node.op.eval(*map(self._number, node.args))
        except (ArithmeticError, TypeError, ValueError):
            return False
        self.t.scalars.numbers[node.out] = number
        return type(number) in (float, int)

    def _number(self, arg: Arg) -> float:
        return self.t.scalars.numbers[arg] if isinstance(arg, Value) else arg

    def _holds(self, p: Predicate) -> bool:
        return RELATIONS[p.relation](self._number(p.left), self._number(p.right)) is p.outcome

    def give(self, recorded: object) -> object:
        """What a call returns."""
        kind = recorded.__class__
        if kind is New:
            proxy, recorded.spare = recorded.spare, None
            if proxy is None:
                proxy = TracedTensor.blank(self._geometry(recorded))
            self._note(proxy)
            return proxy
        if kind is Known:
            return self.objects[recorded.at]
        if kind is Same:
            return recorded.x
        if kind is Number:
            return self.t.scalars.traced(self.t.scalars.numbers[recorded.value], recorded.value)
        if kind is Read:
            return self._answer
        return container(recorded.kind, [self.give(x) for x in recorded.items])

    def _geometry(self, new: New) -> Geometry:
        """How a new proxy looks: it has as many rows as there are in this call."""
        if new.rows is None:
            return new.geometry
        if type(new.rows) is Known:
            with torch._C.DisableTorchFunction():
                rows = len(self.objects[new.rows.at])
        else:
            rows = int(self._found_in[new.rows][0].sum())
        shape, *rest = new.geometry
        return ((rows, *shape[1:]), *rest)

    def scalar(self, path: Path, number: float) -> Value | None:
        """The value of a runtime scalar that comes in; None where rules are run."""
        if not self.following:
            return None
        came = without_holder(path), type(number)
        for event in self.point.events:
            if type(event) is ScalarCame and (event.path, event.kind) == came:
                self._go(event)
                self.scalars.append(number)
                return event.value
        self.leave()
        return None

    def arithmetic(self, op: str, args: tuple[Arg, ...]) -> Value | None:
        """The value of arithmetic on runtime scalars; None where rules are run."""
        if not self.following:
            return None
        for event in self.point.events:
            if type(event) is Arithmetic and event.op == op and _alike(event.args, args):
                self._go(event)
                return event.value
        self.leave()
        return None

    def decision(self, predicate: Predicate) -> bool:
        """Whether a decision was taken before; False where rules are run."""
        if not self.following:
            return False
        key = Decision(predicate).key
        for event in self.point.events:
            if type(event) is Decision and event.key == key:
                self._go(event)
                return True
        self.leave()
        return False

    def _go(self, event: Event) -> None:
        self.events.append(event)
        self.point = event.then

    # ---- from following to running rules

    def leave(self) -> None:
        """Stop following: run the rules for all calls so far, as an ordinary trace would have."""
        if not self.following:
            return
        t = self.t
        self.recall.left += 1
        self.following = False
        self.t.draws.start_over()
        scalars, paths = iter(self.scalars), iter([*t.scalars.paths])
        t.scalars.paths.clear()
        recorded = (new for e in self.events if type(e) is Call for new in news(e.result))
        self.given = {new.number: self.objects[new.at] for new in recorded}
        call, hyper = t.call, t.hyperparameters
        inside = hyper is not None and hyper.inside  # a scheduler's step, on plain floats
        if inside:
            hyper.inside = False
        grad_on, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
        casts, region = autocast.full_state(), t.casts.region
        try:
            with _below(t.mode), t.resumed():
                for event in self.events:
                    match event:
                        case ScalarCame():
                            t.scalar(next(scalars), next(paths))
                        case Arithmetic(op, args, _):
                            t.scalars.arithmetic(op, *map(self._arg, args))
                        case Decision(predicate):
                            t.scalars.decide(predicate)
                        case Call():
                            came = [(x[0], next(scalars)) for x in event.found if x[0] in _NUMBERS]
                            self._known.extend(n for kind, n in came if kind == "cut")
                            self._again(event)
        finally:
            torch._C._set_grad_enabled(grad_on)
            torch.set_default_dtype(dtype)
            autocast.set_state(casts)
            t.casts.region = region
            t.call = call
            if inside:
                hyper.inside = True
            self.given.clear()
        self.recording = self.recall.useful

    def _again(self, call: Call) -> None:
        split = len(call.args) - len(call.names)
        args = [self._take(x) for x in call.args]
        torch._C._set_grad_enabled(call.grad_on)
        if torch.get_default_dtype() is not call.dtype:
            torch.set_default_dtype(call.dtype)
        if call.casts is not None:
            on, self.t.casts.region = call.casts
            autocast.set_state(on)
        elif torch._C._is_any_autocast_enabled():
            autocast.set_state(None)
        self.t.b.line = call.line
        bounds = self.t.bounds
        first = len(bounds)
        self.t.apply(
            call.func, tuple(args[:split]), dict(zip(call.names, args[split:], strict=True))
        )
        bounds[first:] = map(_with_error, bounds[first:], call.errors)

    def _take(self, recorded: object) -> object:
        """An argument again."""
        match recorded:
            case Known(at) | Outside(at, _):
                return self.objects[at]
            case Same(x):
                return x
            case Number(value):
                return self.t.scalars.traced(self.t.scalars.numbers[value], value)
        return container(recorded.kind, [self._take(x) for x in recorded.items])

    def _arg(self, recorded: Same | Number) -> Arg:
        return recorded.value if type(recorded) is Number else recorded.x

    def keep_numbers(self) -> None:
        """The trace is over, and what it read may be asked for once more."""
        self.numbers = self.t.scalars.numbers

    def forget(self) -> None:
        """This trace does something that cannot be compared with another's: do not remember it."""
        if not self._over:
            self.leave()
        super().forget()

    def release(self) -> None:
        """Let go of the tensors."""
        self.given.clear()
        self._outputs.clear()
        self._found_in.clear()
        super().release()


def _alike(recorded: tuple[Same | Number, ...], args: tuple[Arg, ...]) -> bool:
    """Whether operands of host arithmetic are what they were."""
    if len(recorded) != len(args):
        return False
    for a, x in zip(recorded, args, strict=True):
        mine = a.value if type(a) is Number else a.x
        if mine is not x and not (mine == x if isinstance(mine, Value) else same(mine, x)):
            return False
    return True


def _with_error(bound: Bound | Check, error: TracejitError) -> Bound | Check:
    """A bound of a call that is run late, with the error that names its line."""
    return replace(bound, error=error)


@contextmanager
def _below(mode: object) -> Iterator[None]:
    """Without a torch function mode and all that were entered after it."""
    popped = []
    if any(m is mode for m in _get_current_function_mode_stack()):
        while not popped or popped[-1] is not mode:
            popped.append(_pop_mode())
    try:
        yield
    finally:
        while popped:
            _push_mode(popped.pop())
