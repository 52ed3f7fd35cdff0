"""The equality check must be able to fail: each kind of difference from eager is caught."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import tracejit
from tracejit import run
from tracejit.ir.interp import evaluate
from tracejit.ir.text import parse
from tracejit.testing import (
    assert_equal_to_eager,
    assert_trains_like_eager,
    losses_agree,
    magnitudes,
)


def make_step():
    torch.manual_seed(0)
    x, w = torch.randn(6, 5), torch.randn(5, 4, requires_grad=True)

    def step():
        loss = (x @ w).tanh().pow(2).sum()
        loss.backward()
        with torch.no_grad():
            w.sub_(0.1 * w.grad)
        return loss

    return step, [w]


def spoil(monkeypatch, change):
    """Let every commit change what the step leaves behind."""
    drivers = [sys.modules[f"tracejit.{name}"] for name in ("compile", "programs")]
    original = run.generate

    def generate(*args, **kwargs):
        made = original(*args, **kwargs)

        def function(*call):
            returned = made.function(*call)
            change()
            return returned

        return replace(made, function=function)

    for driver in drivers:
        monkeypatch.setattr(driver, "generate", generate)


def test_an_honest_step_passes():
    step, _ = make_step()
    compiled = assert_equal_to_eager(step, calls=5)
    assert compiled.stats.replays > 0


@pytest.mark.parametrize("relative", [1e-3, 1e-4])
def test_a_small_error_in_a_parameter_is_caught(monkeypatch, relative):
    step, (w,) = make_step()
    spoil(monkeypatch, lambda: w.data.mul_(1 + relative))
    with pytest.raises(AssertionError, match="allowed"):
        assert_equal_to_eager(step)


def test_a_nan_is_caught(monkeypatch):
    step, (w,) = make_step()
    spoil(monkeypatch, lambda: w.data[0].fill_(float("nan")))
    with pytest.raises(AssertionError, match="NaN"):
        assert_equal_to_eager(step)


def test_a_lost_gradient_is_caught(monkeypatch):
    step, (w,) = make_step()
    spoil(monkeypatch, lambda: setattr(w, "grad", None))
    with pytest.raises(AssertionError, match="grad"):
        assert_equal_to_eager(step)


def test_a_wrong_integer_is_caught(monkeypatch):
    counts = torch.zeros(3, dtype=torch.int64)

    def step():
        counts.add_(1)

    spoil(monkeypatch, lambda: counts.add_(1))
    with pytest.raises(AssertionError, match="differs from eager"):
        assert_equal_to_eager(step)


def test_a_drifting_free_run_is_caught(monkeypatch):
    parameters = []

    def make():
        step, ws = make_step()
        parameters[:] = ws
        return step, ws

    spoil(monkeypatch, lambda: parameters[0].data.mul_(0.999))
    with pytest.raises(AssertionError, match="loss|parameter"):
        assert_trains_like_eager(make, calls=20)


def test_loss_rule():
    assert losses_agree(1.0005, 1.0, 1.0) and not losses_agree(1.002, 1.0, 1.0)
    assert losses_agree(1e-9, 0.0, 2.0) and not losses_agree(1e-8, 0.0, 2.0)
    assert losses_agree(float("nan"), float("nan"), 1.0)
    assert not losses_agree(float("nan"), 1.0, 1.0)
    assert not losses_agree(1.0, float("inf"), 1.0)


def test_arguments_state_and_options_are_passed_on():
    kept = [torch.zeros(3)]

    def step(x):
        kept[0].add_(x)
        return kept[0] * 2

    compiled = assert_equal_to_eager(
        step, lambda: [torch.ones(3)], state=kept, calls=3, mode="rerun"
    )
    assert isinstance(compiled, tracejit.CompiledStep) and compiled.options.mode == "rerun"


def test_an_argument_that_is_expanded():
    x = torch.arange(3.0).expand(2, 3)
    compiled = assert_equal_to_eager(lambda x: x * 2, lambda: [x], calls=3)
    assert compiled.stats.replays and x.stride() == (0, 1)


def test_magnitudes_see_cancellation():
    graph = parse(
        """
        f(%0: f32[2], %1: f32[2]) {
          %2: f32[2] = sub(%0, %1)
          %3: f32[2] = mul(%2, %2)
          %4: f32[] = reduce_sum(%3, axes=(0,))
          return %4
        }"""
    )
    x = np.array([1000.0, 1.0], np.float32)
    sizes = magnitudes(graph, [x, x])
    assert sizes[graph.results[0].value] == pytest.approx(2000.0**2 + 2.0**2)


def test_magnitudes_in_a_loop():
    """Those of its steps written out."""
    looped = parse(
        """
        f(%0: f32[2], %1: f32[2,2]) {
          %2: f32[10] = scan(%0, %1, body=body0, carried=1, sliced=1, steps=2, reverse=True)
          return %2
          body body0(%0: f32[2], %1: f32[2]) {
            %2: f32[2] = sub(%0, %1)
            %3: f32[2] = mul(%2, %2)
            return %2, %3
          }
        }"""
    )
    x, rows = np.array([10.0, 1.0], np.float32), np.array([[1, 2], [10, 3]], np.float32)
    sizes = magnitudes(looped, [x, rows])[looped.results[0].value]
    after = [21, 6], [20, 4], [10, 1]  # the last row is the first step's
    squares = [21**2, 6**2], [20**2, 4**2]
    assert sizes == pytest.approx(np.concatenate([*after, *squares]))


def test_magnitudes_of_what_is_masked():
    """An infinity is exact, and a number far from the maximum is not the maximum by rounding."""
    graph = parse(
        """
        f(%0: f32[3]) {
          %1: f32[] = reduce_max(%0, axes=(0,))
          %2: f32[3] = expand(%1, shape=(3,))
          %3: f32[3] = sub(%0, %2)
          %4: f32[3] = exp(%3)
          return %4
        }"""
    )
    for masked in (-np.inf, np.finfo(np.float32).min):
        sizes = magnitudes(graph, [np.array([1.0, 2.0, masked], np.float32)])
        assert sizes[graph.results[0].value] == pytest.approx(
            [4 * np.exp(-1), 1 + 2 * 2, 0], rel=1e-5
        )


def test_magnitudes_of_the_first_order_do_not_overflow():
    graph = parse(
        """
        f(%0: f32[1]) {
          %1: f32[1] = sub(%0, %0)
          %2: f32[1] = mul(%1, %0)
          %3: f32[1] = mul(%2, %2)
          return %3
        }"""
    )
    x = np.array([1e3], np.float32)
    value = graph.results[0].value
    assert magnitudes(graph, [x])[value] == pytest.approx((2e3 * 1e3) ** 2)
    assert magnitudes(graph, [x], first_order=True)[value] == 0.0  # 2 · 0 · 2e6


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "RMSprop"])
def test_a_step_with_a_module_and_an_optimizer(optimizer):
    torch.manual_seed(0)
    model, x = torch.nn.Linear(4, 3), torch.randn(5, 4)
    opt = getattr(torch.optim, optimizer)(model.parameters(), lr=0.05)

    def step():
        opt.zero_grad()
        loss = model(x).tanh().pow(2).sum()
        loss.backward()
        opt.step()
        return loss

    compiled = assert_equal_to_eager(step, calls=6)
    assert compiled.stats.replays > 0
    counters = [s["step"].item() for s in opt.state.values() if "step" in s]
    assert counters == [6.0] * len(counters)  # set back between the runs of a call


def test_a_wrong_optimizer_state_is_found():
    w = torch.ones(3, requires_grad=True)
    opt = torch.optim.Adam([w])

    def step():
        opt.zero_grad()
        (w * w).sum().backward()
        opt.step()

    compiled = tracejit.compile(step)

    def spoiled():
        compiled()
        opt.state[w]["exp_avg"].mul_(1.01)

    with pytest.raises(AssertionError, match="returned tensor"):
        wrong = tracejit.compile(step)
        wrong.__class__ = type("Spoiled", (type(wrong),), {"__call__": lambda self: spoiled()})
        assert_equal_to_eager(wrong, calls=1)


def test_state_is_compared_in_every_call(monkeypatch):
    w, calls = torch.ones(3), []

    def step(x):
        return x + 1

    def change():
        calls.append(1)
        if len(calls) == 3:
            w.add_(1)

    spoil(monkeypatch, change)
    with pytest.raises(AssertionError, match=r"call 2: tensor 1 of shape \[3\]"):
        assert_equal_to_eager(step, lambda: [torch.ones(2)], state=[w], calls=4, mode="rerun")


def test_magnitudes_of_attention():
    """They are finite where keys are hidden, and no less than the results."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 5, 4)).astype(np.float32) for _ in range(3))
    bias = np.where(np.tri(5, dtype=bool), 0, -np.inf).astype(np.float32)[None].repeat(2, 0)
    graph = parse(
        """
        f(%0: f32[2,5,4], %1: f32[2,5,4], %2: f32[2,5,4], %3: f32[2,5,5]) {
          %4: f32[2,5,4] = attention(%0, %1, %2, %3, causal=False, scale=0.5)
          %5: f32[2,5] = attention_lse(%0, %1, %3, causal=False, scale=0.5)
          %6: f32[2,5,4] = attention_dq(%0, %1, %2, %3, %5, %5, %4, causal=False, scale=0.5)
          %7: f32[2,5,4] = attention_dk(%0, %1, %2, %3, %5, %5, %4, causal=False, scale=0.5)
          %8: f32[2,5,4] = attention_dv(%0, %1, %2, %3, %5, %5, %4, causal=False, scale=0.5)
          return %4, %5, %6, %7, %8
        }"""
    )
    inputs = [q, k, v, bias]
    sizes = magnitudes(graph, inputs)
    for result, value in zip(graph.results, evaluate(graph, inputs)[0], strict=True):
        size = sizes[result.value]
        assert (size >= np.abs(value)).all() and (size < 100).all()
