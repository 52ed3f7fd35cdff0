"""The calls that a replay makes again, a scheduler's step: when it may, and how."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LRScheduler

from tracejit.capture.effects.captured import Captured
from tracejit.capture.effects.effects import Call


def against(captured: Captured, call: Call) -> str:
    """Why the calls that a replay makes again cannot come before its plan, if so."""
    for callback in call.callbacks:
        scheduler = callback.function.__self__
        for group in scheduler.optimizer.param_groups:
            if any(isinstance(x, torch.Tensor) for name, x in group.items() if name != "params"):
                return f"{type(scheduler).__name__} steps a hyperparameter that is a tensor"
    mine = {
        id(group) for c in call.callbacks for group in c.function.__self__.optimizer.param_groups
    }
    if any(id(call.holders[i]) not in mine for i, _, _ in captured.effects.stores):
        for callback in call.callbacks:
            if not _of_torch_alone(callback.function.__self__):
                return (
                    "it assigns to what a scheduler may read; step the scheduler outside the step"
                )
    if any(path[0] == "stored" for path in captured.paths):
        return "a scheduler steps after it has set a hyperparameter"
    late = {
        value
        for value, path in zip(captured.scalars, captured.paths, strict=True)
        if path[0] == "after"
    }
    for node in captured.host_nodes:
        if late.intersection(node.args):
            late.update(node.outs)
    if any(late.intersection((p.left, p.right)) for p in captured.predicates):
        return "it decides by a value that a scheduler has just computed"
    if captured.branches and _is_asked_first(captured, late):
        return (
            "it decides by a value of a tensor that depends on what a scheduler has just computed; "
            "step the scheduler outside the step"
        )
    return ""


def _is_asked_first(captured: Captured, late: set) -> bool:
    """Whether a replay needs numbers of a scheduler before it knows that it will go on."""
    inputs = {i for k in captured.early for of, i in captured.cuts[k].sources if of == "scalar"}
    numbers = {x for event in captured.draws for x in event.numbers}
    return not late.isdisjoint({captured.scalars[i] for i in inputs} | numbers)


def _of_torch_alone(scheduler: LRScheduler) -> bool:
    """Whether a scheduler runs no code of the user's."""
    mine = type(scheduler).__module__ == LRScheduler.__module__
    inner = getattr(scheduler, "_schedulers", ())
    theirs = hasattr(scheduler, "lr_lambdas") or getattr(scheduler, "_scale_fn_custom", None)
    return mine and not theirs and all(map(_of_torch_alone, inner))


def repeated(captured: Captured, call: Call) -> Callable[[list], None] | None:
    """A function that calls what a replay calls again, and fills in the scalars that this makes."""
    callbacks, holders = call.callbacks, call.holders
    if not callbacks:
        return None
    late = [(i, path) for i, path in enumerate(captured.paths) if path[0] == "after"]

    def after(scalars: list) -> None:
        for n, callback in enumerate(callbacks):
            callback.function(*callback.args, **callback.kwargs)
            for i, path in late:
                if path[1] == n:
                    _, holder, key, *indices = path[2]
                    x = holders[holder][key]
                    for k in (*indices, *path[3:]):
                        x = x[k]
                    scalars[i] = float(x)

    return after
