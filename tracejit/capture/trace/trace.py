"""A Trace: what the rules of torch functions work on.

In: torch calls, one after another (`apply`). Out: the Graph in its builder, the tape beside it, and
the tables of outside tensors, proxies and runtime scalars (`state.py`), from which the effects are
collected once the step's Python has run. Nothing is computed and no user object is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode

from tracejit.autodiff import Entry, zeros
from tracejit.capture.trace import location
from tracejit.capture.trace.autocast import casted
from tracejit.capture.trace.inputs import lift_input
from tracejit.capture.trace.integers import settled
from tracejit.capture.trace.overlaps import check_out
from tracejit.capture.trace.rejections import (
    check_freed,
    check_held,
    check_read,
    check_saved,
    check_write,
)
from tracejit.capture.trace.revisits import Revisits
from tracejit.capture.trace.scalars import Path, TracedFloat
from tracejit.capture.trace.state import Formula, TraceState
from tracejit.capture.trace.table import COMPARED, OF_COMPLEX, RULES, function_name
from tracejit.capture.trace.tensor import (
    TO_TORCH,
    Family,
    Handle,
    Ints,
    Origin,
    Step,
    Storage,
    TracedTensor,
    Version,
    has_complex,
)
from tracejit.capture.trace.versions import Call, saved_by
from tracejit.capture.trace.views import apply_steps, of_pairs, put_through
from tracejit.errors import InvalidGraph, LeakedTracer
from tracejit.ir.graph import Node, Value
from tracejit.ir.types import DType, contiguous_strides

# broadcast, promoted or transposed on the way into an operation: torch saves what was given to it
_SAVED_THROUGH = frozenset({"cast", "expand", "permute", "reshape"})


_COMPLEX = "It has no rule for complex tensors; compute with torch.view_as_real of them"
_MESSAGES = ("send", "recv", "isend", "irecv")  # of torch.distributed


class Trace(TraceState):
    """One trace, as rules see it."""

    # ---- torch calls

    def apply(self, func: Callable, args: tuple, kwargs: dict) -> object:
        """What a torch function returns, by its rule."""
        if func in COMPARED:
            return func(self, *args)
        rule = RULES.get(func)
        self.call = (func, args, kwargs)
        self.groups += 1
        if rule is None:
            if getattr(func, "__name__", "") in _MESSAGES:
                raise self.unsupported(
                    "Messages between two ranks have no rule; send and receive outside the step, "
                    "or use a collective, such as broadcast, scatter or all_to_all_single"
                )
            raise self.unsupported()
        run, before = rule.run, self.complexes
        self.complexes = has_complex(args) or bool(kwargs and has_complex(kwargs.values()))
        if self.complexes:
            run = OF_COMPLEX.get(func)
        if self.scalars.has_integers:
            args, kwargs = settled(self, func, args, kwargs)
        try:
            if torch._C._is_any_autocast_enabled():
                args, kwargs = casted(self, func, args, kwargs)
            into = kwargs.pop("out") if kwargs.get("out") is not None else None
            told = None if self.on_call is None else self.on_call(func, args, kwargs)
            hooks = self.saving[-1] if self.saving and self.grad_on else None
            if run is None or (hooks is not None and self.complexes):
                raise self.unsupported(_COMPLEX)
            noting = None
            if self.grad_on and not self.complexes:
                saved = saved_by(func, args, kwargs)
                noting = None if saved is None else Call(self, saved, args, kwargs)
            if hooks is None:
                result = run(self, *args, **kwargs)
            else:
                result = hooks.around(self, func, args, kwargs)
            if noting is not None:
                noting.over(result)
            result = result if into is None else self._into(into, result)
            if told is not None:
                told(result)
            self.call = self.outer or self.call
            return result
        except TypeError as error:
            if error.__traceback__ is not None and error.__traceback__.tb_next is None:
                raise self.unsupported(
                    f"This combination of arguments ({error}) has no rule"
                ) from None
            raise
        except InvalidGraph as error:
            raise self.unsupported(f"This combination of dtypes has no rule ({error})") from error
        finally:
            self.complexes = before

    def _into(self, out: object, result: object) -> torch.Tensor:
        """`out=`: write the result of a call into a tensor of its shape, or several each into one
        of its own."""
        if isinstance(out, tuple | list) and isinstance(result, tuple) and len(out) == len(result):
            if len({id(x) for x in out}) < len(out):
                raise self.unsupported("out= has a rule for tensors that are not the same")
            written = [self._into(x, y) for x, y in zip(out, result, strict=True)]
            named = getattr(torch.return_types, f"{type(result).__name__}_out", None)
            return (named or type(result))(written)
        if not isinstance(out, torch.Tensor) or not isinstance(result, torch.Tensor):
            raise self.unsupported("out= has a rule for tensors")
        into, made = self.lift(out), self.lift(result)
        if into.shape != made.shape or not torch.can_cast(
            TO_TORCH[made.dtype], TO_TORCH[into.dtype]
        ):
            raise self.unsupported("out= has a rule for a tensor of the result's shape and kind")
        check_out(self, into, self.call[1])
        if self.grad_on and (self.requires_grad(into) or self.requires_grad(made)):
            raise self.autograd_error(
                "functions with out=... arguments don't support automatic differentiation, but one "
                "of the arguments requires grad"
            )
        return RULES[torch.Tensor.copy_].run(self, out, result)

    def begin(self, function: Callable, args: tuple) -> None:
        """Start a call that reaches the trace by another way than a torch function."""
        self.journal.forget()
        self.called(function, args)

    def called(self, function: Callable, args: tuple) -> None:
        """What errors name from now on."""
        self.call = (function, args, {})
        self.groups += 1
        self.b.line = self.lines.here()

    @contextmanager
    def user_code(self, *, grad: bool) -> Iterator[None]:
        """Run user code from inside a rule: intercepted, in this grad mode, no formula checked."""
        before = self.formula, self.taping, self.call, self.outer, self.b.line, self.b.instead
        enabled, phase = torch.is_grad_enabled(), self.lines.phase
        self.lines.phase = phase if self.formula is None else "backward"
        self.formula, self.taping, self.outer, self.b.instead = None, True, self.call, None
        torch._C._set_grad_enabled(grad)
        TorchFunctionMode.__enter__(self.mode)
        try:
            with self.heard():
                yield
        finally:
            TorchFunctionMode.__exit__(self.mode, None, None, None)
            self.formula, self.taping, self.call, self.outer = before[:4]
            self.b.line, self.b.instead = before[4:]
            self.lines.phase = phase
            torch._C._set_grad_enabled(enabled)

    # ---- recording

    def _on_emit(self, node: Node) -> None:
        out, op = node.outs[0], node.op
        self.producers[out] = node
        self.group_of[out.id] = self.groups
        if op.family == "host":
            self.journal.found_arithmetic(node)
        if self.formula is not None:
            check_saved(self, node)
        elif op.name in _SAVED_THROUGH and node.args[0] in self.origin:
            self.origin[out] = self.origin[node.args[0]]
        if self.grad_on:
            self.tape.record(node)

    @contextmanager
    def formulas(
        self, roots: Sequence[Value] = ()
    ) -> Iterator[Callable[[Entry, frozenset[Value]], None]]:
        """Emit the derivative formulas of one backward, of these values; gives a function to call
        before each, with its entry and the cotangents that have arrived there."""

        at, revisits = self.b.line, Revisits(self, tuple(roots))
        opened: list[object] = []  # what hooks hold of saved tensors

        def enter(entry: Entry, cotangents: frozenset[Value]) -> None:
            revisits.enter(entry, cotangents)
            held, self.b.instead = entry.held, None
            if held is not None:
                check_freed(self, entry)
                if held not in opened:
                    opened.append(held)
                    with self.unchecked():
                        held.open()
                self.b.instead = self._instead
            start = self.formula.start if self.formula else self.b.next_id
            self.formula = Formula(start, entry, cotangents)
            self.groups += 1
            made = self.producers.get(entry.outputs[0])
            self.b.line = self.lines.backward(at, "" if made is None else made.where)
            if held is None and not (entry.saved is None and entry.noted is None):
                check_held(self, entry)

        try:
            yield enter
            for held in opened:
                held.close()
            revisits.finish()
        finally:
            self.formula = self.b.instead = None
            self.b.line = self.lines.backward(at, "")  # gradients are added up

    def _instead(self, value: Value) -> Value:
        """What the formula in progress reads in the place of a value that hooks hold."""
        formula = self.formula
        if formula is None or value in formula.cotangents:
            return value
        return formula.entry.held.read(value, is_new=value.id >= formula.start)

    @contextmanager
    def unchecked(self) -> Iterator[None]:
        """Emit what the formula in progress needs without checking what it reads."""
        before, self.formula = self.formula, None
        try:
            yield
        finally:
            self.formula = before

    @property
    def cotangents(self) -> frozenset[Value]:
        """The cotangents that have arrived at the entry whose formula is being emitted."""
        return self.formula.cotangents if self.formula else frozenset()

    def saves(self, out: Value, *values: Value) -> Value:
        """Say that torch saves these (or numbers, if none) for the derivative of `out`, though our
        formula does not read them; returns `out`."""
        if out in self.tape.tracked:
            entry = next((e for e in reversed(self.tape.entries) if out in e.outputs), None)
            if entry is not None:
                entry.saved = (entry.saved or ()) + values
        return out

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

    # ---- tensors

    def lift(self, tensor: torch.Tensor) -> Handle:
        """The handle of a tensor object; a real tensor becomes a graph input when it is read."""
        handle = self.peek(tensor)
        if handle.ragged is not None:
            handle.ragged.count(handle)
        if handle.is_complex and not self.complexes:
            raise self.unsupported(_COMPLEX)
        return handle

    def peek(self, tensor: torch.Tensor) -> Handle:
        """The handle of a tensor object, which is not asked how many rows it has: it may have no
        value yet."""
        if type(tensor) is TracedTensor:
            if tensor.owner is not self:
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
        handle = self.inputs.by_id.get(id(tensor))
        return handle if handle is not None else lift_input(self, tensor)

    def read(self, handle: Handle) -> Value:
        """The value of a tensor now."""
        value = base = self.base(handle.family)
        if handle.fixed is not None:
            check_read(self, handle, base)
        if handle.steps:
            memo, grad_on = handle.memo, self.grad_on
            if memo is not None and memo[0] is base and memo[1] >= grad_on:
                value = memo[2]
            elif handle in self.empty:
                value = self._read_empty(handle, base)
            else:
                steps = handle.steps
                if handle.of is not None and handle.of[1] is base:  # not written since
                    of = handle.of[0]
                    value, steps = self.read(of), steps[len(of.steps) :]
                value = apply_steps(self, value, steps)
                handle.memo = (base, grad_on, value)
        if value not in self.origin:
            self._note(value, handle)
        return value

    def _read_empty(self, handle: Handle, base: Value) -> Value:
        """A view without elements. Written since it was made, it is an `as_strided` of its base to
        autograd, whose derivative is zero then and has no history."""
        if handle.version.count == self.empty[handle]:
            return apply_steps(self, base, handle.steps)
        with self.untaped():
            value = apply_steps(self, base, handle.steps)
        return self.derive("as_strided", (base,), value, lambda b, cts, need: (zeros(b, base),))

    def read_with_history(self, handle: Handle) -> Value:
        """The value of a tensor as autograd knows it, also under no_grad: what a view is read by
        there is not on the tape."""
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(True)
        try:
            return self.read(handle)
        finally:
            torch._C._set_grad_enabled(before)

    def _note(self, value: Value, handle: Handle) -> None:
        self.origin[value] = Origin.of(handle)

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
        self,
        of: Handle,
        steps: tuple[Step, ...],
        shape: Ints,
        strides: Ints,
        offset: int,
        dtype: DType | None = None,
    ) -> TracedTensor:
        """A view: the same memory through further movement steps, its bits as a dtype."""
        family, tracked = of.family, self.base(of.family) in self.tape.tracked
        if of.is_complex and dtype is None:
            steps = tuple(map(of_pairs, steps))
        if tracked and not steps:  # a value of its own: a gradient of it is not that of the base
            pairs = (2,) if (dtype or of.dtype).kind == "c" else ()
            steps = (("reshape", (("shape", shape + pairs),)),)
        if not self.grad_on and tracked:
            storage = family.storage
            with self.untaped():  # of its own: others without history may read the storage's value
                family = Family(storage, self.b.alias(storage.value), storage.writes, quiet=True)
            self.tape.watch(family.value)
        fixed = of.version.count if family.quiet else of.fixed
        handle = Handle(
            family,
            of.steps + steps,
            shape,
            strides,
            offset,
            dtype or of.dtype,
            of.device,
            of.version,
        )
        handle.fixed = fixed
        if tracked and 0 in shape:
            self.empty[handle] = handle.version.count
        if of.steps and family is of.family and self.grad_on and tracked:
            handle.of = of, family.value
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
        value = self.stripped(storage)
        if not share_version and value in self.origin:  # which is of another counter
            value = self.behind_autograd(None, value)
        family = Family(storage, value, storage.writes)
        version = of.version if share_version else Version()
        handle = Handle(
            family, of.steps, of.shape, of.strides, of.offset, of.dtype, of.device, version
        )
        return self.proxy(handle)

    def proxy(self, handle: Handle) -> TracedTensor:
        """The tensor object that user code gets for a handle."""
        if torch.is_inference_mode_enabled() and handle.storage.real is None:
            self.inference.add(handle.storage)
        proxy = TracedTensor.make(handle, self, self.journal.given.get(len(self.proxies)))
        self.proxies.append(proxy)
        return proxy

    def rebind(self, handle: Handle, to: Handle) -> None:
        """`handle.data = to`: the handle stands for the other's memory from now on."""
        old, storage = self.base(handle.family), to.family.storage
        handle.family = Family(storage, self.stripped(storage), storage.writes)
        if handle.requires_grad_leaf:
            self.make_leaf(handle)
        elif old in self.tape.tracked:  # its history stays
            handle.family.value = self.behind_autograd(old, storage.value)

    def write(self, handle: Handle, value: Value) -> None:
        """Overwrite a tensor in place with a value of its shape and dtype."""
        check_write(self, handle, value)
        family, storage = handle.family, handle.storage
        if self.casts.outlives(storage):
            raise self.unsupported(
                "The step is called under autocast and writes to a weight whose cast eager would go"
                " on using after that; put autocast around the forward pass in the step"
            )
        new = put_through(self, self.base(family), handle.steps, value)
        if new in self.origin:
            new = self.b.alias(new)
        old, tracked = family.value, family.value in self.tape.tracked
        untracked, grad_on = family.leaf is None and not tracked, self.grad_on
        if grad_on and tracked and new not in self.tape.tracked:  # it still requires grad
            new = self.unread(new, old)
        if grad_on and not family.written and new in self.tape.tracked:
            family.written = self.b.line
        self._hold(handle, new, as_history=grad_on or untracked)
        if new is not value:
            self._note(value, handle)

    def rearrange(self, handle: Handle, view: Handle) -> None:
        """Let a tensor lie as a view of it does; to autograd that is a write."""
        handle.family, handle.steps, handle.memo, handle.of = view.family, view.steps, None, None
        handle.shape, handle.strides, handle.offset = view.shape, view.strides, view.offset
        self._hold(handle, self.b.alias(self.base(handle.family)), as_history=True)

    def _hold(self, handle: Handle, value: Value, *, as_history: bool) -> None:
        """From now on the memory of a tensor holds a value."""
        family, storage = handle.family, handle.storage
        storage.value = value
        storage.writes += 1
        if as_history:
            family.value, family.seen = value, storage.writes
        handle.version.count += 1
        self._note(value, handle)

    # ---- runtime scalars

    def scalar(self, number: float, path: Path) -> TracedFloat:
        """A runtime scalar: a new host input of the graph."""
        return self.scalars.come(number, path)

    def number(self, x: float) -> float:
        """A number next to a tensor: a runtime scalar if a scheduler just computed it."""
        hyper = self.hyperparameters
        if type(x) is float and hyper is not None and hyper.inside:
            return self.scalar(x, hyper.computed())
        return x
