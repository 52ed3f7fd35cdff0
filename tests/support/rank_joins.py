"""Training under `join()` with uneven inputs, for the processes of `ranks.py`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as distributed
import torch.nn as nn
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import tracejit
from support.rank_models import Chosen

EPOCHS = (5, 8), (7, 3), (2, 2), (0, 2)  # how many inputs ranks have


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def _normed() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def _sharded(model: nn.Module) -> torch.optim.Optimizer:
    return ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.01)


def _plain(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def _part(model, optimizer, x):
    """Another part on each rank."""
    optimizer.zero_grad()
    model(x, (0, 1 + distributed.get_rank() % 2)).square().mean().backward()
    optimizer.step()


def _accumulating(model, optimizer, x):
    optimizer.zero_grad()
    with model.no_sync():
        model(x).square().mean().backward()
    model(x * 2).square().mean().backward()
    optimizer.step()


def _by_values(model, optimizer, x):
    """The norm of the averaged gradients decides."""
    optimizer.zero_grad()
    model(x).square().mean().backward()
    if torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item() > 0.01:
        optimizer.step()


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module] = _mlp
    optimizer: Callable = _sgd
    step: Callable = _plain
    by_all: tuple[bool, ...] = (True, True, True, True)  # in each epoch
    enabled: tuple[bool, ...] = (True, True, True, True)
    options: dict = field(default_factory=dict)
    shards: bool = False


CASES = {
    "plain": Case(options={"bucket_cap_mb": 0.0002}),
    "divided by those that are left": Case(by_all=(False, False, False, False)),
    # where it is not enabled, eager divides by what it has counted last
    "one way and the other": Case(
        by_all=(False, True, True, False), enabled=(True, True, False, True)
    ),
    "buffers": Case(make=_normed),
    "unused": Case(make=Chosen, step=_part, options={"find_unused_parameters": True}),
    "accumulation": Case(step=_accumulating),
    "by values": Case(step=_by_values, by_all=(True, False, False, True)),
    "zero": Case(optimizer=_sharded, shards=True),
}


def trained(name: str) -> dict[str, object]:
    """Train twice, eagerly and compiled, in several epochs; what is to be asserted."""
    case = CASES[name]
    (eager, _), (ours, step) = (_trained(case, compiled) for compiled in (False, True))
    first = ours.clone()
    distributed.broadcast(first, 0)
    return {
        "difference": float((eager - ours).norm() / eager.norm()),
        "same on ranks": torch.equal(ours, first),
        "replays": step.stats.replays,
        "eager": step.stats.eager,
        "why": step.explain_mode(),
    }


def _trained(case: Case, compiled: bool) -> tuple[torch.Tensor, Callable]:
    torch.manual_seed(0)
    model = DistributedDataParallel(case.make(), **case.options)
    optimizer = case.optimizer(model)

    def step(x):
        case.step(model, optimizer, x)

    if compiled:
        step = tracejit.compile(step, on_unsupported="raise")
    mine = distributed.get_rank()
    torch.manual_seed(1 + mine)
    joinables = [model, optimizer] if case.shards else [model]
    with warnings.catch_warnings():
        for counts, by_all, enabled in zip(EPOCHS, case.by_all, case.enabled, strict=True):
            with Join(joinables, enabled, divide_by_initial_world_size=by_all):
                for _ in range(counts[mine % 2]):
                    step(torch.randn(4, 6))
    state = [x.detach().flatten().double() for x in model.state_dict().values()]
    return torch.cat(state), step


def throws() -> list[str]:
    """What is raised where one rank has no more inputs, eagerly and compiled; and the state."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = DistributedDataParallel(_mlp())
        optimizer = _sgd(model)

        def plain(x, model=model, optimizer=optimizer):
            _plain(model, optimizer, x)

        step = tracejit.compile(plain) if compiled else plain
        before, said = [], ""
        try:
            with warnings.catch_warnings(), model.join(throw_on_early_termination=True):
                for _ in range(4 + 2 * distributed.get_rank()):
                    before = [p.detach().clone() for p in model.parameters()]
                    step(torch.ones(4, 6))
        except RuntimeError as error:
            said = str(error)
        unchanged = all(map(torch.equal, before, model.parameters()))
        found.append(f"{said} {unchanged if distributed.get_rank() else ''}")
        distributed.barrier()
    return found


def eagerly() -> tuple[float, int]:
    """Steps that have no rule run eagerly under `join()`, on all ranks."""

    def sparse(model, optimizer, x):
        _plain(model, optimizer, x.to_sparse().to_dense())

    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = DistributedDataParallel(_mlp())
        optimizer = _sgd(model)

        def plain(x, model=model, optimizer=optimizer):
            sparse(model, optimizer, x)

        step = tracejit.compile(plain, on_unsupported="eager") if compiled else plain
        torch.manual_seed(1 + distributed.get_rank())
        with warnings.catch_warnings(), model.join():
            warnings.simplefilter("ignore")
            for _ in range(3 + 2 * distributed.get_rank()):
                step(torch.randn(4, 6))
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return float((found[0] - found[1]).norm()), step.stats.eager


def left() -> tuple[str, float]:
    """A rank leaves a step with an exception, while another one has joined."""
    model = DistributedDataParallel(_mlp())
    optimizer = _sgd(model)

    def plain(x, bad):
        _plain(model, optimizer, x)
        if bad:
            raise ValueError("bad")

    step = tracejit.compile(plain, on_unsupported="raise")
    started, said = time.perf_counter(), ""
    try:
        with warnings.catch_warnings(), model.join():
            for k in range(3 + 3 * distributed.get_rank()):
                started = time.perf_counter()
                step(torch.ones(4, 6), k == 5)
    except (RuntimeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
    return said, time.perf_counter() - started


def by_hand() -> tuple[str, float]:
    """A collective of the step's own under `join()`, which nobody would answer."""
    model = DistributedDataParallel(_mlp())

    def step(x):
        loss = model(x).square().mean()
        loss.backward()
        total = loss.detach().clone()
        distributed.all_reduce(total)
        return total

    compiled = tracejit.compile(step, on_unsupported="raise")
    started, said = time.perf_counter(), ""
    try:
        with model.join():
            compiled(torch.ones(4, 6))
    except RuntimeError as error:
        said = f"{type(error).__name__}: {error}"
    return said, time.perf_counter() - started


def one_eagerly() -> tuple[str, float]:
    """Under `join()` one rank runs eagerly, and the others a plan."""
    model = DistributedDataParallel(_mlp())

    def plain(x, odd):
        for p in model.parameters():
            p.grad = None
        model(x.to_sparse().to_dense() if odd else x).square().mean().backward()

    compiled = tracejit.compile(plain, on_unsupported="eager")
    started, said = time.perf_counter(), ""
    try:
        with warnings.catch_warnings(), model.join():
            warnings.simplefilter("ignore")
            for k in range(4):
                compiled(torch.ones(4, 6), k == 3 and distributed.get_rank() == 1)
                started = time.perf_counter()
    except RuntimeError as error:
        said = f"{type(error).__name__}: {error}"
    return said, time.perf_counter() - started
