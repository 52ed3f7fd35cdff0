"""Time loops that draw random numbers in each step, as eager does: they become loops, with eager's
numbers in eager's order, and eager's generator afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tracejit
from support.capture_checks import randn
from support.scope import WHOLE
from tracejit.capture.trace.draws import Draw, Event, Together
from tracejit.compile import CompiledStep
from tracejit.testing import fake_device, losses_agree

B, D, H = 3, 5, 8
Tensor = torch.Tensor


class Recurrent(nn.Module):
    """`body(module, x, h)` is a step of the loop: what goes out, and what is carried."""

    def __init__(self, body: Callable) -> None:
        super().__init__()
        self.body = body
        self.cell, self.upper = nn.LSTMCell(D, H), nn.GRUCell(H, H)
        self.w, self.drop, self.out = nn.Linear(D + H, H), nn.Dropout(0.3), nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, outs = (x.new_zeros(len(x), H), x.new_zeros(len(x), H)), []
        for row in x.unbind(1):
            out, h = self.body(self, row, h)
            outs.append(out)
        return self.out(torch.stack(outs, 1))


def plain(m: Recurrent, x: Tensor, h: Tensor) -> tuple:
    new = m.drop(torch.tanh(m.w(torch.cat([x, h[0]], 1))))
    return new, (new, new)


def two_places(m: Recurrent, x: Tensor, h: Tensor) -> tuple:
    """A mask for what comes in, and one for what goes out."""
    new = m.cell(F.dropout(x, 0.2), h)
    return m.drop(new[0]), new


def one_module_twice(m: Recurrent, x: Tensor, h: Tensor) -> tuple:
    """Two masks in turn by one line."""
    lower, upper = h
    hidden = []
    for k, value in enumerate((lower, upper)):
        hidden.append(m.upper(value if k == 0 else hidden[0], m.drop(value)))
    return hidden[1] + x.sum(), tuple(hidden)


def noise(m: Recurrent, x: Tensor, h: Tensor) -> tuple:
    new = m.cell(x + 0.1 * torch.randn_like(x), h)
    return new[0] + torch.rand(B, H), new


def a_sample(m: Recurrent, x: Tensor, h: Tensor) -> tuple:
    """As a variational RNN does."""
    mean = torch.tanh(m.w(torch.cat([x, h[0]], 1)))
    z = torch.distributions.Normal(mean, mean.exp(), validate_args=False).rsample()
    new = m.upper(z, h[0])
    return new * torch.bernoulli(torch.full_like(new, 0.7)), (new, new)


def transposed(m: Recurrent, x: Tensor, h: Tensor) -> tuple:
    """A mask in another order of memory."""
    new = m.cell(x, h)
    return F.dropout(new[0].T, 0.3).T, new


BODIES = (plain, two_places, one_module_twice, noise, a_sample, transposed)


def training(body: Callable, steps: int, rows: int = B) -> Callable[[], Tensor]:
    torch.manual_seed(0)
    model, x = Recurrent(body), randn(rows, steps, D)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def check_like_eager(make: Callable[[], Callable], calls: int = 7, **options) -> CompiledStep:
    """Losses from one seed, and the generator afterwards."""
    step, compiled = make(), tracejit.compile(make(), **options)
    torch.manual_seed(5)
    expected = [step().item() for _ in range(calls)]
    state = torch.get_rng_state()
    torch.manual_seed(5)
    found = [compiled().item() for _ in range(calls)]
    assert torch.equal(torch.get_rng_state(), state)
    assert len({*expected}) == calls
    for ours, eager in zip(found, expected, strict=True):
        assert losses_agree(ours, eager, expected[0]), (found, expected)
    assert compiled.stats.replays >= 3, compiled.explain_mode()
    return compiled


@pytest.mark.sweep(0.17)
@pytest.mark.parametrize("body", BODIES)
def test_numbers_are_eagers(body):
    compiled = check_like_eager(lambda: training(body, 20))
    assert compiled.plans[-1].loops


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.sweep(1)
def test_plans_do_not_grow(body):
    """As many nodes, launches and inputs for 16 steps as for 64, and 256."""
    found = set()
    for steps in (16, 64, 256) if WHOLE else (16, 64):
        compiled = tracejit.compile(training(body, steps))
        compiled()
        (plan,) = compiled.plans
        (kept,) = compiled._programs.kept
        inputs = sum(b.kind == "input" for b in plan.buffers)
        found.add((len(kept.final.nodes), len(plan.launches), len(compiled.kernels), inputs))
    assert len(found) == 1, found


def test_the_text_of_a_replay_does_not_grow():
    texts = []
    for steps in (16, 64):
        compiled = tracejit.compile(training(two_places, steps))
        for _ in range(4):
            compiled()
        (replay,) = compiled._replays
        texts.append(replay.run.text)
    assert len(texts[0].splitlines()) == len(texts[1].splitlines())


def test_large_masks_are_drawn_by_c():
    check_like_eager(lambda: training(two_places, 12, rows=40))


def test_a_chance_of_each_call():
    """A runtime scalar in what is drawn."""
    torch.manual_seed(0)
    models = [Recurrent(plain)]
    models.append(copy.deepcopy(models[0]))
    x = randn(B, 20, D)

    def steps(model):
        def step(p):
            model.zero_grad()
            model.drop.p = 0.0
            h, outs = x.new_zeros(B, H), []
            for row in x.unbind(1):
                h = F.dropout(torch.tanh(model.w(torch.cat([row, h], 1))), p)
                outs.append(h)
            loss = model.out(torch.stack(outs, 1)).square().mean()
            loss.backward()
            return loss.detach(), model.w.weight.grad.clone()

        return step

    eager, compiled = steps(models[0]), tracejit.compile(steps(models[1]))
    for i in range(8):
        p = 0.1 + 0.05 * i
        torch.manual_seed(i)
        expected, state = eager(p), None
        state = torch.get_rng_state()
        torch.manual_seed(i)
        for ours, his in zip(compiled(p), expected, strict=True):
            torch.testing.assert_close(ours, his)
        assert torch.equal(torch.get_rng_state(), state)
    assert compiled.stats.replays >= 3 and compiled.plans[-1].loops


def test_a_mask_that_is_read_outside_of_the_loop_too():
    """A value that Python reads in the middle, and returned masks, leave the numbers eager's."""
    torch.manual_seed(0)
    w = nn.Parameter(randn(H, H) / 3)

    def make():
        x = randn(B, H)

        def step():
            w.grad = None
            h, masks = x, []
            for _ in range(16):
                mask = torch.rand(B, H)
                masks.append(mask)
                h = torch.tanh(h @ w) * mask
            loss = h.square().mean()
            if loss.item() < 0:
                return masks
            loss.backward()
            return loss.detach(), masks[3], w.grad.clone()

        return step

    torch.manual_seed(1)
    step = make()
    compiled = tracejit.compile(step)
    for i in range(6):
        torch.manual_seed(i)
        expected = step()
        torch.manual_seed(i)
        for ours, his in zip(compiled(), expected, strict=True):
            torch.testing.assert_close(ours, his)
    assert compiled.stats.replays >= 2


def drawn(step: Callable) -> tuple[Event, ...]:
    compiled = tracejit.compile(step)
    for _ in range(4):
        compiled()
    return compiled._replays[0].captured.draws


def test_rows_are_used_where_a_loop_reads_them():
    """Layers with weights of their own are no loop, and their masks stay apart."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(H, H), nn.Dropout(0.2)) for _ in range(12)))
    x = randn(B, H)

    def deep():
        layers.zero_grad()
        loss = layers(x).square().mean()
        loss.backward()
        return loss.detach()

    draws = drawn(deep)
    assert len(draws) == 12 and all(type(x) is Draw for x in draws)
    draws = drawn(training(plain, 12))
    assert [type(x) for x in draws] == [Draw] * 12 + [Together]
    assert draws[-1].rows == tuple(range(12)) and draws[-1].type.shape == (12, B, H)


@pytest.mark.parametrize("body", [two_places, noise])
def test_on_the_fake_device(body):
    losses = []
    with fake_device(compiled=False) as device:
        for backend in (device.name, "numpy"):
            step = tracejit.compile(training(body, 12), backend=backend)
            torch.manual_seed(4)
            losses.append([step() for _ in range(5)])
            assert step.stats.replays >= 2
    for mine, his in zip(*losses, strict=True):
        torch.testing.assert_close(mine, his)
