"""Predicted times of whole steps on a GPU that need not be here, beside what no GPU can undercut.

    python -m benchmarks.predicted [--gpu H200] [--case NAME]…

A row per step: its launches, the sum of their predicted times (`tracejit/roofline.py`), the floor,
and the ratio of the two. The floor is one launch and the longer of two times: that of moving what
the step reads of its inputs and writes of its results once, and that of its products at the peak of
their unit (float32 with all its bits on the plain units, bfloat16 on tensor cores). Nothing is run:
kernels are compiled for the GPU's target, and the model says how long they take.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import nn

import tracejit
from examples import fused_chain, two_layer_autograd
from examples.gpt import GPT, Block
from tracejit.capture.trace.posing import posing
from tracejit.gpus import GPUS, LAUNCH, Gpu
from tracejit.report import report
from tracejit.roofline import rate
from tracejit.schedule import schedule
from tracejit.schedule.plan import Launch, Plan

HALF = torch.bfloat16


def perceptron(
    batch: int = 256,
    sizes: tuple[int, ...] = (784, 512, 512, 10),
    dtype: torch.dtype = torch.float32,
) -> Callable:
    """Cross-entropy, its gradients, SGD."""
    layers = [
        x for n, m in zip(sizes, sizes[1:], strict=False) for x in (nn.Linear(n, m), nn.ReLU())
    ]
    return _trained(
        nn.Sequential(*layers[:-1]).to(dtype), torch.zeros(batch, sizes[0], dtype=dtype)
    )


def rows(function: Callable, *shape: int) -> Callable:
    """Forward and backward of something that works on rows."""
    x, g = torch.zeros(shape, requires_grad=True), torch.zeros(shape)

    def step() -> torch.Tensor:
        x.grad = None
        y = function(x)
        y.backward(g)
        return y.detach()

    return step


class Bottleneck(nn.Module):
    """A ResNet-50 block of its third stage."""

    def __init__(self, channels: int = 512, width: int = 128):
        super().__init__()
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(channels, width, 1, bias=False),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.Conv2d(width, channels, 1, bias=False),
            ]
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(c.out_channels) for c in self.convs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y))
            y = F.relu(y + x if i == 2 else y)
        return y


def _trained(model: nn.Module, x: torch.Tensor) -> Callable:
    """Loss, gradients, SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    labels = x if x.dtype == torch.int64 else torch.zeros(len(x), dtype=torch.int64)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        y = model(x)
        loss = F.cross_entropy(y.flatten(0, -2), labels.flatten())
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _with_gradients(model: nn.Module, x: torch.Tensor) -> Callable:
    """Forward, backward, SGD."""
    optimizer, g = torch.optim.SGD(model.parameters(), lr=0.1), torch.zeros_like(x)
    x.requires_grad_()

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        x.grad = None
        y = model(x)
        y.backward(g)
        optimizer.step()
        return y.detach()

    return step


def _gpt2(layers: int = 12) -> Callable:
    model = GPT(50257, 1024, layers, 768, 12).to(HALF)
    return _trained(model, torch.zeros(4, 1024, dtype=torch.int64))


STEPS: dict[str, Callable[[], Callable]] = {
    "two layers": lambda: two_layer_autograd.make_step("zero_")[0],
    "chain of 64M": lambda: fused_chain.make_step(1 << 26)[0],
    "MLP": perceptron,
    "MLP of 4096, bf16": lambda: perceptron(8192, (4096, 4096, 4096, 1000), HALF),
    "layer norm 16384 × 4096": lambda: rows(lambda x: F.layer_norm(x, (4096,)), 16384, 4096),
    "softmax 16384 × 4096": lambda: rows(lambda x: x.softmax(-1), 16384, 4096),
    "transformer block 8 × 512 × 768, bf16": lambda: _with_gradients(
        Block(768, 12, 0.0).to(HALF), torch.zeros(8, 512, 768, dtype=HALF)
    ),
    "ResNet-50 block 32 × 512 × 28 × 28, bf16": lambda: _with_gradients(
        Bottleneck().to(HALF), torch.zeros(32, 512, 28, 28, dtype=HALF)
    ),
    "GPT-2 small, 4 × 1024, bf16": _gpt2,
}


@dataclass(frozen=True)
class Predicted:
    """Of a step on a GPU; seconds."""

    launches: int
    seconds: float
    floor: float

    @property
    def ratio(self) -> float:
        """Predicted time over the floor."""
        return self.seconds / self.floor


def predicted(plan: Plan, gpu: Gpu) -> Predicted:
    """Compile a plan's kernels, and ask the model."""
    rows = report(plan, target=gpu.target).rows
    return Predicted(
        sum(row.times for row in rows),
        sum(row.predicted[gpu.name].seconds * row.times for row in rows),
        floor(plan, gpu),
    )


def floor(plan: Plan, gpu: Gpu) -> float:
    """Seconds that a plan takes at least."""
    read = {b.name for launch in plan.launches for b in _accessed(plan, launch, "r")}
    moved = 0
    for buffer in plan.buffers:
        reads = buffer.kind == "input" and buffer.name in read
        writes = buffer.kind == "output" or buffer.name in plan.writes
        moved += (reads + writes) * buffer.type.nbytes
    products = sum(
        _products(one, gpu) * plan.times(launch)
        for launch in plan.launches
        for one in launch.alone()
    )
    return LAUNCH + max(moved / gpu.bandwidth, products)


def _accessed(plan: Plan, launch: Launch, how: str) -> list:
    pairs = zip(launch.kernel.buffers, launch.buffers, strict=True)
    return [plan.buffer(name) for buffer, name in pairs if how in buffer.access]


def _products(launch: Launch, gpu: Gpu) -> float:
    """Seconds of a kernel's products at the peak of their unit."""
    sizes = dict(zip(launch.kernel.sizes, launch.sizes, strict=True))

    def points(axes: list) -> int:
        return prod(sizes.get(axis.extent, axis.extent) for axis in axes)

    seconds = 0.0
    for stage in launch.kernel.stages:
        if stage.dot is not None:
            dtype = stage.dot.a_value.dtype.name
            count = 2 * points([*launch.kernel.axes, *stage.axes, stage.dot.k])
            seconds += count / rate(dtype, gpu, "ieee", True)
        if stage.attend is not None:
            m, n, c, d = (points([axis]) for axis in stage.attend.axes)
            batch = points([*launch.kernel.axes, *stage.axes])
            forward = stage.attend.is_forward
            count = 2 * batch * m * n * ((c + d) if forward else (3 * c + 2 * d))
            count /= 1 + stage.attend.causal
            seconds += count / rate(stage.attend.sides[0].value.dtype.name, gpu, "ieee", True)
    return seconds


def plan_of(make: Callable[[], Callable]) -> Plan:
    """The plan of a step for a GPU; nothing is run."""
    step = make()
    with posing(lambda _: "cuda:0"):  # passes ask where tensors are
        return schedule(tracejit.capture(step).optimized().graph, gpu=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gpu", choices=GPUS, default="H200")
    parser.add_argument("--case", action="append", choices=STEPS)
    given = parser.parse_args()
    print(f"{'step':42} {'launches':>8} {'predicted µs':>13} {'floor µs':>10} {'ratio':>6}")
    for name in given.case or STEPS:
        found = predicted(plan_of(STEPS[name]), GPUS[given.gpu])
        cells = f"{found.launches:8} {found.seconds * 1e6:13.1f} {found.floor * 1e6:10.1f}"
        print(f"{name:42} {cells} {found.ratio:6.2f}", flush=True)


if __name__ == "__main__":
    main()
