"""Fused optimizer functions, computed as torch documents them: like the unfused optimizers.

They are written with torch's functions and traced like user code. Step counters were incremented
before the call. Scaled gradients (`grad_scale`, `found_inf`) have no rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tracejit.capture.functions.common import as_number
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.trace import Trace

Tensor = torch.Tensor
Tensors = Sequence[Tensor]
Scalar = float | Tensor


def _fused(*functions: Callable) -> Callable:
    """Register a function that updates one parameter: `update(*tensors, **options)`.

    The rule gets lists; a list that is empty gives None for every parameter.
    """

    def register(update: Callable) -> Callable:
        def fused(
            t: Trace,
            *lists: Tensors,
            grad_scale: Tensor | None = None,
            found_inf: Tensor | None = None,
            **options: object,
        ) -> None:
            if grad_scale is not None or found_inf is not None:
                raise t.unsupported("Gradients scaled by a GradScaler have no rule")
            if "lr" in options:
                options["lr"] = as_number(t, options["lr"])
            with t.user_code(grad=False):
                for i in range(len(lists[0])):
                    update(*(x[i] if x else None for x in lists), **options)

        rule(*functions)(fused)
        return update

    return register


def _number(step: Tensor) -> Scalar:
    """A step counter: a number on the CPU, a tensor where it lives on the device."""
    return step.item() if step.device.type == "cpu" else step


@_fused(torch._fused_sgd_)
def sgd(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    *,
    weight_decay: float,
    momentum: float,
    lr: Scalar,
    dampening: float,
    nesterov: bool,
    maximize: bool,
    is_first_step: bool,
) -> None:
    """torch.optim.SGD."""
    grad = -grad if maximize else grad
    if weight_decay != 0:
        grad = grad.add(param, alpha=weight_decay)
    if momentum_buffer is not None:
        if is_first_step:
            momentum_buffer.copy_(grad)
        else:
            momentum_buffer.mul_(momentum).add_(grad, alpha=1 - dampening)
        grad = grad.add(momentum_buffer, alpha=momentum) if nesterov else momentum_buffer
    param.add_(grad, alpha=-lr)


def _adam(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    step: Tensor,
    *,
    lr: Scalar,
    beta1: float,
    beta2: float,
    eps: float,
    amsgrad: bool,
) -> None:
    count = _number(step)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    if amsgrad:
        max_exp_avg_sq.copy_(torch.maximum(max_exp_avg_sq, exp_avg_sq))
        exp_avg_sq = max_exp_avg_sq
    denom = (exp_avg_sq.sqrt() / (1 - beta2**count) ** 0.5).add_(eps)
    param.addcdiv_(exp_avg, denom, value=-lr / (1 - beta1**count))


@_fused(torch._fused_adam_)
def adam(
    param: Tensor, grad: Tensor, *state: Tensor, weight_decay: float, maximize: bool, **options
) -> None:
    """torch.optim.Adam: the decay joins the gradient."""
    grad = -grad if maximize else grad
    if weight_decay != 0:
        grad = grad.add(param, alpha=weight_decay)
    _adam(param, grad, *state, **options)


@_fused(torch._fused_adamw_)
def adamw(
    param: Tensor,
    grad: Tensor,
    *state: Tensor,
    lr: Scalar,
    weight_decay: float,
    maximize: bool,
    **options,
) -> None:
    """torch.optim.AdamW: the parameter decays by itself."""
    if weight_decay != 0:
        param.mul_(1 - lr * weight_decay)
    _adam(param, -grad if maximize else grad, *state, lr=lr, **options)


@_fused(torch._fused_adagrad_)
def adagrad(
    param: Tensor,
    grad: Tensor,
    state_sum: Tensor,
    step: Tensor,
    *,
    lr: Scalar,
    lr_decay: float,
    weight_decay: float,
    eps: float,
    maximize: bool,
) -> None:
    """torch.optim.Adagrad."""
    grad = -grad if maximize else grad
    if weight_decay != 0:
        grad = grad.add(param, alpha=weight_decay)
    rate = lr / (1 + (_number(step) - 1) * lr_decay)
    state_sum.addcmul_(grad, grad, value=1)
    param.addcdiv_(grad, state_sum.sqrt().add_(eps), value=-rate)
