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


def _trained(
    model: nn.Module, shape: Sequence[int], device: str, channels_last: bool, **options: bool
) -> Made:
    """Classification of random images with cross-entropy and SGD with momentum; at a larger rate
    the rounding of one layout alone leads elsewhere within a few calls."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(device).to(memory_format=layout)
    x = torch.randn(*shape).to(device).to(memory_format=layout)
    y = torch.randint(10, (shape[0],)).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4, **options
    )
    step = trained(lambda: F.cross_entropy(model(x), y), model, optimizer)
    return step, [*model.parameters(), *model.buffers()]


def resnet(
    batch: int = 32,
    side: int = 32,
    widths: Sequence[int] = (64, 128, 256, 512),
    blocks: int = 2,
    device: str = "cpu",
    channels_last: bool = False,
    **options: bool,
) -> Made:
    """ResNet-18 on 32×32 images."""
    torch.manual_seed(0)
    model = residual_net(widths, blocks)
    return _trained(model, (batch, 3, side, side), device, channels_last, **options)


def vgg_net(widths: Sequence[int], side: int) -> nn.Module:
    """Pairs of 3×3 convolutions with batch norm, a pool after each, and a classifier."""
    layers: list[nn.Module] = []
    inputs = 3
    for width in widths:
        for _ in range(2):
            layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2))
    rest = (side >> len(widths)) ** 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * rest, 10))


def vgg(
    batch: int = 32,
    side: int = 32,
    widths: Sequence[int] = (64, 128, 256, 512),
    device: str = "cpu",
    channels_last: bool = False,
    **options: bool,
) -> Made:
    """VGG for small images."""
    torch.manual_seed(0)
    model = vgg_net(widths, side)
    return _trained(model, (batch, 3, side, side), device, channels_last, **options)


def alexnet(
    batch: int = 4,
    side: int = 224,
    width: int = 64,
    hidden: int = 4096,
    device: str = "cpu",
    channels_last: bool = False,
    **options: bool,
) -> Made:
    """AlexNet as torchvision has it, without dropout."""
    torch.manual_seed(0)
    w = width
    layers: list[nn.Module] = [nn.Conv2d(3, w, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    layers += [nn.Conv2d(w, 3 * w, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    for inputs, outputs in ((3 * w, 6 * w), (6 * w, 4 * w), (4 * w, 4 * w)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
    layers += [nn.MaxPool2d(3, 2), nn.AdaptiveAvgPool2d(6), nn.Flatten()]
    layers += [nn.Linear(4 * w * 36, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(hidden, 10))
    return _trained(model, (batch, 3, side, side), device, channels_last, **options)


class Inverted(nn.Module):
    """MobileNetV2's block: 1×1 up, depthwise 3×3, 1×1 down."""

    def __init__(self, inputs: int, outputs: int, stride: int, factor: int):
        super().__init__()
        width, layers = inputs * factor, []
        if factor > 1:
            layers += [nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6()]
        layers += [nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False)]
        layers += [nn.BatchNorm2d(width), nn.ReLU6()]
        # a bias, which the next batch norm takes away, would have nothing but noise as gradient
        last = nn.BatchNorm2d(outputs, affine=False)
        self.body = nn.Sequential(*layers, nn.Conv2d(width, outputs, 1, bias=False), last)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.adds else self.body(x)


MOBILE = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2))
MOBILE = (*MOBILE, (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def mobilenet(
    batch: int = 32,
    side: int = 32,
    stages: Sequence[tuple[int, int, int, int]] = MOBILE,
    last: int = 1280,
    device: str = "cpu",
    channels_last: bool = False,
    **options: bool,
) -> Made:
    """MobileNetV2 with the strides that people give it for 32×32 images. `stages` are (factor,
    channels, blocks, stride of the first)."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32)]
    layers.append(nn.ReLU6())
    inputs = 32
    for factor, channels, count, stride in stages:
        for k in range(count):
            layers.append(Inverted(inputs, channels, 1 if k else stride, factor))
            inputs = channels
    layers += [nn.Conv2d(inputs, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU6()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 10)]
    model, shape = nn.Sequential(*layers), (batch, 3, side, side)
    step, _ = _trained(model, shape, device, channels_last, **options)
    # Rounding errors grow through 52 norms: the first layers' gradients differ by 2 % between two
    # layouts of eager's own. The head's do not, nor do the losses.
    return step, [*model[-1].parameters()]


class UNet(nn.Module):
    """Pairs of 3×3 convolutions, down by pools and up by transposed convolutions, with what was
    before put beside it; the mean over the image of each class."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        widths = [width << k for k in range(depth + 1)]
        self.down = nn.ModuleList(map(self._pair, [3, *widths], widths))
        self.up = nn.ModuleList(
            nn.ModuleDict({"up": nn.ConvTranspose2d(2 * w, w, 2, 2), "join": self._pair(2 * w, w)})
            for w in widths[-2::-1]
        )
        self.out = nn.Conv2d(width, 10, 1)

    @staticmethod
    def _pair(inputs: int, outputs: int) -> nn.Module:
        layers: list[nn.Module] = []
        for n in (inputs, outputs):
            layers += [nn.Conv2d(n, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
            layers.append(nn.ReLU())
        return nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before: list[torch.Tensor] = []
        for k, down in enumerate(self.down):
            x = down(F.max_pool2d(x, 2) if k else x)
            before.append(x)
        for up, beside in zip(self.up, before[-2::-1], strict=True):
            x = up["join"](torch.cat([up["up"](x), beside], 1))
        return self.out(x).mean((2, 3))


def unet(
    batch: int = 4,
    side: int = 64,
    width: int = 32,
    depth: int = 3,
    device: str = "cpu",
    channels_last: bool = False,
    **options: bool,
) -> Made:
    """A UNet on 64×64 images."""
    torch.manual_seed(0)
    return _trained(UNet(width, depth), (batch, 3, side, side), device, channels_last, **options)


def conv_block(
    batch: int = 32,
    channels: int = 64,
    side: int = 32,
    groups: int = 1,
    device: str = "cpu",
    channels_last: bool = False,
) -> Made:
    """Convolution, batch norm and ReLU, forward and backward."""
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    conv = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
    layers = nn.Sequential(conv, nn.BatchNorm2d(channels)).to(device).to(memory_format=layout)
    x = torch.randn(batch, channels, side, side).to(device).to(memory_format=layout)
    g = torch.randn(batch, channels, side, side).to(device).to(memory_format=layout)
    x.requires_grad_()

    def step() -> torch.Tensor:
        x.grad = None
        layers.zero_grad()
        y = F.relu(layers(x))
        y.backward(g)
        return y

    return step, [x, *layers.parameters()]


def depthwise_block(
    batch: int = 32,
    channels: int = 64,
    side: int = 32,
    device: str = "cpu",
    channels_last: bool = False,
) -> Made:
    """The same with a convolution of each channel alone."""
    return conv_block(batch, channels, side, channels, device, channels_last)
