"""Tensors from outside on their way into a trace: which may come in, and what memory they share.

In goes a tensor from outside the step that a trace meets for the first time, out comes its handle;
the trace's table of inputs grows by it. Nothing of the tensor is changed.
"""

from __future__ import annotations

from bisect import bisect_left

import torch

from tracejit.capture.trace import location
from tracejit.capture.trace.posing import device_of
from tracejit.capture.trace.state import TraceState
from tracejit.capture.trace.table import function_name
from tracejit.capture.trace.tensor import (
    COMPLEX_TO_IR,
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
from tracejit.ir.types import PARTS, Type, contiguous_strides


def lift_input(t: TraceState, tensor: torch.Tensor) -> Handle:
    """A handle for a tensor from outside, now an input of the graph.

    Raises UnsupportedOperation for tensors that cannot take part.
    """
    inputs = t.inputs
    with torch._C.DisableTorchFunction():
        problem = problem_with(tensor)
        if problem is not None:
            shapes = f"{t.described_input(tensor).removesuffix(',')}, {tensor.dtype}"
            remedy = problem[0].upper() + problem[1:] + "."
            raise t.refuse(UnsupportedOperation(**_place(t), shapes=shapes, remedy=remedy))
        shape, strides = tuple(tensor.shape), tuple(tensor.stride())
        device = device_of(tensor)
        dtype = TO_IR.get(tensor.dtype) or COMPLEX_TO_IR[tensor.dtype]
        offset, requires_grad = tensor.storage_offset(), tensor.requires_grad
        foreign = tensor.grad_fn is not None
        sharing = inputs.by_memory.setdefault(tensor.untyped_storage()._cdata, [])
        storage = _storage(t, tensor, sharing, offset, Type(dtype, shape, device), strides)
        lent = borrowed(tensor)
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
    if lent:
        inputs.borrowed.append(handle)
    inputs.add(tensor, handle)
    return handle


def _storage(
    t: TraceState, tensor: torch.Tensor, sharing: list[Handle], low: int, type: Type, strides: Ints
) -> Storage:
    """The storage of a real tensor: shared by tensors of the same memory and geometry. Tensors that
    overlap otherwise have a storage each, as long as the step writes to none of them."""
    here = span(tensor)
    for other in sharing:
        geometry = (other.offset, other.shape, other.strides, other.dtype)
        if geometry == (low, type.shape, strides, type.dtype):
            return other.storage
    lent = borrowed(tensor)
    near = {h.storage: h.tensor for h in (t.inputs.handles if lent else sharing)}
    near |= {h.storage: h.tensor for h in t.inputs.borrowed}
    overlapped = [s for s, x in near.items() if meet(here, span(x))]
    if any(s.writes for s in overlapped):
        raise t.refuse(
            UnsupportedOperation(
                **_place(t),
                shapes=f"{list(type.shape)}",
                remedy="The step has written to a tensor from outside that overlaps in memory with "
                "this one; make the view inside the step, or clone one.",
            )
        )
    if type.dtype in PARTS:
        type, strides = Type(PARTS[type.dtype], (*type.shape, 2), type.device), in_parts(strides)
    standard = None if strides == contiguous_strides(type.shape) else strides
    value = t.b.param(type, standard)
    storage = Storage(value, strides, real=tensor, param=value)
    t.inputs.storages.append(storage)
    if overlapped:
        t.inputs.overlapping.update(overlapped, (storage,))
    return storage


def in_parts(strides: Ints) -> Ints:
    """The strides of a complex tensor, in the numbers that its elements are pairs of."""
    return (*(2 * s for s in strides), 1)


def span(tensor: torch.Tensor) -> range:
    """The addresses of a tensor's elements."""
    start = tensor.data_ptr()
    return range(start, start + extent(tensor.shape, tensor.stride()) * tensor.element_size())


def meet(a: range, b: range) -> bool:
    """Whether two ranges have something in common."""
    return max(a.start, b.start) < min(a.stop, b.stop)


class Regions:
    """Regions of memory in the order of their addresses, and to which torch storage each belongs.
    Those of one storage that overlap are one."""

    def __init__(self) -> None:
        self._found: list[tuple[int, int, int]] = []  # start, end, storage

    def add(self, tensor: torch.Tensor) -> bool:
        """Take note of where a tensor lies; False if one of another storage lies there too."""
        here, storage, found = span(tensor), tensor.untyped_storage()._cdata, self._found
        start, end = here.start, here.stop
        if start == end:
            return True
        first = last = bisect_left(found, (start,))
        if first and found[first - 1][1] > start:
            first -= 1
        while last < len(found) and found[last][0] < end:
            last += 1
        overlapped = found[first:last]
        if any(owner != storage for *_, owner in overlapped):
            return False
        for known_start, known_end, _ in overlapped:
            start, end = min(start, known_start), max(end, known_end)
        found[first:last] = [(start, end, storage)]
        return True


def borrowed(tensor: torch.Tensor) -> bool:
    """Whether the memory of a tensor is not torch's own: NumPy's, or another tensor's by DLPack.
    Tensors of several torch storages may lie there."""
    return not tensor.untyped_storage().resizable()


def _place(t: TraceState) -> dict[str, str]:
    """Where and by what a tensor came in, for an error."""
    return {
        "where": location.full(),
        "function": function_name(t.calling) if t.calling else "an input",
    }
