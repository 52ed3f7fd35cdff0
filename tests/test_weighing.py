"""Calls that can only be rerun are timed against eager, and run the faster way."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
from torch import nn

import tracejit
from tracejit.errors import TracejitWarning
from tracejit.weighing import Weighing


def weighed(reruns: list[float], eagers: list[float]) -> tuple[int, str]:
    """What times in microseconds say at the end: eager calls to come, and the verdict."""
    weighing = Weighing()
    for seconds in reruns:
        assert not weighing.wants_eager
        weighing.reran(seconds * 1e-6, "it draws numbers")
    for i, seconds in enumerate(eagers):
        assert weighing.eager_calls() == len(eagers) - i and weighing.verdict == ""
        weighing.ran_eagerly(seconds * 1e-6)
    return weighing.eager_calls(), weighing.verdict


def test_medians_of_the_last_eight_decide():
    cold = [90_000.0] * 8  # the first reruns are not of interest
    calls, verdict = weighed(cold + [300.0] * 7 + [9000.0], [200.0] * 5 + [5000.0] * 3)
    assert calls == 1200  # a hundred times as long as eight reruns
    assert verdict == (
        "an eager call takes 200 µs, a rerun 300, and its Python has to run on every call: "
        "it draws numbers"
    )
    for eager in (290.0, 300.0, 400.0):  # not clearly faster
        assert weighed(cold + [300.0] * 8, [eager] * 8) == (0, "")


def test_eager_calls_are_never_so_few_that_reruns_are_felt():
    assert weighed([210.0] * 16, [190.0] * 8)[0] == 1024
    assert weighed([2000.0] * 16, [10.0] * 8)[0] == 160_000


def test_reruns_are_timed_again_after_eager_calls():
    for again, calls in ((150.0, 0), (300.0, 1200)):
        weighing = Weighing()
        for _ in range(16):
            weighing.reran(300e-6, "")
        for _ in range(8):
            weighing.ran_eagerly(200e-6)
        assert weighing.eager_calls() == 1200
        for _ in range(7):
            weighing.reran(again * 1e-6, "")
            assert weighing.eager_calls() == 0 and not weighing.wants_eager
        weighing.reran(again * 1e-6, "")
        assert weighing.eager_calls() == calls
    for _ in range(40):
        weighing.reran(1e-6, "")
        weighing.eager_calls()
    assert weighing.eager_calls() == 0 and not weighing.wants_eager


def draws(n: int = 0):
    """A step that draws a number of Python's on every call, and its model."""
    torch.manual_seed(3)
    net = nn.Linear(5, 2)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    rng = random.Random(7)

    def step(x):
        optimizer.zero_grad()
        loss = (net(x) * rng.random()).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, net


@pytest.fixture
def clock(monkeypatch):
    """Sets what a rerun and an eager call seem to take, in seconds."""
    times = {"reran": 1.0, "ran_eagerly": 1.0}
    for name in times:
        real = getattr(Weighing, name)

        def seen(self, seconds, *why, name=name, real=real):
            real(self, times[name], *why)

        monkeypatch.setattr(Weighing, name, seen)
    return times


def test_a_step_whose_trace_is_dearer_than_its_work_runs_eagerly(clock):
    clock["ran_eagerly"] = 0.5
    (eager, net), (step, ours) = draws(), draws()
    compiled = tracejit.compile(step, on_unsupported="eager")
    x = torch.randn(3, 5)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(60):
            torch.testing.assert_close(compiled(x), eager(x))
    for a, b in zip(net.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert compiled.stats.replays == 0
    traces = compiled.stats.traces
    assert compiled.stats.eager == 60 - traces and 16 <= traces <= 24, compiled.stats
    text = compiled.explain_mode()
    assert text.startswith("eager: an eager call takes 500000 µs, a rerun 1000000, "), text
    assert "random" in text
    about = [str(w.message) for w in said if "runs eagerly: an eager call" in str(w.message)]
    assert len(about) == 1 and issubclass(said[-1].category, TracejitWarning)


def test_a_step_whose_kernels_win_stays_in_rerun(clock):
    clock["ran_eagerly"] = 1.5
    (eager, _), (step, _) = draws(), draws()
    compiled = tracejit.compile(step, on_unsupported="eager")
    x = torch.randn(3, 5)
    for _ in range(60):
        torch.testing.assert_close(compiled(x), eager(x))
    assert compiled.stats.eager == 8 and compiled.stats.traces == 52  # eight were timed
    assert compiled.explain_mode().startswith("rerun: ")


def test_what_may_not_be_eager_is_not_weighed(clock):
    clock["ran_eagerly"] = 0.1
    step, _ = draws()
    compiled = tracejit.compile(step, on_unsupported="raise")
    for _ in range(40):
        compiled(torch.ones(3, 5))
    assert compiled.stats.eager == 0 and compiled.stats.traces == 40


@pytest.mark.parametrize("slower", [True, False])
def test_reruns_that_were_asked_for_stay_and_it_is_said_what_they_cost(clock, slower):
    clock["ran_eagerly"] = 0.1 if slower else 1.5
    step, _ = draws()
    compiled = tracejit.compile(step, mode="rerun", on_unsupported="eager")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(100):
            compiled(torch.ones(3, 5))
    assert compiled.stats.eager == 8 and compiled.stats.traces == 92  # eight were timed
    assert compiled.explain_mode().startswith("rerun: ")
    about = [str(w.message) for w in said if issubclass(w.category, TracejitWarning)]
    text = "as was asked for, which is slower: an eager call takes 100000 µs"
    assert len(about) == slower and all(text in x for x in about)


def test_an_eager_call_that_raises_is_not_timed(clock):
    clock["ran_eagerly"] = 0.5
    rng, fails = random.Random(1), []

    def step(x):
        if fails:
            raise KeyError("planned")
        return x * rng.random()

    compiled = tracejit.compile(step, on_unsupported="eager")
    x, same = torch.ones(3), random.Random(1)
    while not compiled.stats.eager:
        torch.testing.assert_close(compiled(x), x * same.random())
    fails.append(1)
    for _ in range(3):
        with pytest.raises(KeyError, match="planned"):
            compiled(x)
    fails.clear()
    for _ in range(30):
        torch.testing.assert_close(compiled(x), x * same.random())
    assert compiled.explain_mode().startswith("eager: an eager call takes 500000")
