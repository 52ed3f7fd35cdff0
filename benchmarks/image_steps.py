"""Benchmarked steps of networks for images. Each maker gives (step, tensors that it changes)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.steps import Made, trained


class Residual(nn.Module):
    """ResNet's basic block."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def residual_net(widths: Sequence[int], blocks: int) -> nn.Module:
    """ResNet for small images: a 3×3 stem, stages of basic blocks, the mean."""
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)]
    layers += [nn.BatchNorm2d(widths[0]), nn.ReLU()]
    inputs = widths[0]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            layers.append(Residual(inputs, width, 2 if stage and not block else 1))
            inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def resnet(
    batch: int = 32,
    side: int = 32,
    widths: Sequence[int] = (64, 128, 256, 512),
    blocks: int = 2,
    device: str = "cpu",
    **options: bool,
) -> Made:
    """ResNet-18 on 32×32 images, with cross-entropy and SGD with momentum."""
    torch.manual_seed(0)
    model = residual_net(widths, blocks).to(device)
    x, y = torch.randn(batch, 3, side, side).to(device), torch.randint(10, (batch,)).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, **options
    )
    step = trained(lambda: F.cross_entropy(model(x), y), model, optimizer)
    return step, [*model.parameters(), *model.buffers()]


def conv_block(
    batch: int = 32, channels: int = 64, side: int = 32, groups: int = 1, device: str = "cpu"
) -> Made:
    """Convolution, batch norm and ReLU, forward and backward."""
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False).to(device)
    norm = nn.BatchNorm2d(channels).to(device)
    x = torch.randn(batch, channels, side, side).to(device).requires_grad_()
    g = torch.randn(batch, channels, side, side).to(device)

    def step() -> torch.Tensor:
        for leaf in (x, conv.weight, norm.weight, norm.bias):
            leaf.grad = None
        y = F.relu(norm(conv(x)))
        y.backward(g)
        return y

    return step, [x, conv.weight, norm.weight, norm.bias]


def depthwise_block(
    batch: int = 32, channels: int = 64, side: int = 32, device: str = "cpu"
) -> Made:
    """The same with a convolution of each channel alone."""
    return conv_block(batch, channels, side, channels, device)
