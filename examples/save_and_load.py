"""A training step in one file: trained here, saved, and trained on where its code is not.

python -m examples.save_and_load [FILE]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import tracejit

ELSEWHERE = """
import sys, torch, tracejit

step = tracejit.load(sys.argv[1])
print(step)
x, y = torch.randn(64, 20), torch.zeros(64, dtype=torch.long)
for rate in (0.01, 0.005, 0.001):
    print(f"lr={rate}: loss {step(x, y, lr=rate):.4f}")
torch.save(step.state_dict(), sys.argv[1] + ".weights")
"""


def make_step() -> tuple[Callable, torch.nn.Module]:
    """A fresh step of a small classifier with Adam, and its model."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 50), torch.nn.ReLU(), torch.nn.Linear(50, 5))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, model


def main(path: str | None = None, steps: int = 50) -> float:
    """Train, save, and go on in another process; returns how far the weights have moved there."""
    folder = tempfile.TemporaryDirectory()
    path = path or str(Path(folder.name) / "classifier.step")
    step, model = make_step()
    step = tracejit.compile(step)
    x, y = torch.randn(64, 20), torch.randint(0, 5, (64,))
    for _ in range(steps):
        loss = step(x, y)
    print(f"here: loss {loss:.4f}, {step.explain_mode()}")
    step.save(path)
    print(f"{path}: {Path(path).stat().st_size} bytes")
    subprocess.run([sys.executable, "-c", ELSEWHERE, path], check=True)
    weights = torch.load(f"{path}.weights")
    moved = (weights["model.0.weight"] - model[0].weight).norm().item()
    print(f"the weights of the first layer have moved by {moved:.4f} there")
    folder.cleanup()
    return moved


if __name__ == "__main__":
    main(*sys.argv[1:2])
