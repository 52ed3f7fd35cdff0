"""Pictures of steps for the tests, made by hand and by compiling."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import nn

import tracejit
from tracejit.pictures.picture import (
    BACKWARD,
    FORWARD,
    UPDATE,
    Line,
    Picture,
    PictureKernel,
    PictureNode,
)


class Net(nn.Module):
    """Two layers in blocks, and one that is called twice."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.blocks[0](x))


def net_step():
    """A compiled training step of a small net, called; with its model."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x, y = torch.randn(5, 6), torch.tensor([0, 2, 1, 1, 0])

    @tracejit.compile
    def step():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    for _ in range(4):
        step()
    return step, model


def made_up(count: int, seed: int = 0, *, modules: bool = True) -> Picture:
    """A picture of so many nodes with random edges and names."""
    rng = random.Random(seed)
    nodes: list[PictureNode] = []
    for i in range(count):
        lane = (FORWARD, BACKWARD, UPDATE)[3 * i // count]
        near = range(max(0, i - rng.choice([2, 5, 200])), i)
        operands = tuple(sorted(rng.sample(near, min(len(near), rng.choice([0, 1, 1, 2, 3])))))
        depth = 40 * i // count
        way = ("model", "blocks", f"{depth // 4}", f"part{depth % 4}") if modules else ()
        shape = tuple(rng.choice([1, 7, 64, 1000]) for _ in range(rng.choice([0, 1, 2, 4])))
        size = 4
        for n in shape:
            size *= n
        name, op = (f"w{i}", "input") if not operands and i else (f"op_{i}", rng.choice(OPS))
        leaves = (f"writes model.blocks.{i}.weight",) if i % 97 == 50 else ()
        kernels = tuple(sorted({i // 25, (i + 5) // 25})) if op != "input" else ()
        text = f"f32[{','.join(map(str, shape))}]"
        line = Line("made_up.py", 10 + i // 30, "step")
        nodes.append(
            PictureNode(
                *(name, op, text, shape, "f32", size, lane, way, "Block", line),
                operands=operands,
                kernels=kernels,
                free=op in ("reshape", "permute"),
                leaves=leaves,
            )
        )
    kernels = tuple(
        PictureKernel(f"k{k}", ("made_up.py:10",), f"void kernel{k}() {{ a < b; }}", "C", ())
        for k in range(2 + count // 25)
    )
    home = Line("made_up.py", 1, "step")
    return Picture("made_up", "cpu", home, (("mode", "replay"),), tuple(nodes), kernels)


OPS = ("matmul", "add", "mul", "reduce_sum", "exp", "reshape", "permute", "where")


def overlapping(boxes: Sequence[tuple[float, float, float, float]]) -> list[tuple]:
    """Pairs of boxes that share more than a hair."""
    found, rows = [], sorted(boxes, key=lambda b: b[1])
    for i, a in enumerate(rows):
        for b in rows[i + 1 :]:
            if b[1] >= a[1] + a[3] - 0.2:
                break
            if a[0] < b[0] + b[2] - 0.2 and b[0] < a[0] + a[2] - 0.2:
                found.append((a, b))
    return found
