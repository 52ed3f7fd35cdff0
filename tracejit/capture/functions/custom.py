"""Custom `torch.autograd.Function`s inside a step.

The user's forward runs on intermediates, untaped, with a context of ours. Its outputs get one tape
entry, whose derivative formula runs the user's backward on intermediates: what it computes is
differentiated again where a second derivative is asked for. Modules' full backward hooks are hooks
on the node of a custom function of torch's: here its context. `python/patches.py` leads here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.autograd import function as torch_function
from torch.autograd.function import Function, FunctionCtx, _SingleLevelFunction
from torch.nn.modules._functions import BackwardHookFunction

from tracejit.autodiff import Entry
from tracejit.capture.functions.hooks import packed_by, unpacked_by
from tracejit.capture.trace.table import COMPARED
from tracejit.capture.trace.tensor import (
    Family,
    Handle,
    Storage,
    Version,
    broadcast_shape,
)
from tracejit.capture.trace.trace import Trace
from tracejit.capture.trace.views import put_through, repeats
from tracejit.errors import TracejitError
from tracejit.ir.graph import Builder, Value
from tracejit.ir.types import contiguous_strides

Tensor = torch.Tensor

_FREED = (
    "Trying to backward through the graph a second time (or directly access saved tensors after "
    "they have already been freed). Specify retain_graph=True if you need to backward through the "
    "graph a second time or if you need to access saved tensors after calling backward"
)
_SEALED = (
    "Output {i} of {name} is a view and is being modified inplace. This view was created inside a "
    "custom Function (or because an input was returned as-is). Clone the output of the Function"
)
_HOOKED = (
    "the step runs modules with backward hooks, which a backward after it would not call; call "
    "backward inside the step"
)
_TWICE = "trying to differentiate twice a function that was marked with @once_differentiable"


class Context(FunctionCtx):
    """What `forward` and `backward` get as `ctx`. Any attribute may be set on it."""

    def __init__(self, trace: Trace, name: str):
        self._trace = trace
        self._name = name
        self._entry: Entry | None = None
        self._saved: tuple[tuple[Tensor | None, int], ...] = ()  # and the version when saved
        # where hooks on saved tensors are active: what they have packed, and how to unpack that
        self._packed: tuple[object, ...] = ()
        self._unpack: Callable | None = None
        self.needs_input_grad: tuple[bool, ...] = ()
        self.materialize_grads = True
        self.inputs: tuple[Value, ...] | None = None  # None: nothing is differentiated
        self.given: set[int] = set()  # the ids of the tensors among the arguments
        # per argument: None, or the shape, dtype and device of a tensor
        self.kinds: list[tuple | None] = []
        self.families: tuple[Family, ...] = ()  # of outputs whose `grad_fn` this is
        self.hooks: list[Callable] = []
        self.over = False  # the step has returned
        self._mine = frozenset(vars(self)) - {"materialize_grads"} | {"_mine"}

    def name(self) -> str:
        return self._name

    def register_hook(self, hook: Callable) -> None:
        """Call `hook(grad_inputs, grad_outputs)` after backward; it may return other gradients."""
        self.hooks.append(hook)

    def left(self) -> tuple[tuple[str, ...], tuple]:
        """What the user's forward has set: names, and values."""
        there = {name: x for name, x in vars(self).items() if name not in self._mine}
        return tuple(there), tuple(there.values())

    @property
    def saved_tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors given to `save_for_backward`, if they still are what they were."""
        t = self._trace
        if self._entry is not None and self._entry.freed:
            raise t.autograd_error(_FREED)
        if self._unpack is not None:
            return tuple(
                None if x is None else unpacked_by(t, self._unpack, x[0]) for x in self._packed
            )
        for tensor, count in self._saved:
            if tensor is None:
                continue
            h = t.lift(tensor)
            t.saved[h.storage.value] = None
            if h.version.count != count:
                raise t.autograd_error(
                    "one of the variables needed for gradient computation has been modified by an "
                    f"inplace operation: a tensor of shape {list(h.shape)} saved by {self._name} "
                    f"is at version {h.version.count}; expected version {count} instead"
                )
        return tuple(tensor for tensor, _ in self._saved)

    saved_variables = saved_tensors

    def references(self) -> Iterator[object]:
        """What this context alone holds, each as often as it does."""
        yield from vars(self).values()
        yield from (tensor for tensor, _ in self._saved)
        yield from (x[0] for x in self._packed if x is not None)
        for name in ("to_save", "dirty_tensors", "non_differentiable", "saved_for_forward"):
            yield from getattr(self, name, None) or ()

    def _save(self) -> None:
        """Take note of the tensors to save, once the outputs are known."""
        for i, x in enumerate(getattr(self, "to_save", None) or ()):
            if x is not None and not isinstance(x, Tensor):
                raise TypeError(
                    "save_for_backward can only save variables, but argument "
                    f"{i} is of type {type(x).__name__}"
                )
        saved = getattr(self, "to_save", None) or ()
        t = self._trace
        if t.saving and t.saving[-1] is not None:
            pack, self._unpack = t.saving[-1].pack, t.saving[-1].unpack
            self._packed = tuple(None if x is None else (packed_by(t, pack, x),) for x in saved)
            self.to_save = ()
        else:
            self._saved = tuple((x, 0 if x is None else t.lift(x).version.count) for x in saved)


def call(t: Trace, cls: type[Function], args: tuple, reads: tuple | None) -> object:
    """`cls.apply(*args)` in a trace: the user's forward between two calls of ours, which later
    traces compare.

    reads: what the user's backward reads of Python, if it does no more than compute with tensors:
        a trace that goes as an earlier one need not run it. None: it may do anything.
    """
    if reads is None:
        t.journal.forget()
    if issubclass(cls, (torch_function.InplaceFunction, torch_function.NestedIOFunction)):
        t.begin(cls, args)
        raise t.unsupported("Derive it from torch.autograd.Function itself")
    ctx, k = Context(t, f"{cls.__name__}Backward"), len(t.applied)
    t.applied.append(ctx)
    places = tuple(isinstance(a, Tensor) for a in args)
    tensors = tuple(a for a, is_tensor in zip(args, places, strict=True) if is_tensor)
    ctx.needs_input_grad = t.mode.compared(_begin, (cls, k, reads, places, tensors))
    output = _forward(t, cls, ctx, args)
    raw = output if isinstance(output, tuple) else (output,)
    names, left = ctx.left()
    wrapped = t.mode.compared(_end, (cls, k, names, left, raw))
    return wrapped if isinstance(output, tuple) else wrapped[0]


def _begin(
    t: Trace, cls: type, k: int, reads: tuple, places: tuple[bool, ...], tensors: tuple
) -> tuple[bool, ...]:
    """The k-th custom function of a trace begins: which of its arguments require grad."""
    t.called(cls, tensors)
    ctx, found = t.applied[k], iter(tensors)
    handles = [t.lift(next(found)) if is_tensor else None for is_tensor in places]
    needs = tuple(h is not None and t.requires_grad(h) for h in handles)
    if t.grad_on and any(needs):
        ctx.inputs = tuple(t.read(h) for h, n in zip(handles, needs, strict=True) if n)
    ctx.needs_input_grad, ctx.given = needs, _among(tensors)
    ctx.kinds = [None if h is None else (h.shape, h.dtype, h.device) for h in handles]
    t.contexts.append(ctx)
    return needs


def _end(t: Trace, cls: type, k: int, names: tuple[str, ...], left: tuple, raw: tuple) -> tuple:
    """Its forward has run, left this on the context, and returned this."""
    t.called(cls, raw)
    ctx = t.applied[k]
    wrapped = _wrap(t, cls, ctx, raw)
    if cls is BackwardHookFunction:
        ctx.families = tuple(t.lift(x).family for x in wrapped)
    return wrapped


COMPARED.update((_begin, _end))


def _forward(t: Trace, cls: type[Function], ctx: Context, args: tuple) -> object:
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)
    try:
        if cls.setup_context is _SingleLevelFunction.setup_context:
            return cls.forward(ctx, *args)
        output = cls.forward(*args)
        cls.setup_context(ctx, args, output)
        return output
    finally:
        torch._C._set_grad_enabled(before)


def _wrap(
    t: Trace,
    cls: type[Function],
    ctx: Context,
    raw: tuple,
) -> tuple:
    """The outputs with their history."""
    dirty = _among(getattr(ctx, "dirty_tensors", None))
    constant = _among(getattr(ctx, "non_differentiable", None))
    given, inputs = ctx.given, ctx.inputs
    dirty &= given
    _check_dirty(t, dirty, raw)
    values: list[Value | None] = []
    for out in raw:
        differentiable = (
            inputs is not None
            and isinstance(out, Tensor)
            and id(out) not in constant
            and t.lift(out).dtype.is_float
        )
        values.append(_copied(t, t.lift(out)) if differentiable else None)
    outputs = tuple(v for v in values if v is not None)
    if outputs:
        infos = tuple(t.lift(x) if isinstance(x, Tensor) else None for x in raw)
        vjp = _Formula(t, cls, ctx, infos, tuple(v is not None for v in values))
        ctx._entry = Entry(inputs, outputs, vjp, ctx.name())
        t.tape.add(ctx._entry)
    wrapped = []
    for i, (out, value) in enumerate(zip(raw, values, strict=True)):
        if not isinstance(out, Tensor):
            wrapped.append(out)
        elif value is None:
            as_is = id(out) not in given or id(out) in dirty
            wrapped.append(out if as_is else t.detached(t.lift(out), share_version=True))
        elif id(out) in dirty:
            t.write(t.lift(out), value)
            wrapped.append(out)
        else:
            reason = _SEALED.format(i=i, name=ctx.name())
            wrapped.append(_with_history(t, out, value, id(out) in given, reason))
    if outputs:
        ctx._save()
    return tuple(wrapped)


def _among(tensors: Sequence[object] | None) -> set[int]:
    return {id(x) for x in tensors or () if isinstance(x, Tensor)}


def _check_dirty(t: Trace, dirty: set[int], raw: tuple) -> None:
    if dirty - _among(raw):
        raise t.autograd_error(
            "Some elements marked as dirty during the forward method were not returned as output. "
            "The inputs that are modified inplace must all be outputs of the Function."
        )


def _copied(t: Trace, h: Handle) -> Value:
    """A value of its own, without history, for what a tensor holds."""
    with t.untaped():
        return t.b.alias(t.read(h))


def _with_history(t: Trace, out: Tensor, value: Value, is_input: bool, reason: str) -> Tensor:
    """Let an output carry `value`: in a family of its own, so that its memory stays shared."""
    h = t.lift(out)
    if h.is_real and not is_input:
        raise t.unsupported("A custom Function returns a tensor from outside the step; clone it")
    if repeats(h.steps):
        storage, steps = Storage(value, contiguous_strides(h.shape)), ()
        family = Family(storage, value)
        h = Handle(family, (), h.shape, storage.strides, 0, h.dtype, h.device, Version())
        return t.proxy(h)
    storage, steps = h.storage, h.steps
    with t.untaped():
        base = t.stripped(storage)
    family = Family(storage, put_through(t, base, steps, value), storage.writes)
    if is_input or steps:
        t.sealed[family] = reason
    if is_input:
        return t.proxy(
            Handle(family, steps, h.shape, h.strides, h.offset, h.dtype, h.device, h.version)
        )
    h.family, h.memo = family, None
    return out


class _Formula:
    """The derivative of one call: runs the user's backward."""

    def __init__(
        self,
        t: Trace,
        cls: type[Function],
        ctx: Context,
        outputs: tuple[Handle | None, ...],
        differentiable: tuple[bool, ...],
    ):
        self.t, self.cls, self.ctx = t, cls, ctx
        self.kinds = ctx.kinds
        self.outputs = [None if h is None else (h.shape, h.dtype, h.device) for h in outputs]
        self.differentiable = differentiable

    def __call__(
        self, b: Builder, cotangents: tuple[Value | None, ...], needed: tuple[bool, ...]
    ) -> list[Value | None]:
        t, ctx = self.t, self.ctx
        defined = t.cotangents
        if ctx.hooks and ctx.over:
            raise TracejitError(reason=_HOOKED)
        with t.user_code(grad=t.grad_on):
            arrived = self._arrived(cotangents, defined)
            del cotangents
            grads = self._materialized(arrived) if ctx.materialize_grads else arrived
            returned = self._backward()(
                ctx, *([grads] if getattr(self.cls, "boxed_grads_call", False) else grads)
            )
            for hook in ctx.hooks:
                changed = hook(returned, tuple(arrived))
                returned = returned if changed is None else changed
            return self._checked(returned, needed)

    def _backward(self) -> Callable:
        own, vjp = self.cls.backward, self.cls.vjp
        if own is not Function.backward and vjp is not Function.vjp:
            raise self.t.autograd_error(
                "Implementing both 'backward' and 'vjp' for a custom Function is not allowed. You "
                "should only implement one of them."
            )
        return own if vjp is Function.vjp else vjp

    def _arrived(self, cotangents: tuple, defined: frozenset[Value]) -> list[Tensor | None]:
        """The gradients of the outputs of the user's forward; None where none arrived."""
        t, found = self.t, iter(cotangents)
        values = [next(found) if differentiable else None for differentiable in self.differentiable]
        return [t.fresh(t.b.alias(v)) if v is not None and v in defined else None for v in values]

    def _materialized(self, arrived: list[Tensor | None]) -> list[Tensor | None]:
        """The same with zeros for the missing ones."""
        t, out = self.t, list(arrived)
        for i, kind in enumerate(self.outputs):
            if out[i] is None and kind is not None:
                shape, dtype, device = kind
                zero = 0.0 if dtype.is_float else (False if dtype.kind == "b" else 0)
                out[i] = t.fresh(t.b.full(zero, shape=shape, dtype=dtype, device=device))
        return out

    def _checked(self, returned: object, needed: tuple[bool, ...]) -> list[Value | None]:
        """The gradients as values, one per input that requires grad; errors as eager's."""
        t, name = self.t, self.ctx.name()
        grads = returned if isinstance(returned, tuple) else (returned,)
        extra = grads[len(self.kinds) :]
        if len(grads) < len(self.kinds) or any(g is not None for g in extra):
            raise t.autograd_error(
                f"function {name} returned an incorrect number of gradients (expected "
                f"{len(self.kinds)}, got {len(grads)})"
            )
        wanted, out, at = iter(needed), [], 0
        for i, (kind, grad) in enumerate(zip(self.kinds, grads, strict=False)):
            if kind is None:
                if grad is not None:
                    raise t.autograd_error(
                        f"function {name} returned a gradient different than None at position "
                        f"{i + 1}, but the corresponding forward input was not a Variable"
                    )
                continue
            if grad is not None and not isinstance(grad, Tensor):
                raise t.autograd_error(f"expected Variable or None (got {type(grad).__name__})")
            if self.ctx.needs_input_grad[i]:
                needs = next(wanted)
                out.append(self._fitted(grad, kind, at) if needs and grad is not None else None)
            at += 1
        return out

    def _fitted(self, grad: Tensor, kind: tuple, index: int) -> Value:
        """A returned gradient in the input's shape and dtype."""
        t, name = self.t, self.ctx.name()
        shape, dtype, device = kind
        h = t.lift(grad)
        prefix = f"Function {name} returned an invalid gradient at index {index} - "
        if h.device != device:
            raise t.autograd_error(f"{prefix}expected device {device} but got {h.device}")
        if h.shape != shape and broadcast_shape([shape, h.shape]) != h.shape:
            raise t.autograd_error(
                f"{prefix}got {list(h.shape)} but expected shape compatible with {list(shape)}"
            )
        value = t.b.alias(t.read(h))
        if h.shape != shape:
            value = _sum_to(t.b, value, shape)
        return value if h.dtype is dtype else t.b.cast(value, dtype=dtype)


def _sum_to(b: Builder, value: Value, shape: tuple[int, ...]) -> Value:
    """Sum over the axes along which `shape` was broadcast."""
    lead = len(value.type.shape) - len(shape)
    axes = tuple(range(lead)) + tuple(
        lead + i for i, n in enumerate(shape) if n == 1 and value.type.shape[lead + i] != 1
    )
    if axes:
        value = b.reduce_sum(value, axes=axes)
    return value if value.type.shape == shape else b.reshape(value, shape=shape)


def once_differentiable(t: Trace, tensor: Tensor) -> Tensor:
    """A tensor that raises when a second backward reaches it."""
    h = t.lift(tensor)
    value = t.read(h)

    def vjp(b: Builder, cotangents: tuple, needed: tuple) -> Sequence[Value | None]:
        raise t.autograd_error(_TWICE)

    with t.untaped():
        out = t.b.alias(value)
    return t.fresh(t.derive("once_differentiable", (value,), out, vjp))
