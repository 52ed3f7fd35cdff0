"""Runtime scalars: Python floats that a compiled step reads anew on every call.

A `TracedFloat` is a float with the true value, so C code that reads it computes what eager would.
Arithmetic on it is recorded as host nodes; a decision taken on it (comparison, `int()`, hashing,
formatting) is recorded as a predicate, which a replay checks before it runs.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

from tracejit.capture.trace import location
from tracejit.capture.trace.journal import Journal
from tracejit.ir.graph import Arg, Builder, Value
from tracejit.ir.types import HOST_SCALAR

# Where a runtime scalar comes from, by the first item:
#   arg i …, kwarg name …, cell name, global name, default i …, kwdefault name …   of the step
#   entry n key i …            a float in the n-th dict of the call (param_groups), as it is when
#                              the call starts
#   item k                     the one element of the k-th outside tensor, read before the plan runs
#   after n path               what a path leads to when the n-th callback has run
#   cut n                      the n-th number that Python read in the step: a value of the graph
#   computed n                 a float that Python computed in this call; a replay cannot know it
Path = tuple


@dataclass(frozen=True, slots=True)
class Predicate:
    """A decision that the trace took: `left <relation> right` was `outcome` (host values)."""

    relation: str  # "lt", "le", "eq", "ne", "gt", "ge", or "is": the very same float
    left: Arg
    right: Arg
    outcome: bool


RELATIONS: dict[str, Callable[[float, float], bool]] = {
    name: getattr(operator, name) for name in ("lt", "le", "eq", "ne", "gt", "ge")
}


def same_float(a: float, b: float) -> bool:
    """Whether two floats are the same value, sign of zero and NaN included."""
    if a != a or b != b:
        return a != a and b != b
    return a == b and math.copysign(1.0, a) == math.copysign(1.0, b)


RELATIONS["is"] = same_float


class Scalars:
    """The runtime scalars of one trace. Floats that the user keeps after it are plain numbers."""

    def __init__(self, b: Builder, journal: Journal):
        self.b, self.journal = b, journal
        self.active = False  # the step's Python is running, or is taken to be
        self.params: list[tuple[Value, float]] = []  # host inputs of the graph
        self.paths: list[Path] = []  # where each of them comes from
        self.numbers: dict[Value, float] = {}  # what every host value is in this trace
        self.predicates: list[Predicate] = []
        self.read: set[Value] = set()  # cuts, and what was computed from them
        self.opaque: list[str] = []  # what Python did that no replay can follow

    def come(self, number: float, path: Path) -> TracedFloat:
        """A runtime scalar: a new host input of the graph."""
        value = self.journal.scalar(path, number)
        self.paths.append(path)
        if value is None:
            value = self.b.param(HOST_SCALAR)
            self.params.append((value, number))
            self.journal.found_scalar(path, value)
        if path[0] == "cut":
            self.read.add(value)
        return TracedFloat.make(number, self, value)

    def arithmetic(self, op: str, *args: Arg) -> Value:
        """Emit arithmetic on runtime scalars."""
        value = self.journal.arithmetic(op, args)
        if value is None:
            value = getattr(self.b, op)(*args)
        if self.read and not self.read.isdisjoint(args):
            self.read.add(value)
        return value

    def taken(self, how: str) -> None:
        """Python has got something that no replay can follow."""
        if how not in self.opaque:
            self.opaque.append(how)

    def decide(self, predicate: Predicate) -> None:
        """Python takes a decision on a runtime scalar."""
        if not self.journal.decision(predicate):
            self.journal.found_decision(predicate)
            self.predicates.append(predicate)

    def close(self) -> None:
        """The trace is over: what the user keeps of it keeps nothing alive."""
        self.active = False
        self.b = self.journal = None
        self.params, self.paths, self.numbers, self.predicates = [], [], {}, []
        self.read, self.opaque = set(), []


class TracedFloat(float):
    """A float whose value is a runtime scalar of the trace in progress."""

    __slots__ = ("scalars", "value")
    scalars: Scalars
    value: Value

    def __new__(cls, x: object = 0.0) -> float:
        """What `type(x)(y)` makes: a plain float."""
        return float(x)

    @classmethod
    def make(cls, number: float, scalars: Scalars, value: Value) -> TracedFloat:
        made = float.__new__(cls, number)
        made.scalars = scalars
        made.value = value
        scalars.numbers[value] = float.__pos__(made)
        return made

    @property
    def live(self) -> Scalars | None:
        """The scalars of its trace, while that is going on."""
        return self.scalars if self.scalars.active else None

    def pin(self) -> float:
        """Take the value itself: a replay is good for this value only. One that the step has
        computed would hardly come again: there is no replay then."""
        number, live = float.__pos__(self), self.live
        if live is None:
            return number
        if self.value in live.read:
            live.taken(
                "it makes text or a plain float of a number that it has computed, at "
                f"{location.short()}; return the number, or keep it a tensor"
            )
        else:
            live.decide(Predicate("is", self.value, number, True))
        return number

    def __bool__(self) -> bool:
        return self != 0.0  # a decision

    real = property(lambda self: self.pin())
    imag = property(lambda self: 0.0)

    def __reduce__(self):
        return float, (self.pin(),)


def is_runtime(x: object) -> bool:
    """Whether a number is a runtime scalar of a trace that is still going on."""
    return isinstance(x, TracedFloat) and x.scalars.active


def plain(x: object) -> object:
    """A float without the record of where it comes from; anything else as it is."""
    return float.__pos__(x) if isinstance(x, TracedFloat) else x


def pinned(x: object) -> object:
    """A float as a plain one, good for its value only; anything else as it is."""
    return x.pin() if isinstance(x, TracedFloat) else x


def _operand(x: object, live: Scalars | None) -> Arg | None:
    """The host operand that a number stands for; None for anything else."""
    if isinstance(x, TracedFloat):
        return x.value if x.live is live else float.__pos__(x)
    return x if isinstance(x, (int, float)) else None


def _arithmetic(op_name: str, python: Callable, *, reflected: bool) -> Callable:
    def method(self: TracedFloat, other: object):
        live = self.live
        if live is None and is_runtime(other):  # self was kept from an earlier trace
            return python(other, plain(self)) if reflected else python(plain(self), other)
        operand = _operand(other, live)
        if isinstance(other, complex):  # complex would read the value itself
            return python(other, self.pin()) if reflected else python(self.pin(), other)
        if operand is None:
            return NotImplemented
        mine, theirs = float.__pos__(self), plain(other)
        number = python(theirs, mine) if reflected else python(mine, theirs)
        if live is None:
            return number
        if not isinstance(number, float):  # a negative base to a fractional power is complex
            for operand in (self, other):
                if isinstance(operand, TracedFloat):
                    operand.pin()
            return number
        args = (operand, self.value) if reflected else (self.value, operand)
        return TracedFloat.make(number, live, live.arithmetic(op_name, *args))

    return method


def _unary(op_name: str, python: Callable) -> Callable:
    def method(self: TracedFloat):
        number = python(float.__pos__(self))
        live = self.live
        if live is None:
            return number
        return TracedFloat.make(number, live, live.arithmetic(op_name, self.value))

    return method


def _comparison(relation: str) -> Callable:
    def method(self: TracedFloat, other: object):
        live = self.live
        if live is None and is_runtime(other):
            return RELATIONS[relation](plain(self), other)
        operand = _operand(other, live)
        if operand is None:
            return NotImplemented
        outcome = RELATIONS[relation](float.__pos__(self), plain(other))
        if live is not None:
            live.decide(Predicate(relation, self.value, operand, outcome))
        return outcome

    return method


def _pinned(name: str) -> Callable:
    plain = getattr(float, name)

    def method(self: TracedFloat, *args):
        return plain(self.pin(), *args)

    return method


for _name, _python in (
    ("add", operator.add),
    ("sub", operator.sub),
    ("mul", operator.mul),
    ("truediv", operator.truediv),
    ("floordiv", operator.floordiv),
    ("mod", operator.mod),
    ("pow", operator.pow),
):
    _op = "host_" + _name.replace("truediv", "div")
    setattr(TracedFloat, f"__{_name}__", _arithmetic(_op, _python, reflected=False))
    setattr(TracedFloat, f"__r{_name}__", _arithmetic(_op, _python, reflected=True))
TracedFloat.__neg__ = _unary("host_neg", operator.neg)
TracedFloat.__abs__ = _unary("host_abs", abs)
TracedFloat.__pos__ = lambda self: self
for _name in ("lt", "le", "eq", "ne", "gt", "ge"):
    setattr(TracedFloat, f"__{_name}__", _comparison(_name))
for _name in (
    *("__int__", "__float__", "__trunc__", "__floor__", "__ceil__", "__round__"),
    *("__hash__", "__repr__", "__str__", "__format__", "__divmod__", "__rdivmod__"),
    *("is_integer", "as_integer_ratio", "hex", "conjugate", "__getnewargs__"),
):
    setattr(TracedFloat, _name, _pinned(_name))
