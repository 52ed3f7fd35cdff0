"""Benchmarked steps that examples/ does not have. Each maker gives (step, tensors that it changes).

What a maker takes beside sizes and a device is handed to its optimizer: `fused`, `capturable`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from examples import transformer_block
from examples.modules import sequential

Loss = Callable[[], torch.Tensor]
Step = Callable[[], torch.Tensor | float | None]
Made = tuple[Step, list[torch.Tensor]]


def trained(loss_of: Loss, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """A plain training step."""

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss

    return step


class Net(NamedTuple):
    """The two-layer net out of modules: its loss, the net, an optimizer."""

    loss_of: Loss
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer


def _of_net(
    make: Callable[[Net], Step], optimizer: Callable = torch.optim.SGD, lr: float = 1e-6
) -> Callable[..., Made]:
    """A maker of steps of that net: `make` gives the step."""

    def maker(
        n: int = 64,
        d_in: int = 1000,
        h: int = 100,
        d_out: int = 10,
        device: str = "cpu",
        **options: bool,
    ) -> Made:
        torch.manual_seed(0)
        x, y = torch.randn(n, d_in).to(device), torch.randn(n, d_out).to(device)
        model = sequential(d_in, h, d_out).to(device)
        of_model = optimizer(model.parameters(), lr=lr, **options)
        step = make(Net(lambda: (model(x) - y).pow(2).sum(), model, of_model))
        return step, list(model.parameters())

    return maker


# The two-layer net out of modules, with Adam.
nn_adam = _of_net(lambda net: trained(*net), torch.optim.Adam, 1e-4)


def mlp(
    batch: int = 256,
    sizes: Sequence[int] = (784, 512, 512, 10),
    device: str = "cpu",
    **options: bool,
) -> Made:
    """A classifier with cross-entropy and SGD with momentum."""
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for inputs, outputs in zip(sizes, sizes[1:], strict=False):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1]).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **options)
    x = torch.randn(batch, sizes[0]).to(device)
    labels = torch.randint(0, sizes[-1], (batch,)).to(device)
    step = trained(lambda: F.cross_entropy(model(x), labels), model, optimizer)
    return step, list(model.parameters())


def mlp_dropout(
    batch: int = 256,
    sizes: Sequence[int] = (784, 512, 512, 10),
    device: str = "cpu",
    **options: bool,
) -> Made:
    """The classifier with dropout, and AdamW."""
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for inputs, outputs in zip(sizes, sizes[1:], strict=False):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU(), torch.nn.Dropout(0.1)]
    model = torch.nn.Sequential(*layers[:-2]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **options)
    x = torch.randn(batch, sizes[0]).to(device)
    labels = torch.randint(0, sizes[-1], (batch,)).to(device)
    step = trained(lambda: F.cross_entropy(model(x), labels), model, optimizer)
    torch.manual_seed(1)
    return step, list(model.parameters())


def block_dropout(
    batch: int = 4, length: int = 64, width: int = 128, heads: int = 4, device: str = "cpu"
) -> Made:
    """The transformer block with dropout after attention, where a residual is added, and AdamW."""
    torch.manual_seed(0)
    block = transformer_block.Block(width, heads, dropout=0.1).to(device)
    block.key.bias = None  # its gradient is 0, and AdamW would follow what rounding leaves of it
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-3)
    x, target = (torch.randn(batch, length, width).to(device) for _ in range(2))
    step = trained(lambda: F.mse_loss(block(x), target), block, optimizer)
    torch.manual_seed(1)
    return step, list(block.parameters())


@_of_net
def loss_item(net: Net) -> Step:
    """A step that returns its loss as a number."""
    step = trained(*net)
    return lambda: step().item()


@_of_net
def nan_check(net: Net) -> Step:
    """A step that leaves the update out where the loss is not finite."""
    loss_of, model, optimizer = net

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        if torch.isfinite(loss):
            optimizer.step()
        return loss

    return step


@_of_net
def norm_logged(net: Net) -> Step:
    """A step that clips gradients, and returns loss and norm as numbers."""
    loss_of, model, optimizer = net

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item() + norm.item()

    return step


@_of_net
def early_exit(net: Net) -> Step:
    """Up to three updates, as long as the loss is large."""
    loss_of, model, optimizer = net

    def step() -> torch.Tensor:
        for _ in range(3):
            optimizer.zero_grad()
            loss = loss_of()
            if loss.item() < 1e-3:
                break
            loss.backward()
            optimizer.step()
        return loss

    return step


@_of_net
def grad_scaler(net: Net) -> Step:
    """A step under a GradScaler, which leaves updates out where a gradient is not finite."""
    loss_of, model, optimizer = net
    scaler = torch.amp.GradScaler(loss_of().device.type, init_scale=8.0, growth_interval=10**9)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss

    return step


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


@_of_net
def own_adam(net: Net) -> Step:
    """An optimizer of one's own with a counter, and a list of the losses."""
    loss_of, model, _ = net
    optimizer = OwnAdam(list(model.parameters()), lr=1e-4)
    losses: list[torch.Tensor] = []

    def step() -> torch.Tensor:
        loss = loss_of()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        return loss

    return step


def adam(
    count: int = 20,
    shape: tuple[int, int] = (500, 500),
    device: str = "cpu",
    **options: bool,
) -> Made:
    """Adam's update alone, over `count` parameters with given gradients."""
    torch.manual_seed(0)
    parameters = [torch.randn(shape).to(device).requires_grad_() for _ in range(count)]
    grads = [torch.randn(shape).to(device) for _ in range(count)]
    for p, g in zip(parameters, grads, strict=True):
        p.grad = g
    optimizer = torch.optim.Adam(parameters, lr=1e-3, **options)

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


def attention(
    batch: int = 8, heads: int = 8, length: int = 512, width: int = 64, device: str = "cpu"
) -> Made:
    """Causal attention, forward and backward; gradients on queries, keys and values."""
    torch.manual_seed(0)
    shape = batch, heads, length, width
    q, k, v = (torch.randn(shape).to(device).requires_grad_() for _ in range(3))
    g = torch.randn(shape).to(device)

    def step() -> torch.Tensor:
        q.grad = k.grad = v.grad = None
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y.backward(g)
        return y.detach()

    return step, [q, k, v]


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


def recurrent(
    kind: str = "LSTM",
    both: bool = False,
    steps: int = 256,
    batch: int = 16,
    width: int = 64,
    device: str = "cpu",
    **options: bool,
) -> Made:
    """Two layers of a recurrent network, in one direction or both, with AdamW."""
    torch.manual_seed(0)
    model = getattr(torch.nn, kind)(width, width, num_layers=2, bidirectional=both).to(device)
    x = torch.randn(steps, batch, width).to(device)
    y = torch.randn(steps, batch, width * (1 + both)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **options)
    step = trained(lambda: (model(x)[0] - y).pow(2).mean(), model, optimizer)
    return step, list(model.parameters())


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
    """DynamicNet with SGD; its depth is drawn in every call."""
    random.seed(0)
    torch.manual_seed(0)
    x, y = torch.randn(n, d_in).to(device), torch.randn(n, d_out).to(device)
    model = DynamicNet(d_in, h, d_out).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    step = trained(lambda: (model(x) - y).pow(2).sum(), model, optimizer)
    return step, list(model.parameters())
