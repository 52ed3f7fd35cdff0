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
