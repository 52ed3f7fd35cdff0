"""The tracer: intercepts every torch call of a step and builds the Graph, its tape and side tables.

While it is active as a TorchFunctionMode, real tensors are their own proxies (their handles live in
a table by identity) and intermediates are TracedTensors. Nothing is computed and no user object is
changed; the real effects are collected for the commit after the compiled plan has run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode

from tracejit.autodiff import Entry, Tape, Vjp, zeros
from tracejit.capture import location
from tracejit.capture.scalars import Predicate, TracedFloat
from tracejit.capture.table import RULES, function_name
from tracejit.capture.tensor import (
    TO_IR,
    Family,
    Handle,
    Ints,
    Step,
    Storage,
    TracedTensor,
    Version,
    apply_steps,
    extent,
    put_through,
)
from tracejit.errors import (
    AutogradError,
    InvalidGraph,
    LeakedTracer,
    ShapeError,
    UnsupportedOperation,
)
from tracejit.ir.graph import Builder, Node, Value
from tracejit.ir.types import HOST_SCALAR, Type, contiguous_strides

_REWRITE = "Rewrite it with supported functions, or move it out of the step"
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


class Tracer(TorchFunctionMode):
    """One trace. Enter it as a context manager around the user's function."""

    def __init__(self) -> None:
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
        self.leaf_of: dict[Value, Handle] = {}
        self.sealed: dict[Family, str] = {}  # why autograd refuses to write to these
        self.foreign: set[Handle] = set()  # computed outside with history: gradients leave here
        self.retained: list[Handle] = []  # intermediates whose .grad a backward fills
        self.contexts: list[object] = []  # of custom autograd functions
        self._by_id: dict[int, Handle] = {}
        self._memory: dict[int, list[Handle]] = {}  # by torch storage
        self._origin: dict[Value, tuple[Version, int]] = {}
        self._reading: tuple[int, Entry, frozenset[Value]] | None = None
        self._call: tuple[Callable, tuple, dict] | None = None

    def __enter__(self) -> Tracer:
        self.active = True
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        self.active = False
        super().__exit__(*exception)

    # ---- interception

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _PASSED_ON:
            return func(*args, **(kwargs or {}))
        kwargs = {_NUMPY_NAMES.get(k, k): v for k, v in kwargs.items()} if kwargs else {}
        rule = RULES.get(func)
        self._call = (func, args, kwargs)
        if rule is None:
            raise self.unsupported()
        self.b.line = location.short()
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise self.unsupported("autocast is not supported yet; run the step without it")
        try:
            return rule(self, *args, **kwargs)
        except TypeError as error:
            if error.__traceback__ is not None and error.__traceback__.tb_next is None:
                raise self.unsupported(
                    f"This combination of arguments ({error}) has no rule"
                ) from None
            raise
        except InvalidGraph as error:
            raise self.unsupported(f"This combination of dtypes has no rule ({error})") from error

    def begin(self, function: Callable, args: tuple) -> None:
        """Start a call that reaches the trace by another way than a torch function."""
        self._call = (function, args, {})
        self.b.line = location.short()

    @contextmanager
    def user_code(self, *, grad: bool) -> Iterator[None]:
        """Run user code from inside a rule: intercepted, in this grad mode, no formula checked."""
        before = self._reading, self.taping, self._call, self.b.line, torch.is_grad_enabled()
        self._reading, self.taping = None, True
        torch._C._set_grad_enabled(grad)
        TorchFunctionMode.__enter__(self)
        try:
            yield
        finally:
            TorchFunctionMode.__exit__(self, None, None, None)
            self._reading, self.taping, self._call, self.b.line, enabled = before
            torch._C._set_grad_enabled(enabled)

    def unsupported(self, remedy: str = _REWRITE) -> UnsupportedOperation:
        """The error for the torch call in progress."""
        func, args, kwargs = self._call
        return UnsupportedOperation(
            where=location.full(),
            function=function_name(func),
            shapes=self.describe(args, kwargs),
            remedy=remedy + ("" if remedy.endswith(".") else "."),
        )

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
    def calling(self) -> Callable:
        """The torch function whose rule is running."""
        return self._call[0]

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
        if self._reading is not None:
            self._check_saved(node)
        if self.grad_on:
            self.tape.record(node)

    def _check_saved(self, node: Node) -> None:
        """Raise as eager does where a gradient formula reads a value that it may not read."""
        start, entry, cotangents = self._reading
        for value in node.inputs:
            if value.id >= start or value in cotangents:
                continue
            if entry.freed:
                raise self.autograd_error(
                    "Trying to backward through the graph a second time (or directly access saved "
                    "tensors after they have already been freed). Specify retain_graph=True if you "
                    "need to backward through the graph a second time"
                )
            version, count = self._origin.get(value, (None, 0))
            if version is not None and version.count != count:
                raise self.autograd_error(
                    "one of the variables needed for gradient computation has been modified by an "
                    f"inplace operation: a tensor of shape {list(value.type.shape)} read by "
                    f"{entry.name} is at version {version.count}; expected version {count} instead"
                )

    @property
    def cotangents(self) -> frozenset[Value]:
        """The cotangents that have arrived at the entry whose formula is being emitted."""
        return self._reading[2] if self._reading else frozenset()

    def reading_for(self, entry: Entry | None, cotangents: frozenset[Value] = frozenset()) -> None:
        """Announce whose gradient formula is emitted next (None: no formula any more)."""
        if entry is None:
            self._reading = None
        else:
            start = self._reading[0] if self._reading else self.b._next
            self._reading = (start, entry, cotangents)

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
                raise LeakedTracer(
                    where=location.full(),
                    function=function_name(self._call[0]) if self._call else "a torch function",
                    reason="which belongs to another trace",
                    remedy="Do not keep intermediates of a step; return them",
                )
            return tensor.handle
        handle = self._by_id.get(id(tensor))
        return handle if handle is not None else self._lift_real(tensor)

    def _lift_real(self, tensor: torch.Tensor) -> Handle:
        with torch._C.DisableTorchFunction():
            self._check_real(tensor)
            shape, strides = tuple(tensor.shape), tuple(tensor.stride())
            device, dtype = str(tensor.device), TO_IR[tensor.dtype]
            offset, requires_grad = tensor.storage_offset(), tensor.requires_grad
            foreign = tensor.grad_fn is not None
        storage = self._real_storage(tensor, Type(dtype, shape, device), strides)
        with self.untaped():
            family = Family(storage, self.stripped(storage), storage.writes)
        handle = Handle(
            family, (), shape, strides, offset, dtype, device, Version(), tensor, grad_known=False
        )
        if requires_grad:
            self.make_leaf(handle)
        if foreign:
            self.foreign.add(handle)
        self._by_id[id(tensor)] = handle
        with torch._C.DisableTorchFunction():
            self._memory[tensor.untyped_storage()._cdata].append(handle)
        self.reals.append(tensor)
        self.handles.append(handle)
        return handle

    def _check_real(self, tensor: torch.Tensor) -> None:
        problem = None
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            problem = "vmap, torch.func and forward-mode differentiation have no rules"
        elif type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
            problem = f"a tensor subclass ({type(tensor).__name__}) is not supported"
        elif tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            problem = "only dense strided tensors are supported"
        elif tensor.dtype not in TO_IR:
            problem = f"{tensor.dtype} is not supported"
        elif tensor.device.type not in ("cpu", "cuda"):
            problem = f"device {tensor.device} is not supported"
        elif tensor.is_conj() or tensor.is_neg() or any(getattr(tensor, "names", ())):
            problem = "conjugate, negative-bit and named tensors are not supported"
        elif tensor.is_inference():
            problem = "inference tensors are not supported"
        elif tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
            problem = "tensors with hooks are not supported; remove the hook"
        if problem is not None:
            raise UnsupportedOperation(
                where=location.full(),
                function=function_name(self._call[0]) if self._call else "an input",
                shapes=f"tensor of shape {list(tensor.shape)}, {tensor.dtype}",
                remedy=problem[0].upper() + problem[1:] + ".",
            )

    def _real_storage(self, tensor: torch.Tensor, type: Type, strides: Ints) -> Storage:
        """The storage of a real tensor: shared by tensors of the same memory and geometry."""
        with torch._C.DisableTorchFunction():
            memory = self._memory.setdefault(tensor.untyped_storage()._cdata, [])
            low = tensor.storage_offset()
        high = low + extent(type.shape, strides)
        for other in memory:
            if (other.offset, other.shape, other.strides, other.dtype) == (
                low,
                type.shape,
                strides,
                type.dtype,
            ):
                return other.storage
            stop = other.offset + extent(other.shape, other.strides)
            if other.dtype != type.dtype or (other.offset < high and low < stop):
                raise UnsupportedOperation(
                    where=location.full(),
                    function=function_name(self._call[0]) if self._call else "an input",
                    shapes=f"{list(type.shape)} and {list(other.shape)}",
                    remedy="Two tensors from outside the step overlap in memory with different "
                    "shapes; make the view inside the step, or clone one.",
                )
        standard = None if strides == contiguous_strides(type.shape) else strides
        value = self.b.param(type, standard)
        storage = Storage(value, strides, real=tensor, param=value)
        self.storages.append(storage)
        return storage

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
            with self.untaped():
                family.value = self.b.alias(storage.value)
            family.seen = storage.writes
            if family.leaf is not None:
                self.tape.watch(family.value)
                self.leaf_of[family.value] = family.leaf
            elif tracked:  # written behind autograd's back: gradients flow as if unchanged
                self.tape.add(Entry((old,), (family.value,), lambda b, cts, need: cts, "data"))
        return family.value

    def read(self, handle: Handle) -> Value:
        """The value of a tensor now."""
        base = self.base(handle.family)
        key = (base, self.grad_on)
        if not handle.steps:
            value = base
        elif handle.memo is not None and handle.memo[:2] == key:
            value = handle.memo[2]
        else:
            value = apply_steps(self.b, base, handle.steps)
            handle.memo = (*key, value)
        if value not in self._origin:
            self._origin[value] = (handle.version, handle.version.count)
        return value

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
        if value in self._origin or value in self.leaf_of:
            value = self.b.alias(value)
        t = value.type
        strides = contiguous_strides(t.shape) if strides is None else strides
        storage = Storage(value, strides)
        handle = Handle(
            Family(storage, value), (), t.shape, strides, 0, t.dtype, t.device, Version()
        )
        self._origin[value] = (handle.version, 0)
        return self.proxy(handle)

    def view(
        self, of: Handle, steps: tuple[Step, ...], shape: Ints, strides: Ints, offset: int
    ) -> TracedTensor:
        """A view: the same memory through further movement steps."""
        family = of.family
        if not self.grad_on and self.base(family) in self.tape.tracked:
            storage = family.storage
            family = Family(storage, self.stripped(storage), storage.writes, quiet=True)
            self.tape.watch(family.value)
        handle = Handle(
            family, of.steps + steps, shape, strides, offset, of.dtype, of.device, of.version
        )
        return self.proxy(handle)

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
        proxy = TracedTensor.make(handle, self)
        self.proxies.append(proxy)
        return proxy

    def rebind(self, handle: Handle, to: Handle) -> None:
        """`handle.data = to`: the handle stands for the other's memory from now on."""
        storage = to.family.storage
        handle.family = Family(storage, self.stripped(storage), storage.writes)
        if handle.requires_grad_leaf:
            self.make_leaf(handle)

    def write(self, handle: Handle, value: Value) -> None:
        """Overwrite a tensor in place with a value of its shape and dtype."""
        if self.grad_on and handle.family in self.sealed:
            raise self.autograd_error(self.sealed[handle.family])
        if self.grad_on and handle.family.leaf in self.foreign:
            raise self.unsupported("It was computed outside the step; clone it, or write outside")
        if self.grad_on and handle.family.leaf is not None:
            kind = "a leaf Variable" if not handle.steps else "a view of a leaf Variable"
            raise self.autograd_error(
                f"{kind} that requires grad is being used in an in-place operation. Wrap the "
                "update in torch.no_grad()"
            )
        if self.grad_on and handle.family.quiet:
            raise self.autograd_error(
                "A view was created in no_grad mode and is being modified inplace with grad mode "
                "enabled; move both inside the no_grad block, or both outside"
            )
        if any(st == 0 and n > 1 for st, n in zip(handle.strides, handle.shape, strict=True)):
            raise self.shape_error(
                "unsupported operation: more than one element of the written-to tensor refers to a "
                "single memory location. Please clone() the tensor before performing the operation"
            )
        family, storage = handle.family, handle.storage
        new = put_through(self.b, self.base(family), handle.steps, value)
        if new in self._origin:
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
        self._origin[new] = self._origin[value] = (handle.version, handle.version.count)

    def forget(self) -> None:
        """Drop the tape and what user code attached to it."""
        self.tape = Tape()
        for context in self.contexts:
            vars(context).clear()

    # ---- runtime scalars

    def scalar(self, number: float) -> TracedFloat:
        """A runtime scalar: a new host input of the graph."""
        value = self.b.param(HOST_SCALAR)
        self.scalars.append((value, number))
        return TracedFloat.make(number, self, value)


def current() -> Tracer | None:
    """The tracer that is active on this thread, if any."""
    modes = torch.overrides._get_current_function_mode_stack()
    return next((m for m in reversed(modes) if isinstance(m, Tracer)), None)
