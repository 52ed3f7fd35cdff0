"""Program 8: only the loss is compiled; backward and torch.optim stay outside.

python -m examples.loss_outside
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import tracejit

N, D_IN, H, D_OUT = 64, 1000, 100, 10
LEARNING_RATE = 1e-6


def make_loss(
    d_in: int = D_IN, h: int = H, d_out: int = D_OUT, device: str = "cpu"
) -> tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], list[torch.Tensor]]:
    """A fresh loss function of a batch (x, y), and the parameters that it depends on."""
    generator = torch.Generator().manual_seed(0)
    w1 = torch.randn(d_in, h, generator=generator).to(device).requires_grad_()
    w2 = torch.randn(h, d_out, generator=generator).to(device).requires_grad_()

    def loss_fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x.mm(w1).clamp(min=0).mm(w2) - y).pow(2).sum()

    return loss_fn, [w1, w2]


def make_batch(
    n: int = N, d_in: int = D_IN, d_out: int = D_OUT, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random inputs and targets."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, d_in, generator=generator).to(device)
    return x, torch.randn(n, d_out, generator=generator).to(device)


def train(
    loss_fn: Callable, parameters: list[torch.Tensor], batch: tuple, steps: int
) -> list[float]:
    """Train with torch.optim.SGD; returns the losses."""
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE)
    losses = []
    for _ in range(steps):
        loss = loss_fn(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(steps: int = 500) -> float:
    """Train; returns the last loss."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loss_fn, parameters = make_loss(device=device)
    loss_fn = tracejit.compile(loss_fn)
    losses = train(loss_fn, parameters, make_batch(device=device), steps)
    print(f"loss {losses[-1]:.6g}   {loss_fn.explain_mode()}")
    return losses[-1]


if __name__ == "__main__":
    main()
