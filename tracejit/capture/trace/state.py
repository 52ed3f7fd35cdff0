"""The state of a trace: the Graph under construction, its tape, and what stands beside them.

Rules take a `Trace` (trace.py), which adds to this what reads, writes and makes tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import field

import torch
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from tracejit.autodiff import Entry, Tape, Vjp
from tracejit.capture.trace import location
from tracejit.capture.trace.draws import Draws
from tracejit.capture.trace.journal import Journal
from tracejit.capture.trace.keys import Keys
from tracejit.capture.trace.scalars import Scalars, plain
from tracejit.capture.trace.table import function_name
from tracejit.capture.trace.tensor import TO_TORCH, Family, Handle, Origin, Storage, TracedTensor
from tracejit.errors import (
    AutogradError,
    DerivativeError,
    DtypeError,
    ShapeError,
    TracejitError,
    UnsupportedOperation,
)
from tracejit.ir.graph import Builder, Graph, Node, Value
from tracejit.ir.on_tensors import on_numpy
from tracejit.ir.types import DType, Type
from tracejit.records import dataclass

_REWRITE = "Rewrite it with supported functions, or move it out of the step"


@dataclass(eq=False, slots=True)
class Inputs:
    """The tensors from outside that a trace has met, in the order of first use."""

    tensors: list[torch.Tensor] = field(default_factory=list)
    handles: list[Handle] = field(default_factory=list)  # of `tensors`
    storages: list[Storage] = field(default_factory=list)  # each with a graph input
    by_id: dict[int, Handle] = field(default_factory=dict)
    by_memory: dict[int, list[Handle]] = field(default_factory=dict)  # by torch storage
    borrowed: list[Handle] = field(default_factory=list)  # whose memory is not torch's own
    overlapping: set[Storage] = field(default_factory=set)  # with others, of another geometry

    def add(self, tensor: torch.Tensor, handle: Handle) -> None:
        """A tensor has come in."""
        self.by_id[id(tensor)] = handle
        self.tensors.append(tensor)
        self.handles.append(handle)

    def position(self, tensor: torch.Tensor) -> int:
        """The position of a tensor that has come in."""
        return next(i for i, x in enumerate(self.tensors) if x is tensor)

    def release(self) -> None:
        """Let go of the tensors: a trace's objects lie in cycles until the collector comes, and
        gradients that the step has dropped must not wait for it."""
        for handle in self.by_id.values():
            handle.tensor = handle.grad = handle.grad_at_start = None
            handle.storage.real = None
        self.by_id.clear()


@dataclass(slots=True)
class Formula:
    """The derivative formula that is being emitted: of which entry, from which value number on,
    and the cotangents that have arrived there."""

    start: int
    entry: Entry
    cotangents: frozenset[Value]


@dataclass(frozen=True, slots=True)
class Backward:
    """A backward that runs hooks: its number, the values whose cotangents it comes to, and whether
    it is no `autograd.grad`."""

    number: int
    reached: set[Value]
    accumulates: bool


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a checkpointed function began: the writes to each storage, the number of draws, the
    number of its first value."""

    writes: dict[Storage, int]
    draws: int
    first: int


@dataclass(frozen=True, slots=True)
class Region:
    """What a checkpointed function has made: the values numbered from `first` up to `stop`, which
    are so many bytes. `products`: those of matrices are kept for its backward."""

    first: int
    stop: int
    nbytes: int
    products: bool


@dataclass(slots=True)
class Casts:
    """The weights that autocast has cast, by the region of its cache: value and strides.

    The region counts how often the cache was cleared: from 1 up, or from -1 down where the caller
    of the step holds the cache, which then outlives the call."""

    region: int = 1
    known: dict[tuple[int, Handle], tuple[Value, tuple[int, ...]]] = field(default_factory=dict)

    def clear(self) -> None:
        """What is cast from now on is cast anew."""
        self.region += 1 if self.region > 0 else -1

    def outlives(self, storage: Storage) -> bool:
        """Whether the cast of a weight will be used after the call, whatever is written to it."""
        return self.region < 0 and any(
            region == self.region and h.storage is storage for region, h in self.known
        )


class TraceState:
    """One trace: what it has recorded, and errors about the torch call in progress."""

    def __init__(self, journal: Journal | None = None):
        self.journal = journal or Journal()
        self.mode: torch.overrides.TorchFunctionMode | None = None  # which intercepts for it
        # for user code inside a rule: what it runs is noted
        self.heard: Callable[[], AbstractContextManager] = nullcontext
        # is told of each torch call before its rule runs, and by what it returns, of the result
        self.on_call: Callable[[Callable, tuple, dict], Callable[[object], None] | None] | None
        self.on_call = None
        # is told of each product over windows: which it is, the result, operands, and geometry
        self.on_product: Callable[[str, Value, tuple[Value, ...], object], None] | None = None
        self.b = Builder()
        self.lines = location.Lines()  # of the user's code
        self.b.on_emit = self._on_emit
        self.scalars = Scalars(self.b, self.journal)
        self.inputs = Inputs()
        self.proxies: list[TracedTensor] = []
        self.bounds: list[object] = []  # on values: what `bounds.py` found
        self.ranges: dict[Value, tuple[float, float]] = {}  # what is known of values: `ranges.py`
        self.hyperparameters: object | None = None  # of the optimizers in reach
        self.call: tuple[Callable, tuple, dict] | None = None  # whose rule is running
        self.outer: tuple[Callable, tuple, dict] | None = None  # the one that runs user code
        self.name_of: Callable[[torch.Tensor], str | None] = lambda tensor: None  # in user code
        self.refused: TracejitError | None = None  # what eager would not have raised
        # autograd
        self.tape = Tape()
        self.taping = True
        self.formula: Formula | None = None  # being emitted
        self.leaf_of: dict[Value, Handle] = {}
        self.sealed: dict[Family, str] = {}  # why autograd refuses to write to these
        self.foreign: set[Handle] = set()  # computed outside with history: gradients leave here
        self.flagged: list[Handle] = []  # from outside, whose requires_grad has changed
        self.retained: list[Handle] = []  # intermediates whose .grad a backward fills
        self.contexts: list[object] = []  # of custom autograd functions
        self.applied: list[object] = []  # all of them, also where no rule has run yet
        # copies that stand for views whose place depends on a value, and what they are views of
        self.copied: dict[Storage, set[Storage]] = {}
        # views without elements, of what is differentiated, each with its version when it was made
        self.empty: dict[Handle, int] = {}
        self.inference: set[Storage] = set()  # made in inference mode
        # hooks by the ids of their handles: of intermediates, and of leaves that the step made
        self.hooked: dict[Value, dict[int, Callable]] = {}
        self.hooks_of_leaf: dict[Handle, tuple[dict[int, Callable], dict[int, Callable]]] = {}
        self.registered: list[RemovableHandle] = []  # on tensors from outside
        self.backward: Backward | None = None  # in progress
        # hooks on saved tensors: those of each `with`, innermost last (None: they change nothing),
        # and what they hold; see python/saved_hooks.py
        self.saving: list[object | None] = []
        self.held: list[object] = []
        self.origin: dict[Value, Origin] = {}  # where a value was read
        self.saved: dict[Value, None] = {}  # forward values that formulas have read
        # host values as sums, and the first of those that are computed alike: see integers.py
        self.sums: dict[Value, tuple[dict[Value, int], float]] = {}
        self.alike: dict[tuple, Value] = {}
        self.groups = 0  # torch calls, and derivative formulas
        self.group_of: dict[int, int] = {}  # in which of them a value was made, by its id
        # numbers in tensors, see numbers.py
        self.producers: dict[Value, Node] = {}
        self.keys = Keys(self.producers)
        self.hosted: dict[Value, float | None] = {}
        self.asked: set[Storage] = set()  # whose number Python asked for
        # values that Python read, see cuts.py
        self.evaluate: Callable[[Graph, list], torch.Tensor] = on_numpy
        self.cuts: list[object] = []
        self.read_numbers: dict[Value, float] = {}
        self.searched: dict[tuple, tuple[Value, ...]] = {}  # by value and search
        self.found: list[tuple[Value, torch.Tensor]] = []  # inputs that cuts have found
        self.firsts: dict[Value, int] = {}  # integers that values are known to begin with
        # packed sequences by their batch sizes, see functions/packed.py
        self.packed: dict[Value, object] = {}
        # leaves of torch.func, with the memory of what they stand for and its writes before
        self.entered: dict[Handle, tuple[Storage, int]] = {}
        self.draws = Draws()  # random numbers
        self.casts = Casts()  # by autocast
        self.checkpoints: list[Checkpoint] = []  # in progress, see functions/checkpointing.py
        self.regions: list[Region] = []  # that are over; one in another comes before it
        self.again: set[Value] = set()  # what backwards compute again of what these have made
        self.collectives = 0  # how many there are so far
        self.alone: list[int] = []  # of these the ones that are no module's under join()
        self.joins: dict[object, Value | None] = {}  # group -> how many have not joined, if asked
        self.shards = False  # an optimizer under join() sends the parameters
        self.armed: list[object] = []  # see functions/data_parallel.py
        self.unsynced: list[object] = []  # modules whose latest forward pass was under no_sync()
        self.wrapping = False  # torch's own Python looks at what a wrapped module returns
        self.complexes = False  # the rule that is running takes complex tensors
        self.fast_random = False  # see functions/counted.py
        self.falls_back = False  # what is refused runs eagerly

    def _on_emit(self, node: Node) -> None:
        """A node was emitted."""
        raise NotImplementedError

    def fresh(self, value: Value, strides: tuple[int, ...] | None = None) -> TracedTensor:
        """A new tensor in memory of its own."""
        raise NotImplementedError

    # ---- modes

    @property
    def grad_on(self) -> bool:
        """Whether what is computed now is recorded for differentiation."""
        return self.taping and torch.is_grad_enabled()

    @contextmanager
    def taped(self, on: bool) -> Iterator[None]:
        """Record on the tape only if `on` (and if it is recorded around this)."""
        before, self.taping = self.taping, self.taping and on
        try:
            yield
        finally:
            self.taping = before

    def untaped(self) -> object:
        """Emit without recording on the tape."""
        return self.taped(False)

    @contextmanager
    def inside(self, b: Builder, tape: Tape) -> Iterator[None]:
        """Emit into another graph, the body of a loop, with a tape of its own."""
        before = self.b, self.tape, self.formula
        self.b, self.tape, self.formula = b, tape, None
        try:
            yield
        finally:
            self.b, self.tape, self.formula = before

    def derive(self, name: str, inputs: tuple[Value, ...], output: Value, vjp: Vjp) -> Value:
        """Give `output`, emitted untaped, its own derivative formula; returns it."""
        if self.grad_on:
            self.tape.add(Entry(inputs, (output,), vjp, name))
        return output

    def product(self, name: str, operands: tuple[Value, ...], out: Value, geometry: object) -> None:
        """Tell of a product over windows, to whom that concerns."""
        if self.on_product is not None:
            self.on_product(name, out, operands, geometry)

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """As while the step's Python runs, though it may be over: arithmetic is recorded."""
        before, self.scalars.active = self.scalars.active, True
        try:
            yield
        finally:
            self.scalars.active = before

    # ---- errors

    @property
    def calling(self) -> Callable | None:
        """The torch function whose rule is running; None while arguments are bound."""
        return self.call[0] if self.call else None

    def unsupported(self, remedy: str = _REWRITE) -> UnsupportedOperation:
        """The error for the torch call in progress."""
        func, args, kwargs = self.call
        return self.refuse(
            UnsupportedOperation(
                where=location.full(),
                function=function_name(func),
                shapes=described(args, kwargs),
                remedy=remedy + ("" if remedy.endswith(".") else "."),
            )
        )

    def refuse(self, error: TracejitError) -> TracejitError:
        """Note an error of ours that eager would not raise. If the step catches it, it takes a path
        that eager would not take; so the error is raised again when the step returns."""
        self.refused = self.refused or error
        return error

    def shape_error(self, reason: str) -> ShapeError:
        """The error for shapes or dtypes that the torch call in progress rejects."""
        func, args, kwargs = self.call
        return ShapeError(
            where=location.full(),
            function=function_name(func),
            reason=reason,
            shapes=described(args, kwargs),
        )

    def not_implemented(self, name: str, dtype: DType) -> DtypeError:
        """The error for a dtype that torch has no kernel for."""
        func, args, kwargs = self.call
        return DtypeError(
            where=location.full(),
            function=function_name(func),
            reason=f'"{name}" not implemented for {TO_TORCH[dtype]}',
            shapes=described(args, kwargs),
        )

    def autograd_error(self, reason: str) -> AutogradError:
        """The error for a use of autograd that eager rejects."""
        return AutogradError(where=location.full(), reason=reason)

    def no_derivative(self, name: str) -> DerivativeError:
        """The error for a derivative that eager has not implemented."""
        reason = f"the derivative for {name} is not implemented"
        return DerivativeError(where=location.full(), reason=reason)

    def described_input(self, tensor: torch.Tensor) -> str:
        """A tensor from outside, by the name that user code has for it, and its shape."""
        with torch._C.DisableTorchFunction():
            if is_lazy(tensor):
                return "a parameter that is not initialized"
            text = f"a tensor of shape {list(tensor.shape)}"
            name = self.name_of(tensor)
        return text if name is None else f"{name}, {text},"

    # ---- the values of storages

    def stripped(self, storage: Storage) -> Value:
        """The storage's value without autograd history: an untracked alias if it has any."""
        if storage.value in self.tape.tracked or storage.value in self.leaf_of:
            with self.untaped():
                return self.b.alias(storage.value)
        return storage.value

    def make_leaf(self, handle: Handle) -> None:
        """Let a handle with no history require grad."""
        handle.requires_grad_leaf = True
        family = handle.family
        family.leaf = handle
        with self.untaped():
            family.value = self.b.alias(family.storage.value)
        self.tape.watch(family.value)
        self.leaf_of[family.value] = handle

    def base(self, family: Family) -> Value:
        """The current value of a family's storage, with the family's autograd history."""
        storage = family.storage
        if family.seen != storage.writes:
            old, tracked = family.value, family.value in self.tape.tracked
            family.seen = storage.writes
            inherited = tracked and family.leaf is None
            family.value = self.behind_autograd(old if inherited else None, storage.value)
            if family.leaf is not None:
                self.tape.watch(family.value)
                self.leaf_of[family.value] = family.leaf
        return family.value

    def behind_autograd(self, old: Value | None, new: Value) -> Value:
        """`new` with the history of `old`: written behind autograd's back, gradients flow on."""
        with self.untaped():
            new = self.b.alias(new)
        if old is not None:
            self.tape.add(Entry((old,), (new,), lambda b, cts, need: cts, "data"))
        return new

    def requires_grad(self, handle: Handle) -> bool:
        """What `tensor.requires_grad` says."""
        return handle.requires_grad_leaf or self.base(handle.family) in self.tape.tracked

    def is_leaf(self, handle: Handle) -> bool:
        """What `tensor.is_leaf` says."""
        leaf = handle.requires_grad_leaf or handle.family.quiet
        if handle in self.foreign:
            return False
        return leaf or not self.requires_grad(handle)

    # ---- the end

    def drop_hooks(self) -> None:
        """Let go of the functions that are hooks, and of what they hold; where there are some is
        still known."""
        for hooks in (
            *self.hooked.values(),
            *(d for both in self.hooks_of_leaf.values() for d in both),
        ):
            hooks.update(dict.fromkeys(hooks))

    def forget(self) -> None:
        """Drop the tape and what user code attached to it; floats that it kept are plain now."""
        self.tape = Tape()
        self.hooked.clear()
        self.hooks_of_leaf.clear()
        self.name_of = lambda tensor: None  # it holds the arguments of the call
        self.scalars.close()
        self.hosted.clear()
        self.casts.known.clear()
        self.read_numbers.clear()
        self.evaluate = on_numpy  # not the step's own: a trace lies in cycles
        for context in self.applied:
            vars(context).clear()
        self.applied.clear()
        self.held.clear()

    def release(self) -> None:
        """Let go of outside tensors."""
        self.inputs.release()
        self.journal.release()
        self.draws = Draws()


def described(args: tuple, kwargs: dict) -> str:
    """The operands of a call, briefly: tensors as types, the rest by value."""
    parts = [_described(a) for a in args] + [f"{k}={_described(v)}" for k, v in kwargs.items()]
    return ", ".join(parts) or "no arguments"


def _described(x: object) -> str:
    if isinstance(x, TracedTensor):
        return str(Type(x.handle.dtype, x.handle.shape, x.handle.device))
    if isinstance(x, torch.Tensor):
        with torch._C.DisableTorchFunction():
            return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
    if isinstance(x, (tuple, list)):
        return "[" + ", ".join(map(_described, x[:4])) + (", …]" if len(x) > 4 else "]")
    text = repr(plain(x))
    return text if len(text) <= 40 else text[:37] + "…"
