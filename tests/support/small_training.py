"""A small training step and its state, for tests of what surrounds a step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class Training:
    """A network of two layers with dropout, Adam, a schedule and a counter; the same each time."""

    def __init__(self, seed: int = 0, width: int = 8, *, dropout: float = 0.0, rate: bool = False):
        numbers = torch.Generator().manual_seed(seed)  # of its own: others may be made meanwhile
        if dropout:
            torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))
        for p in self.model.parameters():
            nn.init.uniform_(p, -0.5, 0.5, generator=numbers)
        self.drop = dropout
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3) if rate else None
        self.x = torch.randn(16, 4, generator=numbers)
        self.y = torch.randn(16, 2, generator=numbers)
        self.calls = 0

    def step(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        out = nn.functional.dropout(self.model(self.x), self.drop, self.drop > 0)
        loss = nn.functional.mse_loss(out, self.y)
        loss.backward()
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.calls += 1
        return loss.detach()

    def state(self) -> list[float]:
        """All that a call changes, as numbers."""
        found = [float(self.calls), *(float(g["lr"]) for g in self.optimizer.param_groups)]
        if self.scheduler is not None:
            found.append(float(self.scheduler.last_epoch))
        for t in self.tensors().values():
            found += t.detach().flatten().tolist()
        if self.drop:
            found += torch.get_rng_state()[-64:].tolist()
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters, gradients and the optimizer's state, by name."""
        found = {}
        for name, p in self.model.named_parameters():
            held = self.optimizer.state.get(p, {})
            given = {"": p, "grad": p.grad, **{k: held.get(k) for k in _ADAM}}
            found |= {f"{name} {k}": t for k, t in given.items() if t is not None}
        return found

    def take(self, other: Training) -> None:
        """Take over another's tensors, of which this has as many."""
        for name, t in other.tensors().items():
            self.tensors()[name].data.copy_(t.detach())

    def differences(self, other: Training) -> dict[str, float]:
        """How far tensors are from another's, by name; infinitely where one is not there."""
        ours, theirs = self.tensors(), other.tensors()
        return {
            name: (ours[name] - theirs[name]).abs().max().item() if name in ours else float("inf")
            for name in theirs
        }


_ADAM = ("step", "exp_avg", "exp_avg_sq")


def states_of_eager(calls: int, make: Callable[[], Training] = Training) -> list[list[float]]:
    """The state before the first call, and after each."""
    training = make()
    found = [training.state()]
    for _ in range(calls):
        training.step()
        found.append(training.state())
    return found


def near(ours: list[float], theirs: list[float]) -> bool:
    """Whether two states are the same but for rounding."""
    if len(ours) != len(theirs):
        return False
    return all(abs(a - b) <= 1e-4 * abs(b) + 1e-5 for a, b in zip(ours, theirs, strict=True))
