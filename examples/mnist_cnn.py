"""Two convolutions and two linear layers on images of 28×28, as people train them on MNIST.

With torchvision and MNIST's files in data/ these are digits, else stripes.

python -m examples.mnist_cnn [--epochs 3] [--width 16] [--eager]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from examples.images import CLASSES, digits, loaders, options, run


class Net(nn.Module):
    """Conv, conv, pool, dropout, linear, dropout, linear."""

    def __init__(self, width: int, size: int):
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3)
        self.conv2 = nn.Conv2d(width, 2 * width, 3)
        self.dropout1, self.dropout2 = nn.Dropout(0.25), nn.Dropout(0.5)
        self.fc1 = nn.Linear(2 * width * (size // 2 - 2) ** 2, 64)
        self.fc2 = nn.Linear(64, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = torch.flatten(self.dropout1(x), 1)
        return self.fc2(self.dropout2(F.relu(self.fc1(x))))


def main(
    epochs: int = 3,
    images: int = 2000,
    batch: int = 64,
    size: int = 28,
    width: int = 8,
    eager: bool = False,
) -> float:
    """Train; returns the accuracy on images that were held out."""

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = Net(width, size)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

    return run(make, lambda: loaders(digits, images, size, batch), epochs, eager)


if __name__ == "__main__":
    main(**options(__doc__, epochs=3, images=2000, batch=64, size=28, width=8))
