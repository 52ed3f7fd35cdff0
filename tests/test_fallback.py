"""What a step cannot compile runs eagerly: as eager alone, from the state before the trace."""

from __future__ import annotations

import io
import random
from collections import Counter, OrderedDict, defaultdict, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import tracejit
from support.worlds import Trainer, X, Y, picture, same

STEPS: dict = {}


def unsupported(x: torch.Tensor) -> torch.Tensor:
    """A function without a rule, whose result is a number again."""
    return torch.histc(x.detach(), 3).sum() + x.sum()


def step_of(make):
    """A function that fills a namespace and returns a step of one number."""
    STEPS[make.__name__] = make
    return make


@step_of
def conv2d(w):
    w.net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(12 * 2, 1))
    w.opt = torch.optim.Adam(w.net.parameters(), lr=0.1)

    def step(n):
        w.opt.zero_grad()
        loss = w.net(X.reshape(1, 1, 5, 4) * n).square().sum()
        loss.backward()
        w.opt.step()
        return loss

    return step


@step_of
def autocast(w):
    w.t = Trainer()

    def step(n):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return w.t.step(X * n, Y)

    return step


@step_of
def sparse(w):
    w.p = nn.Parameter(torch.ones(4, 2))
    return lambda n: (X.to_sparse() @ w.p).sum() * n


@step_of
def counter_of_an_object(w):
    w.n = 0

    def step(n):
        w.n += 1
        return unsupported(X * w.n)

    return step


@step_of
def list_append(w):
    w.kept = [0.0]

    def step(n):
        w.kept.append(X * n)
        return unsupported(w.kept[-1] * len(w.kept))

    return step


@step_of
def dict_entry(w):
    w.kept = {"a": 1}

    def step(n):
        w.kept[n] = X[0] * n
        w.kept["a"] += 1
        del w.kept[n]
        w.kept[f"at {n}"] = n
        return unsupported(X * w.kept["a"])

    return step


@step_of
def containers(w):
    w.recent, w.seen = deque([1, 2], maxlen=2), {1}
    w.ordered, w.by = OrderedDict(a=1, b=2), defaultdict(list)
    w.count, w.raw, w.numbers = Counter("a"), bytearray(b"ab"), np.zeros(3)

    def step(n):
        w.recent.append(X * n)
        w.seen.add(n)
        w.ordered.move_to_end("a")
        w.ordered[n] = len(w.ordered)
        w.by[n % 2].append(n)
        w.count[n] += 1
        w.raw.append(n)
        w.numbers[n % 3] += n
        return unsupported(X * len(w.by[n % 2]) * float(w.numbers.sum()))

    return step


@step_of
def nonlocal_variable(w):
    n_calls = 0

    def step(n):
        nonlocal n_calls
        n_calls += 1
        w.calls = n_calls
        return unsupported(X * n_calls)

    return step


CALLS = [0]


@step_of
def global_variable(w):
    w.mine = CALLS_OF[id(w)] = 0

    def step(n):
        global LATEST
        CALLS_OF[id(w)] += 1
        LATEST = w.mine = CALLS_OF[id(w)]
        return unsupported(X * LATEST)

    return step


CALLS_OF: dict[int, int] = {}
LATEST = 0


@step_of
def attribute_of_a_function_and_a_class(w):
    class Mine:
        calls = 0
        __slots__ = ("n",)

    w.mine = Mine()

    def step(n):
        Mine.calls += 1
        w.mine.n = getattr(w.mine, "n", 0) + 1
        step.calls = getattr(step, "calls", 0) + 1
        w.seen = (Mine.calls, w.mine.n, step.calls)
        return unsupported(X * step.calls)

    return step


@step_of
def optimizer_state_made_lazily(w):
    w.t = Trainer(torch.optim.Adam)
    return lambda n: w.t.step(X * n, Y) + unsupported(w.t.model[0].weight.detach())


@step_of
def scheduler_stepped(w):
    w.t = Trainer(torch.optim.SGD)
    w.sched = torch.optim.lr_scheduler.StepLR(w.t.opt, 2, 0.5)

    def step(n):
        loss = w.t.step(X * n, Y)
        w.sched.step()
        return loss + unsupported(X)

    return step


@step_of
def numbers_drawn(w):
    w.own, w.numpys = random.Random(3), np.random.default_rng(5)
    w.torchs = torch.Generator().manual_seed(7)

    def step(n):
        drawn = [random.random(), np.random.rand(), w.own.random(), w.numpys.random()]
        return unsupported(X * sum(drawn)), *drawn

    return step


@step_of
def dropout(w):
    w.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    w.opt = torch.optim.SGD(w.net.parameters(), lr=0.1)

    def step(n):
        w.opt.zero_grad()
        loss = w.net(X * n).square().mean()
        loss.backward()
        w.opt.step()
        return loss, torch.rand(2)

    return step


@step_of
def batch_norm_statistics(w):
    w.net = nn.BatchNorm1d(4)
    return lambda n: unsupported(w.net(X * n))


@step_of
def list_iterator(w):
    w.at = iter([1, 2, 3, 4, 5, 6, 7, 8])
    return lambda n: unsupported(X * next(w.at))


@step_of
def buffer_written(w):
    out = io.StringIO()

    def step(n):
        out.write(f"{n} ")
        w.text = out.getvalue()
        return unsupported(X * n)

    return step


@step_of
def refusal_caught(w):
    """The step takes another path when the function is refused; eager does not."""

    def step(n):
        try:
            return unsupported(X * n)
        except Exception:
            return X.sum() * 0

    return step


@step_of
def torch_class_asked(w):
    """No refusal: the trace itself makes the step raise."""

    def step(n):
        w.before = n
        y = X * n
        if type(y) is not torch.Tensor and type(y.detach()) is not torch.Tensor:
            raise TypeError("a tensor, please")
        return unsupported(y)

    return step


def worlds(make):
    """Two copies of a world: eager, and compiled with the fallback."""
    made = []
    for compiled in (False, True):
        torch.manual_seed(0)
        w = SimpleNamespace()
        step = make(w)
        if compiled:
            step = tracejit.compile(step, on_unsupported="eager", backend="numpy")
        made.append((w, step))
    return made


def call(world, i: int) -> list:
    """A picture of a world after a call, with the random numbers that come next."""
    w, step = world
    torch.manual_seed(i)
    random.seed(i)
    np.random.seed(i)
    try:
        returned = step(i + 1)
    except (ValueError, StopIteration) as error:
        returned = repr(error)
    following = torch.rand(1), random.random(), np.random.rand()
    return picture((w, returned, following))


@pytest.mark.filterwarnings("ignore::tracejit.errors.TracejitWarning")
@pytest.mark.parametrize("name", STEPS)
def test_a_call_that_cannot_be_compiled_equals_eager(name):
    eager, ours = worlds(STEPS[name])
    for i in range(6):
        same(call(ours, i), call(eager, i), f"call {i}")
    _, step = ours
    assert step.stats.eager == 6 and step.stats.replays == 0, step.stats
    assert step.explain_mode().startswith("eager: "), step.explain_mode()
    assert step.stats.traces == 3  # calls 0, 2 and 5: after 1 and 2 eager calls
