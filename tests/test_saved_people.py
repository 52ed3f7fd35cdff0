"""Saved: what people have in a step besides tensors: schedules, batches of classes, masks."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler as rates

import tracejit
from tracejit.errors import CallError, CannotSave

SCHEDULES = {
    "step": lambda o: rates.StepLR(o, 3, 0.5),
    "milestones": lambda o: rates.MultiStepLR(o, [3, 6, 6], gamma=1),
    "constant": lambda o: rates.ConstantLR(o, 0.5, 4),
    "linear": lambda o: rates.LinearLR(o, 0.1, total_iters=8),
    "exponential": lambda o: rates.ExponentialLR(o, 0.9),
    "polynomial": lambda o: rates.PolynomialLR(o, 9, 2),
    "cosine": lambda o: rates.CosineAnnealingLR(o, 10),
    "restarts": lambda o: rates.CosineAnnealingWarmRestarts(o, 3, 2),
    "triangles": lambda o: rates.CyclicLR(o, 0.01, 0.1, 3, mode="triangular2"),
    "range": lambda o: rates.CyclicLR(
        o, 0.01, 0.1, 3, mode="exp_range", gamma=0.9, cycle_momentum=False
    ),
    "one cycle": lambda o: rates.OneCycleLR(o, 0.1, total_steps=60, three_phase=True),
    "one after another": lambda o: rates.SequentialLR(
        o, [rates.LinearLR(o, 0.1, total_iters=3), rates.CosineAnnealingLR(o, 9)], [7]
    ),
    "chained": lambda o: rates.ChainedScheduler(
        [rates.ConstantLR(o, 0.1, 5), rates.ExponentialLR(o, 0.9)]
    ),
    "plateau": lambda o: rates.ReduceLROnPlateau(o, "min", 0.5, patience=0, min_lr=[0.01, 0.0]),
}
OPTIMIZERS = {"sgd": (torch.optim.SGD, {"momentum": 0.9}), "adam": (torch.optim.Adam, {})}


def scheduled(name: str, optimizer: str = "sgd"):
    """A training step that steps a schedule, its batch, optimizer and scheduler."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.01}]
    kind, options = OPTIMIZERS[optimizer]
    own = kind(groups, lr=0.05, **options)
    scheduler = SCHEDULES[name](own)

    def step(x, y):
        own.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        own.step()
        scheduler.step(loss.item()) if name == "plateau" else scheduler.step()
        return loss.item(), own.param_groups[1]["lr"]

    return step, (torch.randn(5, 4).double(), torch.randn(5, 2).double()), own, scheduler


@pytest.fixture
def reload(tmp_path):
    """Saves a step and loads it."""

    def saved_and_loaded(step):
        step.save(tmp_path / "a.step")
        return tracejit.load(tmp_path / "a.step", backend="numpy")

    return saved_and_loaded


def compiled(step, *calls, times=4):
    step = tracejit.compile(step, backend="numpy")
    for args in calls:
        for _ in range(times):
            step(*args)
    return step


# ---- schedules


@pytest.mark.parametrize(
    "name, optimizer",
    [(name, "sgd") for name in SCHEDULES] + [("one cycle", "adam"), ("plateau", "adam")],
)
@pytest.mark.sweep(0.34)
def test_a_schedule_goes_on(name, optimizer, reload, tmp_path):
    """As eager goes on with it: the rates, the losses, and what the optimizer's groups hold."""
    step, batch, own, _ = scheduled(name, optimizer)
    loaded = reload(compiled(step, batch))
    for k in range(16):
        if k == 7:  # in the middle of it, once more through a file
            loaded.save(tmp_path / "b.step")
            loaded = tracejit.load(tmp_path / "b.step", backend="numpy")
        assert loaded(*batch) == pytest.approx(step(*batch), rel=1e-12), k
    held = {n: x for n, x in loaded.numbers.items() if n.startswith("own.")}
    for i, group in enumerate(own.param_groups):
        for key in ("lr", "momentum", "betas"):
            if type(group.get(key)) is float:
                assert held[f"own.param_groups[{i}].{key}"] == pytest.approx(group[key])
            elif group.get(key):
                assert held[f"own.param_groups[{i}].{key}[0]"] == pytest.approx(group[key][0])


def test_a_rate_for_one_call(reload):
    """A keyword is for its call; the schedule goes on as if there had been none."""
    step, batch, own, _ = scheduled("exponential")
    loaded = reload(compiled(step, batch))
    name = "own.param_groups[0].lr"
    before = loaded.numbers[name]
    loaded(*batch, **{name: 0.0})
    assert loaded.numbers[name] == pytest.approx(0.9 * before)


def test_a_call_that_fails_leaves_the_schedule(reload):
    """A schedule that is over raises what torch's does, and nothing has changed."""
    step, batch, own, scheduler = scheduled("one cycle")
    step = compiled(step, batch)
    scheduler.last_epoch = 59
    loaded = reload(step)
    loaded(*batch)
    numbers, state = dict(loaded.numbers), {n: t.clone() for n, t in loaded.state_dict().items()}
    for _ in range(2):
        with pytest.raises(ValueError, match="Tried to step 61"):
            loaded(*batch)
        assert loaded.numbers == numbers
        assert all(torch.equal(t, state[n]) for n, t in loaded.state_dict().items())


def test_decisions_by_a_rate_that_a_schedule_has_set(reload):
    """Where they come out otherwise, another plan is taken, and the schedule has not been stepped
    twice."""
    step, batch, own, _ = scheduled("exponential")
    seen = {"small": 0}

    def deciding(x, y):
        loss, rate = step(x, y)
        if own.param_groups[0]["lr"] < 0.025:
            seen["small"] += 1
            return loss, rate, "small"
        return loss, rate, "large"

    fast = tracejit.compile(deciding, backend="numpy")
    for _ in range(12):
        fast(*batch)
    own.param_groups[0]["lr"] = 0.05
    for _ in range(4):
        fast(*batch)
    loaded, said = reload(fast), set()
    for k in range(6):
        ours, theirs = loaded(*batch), deciding(*batch)
        assert ours[:2] == pytest.approx(theirs[:2], rel=1e-12), k
        assert ours[2] == theirs[2]
        said.add(ours[2])
    assert said == {"small", "large"} and loaded.numbers["seen['small']"] == seen["small"]


class Warm(rates.LRScheduler):
    """A schedule of the user's."""

    def get_lr(self):
        return [base * min(1.0, (self.last_epoch + 1) / 10) for base in self.base_lrs]


def with_a_method(o):
    scheduler = rates.ExponentialLR(o, 0.9)
    scheduler.get_lr = lambda: [0.5 / (1 + scheduler.last_epoch)] * 2
    return scheduler


def decayed(epoch: int, by: float) -> float:
    return by**epoch


OF_FUNCTIONS = {
    "LambdaLR": lambda o: rates.LambdaLR(o, partial(decayed, by=0.9)),
    "MultiplicativeLR": lambda o: rates.MultiplicativeLR(o, [lambda e: 0.9, lambda e: 0.8]),
    "SequentialLR": lambda o: rates.SequentialLR(
        o, [rates.LambdaLR(o, lambda e: (e + 1) / 5), rates.CosineAnnealingLR(o, 50)], [5]
    ),
    "ChainedScheduler": lambda o: rates.ChainedScheduler(
        [rates.LambdaLR(o, lambda e: 1 / (1 + e)), rates.ExponentialLR(o, 0.99)]
    ),
    "Warm": Warm,
    "ExponentialLR": with_a_method,
}


def asking(make, read=lambda o, s: None):
    """A step of two groups with a schedule of the user's own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}]
    own = torch.optim.SGD(groups, lr=0.02, momentum=0.9)
    scheduler = make(own)

    def step(x, y):
        own.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        own.step()
        now = read(own, scheduler)
        scheduler.step()
        return loss.item(), now

    return step, (torch.randn(5, 4).double(), torch.randn(5, 2).double()), own


@pytest.mark.parametrize("kind", OF_FUNCTIONS)
@pytest.mark.parametrize("read", [False, True])
@pytest.mark.sweep(0.34)
def test_rates_of_a_schedule_that_is_code_are_given(kind, read, reload, tmp_path):
    """By each call: it never goes on with the rates of when it was saved."""
    reads = (lambda o, s: o.param_groups[1]["lr"]) if read else (lambda o, s: None)
    step, batch, own = asking(OF_FUNCTIONS[kind], reads)
    loaded = reload(compiled(step, batch, times=6))
    manifest = json.loads(zipfile.ZipFile(tmp_path / "a.step").read("manifest.json"))
    names = [f"own.param_groups[{i}].lr" for i in range(2)]
    assert manifest["asked"] == dict.fromkeys(names, kind)
    before = {name: x.clone() for name, x in loaded.state_dict().items()}
    for given in ({}, {names[0]: 0.1}, {"lr": [0.1]}):
        with pytest.raises(CallError, match=rf"a schedule of .*{kind}.*lr=|lr are 2 rates, not 1"):
            loaded(*batch, **given)
    with pytest.raises(CallError, match="lr may be one of"):
        loaded(*batch, lr=0.1)
    assert all(torch.equal(x, before[name]) for name, x in loaded.state_dict().items())
    for k in range(20):
        now = [group["lr"] for group in own.param_groups]
        given = {"lr": now} if k % 2 else dict(zip(names, now, strict=True))
        if k == 7:  # in the middle of it, once more through a file
            loaded.save(tmp_path / "b.step")
            loaded = tracejit.load(tmp_path / "b.step", backend="numpy")
        ours, theirs = loaded(*batch, **given), step(*batch)
        assert ours[0] == pytest.approx(theirs[0], rel=1e-12), k
        assert ours[1] == (pytest.approx(theirs[1], rel=1e-12) if read else None)


class Bad(rates.LRScheduler):
    """Its rates are not all that it changes."""

    def get_lr(self):
        for group in self.optimizer.param_groups:
            group["momentum"] = 0.5
        return [0.5 * base for base in self.base_lrs]


class Stepping(rates.ExponentialLR):
    def step(self):
        super().step()


def with_a_cycle(o):
    own = rates.LambdaLR(o, lambda epoch: 0.9**epoch)
    return rates.ChainedScheduler([own, rates.CyclicLR(o, 0.01, 0.1, 5)])


@pytest.mark.parametrize(
    "make, read, why",
    [
        (Bad, None, "Bad is code of yours, which may change more than rates"),
        (lambda o: Stepping(o, 0.9), None, "Stepping.*in a way of its own|Stepping.step"),
        (with_a_cycle, None, "CyclicLR and a schedule that is yours"),
        (
            lambda o: rates.LambdaLR(o, lambda e: o.param_groups[0].update(momentum=0.5) or 1.0),
            *(None, "LambdaLR is code of yours"),
        ),
    ],
)
def test_schedules_that_may_change_more(make, read, why, tmp_path):
    step, batch, _ = asking(make, read or (lambda o, s: None))
    step = compiled(step, batch, times=6)
    with pytest.raises(CannotSave, match=rf"({why}).*loaded\(…, lr=…\)"):
        step.save(tmp_path / "a.step")


def test_a_rate_that_a_schedule_of_code_has_set_is_not_read(tmp_path):
    step, batch, own = asking(OF_FUNCTIONS["LambdaLR"])

    def reads(x, y):
        return step(x, y), own.param_groups[0]["lr"]

    reads = compiled(reads, batch, times=6)
    with pytest.raises(CannotSave, match=r"it reads own.param_groups\[0\].lr after a scheduler"):
        reads.save(tmp_path / "a.step")


# ---- what is noted in lists


def test_lists_that_are_appended_to(reload, tmp_path):
    """A loaded step has lists of its own, empty at first: by what the step called them."""
    torch.manual_seed(0)
    w = torch.randn(3).double().requires_grad_()

    class Log:
        def __init__(self):
            self.losses, self.rows = [], []

    log = Log()

    def step(x, lr=0.1):
        loss = (w * x).square().sum()
        loss.backward()
        with torch.no_grad():
            w.sub_(w.grad * lr)
            w.grad = None
        log.losses.append(loss.item())
        log.losses.append(lr)
        log.rows.append({"loss": loss.detach(), "of": ("w", [x.shape[0], None])})

    x = torch.ones(3).double()
    loaded = reload(compiled(step, (x, 0.1), times=6))
    assert loaded.lists == {"log.losses": [], "log.rows": []}
    log.losses.clear(), log.rows.clear()
    for k in range(5):
        step(x + k, 0.01 * k)
        loaded(x + k, 0.01 * k)
    assert loaded.lists["log.losses"] == pytest.approx(log.losses, rel=1e-12)
    assert len(loaded.lists["log.rows"]) == 5
    for mine, theirs in zip(loaded.lists["log.rows"], log.rows, strict=True):
        assert mine["loss"].item() == pytest.approx(theirs["loss"].item(), rel=1e-12)
        assert mine["of"] == ("w", [3, None]) == theirs["of"]
    loaded.lists["log.losses"].clear()
    with pytest.raises(CallError):
        loaded(torch.ones(4).double(), 0.1)
    assert loaded.lists["log.losses"] == []  # a call that fails appends nothing
    loaded.save(tmp_path / "b.step")
    again = tracejit.load(tmp_path / "b.step", backend="numpy")
    again(x, 0.1)
    assert len(again.lists["log.losses"]) == 2 and len(again.lists["log.rows"]) == 1


def test_a_list_that_one_plan_looks_at(tmp_path):
    """Another one appends to it: a file has no list to look at."""
    seen = []

    def step(x, much):
        if much:
            return x * len(seen)
        seen.append(x.sum().item())
        return x

    x = torch.ones(3)
    step = compiled(step, (x, False), (x, True), times=6)
    with pytest.raises(CannotSave, match="seen|another one|replayed"):
        step.save(tmp_path / "a.step")


def test_an_argument_that_is_appended_to(tmp_path):
    def step(x, losses):
        losses.append(x.sum().item())
        return x * 2

    step = compiled(step, (torch.ones(3), []), times=6)
    with pytest.raises(CannotSave, match="losses|is not replayed"):
        step.save(tmp_path / "a.step")


# ---- batches and results of classes


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclass
class Batch:
    x: torch.Tensor
    y: torch.Tensor
    scale: float = 2.0


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    y: torch.Tensor


class Plain:
    def __init__(self, x, y):
        self.x, self.y = x, y


@dataclass(slots=True)
class Slotted:
    x: torch.Tensor
    y: torch.Tensor
    scale: float = 2.0


class Half(Slotted):
    """Some of it in slots, some in a dict."""


def namespace(x, y):
    return SimpleNamespace(x=x, y=y, scale=2.0)


class Weighed(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor
    scale: float = 2.0


WITH_A_NUMBER = (Batch, Slotted, Half, Weighed, namespace)


@pytest.mark.parametrize("kind", [Pair, Frozen, Plain, *WITH_A_NUMBER])
@pytest.mark.sweep(0.17)
def test_a_batch_of_a_class(kind, reload):
    """It may be given as an object of any class with these attributes, or as a dict."""

    def step(batch):
        return (batch.x * 2 - batch.y).sum() * getattr(batch, "scale", 1.0)

    x, y = torch.arange(3.0), torch.ones(3)
    step = tracejit.compile(step, backend="numpy")
    for _ in range(4):
        step(kind(x, y))
    assert step.stats.replays
    loaded = reload(step)
    expected = step.__wrapped__(kind(x + 1, y))
    like = {"x": x + 1, "y": y} | ({"scale": 2.0} if kind in WITH_A_NUMBER else {})
    Other = namedtuple("Other", [*like])
    for given in (kind(x + 1, y), like, Other(*like.values())):
        if kind in (Pair, Weighed) or not isinstance(given, tuple):
            assert torch.equal(loaded(given), expected)
    if kind in (Pair, Weighed):
        assert torch.equal(loaded(tuple(like.values())), expected)
    name = "SimpleNamespace" if kind is namespace else kind.__name__
    for wrong in ({"x": x}, x, None, [x, y, y, y], object()):
        with pytest.raises(CallError, match=rf"batch is a {name} with x, y"):
            loaded(wrong)
    with pytest.raises(CallError, match=r"batch.x is f32\[4\], and the plan takes f32\[3\]"):
        loaded({**like, "x": torch.ones(4)})
    if kind in WITH_A_NUMBER:  # it is a runtime scalar, from the first call on
        assert step.stats.compiles == 1
        for number in (3.0, -1.5):
            found = loaded({**like, "scale": number})
            assert torch.equal(found, expected / 2 * number)
        with pytest.raises(CallError, match=r"batch.scale is a float, not None"):
            loaded({**like, "scale": None})


def test_numbers_in_batches_of_any_kind(reload):
    """In dicts, lists and objects in them; as many plans as there are of their kinds."""

    def step(batch, pair):
        return batch["x"] * batch["rate"] + batch["more"][0].scale * pair[1] + batch["more"][1]

    def given(k):
        more = [Slotted(torch.ones(2), None, 1.0 + k), 0.5 * k]
        return {"x": torch.arange(3.0) + k, "rate": 0.1 * k, "more": more}, (torch.ones(1), 2.0 * k)

    compiled_step = tracejit.compile(step, backend="numpy")
    for k in range(8):
        assert torch.equal(compiled_step(*given(k)), step(*given(k)))
    assert compiled_step.stats.compiles == 1 and compiled_step.stats.replays
    loaded = reload(compiled_step)
    for k in range(8, 12):
        assert torch.equal(loaded(*given(k)), step(*given(k)))
    assert not loaded.numbers


def test_batches_in_batches(reload):
    def step(pair, many):
        return pair.x.x + pair.y["z"] + many[0].x

    x = torch.ones(3)
    given = Pair(Frozen(x, None), {"z": x + 1}), [Batch(x + 2, x + 3)]
    loaded = reload(compiled(step, given))
    assert torch.equal(loaded(*given), 3 * x + 3)
    like = {"x": {"x": x, "y": None}, "y": {"z": x + 0}}, [Batch(x.clone(), x.clone())]
    assert torch.equal(loaded(*like), 3 * x)


def test_results_with_names(reload, tmp_path):
    """They come back as tuples with the same names; torch's own as they are."""
    Outcome = namedtuple("Outcome", "loss best")

    def step(x):
        return Outcome(x.sum().item(), x.max(0)), [Pair(x * 2, 1)]

    x = torch.arange(6.0).view(2, 3)
    loaded = reload(compiled(step, (x,)))
    loaded.save(tmp_path / "b.step")
    for each in (loaded, tracejit.load(tmp_path / "b.step", backend="numpy")):
        outcome, (pair,) = each(x)
        assert type(outcome).__name__ == "Outcome" and outcome.loss == 15.0
        assert type(outcome.best) is torch.return_types.max
        assert outcome.best.indices.tolist() == [1, 1, 1]
        assert pair.x.tolist() == (2 * x).tolist() and pair.y == 1


def test_one_of_several_trainers(tmp_path):
    """`trainer.step.save` keeps that trainer's state."""

    class Trainer:
        def __init__(self, scale):
            self.w = torch.full((3,), scale).requires_grad_()
            self.calls = 0

        @tracejit.compile(backend="numpy")
        def step(self, x):
            self.calls += 1
            self.w.grad = None
            (self.w * x).sum().backward()
            with torch.no_grad():
                self.w -= self.w.grad
            return self.w.sum()

    one, two = Trainer(1.0), Trainer(5.0)
    x = torch.zeros(3)
    for _ in range(4):
        one.step(x)
        two.step(x)
    assert two.step.stats is Trainer.step.stats
    for trainer, expected in ((one, 3.0), (two, 15.0)):
        trainer.step.save(tmp_path / "a.step")
        loaded = tracejit.load(tmp_path / "a.step", backend="numpy")
        assert loaded(x).item() == expected
        assert loaded.numbers == {"self.calls": 5}


# ---- what is found by value


def test_a_mask_has_a_plan_for_each_count(reload):
    def step(x):
        return x[x > 0].mean()

    few, more = torch.tensor([1.0, -1.0, 2.0]), torch.tensor([1.0, 3.0, 2.0])
    loaded = reload(compiled(step, (few,), (more,), times=6))
    for x in (few, more, -torch.tensor([1.0, -2.0, -4.0]), more + 1):
        assert torch.equal(loaded(x), step(x))
    with pytest.raises(CallError, match=r"for 2 elements that are found"):
        loaded(torch.tensor([1.0, -1.0, -2.0]))


def test_what_is_found_by_others(reload):
    """The elements of `unique`, of repeats, of counts, of sequences that are packed."""

    def step(x, n):
        values, inverse, counts = torch.unique(n, return_inverse=True, return_counts=True)
        runs = torch.unique_consecutive(n)
        often = torch.repeat_interleave(x, n, dim=0)
        packed = nn.utils.rnn.pack_padded_sequence(x.view(1, 4, 1), n[:1] + 2, batch_first=True)
        padded, lengths = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
        at = (n == 2).nonzero()
        return values, inverse, counts, runs, often, torch.bincount(n), padded, at

    x, n = torch.arange(4.0), torch.tensor([2, 1, 2, 0])
    loaded = reload(compiled(step, (x, n), times=6))
    for args in ((x, n), (x + 1, n), (x, torch.tensor([2, 0, 2, 1]))):
        torch.testing.assert_close(loaded(*args), step(*args))
    with pytest.raises(CallError, match="elements that are found"):
        loaded(x, torch.tensor([2, 2, 2, 0]))


# ---- what is read and skipped


def test_a_step_that_skips_what_is_not_finite(reload):
    torch.manual_seed(0)
    w = torch.ones(3, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([w], lr=0.1)

    def step(x):
        optimizer.zero_grad()
        loss = (w * x).pow(2).sum()
        if not torch.isfinite(loss):
            return None
        loss.backward()
        optimizer.step()
        return loss.item()

    x = torch.arange(3.0).double()
    loaded = reload(compiled(step, *(6 * [(x,), (x * torch.nan,)]), times=2))
    for given in (x, x + 1, x * torch.inf, x):
        ours, theirs = loaded(given), step(given)
        assert ours is theirs is None or ours == pytest.approx(theirs, rel=1e-12)


def test_a_grad_scaler(reload):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)

    def step(x):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(x).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        return loss.item(), scaler.get_scale()

    x = torch.randn(3, 4)
    loaded = reload(compiled(step, (x,), (x * torch.inf,), (x,), times=6))
    for given in (x, x, x * torch.inf, x, x):
        assert loaded(given) == pytest.approx(step(given), rel=1e-2, nan_ok=True)


def flat(x: object) -> list:
    """The numbers and tensors in it, as plain values."""
    if isinstance(x, dict):
        return [[key, *flat(item)] for key, item in x.items()]
    if isinstance(x, (tuple, list)):
        return [number for item in x for number in flat(item)]
    return [x.tolist() if isinstance(x, torch.Tensor) else x]


@dataclass
class Metrics:
    loss: torch.Tensor
    seen: int
    parts: dict

    def __post_init__(self):
        self.double = self.loss * 2


@pytest.mark.parametrize("kind", [Metrics, Frozen, Plain])
def test_a_returned_object_of_attributes(kind, reload):
    """Each call makes a new one, in a replay too; a loaded step returns a tuple of its names."""
    w = torch.ones(3, requires_grad=True)
    history = []

    def step(x):
        loss = (w * x).sum()
        loss.backward()
        with torch.no_grad():
            w.sub_(w.grad, alpha=0.5)
        w.grad = None
        if kind is Metrics:
            return Metrics(loss.detach(), 3, {"max": (x.max(), loss.item())})
        return kind(loss.detach(), [x * 2])

    compiled = tracejit.compile(step, backend="numpy")
    for i in range(5):
        before = w.detach().clone()
        got = compiled(x := torch.arange(3.0) + i)
        after = w.detach().clone()
        w.data.copy_(before)
        expected = step(x)
        assert torch.equal(w, after)
        assert type(got) is kind and list(vars(got)) == list(vars(expected))
        assert flat(vars(got)) == flat(vars(expected))
        history.append(got)
    assert compiled.stats.replays, compiled.explain_mode()
    assert len({id(x) for x in history}) == 5
    loaded = reload(compiled)
    got, expected = loaded(torch.ones(3)), compiled(torch.ones(3))
    assert type(got).__name__ == kind.__name__ and got._fields == tuple(vars(expected))
    assert flat(got._asdict()) == flat(vars(expected))


def test_a_returned_object_that_somebody_keeps():
    """It is not made anew: the step's Python runs."""
    kept = []

    def step(x):
        found = Plain(x * 2, 1)
        kept.append(found)
        return found

    step = tracejit.compile(step, backend="numpy")
    for i in range(5):
        got = step(torch.ones(2) * i)
        assert got is kept[-1] and torch.equal(got.x, torch.ones(2) * 2 * i)
    assert len(kept) == 5 and not step.stats.replays


CHECKPOINTS = """
import io, torch, tracejit
w = torch.ones(3, requires_grad=True)
def step(x):
    (w * x).sum().backward()
    w.grad = None
    return x * 2
step = tracejit.compile(step, backend="numpy")
for _ in range(4):
    step(torch.ones(3))
traces = step.stats.traces
torch.save([torch.ones(2), w], io.BytesIO())
step.save("{path}")
step(torch.ones(3))
assert step.stats.traces == traces, step.explain_retraces()
"""


@pytest.mark.slow
def test_a_checkpoint_by_torch_save_is_no_change(tmp_path):
    """The first one of a process has pickle note something on the class of tensors."""
    script = CHECKPOINTS.format(path=tmp_path / "a.step")
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_folder_that_is_not_there(tmp_path):
    step = tracejit.compile(lambda x: x * 2, backend="numpy")
    for _ in range(4):
        step(torch.ones(2))
    path = tmp_path / "none" / "a.step"
    with pytest.raises(FileNotFoundError, match=r"none/a\.step'$"):
        step.save(path)
