"""Random training programs whose Python state changes at random between calls; and a shrinker.

A `Sequence` is a program as parts, and what changes before which call; `str` is runnable text. It
runs in two worlds, one stepped by eager, one compiled, which must look the same after every call
(`worlds.picture`). Numbers are float64, so that rounding is far below what a stale value makes.
"""

from __future__ import annotations

import linecache
import random
import re
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch

import tracejit
from support.sequence_parts import ALWAYS, MODELS, OPTIMIZERS, PARTS, Part
from support.worlds import picture, same
from tracejit.errors import TracejitError

CALLS = 8
LARGEST = 1e4
_HIDDEN = ("globals", "handles", "Kind", "kind")  # numbered or made anew in each world
FLOATS = (0.5, 0.25, 2.0, 1.5, 3.0, -1.0, 0.0)
PREAMBLE = """\
import collections, copy, dataclasses, functools, pickle, types

import torch
from torch import nn


class Config:
    scale, shift = 1.0, 0


class World:
    pass


Run = dataclasses.make_dataclass("Run", ["n", "scale"])
Named = collections.namedtuple("Named", "n mean")
"""
HEAD = (
    "d.x, d.y, d.gain = torch.randn(4, 3), torch.randn(4, 3), 0.7",
    "d.around, w.accumulate = '', False",
    "w.extra = nn.Parameter(torch.ones(3))",
    "w.handles, w.seen, w.offset, w.scale_of_gradient = [], [], 0.5, 0.5",
    "def after_gradient(p):",
    "    p.grad.mul_(w.scale_of_gradient)",
    "def before_step(*given):",
    "    for p in w.model.parameters():",
    "        if p.grad is not None:",
    "            p.grad.add_(w.offset)",
    "w.after_gradient, w.before_step = after_gradient, before_step",
)


@dataclass(frozen=True)
class Change:
    """Something that happens before a call, and the part that it belongs to."""

    call: int
    line: str
    part: str = ""


@dataclass(frozen=True)
class Sequence:
    """A program, its calls, and what changes between them; `str` is its runnable text."""

    parts: tuple[Part, ...]  # the model, the optimizer, and more
    changes: tuple[Change, ...]
    calls: int = CALLS

    def __str__(self) -> str:
        build = [*HEAD, *(line for part in self.parts for line in part.build)]
        step = [
            "if not w.accumulate:",
            "    w.opt.zero_grad()",
            "h = w.model(x)",
            *self._lines("forward"),
            "loss = (h - y).pow(2).mean() * gain",
            *self._lines("loss"),
            "if loss.requires_grad:",
            "    loss.backward()",
            *(f"    {line}" for line in self._lines("gradient")),
            "    w.opt.step()",
            *self._lines("after"),
            "return loss.detach(), h.detach().sum()",
        ]
        text = [PREAMBLE, "", "def build(w, d):", *(f"    {line}" for line in build), ""]
        text += ["    def step(x, y, gain):", *(f"        {line}" for line in step), ""]
        text += ["    return step", "", "", "def change(w, d, call):"]
        for call in range(self.calls):
            lines = [c.line for c in self.changes if c.call == call]
            text += [f"    if call == {call}:", *(f"        {x}" for x in lines)] if lines else []
        return "\n".join([*text, "    return None", ""])

    def _lines(self, kind: str) -> Iterator[str]:
        for part in self.parts:
            yield from getattr(part, kind)

    def smaller(self) -> Iterator[Sequence]:
        """Sequences with something less, the largest pieces first."""
        for calls in (self.calls // 2, self.calls - 1):
            yield replace(self, calls=max(calls, 1))
        for part in self.parts[2:]:
            yield replace(
                self,
                parts=tuple(p for p in self.parts if p is not part),
                changes=tuple(c for c in self.changes if c.part != part.name),
            )
        for change in self.changes:
            yield replace(self, changes=tuple(c for c in self.changes if c is not change))


def generate(seed: int, *, of: Collection[Part] = (), calls: int = CALLS) -> Sequence:
    """The sequence of a seed, with one more part `of` these."""
    rng = random.Random(seed)
    parts = [rng.choice(MODELS), rng.choice(OPTIMIZERS), *rng.sample(PARTS, rng.randint(1, 4))]
    if of:
        parts.append(rng.choice([*of]))
    own = [(line, part.name) for part in parts for line in part.changes]
    changes = []
    for call in range(1, calls):
        while rng.random() < (0.35 if call > 3 else 0.1):
            line, part = rng.choice(own) if own and rng.random() < 0.6 else ("", "")
            line = line or rng.choice(ALWAYS[rng.choice([*ALWAYS])])
            changes.append(Change(call, _filled(line, rng), part))
    return Sequence(tuple(parts), tuple(changes), calls)


def _filled(line: str, rng: random.Random) -> str:
    one, other = (f"[*w.model.parameters()][{rng.randrange(2)}]" for _ in range(2))
    values = {"f": FLOATS, "n": (0, 1, 2, 3), "b": (True, False)}
    drawn = {name: str(rng.choice(x)) for name, x in values.items()} | {"p": one, "q": other}
    return re.sub(r"\$([fnbpq])", lambda m: drawn[m.group(1)], line)


# ---- running


class _World:
    """One copy of a sequence's program."""

    def __init__(self, text: str, name: str, **options: object):
        reset()
        self.space: dict[str, object] = {"__name__": "between_calls"}
        exec(compile(text, name, "exec"), self.space)
        self.w, self.d = self.space["World"](), SimpleNamespace()
        torch.default_generator.manual_seed(0)
        step = self.space["build"](self.w, self.d)
        self.step = tracejit.compile(step, **options) if options else step
        self.modes = torch.get_default_dtype(), torch.get_float32_matmul_precision()

    def change(self, call: int) -> None:
        """What happens before a call. Not all of it is possible whatever happened before."""
        torch.default_generator.manual_seed(call)  # torch.manual_seed formats a stack for CUDA
        self.space["change"](self.w, self.d, call)

    def call(self, call: int) -> list:
        """Change what is to be changed, and step; returns a picture of all there is."""
        dtype, precision = self.modes
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)
        self.change(call)
        self.modes = torch.get_default_dtype(), torch.get_float32_matmul_precision()
        with torch.set_grad_enabled(self.d.around != "no_grad"):
            returned = self.step(self.d.x, self.d.y, self.d.gain)
        visible = {k: v for k, v in vars(self.w).items() if k not in _HIDDEN}
        return picture((visible, vars(self.d), returned, self.space.get("TABLE")))


def reset() -> None:
    """The modes of torch that a sequence begins with."""
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("highest")


@dataclass(frozen=True)
class Outcome:
    """How a sequence ended, the calls that were replayed, and why it was refused.

    kind: "equal", "diverges" (equal until then), "raises" (in both worlds alike), "refused", or
        "invalid" (it cannot be built).
    """

    kind: str
    replays: int = 0
    why: str = ""


def run(sequence: Sequence, **options: object) -> Outcome:
    """Compare the two worlds of a sequence call by call; AssertionError where they differ."""
    text, name = str(sequence), "<between calls>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _compared(text, name, sequence.calls, options or {"backend": "numpy"})
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")


def _compared(text: str, name: str, calls: int, options: dict) -> Outcome:
    try:
        eager, ours = _World(text, name), _World(text, name, **options)
    except (ValueError, IndexError, RuntimeError, AttributeError, TypeError, KeyError):
        return Outcome("invalid")
    for call in range(calls):
        try:
            theirs = eager.call(call)
        except Exception as error:
            return _raising(ours, call, error)
        try:
            mine = ours.call(call)
        except TracejitError as error:
            if _is_eagers(error) or isinstance(error, tracejit.errors.WrongResult):
                raise AssertionError(f"call {call}: eager takes it; {error!r}") from error
            return Outcome("refused", ours.step.stats.replays, str(error))
        if _diverges(theirs):
            return Outcome("diverges", ours.step.stats.replays)
        same(mine, theirs, f"call {call}")
    return Outcome("equal", ours.step.stats.replays)


def _diverges(seen: list) -> bool:
    """Whether numbers are so large that rounding will soon be too."""
    return any(
        isinstance(x, torch.Tensor) and x.numel() and not x.abs().max() < LARGEST for _, x in seen
    )


def _is_eagers(error: TracejitError) -> bool:
    """Whether an error says that eager would raise too."""
    return isinstance(error, (tracejit.errors.ShapeError, tracejit.errors.AutogradError))


def _raising(ours: _World, call: int, error: Exception) -> Outcome:
    """Eager raised: the compiled step does too."""
    try:
        ours.call(call)
    except Exception as mine:
        wrong = isinstance(mine, tracejit.errors.WrongResult)
        if isinstance(mine, TracejitError) and not _is_eagers(mine) and not wrong:
            return Outcome("refused", ours.step.stats.replays, str(mine))
        if not isinstance(mine, type(error)) and not isinstance(error, type(mine)):
            raise AssertionError(f"call {call}: eager raised {error!r}, ours {mine!r}") from mine
        return Outcome("raises", ours.step.stats.replays)
    raise AssertionError(f"call {call}: eager raised {error!r}, the compiled step did not")


def shrink(sequence: Sequence, fails: Callable[[Sequence], bool]) -> Sequence:
    """The sequence without every part, change and call that the failure can spare."""
    again = True
    while again:
        again = False
        for smaller in sequence.smaller():
            if smaller != sequence and fails(smaller):
                sequence, again = smaller, True
                break
    return sequence


def outcome(sequence: Sequence, **options: object) -> Outcome:
    """How it ended; AssertionError with the shrunk sequence where it differs from eager."""
    try:
        return run(sequence, **options)
    except Exception as error:
        small = shrink(sequence, lambda s: fails(s, **options))
        raise AssertionError(f"{error}\n\n{small}") from error


def fails(sequence: Sequence, **options: object) -> bool:
    """Whether a sequence differs from eager."""
    try:
        run(sequence, **options)
    except AssertionError:
        return True
    return False
