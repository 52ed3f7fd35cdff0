"""Program 1: a two-layer net with its gradients written out by hand, tensor operations only.

python -m examples.two_layer_manual
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import tracejit

N, D_IN, H, D_OUT = 64, 1000, 100, 10
LEARNING_RATE = 1e-6


def make_step(
    n: int = N, d_in: int = D_IN, h: int = H, d_out: int = D_OUT, device: str = "cpu"
) -> tuple[Callable[[], torch.Tensor], list[torch.Tensor]]:
    """A fresh training step and the parameters that it updates."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d_in, generator=generator).to(device)
    y = torch.randn(n, d_out, generator=generator).to(device)
    w1 = torch.randn(d_in, h, generator=generator).to(device)
    w2 = torch.randn(h, d_out, generator=generator).to(device)
    lr = LEARNING_RATE

    def step() -> torch.Tensor:
        nonlocal w1, w2
        # Forward
        hidden = x.mm(w1)
        hidden_relu = hidden.clamp(min=0)
        y_pred = hidden_relu.mm(w2)
        loss = (y_pred - y).pow(2).sum()
        # Backward, by hand
        grad_y_pred = 2.0 * (y_pred - y)
        grad_w2 = hidden_relu.t().mm(grad_y_pred)
        grad_hidden_relu = grad_y_pred.mm(w2.t())
        grad_hidden = grad_hidden_relu.clone()
        grad_hidden[hidden < 0] = 0
        grad_w1 = x.t().mm(grad_hidden)
        # Update in place
        w1 -= lr * grad_w1
        w2 -= lr * grad_w2
        return loss

    return step, [w1, w2]


def main(steps: int = 500) -> float:
    """Train; returns the last loss."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    step, _ = make_step(device=device)
    step = tracejit.compile(step)
    for t in range(steps):
        loss = step()
        if t % 100 == 99:
            print(t, loss.item())
    print(step.explain_mode())
    return loss.item()


if __name__ == "__main__":
    main()
