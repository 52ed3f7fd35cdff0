"""Whole steps on the fake device: first runs, reruns and replays equal eager in lockstep, and no
order of launches, copies and events is left to chance."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

import tracejit
from support.fake import FAKE, trained
from support.optimizer_checks import OPTIMIZERS, lockstep, training
from support.programs import PROGRAMS
from tracejit.errors import TracejitError
from tracejit.runtime.fake_device import FakeDevice
from tracejit.testing import assert_equal_to_eager, fake_device

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, so it needs a process without the interpreter", allow_module_level=True)

COMPILED = ("2 zero_", "softmax", "7 linear fit")  # by ptxas in every run of the tests


@pytest.fixture
def device() -> Iterator[FakeDevice]:
    with fake_device(compiled=False) as found:
        yield found


def check_program(name: str) -> None:
    """Equal in each of the first calls, of which the last are replays, and in reruns."""
    program = PROGRAMS[name]
    step, state = program.make(**program.small)
    compiled = assert_equal_to_eager(step, calls=4, state=state, backend=FAKE)
    assert compiled.stats.replays >= 1, compiled.explain_mode()
    step, state = program.make(**program.small)
    rerun = assert_equal_to_eager(step, calls=3, state=state, backend=FAKE, mode="rerun")
    assert rerun.stats.reruns >= 1 and not rerun.stats.replays


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.sweep(6)
def test_programs(device, name):
    check_program(name)
    assert any("launch" in line for line in device.log)


@pytest.mark.parametrize(
    "name", [n if n in COMPILED else pytest.param(n, marks=pytest.mark.slow) for n in PROGRAMS]
)
def test_programs_that_triton_compiles(name):
    with fake_device():
        check_program(name)


@pytest.mark.parametrize(
    ("name", "options", "plans", "foreach"),
    [
        pytest.param(
            *(name, options, plans, foreach),
            marks=[pytest.mark.slow] * (i > 0 or not foreach),
            id=f"{name}{i}-{foreach}",
        )
        for name, rows in OPTIMIZERS.items()
        for i, (options, plans) in enumerate(rows)
        for foreach in (True, False)
    ],
)
@pytest.mark.sweep(3)
def test_optimizers(device, name, options, plans, foreach):
    make = training(lambda p: getattr(torch.optim, name)(p, foreach=foreach, **options))
    step = lockstep(make, compiles=plans, calls=11, backend=FAKE, mode="auto")
    assert step.stats.replays >= 2, step.explain_mode()


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_fused_optimizers(device, name):
    make = training(lambda p: getattr(torch.optim, name)(p, lr=0.01, fused=True))
    lockstep(make, compiles=2, calls=8, backend=FAKE, mode="auto")


# ---- replays


def two_copies(make) -> tuple:
    """Eager and compiled, of the same start."""
    (eager, theirs, their_optimizer), (step, mine, optimizer) = make(), make()
    ours = tracejit.compile(step, backend=FAKE)
    return eager, theirs, their_optimizer, ours, mine, optimizer


def test_a_schedule_of_the_learning_rate_is_replayed(device):
    eager, theirs, their_optimizer, ours, mine, optimizer = two_copies(
        lambda: trained(torch.optim.AdamW)
    )
    for call in range(12):
        for one in (their_optimizer, optimizer):
            one.param_groups[0]["lr"] = 0.05 * 0.9**call
        torch.testing.assert_close(ours(), eager())
    assert ours.stats.replays >= 8 and ours.stats.compiles == 2
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("backend", ["fake:sm_90", "c"])
@pytest.mark.parametrize("name", ["Adam", "NAdam", "Adagrad"])
def test_step_counters_that_part(device, name, backend):
    """As long as they are one number it is computed with one of them; and with all when not."""

    def make() -> tuple:
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(3, 3)) for _ in range(9)]
        optimizer = getattr(torch.optim, name)(weights, lr=0.1, foreach=True)
        for w in weights:
            w.grad = torch.randn(3, 3)
        return weights, optimizer, lambda: optimizer.step() and None

    (theirs, their_optimizer, eager), (mine, optimizer, step) = make(), make()
    ours, together = tracejit.compile(step, backend=backend), 0
    changes = {6: lambda step: step.add_(3), 9: lambda step: step.sub_(3)}
    changes |= {12: lambda step: step.fill_(0), 14: lambda step: step.fill_(float("nan"))}
    for call in range(18):
        if call in changes:
            for o in (their_optimizer, optimizer):
                changes[call](o.state[o.param_groups[0]["params"][4]]["step"])
        if call == 16:
            for o in (their_optimizer, optimizer):
                for state in o.state.values():
                    state["step"].zero_()
        before = [optimizer.state[w]["step"].item() for w in mine if w in optimizer.state]
        replays = ours.stats.replays
        eager()
        ours()
        together += ours.stats.replays > replays and len(set(before)) == 1
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)
            counts = optimizer.state[a]["step"], their_optimizer.state[b]["step"]
            torch.testing.assert_close(*counts, equal_nan=True)
    assert ours.stats.replays >= 12 and 5 <= together < ours.stats.replays


def test_values_that_python_reads(device):
    def make():
        step, parameters, optimizer = trained()

        def reading(limit: float) -> float:
            loss = step()
            if loss > limit:
                return -loss.item()
            return loss.item()

        return reading, parameters, optimizer

    eager, theirs, _, ours, mine, _ = two_copies(make)
    for call in range(14):
        limit = 0.0 if call % 3 else 100.0
        assert ours(limit) == pytest.approx(eager(limit), rel=1e-4)
    assert ours.stats.replays >= 5, ours.explain_mode()
    assert any("to the host" in line for line in device.log)
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q)


def test_a_mask_that_selects(device):
    x = torch.randn(40)
    step = tracejit.compile(lambda: x[x > 0].sum() * 2, backend=FAKE)
    for call in range(8):
        x.copy_(torch.randn(40, generator=torch.Generator().manual_seed(call // 3)))
        torch.testing.assert_close(step(), x[x > 0].sum() * 2)


def test_an_index_out_of_range_is_refused_before_anything_is_written(device):
    w, total = torch.randn(7, 3), torch.zeros(())

    def step(x: torch.Tensor) -> torch.Tensor:
        total.add_(1)
        return F.embedding(x * 2, w).sum()

    compiled = tracejit.compile(step, backend=FAKE)
    for _ in range(5):
        torch.testing.assert_close(compiled(torch.tensor([1, 3])), w[[2, 6]].sum())
    with pytest.raises((TracejitError, IndexError)):
        compiled(torch.tensor([1, 4]))
    assert total.item() == 5


def test_backward_outside_the_step(device):
    w, x = torch.randn(6, 4, requires_grad=True), torch.randn(5, 6)
    step = tracejit.compile(lambda: (x @ w).tanh().sum(), backend=FAKE)
    for _ in range(6):
        w.grad = None
        step().backward()
        (expected,) = torch.autograd.grad((x @ w).tanh().sum(), w)
        torch.testing.assert_close(w.grad, expected)
    assert step.stats.replays >= 2 and len(step.backward_plans) == 1


def test_results_are_the_callers_to_keep(device):
    x = torch.zeros(3)

    def step() -> torch.Tensor:
        x.add_(1)
        return x * 2

    compiled = tracejit.compile(step, backend=FAKE)
    kept = [compiled() for _ in range(9)]
    assert [t[0].item() for t in kept] == [2.0 * (i + 1) for i in range(9)]


def test_accumulated_gradients(device):
    def make():
        torch.manual_seed(1)
        w, x = torch.randn(8, 5, requires_grad=True), torch.randn(3, 4, 8)

        def step() -> torch.Tensor:
            total = torch.zeros(())
            for batch in x:
                loss = (batch @ w).pow(2).mean()
                loss.backward()
                total = total + loss.detach()
            return total

        return step, [w], None

    eager, (v,), _, ours, (w,), _ = two_copies(make)
    for call in range(8):
        torch.testing.assert_close(ours(), eager())
        torch.testing.assert_close(w.grad, v.grad)
        if call % 3 == 2:
            with torch.no_grad():
                for p in (w, v):
                    p.sub_(0.01 * p.grad)
                    p.grad = None


def test_shapes_in_turn(device):
    w = torch.randn(6, 3)
    step = tracejit.compile(lambda x: (x @ w).relu().sum(0), backend=FAKE)
    for call in range(16):
        x = torch.randn((4, 9, 1)[call % 3], 6)
        torch.testing.assert_close(step(x), (x @ w).relu().sum(0))
    assert step.stats.replays >= 5


def test_inputs_that_are_not_aligned(device):
    base = torch.randn(65)

    def step(x: torch.Tensor) -> torch.Tensor:
        return (x * 3).sum()

    compiled = tracejit.compile(step, backend=FAKE)
    for call in range(12):
        x = base[call % 2 : call % 2 + 64]
        torch.testing.assert_close(compiled(x), step(x))
    assert compiled.stats.replays >= 4
