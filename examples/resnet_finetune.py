"""Fine-tuning a ResNet: a new head on a frozen body first, then all of it, slowly.

The body comes from training on half of the classes; torchvision's weights would do as well.

python -m examples.resnet_finetune [--epochs 2] [--width 8] [--size 32] [--eager]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tracejit
from examples.images import CLASSES, loaders, make_step, options, stripes, train


class Block(nn.Module):
    """Two 3×3 convolutions around which the input is passed."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, four blocks, and a head on the mean over the image."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            Block(width, width, 1),
            Block(width, 2 * width, 2),
            Block(2 * width, 4 * width, 2),
            Block(4 * width, 4 * width, 1),
        )
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


class FrozenBody(nn.Module):
    """The network in training, but for its body: no gradients there, and batch norm as it is."""

    def __init__(self, model: ResNet):
        super().__init__()
        self.model = model

    def train(self, mode: bool = True) -> FrozenBody:
        super().train(mode)
        self.model.body.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


def half(data: DataLoader, *, shuffled: bool) -> DataLoader:
    """The images of the first half of the classes; shuffled, in whole batches."""
    x, y = data.dataset.tensors
    kept = TensorDataset(x[y < CLASSES // 2], y[y < CLASSES // 2])
    order = torch.Generator().manual_seed(0)
    return DataLoader(kept, data.batch_size, shuffled, drop_last=shuffled, generator=order)


def finetune(width: int, batches: DataLoader, held_out: DataLoader, epochs: int, compiled: bool):
    """Train a body, then a new head on it, then both; the accuracy after each of the three."""

    def fit(model: nn.Module, optimizer: torch.optim.Optimizer, data: DataLoader, test: DataLoader):
        step = make_step(model, optimizer)
        step = tracejit.compile(step) if compiled else step
        return train(step, model, data, test, epochs)

    torch.manual_seed(0)
    model = ResNet(width, CLASSES // 2)
    print(" body, on half of the classes")
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    known = half(batches, shuffled=True), half(held_out, shuffled=False)
    found = [fit(model, sgd, *known)]

    print(" new head, frozen body")
    model.head = nn.Linear(model.head.in_features, CLASSES)
    model.body.requires_grad_(False)
    adamw = torch.optim.AdamW(model.head.parameters(), lr=1e-2)
    found.append(fit(FrozenBody(model).train(), adamw, batches, held_out))

    print(" all of it")
    model.body.requires_grad_(True)
    groups = [
        {"params": model.body.parameters(), "lr": 0.01},
        {"params": model.head.parameters(), "lr": 0.02},
    ]
    found.append(fit(model.train(), torch.optim.SGD(groups, momentum=0.9), batches, held_out))
    return found


def main(
    epochs: int = 2,
    images: int = 800,
    batch: int = 32,
    size: int = 24,
    width: int = 8,
    eager: bool = False,
) -> float:
    """Fine-tune; returns the last accuracy on images that were held out."""
    found = []
    for name in ("tracejit", "eager")[: 1 + eager]:
        print(name)
        data = loaders(stripes, images, size, batch)
        found.append(finetune(width, *data, epochs, name == "tracejit"))
    return found[0][-1]


if __name__ == "__main__":
    main(**options(__doc__, epochs=2, images=800, batch=32, size=24, width=8))
