"""A trace that goes as an earlier one went: the same calls get the same answers without rules.

What a trace does is a function of the calls that reach it: torch functions with their arguments,
arithmetic and decisions on runtime scalars, and what they find outside (metadata of tensors, their
`.grad`, numbers). `Recall` keeps the calls of earlier traces as a tree with a `Captured` step at
the end of each path. A `Trail` follows it: it compares each call and hands out proxies without data
or history. At the first call that the tree does not know, it runs the rules for all calls so far,
with the proxies that the user's Python already holds, and the trace goes on as an ordinary one.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode

from tracejit.capture.events import (
    CONSTANTS,
    TUPLE_ITERATOR,
    Arithmetic,
    Call,
    Decision,
    Event,
    Known,
    Look,
    Many,
    New,
    Number,
    Outside,
    Point,
    Same,
    ScalarCame,
    Untold,
    container,
    items_of,
    news,
    operand,
    same,
)
from tracejit.capture.matchers import UNKNOWN
from tracejit.capture.recall import End, Recall
from tracejit.capture.scalars import RELATIONS, Path, Predicate, TracedFloat
from tracejit.capture.tensor import TracedTensor
from tracejit.ir import host_memory
from tracejit.ir.graph import Arg, Node, Value

if TYPE_CHECKING:
    from tracejit.capture.bounds import Bound
    from tracejit.capture.captured import Captured
    from tracejit.capture.tensor import Handle
    from tracejit.capture.tracer import Tracer
    from tracejit.errors import TracejitError

_REAL = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def _alone() -> int:
    held = [object()]
    return sys.getrefcount(held[0])


ALONE = _alone()  # references to an item of a list that nobody else holds


class Trail:
    """The way of one trace along what earlier ones did, and the record of what it does itself."""

    def __init__(self, tracer: Tracer, recall: Recall | None, *, follow: bool):
        self.t, self.recall = tracer, recall
        useful = recall is not None and recall.begin()
        self.root = self.point = recall.root() if useful else Point()
        self.following = follow and bool(self.root.events)
        self.modes = torch._C._len_torch_function_stack()  # that see what is asked of tensors here
        self.recording = useful and not self.following
        self.objects: list[torch.Tensor] = []  # every tensor that user code has passed or got
        self.ids: dict[int, int] = {}  # and its position here
        self.scalars: list[float] = []  # the runtime scalars while following
        self.given: dict[int, TracedTensor] = {}  # those that rules get again, by their number
        self._memory: dict[int, int] = {}  # torch storage -> the first tensor of it
        self.events: list[Event] = []  # of this trace so far
        self._call: Call | None = None  # whose rule is running
        self._bounds = 0  # how many the tracer had before
        self._over = False
        self._inside = 0  # nodes emitted while the user's code ran

    # ---- following

    def matches(self, told: object, x: object) -> bool:
        """Whether an argument is what it was; takes note of it."""
        kind = told.__class__
        if kind is Known:
            return self.objects[told.at] is x
        if kind is Same:
            return told.x is x or same(told.x, x)
        if kind is Many:
            if type(x) is not told.kind:
                return False
            items = items_of(x)
            return len(items) == len(told.items) and all(map(self.matches, told.items, items))
        if kind is Number:
            return type(x) is TracedFloat and x.link is self.t.link and x.value == told.value
        return kind is Outside and self.meet(x, told.look)

    def meet(self, x: torch.Tensor, look: Look) -> bool:
        """Take note of a tensor from outside if it is a new one that looks so."""
        at = len(self.objects)
        if id(x) in self.ids or not look.fits(x):
            return False
        if self._memory.setdefault(x.untyped_storage()._cdata, at) != look.memory:
            self._memory = {s: i for s, i in self._memory.items() if i < at}
            return False
        self.ids[id(x)] = at
        self.objects.append(x)
        return True

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
            self.t.numbers[value] = host_memory.read(self.objects[tensor])
            self.scalars.append(self.t.numbers[value])
            return True
        return self.computes(what[0]) if kind == "host" else self._holds(what[0])

    def computes(self, node: Node) -> bool:
        """Whether arithmetic on runtime scalars gives a float again; takes note of it."""
        try:
            number = node.op.eval(*map(self._number, node.args))
        except (ArithmeticError, TypeError):
            return False
        self.t.numbers[node.out] = number
        return type(number) is float

    def _number(self, arg: Arg) -> float:
        return self.t.numbers[arg] if isinstance(arg, Value) else arg

    def _holds(self, p: Predicate) -> bool:
        return RELATIONS[p.relation](self._number(p.left), self._number(p.right)) is p.outcome

    def give(self, told: object) -> object:
        """What a call returns."""
        kind = told.__class__
        if kind is New:
            proxy, told.spare = told.spare, None
            if proxy is None:
                proxy = TracedTensor.blank(told.geometry)
            self._note(proxy)
            return proxy
        if kind is Known:
            return self.objects[told.at]
        if kind is Same:
            return told.x
        if kind is Number:
            return TracedFloat.make(self.t.numbers[told.value], self.t, told.value)
        return container(told.kind, [self.give(x) for x in told.items])

    def scalar(self, path: Path, number: float) -> Value | None:
        """The value of a runtime scalar that comes in; None where rules are run."""
        told = _told(path)
        for event in self.point.events:
            if type(event) is ScalarCame and event.path == told:
                self._go(event)
                self.scalars.append(number)
                return event.value
        self.leave()
        return None

    def host(self, op: str, args: tuple[Arg, ...]) -> Value | None:
        """The value of arithmetic on runtime scalars; None where rules are run."""
        for event in self.point.events:
            if type(event) is Arithmetic and event.op == op and _alike(event.args, args):
                self._go(event)
                return event.value
        self.leave()
        return None

    def decision(self, predicate: Predicate) -> bool:
        """Whether a decision was taken before; False where rules are run."""
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
        """Run the rules for all calls so far, so that the tracer knows what it would know."""
        if not self.following:
            return
        t = self.t
        self.recall.left += 1
        self.following = False
        scalars, paths = iter(self.scalars), iter([*t.paths])
        t.paths.clear()
        told = (new for e in self.events if type(e) is Call for new in news(e.result))
        self.given = {new.number: self.objects[new.at] for new in told}
        active, t.active, call = t.active, True, t._call
        state = t.state
        inside = state is not None and state.inside  # a scheduler's step, on plain floats
        if inside:
            state.inside = False
        grad_on, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
        try:
            with _below(t), torch._C._DisableAutocast():
                for event in self.events:
                    match event:
                        case ScalarCame():
                            t.scalar(next(scalars), next(paths))
                        case Arithmetic(op, args, _):
                            t.arithmetic(op, *map(self._arg, args))
                        case Decision(predicate):
                            t.decide(predicate)
                        case Call():
                            for kind, *_ in event.found:
                                if kind == "item":
                                    next(scalars)
                            self._again(event)
        finally:
            torch._C._set_grad_enabled(grad_on)
            torch.set_default_dtype(dtype)
            t.active, t._call = active, call
            if inside:
                state.inside = True
            self.given.clear()
        self.recording = self.recall.useful

    def _again(self, call: Call) -> None:
        split = len(call.args) - len(call.names)
        args = [self._take(x) for x in call.args]
        torch._C._set_grad_enabled(call.grad_on)
        if torch.get_default_dtype() is not call.dtype:
            torch.set_default_dtype(call.dtype)
        self.t.b.line = call.line
        bounds = self.t.bounds
        first = len(bounds)
        self.t.apply(
            call.func, tuple(args[:split]), dict(zip(call.names, args[split:], strict=True))
        )
        bounds[first:] = map(_with_error, bounds[first:], call.errors)

    def _take(self, told: object) -> object:
        """An argument again."""
        match told:
            case Known(at) | Outside(at, _):
                return self.objects[at]
            case Same(x):
                return x
            case Number(value):
                return TracedFloat.make(self.t.numbers[value], self.t, value)
        return container(told.kind, [self._take(x) for x in told.items])

    def _arg(self, told: Same | Number) -> Arg:
        return told.value if type(told) is Number else told.x

    # ---- recording

    def forget(self) -> None:
        """This trace does something that cannot be compared with another's: do not remember it."""
        if not self._over:
            self.leave()
            self.recording = False

    def begin(self, func: Callable, args: tuple, kwargs: dict) -> Call | None:
        """A rule is about to run; None if that is not recorded."""
        if not self.recording or self._call is not None:
            return None
        try:
            told = tuple([self._tell(x) for x in (*args, *kwargs.values())])
        except Untold:
            self.recording = False
            return None
        grad_on, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
        self._call = Call(func, told, tuple(kwargs), grad_on, dtype, self.t.b.line)
        self._bounds = len(self.t.bounds)
        return self._call

    def end(self, call: Call, result: object) -> None:
        """The rule has returned."""
        self._call = None
        call.errors = [bound.error for bound in self.t.bounds[self._bounds :]]
        if self.recording:
            try:
                call.result = self._tell_result(result)
            except Untold:
                self.recording = False
            self.events.append(call)

    def _tell(self, x: object) -> object:
        if isinstance(x, torch.Tensor):
            at = self.ids.get(id(x))
            if at is not None:
                return Known(at)
            if type(x) not in _REAL:
                raise Untold
            with torch._C.DisableTorchFunction():
                look = Look.of(x, len(self.objects), self._memory)
            return Outside(self._note(x), look)
        return self._tell_plain(x, self._tell)

    def _tell_result(self, x: object) -> object:
        if type(x) is TracedTensor and id(x) not in self.ids:
            number = next(
                i for i in range(len(self.t.proxies) - 1, -1, -1) if self.t.proxies[i] is x
            )
            return New(self._note(x), number, x.handle.geometry)
        if isinstance(x, torch.Tensor):
            if id(x) not in self.ids:
                raise Untold
            return Known(self.ids[id(x)])
        if type(x) is TUPLE_ITERATOR:
            return Many(type(x), tuple([self._tell_result(item) for item in items_of(x)]))
        return self._tell_plain(x, self._tell_result)

    def _tell_plain(self, x: object, tell: Callable) -> object:
        if type(x) is TracedFloat:
            if x.link is not self.t.link:
                raise Untold
            return Number(x.value)
        if type(x) in CONSTANTS:
            return Same(x)
        if type(x) in (list, slice) or isinstance(x, tuple):
            return Many(type(x), tuple([tell(item) for item in items_of(x)]))
        raise Untold

    def found_grad(self, owner: torch.Tensor, grad: torch.Tensor | None) -> None:
        """A rule has read the `.grad` that a tensor from outside had before the step."""
        if self._call is None or not self.recording:
            return
        try:
            self._call.found.append(
                ("grad", self.ids[id(owner)], None if grad is None else self._tell(grad))
            )
        except (KeyError, Untold):
            self.recording = False

    def found_scalar(self, path: Path, value: Value) -> None:
        """A runtime scalar has come in."""
        if not self.recording or self._over:
            return
        if self._call is None:
            self.events.append(ScalarCame(_told(path), value))
        elif path[0] == "item" and id(self.t.reals[path[1]]) in self.ids:
            self._call.found.append(("item", self.ids[id(self.t.reals[path[1]])], value))
        else:
            self.recording = False

    def found_host(self, node: Node) -> None:
        """Arithmetic on runtime scalars was emitted."""
        if not self.recording or self._over:
            return
        if self._call is not None:
            self._call.found.append(("host", node))
        else:
            self.events.append(Arithmetic(node.op.name, tuple(map(operand, node.args)), node.out))

    def found_decision(self, predicate: Predicate) -> None:
        """A decision was taken on a runtime scalar."""
        if not self.recording or self._over:
            return
        if self._call is not None:
            self._call.found.append(("decision", predicate))
        else:
            self.events.append(Decision(predicate))

    def over(self) -> None:
        """The user's code has returned."""
        self._over = True
        self._inside = len(self.t.b.nodes)

    def close(
        self, captured: Captured, of_handle: dict[Handle, int], slots: frozenset[int]
    ) -> None:
        """The trace is over: remember it. `of_handle` says what was made for which tensor, and
        `slots` what of that is returned."""
        told = all(id(x) in self.ids for x in captured.reals)
        if (
            not self.recording
            or not told
            or any(id(p) not in self.ids for p, _ in captured.escaped)
        ):
            return
        made = {
            i: of_handle[h]
            for i, x in enumerate(self.objects)
            if (h := self._handle(x)) in of_handle
        }
        inside = self._came_in()
        asked = zip(captured.paths[inside:], captured.scalar_values[inside:], strict=True)
        end = End(
            _kept(captured),
            tuple(self.ids[id(x)] for x in captured.reals),
            made,
            slots,
            frozenset((self.ids[id(p)], i) for p, i in captured.escaped),
            tuple((self.ids[id(captured.reals[path[1]])], value) for path, value in asked),
            tuple(n for n in self.t.b.nodes[self._inside :] if n.op.family == "host"),
            len(captured.callbacks),
        )
        self.recall.add(self.root, self.events, end)

    def _came_in(self) -> int:
        """The number of runtime scalars that came in while the user's code ran."""
        inside = (x for e in self.events if type(e) is Call for x in e.found)
        return sum(type(e) is ScalarCame for e in self.events) + sum(x[0] == "item" for x in inside)

    def _handle(self, x: torch.Tensor) -> Handle | None:
        return x.handle if type(x) is TracedTensor else self.t.by_id.get(id(x))

    # ---- afterwards

    def proxies(self) -> list[TracedTensor]:
        """Those that user code has got so far."""
        return [x for x in self.objects if type(x) is TracedTensor]

    def lay_aside(self, told: Iterable[New]) -> None:
        """Keep the proxies that nobody has any more, to hand them out again."""
        objects = self.objects
        for new in told:
            if sys.getrefcount(objects[new.at]) == ALONE:
                proxy = objects[new.at]
                # not real now, and nothing on it that the user put there
                unused = type(proxy) is TracedTensor and not proxy.__dict__
                if unused and not weakref.getweakrefcount(proxy):
                    new.spare = proxy

    def release(self) -> None:
        """Let go of the tensors."""
        self.given.clear()
        self.objects.clear()
        self.ids.clear()

    # ---- tensors

    def _note(self, x: torch.Tensor) -> int:
        self.ids[id(x)] = at = len(self.objects)
        self.objects.append(x)
        return at


def _alike(told: tuple[Same | Number, ...], args: tuple[Arg, ...]) -> bool:
    """Whether operands of host arithmetic are what they were."""
    if len(told) != len(args):
        return False
    for a, x in zip(told, args, strict=True):
        mine = a.value if type(a) is Number else a.x
        if mine is not x and not (mine == x if isinstance(mine, Value) else same(mine, x)):
            return False
    return True


def nothing() -> None:
    """What is committed is not undone."""


def _with_error(bound: Bound, error: TracejitError) -> Bound:
    """A bound of a call that is run late, with the error that names its line."""
    return replace(bound, error=error)


def _told(path: Path) -> Path:
    """Where a runtime scalar comes from, without the dict that holds it: another one will do."""
    if path[0] == "after":
        return (*path[:2], _told(path[2]))
    return (path[0], *path[2:]) if path[0] == "entry" else path


def _kept(captured: Captured) -> Captured:
    """A captured step without anything of the user's: each call brings its own."""
    return replace(
        captured,
        reals=[],
        escaped=(),
        tree=None,
        paths=(),
        stores=(),
        callbacks=(),
        undo=nothing,
        key=captured.key[:1],
    )


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
