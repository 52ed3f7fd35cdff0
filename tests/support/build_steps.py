"""Steps that are built in one process and run on the fake device in another. A program:

    python -m support.build_steps build|run NAME…

prints a line of JSON for each: {name: [the kernels that Triton compiled, the graphs that were
scheduled, how the step runs]}. A build does not tell what it scheduled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from unittest import mock

import torch
from torch import nn

import tracejit
from support.fake import FAKE
from tracejit.build import Posed
from tracejit.capture.bind import unwrap
from tracejit.capture.trace.posing import posing
from tracejit.ir.graph import Graph
from tracejit.runtime.triton_api import compilations
from tracejit.schedule import schedule
from tracejit.schedule.plan import Plan
from tracejit.testing import fake_device

CALLS = 12  # graphs are made in between


def network(device: str = "cpu") -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    with torch.device(device):
        model = nn.Sequential(nn.Linear(9, 17), nn.Tanh(), nn.Linear(17, 3))
        return model, torch.randn(12, 9), torch.randn(12, 3)


def trained(device: str, optimizer: Callable) -> Callable:
    """A training step, whose optimizer picks what it does by where its parameters are."""
    model, x, y = network(device)
    optimizer = optimizer(model.parameters())

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).pow(2).mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def adam(device: str) -> Callable:
    return trained(device, lambda p: torch.optim.Adam(p, lr=0.05))


def nadam(device: str) -> Callable:
    return trained(device, lambda p: torch.optim.NAdam(p, lr=0.05, momentum_decay=0.01))


def fused(device: str) -> Callable:
    return trained(device, lambda p: torch.optim.AdamW(p, lr=0.05, capturable=True))


def momentum(device: str) -> Callable:
    """With a schedule and a counter of the step's own."""
    model, x, y = network(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    counts = {"calls": 0}

    def step() -> torch.Tensor:
        counts["calls"] += 1
        optimizer.zero_grad(set_to_none=False)
        loss = (model(x) - y).pow(2).mean() * (1.0 / counts["calls"])
        loss.backward()
        optimizer.step()
        schedule.step()
        return loss.detach()

    return step


def batches(device: str) -> Callable:
    """A step of arguments, which are other ones in each call."""
    model, x, y = network(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).pow(2).mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    step.arguments = lambda: (x.clone(), y.clone())
    return step


def drops(device: str) -> Callable:
    """Random numbers, which torch draws on the GPU."""
    model, x, y = network(device)
    dropout, optimizer = nn.Dropout(0.3), torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (dropout(model(x)) - y).pow(2).mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def outside(device: str) -> Callable:
    """A loss on which backward is called outside; all its tensors are made on its device."""
    model, x, y = network(device)

    def loss_of() -> torch.Tensor:
        weights = torch.arange(3, device=x.device, dtype=x.dtype)
        assert x.is_cuda and not x.is_cpu
        return ((model(x) - y) * weights).pow(2).mean()

    return loss_of


def unaligned(device: str) -> Callable:
    """Inputs that do not begin at 16 bytes."""
    _, x, y = network(device)
    a, b = x.reshape(-1)[1:], y.reshape(-1)[3:]
    return lambda: (a * 2, b.sum())


def many(device: str) -> Callable:
    """Many parameters in one launch, some of which do not begin at 16 bytes."""
    with torch.device(device):
        memory = [torch.zeros(40 + n)[n % 2 :] for n in range(12)]
    parameters = [m.requires_grad_() for m in memory]
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer = torch.optim.AdamW(parameters, lr=0.1)

    def step() -> torch.Tensor:
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        return norm

    return step


def decides(device: str) -> Callable:
    """The step's Python reads values, and decides by one."""
    model, x, y = network(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> float:
        optimizer.zero_grad()
        loss = (model(x) - y).pow(2).mean()
        loss.backward()
        if torch.isfinite(loss):
            optimizer.step()
        return loss.item()

    return step


def selects(device: str) -> Callable:
    """A number of elements that values decide."""
    _, x, _ = network(device)
    return lambda: x[x > 0.5].sum()


STEPS = {
    f.__name__: f
    for f in (
        *(adam, batches, drops, nadam, fused, momentum, outside, unaligned, many, decides, selects),
    )
}


def arguments_of(step: Callable) -> tuple:
    """The arguments of a call."""
    return getattr(step, "arguments", tuple)()


def build(step: Callable) -> list:
    built = tracejit.compile(step, target="sm_90").build(*arguments_of(step))
    return [list(built.compiled), [], built.mode]


def run(step: Callable) -> list:
    """Calls on the fake device, whose tensors pose to be on a GPU as those of a build do."""
    compiled, scheduled = [], []
    function, _ = unwrap(step)

    def schedule_noted(graph: Graph, **options: object) -> Plan:
        scheduled.append(graph.name)
        return schedule(graph, **options)

    with (
        mock.patch("tracejit.pipeline.schedule", schedule_noted),
        fake_device(),
        compilations(compiled.append),
        posing(Posed(function, (), ())),
    ):
        step = tracejit.compile(step, backend=FAKE, on_unsupported="raise")
        kept = []  # so that no address comes again
        for _ in range(CALLS):
            kept.append(arguments_of(function))
            out = step(*kept[-1])
            if isinstance(out, torch.Tensor) and out.requires_grad:
                out.backward()
    return [compiled, scheduled, step.explain_mode()]


def main() -> None:
    how = {"build": build, "run": run}[sys.argv[1]]
    device = "meta" if "--meta" in sys.argv else "cpu"
    for name in sys.argv[2:]:
        if name != "--meta":
            print(json.dumps({name: how(STEPS[name](device))}), flush=True)


if __name__ == "__main__":
    main()
