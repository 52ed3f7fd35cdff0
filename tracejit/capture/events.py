"""What happens in a trace, told without its tensors: one trace can be compared with another.

Every event that reaches a tracer from outside is one of these: a torch call with its arguments and
what its rule found outside, a runtime scalar that came in, arithmetic and decisions on such.
Tensors are told by their position among all tensor objects that the user's Python passed or got.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from tracejit.capture.scalars import Path, Predicate, same_float
from tracejit.capture.tensor import Geometry, TracedTensor
from tracejit.ir.graph import Arg, Value

if TYPE_CHECKING:
    from tracejit.capture.recall import End
    from tracejit.errors import TracejitError

CONSTANTS = frozenset(
    {bool, int, float, str, type(None), type(...), type(NotImplemented), torch.Size, torch.dtype}
    | {torch.device, torch.layout, torch.memory_format}
)
TUPLE_ITERATOR = type(iter(()))


class Untold(Exception):
    """A call with an argument or result that cannot be compared with another's."""


# ---- arguments and results, without the tensors


@dataclass(frozen=True, slots=True)
class Known:
    """A tensor object met before, by its position."""

    at: int


@dataclass(frozen=True, slots=True)
class Outside:
    """A tensor from outside that is met for the first time, by all that a trace can see of it."""

    at: int
    look: tuple


@dataclass(eq=False, slots=True)
class New:
    """A new proxy. `spare` is the one of the latest trace, which is used again if nobody has it."""

    at: int
    number: int  # among the proxies of the trace
    geometry: Geometry
    spare: TracedTensor | None = None


@dataclass(frozen=True, slots=True)
class Number:
    """A runtime scalar."""

    value: Value


@dataclass(frozen=True, slots=True, eq=False)
class Same:
    """A plain value."""

    x: object

    def __eq__(self, other: object) -> bool:
        return type(other) is Same and same(self.x, other.x)

    def __hash__(self) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class Many:
    """A tuple, list, namedtuple, slice, or an iterator over a tuple."""

    kind: type
    items: tuple


def same(a: object, b: object) -> bool:
    """Whether two plain values are the same: 1, 1.0 and True differ, and so do 0.0 and -0.0."""
    if a is b:
        return True
    return type(a) is type(b) and (same_float(a, b) if type(a) is float else a == b)


# ---- what happens in a trace


@dataclass(eq=False, slots=True)
class Point:
    """A place in the tree: what came next in earlier traces."""

    events: list[Event] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Event:
    """Something that a trace met; equal `key`s make it the same in two traces."""

    then: Point = field(default_factory=Point, kw_only=True)


@dataclass(eq=False, slots=True)
class ScalarCame(Event):
    """A runtime scalar came in."""

    path: Path
    value: Value

    @property
    def key(self) -> tuple:
        return "scalar", self.path, self.value


@dataclass(eq=False, slots=True)
class Arithmetic(Event):
    """Arithmetic on runtime scalars."""

    op: str
    args: tuple[Same | Number, ...]
    value: Value

    @property
    def key(self) -> tuple:
        return "host", self.op, self.args, self.value


@dataclass(eq=False, slots=True)
class Decision(Event):
    """A decision on a runtime scalar."""

    predicate: Predicate

    @property
    def key(self) -> tuple:
        p = self.predicate
        return "decision", p.relation, operand(p.left), operand(p.right), p.outcome


@dataclass(eq=False, slots=True)
class Call(Event):
    """A torch function was called. `found` is what its rule found outside, in order:

    ("grad", owner, what) a `.grad`: None, or a tensor; ("item", tensor, value) the number of a
    tensor of one element; ("host", node) and ("decision", predicate) what was done with numbers.
    """

    func: Callable
    args: tuple
    names: tuple[str, ...]  # of the keyword arguments, the last of `args`
    grad_on: bool
    dtype: torch.dtype  # the default one
    line: str
    found: list[tuple] = field(default_factory=list)
    result: object = None
    errors: list[TracejitError] = field(default_factory=list)  # of indices that are out of range

    @property
    def key(self) -> tuple:
        found = tuple(
            ("decision", *Decision(x[1]).key) if x[0] == "decision" else x for x in self.found
        )
        return self.func, self.args, self.names, self.grad_on, self.dtype, found


def operand(arg: Arg) -> Same | Number:
    """A number among the operands of host arithmetic."""
    return Number(arg) if isinstance(arg, Value) else Same(arg)


def items_of(x: object) -> tuple | list:
    """The items of what `Many` tells."""
    if type(x) is slice:
        return x.start, x.stop, x.step
    if type(x) is TUPLE_ITERATOR:
        rest = x.__reduce__()
        return rest[1][0][rest[2] if len(rest) > 2 else 0 :]
    return x


def container(kind: type, items: list) -> object:
    """A container of that kind with these items."""
    if kind is list:
        return items
    if kind is tuple:
        return tuple(items)
    if kind is slice:
        return slice(*items)
    if kind is TUPLE_ITERATOR:
        return iter(tuple(items))
    return kind(*items) if hasattr(kind, "_fields") else kind(items)
