"""A U-net that finds discs in noise: down by pools, up by bilinear interpolation.

python -m examples.unet [--epochs 2] [--width 8] [--size 48] [--eager]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from examples.images import discs, loaders, options, run


def twice(inputs: int, outputs: int) -> nn.Module:
    """Two 3×3 convolutions, each with batch norm and a relu."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """[N, 3, H, W] → [N, 2, H, W]: how likely each pixel is in each class."""

    def __init__(self, width: int):
        super().__init__()
        self.down = nn.ModuleList([twice(3, width), twice(width, 2 * width)])
        self.middle = twice(2 * width, 4 * width)
        self.up = nn.ModuleList([twice(6 * width, 2 * width), twice(3 * width, width)])
        self.out = nn.Conv2d(width, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        passed = []
        for layer in self.down:
            x = layer(x)
            passed.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for layer, beside in zip(self.up, reversed(passed), strict=True):
            x = F.interpolate(x, beside.shape[2:], mode="bilinear", align_corners=False)
            x = layer(torch.cat([beside, x], 1))
        return self.out(x)


def main(
    epochs: int = 2,
    images: int = 320,
    batch: int = 8,
    size: int = 48,
    width: int = 8,
    eager: bool = False,
) -> float:
    """Train; returns the share of pixels of held-out images that are told right."""

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = UNet(width)
        return model, torch.optim.AdamW(model.parameters(), lr=2e-3)

    return run(make, lambda: loaders(discs, images, size, batch), epochs, eager)


if __name__ == "__main__":
    main(**options(__doc__, epochs=2, images=320, batch=8, size=48, width=8))
