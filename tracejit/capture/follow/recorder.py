"""The record of one trace: its events, without its tensors.

In: what the tracer and the trace tell their journal. Out, at `close`: a new path of the tree of
traces (`recall.py`), with what was captured at its end.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable

import torch

from tracejit.capture.effects import effects
from tracejit.capture.effects.captured import Captured
from tracejit.capture.follow.events import (
    CONSTANTS,
    TUPLE_ITERATOR,
    Arithmetic,
    Call,
    Decision,
    Drawn,
    Event,
    Found,
    Incomparable,
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
    items_of,
    operand,
)
from tracejit.capture.follow.recall import End, Recall
from tracejit.capture.python.references import ALONE, count
from tracejit.capture.trace import autocast
from tracejit.capture.trace.cuts import Cut
from tracejit.capture.trace.draws import Event as Drawing
from tracejit.capture.trace.draws import Sampled
from tracejit.capture.trace.journal import Journal
from tracejit.capture.trace.scalars import Path, Predicate, is_traced
from tracejit.capture.trace.tensor import Handle, Ragged, TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Node, Value

_NOTHING = object()
_REAL = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


class Recorder(Journal):
    """Takes down the events of one trace, to be compared with those of later ones."""

    def __init__(self, trace: Trace, recall: Recall | None, root: Point, *, recording: bool):
        self.t, self.recall = trace, recall
        self.root = root
        self.recording = recording
        self.objects: list[torch.Tensor] = []  # every tensor that user code has passed or got
        self.ids: dict[int, int] = {}  # and its position here
        self._memory: dict[int, int] = {}  # torch storage -> the first tensor of it
        self.events: list[Event] = []  # of this trace so far
        self._call: Call | None = None  # whose rule is running
        self._call_found: list[tuple] = []  # what the latest call has found
        self._found_before = 0  # inputs that cuts had found before it
        self._bounds = 0  # how many the trace had before
        self._values: object = _NOTHING  # what the latest call got for Python
        self._over = False
        self._inside = 0  # nodes emitted while the user's code ran

    def forget(self) -> None:
        """This trace does something that cannot be compared with another's: do not remember it."""
        if not self._over:
            self.recording = False

    def begin(self, func: Callable, args: tuple, kwargs: dict) -> Call | None:
        """A rule is about to run; None if that is not recorded."""
        if not self.recording or self._call is not None or self._over:
            return None
        try:
            arguments = tuple([self._encode(x) for x in (*args, *kwargs.values())])
        except Incomparable:
            self.recording = False
            return None
        grad_on, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
        on = autocast.state()
        casts = None if on is None else (on, self.t.casts.region)
        self._call = Call(func, arguments, tuple(kwargs), grad_on, dtype, casts, self.t.b.line)
        self._bounds = len(self.t.bounds)
        self._found_before = len(self.t.found)
        return self._call

    def end(self, call: Call, result: object) -> None:
        """The rule has returned."""
        self._call, self._call_found = None, call.found
        call.errors = [bound.error for bound in self.t.bounds[self._bounds :]]
        if self.recording:
            try:
                call.result = self._encode_result(result)
            except Incomparable:
                self.recording = False
            self.events.append(call)

    def _encode(self, x: object) -> object:
        if isinstance(x, torch.Tensor):
            at = self.ids.get(id(x))
            if at is not None:
                return Known(at)
            if type(x) not in _REAL:
                raise Incomparable
            with torch._C.DisableTorchFunction():
                meta = TensorMeta.of(x, len(self.objects), self._memory)
            return Outside(self._note(x), meta)
        return self._encode_plain(x, self._encode)

    def _encode_result(self, x: object) -> object:
        if type(x) is TracedTensor and id(x) not in self.ids:
            number = next(
                i for i in range(len(self.t.proxies) - 1, -1, -1) if self.t.proxies[i] is x
            )
            rows = self._rows(x.handle.ragged)
            return New(self._note(x), number, x.handle.geometry, rows=rows)
        if isinstance(x, torch.Tensor):
            if id(x) not in self.ids:
                raise Incomparable
            return Known(self.ids[id(x)])
        if x is self._values:
            self._values = _NOTHING
            return Read()
        if type(x) is TUPLE_ITERATOR:
            return Many(type(x), tuple([self._encode_result(item) for item in items_of(x)]))
        return self._encode_plain(x, self._encode_result)

    def _rows(self, ragged: Ragged | None) -> Known | Cut | None:
        """What says how many rows a new proxy has, if that depends on values."""
        if ragged is None:
            return None
        if ragged.like is not None:
            return self._encode(ragged.like.tensor)
        return next(cut for kind, cut, *_ in self._call_found if kind == "tensors")

    def _encode_plain(self, x: object, encode: Callable) -> object:
        if is_traced(x):
            if x.scalars is not self.t.scalars:
                raise Incomparable
            return Number(x.value)
        if type(x) in CONSTANTS:
            return Same(x)
        if type(x) in (list, slice) or isinstance(x, tuple):
            return Many(type(x), tuple([encode(item) for item in items_of(x)]))
        raise Incomparable

    def found_grad(self, owner: torch.Tensor, grad: torch.Tensor | None) -> None:
        """A rule has read the `.grad` that a tensor from outside had before the step."""
        if self._call is None or not self.recording:
            return
        try:
            self._note_found(
                ("grad", self.ids[id(owner)], None if grad is None else self._encode(grad))
            )
        except (KeyError, Incomparable):
            self.recording = False

    def many_texts(self, place: tuple, number: float) -> bool:
        """Whether the text that Python makes of a number is one of many that were made there."""
        if self._call is not None or self.recall is None:
            return False
        return self.recall.many_texts(place, number)

    def keeps_text(self, place: tuple) -> bool:
        """Whether the text that Python makes at a place may be followed to where it is kept."""
        return self._call is None and self.recall is not None and self.recall.keeps_text(place)

    def lost_text(self, place: tuple) -> None:
        """The text that was made at a place was not found where it was to be kept."""
        if self.recall is not None:
            self.recall.lost_texts[place] += 1

    def found_scalar(self, path: Path, kind: type, value: Value) -> None:
        """A runtime scalar has come in."""
        if not self.recording or self._over:
            return
        if self._call is None:
            self.events.append(ScalarCame(without_holder(path), kind, value))
        elif path[0] == "item" and id(self.t.inputs.tensors[path[1]]) in self.ids:
            self._note_found(("item", self.ids[id(self.t.inputs.tensors[path[1]])], value))
        elif path[0] == "cut":
            self._found("cut", self.t.cuts[path[1]], value)
        else:
            self.recording = False

    def found_values(self, cut: Cut, convert: Callable, values: object) -> object:
        """Python reads the values of a tensor, as `convert` makes them; returns them."""
        if self.recording and not self._over:
            self._values = values
            self._found("values", cut, convert)
        return values

    def found_tensors(self, cut: Cut) -> None:
        """The step asks for tensors that are to be found in a value."""
        if self.recording and not self._over:
            self._found("tensors", cut)

    def found_plain(self, value: Value, number: float) -> float:
        """Python gets a number that it has read as a plain float; returns that."""
        if self.recording and not self._over:
            if self._call is None:
                self.recording = False
            else:
                self._values = number
                self._note_found(("plain", value))
        return number

    def found_draw(self, event: Drawing, generator: torch.Generator) -> None:
        """The step has done something with a random generator."""
        if not self.recording:
            return
        if self._call is None or self._over:
            self.recording = False
        else:
            self._call.found.append(("draw", event, generator))

    def _note_found(self, what: tuple) -> None:
        """The call in progress has found something, which a later one may find to be otherwise. By
        then nothing may be drawn."""
        found = self._call.found
        if found and _is_draw(found[-1]) and not _is_draw(what):
            self.recording = False
        found.append(what)

    def _found(self, kind: str, cut: Cut, *more: object) -> None:
        """The call in progress has computed something for Python."""
        late = any(kind == "found" and i >= self._found_before for kind, i in cut.sources)
        if self._call is None or late:  # asked for outside a call, or of what this call has found
            self.recording = False
            return
        try:
            self._note_found((kind, cut, self._inputs(cut), *more))
        except KeyError:  # of a tensor that no call was given
            self.recording = False

    def _inputs(self, cut: Cut) -> tuple[Input, ...]:
        """What a cut is computed from: positions of tensors, runtime scalars, what was found."""
        t = self.t
        found = []
        for kind, i in cut.sources:
            if kind == "tensor":
                found.append(self.ids[id(t.inputs.tensors[i])])
            elif kind == "draw":
                found.append(Drawn(i))
            else:
                found.append(t.scalars.params[i][0] if kind == "scalar" else Found(i))
        return tuple(found)

    def found_arithmetic(self, node: Node) -> None:
        """Arithmetic on runtime scalars was emitted."""
        if not self.recording or self._over:
            return
        if self._call is not None:
            self._note_found(("host", node))
        else:
            self.events.append(Arithmetic(node.op.name, tuple(map(operand, node.args)), node.out))

    def found_decision(self, predicate: Predicate) -> None:
        """A decision was taken on a runtime scalar."""
        if not self.recording or self._over:
            return
        if self._call is not None:
            self._note_found(("decision", predicate))
        else:
            self.events.append(Decision(predicate))

    def over(self) -> None:
        """The user's code has returned."""
        self._over = True
        self._inside = len(self.t.b.nodes)

    def close(self, captured: Captured, call: effects.Call, made_of: dict[Handle, int]) -> None:
        """The trace is over: remember it. `made_of` says what was made for which tensor."""
        if not self.recording or not all(id(x) in self.ids for x in (*call.reals, *call.escaped)):
            return
        made = {
            i: made_of[h] for i, x in enumerate(self.objects) if (h := self._handle(x)) in made_of
        }
        inside = self._came_in()
        asked = zip(captured.paths[inside:], captured.scalars[inside:], strict=True)
        escaped = zip(call.escaped, captured.effects.escaped, strict=True)
        end = End(
            captured,
            tuple(self.ids[id(x)] for x in call.reals),
            made,
            tuple((self.ids[id(p)], i) for p, i in escaped),
            tuple((self.ids[id(call.reals[path[1]])], value) for path, value in asked),
            tuple(n for n in self.t.b.nodes[self._inside :] if n.op.family == "host"),
        )
        self.recall.add(self.root, self.events, end)

    def _came_in(self) -> int:
        """The number of runtime scalars that came in while the user's code ran."""
        inside = (x for e in self.events if type(e) is Call for x in e.found)
        came = sum(x[0] in ("item", "cut") for x in inside)
        return sum(type(e) is ScalarCame for e in self.events) + came

    def _handle(self, x: torch.Tensor) -> Handle | None:
        return x.handle if type(x) is TracedTensor else self.t.inputs.by_id.get(id(x))

    # ---- afterwards

    def proxies(self) -> list[TracedTensor]:
        """Those that user code has got so far."""
        return [x for x in self.objects if type(x) is TracedTensor]

    def keep_spares(self, created: Iterable[New], escaped: Collection[int]) -> None:
        """Keep the proxies that nobody has any more, to hand them out again. Those at the positions
        `escaped` become real, also where only a context of a custom function has held them."""
        objects = self.objects
        for new in created:
            if count(objects[new.at]) == ALONE and new.at not in escaped:
                proxy = objects[new.at]
                # not real now, and nothing on it that the user put there
                unused = type(proxy) is TracedTensor and not proxy.__dict__ and new.rows is None
                if unused and not weakref.getweakrefcount(proxy):
                    new.spare = proxy

    def release(self) -> None:
        """Let go of the tensors."""
        self.objects.clear()
        self.ids.clear()

    def holds(self) -> Iterable[int]:
        """The ids of the tensors that the journal itself holds."""
        return self.ids.keys()

    # ---- tensors

    def _note(self, x: torch.Tensor) -> int:
        self.ids[id(x)] = at = len(self.objects)
        self.objects.append(x)
        return at


def _is_draw(found: tuple) -> bool:
    kind, what, *_ = found
    return kind == "draw" or (kind == "tensors" and isinstance(what.search, Sampled))


def without_holder(path: Path) -> Path:
    """Where a runtime scalar comes from, without the dict that holds it: another one will do."""
    if path[0] == "after":
        return (*path[:2], without_holder(path[2]))
    return (path[0], *path[2:]) if path[0] == "entry" else path
