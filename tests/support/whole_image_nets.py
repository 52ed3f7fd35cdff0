"""The networks that people train on images, layer for layer, with few channels.

Each maker gives a module whose stages, blocks and strides are those of the paper; the channels are
an eighth or less of what they are there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.image_steps import MOBILE, Inverted, UNet
from support.image_nets import ConvNeXtBlock, Dense, Inception, LeNet, MBConv


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def _head(inputs: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10)]


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions, or 1×1, 3×3, 1×1 with four times the channels at the end."""

    def __init__(self, inputs: int, width: int, stride: int, deep: bool):
        super().__init__()
        self.outputs = outputs = 4 * width if deep else width
        first = [*_conv(inputs, width, 1), *_conv(width, width, 3, stride)]
        layers = first if deep else _conv(inputs, width, 3, stride)
        last = nn.Conv2d(width, outputs, 1 if deep else 3, 1, 0 if deep else 1, bias=False)
        self.body = nn.Sequential(*layers, last, nn.BatchNorm2d(outputs))
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(*_conv(inputs, outputs, 1, stride)[:2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet(counts: tuple[int, ...], deep: bool, width: int = 4) -> nn.Module:
    layers: list[nn.Module] = [*_conv(3, width, 7, 2), nn.MaxPool2d(3, 2, 1)]
    inputs = width
    for stage, count in enumerate(counts):
        for k in range(count):
            layers.append(ResidualBlock(inputs, width << stage, 2 if stage and not k else 1, deep))
            inputs = layers[-1].outputs
    return nn.Sequential(*layers, *_head(inputs))


def vgg11(width: int = 4) -> nn.Module:
    """VGG11 with batch norm: a pool after 1, 1, 2, 2 and 2 convolutions, three linear layers."""
    layers: list[nn.Module] = []
    inputs = 3
    for stage in (1, 2, (4, 4), (8, 8), (8, 8)):
        for times in stage if isinstance(stage, tuple) else (stage,):
            layers += _conv(inputs, times * width, 3)
            inputs = times * width
        layers.append(nn.MaxPool2d(2))
    sizes = (inputs, 24, 24, 10)
    for k in range(3):
        layers += [nn.Linear(sizes[k], sizes[k + 1]), nn.ReLU(inplace=True)]
    layers.insert(-6, nn.Flatten())
    return nn.Sequential(*layers[:-1])


def alexnet(width: int = 4) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    layers += [nn.Conv2d(width, 3 * width, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    for inputs, outputs in ((3, 6), (6, 4), (4, 4)):
        layers += [nn.Conv2d(inputs * width, outputs * width, 3, padding=1), nn.ReLU()]
    layers += [nn.MaxPool2d(3, 2), nn.AdaptiveAvgPool2d(6), nn.Flatten()]
    sizes = (4 * width * 36, 32, 32)
    for n, m in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(n, m), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(32, 10))


def mobilenet(divisor: int = 8) -> nn.Module:
    """MobileNetV2: 17 inverted residuals."""
    inputs = 32 // divisor
    layers = [*_conv(3, inputs, 3, 2)]
    for factor, channels, count, stride in MOBILE:
        for k in range(count):
            outputs = channels // divisor
            layers.append(Inverted(inputs, outputs, 1 if k else stride, factor))
            inputs = outputs
    return nn.Sequential(*layers, *_conv(inputs, 1280 // divisor, 1), *_head(1280 // divisor))


# factor, channels, blocks, stride, side of the depthwise convolution
EFFICIENT = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3))
EFFICIENT = (*EFFICIENT, (6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3))


def efficientnet(divisor: int = 8) -> nn.Module:
    """EfficientNet-B0: 16 inverted residuals with squeeze-excite."""
    inputs = 32 // divisor
    layers = [*_conv(3, inputs, 3, 2)[:2], nn.SiLU()]
    for factor, channels, count, stride, size in EFFICIENT:
        for k in range(count):
            outputs = channels // divisor
            layers.append(MBConv(inputs, outputs, size, 1 if k else stride, factor))
            inputs = outputs
    last = 1280 // divisor
    return nn.Sequential(*layers, *_conv(inputs, last, 1)[:2], nn.SiLU(), *_head(last))


def densenet(growth: int = 4) -> nn.Module:
    """DenseNet-121 without its 1×1 bottlenecks: 6, 12, 24 and 16 layers, halved in between."""
    inputs = 2 * growth
    layers: list[nn.Module] = [*_conv(3, inputs, 7, 2), nn.MaxPool2d(3, 2, 1)]
    for stage, count in enumerate((6, 12, 24, 16)):
        if stage:
            conv = nn.Conv2d(inputs, inputs // 2, 1, bias=False)
            layers += [nn.BatchNorm2d(inputs), nn.ReLU(), conv, nn.AvgPool2d(2)]
            inputs //= 2
        layers.append(Dense(inputs, growth, count))
        inputs += count * growth
    return nn.Sequential(*layers, nn.BatchNorm2d(inputs), nn.ReLU(), *_head(inputs))


def googlenet(width: int = 4) -> nn.Module:
    """Nine inception blocks; pools with rounded-up sizes before the third and the eighth."""
    layers: list[nn.Module] = [nn.Conv2d(3, 2 * width, 7, 2, 3), nn.ReLU()]
    layers += [nn.MaxPool2d(3, 2, ceil_mode=True), nn.Conv2d(2 * width, 2 * width, 1), nn.ReLU()]
    layers += [nn.Conv2d(2 * width, 3 * width, 3, padding=1), nn.ReLU()]
    inputs = 3 * width
    for k in range(9):
        if k in (0, 2, 7):
            layers.append(nn.MaxPool2d(3, 2, ceil_mode=True))
        layers.append(Inception(inputs, width))
        inputs = 4 * width
    return nn.Sequential(*layers, *_head(inputs))


def convnext(width: int = 4) -> nn.Module:
    """ConvNeXt-T: 3, 3, 9 and 3 blocks, patches of 4 and of 2."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 4), nn.GroupNorm(1, width)]
    for stage, count in enumerate((3, 3, 9, 3)):
        channels = width << stage
        if stage:
            before = channels // 2
            layers += [nn.GroupNorm(1, before), nn.Conv2d(before, channels, 2, 2)]
        layers += [ConvNeXtBlock(channels) for _ in range(count)]
    return nn.Sequential(*layers, *_head(width << 3))


# the maker, and the shape of the images
WHOLE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LeNet": (LeNet, (8, 1, 20, 20)),
    "AlexNet": (alexnet, (4, 3, 64, 64)),
    "VGG11-bn": (vgg11, (8, 3, 32, 32)),
    "ResNet-18": (lambda: resnet((2, 2, 2, 2), False), (8, 3, 64, 64)),
    "ResNet-50": (lambda: resnet((3, 4, 6, 3), True), (8, 3, 64, 64)),
    "MobileNetV2": (mobilenet, (8, 3, 64, 64)),
    "EfficientNet-B0": (efficientnet, (8, 3, 64, 64)),
    "DenseNet-121": (densenet, (8, 3, 64, 64)),
    "GoogLeNet": (googlenet, (4, 3, 64, 64)),
    "UNet": (lambda: UNet(4, 4), (2, 3, 32, 32)),
    "ConvNeXt-T": (convnext, (4, 3, 64, 64)),
}
