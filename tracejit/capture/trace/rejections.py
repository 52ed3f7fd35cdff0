"""What autograd rejects: writes and reads that eager refuses, with the same class of error.

Each function takes the trace, then what is written or read.
"""

from __future__ import annotations

from tracejit.autodiff import Entry
from tracejit.capture.trace.state import TraceState
from tracejit.capture.trace.tensor import Handle, Ints, Origin
from tracejit.capture.trace.views import reads_bits, repeats
from tracejit.ir.graph import Node, Value


def check_write(t: TraceState, handle: Handle, value: Value) -> None:
    """Raise where eager would refuse to overwrite a tensor with a value."""
    if t.grad_on:
        check_differentiable_write(t, handle, value)
    if 0 in handle.strides and _overlaps_itself(handle):
        raise t.shape_error(
            "unsupported operation: more than one element of the written-to tensor refers to a "
            "single memory location. Please clone() the tensor before performing the operation"
        )
    if handle.storage in t.inputs.overlapping:
        raise t.unsupported(
            "It overlaps in memory with another tensor from outside, of other shape or place; make "
            "the view inside the step, or clone one"
        )
    if t.copied and any(handle.storage in (copy, *of) for copy, of in t.copied.items()):
        raise t.unsupported(
            "x[i] with a tensor i of no axes is a view of x, and one of the two is written to; use "
            "x[int(i)], or x[i].clone()"
        )
    if not handle.steps:
        return
    if reads_bits(handle.steps) and handle.dtype.narrow:
        raise t.unsupported(
            "Bits that are written to as bf16 or f16 may become those of another NaN"
        )
    if repeats(handle.steps):
        raise t.unsupported("Write to the tensor that was expanded, or that as_strided was given")


def _overlaps_itself(h: Handle) -> bool:
    steps = zip(h.strides, h.shape, strict=True)
    return any(st == 0 and n > 1 for st, n in steps) and h.numel > 0


def check_differentiable_write(t: TraceState, handle: Handle, value: Value) -> None:
    family = handle.family
    if family in t.sealed:
        raise t.autograd_error(t.sealed[family])
    if family.leaf in t.foreign:
        raise t.unsupported("It was computed outside the step; clone it, or write outside")
    if family.leaf is not None:
        kind = "a leaf Variable" if not handle.steps else "a view of a leaf Variable"
        raise t.autograd_error(
            f"{kind} that requires grad is being used in an in-place operation. Wrap the "
            "update in torch.no_grad()"
        )
    if family.quiet:
        raise t.autograd_error(
            "A view was created in no_grad mode and is being modified inplace with grad mode "
            "enabled; move both inside the no_grad block, or both outside"
        )
    tracked = t.tape.tracked
    if value in tracked and reads_bits(handle.steps):
        raise t.unsupported(
            "Writing a value with history to bits of another dtype has no rule; detach it"
        )
    if handle.fixed is not None and (value in tracked or t.base(family) in tracked):
        raise t.autograd_error(
            "one of several views that one function returned (split, chunk, unbind) is being "
            "modified in place. Index or narrow the tensor instead"
        )


def check_read(t: TraceState, handle: Handle, base: Value) -> None:
    """Raise where eager would refuse to read a view of a fixed history, whose base was written
    since."""
    fresh = handle.fixed == handle.version.count
    if fresh or not (t.scalars.active and t.grad_on and base in t.tape.tracked):
        return
    raise t.autograd_error(
        "a view made under no_grad, or one of several that one function returned, is read after "
        "it, its base or another view of it was modified in place. Make it after the write, or "
        "clone it"
    )


def check_saved(t: TraceState, node: Node) -> None:
    """Raise as eager does where a node of a gradient formula reads what it may not read."""
    formula = t.formula
    for value in node.inputs:
        if value.id >= formula.start or value in formula.cotangents or value.type.is_host:
            continue  # a host value is no saved tensor: `Trace.saves` speaks for it
        check_freed(t, formula.entry)
        # hooks may hold what is written to, and what torch saves may be known
        if formula.entry.held is None and formula.entry.noted is None:
            _check_unwritten(t, formula.entry, value)
        t.saved[value] = None


def check_held(t: TraceState, entry: Entry) -> None:
    """Raise as eager does where a formula would not get what torch saved for it."""
    if entry.saved is not None or entry.noted:
        check_freed(t, entry)
    for value in entry.saved or ():
        if entry.noted is None:
            _check_unwritten(t, entry, value)
        t.saved[value] = None
    for shape, then in entry.noted or ():
        _check_version(t, entry, shape, then)


def check_freed(t: TraceState, entry: Entry) -> None:
    """Raise where a second backward comes to an entry that the first has freed."""
    if entry.freed:
        raise t.autograd_error(
            "Trying to backward through the graph a second time (or directly access saved tensors "
            "after they have already been freed). Specify retain_graph=True if you need to "
            "backward through the graph a second time"
        )


def _check_unwritten(t: TraceState, entry: Entry, value: Value) -> None:
    if value in t.origin:
        _check_version(t, entry, value.type.shape, t.origin[value])


def _check_version(t: TraceState, entry: Entry, shape: Ints, then: Origin) -> None:
    """Raise where a tensor, or its memory, was written to since it was saved."""
    if then.version.count != then.count:
        raise t.autograd_error(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: a tensor of shape {list(shape)} read by {entry.name} is at "
            f"version {then.version.count}; expected version {then.count} instead"
        )
    if then.storage.writes != then.writes:
        raise t.unsupported(
            f"A tensor of shape {list(shape)} that {entry.name} saved was written "
            "through .data since, and eager would silently use the new value; clone it before, or "
            "write after the backward"
        )
