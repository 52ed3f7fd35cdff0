"""Small networks for images, in the manner of those that people train, and a step for each."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

Made = tuple[Callable[[], object], list[torch.Tensor]]


class LeNet(nn.Module):
    """Two convolutions and pools, and a classifier of three layers; the images are 1×20×20."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(16 * 9, 30), nn.Linear(30, 20), nn.Linear(20, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = torch.flatten(x, 1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class Block(nn.Module):
    """A residual block of two convolutions; its shortcut is projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


def residual(width: int = 8, classes: int = 10) -> nn.Module:
    """A stem with an overlapping max pool, three blocks, and the mean over the image."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
        Block(width, width, 1),
        Block(width, 2 * width, 2),
        Block(2 * width, 2 * width, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, classes),
    )


def vgg(widths: tuple[int, ...] = (16, 32), classes: int = 10, side: int = 12) -> nn.Module:
    """Pairs of 3×3 convolutions with batch norm, a pool after each, and a classifier."""
    layers: list[nn.Module] = []
    inputs = 3
    for width in widths:
        for _ in range(2):
            layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2))
        side //= 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * side * side, classes))


class Separable(nn.Module):
    """An inverted residual: 1×1 up, depthwise 3×3, 1×1 down."""

    def __init__(self, inputs: int, outputs: int, stride: int, factor: int = 2) -> None:
        super().__init__()
        width = inputs * factor
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU6(),
            nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU6(),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(
                outputs, affine=False
            ),  # a bias would have nothing but noise as gradient
        )
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.adds else self.body(x)


def mobile(width: int = 16, classes: int = 10) -> nn.Module:
    """Depthwise and 1×1 convolutions in turn."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU6(),
        Separable(width, width, 1),
        Separable(width, 2 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, classes),
    )


class UNet(nn.Module):
    """Down by a pool and up by a transposed convolution, with what was before put beside it."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, width, 3, padding=1, padding_mode="reflect")
        self.middle = nn.Conv2d(width, 2 * width, 3, padding=2, dilation=2)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.out = nn.Conv2d(2 * width, 10, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = F.silu(self.down(x))
        b = F.silu(self.middle(F.avg_pool2d(a, 2)))
        y = self.out(torch.cat([self.up(b), a], 1))
        return y.mean((2, 3))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lenet": (LeNet, (3, 1, 20, 20)),
    "residual": (residual, (3, 3, 13, 13)),
    "vgg": (vgg, (3, 3, 12, 12)),
    "mobile": (mobile, (3, 3, 9, 11)),
    "unet": (UNet, (2, 3, 8, 6)),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.001, momentum=0.9, weight_decay=1e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-4),
}


def make_step(net: str, optimizer: str, *, channels_last: bool = False) -> Made:
    """A training step on one batch, and the tensors that it changes."""
    torch.manual_seed(0)
    make, shape = NETS[net]
    model, x = make(), torch.randn(shape)
    y = torch.randint(0, 10, shape[:1])
    if channels_last:
        model, x = (
            model.to(memory_format=torch.channels_last),
            x.to(memory_format=torch.channels_last),
        )
    opt = OPTIMIZERS[optimizer](model.parameters())

    def step() -> torch.Tensor:
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        return loss

    return step, [*model.parameters(), *model.buffers()]
