"""Time loops with several losses, and with backward in the middle: they become loops too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tracejit
from support.capture_checks import randn
from support.scope import WHOLE
from tracejit.testing import assert_trains_like_eager

B, D, H = 3, 5, 4
Tensor = torch.Tensor


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.u, self.out = nn.Linear(D, H), nn.Linear(H, H, bias=False), nn.Linear(H, 2)

    def cell(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.w(x) + self.u(h))

    def loss(self, h: Tensor) -> Tensor:
        return self.out(h).square().mean()


def losses_of(m: Net, x: Tensor) -> list[Tensor]:
    h, losses = x.new_zeros(len(x), H), []
    for row in x.unbind(1):
        h = m.cell(row, h)
        losses.append(m.loss(h))
    return losses


def summed(m: Net, x: Tensor, update: Callable) -> Tensor:
    loss = sum(losses_of(m, x))
    loss.backward()
    update()
    return loss


def weighted(m: Net, x: Tensor, update: Callable) -> Tensor:
    """Later losses count more: their cotangents are a chain of products, which is emitted before
    the backward of the cells, and becomes a loop with it."""
    loss = x.new_zeros(())
    for one in losses_of(m, x):
        loss = 0.9 * loss + one
    loss.backward()
    update()
    return loss


def averaged(m: Net, x: Tensor, update: Callable) -> Tensor:
    """A running mean, in the loop of the cells."""
    h, mean = x.new_zeros(len(x), H), x.new_zeros(())
    for row in x.unbind(1):
        h = m.cell(row, h)
        mean = mean * 0.95 + m.loss(h) * 0.05
    mean.backward()
    update()
    return mean


def weighted_rows(m: Net, x: Tensor, update: Callable) -> Tensor:
    """A decayed sum for each sequence of the batch, by a rate that is a tensor."""
    h, total, rate = x.new_zeros(len(x), H), x.new_zeros(len(x)), torch.tensor([0.9, 0.5, 0.99])
    for row in x.unbind(1):
        h = m.cell(row, h)
        total = rate * total + m.out(h).square().mean(-1)
    total.mean().backward()
    update()
    return total.mean()


def at_once(m: Net, x: Tensor, update: Callable) -> Tensor:
    losses = losses_of(m, x)
    torch.autograd.backward(losses)
    update()
    return torch.stack([loss.detach() for loss in losses]).mean()


def gradients_of_all(m: Net, x: Tensor, update: Callable) -> Tensor:
    losses, parameters = losses_of(m, x), list(m.parameters())
    for p, g in zip(parameters, torch.autograd.grad(losses, parameters), strict=True):
        p.grad = g
    update()
    return losses[-1]


def each_alone(m: Net, x: Tensor, update: Callable) -> Tensor:
    """The graph ends with each step."""
    h, total = x.new_zeros(len(x), H), 0.0
    for row in x.unbind(1):
        h = m.cell(row, h.detach())
        loss = m.loss(h)
        loss.backward()
        total = total + loss.detach()
    update()
    return total


def online(m: Net, x: Tensor, update: Callable) -> Tensor:
    """An update after each step."""
    h, total = x.new_zeros(len(x), H), 0.0
    for row in x.unbind(1):
        h = m.cell(row, h.detach())
        loss = m.loss(h)
        loss.backward()
        total = total + loss.detach()
        update()
        m.zero_grad()
    return total


def truncated(m: Net, x: Tensor, update: Callable, steps: int = 4) -> Tensor:
    """As it is written most often: backward and an update every few steps."""
    h, loss, total = x.new_zeros(len(x), H), 0.0, 0.0
    for t in range(x.shape[1]):
        h = m.cell(x[:, t], h)
        loss = loss + m.loss(h)
        if t % steps == steps - 1:
            loss.backward()
            update()
            m.zero_grad()
            total = total + loss.detach()
            h, loss = h.detach(), 0.0
    return total


def in_chunks(m: Net, x: Tensor, update: Callable) -> Tensor:
    """Gradients add up over chunks of sixteen steps, whose loss is over all rows."""
    h, total = x.new_zeros(len(x), H), 0.0
    for chunk in x.split(16, 1):
        h, outs = h.detach(), []
        for row in chunk.unbind(1):
            h = m.cell(row, h)
            outs.append(h)
        loss = F.mse_loss(m.out(torch.stack(outs, 1)), chunk[..., :2])
        loss.backward()
        total = total + loss.detach()
    update()
    return total


def training(loop: Callable, steps: int) -> Callable:
    def make_step() -> tuple[Callable[[], Tensor], list[Tensor]]:
        torch.manual_seed(0)
        m, x = Net(), randn(B, steps, D)
        optimizer = torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.5)

        def step() -> Tensor:
            optimizer.zero_grad()
            return loop(m, x, optimizer.step).detach()

        return step, list(m.parameters())

    return make_step


FIXED = (summed, weighted, averaged, weighted_rows, at_once, gradients_of_all, each_alone, online)
LONG = (256, 320) if WHOLE else ()
LOOPS = (*FIXED, truncated, in_chunks)


def size_of(step: Callable) -> tuple[int, ...]:
    """Of what is compiled: nodes with those of bodies, launches, kernels."""
    compiled = tracejit.compile(step)
    compiled()
    (kept,) = compiled._programs.kept
    bodies = [n.attr("body") for n in kept.final.nodes if n.op.name == "scan"]
    assert bodies
    count = len(kept.final.nodes) + sum(len(body.nodes) for body in bodies)
    return count, len(compiled.plans[-1].launches), len(compiled.kernels)


@pytest.mark.parametrize("loop", FIXED)
@pytest.mark.sweep(1)
def test_plans_do_not_grow(loop):
    assert len({size_of(training(loop, steps)()[0]) for steps in (16, 64, *LONG)}) == 1


@pytest.mark.parametrize("loop", [truncated, in_chunks])
def test_chunks_are_a_loop_from_eight_on(loop):
    """Fewer are as many loops, or unrolled where they are short: so the size is bounded."""
    few, *many = (64, 96, *LONG) if loop is truncated else (176, 208, *LONG)
    sizes = {size_of(training(loop, steps)()[0]) for steps in (few, *many)}
    assert len(sizes) == 1


@pytest.mark.sweep(0.17)
@pytest.mark.parametrize("loop", LOOPS)
def test_trains_like_eager(loop):
    compiled, *_ = assert_trains_like_eager(training(loop, 48), calls=6)
    assert compiled.stats.replays >= 3, compiled.explain_mode()
    assert compiled.plans[-1].loops
