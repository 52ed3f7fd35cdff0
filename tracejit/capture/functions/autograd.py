"""Autograd inside a step: backward, grad, `.grad`, `.data`, detach, requires_grad."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch.nn.parameter import is_lazy

from tracejit.autodiff import Arrival, total_of
from tracejit.autodiff import backward as reverse
from tracejit.capture.functions import data_parallel, hooks
from tracejit.capture.functions.layouts import like
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import Family, Handle, TracedTensor, is_dense
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Node, Value
from tracejit.ir.types import f32

Tensor = torch.Tensor


def _as_tuple(x: object) -> tuple:
    if x is None:
        return ()
    return (x,) if isinstance(x, Tensor) else tuple(x)


def _roots(
    t: Trace, tensors: Sequence[Tensor], cotangents: Sequence[Tensor | None]
) -> list[tuple[Value, Value]]:
    roots = []
    if len(cotangents) != len(tensors):
        raise t.autograd_error(f"got {len(tensors)} tensors and {len(cotangents)} gradients")
    for i, (tensor, cotangent) in enumerate(zip(tensors, cotangents, strict=True)):
        h = t.lift(tensor)
        if not t.requires_grad(h):
            raise t.autograd_error(
                f"element {i} of tensors does not require grad and does not have a grad_fn"
            )
        value = t.read_with_history(h)
        if cotangent is None:
            if h.numel != 1:
                raise t.autograd_error("grad can be implicitly created only for scalar outputs")
            seed = t.b.full(1.0, shape=h.shape, dtype=h.dtype, device=h.device)
        else:
            g = t.lift(cotangent)
            if g.shape != h.shape:
                raise t.shape_error(
                    f"Mismatch in shape: grad_output[{i}] has a shape of {list(g.shape)} and "
                    f"output[{i}] has a shape of {list(h.shape)}"
                )
            seed = t.read(g)
            if g.dtype is not h.dtype:
                seed = t.b.cast(seed, dtype=h.dtype)
        roots.append((value, seed))
    return roots


def _gradients(
    t: Trace,
    roots: list[tuple[Value, Value]],
    wanted: list[Value],
    *,
    retain_graph: bool,
    create_graph: bool,
    leaves: Sequence[Arrival] = (),
    complete: dict[Value, Value] | None = None,
) -> dict[Value, Value]:
    arrivals = [*hooks.on_intermediates(t, {} if complete is None else complete), *leaves]
    asked = nullcontext()
    if arrivals:
        values = [value for value, _ in roots]
        asked = hooks.running(t, values, wanted, accumulates=complete is None)
    if create_graph and t.saving and t.saving[-1] is not None:
        raise t.unsupported(
            "Hooks on saved tensors are active, and would see what eager saves for second "
            "derivatives; call it outside of the hooks"
        )
    first = len(t.b.nodes)
    with t.taped(create_graph), t.formulas([value for value, _ in roots]) as enter, asked:
        found = reverse(
            t.tape, t.b, roots, wanted, retain_graph=retain_graph, enter=enter, arrivals=arrivals
        )
        if torch._C._is_any_autocast_enabled():
            _check_products(t, t.b.nodes[first:])
    return found


def _check_products(t: Trace, emitted: Sequence[Node]) -> None:
    """Refuse a backward whose products of matrices eager would compute in lower precision than
    those of the forward pass, because autocast is on around it."""
    products = ("contraction", "attention")
    if any(n.op.family in products and n.out.type.dtype is f32 for n in emitted):
        raise t.unsupported(
            "Autocast is on around it, and eager would differentiate float32 products in lower "
            "precision; call backward after the region of autocast"
        )


def leaf_values(t: Trace) -> dict[Handle, list[Value]]:
    """Every value that stands for a leaf, by leaf, in order of appearance."""
    found: dict[Handle, list[Value]] = {}
    for value, leaf in t.leaf_of.items():
        found.setdefault(leaf, []).append(value)
    return found


@rule(torch.autograd.backward)
def backward(
    t: Trace,
    tensors: object,
    grad_tensors: object = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: object = None,
    inputs: object = None,
) -> None:
    """Accumulate into the `.grad` of every leaf that the tensors depend on."""
    if grad_variables is not None:
        raise t.unsupported("grad_variables is deprecated; use grad_tensors")
    tensors = _as_tuple(tensors)
    given = _as_tuple(grad_tensors) if grad_tensors is not None else (None,) * len(tensors)
    retain = create_graph if retain_graph is None else retain_graph
    chosen = [t.lift(x) for x in _as_tuple(inputs)]
    roots = _roots(t, tensors, given)
    leaves = {h: values for h, values in leaf_values(t).items() if h.requires_grad_leaf}
    if inputs is not None:
        if not chosen:
            raise t.autograd_error("inputs argument to backward() cannot be empty")
        if any(h not in leaves for h in chosen):
            raise t.unsupported("backward(inputs=…) of a tensor that is not a leaf has no rule")
        leaves = {h: leaves[h] for h in chosen}
    wanted = [v for values in leaves.values() for v in values]
    retained = {h: t.read_with_history(h) for h in t.retained if h not in leaves}
    wanted += retained.values()
    modes = {"retain_graph": bool(retain), "create_graph": create_graph}
    came: list[Handle] = []  # the leaves that have got a gradient

    def arrived(leaf: Handle, total: Value) -> None:
        came.append(leaf)
        with t.unchecked():
            accumulate(t, leaf, hooks.changed(t, leaf, total), create_graph)
        hooks.accumulated(t, leaf)

    if t.hooked or hooks.any_on(t, leaves):  # user code runs while gradients come in
        arrivals = [
            Arrival(tuple(values), partial(arrived, h), leaf=True) for h, values in leaves.items()
        ]
        found = _gradients(t, roots, wanted, **modes, leaves=arrivals)
        leaves = {}
    else:
        found = _gradients(t, roots, wanted, **modes)
    with t.taped(create_graph):
        for leaf, values in leaves.items():
            total = total_of(t.b, found, values)
            if total is not None:
                came.append(leaf)
                accumulate(t, leaf, total, create_graph)
        if t.armed:
            data_parallel.came(t, came, partial(accumulate, create_graph=False))
        for h, value in retained.items():
            if value in found:
                known = h.grad is None
                total = found[value] if known else t.b.add(t.read(t.lift(h.grad)), found[value])
                set_grad_of(h, t.fresh(total))


@rule(Tensor.backward)
def tensor_backward(
    t: Trace,
    self: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: object = None,
) -> None:
    given = None if gradient is None else (gradient,)
    backward(t, (self,), given, retain_graph, create_graph, inputs=inputs)


@rule(torch.autograd.grad)
def grad(
    t: Trace,
    outputs: object,
    inputs: object,
    grad_outputs: object = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients of outputs with respect to inputs, returned rather than accumulated."""
    if is_grads_batched:
        raise t.unsupported("is_grads_batched has no rule")
    outputs = _as_tuple(outputs)
    given = _as_tuple(grad_outputs) if grad_outputs is not None else (None,) * len(outputs)
    retain = create_graph if retain_graph is None else retain_graph
    handles = [t.lift(x) for x in _as_tuple(inputs)]
    leaves = leaf_values(t)
    values = []
    for h in handles:
        if not t.requires_grad(h):
            raise t.autograd_error("One of the differentiated Tensors does not require grad")
        values.append(leaves[h] if h in leaves else [t.read_with_history(h)])
    roots = _roots(t, outputs, given)
    wanted = [v for group in values for v in group]
    totals: dict[Handle, Value] = {}  # of the leaves that have hooks

    def arrived(leaf: Handle, total: Value) -> None:
        totals[leaf] = hooks.changed(t, leaf, total)

    arrivals = [
        Arrival(tuple(leaves[h]), partial(arrived, h), leaf=True)
        for h in dict.fromkeys(handles)
        if h in leaves and hooks.any_on(t, (h,))
    ]
    modes = {"retain_graph": bool(retain), "create_graph": create_graph}
    complete: dict[Value, Value] = {}  # gradients of intermediates, before their hooks
    found = _gradients(t, roots, wanted, **modes, leaves=arrivals, complete=complete)
    found |= hooks.unchanged(t, complete, wanted)
    out: list[Tensor | None] = []
    with t.taped(create_graph):
        for h, group in zip(handles, values, strict=True):
            total = totals[h] if h in totals else total_of(t.b, found, group)
            if total is None and materialize_grads:
                total = t.b.full(0.0, shape=h.shape, dtype=h.dtype, device=h.device)
            if total is None:
                if not allow_unused:
                    raise t.autograd_error(
                        "One of the differentiated Tensors appears to not have been used in the "
                        "graph. Set allow_unused=True if this is the desired behavior"
                    )
                out.append(None)
            else:
                out.append(t.fresh(total, like(h, h.shape)))  # channels last is handed on
    return tuple(out)


def accumulate(t: Trace, leaf: Handle, total: Value, create_graph: bool) -> None:
    """AccumulateGrad: set the leaf's `.grad`, or add to it in place."""
    if leaf in t.foreign:
        raise t.unsupported(
            f"{t.described_input(leaf.tensor)} was computed outside the step and requires grad,"
            " so gradients would have to leave the step; compute it inside, pass tensor.detach(), "
            "or call backward outside"
        )
    existing = get_grad(t, leaf.tensor)
    if existing is None:
        dense = is_dense(leaf.shape, leaf.strides)
        set_grad_of(leaf, t.fresh(total, leaf.strides if dense else None))
        return
    into = t.lift(existing)
    if create_graph:
        set_grad_of(leaf, t.fresh(t.b.add(t.read(into), total)))
    else:
        with torch.no_grad():
            t.write(into, t.b.add(t.read(into), total))


def set_grad_of(leaf: Handle, grad: Tensor | None) -> None:
    leaf.grad, leaf.grad_known = grad, True


@rule(Tensor.grad.__get__)
def get_grad(t: Trace, self: Tensor) -> Tensor | None:
    if is_lazy(self):  # `zero_grad` before the forward pass that will initialize it
        t.journal.forget()
        return None
    h = t.lift(self)
    if not h.grad_known:
        with torch._C.DisableTorchFunction():
            set_grad_of(h, self.grad)
        h.grad_at_start, h.grad_read = h.grad, True
        t.journal.found_grad(self, h.grad)
    return h.grad


@rule(Tensor.grad.__set__)
def set_grad(t: Trace, self: Tensor, value: Tensor | None) -> None:
    h = t.lift(self)
    if value is not None:
        g = t.lift(value)
        if (g.shape, g.dtype, g.device) != (h.shape, h.dtype, h.device):
            raise t.shape_error(
                "assigned grad has data of a different size, dtype or device than the tensor"
            )
        if g is h:
            raise t.autograd_error("can't assign Variable as its own grad")
    set_grad_of(h, value)


@rule(Tensor.grad.__delete__)
def delete_grad(t: Trace, self: Tensor) -> None:
    set_grad(t, self, None)


@rule(Tensor.data.__get__)
def get_data(t: Trace, self: Tensor) -> TracedTensor:
    return t.detached(t.lift(self), share_version=False)


@rule(Tensor.data.__set__)
def set_data(t: Trace, self: Tensor, value: Tensor) -> None:
    """`p.data = x`: p takes x's memory. Kept when x is new and laid out as p."""
    h, x = t.lift(self), t.lift(value)
    if (h.shape, h.dtype, h.device) != (x.shape, x.dtype, x.device):
        raise t.unsupported("Assigning .data of another shape, dtype or device has no rule")
    if (x.storage, x.offset, x.strides) == (h.storage, h.offset, h.strides):
        return  # its own memory, as `t.data -= x` assigns it
    if x.steps or h.steps or x.is_real or x.strides != h.strides:
        raise t.unsupported(
            "Assigning .data from a view or a tensor made outside has no rule; use p.data.copy_(x)"
        )
    t.rebind(h, x)


@rule(Tensor.detach, torch.detach)
def detach(t: Trace, input: Tensor) -> TracedTensor:
    return t.detached(t.lift(input), share_version=True)


@rule(Tensor.requires_grad.__get__)
def requires_grad(t: Trace, self: Tensor) -> bool:
    if is_lazy(self):  # asked before the forward pass that will initialize it
        t.journal.forget()
        with torch._C.DisableTorchFunction():
            return self.requires_grad
    return t.requires_grad(t.lift(self))


@rule(Tensor.is_leaf.__get__)
def is_leaf(t: Trace, self: Tensor) -> bool:
    return t.is_leaf(t.lift(self))


@rule(Tensor.detach_, torch.detach_)
def detach_(t: Trace, self: Tensor) -> Tensor:
    """The tensor itself without history; what was computed from it before keeps it."""
    h = t.lift(self)
    if h.steps or (h.is_real and _is_view(self)):
        raise t.autograd_error("Can't detach views in-place. Use detach() instead")
    if not t.requires_grad(h):
        return self
    if any(p.handle.family is h.family for p in t.proxies if p.handle is not h):
        raise t.unsupported("detach_() of a tensor that has views has no rule; use detach()")
    if h in t.retained:
        raise t.unsupported("detach_() after retain_grad() has no rule; use detach()")
    if h in t.foreign:
        values = {v for v, leaf in t.leaf_of.items() if leaf is h}
        if any(not values.isdisjoint(entry.inputs) for entry in t.tape.entries):
            raise t.unsupported(
                "detach_() of a tensor from outside that was used with its history has no rule; "
                "call it first, or use detach()"
            )
        t.foreign.discard(h)
    _set_apart(t, h)
    return self


def _is_view(tensor: Tensor) -> bool:
    """Whether a tensor from outside is a view of another."""
    with torch._C.DisableTorchFunction():
        return tensor._is_view()


def _set_apart(t: Trace, h: Handle) -> None:
    """From now on a tensor has no history; its views and aliases keep theirs."""
    if h.requires_grad_leaf and hooks.any_on(t, (h,)):
        raise t.unsupported("Changing requires_grad of a tensor with hooks has no rule")
    h.requires_grad_leaf = False
    if h.is_real and h not in t.flagged:
        t.flagged.append(h)
    h.family = Family(h.storage, t.stripped(h.storage), h.storage.writes)


@rule(Tensor.requires_grad.__set__)
def set_requires_grad(t: Trace, self: Tensor, value: bool) -> None:
    requires_grad_(t, self, value)


@rule(Tensor.requires_grad_)
def requires_grad_(t: Trace, self: Tensor, requires_grad: bool = True) -> Tensor:
    """A leaf that is frozen keeps its place in what was computed of it: backward comes to it, and
    accumulates nothing as long as it is frozen."""
    h = t.lift(self)
    if t.requires_grad(h) == requires_grad:
        return self
    if not t.is_leaf(h):
        raise t.autograd_error(
            "you can only change requires_grad flags of leaf variables. If you want to use a "
            "computed variable in a subgraph that doesn't require differentiation use detach()"
        )
    if not h.dtype.is_float:
        raise t.autograd_error("only Tensors of floating point dtype can require gradients")
    if h.steps or h.family.quiet:
        raise t.unsupported("Changing requires_grad of a view has no rule; clone it before")
    _set_apart(t, h)
    if requires_grad:
        t.make_leaf(h)
    return self


@rule(Tensor.retain_grad)
def retain_grad(t: Trace, self: Tensor) -> None:
    h = t.lift(self)
    if not t.requires_grad(h):
        raise t.autograd_error("can't retain_grad on Tensor that has requires_grad=False")
    if h in t.foreign:
        raise t.unsupported("The tensor was computed outside the step; call retain_grad there")
    if not t.is_leaf(h) and h not in t.retained:
        t.retained.append(h)


@rule(Tensor.retains_grad.__get__)
def retains_grad(t: Trace, self: Tensor) -> bool:
    return t.lift(self) in t.retained


@rule(Tensor.grad_fn.__get__)
def grad_fn(t: Trace, self: Tensor) -> object:
    """None for a leaf; the node on which torch puts a module's full backward hooks."""
    h = t.lift(self)
    if t.is_leaf(h):
        return None
    if t.wrapping:  # torch asks only whether there is one
        return ...
    for context in t.contexts:
        if h.family in context.families:
            return context
    raise t.unsupported(
        "The autograd graph of an intermediate cannot be inspected; use hooks of tensors, and in "
        "place of a module's register_backward_hook, use register_full_backward_hook"
    )
