"""Tensors from outside on their way into a trace: which may come in, and what memory they share.

In goes a tensor from outside the step that a trace meets for the first time, out comes its handle;
the trace's table of inputs grows by it. Nothing of the tensor is changed.
"""

from __future__ import annotations

import torch

from tracejit.capture.trace import location
from tracejit.capture.trace.state import TraceState
from tracejit.capture.trace.table import function_name
from tracejit.capture.trace.tensor import (
    TO_IR,
    Family,
    Handle,
    Ints,
    Storage,
    Version,
    extent,
    problem_with,
)
from tracejit.errors import UnsupportedOperation
from tracejit.ir.types import Type, contiguous_strides


def lift_input(t: TraceState, tensor: torch.Tensor) -> Handle:
    """A handle for a tensor from outside, now an input of the graph.

    Raises UnsupportedOperation for tensors that cannot take part, and for two that overlap.
    """
    with torch._C.DisableTorchFunction():
        problem = problem_with(tensor)
        if problem is not None:
            shapes = f"{t.described_input(tensor).removesuffix(',')}, {tensor.dtype}"
            remedy = problem[0].upper() + problem[1:] + "."
            raise t.refuse(UnsupportedOperation(**_place(t), shapes=shapes, remedy=remedy))
        shape, strides = tuple(tensor.shape), tuple(tensor.stride())
        device, dtype = str(tensor.device), TO_IR[tensor.dtype]
        offset, requires_grad = tensor.storage_offset(), tensor.requires_grad
        foreign = tensor.grad_fn is not None
        sharing = t.inputs.by_memory.setdefault(tensor.untyped_storage()._cdata, [])
    storage = _storage(t, tensor, sharing, offset, Type(dtype, shape, device), strides)
    with t.untaped():
        family = Family(storage, t.stripped(storage), storage.writes)
    handle = Handle(
        family, (), shape, strides, offset, dtype, device, Version(), tensor, grad_known=False
    )
    if requires_grad:
        t.make_leaf(handle)
    if foreign:
        t.foreign.add(handle)
    sharing.append(handle)
    t.inputs.add(tensor, handle)
    return handle


def _storage(
    t: TraceState, tensor: torch.Tensor, sharing: list[Handle], low: int, type: Type, strides: Ints
) -> Storage:
    """The storage of a real tensor: shared by tensors of the same memory and geometry."""
    high = low + extent(type.shape, strides)
    for other in sharing:
        geometry = (other.offset, other.shape, other.strides, other.dtype)
        if geometry == (low, type.shape, strides, type.dtype):
            return other.storage
        stop = other.offset + extent(other.shape, other.strides)
        if other.dtype != type.dtype or (other.offset < high and low < stop):
            raise t.refuse(
                UnsupportedOperation(
                    **_place(t),
                    shapes=f"{list(type.shape)} and {list(other.shape)}",
                    remedy="Two tensors from outside the step overlap in memory with different "
                    "shapes; make the view inside the step, or clone one.",
                )
            )
    standard = None if strides == contiguous_strides(type.shape) else strides
    value = t.b.param(type, standard)
    storage = Storage(value, strides, real=tensor, param=value)
    t.inputs.storages.append(storage)
    return storage


def _place(t: TraceState) -> dict[str, str]:
    """Where and by what a tensor came in, for an error."""
    return {
        "where": location.full(),
        "function": function_name(t.calling) if t.calling else "an input",
    }
