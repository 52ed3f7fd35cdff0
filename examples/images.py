"""What the examples with images share: data made on the spot, and a loop that trains."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tracejit

Make = Callable[[], tuple[nn.Module, torch.optim.Optimizer]]
CLASSES = 10


def stripes(count: int, size: int, channels: int = 3, seed: int = 0) -> TensorDataset:
    """Noisy stripes [count, channels, size, size]; the class is the direction in which they run."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=rng)
    angle = (labels * math.pi / CLASSES).view(-1, 1, 1, 1)
    phase = 2 * math.pi * torch.rand(count, channels, 1, 1, generator=rng)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    waves = torch.sin((x * torch.cos(angle) + y * torch.sin(angle)) * 1.2 + phase)
    noise = torch.randn(count, channels, size, size, generator=rng)
    return TensorDataset(waves + 0.5 * noise, labels)


def digits(count: int, size: int, seed: int = 0) -> TensorDataset:
    """MNIST's digits [count, 1, size, size], to train on (seed 0) or to test with; stripes unless
    torchvision is installed and has them in `data/`."""
    try:
        from torchvision.datasets import MNIST

        found = MNIST("data", train=seed == 0)
    except (ImportError, RuntimeError):  # the second where there are no files
        return stripes(count, size, 1, seed)
    x = (found.data[:count].unsqueeze(1).float() / 255 - 0.1307) / 0.3081
    return TensorDataset(F.interpolate(x, (size, size), mode="bilinear"), found.targets[:count])


def discs(count: int, size: int, seed: int = 0) -> TensorDataset:
    """A bright disc in noise [count, 3, size, size], and which pixels it covers (0 or 1)."""
    rng = torch.Generator().manual_seed(seed)
    centre = size * (0.25 + 0.5 * torch.rand(count, 2, 1, 1, generator=rng))
    radius = size * (0.1 + 0.15 * torch.rand(count, 1, 1, generator=rng))
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    inside = (x - centre[:, 0]).square() + (y - centre[:, 1]).square() < radius.square()
    noise = torch.randn(count, 3, size, size, generator=rng)
    return TensorDataset(noise + inside.unsqueeze(1), inside.long())


def make_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable:
    """One step on a batch: (images, labels) → loss. Labels are of images, or of their pixels."""

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return step


def accuracy(model: nn.Module, data: DataLoader) -> float:
    """The share of images (or pixels) whose class is the likeliest one."""
    right = total = 0
    model.eval()
    with torch.no_grad():
        for x, y in data:
            right += (model(x).argmax(1) == y).sum().item()
            total += y.numel()
    model.train()
    return right / total


def train(
    step: Callable, model: nn.Module, batches: DataLoader, held_out: DataLoader, epochs: int
) -> float:
    """Train with a progress line for each epoch; returns the accuracy on what was held out."""
    found = 0.0
    for epoch in range(epochs):
        start, total = time.perf_counter(), 0.0
        for k, (x, y) in enumerate(batches, 1):
            total += step(x, y).item()
            print(f"\r  epoch {epoch}  {k}/{len(batches)}  loss {total / k:.4f}", end="")
        seconds = time.perf_counter() - start
        found = accuracy(model, held_out)
        print(f"  accuracy {100 * found:.1f} %  {1e3 * seconds / len(batches):.1f} ms per step")
    return found


def loaders(
    make: Callable[..., TensorDataset], count: int, size: int, batch: int, **kind: int
) -> tuple[DataLoader, DataLoader]:
    """Shuffled batches to train on, and a quarter as many images that are held out."""
    order = torch.Generator().manual_seed(0)
    batches = DataLoader(make(count, size, **kind), batch, True, drop_last=True, generator=order)
    return batches, DataLoader(make(count // 4, size, seed=1, **kind), batch)


def run(
    make: Make,
    data: Callable[[], tuple[DataLoader, DataLoader]],
    epochs: int,
    eager: bool,
) -> float:
    """Train a fresh model compiled, then another eagerly if asked; the accuracy of the first."""
    found = []
    for name in ("tracejit", "eager")[: 1 + eager]:
        torch.manual_seed(0)
        model, optimizer = make()
        step = make_step(model, optimizer)
        print(name)
        step = tracejit.compile(step) if name == "tracejit" else step
        found.append(train(step, model, *data(), epochs))
        if name == "tracejit":
            print(f"  {step.stats.compiles} compilations, {step.stats.replays} replays")
    return found[0]


def options(text: str, **defaults: int) -> dict[str, int | bool]:
    """The command line: each number by its name, and --eager."""
    parser = argparse.ArgumentParser(description=text.partition("\n")[0])
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--eager", action="store_true", help="train eagerly beside it")
    return vars(parser.parse_args())
