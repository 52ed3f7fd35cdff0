"""Steps to save: what they are called with, and what they change by the names that a file has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from examples.alexnet import alexnet
from examples.custom_relu import MyReLU
from examples.transformer_block import Block
from support.image_nets import Block as Residual
from support.image_nets import residual
from support.language_nets import LENGTH, VOCABULARY, NanoGPT

Named = dict[str, torch.Tensor]


@dataclass
class Saved:
    """A step, the arguments of its n-th call, and the tensors that it changes."""

    step: Callable
    args: Callable[[int], tuple]
    state: Callable[[], Named]
    kinds: int = 1  # of calls, each with a plan of its own


def _named(**modules: nn.Module) -> Named:
    """Parameters and buffers; tied ones once."""
    found: Named = {}
    for name, module in modules.items():
        for at, tensor in (*module.named_parameters(), *module.named_buffers()):
            found[f"{name}.{at}"] = tensor
    return found


def batches_of(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Callable:
    """Three batches of tensors of these shapes, in turn."""
    generator = torch.Generator().manual_seed(7)
    batches = [
        tuple(torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
        for _ in range(3)
    ]
    return lambda i: batches[i % 3]


def by_hand() -> Saved:
    """The two-layer net with gradients by hand, and its rate as an argument."""
    torch.manual_seed(0)
    w1, w2 = torch.randn(20, 16).double(), torch.randn(16, 4).double()

    def step(x, y, lr):
        nonlocal w1, w2
        hidden = x.mm(w1)
        relu = hidden.clamp(min=0)
        y_pred = relu.mm(w2)
        loss = (y_pred - y).pow(2).sum()
        grad_pred = 2.0 * (y_pred - y)
        grad_w2 = relu.t().mm(grad_pred)
        grad_hidden = grad_pred.mm(w2.t()).clone()
        grad_hidden[hidden < 0] = 0
        w1 -= lr * x.t().mm(grad_hidden)
        w2 -= lr * grad_w2
        return loss.item()

    batches = batches_of((8, 20), (8, 4))
    return Saved(step, lambda i: (*batches(i), 1e-4 / (1 + i)), lambda: {"w1": w1, "w2": w2})


def two_layers() -> Saved:
    """The same with modules and Adam, for batches of two sizes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def step(x, y):
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach(), "rate": optimizer.param_groups[0]["lr"]}

    batches = batches_of((8, 20), (8, 4))
    few = lambda i: tuple(t[: 8 - 3 * (i % 2)] for t in batches(i))  # noqa: E731
    return Saved(step, few, lambda: _named(model=model), kinds=2)


def classifier() -> Saved:
    """An MLP with momentum, which counts its calls."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 10)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    counts = {"calls": 0}

    def step(batch):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch["x"]), batch["labels"])
        loss.backward()
        optimizer.step()
        counts["calls"] += 1
        return loss.detach(), counts["calls"]

    batches = batches_of((8, 20))
    labels = torch.arange(8) % 10
    given = lambda i: ({"x": batches(i)[0], "labels": labels},)  # noqa: E731
    return Saved(step, given, lambda: _named(model=model))


def custom_function() -> Saved:
    """A function of the user's own, with its derivative."""
    torch.manual_seed(0)
    w1 = torch.randn(20, 16).double().requires_grad_()
    w2 = torch.randn(16, 4).double().requires_grad_()

    def step(x, y):
        loss = (MyReLU.apply(x.mm(w1)).mm(w2) - y).pow(2).sum()
        loss.backward()
        with torch.no_grad():
            for w in (w1, w2):
                w -= 1e-4 * w.grad
                w.grad = None
        return loss.detach()

    return Saved(step, batches_of((8, 20), (8, 4)), lambda: {"w1": w1, "w2": w2})


def deciding() -> Saved:
    """It clips by a norm that Python reads, and decides by it."""
    torch.manual_seed(0)
    w = torch.randn(6).double().requires_grad_()
    clipped = {"times": 0}

    def step(x):
        w.grad = None
        loss = (x @ w).pow(2).mean()
        loss.backward()
        norm = w.grad.norm().item()
        with torch.no_grad():
            if norm > 40:
                clipped["times"] += 1
                w.grad.mul_(40 / norm)
            w.sub_(w.grad, alpha=0.02 / (1 + norm))
        return loss.detach(), norm, clipped["times"]

    batches = batches_of((4, 6))
    return Saved(step, lambda i: (batches(i)[0] * (1 + 2 * (i % 2)),), lambda: {"w": w}, kinds=4)


class DynamicNet(nn.Module):
    """A net of as many hidden layers as it is told, all with the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.middle, self.leave = nn.Linear(20, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, depth: int) -> torch.Tensor:
        h = self.enter(x).clamp(min=0)
        for _ in range(depth):
            h = self.middle(h).clamp(min=0)
        return self.leave(h)


def dynamic() -> Saved:
    """One plan for each depth."""
    torch.manual_seed(0)
    model = DynamicNet().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step(x, y, depth):
        loss = (model(x, depth) - y).pow(2).mean()
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        optimizer.step()
        return loss.detach()

    batches = batches_of((8, 20), (8, 4))
    return Saved(step, lambda i: (*batches(i), i % 3), lambda: _named(model=model), kinds=3)


def gpt() -> Saved:
    """A small GPT with dropout, AdamW in two groups, and tied weights."""
    torch.manual_seed(0)
    model = NanoGPT(dropout=0.1)
    optimizer = model.configure_optimizers(0.1, 1e-3)

    def step(idx, targets):
        _, loss = model(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    tokens = torch.randint(0, VOCABULARY, (3, 2, LENGTH + 1))
    given = lambda i: (tokens[i % 3, :, :-1].clone(), tokens[i % 3, :, 1:].clone())  # noqa: E731
    return Saved(step, given, lambda: _named(model=model))


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer, shape: tuple[int, ...]) -> Saved:
    """A classifier of images of the shape, each batch of which has one of each of its classes."""

    def step(x, labels):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    dtype = next(model.parameters()).dtype
    batches, labels = batches_of(shape, dtype=dtype), torch.arange(shape[0])
    return Saved(step, lambda i: (*batches(i), labels), lambda: _named(model=model))


def images() -> Saved:
    """Convolutions, batch norms with running statistics, and residuals, as in ResNet-18."""
    torch.manual_seed(0)
    model = residual(width=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    return _trained(model, optimizer, (4, 3, 8, 8))


def alex() -> Saved:
    """AlexNet, narrow, on small images, without its dropout."""
    torch.manual_seed(0)
    model = alexnet(width=2)
    for module in model:
        if isinstance(module, nn.Dropout):
            module.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    return _trained(model, optimizer, (2, 3, 64, 64))


def resnet18(dtype: torch.dtype = torch.float64) -> Saved:
    """ResNet-18, narrow, on small images. So few of them make what rounding does a thousand times
    as large in twenty steps."""
    torch.manual_seed(0)
    widths = (4, 4, 8, 16, 32)
    stages = [
        part
        for k in range(4)
        for part in (
            Residual(widths[k], widths[k + 1], 1 + (k > 0)),
            Residual(widths[k + 1], widths[k + 1], 1),
        )
    ]
    stem = nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    model = nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *stages, *head).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    return _trained(model, optimizer, (4, 3, 64, 64))


def block() -> Saved:
    """A transformer block, its attention written out."""
    torch.manual_seed(0)
    model = Block(16, heads=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x, target):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    batches = batches_of((2, 6, 16), (2, 6, 16), dtype=torch.float32)
    return Saved(step, batches, lambda: _named(model=model))


class Pair(NamedTuple):
    """A batch."""

    x: torch.Tensor
    labels: torch.Tensor


class Result(NamedTuple):
    """What a step returns."""

    loss: float
    rate: float


def scheduled() -> Saved:
    """Its rate and momentum are those of a schedule, which it steps; a batch is a tuple with names,
    and so is what it returns."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 10)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=6)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=60)
    schedule = torch.optim.lr_scheduler.ChainedScheduler([warm, cycle])
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "min", 0.9, patience=1)

    def step(batch):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch.x), batch.labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        plateau.step(loss.item())
        return Result(loss.item(), optimizer.param_groups[0]["lr"])

    batches = batches_of((8, 20))
    labels = torch.arange(8) % 10
    given = lambda i: (Pair(batches(i)[0], labels),)  # noqa: E731
    return Saved(step, given, lambda: _named(model=model))


def selecting() -> Saved:
    """It leaves out what a mask does not select: as many elements as there are in the batch; and
    counts labels."""
    torch.manual_seed(0)
    model = nn.Linear(20, 10).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def step(x, labels):
        keep = labels != 9
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x)[keep], labels[keep])
        loss.backward()
        optimizer.step()
        kinds, counts = torch.unique(labels[keep], return_counts=True)
        return loss.detach(), kinds.sum() + counts.max(), torch.bincount(labels).sum()

    batches = batches_of((8, 20))
    labels = [torch.arange(8) + k for k in range(3)]  # 8, 8 and 7 elements
    given = lambda i: (*batches(i), labels[i % 3])  # noqa: E731
    return Saved(step, given, lambda: _named(model=model), kinds=3)


def recurrent() -> Saved:
    """A loop over time with dropout in it, whose masks are rows of one memory."""
    torch.manual_seed(0)
    cell, out = nn.GRUCell(4, 6).double(), nn.Linear(6, 2).double()
    parameters = [*cell.parameters(), *out.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)

    def step(x, y):
        h, outs = x.new_zeros(3, 6), []
        for row in x.unbind(1):
            h = cell(F.dropout(row, 0.25), h)
            outs.append(F.dropout(h, 0.5))
        loss = F.mse_loss(out(torch.stack(outs, 1)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Saved(step, batches_of((3, 10, 4), (3, 10, 2)), lambda: _named(cell=cell, out=out))


@dataclass(slots=True)
class Weighed:
    """A batch in slots, with a number."""

    x: torch.Tensor
    labels: torch.Tensor
    scale: float = 1.0


def noting() -> Saved:
    """It keeps its losses in lists; a batch is an object of slots, whose number is another one in
    each call."""
    torch.manual_seed(0)
    model = nn.Linear(20, 10).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses, norms = [], []

    def step(batch):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch.x), batch.labels) * batch.scale
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        norms.append({"norm": model.weight.detach().norm(), "scale": batch.scale})
        return loss.detach(), batch.scale

    batches, labels = batches_of((8, 20)), torch.arange(8)
    given = lambda i: (Weighed(*batches(i), labels, 1 / (1 + i)),)  # noqa: E731
    return Saved(step, given, lambda: _named(model=model))


STEPS = {
    make.__name__: make
    for make in (
        *(by_hand, two_layers, classifier, custom_function, dynamic, deciding, gpt, images),
        *(alex, resnet18, block, scheduled, selecting, noting, recurrent),
    )
}


def rich() -> Saved:
    """What the others have not: draws of two generators, values that eager refuses, a backward
    that is left to the caller, tensors that are replaced."""
    torch.manual_seed(0)
    own = torch.Generator().manual_seed(3)
    w = torch.randn(5, 4).requires_grad_()
    held = {"ema": torch.zeros(4), "calls": 0}

    def step(x, labels, at, scale=2.0):
        noise = torch.rand(4, generator=own) * F.dropout(torch.ones(4), 0.5)
        held["ema"] = 0.9 * held["ema"] + 0.1 * noise
        held["calls"] += 1
        loss = F.cross_entropy(x @ w + noise, labels) * scale + x[:, at + 1].sum()
        return [loss, (held["calls"], noise.sum().item(), x.shape)]

    batches = batches_of((3, 5), dtype=torch.float32)
    labels, at = torch.tensor([0, 3, 1]), torch.tensor([0, 2])
    return Saved(step, lambda i: (*batches(i), labels, at), lambda: {"w": w})


FILES = (by_hand, two_layers, deciding, rich, scheduled, selecting, noting, recurrent)
