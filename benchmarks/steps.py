"""Benchmarked steps that examples/ does not have. Each maker gives (step, tensors that it changes).

`fused` is handed to the optimizer: None is torch's default, True its one-kernel implementation.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from examples import transformer_block
from examples.modules import sequential

Made = tuple[Callable[[], torch.Tensor | float | None], list[torch.Tensor]]


def _training(
    loss_of: Callable[[], torch.Tensor], model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> Made:
    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss

    return step, list(model.parameters())


def nn_adam(
    n: int = 64,
    d_in: int = 1000,
    h: int = 100,
    d_out: int = 10,
    fused: bool | None = None,
    device: str = "cpu",
) -> Made:
    """The two-layer net out of modules, with Adam."""
    torch.manual_seed(0)
    x, y = torch.randn(n, d_in).to(device), torch.randn(n, d_out).to(device)
    model = sequential(d_in, h, d_out).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=fused)
    return _training(lambda: (model(x) - y).pow(2).sum(), model, optimizer)


def mlp(
    batch: int = 256,
    sizes: Sequence[int] = (784, 512, 512, 10),
    fused: bool | None = None,
    device: str = "cpu",
) -> Made:
    """A classifier with cross-entropy and SGD with momentum."""
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for inputs, outputs in zip(sizes, sizes[1:], strict=False):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1]).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
    x = torch.randn(batch, sizes[0]).to(device)
    labels = torch.randint(0, sizes[-1], (batch,)).to(device)
    return _training(lambda: F.cross_entropy(model(x), labels), model, optimizer)


def mlp_dropout(
    batch: int = 256,
    sizes: Sequence[int] = (784, 512, 512, 10),
    fused: bool | None = None,
    device: str = "cpu",
) -> Made:
    """The classifier with dropout, and AdamW."""
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for inputs, outputs in zip(sizes, sizes[1:], strict=False):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU(), torch.nn.Dropout(0.1)]
    model = torch.nn.Sequential(*layers[:-2]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    x = torch.randn(batch, sizes[0]).to(device)
    labels = torch.randint(0, sizes[-1], (batch,)).to(device)
    step, tensors = _training(lambda: F.cross_entropy(model(x), labels), model, optimizer)
    torch.manual_seed(1)
    return step, tensors


def block_dropout(
    batch: int = 4, length: int = 64, width: int = 128, heads: int = 4, device: str = "cpu"
) -> Made:
    """The transformer block with dropout after attention, where a residual is added, and AdamW."""
    torch.manual_seed(0)
    block = transformer_block.Block(width, heads, dropout=0.1).to(device)
    block.key.bias = None  # its gradient is 0, and AdamW would follow what rounding leaves of it
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-3)
    x, target = (torch.randn(batch, length, width).to(device) for _ in range(2))
    step, tensors = _training(lambda: F.mse_loss(block(x), target), block, optimizer)
    torch.manual_seed(1)
    return step, tensors


def _net_with_sgd(n: int, d_in: int, h: int, d_out: int, device: str, fused: bool | None) -> tuple:
    """The two-layer net out of modules with SGD: (a function that gives the loss, both)."""
    torch.manual_seed(0)
    x, y = torch.randn(n, d_in).to(device), torch.randn(n, d_out).to(device)
    model = sequential(d_in, h, d_out).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, fused=fused)
    return lambda: (model(x) - y).pow(2).sum(), model, optimizer


def loss_item(
    n: int = 64,
    d_in: int = 1000,
    h: int = 100,
    d_out: int = 10,
    fused: bool | None = None,
    device: str = "cpu",
) -> Made:
    """A step that returns its loss as a number."""
    loss_of, model, optimizer = _net_with_sgd(n, d_in, h, d_out, device, fused)
    step, tensors = _training(loss_of, model, optimizer)
    return lambda: step().item(), tensors


def nan_check(
    n: int = 64,
    d_in: int = 1000,
    h: int = 100,
    d_out: int = 10,
    fused: bool | None = None,
    device: str = "cpu",
) -> Made:
    """A step that leaves the update out where the loss is not finite."""
    loss_of, model, optimizer = _net_with_sgd(n, d_in, h, d_out, device, fused)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        if torch.isfinite(loss):
            optimizer.step()
        return loss

    return step, list(model.parameters())


def norm_logged(
    n: int = 64,
    d_in: int = 1000,
    h: int = 100,
    d_out: int = 10,
    fused: bool | None = None,
    device: str = "cpu",
) -> Made:
    """A step that clips gradients, and returns loss and norm as numbers."""
    loss_of, model, optimizer = _net_with_sgd(n, d_in, h, d_out, device, fused)

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item() + norm.item()

    return step, list(model.parameters())


def early_exit(
    n: int = 64,
    d_in: int = 1000,
    h: int = 100,
    d_out: int = 10,
    fused: bool | None = None,
    device: str = "cpu",
) -> Made:
    """Up to three updates, as long as the loss is large."""
    loss_of, model, optimizer = _net_with_sgd(n, d_in, h, d_out, device, fused)

    def step() -> torch.Tensor:
        for _ in range(3):
            optimizer.zero_grad()
            loss = loss_of()
            if loss.item() < 1e-3:
                break
            loss.backward()
            optimizer.step()
        return loss

    return step, list(model.parameters())


def grad_scaler(
    n: int = 64,
    d_in: int = 1000,
    h: int = 100,
    d_out: int = 10,
    fused: bool | None = None,
    device: str = "cpu",
) -> Made:
    """A step under a GradScaler, which leaves updates out where a gradient is not finite."""
    loss_of, model, optimizer = _net_with_sgd(n, d_in, h, d_out, device, fused)
    scaler = torch.amp.GradScaler(device, init_scale=8.0, growth_interval=10**9)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss

    return step, list(model.parameters())


class OwnAdam:
    """Adam as people write it, with a Python counter."""

    def __init__(self, parameters: list[torch.Tensor], lr: float):
        self.parameters, self.lr, self.steps = parameters, lr, 0
        self.m = [torch.zeros_like(p) for p in parameters]
        self.v = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        for p, m, v in zip(self.parameters, self.m, self.v, strict=True):
            m.mul_(0.9).add_(p.grad, alpha=0.1)
            v.mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
            scale = self.lr * (1 - 0.999**self.steps) ** 0.5 / (1 - 0.9**self.steps)
            p.addcdiv_(m, v.sqrt().add_(1e-8), value=-scale)
            p.grad = None


def own_adam(
    n: int = 64,
    d_in: int = 1000,
    h: int = 100,
    d_out: int = 10,
    fused: bool | None = None,
    device: str = "cpu",
) -> Made:
    """An optimizer of one's own with a counter, and a list of the losses."""
    loss_of, model, _ = _net_with_sgd(n, d_in, h, d_out, device, fused)
    optimizer = OwnAdam(list(model.parameters()), lr=1e-4)
    losses: list[torch.Tensor] = []

    def step() -> torch.Tensor:
        loss = loss_of()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        return loss

    return step, list(model.parameters())


def adam(
    count: int = 20,
    shape: tuple[int, int] = (500, 500),
    fused: bool | None = None,
    device: str = "cpu",
) -> Made:
    """Adam's update alone, over `count` parameters with given gradients."""
    torch.manual_seed(0)
    parameters = [torch.randn(shape).to(device).requires_grad_() for _ in range(count)]
    grads = [torch.randn(shape).to(device) for _ in range(count)]
    for p, g in zip(parameters, grads, strict=True):
        p.grad = g
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=fused)

    def step() -> None:
        optimizer.step()

    return step, parameters


def softmax(n: int = 4096, width: int = 1024, device: str = "cpu") -> Made:
    """Row softmax, forward and backward; the outputs are returned, the gradient is on x."""
    torch.manual_seed(0)
    x = torch.randn(n, width).to(device).requires_grad_()
    g = torch.randn(n, width).to(device)

    def step() -> torch.Tensor:
        x.grad = None
        y = torch.softmax(x, dim=-1)
        y.backward(g)
        return y.detach()

    return step, [x]


def layer_norm(n: int = 4096, width: int = 1024, device: str = "cpu") -> Made:
    """Layer norm with weight and bias, forward and backward; gradients on all three."""
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(width).to(device)
    x = torch.randn(n, width).to(device).requires_grad_()
    g = torch.randn(n, width).to(device)

    def step() -> torch.Tensor:
        x.grad = norm.weight.grad = norm.bias.grad = None
        y = norm(x)
        y.backward(g)
        return y.detach()

    return step, [x, norm.weight, norm.bias]


class DynamicNet(torch.nn.Module):
    """A net that uses its middle layer none to three times, drawn anew on every call."""

    def __init__(self, d_in: int, h: int, d_out: int):
        super().__init__()
        self.input_linear = torch.nn.Linear(d_in, h)
        self.middle_linear = torch.nn.Linear(h, h)
        self.output_linear = torch.nn.Linear(h, d_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.input_linear(x).clamp(min=0)
        for _ in range(random.randint(0, 3)):
            hidden = self.middle_linear(hidden).clamp(min=0)
        return self.output_linear(hidden)


def dynamic_net(
    n: int = 64, d_in: int = 1000, h: int = 100, d_out: int = 10, device: str = "cpu"
) -> Made:
    """DynamicNet with SGD; its Python runs on every call."""
    random.seed(0)
    torch.manual_seed(0)
    x, y = torch.randn(n, d_in).to(device), torch.randn(n, d_out).to(device)
    model = DynamicNet(d_in, h, d_out).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    return _training(lambda: (model(x) - y).pow(2).sum(), model, optimizer)
