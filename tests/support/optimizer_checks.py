"""Training steps with an optimizer in them, against eager in lockstep (§9 of the design).

Three copies of a step train side by side: eager, compiled, and eager in float64. Before each call
the latter two get eager's parameters, gradients and optimizer state; afterwards everything that a
user can see is compared: returned values, parameters, `.grad`, state, param_groups, schedulers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import tracejit
from tracejit.capture.trace.scalars import TracedFloat
from tracejit.compile import CompiledStep
from tracejit.equality import Magnitudes
from tracejit.testing import _compare, _visible

FOREACH = (True, False, None)
# Options, and how many plans: one where the first step is like the others, two where state is made
# on the first, and one more for a branch on the step counter.
OPTIMIZERS: dict[str, list[tuple[dict, int]]] = {
    "SGD": [
        ({"lr": 0.1}, 1),
        ({"lr": 0.1, "maximize": True, "weight_decay": 0.1}, 1),
        ({"lr": 0.1, "momentum": 0.9, "dampening": 0.2}, 2),
        ({"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, 2),
    ],
    "Adam": [({}, 2), ({"amsgrad": True, "weight_decay": 0.1, "maximize": True}, 2)],
    "AdamW": [({"lr": 0.01}, 2), ({"amsgrad": True, "betas": (0.5, 0.9)}, 2)],
    "Adamax": [({"weight_decay": 0.1}, 2)],
    "NAdam": [({}, 2), ({"weight_decay": 0.1, "decoupled_weight_decay": True}, 2)],
    "RAdam": [({}, 3), ({"weight_decay": 0.1, "betas": (0.8, 0.99)}, 3)],  # rectified from 6 on
    "RMSprop": [({}, 2), ({"centered": True, "momentum": 0.9, "weight_decay": 0.1}, 2)],
    "Adagrad": [({"lr_decay": 0.01, "weight_decay": 0.1}, 1)],
    "Adadelta": [({"weight_decay": 0.1}, 2)],
    "Rprop": [({}, 2)],
    "ASGD": [({"t0": 20, "weight_decay": 0.1}, 3)],  # averages from step t0 + 2 on
    "Adafactor": [({"weight_decay": 0.1}, 3)],  # from step 3 on, lerp weighs from the other end
}


@dataclass
class Training:
    """One copy of a step with what it trains."""

    step: Callable[[], torch.Tensor]
    parameters: list[torch.Tensor]
    optimizers: list[Optimizer]
    schedulers: list[LRScheduler] = field(default_factory=list)
    between: Callable[[int], object] = lambda call: None  # outside the step, before each call

    def state(self) -> list[torch.Tensor]:
        """The tensors of the optimizers' state, in order."""
        return [
            value
            for optimizer in self.optimizers
            for p in self.parameters
            for _, value in sorted(optimizer.state.get(p, {}).items())
            if isinstance(value, torch.Tensor)
        ]

    def rates(self) -> list[torch.Tensor]:
        """Hyperparameters that are tensors."""
        return [
            value
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for value in group.values()
            if isinstance(value, torch.Tensor)
        ]

    def numbers(self) -> list:
        """Everything else in param_groups and schedulers, as plain Python sees it."""
        groups = [
            {k: v for k, v in group.items() if k != "params" and not isinstance(v, torch.Tensor)}
            for optimizer in self.optimizers
            for group in optimizer.param_groups
        ]
        return [*groups, *(plain_state(s) for s in self.schedulers)]


def plain_state(scheduler: LRScheduler) -> dict:
    """A scheduler's state without tensors and functions."""

    def plain(x: object) -> object:
        if isinstance(x, torch.Tensor):
            return round(x.item(), 5)
        if isinstance(x, (list, tuple)):
            return [plain(item) for item in x]
        if isinstance(x, dict):
            return {k: plain(v) for k, v in x.items()}
        return None if callable(x) else x

    return plain(scheduler.state_dict())


def weights(dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """A matrix and a vector to train, and data: odd shapes."""
    g = torch.Generator().manual_seed(7)
    shapes = (5, 3), (7,), (4, 5), (4, 3)
    w, v, x, y = (torch.randn(*shape, generator=g).to(device, dtype) for shape in shapes)
    return w.requires_grad_(), v.requires_grad_(), x, y


def loss_of(w: torch.Tensor, v: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (torch.tanh(x @ w) - y).pow(2).mean() + (v - 0.3).pow(2).sum() * 0.1


def update_of(optimizer: Optimizer, *tensors: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A step that makes the gradients of `loss_of(*tensors)` afresh and updates with them."""

    def step():
        optimizer.zero_grad()
        loss = loss_of(*tensors)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


Make = Callable[[torch.dtype], Training]


def training(
    make_optimizer: Callable[[list[torch.Tensor]], Optimizer], device: str = "cpu"
) -> Make:
    """A step that makes gradients afresh and updates two parameters."""

    def make(dtype: torch.dtype) -> Training:
        w, v, x, y = weights(dtype, device)
        optimizer = make_optimizer([w, v])

        return Training(update_of(optimizer, w, v, x, y), [w, v], [optimizer])

    return make


def _follow(other: Training, eager: Training) -> None:
    """Give a copy eager's tensors."""
    for name in ("parameters", "state", "rates"):
        mine, its = getattr(other, name), getattr(eager, name)
        mine, its = (mine, its) if name == "parameters" else (mine(), its())
        assert len(mine) == len(its), f"{name}: {len(mine)} tensors, eager has {len(its)}"
        for a, b in zip(mine, its, strict=True):
            a.data.copy_(b.data)
            if a.is_leaf and b.is_leaf and a.grad is not None and b.grad is not None:
                a.grad.copy_(b.grad)


def _traced(x: object) -> Iterator[TracedFloat]:
    """Floats of a trace that user objects still hold."""
    if isinstance(x, (list, tuple, dict)):
        for item in x.values() if isinstance(x, dict) else x:
            yield from _traced(item)
    elif isinstance(x, TracedFloat):
        yield x


class _Later(Magnitudes):
    """Magnitudes that are computed where they are needed: they only loosen the comparison."""

    compute: Callable[[], None]

    def __call__(self, *run: object) -> Callable[[], None]:
        self.compute = super().__call__(*run)
        return lambda: None


def lockstep(make: Make, *, compiles: int, calls: int = 50, **options: object) -> CompiledStep:
    """Compare all calls; at most `compiles` plans may be built. Returns the compiled step."""
    eager, ours, exact = make(torch.float32), make(torch.float32), make(torch.float64)
    step = tracejit.compile(ours.step, **{"mode": "rerun", "backend": "numpy"} | options)
    for call in range(calls):
        for copy in (eager, ours, exact):
            copy.between(call)
        _follow(ours, eager)
        _follow(exact, eager)
        seen = []
        for copy in (exact, eager):
            returned = copy.step()
            seen.append(_visible(returned, [*copy.parameters, *copy.state()]))
        magnitudes = step.observer = _Later()
        returned = step()
        found = _visible(returned, [*ours.parameters, *ours.state()])
        try:
            _compare(call, found, seen[1], seen[0], magnitudes)
        except AssertionError:
            magnitudes.compute()
            _compare(call, found, seen[1], seen[0], magnitudes)
        assert ours.numbers() == eager.numbers(), f"call {call}"
        assert not list(_traced(ours.numbers())), f"call {call}"
        for a, b in zip(ours.rates(), eager.rates(), strict=True):
            torch.testing.assert_close(a, b)
    assert step.stats.compiles <= compiles, f"{step.stats.compiles} plans"
    assert step.stats.traces + step.stats.replays == calls
    return step
