"""Schedules that are functions of the user's: a file keeps none, so each call is given their rates.

In: the calls of schedulers of a step's replays. Out: which optimizers they are about, for the
numbers of which a loaded step asks, and which calls are left out of its plans.
"""

from __future__ import annotations

import dis
from collections.abc import Iterable, Iterator
from functools import partial
from types import CodeType

from torch.optim import Optimizer, lr_scheduler

from tracejit.capture.bind import unwrap
from tracejit.capture.effects.captured import Captured
from tracejit.capture.effects.hyperparameters import with_inner
from tracejit.capture.python.bytecode import codes
from tracejit.capture.python.classes import module_of
from tracejit.run import Replay
from tracejit.saved.plans import operands
from tracejit.saved.schedules import Unknown, check_known

_TORCH = lr_scheduler.__name__
_WRITES = frozenset({"update", "setdefault", "__setitem__", "pop", "clear", "popitem", "exec"})
_STORES_ITEM = dis.opmap["STORE_SUBSCR"]
_MORE_THAN_RATES = (lr_scheduler.CyclicLR, lr_scheduler.OneCycleLR)


class AskedRates:
    """The optimizers whose rates a loaded step asks for.

    kinds: by the id of an optimizer, the class of the schedule.
    """

    def __init__(self, replays: Iterable[Replay]):
        self.kinds: dict[int, str] = {}
        self.optimizers: dict[int, Optimizer] = {}
        for replay in replays:
            for callback in replay.call.callbacks:
                scheduler = callback.function.__self__
                try:
                    check_known(scheduler)
                except Unknown:
                    optimizer = getattr(scheduler, "optimizer", None)
                    self.kinds.setdefault(id(optimizer), type(scheduler).__name__)
                    self.optimizers[id(optimizer)] = optimizer

    def takes(self, scheduler: object) -> bool:
        """Whether a scheduler's calls are left out. Raises Unknown where it is of such an
        optimizer, and may change more than its rates."""
        if id(getattr(scheduler, "optimizer", None)) not in self.kinds:
            return False
        for x in with_inner(scheduler):
            kind = type(x).__name__
            stepped = type(x).step
            theirs = stepped is lr_scheduler.LRScheduler.step or module_of(type(x)) == _TORCH
            if not theirs or "step" in vars(x):
                raise Unknown(f"{kind} steps in a way of its own")
            if isinstance(x, _MORE_THAN_RATES):
                raise Unknown(f"{kind} and a schedule that is yours are of one optimizer")
            if any(map(_writes_items, _codes(x))):
                raise Unknown(f"{kind} is code of yours, which may change more than rates")
        for group in scheduler.optimizer.param_groups:
            if type(group["lr"]) not in (int, float):
                raise Unknown("its optimizer has a rate that is a tensor")
        return True


def _codes(scheduler: object) -> Iterator[CodeType]:
    """The code of the user's that a schedule is: of its classes, and functions that it has."""
    rows = [vars(k).values() for k in type(scheduler).__mro__ if module_of(k) != _TORCH]
    rows += [vars(scheduler).values(), getattr(scheduler, "lr_lambdas", ())]
    for x in (x for row in rows for x in row):
        while isinstance(x, partial):
            x = x.func
        function, _ = unwrap(x)
        if function is not None and function.__module__ != _TORCH:
            yield function.__code__


def _writes_items(code: CodeType) -> bool:
    """Whether code may write to items of something, as of a param group."""
    return any(
        _STORES_ITEM in part.co_code[::2] or not _WRITES.isdisjoint(part.co_names)
        for part in codes(code)
    )


def is_read(captured: Captured, scalar: int) -> bool:
    """Whether anything in a plan is computed of a runtime scalar, decided by it, or kept of it."""
    value = captured.scalars[scalar]
    graphs = [captured.sources, *(cut.sources for cut in captured.cuts)]
    graphs += [captured.checks.sources] if captured.checks else []
    if any(source == ("scalar", scalar) for sources in graphs for source in sources):
        return True
    computed = (x for node in captured.host_nodes for x in node.inputs)
    return value in (*operands(captured), *computed)
