"""Program 2: the two-layer net with autograd inside the step, in every classic spelling.

python -m examples.two_layer_autograd
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import tracejit

N, D_IN, H, D_OUT = 64, 1000, 100, 10
LEARNING_RATE = 1e-6


def update_zero_(lr: float, *parameters: torch.Tensor) -> None:
    """Update under no_grad, then zero the gradients."""
    with torch.no_grad():
        for w in parameters:
            w -= lr * w.grad
        for w in parameters:
            w.grad.zero_()


def update_none(lr: float, *parameters: torch.Tensor) -> None:
    """Update under no_grad, then drop the gradients."""
    with torch.no_grad():
        for w in parameters:
            w -= lr * w.grad
            w.grad = None


def update_data(lr: float, *parameters: torch.Tensor) -> None:
    """Update behind autograd's back, through .data."""
    for w in parameters:
        w.data -= lr * w.grad.data
        w.grad.data.zero_()


UPDATES = {"zero_": update_zero_, "none": update_none, "data": update_data}


def make_step(
    variant: str = "zero_",
    n: int = N,
    d_in: int = D_IN,
    h: int = H,
    d_out: int = D_OUT,
    device: str = "cpu",
) -> tuple[Callable[[], torch.Tensor], list[torch.Tensor]]:
    """A fresh training step and the parameters that it updates.

    variant: "zero_", "none" or "data" (how gradients are applied and cleared), or "grad"
    (torch.autograd.grad instead of backward).
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d_in, generator=generator).to(device)
    y = torch.randn(n, d_out, generator=generator).to(device)
    w1 = torch.randn(d_in, h, generator=generator).to(device).requires_grad_()
    w2 = torch.randn(h, d_out, generator=generator).to(device).requires_grad_()
    lr = LEARNING_RATE

    def forward() -> torch.Tensor:
        y_pred = x.mm(w1).clamp(min=0).mm(w2)
        return (y_pred - y).pow(2).sum()

    if variant == "grad":

        def step() -> torch.Tensor:
            loss = forward()
            grad_w1, grad_w2 = torch.autograd.grad(loss, (w1, w2))
            with torch.no_grad():
                w1.sub_(lr * grad_w1)
                w2.sub_(lr * grad_w2)
            return loss

    else:
        update = UPDATES[variant]

        def step() -> torch.Tensor:
            loss = forward()
            loss.backward()
            update(lr, w1, w2)
            return loss

    return step, [w1, w2]


def main(steps: int = 500) -> float:
    """Train every variant; returns the last loss of the first."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    last = {}
    for variant in ("zero_", "none", "data", "grad"):
        step, _ = make_step(variant, device=device)
        step = tracejit.compile(step)
        for _ in range(steps):
            loss = step()
        last[variant] = loss.item()
        print(f"{variant:6s} loss {last[variant]:.6g}   {step.explain_mode()}")
    return last["zero_"]


if __name__ == "__main__":
    main()
