"""What a call can change of a tensor besides its elements, saved and put back."""

from __future__ import annotations

import torch


class SavedTensor:
    """A tensor's gradient, `requires_grad`, memory and version as they are now; and its number, if
    it is one of the CPU that the host may write."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.version = tensor, tensor._version
        self.grad, self.requires_grad = (
            (tensor.grad, tensor.requires_grad) if tensor.is_leaf else (None, None)
        )
        self.data = tensor.data
        counts = tensor.is_cpu and tensor.numel() == 1
        self.number = tensor.detach().clone() if counts else None

    def restore(self) -> None:
        """Put these back."""
        tensor = self.tensor
        if self.number is not None and not _same(tensor, self.number):
            tensor.data.copy_(self.number)
        if self.requires_grad is not None:
            if not lies_at(tensor, self.data):
                tensor.data = self.data
            if tensor.requires_grad != self.requires_grad:
                tensor.requires_grad_(self.requires_grad)
            if tensor.grad is not self.grad:
                tensor.grad = self.grad
        torch._C._autograd._unsafe_set_version_counter((tensor,), (self.version,))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one element have the same bits."""
    return _bits(a) == _bits(b)


def _bits(x: torch.Tensor) -> bytes:
    """Those of the one element; its stride may be anything."""
    return bytes(x.detach().reshape(1).as_strided((1,), (1,)).view(torch.uint8).numpy())


def lies_at(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same elements of the same memory."""
    same = a.untyped_storage()._cdata == b.untyped_storage()._cdata
    return same and (a.shape, a.stride(), a.storage_offset()) == (
        b.shape,
        b.stride(),
        b.storage_offset(),
    )
