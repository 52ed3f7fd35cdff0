"""Numbers that a step draws by `random` and `numpy.random`: eager's, anew in each replay."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from random import random as chance

import numpy as np
import pytest
import torch
from numpy.random import beta
from torch import nn
from torch.nn import functional as F
from torch.utils import checkpoint as torch_checkpoint

import tracejit
from tracejit import errors
from tracejit.testing import fake_device


def seed(n: int = 5) -> None:
    random.seed(n), np.random.seed(n), torch.manual_seed(n)


def states() -> tuple:
    kind, words, *rest = np.random.get_state()
    torchs = torch.get_rng_state().tolist()
    return random.getstate(), kind, words.tolist(), rest, torchs


class Setup:
    """A network, its optimizer, and a batch."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.opt = torch.optim.SGD(self.net.parameters(), lr=0.02)
        self.x, self.y = torch.randn(5, 6), torch.arange(5) % 3

    def update(self, loss: torch.Tensor) -> torch.Tensor:
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()
        return loss.detach()


def mixup(w: Setup) -> Callable:
    def step(x, y):
        lam = float(np.random.beta(0.4, 0.4))
        order = torch.randperm(len(x))
        out = w.net(lam * x + (1 - lam) * x[order])
        return w.update(lam * F.cross_entropy(out, y) + (1 - lam) * F.cross_entropy(out, y[order]))

    return step


def mixup_by_other_names(w: Setup) -> Callable:
    def step(x, y):
        lam = beta(1.5, 1.5) * chance()
        return w.update(F.cross_entropy(w.net(lam * x + (1 - lam) * x.flip(0)), y))

    return step


def scheduled_sampling(w: Setup) -> Callable:
    cell = nn.Linear(6, 6)
    w.opt.add_param_group({"params": cell.parameters()})

    def step(x, y):
        h = x
        for _ in range(3):
            h = cell(h).tanh() if random.random() < 0.5 else cell(x)
        return w.update(F.cross_entropy(w.net(h), y))

    return step


def stochastic_depth(w: Setup) -> Callable:
    def step(x, y):
        h = w.net[0](x)
        if random.random() < 0.7:
            h = h + torch.relu(h) / 0.7
        return w.update(F.cross_entropy(w.net[2](F.dropout(h, 0.2)), y))

    return step


def shifted(w: Setup) -> Callable:
    def step(x, y):
        x = torch.roll(x, random.randint(0, 2), 1)[np.random.randint(2) :]
        return w.update(F.cross_entropy(w.net(x), y[-len(x) :]))

    return step


def of_all_kinds(w: Setup) -> Callable:
    def step(x, y):
        scale = random.uniform(0.5, 1.5) * random.gauss(1, 0.1) * random.betavariate(2, 2)
        scale = scale + np.random.uniform(low=0.1, high=0.2) + np.random.normal(0.0, 0.1)
        noise = np.random.rand() * np.random.randn() + np.random.poisson(3) * 0.01
        shift = random.randrange(7) / 7 + np.random.exponential(scale=0.1, size=None)
        loss = F.cross_entropy(w.net(x * scale + torch.rand(1).item() * noise), y)
        return w.update(loss * np.random.uniform(0.5, abs(scale) + 1)) + shift

    return step


STEPS = (mixup, mixup_by_other_names, scheduled_sampling, stochastic_depth, shifted, of_all_kinds)


@pytest.mark.parametrize("make", STEPS, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore::tracejit.errors.TracejitWarning")
@pytest.mark.sweep(0.34)
def test_steps_draw_eagers_numbers_and_are_replayed(make):
    found = []
    calls = 60 if make in (scheduled_sampling, shifted) else 30
    for compiled in (False, True):
        w = Setup()
        step = make(w)
        seed()
        if compiled:
            step = tracejit.compile(step)
        losses = []
        for i in range(calls):
            losses.append(step(w.x, w.y))
            if i % 7 == 3:  # the numbers between the calls are others'
                random.random(), np.random.rand(3), np.random.randn(), torch.rand(2)
        found.append((torch.stack(losses), [*w.net.parameters()], states()))
    (eager, weights, after), (ours, others, then) = found
    torch.testing.assert_close(ours, eager)
    torch.testing.assert_close(others, weights)
    assert then == after
    assert step.stats.replays >= 20
    assert step.stats.eager == 0


def test_another_decision_leaves_the_generators_to_the_next_plan():
    """A replay that turns out to go another way has drawn, and puts that back."""

    def step(x):
        y = x * np.random.normal(2.0) * np.random.rand()
        return y + 1 if random.random() < 0.5 else y * random.gauss(0, 1)

    x = torch.ones(3)
    seed()
    eager = [step(x) for _ in range(40)]
    after = states()
    compiled = tracejit.compile(step)
    seed()
    for expected in eager:
        torch.testing.assert_close(compiled(x), expected)
    assert states() == after
    assert compiled.stats.branches and compiled.stats.replays > 30


def test_an_error_after_draws():
    def step(x, n):
        y = x * random.random() * np.random.randn() * np.random.rand()
        if n > 3:
            raise KeyError(n)
        return y[torch.tensor([n])]

    compiled, x = tracejit.compile(step), torch.ones(3)
    for _ in range(5):
        compiled(x, 1)
    before = states()
    with pytest.raises(KeyError):
        compiled(x, 4)
    seed(), step(x, 1), step(x, 2)
    after = states()
    seed(), compiled(x, 1), compiled(x, 2)
    assert states() == after != before


def test_what_eager_rejects():
    compiled = tracejit.compile(lambda x: x * np.random.normal(0.0, -1.0))
    with pytest.raises(ValueError, match="scale"):
        compiled(torch.ones(2))


def test_arguments_that_vary():
    def step(x, high):
        return x * random.uniform(0.0, high) + np.random.normal(scale=high)

    compiled, x = tracejit.compile(step), torch.ones(3)
    seed()
    eager = [step(x, 0.5 + i) for i in range(8)]
    seed()
    for i, expected in enumerate(eager):
        torch.testing.assert_close(compiled(x, 0.5 + i), expected)
    assert compiled.stats.replays >= 5


@pytest.mark.filterwarnings("ignore::tracejit.errors.TracejitWarning")
@pytest.mark.parametrize(
    "draw",
    [
        lambda: float(np.random.rand(3).sum()),
        lambda: float(np.random.uniform(0, 1, 2).sum()),
        lambda: float(np.random.normal(size=2)[0]),
        lambda: float(np.random.uniform(np.float64(2.0))),
        lambda: random.choice([1.0, 2.0]),
        lambda: random.getrandbits(80) / 2**80,
        lambda: random.Random(random.getrandbits(8)).random(),
    ],
)
@pytest.mark.sweep(0.34)
def test_other_draws_are_rerun(draw):
    compiled, x = tracejit.compile(lambda x: x * draw(), mode="auto"), torch.ones(3)
    seed()
    eager = [x * draw() for _ in range(6)]
    after = states()
    seed()
    for expected in eager:
        torch.testing.assert_close(compiled(x), expected)
    assert states() == after and not compiled.stats.replays


@pytest.mark.filterwarnings("ignore::tracejit.errors.TracejitWarning")
def test_a_seed_in_the_step_is_rerun():
    def step(x):
        random.seed(0)
        return x * random.random()

    compiled, x = tracejit.compile(step), torch.ones(3)
    assert all(torch.equal(compiled(x), step(x)) for _ in range(5))
    assert not compiled.stats.replays


def test_another_function_in_the_modules_place(monkeypatch):
    compiled, x = tracejit.compile(lambda x: x * random.random() * np.random.rand()), torch.ones(3)
    for _ in range(5):
        compiled(x)
    assert compiled.stats.replays
    monkeypatch.setattr(random, "random", lambda: 2.0)
    monkeypatch.setattr(np.random, "rand", lambda: 3.0)
    for _ in range(4):
        assert torch.equal(compiled(x), x * 6.0)


def test_another_generator_in_numpys_place():
    step = lambda x: x * np.random.rand()  # noqa: E731
    compiled, x = tracejit.compile(step), torch.ones(3)
    for _ in range(4):
        compiled(x)
    before = np.random.get_bit_generator()
    try:
        found = []
        for f in (step, compiled):
            np.random.set_bit_generator(np.random.PCG64(3))
            found.append([f(x) for _ in range(4)])
        torch.testing.assert_close(found[1], found[0])
    finally:
        np.random.set_bit_generator(before)


def test_the_modules_are_as_before():
    names = [(m, n, getattr(m, n)) for m in (random, np.random) for n in ("random", "uniform")]
    tracejit.compile(lambda x: x * chance())(torch.ones(2))
    assert all(getattr(m, n) is f for m, n, f in names)
    assert chance is random._inst.random or chance == random._inst.random


def test_another_thread_is_not_traced():
    """It draws while a step is traced, by the same names."""
    begin, done, found = threading.Event(), threading.Event(), []

    def other():
        begin.wait(10)
        found.append((random.random(), np.random.rand(), random.uniform(0, 1)))
        done.set()

    def step(x):
        if threading.current_thread() is main and not done.is_set():
            begin.set()
            done.wait(10)
        return x * 2

    main, thread = threading.current_thread(), threading.Thread(target=other)
    seed()
    expected = random.random(), np.random.rand(), random.uniform(0, 1)
    seed()
    thread.start()
    tracejit.compile(step, mode="auto")(torch.ones(2))
    thread.join()
    assert found == [expected]


@pytest.mark.parametrize("make", [mixup, stochastic_depth])
def test_verified_calls(make):
    w = Setup()
    step = tracejit.compile(make(w), verify=3)
    seed()
    for _ in range(15):
        step(w.x, w.y)
    assert step.stats.replays and not step.certificate().withdrawn


def test_fast_random_numbers_are_torchs():
    step = lambda x: x * random.random() * np.random.rand()  # noqa: E731
    compiled, x = tracejit.compile(step, randomness="fast"), torch.ones(3)
    seed()
    eager = [step(x) for _ in range(6)]
    seed()
    assert all(torch.equal(compiled(x), expected) for expected in eager)
    assert compiled.stats.replays


def test_a_checkpointed_function_that_draws_is_refused():
    """Eager draws another number in its backward."""
    w = Setup()

    def step(x, y):
        h = torch_checkpoint.checkpoint(
            lambda x: w.net[0](x) * random.random(), x, use_reentrant=False
        )
        return w.update(F.cross_entropy(w.net[2](h), y))

    compiled = tracejit.compile(step, on_unsupported="raise")
    with pytest.raises(errors.TracejitError, match="draws another one in its backward"):
        compiled(w.x, w.y)


def test_under_vmap_and_modes_it_is_rerun():
    def step(x):
        return torch.func.vmap(lambda row: row * random.random())(x)

    compiled, x = tracejit.compile(step), torch.ones(3, 2)
    seed()
    eager = [step(x) for _ in range(5)]
    seed()
    assert all(torch.equal(compiled(x), expected) for expected in eager)


class Shaken(torch.autograd.Function):
    """Its backward draws a number."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, g):
        return g * random.random()


def test_a_function_draws_in_a_backward_outside():
    """Its number cannot be drawn before: eager runs."""
    w = torch.ones(3, requires_grad=True)

    def loss_fn(x):
        return Shaken.apply(w * x).sum() * np.random.rand()

    found = []
    for f in (loss_fn, tracejit.compile(loss_fn, on_unsupported="eager")):
        seed()
        for _ in range(4):
            f(torch.arange(3.0)).backward()
        found.append((w.grad, states()))
        w.grad = None
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


def test_a_scheduler_that_draws():
    found = []
    for compiled in (False, True):
        seed()  # the schedule draws as it is made
        w = Setup()
        rate = lambda epoch: random.uniform(0.5, 1.0)  # noqa: E731
        schedule = torch.optim.lr_scheduler.LambdaLR(w.opt, rate)

        def step(x, y, w=w, schedule=schedule):
            loss = w.update(F.cross_entropy(w.net(x) * random.random(), y))
            schedule.step()
            return loss * random.random()

        seed()
        step = tracejit.compile(step) if compiled else step
        found.append((torch.stack([step(w.x, w.y) for _ in range(12)]), states()))
    torch.testing.assert_close(found[1][0], found[0][0])
    assert found[1][1] == found[0][1]


def test_on_the_fake_device():
    with fake_device(compiled=False) as device:
        losses = []
        for backend in (device.name, "numpy"):
            w = Setup()
            seed()
            step = tracejit.compile(mixup(w), backend=backend)
            losses.append(torch.stack([step(w.x, w.y) for _ in range(8)]))
            assert step.stats.replays >= 3
    torch.testing.assert_close(*losses)


def test_exports_are_refused(tmp_path):
    x = torch.ones(3)
    compiled = tracejit.compile(lambda x: x * np.random.rand())
    for _ in range(4):
        compiled(x)
    with pytest.raises(errors.CannotSave, match=r"draws a number by rand .*outside"):
        compiled.save(tmp_path / "a.tracejit")
    with pytest.raises(
        (errors.CannotSave, errors.CannotEject), match=r"draws a number by rand .*outside"
    ):
        compiled.eject(tmp_path / "a.py")
    pytest.importorskip("onnx")
    with pytest.raises(errors.CannotExport, match=r"draws a number by numpy.random.rand"):
        tracejit.to_onnx(compiled, tmp_path / "a.onnx", x)
