"""Program 5: the two-layer net as modules, updated by hand or by torch.optim.SGD.

python -m examples.modules
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import tracejit

N, D_IN, H, D_OUT = 64, 1000, 100, 10
LEARNING_RATE = 1e-4


class TwoLayerNet(torch.nn.Module):
    """Linear, clamp, linear."""

    def __init__(self, d_in: int, h: int, d_out: int):
        super().__init__()
        self.linear1 = torch.nn.Linear(d_in, h)
        self.linear2 = torch.nn.Linear(h, d_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear2(self.linear1(x).clamp(min=0))


def sequential(d_in: int, h: int, d_out: int) -> torch.nn.Module:
    """The same net out of torch's modules."""
    return torch.nn.Sequential(torch.nn.Linear(d_in, h), torch.nn.ReLU(), torch.nn.Linear(h, d_out))


VARIANTS = ("data", "sgd", "sgd foreach", "sgd single", "subclass")


def make_step(
    variant: str = "data",
    n: int = N,
    d_in: int = D_IN,
    h: int = H,
    d_out: int = D_OUT,
    device: str = "cpu",
) -> tuple[Callable[[], torch.Tensor], list[torch.Tensor]]:
    """A fresh training step and the parameters that it updates.

    variant: "data" updates `param.data` by hand; "sgd…" and "subclass" step torch.optim.SGD.
    """
    torch.manual_seed(0)
    x, y = torch.randn(n, d_in).to(device), torch.randn(n, d_out).to(device)
    make = TwoLayerNet if variant == "subclass" else sequential
    model = make(d_in, h, d_out).to(device)
    loss_fn = torch.nn.MSELoss(reduction="sum")
    lr = LEARNING_RATE
    parameters = list(model.parameters())

    def step_by_hand() -> torch.Tensor:
        loss = loss_fn(model(x), y)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for param in model.parameters():
                param.data -= lr * param.grad
        return loss

    if variant == "data":
        return step_by_hand, parameters
    foreach = {"sgd foreach": True, "sgd single": False}.get(variant)
    optimizer = torch.optim.SGD(parameters, lr=lr, foreach=foreach)

    def step() -> torch.Tensor:
        loss = loss_fn(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step, parameters


def main(steps: int = 500) -> float:
    """Train every variant; returns the last loss of the first."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    last = {}
    for variant in VARIANTS:
        step, _ = make_step(variant, device=device)
        step = tracejit.compile(step)
        for _ in range(steps):
            loss = step()
        last[variant] = loss.item()
        print(f"{variant:12s} loss {last[variant]:.6g}   {len(step.plans[-1].launches)} launches")
    return last["data"]


if __name__ == "__main__":
    main()
