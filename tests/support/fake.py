"""Steps and worlds on the fake device."""

from __future__ import annotations

from collections.abc import Callable

import torch

import tracejit
from tracejit.compile import CompiledStep
from tracejit.runtime.fake_device import FakeDevice

FAKE = "fake:sm_90"


def trained(
    make: Callable = torch.optim.SGD, seed: int = 0, **options: object
) -> tuple[Callable, list[torch.Tensor], torch.optim.Optimizer]:
    """A step of a small network that returns its loss, its parameters, and the optimizer."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(9, 17), torch.nn.Tanh(), torch.nn.Linear(17, 3))
    x, y = torch.randn(12, 9), torch.randn(12, 3)
    optimizer = make(model.parameters(), **{"lr": 0.05} | options)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).pow(2).mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, [*model.parameters()], optimizer


def trained_on_streams(device: FakeDevice, streams: list[int], **options: object) -> list:
    """Losses, weights and velocities of two networks that one plan trains by 100 calls each, each
    network on a stream of its own."""
    torch.manual_seed(3)
    nets = [
        (torch.randn(65, 33), torch.zeros(65, 33), torch.randn(40, 65), torch.randn(40, 33))
        for _ in range(2)
    ]

    def train(w, velocity, x, y, lr: float) -> torch.Tensor:
        with torch.enable_grad():
            w.requires_grad_()
            loss = (x @ w - y).pow(2).mean()
            (g,) = torch.autograd.grad(loss, w)
        with torch.no_grad():
            velocity.mul_(0.9).add_(g)
            w.sub_(velocity * lr)
        return loss.detach()

    for w, *_ in nets:
        w.requires_grad_()
    step = tracejit.compile(train, backend=FAKE, **options)
    losses = []
    for call in range(100):
        for net, stream in zip(nets, streams, strict=True):
            with device.on(stream):
                losses.append(step(*net, 0.01 + 0.0001 * (call // 7)))
    assert step.stats.compiles == 1 and step.stats.replays >= 190, step.explain_mode()
    device.synchronize()
    return [*losses, *(t for net in nets for t in net[:2])]


def warm(step: Callable, calls: int = 5, **options: object) -> CompiledStep:
    """A step compiled for the fake device, that replays."""
    compiled = tracejit.compile(step, backend=FAKE, **options)
    for _ in range(calls):
        compiled()
    assert compiled.stats.replays >= 1, compiled.explain_mode()
    return compiled


def log_of(device: FakeDevice, call: Callable[[], object]) -> list[str]:
    """What a call gives to the device."""
    device.log.clear()
    call()
    return [*device.log]
