"""What a tensor says of itself: shape, dtype, device, flags."""

from __future__ import annotations

import torch

from tracejit.capture.functions.common import normal_axis, operand, result_dtype
from tracejit.capture.functions.layouts import lies_in
from tracejit.capture.functions.movement import select
from tracejit.capture.trace import location
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import TO_TORCH
from tracejit.capture.trace.trace import Trace
from tracejit.errors import AxisError

Tensor = torch.Tensor


@rule(Tensor.shape.__get__)
def shape(t: Trace, self: Tensor) -> torch.Size:
    return torch.Size(t.lift(self).shape)


@rule(Tensor.size)
def size(t: Trace, self: Tensor, dim: int | None = None) -> object:
    h = t.peek(self)
    axis = None if dim is None else normal_axis(t, dim, len(h.shape))
    if not axis:
        h = t.lift(self)
    return torch.Size(h.shape) if axis is None else h.shape[axis]


@rule(Tensor.stride)
def stride(t: Trace, self: Tensor, dim: int | None = None) -> object:
    h = t.lift(self)
    return h.strides if dim is None else h.strides[normal_axis(t, dim, len(h.shape))]


@rule(Tensor.storage_offset)
def storage_offset(t: Trace, self: Tensor) -> int:
    h = t.lift(self)
    if h.storage in t.copied:
        raise t.unsupported("Where x[i] starts depends on the value of i")
    return h.offset


@rule(Tensor.dim, Tensor.ndimension, Tensor.ndim.__get__)
def dim(t: Trace, self: Tensor) -> int:
    return len(t.peek(self).shape)


@rule(Tensor.numel, torch.numel, Tensor.nelement)
def numel(t: Trace, self: Tensor) -> int:
    return t.lift(self).numel


@rule(Tensor.__len__)
def length(t: Trace, self: Tensor) -> int:
    h = t.lift(self)
    if not h.shape:
        raise TypeError("len() of a 0-d tensor")
    return h.shape[0]


@rule(Tensor.dtype.__get__)
def dtype(t: Trace, self: Tensor) -> torch.dtype:
    return TO_TORCH[t.peek(self).dtype]


@rule(Tensor.device.__get__)
def device(t: Trace, self: Tensor) -> torch.device:
    return torch.device(t.peek(self).device)


@rule(Tensor.layout.__get__)
def layout(t: Trace, self: Tensor) -> torch.layout:
    return torch.strided


@rule(Tensor.is_cpu.__get__)
def is_cpu(t: Trace, self: Tensor) -> bool:
    return t.peek(self).device == "cpu"


@rule(Tensor.is_cuda.__get__)
def is_cuda(t: Trace, self: Tensor) -> bool:
    return t.peek(self).device.startswith("cuda")


@rule(Tensor.is_contiguous)
def is_contiguous(
    t: Trace, self: Tensor, memory_format: torch.memory_format = torch.contiguous_format
) -> bool:
    return lies_in(t, t.lift(self), memory_format)


@rule(Tensor.is_floating_point, torch.is_floating_point)
def is_floating_point(t: Trace, input: Tensor) -> bool:
    return t.peek(input).dtype.is_float


@rule(Tensor.is_signed, torch.is_signed)
def is_signed(t: Trace, input: Tensor) -> bool:
    return t.peek(input).dtype.kind in "fi"


@rule(Tensor.element_size)
def element_size(t: Trace, self: Tensor) -> int:
    return t.lift(self).dtype.itemsize


@rule(Tensor.itemsize.__get__)
def itemsize(t: Trace, self: Tensor) -> int:
    return t.lift(self).dtype.itemsize


@rule(Tensor.nbytes.__get__)
def nbytes(t: Trace, self: Tensor) -> int:
    h = t.lift(self)
    return h.numel * h.dtype.itemsize


@rule(Tensor.is_same_size)
def is_same_size(t: Trace, self: Tensor, other: Tensor) -> bool:
    return t.lift(self).shape == t.lift(other).shape


@rule(torch.result_type)
def result_type(t: Trace, tensor1: object, tensor2: object) -> torch.dtype:
    return TO_TORCH[result_dtype((operand(t, tensor1), operand(t, tensor2)))]


@rule(torch.promote_types)
def promote_types(t: Trace, type1: torch.dtype, type2: torch.dtype) -> torch.dtype:
    return torch.promote_types(type1, type2)


@rule(torch.can_cast)
def can_cast(t: Trace, from_: torch.dtype, to: torch.dtype) -> bool:
    return torch.can_cast(from_, to)


def _always(answer: object):
    def flag(t: Trace, self: Tensor) -> object:
        t.lift(self)
        return answer

    return flag


# Dense strided real tensors only reach a trace, so these are constants of it.
for _function in (
    *(Tensor.is_sparse.__get__, Tensor.is_sparse_csr.__get__, Tensor.is_quantized.__get__),
    *(Tensor.is_nested.__get__, Tensor.is_mkldnn.__get__, Tensor.is_meta.__get__),
    *(Tensor.is_complex, torch.is_complex, Tensor.is_conj, torch.is_conj, Tensor.is_neg),
    torch.is_neg,
):
    rule(_function)(_always(False))


@rule(Tensor.is_inference, torch.is_inference)
def is_inference(t: Trace, self: Tensor) -> bool:
    return t.lift(self).storage in t.inference


@rule(Tensor.__hash__)
def hash_(t: Trace, self: Tensor) -> int:
    return id(self)


@rule(Tensor.unbind, torch.unbind)
def unbind(t: Trace, self: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    h = t.lift(self)
    if not h.shape:
        raise AxisError(
            where=location.full(), reason="Dimension specified as 0 but tensor has no dimensions"
        )
    axis = normal_axis(t, dim, len(h.shape))
    return t.together(tuple(select(t, self, axis, i) for i in range(h.shape[axis])))


@rule(Tensor.__iter__)
def iterate(t: Trace, self: Tensor) -> object:
    if not t.lift(self).shape:
        raise TypeError("iteration over a 0-d tensor")
    return iter(unbind(t, self))


@rule(torch._C._set_grad_enabled)
def set_grad_enabled(t: Trace, enabled: bool) -> None:
    torch._C._set_grad_enabled(enabled)


@rule(Tensor.cpu)
def cpu(t: Trace, self: Tensor, memory_format: object = None) -> Tensor:
    if t.lift(self).device != "cpu":
        raise t.unsupported("Copies between devices have no rule; do them outside the step")
    return self
