"""Steps of LBFGS: eager, with closures that are compiled steps of their own; values are eager's."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import tracejit
from tracejit.errors import TracejitWarning

pytestmark = pytest.mark.filterwarnings("ignore::tracejit.errors.TracejitWarning")


class World:
    """A net, its optimizer, and batches: the same in each of its copies."""

    def __init__(self, **options: object) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        self.opt = torch.optim.LBFGS(self.net.parameters(), **{"lr": 0.2, "max_iter": 6} | options)
        self.calls = 0

    def batch(self, n: int) -> torch.Tensor:
        return torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(n))

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        self.opt.zero_grad()
        loss = (self.net(x) - x.sin().sum(1, keepdim=True)).square().mean()
        loss.backward()
        return loss


def compare(make: Callable[[World], Callable], calls: int = 9, **options: object) -> list:
    """Run a step in two worlds, one compiled; returns the compiled step and its closures' steps."""
    w, twin = World(**options), World(**options)
    step, eager = tracejit.compile(make(w), on_unsupported="eager"), make(twin)
    for n in range(calls):
        x = w.batch(n)
        torch.testing.assert_close(step(x), eager(x), rtol=1e-7, atol=1e-9)
        assert w.calls == twin.calls
    for p, q in zip(w.net.parameters(), twin.net.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
    assert w.opt.state_dict()["state"][0]["func_evals"] > calls
    assert step.stats.eager == calls and not step.stats.compiles
    assert step.explain_mode().startswith("eager: ") and "closure" in step.explain_mode()
    found = (getattr(x, "_compiled", x) for x in step._closures._known.values())
    return [x for x in found if isinstance(x, type(step))]


def defined_inside(w: World) -> Callable:
    net, opt = w.net, w.opt

    def step(x):
        y = x.sin().sum(1, keepdim=True)

        def closure():
            opt.zero_grad()
            loss = (net(x) - y).square().mean()
            loss.backward()
            return loss

        return opt.step(closure)

    return step


@pytest.mark.parametrize("options", [{}, {"line_search_fn": "strong_wolfe"}, {"history_size": 2}])
def test_closures_are_replayed(options):
    """Each call of the step defines the closure anew, over another batch."""
    (closure,) = compare(defined_inside, **options)
    assert closure.stats.compiles == 1 and closure.stats.replays > 20
    assert closure.explain_mode().startswith("replay")


def of_a_lambda(w: World) -> Callable:
    return lambda x: w.opt.step(lambda: w.loss(x))


def with_a_scheduler(w: World) -> Callable:
    """The scheduler counts steps by a function of its own around `opt.step`."""
    schedule = torch.optim.lr_scheduler.StepLR(w.opt, 2, 0.5)

    def step(x):
        loss = w.opt.step(lambda: w.loss(x))
        schedule.step()
        return loss

    return step


def counting(w: World) -> Callable:
    """The closure assigns to a variable of the step."""

    def step(x):
        n = 0

        def closure():
            nonlocal n
            n += 1
            return w.loss(x * n)

        loss = w.opt.step(closure)
        w.calls += n
        return loss

    return step


def counting_in_a_helper(w: World) -> Callable:
    """Another function of the step assigns to a variable that the closure reads."""

    def step(x):
        n = 1

        def more():
            nonlocal n
            n += 1

        def closure():
            more()
            return w.loss(x / n)

        loss = w.opt.step(closure)
        w.calls += n
        return loss

    return step


def sharing_with_a_function_outside(w: World) -> Callable:
    scale = 1.0

    def grow():
        nonlocal scale
        scale *= 1.0001

    def step(x):
        def closure():
            grow()
            return w.loss(x * scale)

        return w.opt.step(closure)

    return step


def with_defaults(w: World) -> Callable:
    def step(x):
        def closure(x=x):
            return w.loss(x)

        return w.opt.step(closure)

    return step


def made_by_a_helper(w: World) -> Callable:
    def closure_over(x):
        return lambda: w.loss(x)

    return lambda x: w.opt.step(closure_over(x))


def bound_method(w: World) -> Callable:
    class Trainer:
        def closure(self):
            return w.loss(self.x)

        def step(self, x):
            self.x = x
            return w.opt.step(self.closure)

    return Trainer().step


@pytest.mark.parametrize(
    "make",
    [
        of_a_lambda,
        with_a_scheduler,
        counting,
        counting_in_a_helper,
        sharing_with_a_function_outside,
        with_defaults,
        made_by_a_helper,
        bound_method,
    ],
)
def test_other_closures_are_right(make):
    compare(make)


def test_bound_methods_are_compiled():
    (closure,) = compare(bound_method)
    assert closure.stats.replays > 10


@pytest.mark.parametrize("verify", [None, 1])
def test_what_asks_for_plans_gets_them(verify):
    """Where nothing runs eagerly, a step is traced as any other."""
    w = World(max_iter=2)
    options = {"on_unsupported": "raise", "backend": "numpy", "verify": verify}
    step = tracejit.compile(defined_inside(w), **options)
    step(w.batch(0))
    assert step.stats.compiles == 1


def test_the_class_is_as_it_was():
    """LBFGS calls compiled closures only within a compiled step, and a closure may raise."""
    plain = torch.optim.LBFGS.step
    w = World()

    def step(x):
        def closure():
            raise RuntimeError("no loss")

        return w.opt.step(closure)

    compiled = tracejit.compile(step, on_unsupported="eager")
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="no loss"):
        warnings.simplefilter("ignore", TracejitWarning)
        compiled(w.batch(0))
    assert torch.optim.LBFGS.step is plain
