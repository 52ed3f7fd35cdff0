"""The calls that a replay makes again, a scheduler's step: when it may, and how."""

from __future__ import annotations

import math
from types import CellType, CodeType, FunctionType

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, MultiplicativeLR

from tracejit.capture.effects.captured import Captured
from tracejit.capture.effects.effects import Call, arguments_of
from tracejit.capture.effects.hyperparameters import Touched, of_torch_alone, with_inner
from tracejit.capture.effects.late import behind_callbacks, cuts_behind, left_by_callbacks
from tracejit.capture.trace.scalars import Path
from tracejit.interrupts import raised_by_handler


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
    stored = [call.holders[i] for i, _, _ in captured.effects.stores]
    stored = [x for x in stored if id(x) not in mine]
    if stored:
        for callback in call.callbacks:
            if not _reads_none_of(callback.function.__self__, stored):
                return (
                    "it assigns to what a scheduler may read; step the scheduler outside the step"
                )
    if any(path[0] == "stored" for path in captured.paths):
        return "a scheduler steps after it has set a hyperparameter"
    if captured.decides_by_callbacks:
        for callback in call.callbacks:
            if not callback.of_torch_alone:  # its step may not be taken back
                return (
                    "it decides by a value that a scheduler of your own has just computed; step "
                    "the scheduler outside the step"
                )
    given = captured.scalars, captured.paths, captured.host_nodes
    late = behind_callbacks(*given)
    read = cuts_behind(*given, captured.operands)
    if not captured.branches:  # else callbacks come after all values are read
        late = {*left_by_callbacks(*given, read)}
    if _is_asked_first(captured, late):
        return (
            "it decides by a value of a tensor that depends on what a scheduler has just computed; "
            "step the scheduler outside the step"
        )
    return ""


def _reads_none_of(scheduler: LRScheduler, stored: list[object]) -> bool:
    """Whether a scheduler is known to read nothing of these: torch's own, whose functions of the
    user's compute with their argument and numbers alone."""
    if of_torch_alone(scheduler):
        return True
    if type(scheduler) not in (LambdaLR, MultiplicativeLR):
        return False
    if any(type(x) in (CellType, FunctionType) for x in stored):
        return False
    given = [f for f in scheduler.lr_lambdas if f is not None]
    return all(type(f) is FunctionType and _is_arithmetic(f, stored) for f in given)


def _is_arithmetic(f: FunctionType, stored: list[object]) -> bool:
    """Whether a function reads numbers, `math` and Python's arithmetic, and no other objects."""
    code, names = f.__code__, f.__globals__
    builtins = f.__builtins__
    if any(x is names or x is builtins or x is vars(math) for x in stored):
        return False
    if any(type(x) is CodeType for x in code.co_consts):
        return False
    cells = [cell.cell_contents for cell in f.__closure__ or () if cell != CellType()]
    if len(cells) != len(code.co_freevars):
        return False
    read = [*cells, *(f.__defaults__ or ()), *(f.__kwdefaults__ or {}).values()]
    for name in code.co_names:  # attributes among them
        if name in names or name in _ARITHMETIC:
            read.append(names.get(name, builtins.get(name)))
        elif name not in vars(math):
            return False
    return all(type(x) in _NUMBERS or any(x is y for y in _KNOWN) for x in read)


_NUMBERS = (int, float, bool, str, type(None))
_ARITHMETIC = {f.__name__: f for f in (min, max, abs, pow, round, int, float)}
_KNOWN = (math, *_ARITHMETIC.values(), *(f for f in vars(math).values() if callable(f)))


def _is_asked_first(captured: Captured, late: set) -> bool:
    """Whether a replay needs numbers of a scheduler before it knows that it will go on."""
    inputs = {i for k in captured.early for of, i in captured.cuts[k].sources if of == "scalar"}
    numbers = {x for event in captured.draws for x in event.numbers}
    return not late.isdisjoint({captured.scalars[i] for i in inputs} | numbers)


class Repeated:
    """The calls that a replay makes again, on the real schedulers."""

    def __init__(self, captured: Captured, call: Call):
        self._callbacks = call.callbacks
        self._holders = call.holders
        self._places = [[at for at, _ in places] for places in captured.effects.callbacks]
        # which scalars each leaves
        self._left: list[list[tuple[int, Path]]] = [[] for _ in call.callbacks]
        for i, path in enumerate(captured.paths):
            if path[0] == "after":
                self._left[path[1]].append((i, path[2] + path[3:]))
        self.may_fail = not all(callback.of_torch_alone for callback in call.callbacks)
        self._raised = False

    def __call__(self, n: int, scalars: list, *numbers: float) -> bool:
        """Make the n-th call, with these numbers among its arguments, and fill in the scalars that
        it leaves. Whether it has computed with tensors, which are not yet as Python would find
        them; then it must be undone."""
        callback = self._callbacks[n]
        args, kwargs = arguments_of(callback.args, callback.kwargs, self._places[n], numbers)
        try:
            if callback.of_torch_alone:
                callback.function(*args, **kwargs)
            else:
                touched = Touched()
                with touched:
                    callback.function(*args, **kwargs)
                if touched.by:
                    return True
        except BaseException as error:
            self._raised = not raised_by_handler(error)
            raise
        for i, (_, holder, *indices) in self._left[n]:
            x = self._holders[holder]
            for k in indices:
                x = x[k]
            scalars[i] = float(x)
        return False

    def remember(self) -> list[tuple[dict, dict]]:
        """What the schedulers and their groups hold: `put_back` sets that again."""
        found: list[dict] = []
        self._raised = False
        for callback in self._callbacks:
            for scheduler in with_inner(callback.function.__self__):
                found += [vars(scheduler), *scheduler.optimizer.param_groups]
        return [(x, dict(x)) for x in found]

    def take_back(self, remembered: list[tuple[dict, dict]]) -> None:
        """The step has failed: put back, but what a scheduler has raised itself, as in eager."""
        if not self._raised:
            self.put_back(remembered)

    @staticmethod
    def put_back(remembered: list[tuple[dict, dict]]) -> None:
        """The calls have not been made."""
        for x, before in remembered:
            x.clear()
            x.update(before)
