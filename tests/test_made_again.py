"""Activations that are made again for the gradient of a convolution's weights, not kept for it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tracejit
from support.plan_checks import check
from tracejit.ir.graph import verify
from tracejit.ir.text import parse
from tracejit.schedule import schedule
from tracejit.schedule.again import made_again
from tracejit.testing import assert_trains_like_eager

# Two products and the second one's gradients: by its weights and, through a normalization of the
# first one, by the first one's rows.
STEP = """
f(%0: f32[64,8], %1: f32[8,512], %2: f32[5,192], %3: f32[64,5]) {
  %4: f32[64,512] = matmul(%0, %1)
  %5: f32[64] = reduce_max(%4, axes=(1,))
  %6: f32[64,1] = reshape(%5, shape=(64, 1))
  %7: f32[64,512] = expand(%6, shape=(64, 512))
  %8: f32[64,512] = sub(%4, %7)
  %9: f32[64,512] = maximum(%8, -1.0)
  %10: f32[64,512,1] = reshape(%9, shape=(64, 512, 1))
  %11: f32[64,512,3] = expand(%10, shape=(64, 512, 3))
  %12: f32[64,510,3] = window(%11, axes=(1, 2), stride=1, dilation=1, count=510)
  %13: f32[64,3,510] = permute(%12, axes=(0, 2, 1))
  %14: f32[192,510] = reshape(%13, shape=(192, 510))
  %15: f32[5,510] = matmul(%2, %14)
  %16: f32[64,510] = matmul(%3, %15)
  %17: f32[64,512] = pad(%16, low=(0, 1), high=(0, 1), interior=(0, 0), value=0)
  %18: f32[510,192] = permute(%14, axes=(1, 0))
  %19: f32[5,192] = matmul(%15, %18)
  %20: b1[64,512] = le(%9, -1.0)
  %21: f32[64,512] = where(%20, 0.0, %17)
  %22: f32[64,512] = mul(%21, %4)
  %23: f32[64] = reduce_sum(%22, axes=(1,))
  return %19, %23
}
"""


def is_changed(text: str) -> bool:
    graph = parse(text)
    found = made_again(graph)
    verify(found)
    return found is not graph


def test_results_are_the_same_in_less_memory():
    graph = parse(STEP)
    auto, none = schedule(graph), schedule(graph, again=False)
    check(graph, auto)
    check(made_again(graph), schedule(graph, again=False))
    assert none.arena_bytes - auto.arena_bytes >= 64 * 512 * 4 - 4096


def test_copies_wait_for_the_gradient_that_meets_them():
    again = made_again(parse(STEP))
    (after,) = [node for node in again.nodes if node.op.name == "after"]
    product, gradient = after.args
    made = {node.out: node for node in again.nodes}
    assert [str(v) for v in made[product].args] == ["%0", "%1"]
    assert [str(v) for v in made[gradient].args] == ["%3", "%15"]


def without(text: str, *changes: tuple[str, str]) -> str:
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return text


LEFT = {
    "the product would be kept for this": [("mul(%21, %4)", "mul(%21, %17)")],
    "it is a result": [("return %19, %23", "return %19, %23, %8")],
    "what meets it is an input": [
        ("5]) {", "5], %99: f32[5,510]) {"),
        ("(%15, %18)", "(%99, %18)"),
    ],
    "it takes long": [
        (
            "%9: f32[64,512] = maximum(%8, -1.0)",
            "%98: f32[64,512] = exp(%8)\n  %9: f32[64,512] = exp(%98)",
        ),
    ],
    "nothing is normalized": [("sub(%4, %7)", "exp(%4)")],
}


@pytest.mark.parametrize("why", LEFT)
def test_what_is_left_as_it_is(why):
    assert is_changed(STEP)
    text = STEP
    for old, new in LEFT[why]:
        assert old in text
        text = text.replace(old, new)
    assert not is_changed(text)


def test_small_activations_are_kept():
    small = STEP.replace("512", "64").replace("510", "62")
    assert not is_changed(small)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.a = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.b = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)])
        self.by = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        y = self.norms[1](self.b(F.relu(self.norms[0](self.a(x)))))
        return F.relu(y + self.by(x))


class Branches(nn.Module):
    """Two readers of one activation, of which each is one itself, and a concatenation."""

    def __init__(self, width: int):
        super().__init__()
        self.parts = nn.ModuleList(nn.Conv2d(width, width, k, 1, k // 2) for k in (3, 5))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))
        self.last = nn.Conv2d(2 * width, width, 3, 1, 1)

    def forward(self, x):
        found = [F.relu(n(p(x))) for p, n in zip(self.parts, self.norms, strict=True)]
        return F.relu(self.last(torch.cat(found, 1)) + found[0])


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU()]
    body = [Branches(8), Branches(8)] if kind == "branches" else [Block(8, 8), Block(8, 16, 2)]
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(5))


def training(kind: str, dtype: torch.dtype = torch.float32) -> tuple:
    model = network(kind).to(dtype)
    x = torch.randn(8, 3, 24, 24).to(dtype)
    model(x)  # makes the last layer's weights
    y = torch.randint(5, (8,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, [*model.parameters()]


@pytest.mark.parametrize("backend", ["c", "numpy"])
@pytest.mark.parametrize("kind", ["blocks", "branches"])
def test_training_is_that_of_eager(kind, backend):
    compiled, *_ = assert_trains_like_eager(
        lambda: training(kind, torch.float64), calls=5, backend=backend, on_unsupported="raise"
    )
    assert is_changed(str(compiled.graph))


@pytest.mark.parametrize("kind", ["blocks", "branches"])
def test_a_network_takes_less_memory(kind):
    peaks = []
    for remat in ("auto", "none"):
        compiled = tracejit.compile(training(kind)[0], remat=remat)
        for _ in range(3):
            compiled()
        peaks.append(compiled.explain(measure=False).memory.arena)
    assert peaks[0] < 0.95 * peaks[1]
