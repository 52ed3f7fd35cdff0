"""Hooks of tensors inside a step: they run in the step's backward, as eager's engine calls them.

A hook on an intermediate belongs to the value that the tensor has when it is registered; what is
written to the tensor later has another. Hooks on a tensor from outside stand on the tensor itself,
as in eager, and stay there. They run as user code inside the rule of `backward`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count

import torch
from torch.utils.hooks import RemovableHandle

from tracejit.autodiff import Arrival, reaches
from tracejit.capture.trace.state import Backward
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import Handle
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Value

Tensor = torch.Tensor
Dict = dict[int, Callable]  # hooks by the ids of their handles, in the order of registration

_NO_GRADIENT = "cannot register a hook on a tensor that doesn't require gradient"


# ---- registering


@rule(Tensor.register_hook)
def register_hook(t: Trace, self: Tensor, hook: Callable) -> RemovableHandle:
    """Call `hook(gradient)` once the tensor's gradient is complete; it may return another one."""
    h = t.lift(self)
    if not t.requires_grad(h):
        raise t.autograd_error(_NO_GRADIENT)
    _check_known(t, h)
    if h.is_real:
        return _registered_outside(t, self, Tensor.register_hook, hook)
    if t.is_leaf(h):
        return _added(_of_leaf(t, h)[0], hook)
    if h.fixed is not None:
        raise t.unsupported(
            "A hook on one of several results of one function has no rule; register it on a clone"
        )
    return _added(t.hooked.setdefault(t.read_with_history(h), OrderedDict()), hook)


@rule(Tensor.register_post_accumulate_grad_hook)
def register_post_accumulate_grad_hook(t: Trace, self: Tensor, hook: Callable) -> RemovableHandle:
    """Call `hook(tensor)` once a backward has set or added to the `.grad` of a leaf."""
    h = t.lift(self)
    if not t.requires_grad(h):
        raise t.autograd_error(_NO_GRADIENT)
    _check_known(t, h)
    if not t.is_leaf(h):
        raise t.autograd_error(
            "post accumulate grad hooks cannot be registered on non-leaf tensors"
        )
    if h.is_real:
        return _registered_outside(t, self, Tensor.register_post_accumulate_grad_hook, hook)
    return _added(_of_leaf(t, h)[1], hook)


def _check_known(t: Trace, h: Handle) -> None:
    if h in t.foreign:
        raise t.unsupported("The tensor was computed outside the step; register its hooks there")
    if h.family.quiet:
        raise t.unsupported("A hook on a view that was made under no_grad has no rule")


def _added(hooks: Dict, hook: Callable) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle


def _of_leaf(t: Trace, h: Handle) -> tuple[Dict, Dict]:
    """The hooks of a leaf that the step has made."""
    return t.hooks_of_leaf.setdefault(h, (OrderedDict(), OrderedDict()))


def _registered_outside(
    t: Trace, tensor: Tensor, register: Callable, hook: Callable
) -> RemovableHandle:
    """A hook on a tensor from outside stays there after the step, unless the step fails."""
    with torch._C.DisableTorchFunction():
        if not tensor.requires_grad:
            raise t.unsupported(
                "A hook after requires_grad_() of a tensor from outside has no rule"
            )
        handle = register(tensor, hook)
    t.registered.append(handle)
    return handle


# ---- running

_numbers = count(2)  # of backwards; eager's are positive, and -1 is none


@contextmanager
def running(
    t: Trace, roots: Iterable[Value], wanted: Iterable[Value], *, accumulates: bool
) -> Iterator[None]:
    """While a backward of a trace runs, for hooks that ask about it."""
    passed = set(roots)
    for entry in reversed(t.tape.entries):
        if not passed.isdisjoint(entry.outputs):
            passed.update(entry.inputs)
    before = t.backward
    t.backward = Backward(-next(_numbers), passed & reaches(t.tape, wanted), accumulates)
    try:
        yield
    finally:
        t.backward = before


def node_of(t: Trace, tensor: Tensor) -> frozenset[Value]:
    """What stands for the autograd node of a tensor with hooks: the values of the tensor."""
    h = t.lift(tensor)
    _check_known(t, h)
    values = {v for v, leaf in t.leaf_of.items() if leaf is h}
    return frozenset(values or {t.read_with_history(h)})


def is_reached(t: Trace, node: object) -> bool:
    """Whether the backward in progress comes to a tensor; its node is one of ours, or torch's of a
    leaf from outside."""
    if not isinstance(node, frozenset):
        if getattr(node, "variable", None) is None:
            raise t.unsupported("The tensor was computed outside the step, and so was its gradient")
        node = node_of(t, node.variable)
    if not t.backward.accumulates and not node.isdisjoint(t.leaf_of):
        raise t.autograd_error(
            "A leaf node was passed to _will_engine_execute_node but we are currently running "
            "autograd.grad(). This is currently not supported."
        )
    return not t.backward.reached.isdisjoint(node)


def _dicts(t: Trace, leaf: Handle) -> tuple[Dict, Dict]:
    """The hooks of a leaf, and those that run once its gradient is accumulated."""
    if not leaf.is_real:
        return t.hooks_of_leaf.get(leaf, ({}, {}))
    with torch._C.DisableTorchFunction():
        x = leaf.tensor
        return x._backward_hooks or {}, x._post_accumulate_grad_hooks or {}


def any_on(t: Trace, leaves: Iterable[Handle]) -> bool:
    """Whether one of these leaves has hooks."""
    return any(any(_dicts(t, leaf)) for leaf in leaves)


def on_intermediates(t: Trace, complete: dict[Value, Value]) -> Iterator[Arrival]:
    """What happens when gradients of intermediates with hooks are complete; `complete` takes them
    as they were before the hooks."""

    def run(value: Value, hooks: Dict, gradient: Value) -> Value:
        complete[value] = gradient
        return _run(t, hooks, gradient)

    for value, hooks in t.hooked.items():
        yield Arrival((value,), partial(run, value, hooks), leaf=False)


def unchanged(t: Trace, complete: dict[Value, Value], wanted: list[Value]) -> dict[Value, Value]:
    """Of the gradients of `complete`, those that `autograd.grad` returns as they were before the
    hooks: where it goes on through the function that made the tensor. (So does eager's engine.)"""
    if not complete:
        return {}
    needed = reaches(t.tape, wanted)
    passed = {v for e in t.tape.entries if not needed.isdisjoint(e.inputs) for v in e.outputs}
    return {v: gradient for v, gradient in complete.items() if v in passed}


def changed(t: Trace, leaf: Handle, gradient: Value) -> Value:
    """The gradient of a leaf after its hooks."""
    return _run(t, _dicts(t, leaf)[0], gradient)


def accumulated(t: Trace, leaf: Handle) -> None:
    """A leaf's `.grad` has been set or added to."""
    for hook in (*_dicts(t, leaf)[1].values(),):
        with t.user_code(grad=t.grad_on):
            t.begin(hook, (leaf.tensor,))
            if hook(leaf.tensor) is not None:
                raise t.autograd_error("Tensor post accumulate grad hooks should return None.")


def packed_by(t: Trace, pack: Callable, x: Tensor) -> object:
    """What a hook on saved tensors makes of one."""
    storage = t.lift(x).storage
    before = storage.writes
    with t.user_code(grad=False):
        t.begin(pack, (x,))
        packed = pack(x)
        t.begin(pack, (x,))
    if storage.writes != before:
        raise RuntimeError(
            "A saved tensor pack hook is modifying its input in place. Tensors provided as input "
            "to pack hook can not be modified by in-place operations as this can lead to "
            "unexpected side-effects. Please open an issue if you need to perform in-place "
            "operations on the input to a pack hook."
        )
    return packed


def unpacked_by(t: Trace, unpack: Callable, packed: object) -> Tensor:
    """What a hook on saved tensors gives back."""
    with t.user_code(grad=t.grad_on):
        t.begin(unpack, ())
        got = unpack(packed)
        t.begin(unpack, ())
    if not isinstance(got, Tensor):
        raise TypeError(
            "Output of saved tensor unpack_hook expected to be a Tensor but got result of type "
            f"{type(got)}"
        )
    return got


def _run(t: Trace, hooks: Dict, gradient: Value) -> Value:
    for hook in (*hooks.values(),):
        with t.user_code(grad=t.grad_on):
            given = t.fresh(t.b.alias(gradient))
            t.begin(hook, (given,))
            returned = hook(given)
            t.begin(hook, (given,))
            gradient = _checked(t, hook, given, gradient, returned)
    return gradient


def _checked(
    t: Trace, hook: Callable, given: Tensor, gradient: Value, returned: Tensor | None
) -> Value:
    """The gradient that a hook leaves; errors as eager's."""
    mine, name = t.lift(given), getattr(hook, "__name__", "<unknown>")
    if mine.storage.writes:
        raise t.unsupported(
            "A hook writes to the gradient that it is given, in memory that other gradients may "
            "share; return a new tensor instead"
        )
    if returned is None:
        return gradient
    if not isinstance(returned, Tensor):
        raise TypeError(f"expected Variable, but hook returned '{type(returned).__name__}'")
    h = t.lift(returned)
    for what, same in (
        ("type of value", (h.dtype, h.device) == (mine.dtype, mine.device)),
        ("size of value", h.shape == mine.shape),
    ):
        if not same:
            raise t.shape_error(f"hook '{name}' has changed the {what}")
    return t.b.alias(t.read(h))
