"""The tracer: intercepts every torch call of a step and builds the Graph, its tape and side tables.

While it is active as a TorchFunctionMode, real tensors are their own proxies (their handles live in
a table by identity) and intermediates are TracedTensors. Nothing is computed and no user object is
changed; the real effects are collected for the commit after the compiled plan has run.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.overrides import TorchFunctionMode

from tracejit.autodiff import Entry, Tape, Vjp, zeros
from tracejit.capture import location
from tracejit.capture.matchers import UNKNOWN, follow
from tracejit.capture.reals import lift_real
from tracejit.capture.rejections import check_held, check_read, check_saved, check_write
from tracejit.capture.scalars import Link, Path, Predicate, TracedFloat
from tracejit.capture.table import BY_CALLER, RULES, function_name
from tracejit.capture.tensor import (
    TO_TORCH,
    Family,
    Handle,
    Ints,
    Step,
    Storage,
    TracedTensor,
    Version,
    apply_steps,
    put_through,
)
from tracejit.capture.trail import Trail
from tracejit.errors import (
    AutogradError,
    InvalidGraph,
    LeakedTracer,
    ShapeError,
    TracejitError,
    UnsupportedOperation,
)
from tracejit.ir.graph import Arg, Builder, Node, Value
from tracejit.ir.types import HOST_SCALAR, Type, contiguous_strides

if TYPE_CHECKING:
    from tracejit.capture.recall import Recall
    from tracejit.capture.state import Hyperparameters

_REWRITE = "Rewrite it with supported functions, or move it out of the step"
# broadcast, promoted or transposed on the way into an operation: torch saves what was given to it
_SAVED_THROUGH = frozenset({"cast", "expand", "permute", "reshape"})
# torch takes these names of numpy wherever it takes its own
_NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim", "x": "input", "x2": "other"}
# what torch's own Python reports to a profiler concerns no tensor
_PASSED_ON = frozenset(
    {
        torch.ops.profiler._record_function_enter_new,
        torch.ops.profiler._record_function_exit,
        torch.ops.profiler._record_function_exit._RecordFunction,
    }
)
_UNRECORDED = object()  # what stands for the record of what no profiler sees
# these answer by the Python object or change Python's state, and emit nothing
_OF_PYTHON = frozenset({torch.Tensor.__hash__, torch._C._set_grad_enabled})


class Tracer(TorchFunctionMode):
    """One trace. Enter it as a context manager around the user's function."""

    def __init__(self, recall: Recall | None = None, *, follow: bool = False) -> None:
        """`recall`: what the step remembers of its traces; `follow`: answer calls from there."""
        super().__init__()
        self.active = False
        self.b = Builder()
        self.b.on_emit = self._on_emit
        self.tape = Tape()
        self.taping = True
        self.reals: list[torch.Tensor] = []
        self.handles: list[Handle] = []  # of the real tensors, in the order of `reals`
        self.storages: list[Storage] = []  # of the real tensors
        self.proxies: list[TracedTensor] = []
        self.predicates: list[Predicate] = []
        self.scalars: list[tuple[Value, float]] = []  # runtime scalar inputs
        self.paths: list[Path] = []  # where each of them comes from
        self.numbers: dict[Value, float] = {}  # what every host value is in this trace
        self.link = Link(self)
        self.producers: dict[Value, Node] = {}
        self.hosted: dict[Value, float | None] = {}  # see host.py
        self.asked: set[Storage] = set()  # whose number Python asked for
        self.state: Hyperparameters | None = None
        self.leaf_of: dict[Value, Handle] = {}
        self.sealed: dict[Family, str] = {}  # why autograd refuses to write to these
        self.foreign: set[Handle] = set()  # computed outside with history: gradients leave here
        self.retained: list[Handle] = []  # intermediates whose .grad a backward fills
        self.contexts: list[object] = []  # of custom autograd functions
        self.bounds: list[object] = []  # of index tensors: what `bounds.within` found
        self.collections = [g["collections"] for g in gc.get_stats()]
        self.by_id: dict[int, Handle] = {}  # of the real tensors
        self.memory: dict[int, list[Handle]] = {}  # of the real tensors, by torch storage
        # where a value was read: the version counter, its count, the storage, its writes
        self.origin: dict[Value, tuple[Version, int, Storage, int]] = {}
        self.reading: tuple[int, Entry, frozenset[Value]] | None = None
        self.refused: TracejitError | None = None  # what eager would not have raised
        self.trail = Trail(self, recall, follow=follow)
        self._call: tuple[Callable, tuple, dict] | None = None

    def again(self, recall: Recall) -> None:
        """Start another trace, after one that was followed to its end: no rule has run."""
        self.link, self.trail = Link(self), Trail(self, recall, follow=True)
        self.collections = [g["collections"] for g in gc.get_stats()]

    def rest(self) -> None:
        """Let go of all that is the user's, after a trace that was followed to its end."""
        self.trail.release()
        del self.trail  # and with it what the step remembers
        self.paths, self.numbers, self.state = [], {}, None

    def __enter__(self) -> Tracer:
        self.active = True
        self._below = torch._C._len_torch_function_stack()
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        self.active = False
        if torch._C._len_torch_function_stack() > self._below:  # no interrupt has taken it off
            super().__exit__(*exception)

    def release(self) -> None:
        """Let go of outside tensors: a trace's objects lie in cycles until the collector comes, and
        gradients that the step has dropped must not wait for it."""
        for handle in self.by_id.values():
            handle.tensor = handle.grad = handle.grad_at_start = None
            handle.storage.real = None
        self.by_id.clear()
        self.trail.release()

    # ---- interception

    def __torch_function__(self, func, types, args=(), kwargs=None):
        trail = self.trail
        by_caller = BY_CALLER.get(func)
        if trail.following and not trail.modes and by_caller is None:  # nearly all calls
            answer = follow(trail, func, args, kwargs)
            if answer is not UNKNOWN:
                return answer
        if func in _PASSED_ON:
            return self._passed_on(func, args, kwargs or {})
        kwargs = {_NUMPY_NAMES.get(k, k): v for k, v in kwargs.items()} if kwargs else {}
        if by_caller is not None:
            kwargs = by_caller(sys._getframe(1)) | kwargs
        if func in _OF_PYTHON:
            return RULES[func](self, *args, **kwargs)
        if trail.following:
            with torch._C.DisableTorchFunction():
                answer = follow(trail, func, args, kwargs)
            if answer is not UNKNOWN:
                return answer
            trail.leave()
        self.b.line = location.short()
        call = trail.begin(func, args, kwargs)
        try:
            result = self.apply(func, args, kwargs)
        except BaseException:
            trail.forget()
            raise
        if call is not None:
            trail.end(call, result)
        return result

    def _passed_on(self, func: Callable, args: tuple, kwargs: dict) -> object:
        """What torch's own Python reports to a profiler."""
        about = args[0] if args else None
        if about is _UNRECORDED:
            return None
        if self.state is not None:
            self.state.profiled(args)
        of_optimizer = type(about) is str and about.startswith("Optimizer.")
        if of_optimizer and not torch.autograd._profiler_enabled():  # nobody asks, in microseconds
            return _UNRECORDED
        return func(*args, **kwargs)

    def apply(self, func: Callable, args: tuple, kwargs: dict) -> object:
        """What a torch function returns, by its rule."""
        rule = RULES.get(func)
        self._call = (func, args, kwargs)
        if rule is None:
            raise self.unsupported()
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise self.unsupported("autocast is not supported yet; run the step without it")
        try:
            if kwargs.get("out") is not None:
                return self._into(kwargs.pop("out"), rule(self, *args, **kwargs))
            return rule(self, *args, **kwargs)
        except TypeError as error:
            if error.__traceback__ is not None and error.__traceback__.tb_next is None:
                raise self.unsupported(
                    f"This combination of arguments ({error}) has no rule"
                ) from None
            raise
        except InvalidGraph as error:
            raise self.unsupported(f"This combination of dtypes has no rule ({error})") from error

    def _into(self, out: object, result: object) -> torch.Tensor:
        """`out=`: write the result of a call into a tensor of its shape."""
        if not isinstance(out, torch.Tensor) or not isinstance(result, torch.Tensor):
            raise self.unsupported("out= has a rule for one tensor")
        into, made = self.lift(out), self.lift(result)
        if into.shape != made.shape or not torch.can_cast(
            TO_TORCH[made.dtype], TO_TORCH[into.dtype]
        ):
            raise self.unsupported("out= has a rule for a tensor of the result's shape and kind")
        for h in (self.lift(x) for x in self._call[1] if isinstance(x, torch.Tensor)):
            if h.storage is into.storage and (h.offset, h.shape) != (into.offset, into.shape):
                raise self.unsupported("out= has no rule for a tensor that overlaps an operand")
        if self.grad_on and (self.requires_grad(into) or self.requires_grad(made)):
            raise self.autograd_error(
                "functions with out=... arguments don't support automatic differentiation, but one "
                "of the arguments requires grad"
            )
        return RULES[torch.Tensor.copy_](self, out, result)

    def begin(self, function: Callable, args: tuple) -> None:
        """Start a call that reaches the trace by another way than a torch function."""
        self.trail.forget()
        self._call = (function, args, {})
        self.b.line = location.short()

    @contextmanager
    def user_code(self, *, grad: bool) -> Iterator[None]:
        """Run user code from inside a rule: intercepted, in this grad mode, no formula checked."""
        before = self.reading, self.taping, self._call, self.b.line, torch.is_grad_enabled()
        self.reading, self.taping = None, True
        torch._C._set_grad_enabled(grad)
        TorchFunctionMode.__enter__(self)
        try:
            yield
        finally:
            TorchFunctionMode.__exit__(self, None, None, None)
            self.reading, self.taping, self._call, self.b.line, enabled = before
            torch._C._set_grad_enabled(enabled)

    def unsupported(self, remedy: str = _REWRITE) -> UnsupportedOperation:
        """The error for the torch call in progress."""
        func, args, kwargs = self._call
        return self.refuse(
            UnsupportedOperation(
                where=location.full(),
                function=function_name(func),
                shapes=self.describe(args, kwargs),
                remedy=remedy + ("" if remedy.endswith(".") else "."),
            )
        )

    def refuse(self, error: TracejitError) -> TracejitError:
        """An error that eager would not raise, about to be raised: a step that catches it takes a
        path that eager would not, so it is raised again when the step returns."""
        self.refused = self.refused or error
        return error

    def shape_error(self, reason: str) -> ShapeError:
        """The error for shapes or dtypes that the torch call in progress rejects."""
        func, args, kwargs = self._call
        return ShapeError(
            where=location.full(),
            function=function_name(func),
            reason=reason,
            shapes=self.describe(args, kwargs),
        )

    def autograd_error(self, reason: str) -> AutogradError:
        """The error for a use of autograd that eager rejects."""
        return AutogradError(where=location.full(), reason=reason)

    def describe(self, args: tuple, kwargs: dict) -> str:
        """The operands of a call, briefly: tensors as types, the rest by value."""

        def one(x: object) -> str:
            if isinstance(x, TracedTensor):
                return str(Type(x.handle.dtype, x.handle.shape, x.handle.device))
            if isinstance(x, torch.Tensor):
                with torch._C.DisableTorchFunction():
                    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
            if isinstance(x, (tuple, list)):
                return "[" + ", ".join(map(one, x[:4])) + (", …]" if len(x) > 4 else "]")
            text = repr(float.__pos__(x) if isinstance(x, TracedFloat) else x)
            return text if len(text) <= 40 else text[:37] + "…"

        parts = [one(a) for a in args] + [f"{k}={one(v)}" for k, v in kwargs.items()]
        return ", ".join(parts) or "no arguments"

    @property
    def calling(self) -> Callable | None:
        """The torch function whose rule is running; None while arguments are bound."""
        return self._call[0] if self._call else None

    # ---- recording

    @property
    def grad_on(self) -> bool:
        """Whether what is computed now is recorded for differentiation."""
        return self.taping and torch.is_grad_enabled()

    @contextmanager
    def untaped(self) -> Iterator[None]:
        """Emit without recording on the tape."""
        before, self.taping = self.taping, False
        try:
            yield
        finally:
            self.taping = before

    def _on_emit(self, node: Node) -> None:
        self.producers[node.out] = node
        if node.op.family == "host":
            self.trail.found_host(node)
        if self.reading is not None:
            check_saved(self, node)
        elif node.op.name in _SAVED_THROUGH and node.args[0] in self.origin:
            self.origin[node.out] = self.origin[node.args[0]]
        if self.grad_on:
            self.tape.record(node)

    @property
    def cotangents(self) -> frozenset[Value]:
        """The cotangents that have arrived at the entry whose formula is being emitted."""
        return self.reading[2] if self.reading else frozenset()

    def saves(self, out: Value, *values: Value) -> Value:
        """Say that torch saves these (or numbers, if none) for the derivative of `out`, though our
        formula does not read them; returns `out`."""
        if out in self.tape.tracked:
            entry = next((e for e in reversed(self.tape.entries) if out in e.outputs), None)
            if entry is not None:
                entry.saved = (entry.saved or ()) + values
        return out

    def reading_for(self, entry: Entry | None, cotangents: frozenset[Value] = frozenset()) -> None:
        """Announce whose gradient formula is emitted next (None: no formula any more)."""
        if entry is None:
            self.reading = None
        else:
            start = self.reading[0] if self.reading else self.b._next
            self.reading = (start, entry, cotangents)
            if entry.saved is not None:
                check_held(self, entry)

    def derive(self, name: str, inputs: tuple[Value, ...], output: Value, vjp: Vjp) -> Value:
        """Give `output`, emitted untaped, its own derivative formula; returns it."""
        if self.grad_on:
            self.tape.add(Entry(inputs, (output,), vjp, name))
        return output

    def unread(self, new: Value, old: Value) -> Value:
        """`new`, as a value that depends on `old` too, with derivative zero: it replaced `old`."""
        with self.untaped():
            out = self.b.alias(new)
        return self.derive(
            "copy_",
            (new, old),
            out,
            lambda b, cts, need: (cts[0] if need[0] else None, zeros(b, old) if need[1] else None),
        )

    # ---- values of handles

    def lift(self, tensor: torch.Tensor) -> Handle:
        """The handle of a tensor object; a real tensor becomes a graph input when it is read."""
        if type(tensor) is TracedTensor:
            if tensor.tracer is not self:
                called = function_name(self.calling) if self.calling else "a torch function"
                raise self.refuse(
                    LeakedTracer(
                        where=location.full(),
                        function=called,
                        reason="which belongs to another trace",
                        remedy="Do not keep intermediates of a step; return them",
                    )
                )
            return tensor.handle
        handle = self.by_id.get(id(tensor))
        return handle if handle is not None else lift_real(self, tensor)

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
            family.value = self._silently(old if inherited else None, storage.value)
            if family.leaf is not None:
                self.tape.watch(family.value)
                self.leaf_of[family.value] = family.leaf
        return family.value

    def _silently(self, old: Value | None, new: Value) -> Value:
        """`new` with the history of `old`: written behind autograd's back, gradients flow on."""
        with self.untaped():
            new = self.b.alias(new)
        if old is not None:
            self.tape.add(Entry((old,), (new,), lambda b, cts, need: cts, "data"))
        return new

    def read(self, handle: Handle) -> Value:
        """The value of a tensor now."""
        base = self.base(handle.family)
        check_read(self, handle, base)
        key = (base, self.grad_on)
        if not handle.steps:
            value = base
        elif handle.memo is not None and handle.memo[:2] == key:
            value = handle.memo[2]
        else:
            value = apply_steps(self.b, base, handle.steps)
            handle.memo = (*key, value)
        if value not in self.origin:
            self._note(value, handle)
        return value

    def _note(self, value: Value, handle: Handle) -> None:
        storage, version = handle.storage, handle.version
        self.origin[value] = (version, version.count, storage, storage.writes)

    def requires_grad(self, handle: Handle) -> bool:
        """What `tensor.requires_grad` says."""
        return handle.requires_grad_leaf or self.base(handle.family) in self.tape.tracked

    def is_leaf(self, handle: Handle) -> bool:
        """What `tensor.is_leaf` says."""
        leaf = handle.requires_grad_leaf or handle.family.quiet
        if handle in self.foreign:
            return False
        return leaf or not self.requires_grad(handle)

    def fresh(self, value: Value, strides: Ints | None = None) -> TracedTensor:
        """A new tensor in memory of its own (row-major unless `strides` says otherwise)."""
        if value in self.origin or value in self.leaf_of:
            value = self.b.alias(value)
        t = value.type
        strides = contiguous_strides(t.shape) if strides is None else strides
        storage = Storage(value, strides)
        handle = Handle(
            Family(storage, value), (), t.shape, strides, 0, t.dtype, t.device, Version()
        )
        self._note(value, handle)
        return self.proxy(handle)

    def view(
        self, of: Handle, steps: tuple[Step, ...], shape: Ints, strides: Ints, offset: int
    ) -> TracedTensor:
        """A view: the same memory through further movement steps."""
        family = of.family
        if not self.grad_on and self.base(family) in self.tape.tracked:
            storage = family.storage
            with self.untaped():  # of its own: others without history may read the storage's value
                family = Family(storage, self.b.alias(storage.value), storage.writes, quiet=True)
            self.tape.watch(family.value)
        fixed = of.version.count if family.quiet else of.fixed
        handle = Handle(
            family, of.steps + steps, shape, strides, offset, of.dtype, of.device, of.version
        )
        handle.fixed = fixed
        return self.proxy(handle)

    def together(self, views: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Views that one function returns; autograd lets none of them be written to."""
        for view in views:
            handle = self.lift(view)
            handle.fixed = handle.version.count
        return views

    def detached(self, of: Handle, *, share_version: bool) -> TracedTensor:
        """The same memory without history: `.detach()`, or `.data` with its own version counter."""
        storage = of.family.storage
        family = Family(storage, self.stripped(storage), storage.writes)
        version = of.version if share_version else Version()
        handle = Handle(
            family, of.steps, of.shape, of.strides, of.offset, of.dtype, of.device, version
        )
        return self.proxy(handle)

    def proxy(self, handle: Handle) -> TracedTensor:
        proxy = TracedTensor.make(handle, self, self.trail.given.get(len(self.proxies)))
        self.proxies.append(proxy)
        return proxy

    def rebind(self, handle: Handle, to: Handle) -> None:
        """`handle.data = to`: the handle stands for the other's memory from now on."""
        old, storage = self.base(handle.family), to.family.storage
        handle.family = Family(storage, self.stripped(storage), storage.writes)
        if handle.requires_grad_leaf:
            self.make_leaf(handle)
        elif old in self.tape.tracked:  # its history stays
            handle.family.value = self._silently(old, storage.value)

    def write(self, handle: Handle, value: Value) -> None:
        """Overwrite a tensor in place with a value of its shape and dtype."""
        check_write(self, handle, value)
        family, storage = handle.family, handle.storage
        new = put_through(self.b, self.base(family), handle.steps, value)
        if new in self.origin:
            new = self.b.alias(new)
        old, tracked = family.value, family.value in self.tape.tracked
        untracked = family.leaf is None and not tracked
        if self.grad_on and tracked and new not in self.tape.tracked:  # it still requires grad
            new = self.unread(new, old)
        storage.value = new
        storage.writes += 1
        if self.grad_on or untracked:
            family.value, family.seen = new, storage.writes
        handle.version.count += 1
        self._note(new, handle)
        self._note(value, handle)

    def forget(self) -> None:
        """Drop the tape and what user code attached to it; floats that it kept are plain now."""
        self.tape = Tape()
        self.link.tracer = None
        for context in self.contexts:
            vars(context).clear()

    # ---- runtime scalars

    def scalar(self, number: float, path: Path) -> TracedFloat:
        """A runtime scalar: a new host input of the graph."""
        value = None
        if self.trail.following:
            value = self.trail.scalar(path, number)
        self.paths.append(path)
        if value is None:
            value = self.b.param(HOST_SCALAR)
            self.scalars.append((value, number))
            self.trail.found_scalar(path, value)
        return TracedFloat.make(number, self, value)

    def arithmetic(self, op: str, *args: Arg) -> Value:
        """Emit arithmetic on runtime scalars."""
        value = None
        if self.trail.following:
            value = self.trail.host(op, args)
        return getattr(self.b, op)(*args) if value is None else value

    def decide(self, predicate: Predicate) -> None:
        """Python takes a decision on a runtime scalar."""
        if self.trail.following and self.trail.decision(predicate):
            return
        self.trail.found_decision(predicate)
        self.predicates.append(predicate)

    def number(self, x: float) -> float:
        """A number next to a tensor: a runtime scalar if a scheduler just computed it."""
        if type(x) is float and self.state is not None and self.state.inside:
            return self.scalar(x, self.state.computed())
        return x


def current() -> Tracer | None:
    """The tracer that is active on this thread, if any."""
    modes = torch.overrides._get_current_function_mode_stack()
    return next((m for m in reversed(modes) if isinstance(m, Tracer)), None)
