"""What a tensor says of itself: shape, dtype, device, flags. And requests for values, refused."""

from __future__ import annotations

from collections.abc import Callable
from types import FrameType

import torch
from torch.optim import _adafactor

from tracejit.capture.functions.common import normal_axis, operand, result_dtype
from tracejit.capture.functions.factories import converted
from tracejit.capture.functions.movement import select
from tracejit.capture.trace import location, numbers
from tracejit.capture.trace.scalars import pinned
from tracejit.capture.trace.table import BY_CALLER, function_name, rule
from tracejit.capture.trace.tensor import TO_TORCH
from tracejit.capture.trace.trace import Trace
from tracejit.errors import AxisError, ValueDependentError
from tracejit.ir.types import f64

Tensor = torch.Tensor


@rule(Tensor.shape.__get__)
def shape(t: Trace, self: Tensor) -> torch.Size:
    return torch.Size(t.lift(self).shape)


@rule(Tensor.size)
def size(t: Trace, self: Tensor, dim: int | None = None) -> object:
    h = t.lift(self)
    return torch.Size(h.shape) if dim is None else h.shape[normal_axis(t, dim, len(h.shape))]


@rule(Tensor.stride)
def stride(t: Trace, self: Tensor, dim: int | None = None) -> object:
    h = t.lift(self)
    return h.strides if dim is None else h.strides[normal_axis(t, dim, len(h.shape))]


@rule(Tensor.storage_offset)
def storage_offset(t: Trace, self: Tensor) -> int:
    return t.lift(self).offset


@rule(Tensor.dim, Tensor.ndimension, Tensor.ndim.__get__)
def dim(t: Trace, self: Tensor) -> int:
    return len(t.lift(self).shape)


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
    return TO_TORCH[t.lift(self).dtype]


@rule(Tensor.device.__get__)
def device(t: Trace, self: Tensor) -> torch.device:
    return torch.device(t.lift(self).device)


@rule(Tensor.layout.__get__)
def layout(t: Trace, self: Tensor) -> torch.layout:
    return torch.strided


@rule(Tensor.is_cpu.__get__)
def is_cpu(t: Trace, self: Tensor) -> bool:
    return t.lift(self).device == "cpu"


@rule(Tensor.is_cuda.__get__)
def is_cuda(t: Trace, self: Tensor) -> bool:
    return t.lift(self).device.startswith("cuda")


@rule(Tensor.is_contiguous)
def is_contiguous(
    t: Trace, self: Tensor, memory_format: torch.memory_format = torch.contiguous_format
) -> bool:
    if memory_format is not torch.contiguous_format:
        raise t.unsupported("Only the contiguous memory format has a rule")
    return t.lift(self).is_contiguous


@rule(Tensor.is_floating_point, torch.is_floating_point)
def is_floating_point(t: Trace, input: Tensor) -> bool:
    return t.lift(input).dtype.is_float


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


def value_needed(t: Trace, self: Tensor, *args: object, **kwargs: object) -> object:
    raise t.refuse(
        ValueDependentError(
            where=location.full(),
            function=function_name(t.calling),
            shape=list(t.lift(self).shape),
            remedy="Return the tensor and read it outside the step; for a choice between two "
            "values use torch.where",
        )
    )


def _known(read: Callable, convert: Callable = lambda x: x) -> Callable:
    """What a tensor is, where it is arithmetic on the host: an optimizer's step counter."""

    def value(t: Trace, self: Tensor) -> object:
        found = read(t, t.lift(self))
        return value_needed(t, self) if found is None else convert(found)

    return value


@rule(Tensor.item)
def item(t: Trace, self: Tensor, or_tensor: bool = False) -> object:
    number = numbers.item(t, t.lift(self))
    if number is None and or_tensor:
        return converted(t, self, f64)
    return value_needed(t, self) if number is None else number


def _asked_by(caller: FrameType) -> dict[str, object]:
    """Adafactor's `max` takes tensors during a trace."""
    return {"or_tensor": True} if caller.f_globals is vars(_adafactor) else {}


BY_CALLER[Tensor.item] = _asked_by


rule(Tensor.__bool__)(_known(numbers.truth))
rule(Tensor.__int__)(_known(numbers.item, int))
rule(Tensor.__float__)(_known(numbers.item, pinned))
_refused = [torch.nonzero, torch.equal, torch.allclose, torch.is_nonzero]
for _name in (
    *("tolist", "numpy", "__index__", "__complex__"),
    *("__array__", "__contains__", "__repr__", "__format__", "__dlpack__", "nonzero"),
    *("data_ptr", "is_nonzero"),
):
    if hasattr(Tensor, _name):
        _refused.append(getattr(Tensor, _name))
rule(*_refused, Tensor.equal, needs_values=True)(value_needed)


@rule(Tensor.cpu)
def cpu(t: Trace, self: Tensor, memory_format: object = None) -> Tensor:
    if t.lift(self).device != "cpu":
        raise t.unsupported("Copies between devices have no rule; do them outside the step")
    return self
