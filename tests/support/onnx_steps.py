"""Steps to export to ONNX, and what they are called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from examples.gpt import GPT, LENGTH, adamw
from support import saved_steps
from support.saved_steps import DynamicNet, batches_of

Named = dict[str, torch.Tensor]


@dataclass
class Exported:
    """A step, the arguments of its n-th call, the operators that its model has to have, and how
    near its numbers have to be, after 20 calls."""

    step: Callable
    args: Callable[[int], tuple]
    operators: frozenset[str] = frozenset()
    near: float = 1e-9


def by_hand() -> Exported:
    """The two-layer net with gradients by hand, and its rate as an argument."""
    found = saved_steps.by_hand()
    return Exported(found.step, found.args, frozenset({"MatMul"}))


def autograd() -> Exported:
    """The same with autograd, whose gradients are set to zero after the update."""
    torch.manual_seed(0)
    w1 = torch.randn(20, 16).double().requires_grad_()
    w2 = torch.randn(16, 4).double().requires_grad_()

    def step(x, y):
        loss = (x.mm(w1).clamp(min=0).mm(w2) - y).pow(2).sum()
        loss.backward()
        with torch.no_grad():
            for w in (w1, w2):
                w -= 1e-4 * w.grad
                w.grad.zero_()
        return loss

    return Exported(step, batches_of((8, 20), (8, 4)), frozenset({"MatMul"}))


def accumulating() -> Exported:
    """Gradients that two calls add up, and a third one applies."""
    torch.manual_seed(0)
    w = torch.randn(6, 2).double().requires_grad_()

    def step(x, keep, rate):
        loss = (x @ w).pow(2).mean()
        loss.backward()
        with torch.no_grad():
            w.sub_(w.grad * rate)
            w.grad.mul_(keep)
        return loss

    batches = batches_of((4, 6))

    def args(i: int) -> tuple:
        return (*batches(i), float(i % 3 != 2), 0.1 * (i % 3 == 2))

    return Exported(step, args)


def _modules(make: Callable) -> Exported:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    optimizer = make(model.parameters())

    def step(x, y):
        loss = F.mse_loss(model(x), y, reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach(), "rate": optimizer.param_groups[0]["lr"]}

    return Exported(step, batches_of((8, 20), (8, 4)), frozenset({"Gemm", "Relu"}))


def modules_sgd() -> Exported:
    """Modules and SGD with momentum."""
    return _modules(lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, nesterov=True))


def modules_adam() -> Exported:
    """Modules and Adam."""
    return _modules(lambda p: torch.optim.Adam(p, lr=0.01))


def classifier() -> Exported:
    """Cross entropy, gradients clipped by their norm, AdamW; the accuracy besides."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.GELU(approximate="tanh"), nn.Linear(16, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)

    def step(batch):
        optimizer.zero_grad()
        logits = model(batch["x"])
        loss = F.cross_entropy(logits, batch["labels"], label_smoothing=0.1)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        return loss.detach(), (logits.argmax(1) == batch["labels"]).float().mean()

    batches, labels = batches_of((8, 20), dtype=torch.float32), torch.arange(8) % 10
    given = lambda i: ({"x": batches(i)[0], "labels": labels},)  # noqa: E731
    return Exported(step, given, frozenset({"Gemm", "Gelu"}), 1e-4)


def custom_function() -> Exported:
    """A function of the user's own, with its derivative."""
    found = saved_steps.custom_function()
    return Exported(found.step, found.args)


def dynamic() -> Exported:
    """A net of as many layers as it is told, all with the same weights; a model has one depth."""
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
    return Exported(step, lambda i: (*batches(i), 3))


IMAGES = frozenset({"Conv", "ConvTranspose", "MaxPool", "Relu", "Gemm"})


def alex() -> Exported:
    """AlexNet, narrow, on small images, without its dropout."""
    found = saved_steps.alex()
    return Exported(found.step, found.args, IMAGES, 1e-4)


def resnet18() -> Exported:
    """ResNet-18, narrow, on small images: its running statistics are state too."""
    found = saved_steps.resnet18(torch.float32)
    return Exported(found.step, found.args, IMAGES, 1e-3)


def block() -> Exported:
    """A transformer block with its attention written out."""
    found = saved_steps.block()
    return Exported(found.step, found.args, frozenset({"MatMul", "Softmax"}), 1e-4)


def gpt() -> Exported:
    """The GPT of the examples, without dropout; embedding and head are tied."""
    torch.manual_seed(0)
    model = GPT(layers=1, width=16, heads=2)
    optimizer = adamw(model, 1e-3)

    def step(x, y):
        optimizer.zero_grad()
        logits = model(x)
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), y.view(-1), ignore_index=-1)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    tokens = torch.randint(0, 14, (3, 2, LENGTH + 1))
    given = lambda i: (tokens[i % 3, :, :-1].clone(), tokens[i % 3, :, 1:].clone())  # noqa: E731
    operators = frozenset({"LayerNormalization", "Gelu", "MatMul", "Gather"})
    return Exported(step, given, operators, 1e-4)


def lstm() -> Exported:
    """A network of two directions over time, its last states, and Adam."""
    torch.manual_seed(0)
    model = nn.LSTM(5, 6, bidirectional=True).double()
    head = nn.Linear(12, 3).double()
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=0.01)

    def step(x, y):
        out, (h, c) = model(x)
        loss = F.mse_loss(head(out[-1]), y) + 0.1 * h.pow(2).mean() + c.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Exported(step, batches_of((7, 4, 5), (4, 3)), frozenset({"Scan"}))


STEPS = {
    make.__name__: make
    for make in (
        *(by_hand, autograd, accumulating, modules_sgd, modules_adam, classifier),
        *(custom_function, dynamic, alex, resnet18, block, gpt, lstm),
    )
}
