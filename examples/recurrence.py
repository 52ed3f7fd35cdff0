"""Program 6: the recurrence y_t = (y_{t-1} + x_t) · w as a Python loop, with Python conditionals.

python -m examples.recurrence
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import tracejit

T, N = 8, 1000
LEARNING_RATE = 1e-3


def make_step(
    t: int = T, n: int = N, skip: int = 3, device: str = "cpu"
) -> tuple[Callable[[], torch.Tensor], list[torch.Tensor]]:
    """A fresh training step and the parameter that it updates.

    Every `skip`-th input is left out (none when 0), and the learning rate is halved when it is
    above a limit: decisions on Python numbers, taken while tracing and guarded afterwards.
    """
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(t, n, generator=generator).to(device)
    target = torch.randn(n, generator=generator).to(device)
    w = torch.rand(n, generator=generator).to(device).requires_grad_()
    lr, limit = LEARNING_RATE, 5e-4

    def step() -> torch.Tensor:
        y = torch.zeros_like(target)
        for i in range(t):
            if skip and i % skip == skip - 1:
                continue
            y = (y + xs[i]) * w
        loss = (y - target).pow(2).mean()
        loss.backward()
        rate = lr / 2 if lr > limit else lr
        with torch.no_grad():
            w.sub_(rate * w.grad)
            w.grad = None
        return loss

    return step, [w]


def main(steps: int = 500) -> float:
    """Train; returns the last loss."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    step, _ = make_step(device=device)
    step = tracejit.compile(step)
    for _ in range(steps):
        loss = step()
    print(f"loss {loss.item():.6g}   {step.explain_mode()}")
    return loss.item()


if __name__ == "__main__":
    main()
