"""AlexNet, narrow and on small images; --width 64 --size 224 makes it the one that was published.

python -m examples.alexnet [--epochs 3] [--width 16] [--size 64] [--eager]
"""

from __future__ import annotations

import torch
from torch import nn

from examples.images import CLASSES, loaders, options, run, stripes


def alexnet(width: int, classes: int = CLASSES) -> nn.Module:
    """`width` channels in the first layer; the linear layers have 64 times as many."""
    return nn.Sequential(
        nn.Conv2d(3, width, 11, 4, 2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(width, 3 * width, 5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(3 * width, 6 * width, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(6 * width, 4 * width, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4 * width, 4 * width, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(6),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(4 * width * 36, 64 * width),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(64 * width, 64 * width),
        nn.ReLU(inplace=True),
        nn.Linear(64 * width, classes),
    )


def main(
    epochs: int = 4,
    images: int = 1000,
    batch: int = 25,
    size: int = 64,
    width: int = 8,
    eager: bool = False,
) -> float:
    """Train; returns the accuracy on images that were held out."""

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = alexnet(width)
        return model, torch.optim.AdamW(model.parameters(), lr=5e-4)

    return run(make, lambda: loaders(stripes, images, size, batch), epochs, eager)


if __name__ == "__main__":
    main(**options(__doc__, epochs=4, images=1000, batch=25, size=64, width=8))
