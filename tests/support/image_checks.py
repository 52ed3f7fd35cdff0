"""A function of images in a compiled step against eager, on an executor."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

import tracejit


def check(function: Callable, backend: str, *tensors: torch.Tensor) -> None:
    """Values, strides and gradients of a function that a relu follows, over three calls."""

    def step(*xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = function(*xs)
        z = F.relu(y)
        return y.detach(), *torch.autograd.grad((z * z).sum(), xs)

    compiled = tracejit.compile(step, backend=backend, on_unsupported="raise")
    for call in range(1 if backend == "interpret" else 3):
        xs = [(t * (1 + call)).requires_grad_() for t in tensors]
        ours, eager = compiled(*xs), step(*xs)
        assert ours[0].stride() == eager[0].stride()
        for mine, his in zip(ours, eager, strict=True):
            assert mine.shape == his.shape
            assert (mine - his).norm() <= 1e-5 * his.norm()
