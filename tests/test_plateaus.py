"""Schedulers that are given a value that the step computes: ReduceLROnPlateau in the step.

A replay calls `scheduler.step(metric)` again, on the real scheduler, with the value of this call:
after the plan where nothing depends on what it leaves, before it where the optimizer does.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

import tracejit

Numbers = list


class World:
    """A small training, whose loss goes up and down with its data."""

    def __init__(self, **options: object):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(4, 2)
        groups = [{"params": [self.model.weight]}, {"params": [self.model.bias], "lr": 0.02}]
        self.optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        made = {"patience": 1, "factor": 0.5} | options
        self.scheduler = ReduceLROnPlateau(self.optimizer, **made)
        self.x, self.y = torch.randn(8, 4), torch.randn(8, 2)
        self.calls, self.stopped = 0, False

    def loss(self, level: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        return F.mse_loss(self.model(self.x), self.y) * level

    def train(self, level: torch.Tensor) -> torch.Tensor:
        loss = self.loss(level)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def told(self) -> Numbers:
        """All that Python holds of it."""
        told = vars(self.scheduler) | {"_schedulers": 0}
        for inner in getattr(self.scheduler, "_schedulers", ()):
            told["_schedulers"] += 10 * told["_schedulers"] + inner.last_epoch
        known = {key: x for key, x in told.items() if type(x) in (int, float, list, str)}
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return [known, rates, self.calls, self.stopped]

    def tensors(self) -> list:
        state = [self.optimizer.state[p] for p in self.model.parameters()]
        return [*map(torch.clone, self.model.parameters()), *(s["momentum_buffer"] for s in state)]


def item(w: World, level: torch.Tensor) -> object:
    loss = w.train(level)
    w.scheduler.step(loss.item())
    return loss


def tensor(w: World, level: torch.Tensor) -> object:
    loss = w.train(level)
    w.scheduler.step(loss)
    return loss


def by_name(w: World, level: torch.Tensor) -> object:
    loss = w.train(level)
    w.scheduler.step(metrics=loss.item() * 2 + 1)
    return loss.item()


def first(w: World, level: torch.Tensor) -> object:
    """The optimizer uses the rate that the scheduler has just set."""
    loss = w.loss(level)
    loss.backward()
    w.scheduler.step(loss.detach())
    w.optimizer.step()
    return loss.detach()


def told_rates(w: World, level: torch.Tensor) -> object:
    loss = w.train(level)
    w.scheduler.step(loss.item())
    return loss, w.scheduler.get_last_lr()[1], 2 * w.optimizer.param_groups[0]["lr"]


def skipped(w: World, level: torch.Tensor) -> object:
    loss = w.loss(level)
    if not torch.isfinite(loss):
        return None
    loss.backward()
    w.optimizer.step()
    w.scheduler.step(loss.item())
    return loss.detach()


def first_of_a_branch(w: World, level: torch.Tensor) -> object:
    loss = w.loss(level)
    loss.backward()
    if loss > 1.5:
        w.scheduler.step(loss.item())
    w.optimizer.step()
    return loss.detach()


def counted(w: World, level: torch.Tensor) -> object:
    w.calls += 1
    loss = w.train(level)
    w.scheduler.step(loss.item() / w.calls)
    return {"loss": loss, "call": w.calls}


def twice(w: World, level: torch.Tensor) -> object:
    loss = w.train(level)
    w.scheduler.step(loss.item())
    norm = w.model.weight.detach().norm()
    w.scheduler.step(norm.item() + 3)
    return loss


def of_a_tensor_outside(w: World, level: torch.Tensor) -> object:
    w.train(level)
    w.scheduler.step(level)
    return level * 2


def an_integer(w: World, level: torch.Tensor) -> object:
    loss = w.train(level)
    w.scheduler.step((w.model(w.x) > w.y).sum())
    return loss


def with_a_new_number(w: World, level: torch.Tensor) -> object:
    """A tensor is made of what the scheduler leaves."""
    loss = w.train(level)
    w.scheduler.step(loss.item())
    return loss, torch.tensor(w.optimizer.param_groups[0]["lr"])


STEPS = (
    *(item, tensor, by_name, first, told_rates, skipped, first_of_a_branch, counted, twice),
    *(of_a_tensor_outside, an_integer, with_a_new_number),
)
SETTINGS = {
    "min": {},
    "max": {"mode": "max"},
    "abs": {"threshold_mode": "abs", "threshold": 0.1},
    "max abs": {"mode": "max", "threshold_mode": "abs", "threshold": 0.2},
    "cooldown": {"patience": 0, "cooldown": 2},
    "least": {"patience": 0, "factor": 0.3, "min_lr": [0.04, 0.001], "eps": 1e-3},
}
LEVELS = (1.0, 0.9, 1.4, 1.5, 1.3, 0.5, 2.0, 2.1, math.nan, 2.2, 0.4, 3.0, 3.1, 0.2, 0.3, 0.3)


def lockstep(
    step: Callable, make: Callable[[], World] = World, levels: tuple = LEVELS
) -> tracejit.compile:
    """Calls of both, equal in values and in all that Python holds; the compiled step."""
    ours, right = make(), make()
    compiled = tracejit.compile(lambda level: step(ours, level), on_unsupported="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of eager, for `step(loss)` with a history
        for number in levels:
            if math.isnan(number) and step is not skipped:
                continue
            level = torch.tensor(number)
            torch.testing.assert_close(compiled(level), step(right, level))
            torch.testing.assert_close(ours.tensors(), right.tensors())
            check(ours.told(), right.told())
    return compiled


def check(ours: Numbers, right: Numbers) -> None:
    """Numbers that come of a loss are equal within rounding, all others are the same."""
    assert ours[1:] == right[1:]
    known, expected = ours[0], right[0]
    assert known.keys() == expected.keys()
    for key, x in known.items():
        assert type(x) is type(expected[key])
        if key in ("best", "norm"):
            assert x == pytest.approx(expected[key], rel=1e-5)
        else:
            assert x == expected[key], key


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
@pytest.mark.sweep(0.34)
def test_a_plateau_is_replayed(step):
    compiled = lockstep(step)
    assert compiled.stats.replays >= len(LEVELS) // 2, compiled.explain_mode()


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("step", [item, first], ids=lambda step: step.__name__)
@pytest.mark.sweep(0.34)
def test_settings(step, settings):
    compiled = lockstep(step, lambda: World(**SETTINGS[settings]))
    assert compiled.stats.replays >= len(LEVELS) // 2, compiled.explain_mode()
    assert len(compiled.plans) <= 2  # the first call makes momentum


def test_the_value_is_read_after_the_plan():
    """Where nothing depends on what the scheduler leaves there is one plan, and one small copy."""
    assert "values read: 0 before the rest, 1 after it" in lockstep(item).explain_mode()
    assert "values read: 0 before the rest, 1 after it" in lockstep(told_rates).explain_mode()
    assert "values read: 1 before the rest, 0 after it" in lockstep(first).explain_mode()


def test_what_is_changed_between_calls_counts():
    """A replay steps the scheduler as it finds it."""
    ours, right = World(), World()
    compiled = tracejit.compile(lambda level: item(ours, level))
    for i, number in enumerate(LEVELS):
        level = torch.tensor(1.0 if math.isnan(number) else number)
        for w in (ours, right):
            if i == 8:
                w.scheduler.best, w.scheduler.num_bad_epochs = 0.01, 1
            if i == 11:
                w.scheduler.patience, w.scheduler.factor = 0, 0.1
            if i == 13:
                w.optimizer.param_groups[1]["lr"] = 0.5
        torch.testing.assert_close(compiled(level), item(right, level))
        check(ours.told(), right.told())
    assert compiled.stats.replays >= 12


class Stop(Exception):
    """Of a scheduler that ends a training."""


class Stopping(ReduceLROnPlateau):
    """A user's own, which raises."""

    def step(self, metrics: float, epoch: int | None = None) -> None:
        super().step(metrics)
        if self.last_epoch >= 8:
            raise Stop(self.last_epoch)


def test_a_scheduler_that_raises_leaves_less_than_eager():
    """What is the user's runs before anything is written: the scheduler has stepped, no weight has
    moved."""

    def make() -> World:
        w = World()
        w.scheduler = Stopping(w.optimizer, patience=1, factor=0.5)
        return w

    ours, right = make(), make()
    compiled = tracejit.compile(lambda level: item(ours, level))
    for number in LEVELS[:7]:
        level = torch.tensor(number)
        torch.testing.assert_close(compiled(level), item(right, level))
    assert compiled.stats.replays >= 3, compiled.explain_mode()
    before = ours.tensors()
    for step in (compiled, lambda level: item(right, level)):
        with pytest.raises(Stop):
            step(torch.tensor(3.0))
    torch.testing.assert_close(ours.tensors(), before, rtol=0, atol=0)
    check(ours.told(), right.told())


class Watching(StepLR):
    """A user's own, which looks at a weight: in each step, or from the tenth on."""

    since = 0

    def step(self) -> None:
        super().step()
        if hasattr(self, "weight") and self.last_epoch > self.since:
            self.norm = self.weight.detach().norm().item()
            for group in self.optimizer.param_groups:
                group["lr"] *= 0.5 if self.norm > 1 else 0.9


@pytest.mark.parametrize("since", [0, 9])
def test_a_scheduler_that_looks_at_weights_is_not_asked_too_early(since):
    """A replay would call it before the plan has run."""

    def make() -> World:
        w = World()
        w.scheduler = Watching(w.optimizer, 1, 0.9)
        w.scheduler.since, w.scheduler.weight = since, w.model.weight
        return w

    def step(w: World, level: torch.Tensor) -> object:
        loss = w.train(level)
        w.scheduler.step()
        return loss

    compiled = lockstep(step, make)
    if since:
        assert compiled.stats.replays >= 4
    else:
        assert "Watching computes with tensors when it steps" in compiled.explain_mode()


def test_two_schedulers_of_one_optimizer():
    def make() -> World:
        w = World(patience=0)
        w.other = ExponentialLR(w.optimizer, 0.9)
        return w

    def step(w: World, level: torch.Tensor) -> object:
        loss = w.train(level)
        w.other.step()
        before = w.optimizer.param_groups[0]["lr"]
        w.scheduler.step(loss.item())
        w.other.step()
        return loss, before, w.other.get_last_lr()[0]

    assert lockstep(step, make).stats.replays >= 8


@pytest.mark.parametrize(
    "make_scheduler",
    [
        lambda o: StepLR(o, 2, 0.5),
        lambda o: CosineAnnealingLR(o, 20),
        lambda o: SequentialLR(o, [LinearLR(o, 0.1, 1.0, 4), ExponentialLR(o, 0.9)], [4]),
    ],
)
def test_rates_that_a_scheduler_tells(make_scheduler):
    """`get_last_lr()` after the scheduler's step are the rates that it has set."""

    def make() -> World:
        w = World()
        w.scheduler = make_scheduler(w.optimizer)
        return w

    def step(w: World, level: torch.Tensor) -> object:
        before = 3 * w.scheduler.get_last_lr()[1]
        loss = w.train(level)
        w.scheduler.step()
        return loss, before, w.scheduler.get_last_lr()[0], sum(w.scheduler.get_last_lr())

    ours, right = make(), make()
    compiled = tracejit.compile(lambda level: step(ours, level))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for number in LEVELS:
            level = torch.tensor(1.0 if math.isnan(number) else number)
            torch.testing.assert_close(compiled(level), step(right, level))
            assert ours.told()[1:] == right.told()[1:]
            assert ours.scheduler.get_last_lr() == right.scheduler.get_last_lr()
            assert all(type(x) is float for x in ours.scheduler.get_last_lr())
    assert compiled.stats.replays >= 10, compiled.explain_mode()


def test_rates_that_are_told_in_the_step_and_set_outside():
    """Also where somebody sets those of the groups, and the scheduler does not know."""
    ours, right = World(), World()
    for w in (ours, right):
        w.scheduler = StepLR(w.optimizer, 1, 0.9)

    def step(w: World, level: torch.Tensor) -> object:
        rate = w.scheduler.get_last_lr()[0]
        return w.train(level) * rate, 2 * w.scheduler.get_last_lr()[1]

    compiled = tracejit.compile(lambda level: step(ours, level))
    for i in range(16):
        for w in (ours, right):
            if i % 2:
                w.scheduler.step()
            if i == 8:
                w.optimizer.param_groups[0]["lr"] = 0.3
            if i == 12:
                w.scheduler._last_lr = [0.7, 0.1]
        level = torch.tensor(1.0)
        torch.testing.assert_close(compiled(level), step(right, level))
        assert ours.scheduler.get_last_lr() == right.scheduler.get_last_lr()
        assert all(type(x) is float for x in ours.scheduler.get_last_lr())
    assert compiled.stats.replays >= 8, compiled.explain_retraces()


def test_a_call_that_fails_leaves_plain_rates():
    w = World()
    w.scheduler = StepLR(w.optimizer, 1, 0.9)

    def step(level: torch.Tensor) -> object:
        rate = w.scheduler.get_last_lr()[0]
        w.scheduler.step()
        w.train(level)
        raise Stop(rate)

    compiled = tracejit.compile(step)
    before = w.scheduler.get_last_lr()
    with pytest.raises(Stop):
        compiled(torch.tensor(1.0))
    assert all(type(x) is float for x in (*before, *w.scheduler.get_last_lr()))
    assert before == [0.1, 0.02]


def scheduled(make_scheduler: Callable) -> Callable[[], World]:
    """Makes the training with a scheduler of another kind."""

    def make() -> World:
        w = World()
        w.scheduler = make_scheduler(w.optimizer)
        return w

    return make


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_decision_by_the_rate_is_taken_by_replays(when):
    """The optimizer steps before it or after it. A replay steps the scheduler, and back where the
    rate leads elsewhere."""

    def step(w: World, level: torch.Tensor) -> object:
        loss = w.loss(level)
        loss.backward()
        if when == "before":
            w.optimizer.step()
        w.scheduler.step(loss.item())
        if w.optimizer.param_groups[0]["lr"] < 0.03:
            w.stopped = True
            loss = loss * 2
        if w.scheduler.get_last_lr()[1] < 0.004:
            w.calls += 1
        if when == "after":
            w.optimizer.step()
        return loss.detach()

    compiled = lockstep(step)
    assert compiled.stats.replays and compiled.stats.branches


@pytest.mark.parametrize(
    "make_scheduler",
    [
        lambda o: StepLR(o, 3, 0.2),
        lambda o: CosineAnnealingLR(o, 7),
        lambda o: SequentialLR(o, [LinearLR(o, 0.1, 1.0, 3), ExponentialLR(o, 0.7)], [3]),
    ],
)
def test_a_decision_by_the_rate_of_a_schedule(make_scheduler):
    """Early stopping, and freezing, by the rate that has just been set."""

    def step(w: World, level: torch.Tensor) -> object:
        loss = w.train(level)
        w.scheduler.step()
        rate = w.scheduler.get_last_lr()[0]
        if rate < 0.05:
            w.stopped = True
            loss = loss + w.model.weight.detach().sum()
        return loss, rate

    compiled = lockstep(step, scheduled(make_scheduler))
    assert compiled.stats.replays and compiled.stats.branches


def test_a_decision_by_the_rate_of_ones_own_scheduler_is_rerun():
    class Halving(LRScheduler):
        def get_lr(self):
            return [group["lr"] / 2 for group in self.optimizer.param_groups]

    def step(w: World, level: torch.Tensor) -> object:
        loss = w.train(level)
        w.scheduler.step()
        if w.optimizer.param_groups[0]["lr"] < 0.01:
            w.stopped = True
        return loss

    compiled = lockstep(step, scheduled(Halving))
    assert "a scheduler of your own has just computed" in compiled.explain_mode()


def restarts(optimizer):
    return CosineAnnealingWarmRestarts(optimizer, 2, T_mult=2)


@pytest.mark.parametrize(
    "read",
    [
        lambda s: s.best if hasattr(s, "best") else s.T_i,
        lambda s: s.num_bad_epochs if hasattr(s, "best") else s.T_cur,
        lambda s: s.in_cooldown if hasattr(s, "best") else s.last_epoch,
        lambda s: len(s.state_dict()) + s.state_dict().get("cooldown_counter", 0),
    ],
    ids=["best", "bad", "cooldown", "state_dict"],
)
@pytest.mark.parametrize("make_scheduler", [None, restarts], ids=["plateau", "restarts"])
@pytest.mark.sweep(0.17)
def test_what_a_scheduler_keeps_is_read_after_its_step(make_scheduler, read):
    """No replay knows what its step leaves there, though it was what it is now for many calls."""

    def step(w: World, level: torch.Tensor) -> object:
        loss = w.train(level)
        w.scheduler.step(*(() if make_scheduler else (loss.item(),)))
        kept = read(w.scheduler)
        return loss, (kept() if callable(kept) else kept)

    make = World if make_scheduler is None else scheduled(make_scheduler)
    compiled = lockstep(step, make, levels=LEVELS * 2)
    assert "of a scheduler that it has stepped" in compiled.explain_mode()


def test_what_a_scheduler_keeps_is_read_before_its_step():
    def step(w: World, level: torch.Tensor) -> object:
        best = w.scheduler.best
        loss = w.train(level)
        w.scheduler.step(loss.item())
        return loss, 2 * best

    lockstep(step, levels=LEVELS * 2)
