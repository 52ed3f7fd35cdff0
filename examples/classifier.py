"""Program 7: an MLP classifier (784-512-512-10, batch 256) with cross-entropy, and a linear fit.

python -m examples.classifier
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

import tracejit


def make_step(
    batch: int = 256, sizes: tuple[int, ...] = (784, 512, 512, 10), device: str = "cpu"
) -> tuple[Callable[[], torch.Tensor], list[torch.Tensor]]:
    """A fresh training step on random digits, and the parameters that it updates."""
    torch.manual_seed(0)
    layers = []
    for inputs, outputs in zip(sizes, sizes[1:], strict=False):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1]).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(batch, sizes[0]).to(device)
    labels = torch.randint(0, sizes[-1], (batch,)).to(device)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        return loss

    return step, list(model.parameters())


def make_linear_fit(device: str = "cpu") -> tuple[Callable[[], torch.Tensor], list[torch.Tensor]]:
    """Linear regression with nn.Linear(1, 1) and mean squared error."""
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.linspace(-1, 1, 64).unsqueeze(1).to(device)
    y = 3 * x + 0.5

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return step, list(model.parameters())


def main(steps: int = 50) -> float:
    """Train both; returns the classifier's last loss."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    losses = []
    for make in (make_linear_fit, make_step):
        step, _ = make(device=device)
        step = tracejit.compile(step)
        for _ in range(steps):
            loss = step()
        losses.append(loss.item())
        launches = len(step.plans[-1].launches)
        print(f"{make.__name__}: loss {losses[-1]:.6g}, {launches} launches per step")
    return losses[-1]


if __name__ == "__main__":
    main()
