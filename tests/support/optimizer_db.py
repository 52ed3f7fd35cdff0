"""torch's own database of optimizers: an entry in, what becomes of a training with it out.

Each of its settings trains in lockstep with eager (`optimizer_checks`), by every implementation
that the optimizer has on the CPU. Then everything that a user can see is eager's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from support.op_db import Outcome, torch_as_it_is
from support.optimizer_checks import Training, lockstep, loss_of, update_of, weights
from tracejit.errors import TracejitError

CALLS = 8  # with the first ones, which make state, enough to be replayed; LBFGS goes another way
# in each, as its Python decides by values, and makes three


def optimizers() -> dict[str, object]:
    """torch's database of optimizers, by name."""
    with torch_as_it_is():
        from torch.testing._internal.common_optimizers import optim_db
    return {entry.optim_cls.__name__: entry for entry in optim_db}


class _OfParameters(Training):
    """Compared by its parameters. What LBFGS keeps of them are differences, of which little but
    rounding is left, also in eager."""

    def state(self) -> list[torch.Tensor]:
        return []


@dataclass(frozen=True)
class Setting:
    """One way to make an optimizer."""

    entry: object
    options: dict

    def make(self, dtype: torch.dtype) -> Training:
        """A step that trains two parameters with it: matrices, where it takes nothing else."""
        w, v, x, y = weights(dtype)
        given = [w] if self.entry.optim_cls is torch.optim.Muon else [w, v]
        optimizer = self.entry.optim_cls(given, **copy.deepcopy(self.options))
        if not self.entry.step_requires_closure:
            return Training(update_of(optimizer, w, v, x, y), given, [optimizer])

        def gradients() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(w, v, x, y)
            loss.backward()
            return loss

        def step() -> torch.Tensor:
            return optimizer.step(gradients).detach()

        return _OfParameters(step, given, [optimizer])


def settings(entry: object) -> Iterator[tuple[str, Setting]]:
    """All ways to make an optimizer, with a name each."""
    if entry.only_supports_sparse_grads:
        return  # there are no sparse gradients in a compiled step
    fixed = {"max_iter": 3} if entry.step_requires_closure else {}  # near a minimum all is rounding
    ways = {"plain": {"foreach": False} if "foreach" in entry.supported_impls else {}}
    others = [name for name in entry.supported_impls if name in ("foreach", "fused")]
    ways |= {name: {name: True} for name in others}
    for way, flags in ways.items():
        for given in entry.optim_inputs_func(device="cpu"):
            if way != "plain" and isinstance(given.kwargs.get("lr"), torch.Tensor):
                continue  # which eager refuses with foreach, but for fused ones
            yield f"{way}, {given.desc}", Setting(entry, given.kwargs | flags | fixed)


def outcome_of(setting: Setting, backend: str) -> Outcome:
    """How a training goes: by replay, or by running its Python, or not at all."""
    options = {"mode": "auto", "backend": backend, "on_unsupported": "raise"}
    calls = 3 if setting.entry.step_requires_closure else CALLS
    try:
        step = lockstep(setting.make, compiles=calls, calls=calls, **options)
    except TracejitError as error:
        return Outcome("refused", f"{type(error).__name__}: {error}")
    except AssertionError as error:
        return Outcome("wrong", str(error))
    return Outcome("replay" if step.stats.replays else "rerun", step.explain_mode())
