"""Optimizers over many parameters of all sizes, as steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

import tracejit
from tracejit.schedule import schedule
from tracejit.schedule.plan import Plan

SIZES = (0, 1, 5, 123, 1000, 4096, 10_003, 64, 8, 12, 2048)

OPTIMIZERS: dict[str, Callable] = {
    "Adam": lambda ps, **o: torch.optim.Adam(ps, lr=1e-2, **o),
    "AdamW": lambda ps, **o: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1, **o),
    "SGD": lambda ps, **o: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, nesterov=True, **o),
    "RMSprop": lambda ps, **o: torch.optim.RMSprop(ps, lr=1e-2, momentum=0.5, **o),
}


class Updates:
    """A step that updates parameters by given gradients; `offset` elements behind the beginning of
    their memory."""

    def __init__(
        self,
        name: str = "Adam",
        sizes: Sequence[int] = SIZES,
        dtypes: Sequence[torch.dtype] = (torch.float32,),
        offset: int = 0,
        clip: float | None = None,
        **options: object,
    ):
        generator = torch.Generator().manual_seed(0)
        self.parameters, self.clip = [], clip
        for i, n in enumerate(sizes):
            dtype = dtypes[i % len(dtypes)]
            p, g = (
                torch.randn(n + offset, generator=generator).to(dtype)[offset:] for _ in range(2)
            )
            self.parameters.append(p.requires_grad_())
            p.grad = g
        self.optimizer = OPTIMIZERS[name](self.parameters, **options)
        self.norm = torch.zeros(())

    def step(self) -> torch.Tensor:
        if self.clip is not None:
            self.norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        return self.norm

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What it changes."""
        found = []
        for p in self.parameters:
            state = self.optimizer.state[p]
            found += [p.detach(), p.grad, *(state[key] for key in sorted(state))]
        return [t for t in found if isinstance(t, torch.Tensor)]


def close(ours: Sequence[torch.Tensor], eager: Sequence[torch.Tensor]) -> bool:
    """Whether tensors are equal up to rounding, of few calls."""
    return len(ours) == len(eager) and all(
        torch.allclose(a.double(), b.double(), *((1e-5, 1e-6) if b.itemsize > 2 else (2e-2, 1e-2)))
        for a, b in zip(ours, eager, strict=True)
    )


def large(
    count: int = 200, shape: tuple[int, ...] = (500, 500), clip: float | None = None
) -> Callable[[], object]:
    """Adam in the middle of a training, over memory that nobody touches."""
    parameters = [torch.zeros(shape, requires_grad=True) for _ in range(count)]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    for p in parameters:
        p.grad = torch.zeros(shape)
        optimizer.state[p] = {
            "step": torch.tensor(3.0),
            "exp_avg": torch.zeros(shape),
            "exp_avg_sq": torch.zeros(shape),
        }

    def step() -> None:
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()

    return step


def plan_of(step: Callable, *, gpu: bool = True) -> Plan:
    """The plan of a step's first call."""
    return schedule(tracejit.capture(step).optimized().graph, gpu=gpu)
