"""Two copies of a small world, one stepped by eager and one compiled, with changes between calls.

A case builds everything that its step can reach into a namespace `w` and returns the step. After
every call all of it is compared: returned values, tensors with their `.grad`, optimizer state,
attributes, containers, and what was printed.
"""

from __future__ import annotations

import io
import random
import re
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from enum import Enum
from types import FunctionType, SimpleNamespace

import pytest
import torch
from torch import nn

import tracejit
from support.endings import check_ending
from support.scope import sampled
from tracejit.capture.trace.tensor import TracedTensor
from tracejit.compile import CompiledStep
from tracejit.errors import TracejitError, TracejitWarning

Change = Callable[[SimpleNamespace], object]


@dataclass(frozen=True)
class Case:
    """A step, what happens to it, and how it ends: "replay", "replay with cuts" (it reads values),
    "rerun", or "refused: <why>", when it runs eagerly."""

    build: Callable[[SimpleNamespace], Callable]
    mode: str
    changes: dict[int, Change]
    args: Callable[[int], tuple]
    calls: int
    says: str  # a pattern that the refusal matches
    backend: str


def table(cases: dict[str, Case]) -> Callable:
    """`case(mode, …)` registers the function under it in `cases`."""

    def case(mode, *, changes=None, args=lambda i: (), calls=7, says="", backend="numpy"):
        def register(build):
            assert build.__name__ not in cases
            cases[build.__name__] = Case(build, mode, changes or {}, args, calls, says, backend)
            return build

        return register

    return case


def replaying(case: Callable, calls: int, args: Callable) -> Callable:
    """`case` for state: it replays, after enough calls for its places to be found."""

    def state(mode="replay", **options):
        return case(mode, **{"calls": calls, "args": args, **options})

    return state


def setting(**values):
    """A change of a case: attributes of its world are set."""
    return lambda w: vars(w).update(values)


class World:
    """One copy of a case."""

    def __init__(self, case: Case, mode: str | None, on_unsupported: str = "raise"):
        torch.manual_seed(0)
        random.seed(0)
        self.case, self.state = case, SimpleNamespace()
        step = case.build(self.state)
        self.step = step
        if mode is not None:
            options = {"backend": case.backend, "on_unsupported": on_unsupported}
            self.step = tracejit.compile(step, mode=mode, **options)
        self.random = random.getstate()

    def call(self, i: int) -> list:
        """Change what is to be changed, and step; returns a picture of the state, the arguments,
        what was returned, and what was printed."""
        torch.default_generator.manual_seed(i)  # torch.manual_seed formats a stack for CUDA
        random.setstate(self.random)
        printed = io.StringIO()
        with redirect_stdout(printed):
            if i in self.case.changes:
                self.case.changes[i](self.state)
            args = self.case.args(i)
            self.before = picture((self.state, args))
            keywords = args[-1] if args and type(args[-1]) is Keywords else {}
            returned = self.step(*args[: len(args) - bool(keywords)], **keywords)
        self.random = random.getstate()
        drawn = torch.default_generator.get_state()
        return picture((self.state, args, returned, printed.getvalue(), drawn))


class Keywords(dict):
    """As the last of a call's arguments: its keyword arguments."""


def check(
    case: Case, reset: Callable[[], None] = lambda: None, *, rel: float = 1e-6
) -> CompiledStep:
    """Run a case in auto mode, and a sample of the cases in rerun mode; the compiled copies are
    like eager's after every call, or refuse. `reset` puts the globals that the case changes back
    for the next copy. `rel`: how far plain floats may be apart."""
    reset()
    eager = World(case, None)
    expected = [eager.call(i) for i in range(case.calls)]
    for mode in ("rerun", "auto") if sampled(case.build.__name__, of=4) else ("auto",):
        reset()
        step, refused = _run(case, mode, expected, rel)
        if case.mode.startswith("refused"):
            assert refused is not None, f"not refused, but {step.explain_mode()}"
            assert re.search(case.says, str(refused)), str(refused)
            reset()
            _falls_back(case, mode, expected)
        elif refused is not None:
            raise refused
    if not case.mode.startswith("refused"):
        kind, _, cuts = case.mode.partition(" with ")
        assert step.explain_mode().startswith(kind), step.explain_mode()
        assert (step.stats.replays > 0) == (kind == "replay"), step.explain_retraces()
        assert not cuts or step.stats.cuts, "it reads no values"
        ending = f"{kind} with cuts" if kind == "replay" and step.stats.cuts else kind
    else:
        ending = "eager"
    check_ending(case.build.__module__, case.build.__name__, ending)
    return step


def _falls_back(case: Case, mode: str, expected: list) -> None:
    """What is refused runs eagerly instead, where that is not forbidden, and is right."""
    ours = World(case, mode, on_unsupported="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracejitWarning)
        for i, theirs in enumerate(expected):
            same(ours.call(i), theirs, f"call {i}, mode {mode}, with the fallback")
    assert ours.step.stats.eager > 0


def _run(
    case: Case, mode: str, expected: list, rel: float
) -> tuple[CompiledStep, TracejitError | None]:
    """The step after all calls, or after the one that was refused with this error."""
    ours = World(case, mode)
    for i, theirs in enumerate(expected):
        try:
            mine = ours.call(i)
        except TracejitError as error:
            same(picture((ours.state, case.args(i))), ours.before, f"call {i} was refused")
            return ours.step, error
        same(mine, theirs, f"call {i}, mode {mode}", rel)
    return ours.step, None


# ---- what a world looks like

_PLAIN = (int, float, str, bytes, bool, type(None), torch.dtype, torch.Size, range, Enum)


def picture(x: object) -> list[tuple[str, object]]:
    """Everything reachable from x by attributes and items, as (path, value) pairs; tensors are
    copied, and an object met again is the path of the first meeting."""
    found: list[tuple[str, object]] = []
    seen: dict[int, str] = {}
    keep: list[object] = []

    def look(x: object, path: str) -> None:
        if isinstance(x, float):
            found.append((path, float.__pos__(x)))
            return
        if isinstance(x, _PLAIN):
            found.append((path, x))
            return
        if id(x) in seen:
            found.append((path, f"<{seen[id(x)]}>"))
            return
        seen[id(x)] = path
        keep.append(x)
        if isinstance(x, torch.Tensor):
            assert type(x) is not TracedTensor, f"{path} is left a tracer"
            strides = [st for n, st in zip(x.shape, x.stride(), strict=True) if n > 1]
            flags = (type(x).__name__, x.requires_grad, x.is_leaf, strides)
            found.append((path, flags))
            found.append((path, x.detach().clone()))
            if x.is_leaf and x.grad is not None:
                look(x.grad, f"{path}.grad")
            for name, item in vars(x).items():
                look(item, f"{path}.{name}")
            return
        if isinstance(x, (type, FunctionType, CompiledStep)):
            found.append((path, x.__name__))
            return
        found.append((path, type(x).__name__))
        if isinstance(x, dict):
            for n, (key, item) in enumerate(dict.items(x)):
                if not callable(item):  # hooks are numbered throughout the process
                    look(key, f"{path} key {n}")
                named = isinstance(key, (str, int)) and not callable(item)
                look(item, f"{path}[{key if named else n}]")
        elif isinstance(x, (set, frozenset)) and all(isinstance(i, _PLAIN) for i in x):
            found.append((path, sorted(map(repr, x))))
        elif isinstance(x, (list, tuple)) or type(x).__name__ == "deque":
            for n, item in enumerate(x):
                look(item, f"{path}[{n}]")
        slots = [s for c in type(x).__mro__ for s in vars(c).get("__slots__", ())]
        for name in slots:
            if name not in ("__dict__", "__weakref__") and hasattr(x, name):
                look(getattr(x, name), f"{path}.{name}")
        for name, item in getattr(x, "__dict__", {}).items():
            look(item, f"{path}.{name}")

    look(x, "w")
    return found


def same(mine: list, theirs: list, where: str, rel: float = 1e-6) -> None:
    """Both pictures show the same: values exactly, tensors within float32 rounding, floats within
    `rel`."""
    ours, its = [p for p, _ in mine], [p for p, _ in theirs]
    assert ours == its, f"{where}: {sorted(set(ours) ^ set(its))}"
    for (path, a), (_, b) in zip(mine, theirs, strict=True):
        at = f"{where}, {path}"
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            assert a.dtype == b.dtype and a.shape == b.shape, f"{at}: {a.shape} {a.dtype}"
            if (a.is_meta and b.is_meta) or torch.equal(a, b):  # "meta" has no numbers
                continue
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6, equal_nan=True, msg=at)
        elif isinstance(a, float) and isinstance(b, float):
            assert a == pytest.approx(b, rel=rel, abs=1e-9, nan_ok=True), f"{at}: {a} {b}"
        else:
            assert type(a) is type(b) and a == b, f"{at}: {a!r}, eager has {b!r}"


# ---- what most cases train

X = torch.linspace(-1, 2, 20).reshape(5, 4)
Y = torch.linspace(0, 1, 15).reshape(5, 3)


class Trainer:
    """What most users write: an object with a model, an optimizer and a step."""

    scale = 1.0

    def __init__(self, make=torch.optim.SGD, lr=0.1, **options):
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.opt = make(self.model.parameters(), lr=lr, **options)
        self.weight = 1.0

    def loss(self, x, y):
        return (self.model(x) - y).pow(2).mean() * self.weight * self.scale

    def step(self, x=X, y=Y):
        self.opt.zero_grad()
        loss = self.loss(x, y)
        loss.backward()
        self.opt.step()
        return loss.detach()


def trainer(w, **options):
    w.t = Trainer(**options)
    return w.t.step


def on_trainer(change):
    return lambda w: change(w.t)
