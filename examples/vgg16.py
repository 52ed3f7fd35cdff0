"""VGG16 with batch norm: thirteen 3×3 convolutions; --width 64 --size 224 is the published width.

python -m examples.vgg16 [--epochs 2] [--width 8] [--size 32] [--eager]
"""

from __future__ import annotations

import torch
from torch import nn

from examples.images import CLASSES, loaders, options, run, stripes

LAYERS = (1, 1, "pool", 2, 2, "pool", 4, 4, 4, "pool", 8, 8, 8, "pool", 8, 8, 8, "pool")


def vgg16(width: int, classes: int = CLASSES) -> nn.Module:
    """`width` channels in the first layer, eight times as many in the last."""
    layers: list[nn.Module] = []
    inputs = 3
    for layer in LAYERS:
        if layer == "pool":
            layers.append(nn.MaxPool2d(2))
            continue
        outputs = width * layer
        layers += [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]
        inputs = outputs
    return nn.Sequential(
        *layers,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(inputs, 8 * width),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(8 * width, classes),
    )


def main(
    epochs: int = 2,
    images: int = 800,
    batch: int = 32,
    size: int = 32,
    width: int = 8,
    eager: bool = False,
) -> float:
    """Train; returns the accuracy on images that were held out."""

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = vgg16(width)
        return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    return run(make, lambda: loaders(stripes, images, size, batch), epochs, eager)


if __name__ == "__main__":
    main(**options(__doc__, epochs=2, images=800, batch=32, size=32, width=8))
