"""Runtime scalars: Python numbers that a compiled step reads anew on every call.

A `TracedFloat` is a float with the true value, so C code that reads it computes what eager would. A
`TracedInt` stands for an int. Arithmetic on them is recorded as host nodes; a decision taken on one
(comparison, `int()`, hashing, formatting) is recorded as a predicate, which a replay checks before
it runs.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import numpy as np
import torch

from tracejit.capture.trace import location
from tracejit.capture.trace.journal import Journal
from tracejit.ir.graph import Arg, Builder, Value
from tracejit.ir.types import HOST_SCALAR
from tracejit.records import dataclass

# Where a runtime scalar comes from, by the first item:
#   arg i …, kwarg name …, cell name, global name, default i …, kwdefault name …   of the step
#   entry n key i …            a number in the n-th holder of the call (a dict of param_groups, or
#                              what else the step assigns to), as it is when the call starts
#   item k                     the one element of the k-th outside tensor, read before the plan runs
#   after n path               what a path leads to when the n-th callback has run
#   cut n                      the n-th number that Python read in the step: a value of the graph
#   held n                     a plain number that the step has put into a param group: the same one
#                              whenever what it reads is the same
#   computed n                 a number that Python computed in this call; a replay cannot know it
Path = tuple


@dataclass(frozen=True, slots=True)
class Predicate:
    """A decision that the trace took: `left <relation> right` was `outcome` (host values)."""

    relation: str  # "lt", "le", "eq", "ne", "gt", "ge", or "is": the very same number
    left: Arg
    right: Arg
    outcome: bool


RELATIONS: dict[str, Callable[[float, float], bool]] = {
    name: getattr(operator, name) for name in ("lt", "le", "eq", "ne", "gt", "ge")
}


def same_number(a: float, b: float) -> bool:
    """Whether two numbers are the same value, sign of zero and NaN included."""
    if a != a or b != b:
        return a != a and b != b
    return a == b and (a != 0 or math.copysign(1.0, a) == math.copysign(1.0, b))


RELATIONS["is"] = same_number


class Scalars:
    """The runtime scalars of one trace. Floats that the user keeps after it are plain numbers."""

    def __init__(self, b: Builder, journal: Journal):
        self.b, self.journal = b, journal
        self.active = False  # the step's Python is running, or is taken to be
        self.params: list[tuple[Value, float]] = []  # host inputs of the graph
        self.paths: list[Path] = []  # where each of them comes from
        self.numbers: dict[Value, float] = {}  # what every host value is in this trace
        self.given: list[TracedFloat | TracedInt] = []  # all that user code has got
        self.has_integers = False
        self.pins_integers = False  # what is read of tensors is a plain int, good for its value
        self.predicates: list[Predicate] = []
        self.read: set[Value] = set()  # cuts, and what was computed from them
        self.opaque: list[str] = []  # what Python did that no replay can follow
        self.texts: list[object] = []  # that Python makes of them and keeps: `python/kept.py`
        # what notes the functions that run is told that those in between are of no interest
        self.pause: Callable[[], bool] = bool
        self.go_on: Callable[[], None] = bool

    def traced(self, number: float, value: Value) -> TracedFloat | TracedInt:
        """The number that user code gets for a host value."""
        self.numbers[value] = number
        if type(number) is int:
            self.has_integers = True
            made = TracedInt.make(number, self, value)
        else:
            made = TracedFloat.make(number, self, value)
        self.given.append(made)
        return made

    def come(self, number: float, path: Path) -> TracedFloat | TracedInt:
        """A runtime scalar: a new host input of the graph."""
        value = self.journal.scalar(path, number)
        self.paths.append(path)
        if value is None:
            value = self.b.param(HOST_SCALAR)
            self.params.append((value, number))
            self.journal.found_scalar(path, type(number), value)
        if path[0] == "cut":
            self.read.add(value)
        return self.traced(number, value)

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
        self.read, self.opaque, self.texts = set(), [], []


class _Traced:
    """What the two classes of runtime scalars have in common."""

    __slots__ = ()
    __array_priority__ = 1.0  # arrays and scalars of numpy let it answer
    scalars: Scalars
    value: Value

    @property
    def live(self) -> Scalars | None:
        """The scalars of its trace, while that is going on."""
        return self.scalars if self.scalars.active else None

    def pin(self) -> float:
        """Take the value itself: a replay is good for this value only. A float that the step has
        computed would hardly come again: there is no replay then."""
        number, live = plain(self), self.live
        if live is None:
            return number
        if self.value in live.read and type(number) is float:
            live.taken(
                "it makes text or a plain float of a number that it has computed, at "
                f"{location.short()}; return the number, or keep it a tensor"
            )
        else:
            live.decide(Predicate("is", self.value, number, True))
        return number

    def __bool__(self) -> bool:
        return self != 0  # a decision

    def __pos__(self) -> object:
        return self

    def __divmod__(self, other: object) -> tuple:
        return self // other, self % other

    def __rdivmod__(self, other: object) -> tuple:
        return other // self, other % self

    def __reduce__(self):
        number = self.pin()
        return type(number), (number,)


class TracedFloat(_Traced, float):
    """A float whose value is a runtime scalar of the trace in progress."""

    __slots__ = ("scalars", "value")

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

    real = property(lambda self: self.pin())
    imag = property(lambda self: 0.0)

    def __round__(self, *digits: object) -> object:
        return round(self.pin(), *map(pinned, digits)) if digits else _rounded(self)


class TracedInt(_Traced, torch.SymInt):
    """An int whose value is a runtime scalar of the trace in progress.

    It is no int for C, which would read the value without asking it; but it is one for whoever asks
    `isinstance`. torch passes it on wherever it takes an int, since it is a `SymInt`.
    """

    __slots__ = ("number", "scalars", "value")
    __class__ = property(lambda self: int)

    def __new__(cls, x: object = 0, *rest: object) -> object:
        """What `type(x)(y)` makes: a plain int."""
        return int(x, *rest)

    @classmethod
    def make(cls, number: int, scalars: Scalars, value: Value) -> TracedInt:
        made = object.__new__(cls)
        made.number, made.scalars, made.value = number, scalars, value
        return made

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.pin(), dtype)

    def __float__(self) -> float:
        return float(self.pin())

    real = numerator = property(lambda self: self)
    imag = property(lambda self: 0)
    denominator = property(lambda self: 1)

    def __round__(self, *digits: object) -> object:
        return round(self.pin(), *map(pinned, digits)) if digits else self


@dataclass(frozen=True, slots=True, eq=False)
class TracedText:
    """A text that was made of a runtime scalar: a host value. Python has the plain text."""

    text: str
    scalars: Scalars
    value: Value


def is_traced(x: object) -> bool:
    """Whether a number is a runtime scalar, of whatever trace."""
    return isinstance(x, _Traced)


def is_runtime(x: object) -> bool:
    """Whether a number is a runtime scalar of a trace that is still going on."""
    return isinstance(x, _Traced) and x.scalars.active


def plain(x: object) -> object:
    """A number without the record of where it comes from; anything else as it is."""
    if isinstance(x, TracedFloat):
        return float.__pos__(x)
    return x.number if type(x) is TracedInt else x


def pinned(x: object) -> object:
    """A number as a plain one, good for its value only; anything else as it is."""
    return x.pin() if isinstance(x, _Traced) else x


def to_float(x: object) -> object:
    """A runtime scalar as one that is a float; anything else as it is."""
    if type(x) is not TracedInt:
        return x
    if x.live is None:
        return float(x.number)
    return x.live.traced(float(x.number), x.live.arithmetic("host_float", x.value))


def _operand(x: object, live: Scalars | None) -> Arg | None:
    """The host operand that a number stands for; None for anything else."""
    if isinstance(x, _Traced):
        return x.value if x.live is live else plain(x)
    return x if isinstance(x, (int, float)) else None


def _of_python(x: object) -> object:
    """A number of numpy that is a float too as just that."""
    return float(x) if type(x) is np.float64 else x


_READING = (complex, np.generic, np.ndarray)
ANSWERING: set[type] = set()  # of objects that take part in arithmetic with runtime scalars


def _unheard(method: Callable) -> Callable:
    """A method on numbers, with what notes the functions that run paused: no code of the user's
    runs in it, unless the operand is of the user's class."""

    def unheard(self: _Traced, *others: object):
        scalars = self.scalars
        for x in others:
            if type(x) not in _NUMBERS:
                return method(self, *others)
        if not (scalars.active and scalars.pause()):
            return method(self, *others)
        try:
            return method(self, *others)
        finally:
            scalars.go_on()

    return unheard


_NUMBERS = frozenset({bool, int, float, TracedFloat, TracedInt})


def _arithmetic(op_name: str, python: Callable, *, reflected: bool) -> Callable:
    def method(self: _Traced, other: object, *modulo: object):
        live, other = self.live, _of_python(other)
        if modulo:
            return python(pinned(self), pinned(other), *map(pinned, modulo))
        operand: Arg | None = other
        if type(other) is not float and type(other) is not int:
            if live is None and is_runtime(other):  # self was kept from an earlier trace
                return python(other, plain(self)) if reflected else python(plain(self), other)
            if type(other) in ANSWERING:
                return NotImplemented
            operand = _operand(other, live)
            if isinstance(other, _READING):  # they would read the value without asking
                return python(other, self.pin()) if reflected else python(self.pin(), other)
            if operand is None:
                return NotImplemented
        mine, theirs = plain(self), plain(other)
        number = python(theirs, mine) if reflected else python(mine, theirs)
        if live is None:
            return number
        if python is pow and type(number) in (int, float) and type(mine) is type(theirs) is int:
            operator.lt(self if reflected else other, 0)  # decides whether the power is an int
        if not isinstance(number, (int, float)):  # a negative base to a fraction is complex
            for operand in (self, other):
                if isinstance(operand, _Traced):
                    operand.pin()
            return number
        args = (operand, self.value) if reflected else (self.value, operand)
        return live.traced(number, live.arithmetic(op_name, *args))

    return _unheard(method)


def _unary(op_name: str, python: Callable) -> Callable:
    def method(self: _Traced):
        number = python(plain(self))
        live = self.live
        if live is None:
            return number
        return live.traced(number, live.arithmetic(op_name, self.value))

    return _unheard(method)


def _comparison(relation: str) -> Callable:
    def method(self: _Traced, other: object):
        live, other = self.live, _of_python(other)
        if live is None and is_runtime(other):
            return RELATIONS[relation](plain(self), other)
        if type(other) in ANSWERING:
            return NotImplemented
        if isinstance(other, (np.generic, np.ndarray)):
            return RELATIONS[relation](self.pin(), other)
        operand = _operand(other, live)
        if operand is None:
            return NotImplemented
        outcome = RELATIONS[relation](plain(self), plain(other))
        if live is not None:
            live.decide(Predicate(relation, self.value, operand, outcome))
        return outcome

    return _unheard(method)


def _pinned(name: str, kind: type) -> Callable:
    plain_method = getattr(kind, name)

    def method(self: _Traced, *args):
        return plain_method(self.pin(), *map(pinned, args))

    return method


for _name, _python in (
    ("add", operator.add),
    ("sub", operator.sub),
    ("mul", operator.mul),
    ("truediv", operator.truediv),
    ("floordiv", operator.floordiv),
    ("mod", operator.mod),
    ("pow", pow),
):
    _op = "host_" + _name.replace("truediv", "div")
    setattr(_Traced, f"__{_name}__", _arithmetic(_op, _python, reflected=False))
    setattr(_Traced, f"__r{_name}__", _arithmetic(_op, _python, reflected=True))
_Traced.__neg__ = _unary("host_neg", operator.neg)
_Traced.__abs__ = _unary("host_abs", abs)
_rounded = _unary("host_round", round)
for _name in ("lt", "le", "eq", "ne", "gt", "ge"):
    setattr(_Traced, f"__{_name}__", _comparison(_name))
_OF_BOTH = (
    *("__int__", "__trunc__", "__floor__", "__ceil__"),
    *("__hash__", "__repr__", "__str__", "__format__"),
    *("as_integer_ratio", "conjugate", "__getnewargs__"),
)
for _name in (*_OF_BOTH, "__float__", "is_integer", "hex"):
    setattr(TracedFloat, _name, _pinned(_name, float))
for _name in (
    *(*_OF_BOTH, "__index__", "__invert__", "bit_length", "bit_count", "to_bytes"),
    *(f"__{r}{op}__" for r in ("", "r") for op in ("and", "or", "xor", "lshift", "rshift")),
):
    setattr(TracedInt, _name, _pinned(_name, int))
