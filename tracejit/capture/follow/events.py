"""The events of a trace, recorded without its tensors, so that traces can be compared.

Every event that reaches a tracer from outside is one of these: a torch call with its arguments and
what its rule found outside, a runtime scalar that came in, arithmetic and decisions on such.
A tensor is recorded as its position among all tensor objects that the user's Python passed or got.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import field

import torch

from tracejit.capture.effects.captured import cut_key
from tracejit.capture.effects.effects import instance_of, is_named
from tracejit.capture.functions.collectives import ENGINE
from tracejit.capture.trace.autocast import State
from tracejit.capture.trace.cuts import Cut
from tracejit.capture.trace.scalars import Path, Predicate, same_number
from tracejit.capture.trace.tensor import Geometry, TracedTensor
from tracejit.errors import TracejitError
from tracejit.ir.graph import Arg, Value
from tracejit.records import dataclass

CONSTANTS = frozenset(
    {bool, int, float, str, type(None), type(...), type(NotImplemented), torch.Size, torch.dtype}
    | {torch.device, torch.layout, torch.memory_format, torch.Generator}
    | {type(torch.autograd.Function)}  # whose instances are classes
    | ENGINE
)
TUPLE_ITERATOR = type(iter(()))
Match = Callable[..., object]  # see matchers.py
UNKNOWN = object()  # the answer to a call that no earlier trace made here


class Incomparable(Exception):
    """A call with an argument or result that cannot be compared with another's."""


# ---- arguments and results, without the tensors


@dataclass(frozen=True, slots=True)
class Known:
    """A tensor object met before, by its position."""

    at: int


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """All that a trace can see of a tensor from outside, besides its `.grad` and values."""

    type: type
    keys: int  # torch's dispatch keys
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    is_leaf: bool
    hooks: bool
    memory: int  # the position of the first tensor of its storage

    @classmethod
    def of(cls, x: torch.Tensor, at: int, memory: dict[int, int]) -> TensorMeta:
        """How the tensor at a position looks. `memory` has the first position of each storage, and
        grows here. Raises Incomparable for tensors that have no strides."""
        strided = x.layout is torch.strided and not x.is_quantized
        if not strided or torch._C._functorch.is_functorch_wrapped_tensor(x):
            raise Incomparable
        geometry = x.shape, x.stride(), x.storage_offset(), x.dtype, x.device
        requires_grad = x.requires_grad
        autograd = requires_grad, x.is_leaf, requires_grad and _hooked(x)
        first = memory.setdefault(x.untyped_storage()._cdata, at)
        return cls(type(x), _keys(x).raw_repr(), *geometry, *autograd, first)

    def fits(self, x: torch.Tensor) -> bool:
        """Whether something is a tensor that looks so, but for its memory."""
        requires_grad = self.requires_grad
        return (
            type(x) is self.type
            and _keys(x).raw_repr() == self.keys
            and x.shape == self.shape
            and x.dtype is self.dtype
            and x.stride() == self.strides
            and x.storage_offset() == self.offset
            and x.requires_grad is requires_grad
            and (self.device == _CPU or x.device == self.device)  # the keys say so
            and (not requires_grad or (x.is_leaf is self.is_leaf and _hooked(x) is self.hooks))
        )


_keys = torch._C._dispatch_keys
_CPU = torch.device("cpu")


def _hooked(x: torch.Tensor) -> bool:
    return bool(x._backward_hooks or x._post_accumulate_grad_hooks)


@dataclass(frozen=True, slots=True)
class Outside:
    """A tensor from outside that is met for the first time."""

    at: int
    meta: TensorMeta


@dataclass(eq=False, slots=True)
class New:
    """A new proxy. `spare` is the one of an earlier trace, which nobody has any more.

    `rows` is for one that has as many rows as values say: the tensor that has as many, or the cut
    that has found in this call how many each step has."""

    at: int
    number: int  # among the proxies of the trace
    geometry: Geometry
    spare: TracedTensor | None = None
    rows: Known | Cut | None = None


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
class Found:
    """The k-th input that the cuts of a trace have found."""

    k: int


@dataclass(frozen=True, slots=True)
class Drawn:
    """What the k-th draw of a trace has drawn."""

    k: int


Input = int | Value | Found | Drawn  # of a cut: the position of a tensor, a runtime scalar, …


@dataclass(frozen=True, slots=True)
class Read:
    """What Python got of the values of a tensor: another object on each call."""


@dataclass(frozen=True, slots=True)
class Many:
    """A tuple, list, namedtuple, slice, or an iterator over a tuple."""

    kind: type
    items: tuple


def same(a: object, b: object) -> bool:
    """Whether two plain values are the same: 1, 1.0 and True differ, and so do 0.0 and -0.0."""
    if a is b:
        return True
    return type(a) is type(b) and (same_number(a, b) if type(a) is float else a == b)


# ---- what happens in a trace


@dataclass(eq=False, slots=True)
class Point:
    """A place in the tree: what came next in earlier traces."""

    events: list[Event] = field(default_factory=list)
    ends: list[object] = field(default_factory=list)  # see recall.py


@dataclass(eq=False, slots=True)
class Event:
    """Something that a trace met; equal `key`s make it the same in two traces."""

    then: Point = field(default_factory=Point, kw_only=True)


@dataclass(eq=False, slots=True)
class ScalarCame(Event):
    """A runtime scalar came in, an int or a float."""

    path: Path
    kind: type
    value: Value

    @property
    def key(self) -> tuple:
        return "scalar", self.path, self.kind, self.value


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
    tensor of one element; ("host", node) and ("decision", predicate) what was done with numbers;
    ("cut", cut, inputs, value), ("values", cut, inputs, convert) and ("plain", value) what it
    computed for Python; ("tensors", cut, inputs) what it has found in a value, as long as it was;
    ("draw", event, generator) what it has drawn, after all that it asks.
    """

    func: Callable
    args: tuple
    names: tuple[str, ...]  # of the keyword arguments, the last of `args`
    grad_on: bool
    dtype: torch.dtype  # the default one
    casts: tuple[State, int] | None  # autocast, and how often its cache was cleared; None: off
    line: str
    found: list[tuple] = field(default_factory=list)
    result: object = None
    errors: list[TracejitError] = field(default_factory=list)  # of indices that are out of range
    match: Match | None = None  # whether a call is this one, made when it is first asked for

    @property
    def key(self) -> tuple:
        found = tuple(map(_key, self.found))
        return self.func, self.args, self.names, self.grad_on, self.dtype, self.casts, found


def _key(found: tuple) -> tuple:
    kind, *what = found
    if kind == "decision":
        return kind, *Decision(*what).key
    return tuple(cut_key(x) if isinstance(x, Cut) else x for x in found)


def news(recorded: object) -> Iterator[New]:
    """The new proxies of a result."""
    if type(recorded) is New:
        yield recorded
    elif type(recorded) is Many:
        for item in recorded.items:
            yield from news(item)


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
    return instance_of(kind, items) if is_named(kind) else kind(items)
