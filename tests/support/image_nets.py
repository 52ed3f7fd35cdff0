"""Small networks for images, in the manner of those that people train, and a step for each."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.image_steps import vgg_net

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


def alexnet(width: int = 8, classes: int = 10) -> nn.Module:
    """Five convolutions, overlapping max pools, and a classifier; the images are 3×31×31."""
    return nn.Sequential(
        nn.Conv2d(3, width, 7, 2, 2),
        nn.ReLU(inplace=True),
        nn.LocalResponseNorm(3),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(width, 2 * width, 5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, 24),
        nn.ReLU(inplace=True),
        nn.Linear(24, classes),
    )


class SqueezeExcite(nn.Module):
    """Each channel times a gate that is told from the means of all."""

    def __init__(self, width: int, reduced: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, reduced, 1), nn.Conv2d(reduced, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.up(F.silu(self.down(gate))))


class MBConv(nn.Module):
    """The block of EfficientNet: an inverted residual with swish and squeeze-excite."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, factor: int) -> None:
        super().__init__()
        width = inputs * factor
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.SiLU(),
            nn.Conv2d(width, width, size, stride, size // 2, groups=width, bias=False),
            nn.BatchNorm2d(width),
            nn.SiLU(),
            SqueezeExcite(width, max(inputs // 4, 1)),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs, affine=False),  # as above
        )
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.adds else self.body(x)


def efficient(width: int = 8, classes: int = 10) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.SiLU(),
        MBConv(width, width, 3, 1, 1),
        MBConv(width, 2 * width, 5, 2, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, classes),
    )


class Dense(nn.Module):
    """Layers that read the channels of all before them."""

    def __init__(self, inputs: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(inputs + k * growth),
                nn.ReLU(),
                nn.Conv2d(inputs + k * growth, growth, 3, padding=1, bias=False),
            )
            for k in range(layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


def dense(width: int = 8, growth: int = 4, classes: int = 10) -> nn.Module:
    """Two dense blocks and the transition between them."""
    inner = width + 2 * growth
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        Dense(width, growth, 2),
        nn.BatchNorm2d(inner),
        nn.ReLU(),
        nn.Conv2d(inner, inner // 2, 1, bias=False),
        nn.AvgPool2d(2),
        Dense(inner // 2, growth, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(inner // 2 + 2 * growth, classes),
    )


class Inception(nn.Module):
    """1×1, 3×3, 5×5 and a pool side by side."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(inputs, width, 1)
        self.three = nn.Sequential(
            nn.Conv2d(inputs, width, 1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        )
        self.five = nn.Sequential(
            nn.Conv2d(inputs, width // 2, 1), nn.ReLU(), nn.Conv2d(width // 2, width, 5, padding=2)
        )
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(inputs, width, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = [self.one(x), self.three(x), self.five(x), self.pool(x)]
        return F.relu(torch.cat(branches, 1))


class GoogLeNet(nn.Module):
    """Two inception blocks, a pool between them, and a classifier beside the last one."""

    def __init__(self, width: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 2 * width, 3, 2, 1)
        self.first = Inception(2 * width, width)
        self.second = Inception(4 * width, width)
        self.side, self.head = nn.Linear(4 * width, classes), nn.Linear(4 * width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(F.relu(self.stem(x)))
        side = self.side(x.mean((2, 3)))
        x = self.second(F.max_pool2d(x, 3, 2, 1, ceil_mode=True))
        return self.head(x.mean((2, 3))) + 0.3 * side


class ConvNeXtBlock(nn.Module):
    """Depthwise 7×7, a layer norm over channels, two linear layers, and a scale of each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(0.1 * torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.mix(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Patches, a block, a step down, and a block."""

    def __init__(self, width: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 2, 2)
        self.first, self.second = ConvNeXtBlock(width), ConvNeXtBlock(2 * width)
        self.norm, self.down = nn.GroupNorm(1, width), nn.Conv2d(width, 2 * width, 2, 2)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(self.norm(self.first(self.stem(x))))
        return self.head(self.second(x).mean((2, 3)))


class UNetUp(nn.Module):
    """Down by pools, up by bilinear interpolation, two levels deep."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()

        def twice(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(inplace=True),
            )

        self.down1, self.down2 = twice(3, width), twice(width, 2 * width)
        self.middle = twice(2 * width, 2 * width)
        self.up2, self.up1 = twice(4 * width, width), twice(2 * width, width)
        self.out = nn.Conv2d(width, 10, 1)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.middle(F.max_pool2d(b, 2))
        y = self.up2(torch.cat([b, self.up(c)], 1))
        y = self.up1(torch.cat([a, F.interpolate(y, a.shape[2:], mode="bilinear")], 1))
        return self.out(y).mean((2, 3))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lenet": (LeNet, (3, 1, 20, 20)),
    "residual": (residual, (3, 3, 13, 13)),
    "vgg": (lambda: vgg_net((16, 32), 12), (3, 3, 12, 12)),
    "mobile": (mobile, (3, 3, 9, 11)),
    "unet": (UNet, (2, 3, 8, 6)),
    "alexnet": (alexnet, (3, 3, 31, 31)),
    "efficient": (efficient, (3, 3, 12, 10)),
    "dense": (dense, (3, 3, 8, 8)),
    "googlenet": (GoogLeNet, (3, 3, 11, 11)),
    "convnext": (ConvNeXt, (3, 3, 12, 12)),
    "unet bilinear": (UNetUp, (2, 3, 8, 12)),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.001, momentum=0.9, weight_decay=1e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-4),
    # through 50 batch norms rounding grows a hundredfold with each step at ten times the rate
    "sgd, slow": lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9, weight_decay=1e-4),
}


def make_step(net: str, optimizer: str, *, channels_last: bool = False) -> Made:
    """A training step on one batch, and the tensors that it changes."""
    return step_of(*NETS[net], optimizer, channels_last)


def step_of(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    optimizer: str,
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Made:
    """The same for the maker of a network and the shape of its images."""
    torch.manual_seed(0)
    model, x = make().to(dtype), torch.randn(shape, dtype=dtype)
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
