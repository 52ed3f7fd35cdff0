"""Modules and optimizers in a step, recurrences, and what autograd says of intermediates."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tracejit
from examples import modules, recurrence
from support.capture_checks import leaf, same
from support.oracle import call
from tracejit.errors import SideEffectError
from tracejit.testing import assert_equal_to_eager, assert_trains_like_eager

SMALL = {"n": 16, "d_in": 20, "h": 10, "d_out": 5}


@pytest.mark.parametrize("variant", modules.VARIANTS)
@pytest.mark.sweep(2)
def test_program_5_in_lockstep(variant):
    step, parameters = modules.make_step(variant, **SMALL)
    assert_equal_to_eager(step, calls=20, state=parameters)


@pytest.mark.parametrize("variant", modules.VARIANTS)
def test_program_5_trains_like_eager(variant):
    assert_trains_like_eager(lambda: modules.make_step(variant, **SMALL), calls=25)


@pytest.mark.parametrize("skip", [0, 3])
def test_program_6(skip):
    step, parameters = recurrence.make_step(t=6, n=13, skip=skip)
    compiled = assert_equal_to_eager(step, calls=20, state=parameters)
    assert compiled.explain_mode().startswith("replay")
    compiled, *_ = assert_trains_like_eager(
        lambda: recurrence.make_step(t=6, n=13, skip=skip), calls=25
    )
    assert compiled.stats.replays == 23


def test_examples():
    modules.main(steps=2)
    recurrence.main(steps=3)


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1}, {"maximize": True}], ids=["plain", "decay", "maximize"]
)
@pytest.mark.sweep(3)
def test_sgd(foreach, options):
    def make():
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        model.extra = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=foreach, **options)
        x = torch.randn(5, 4)

        def step():
            optimizer.zero_grad(set_to_none=False)
            model(x).pow(2).mean().backward()
            model.extra.pow(2).sum().backward()
            optimizer.step()

        return step, list(model.parameters())

    step, parameters = make()
    assert_equal_to_eager(step, calls=6, state=parameters)


def test_a_learning_rate_that_changes_between_calls():
    def make():
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = torch.randn(5, 4)

        def step():
            optimizer.zero_grad()
            loss = model(x).pow(2).mean()
            loss.backward()
            optimizer.step()
            return loss

        return step, optimizer

    (eager, first), (ours, second) = make(), make()
    ours = tracejit.compile(ours)
    for i in range(6):
        first.param_groups[0]["lr"] = second.param_groups[0]["lr"] = 0.1 / (i + 1)
        torch.testing.assert_close(ours(), eager())


def test_two_groups_and_a_frozen_parameter():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    model[0].bias.requires_grad_(False)
    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[1].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    x = torch.randn(5, 4)

    def step():
        loss = model(x).pow(2).mean()
        model.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    assert_equal_to_eager(step, calls=6, state=list(model.parameters()))


def test_a_training_flag_is_read_on_every_call():
    x = torch.randn(5, 4)
    flags = []

    class Scaled(torch.nn.Module):
        def forward(self, x):
            flags.append(self.training)
            return x * 2 if self.training else x

    model = torch.nn.Sequential(torch.nn.Linear(4, 3), Scaled())
    step = tracejit.compile(lambda: model(x))
    for training in (True, True, False, True):
        model.train(training)
        torch.testing.assert_close(step(), model(x))
    assert step.explain_mode().startswith("rerun")


# ---- hooks


def linear():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3), torch.randn(5, 4)


def test_forward_hooks_run():
    def make():
        model, x = linear()
        model.register_forward_hook(lambda module, args, out: out * 3)
        model.register_forward_pre_hook(lambda module, args: (args[0] + 1,))

        def step():
            model(x).sum().backward()

        return step, list(model.parameters())

    step, parameters = make()
    assert_equal_to_eager(step, calls=3, state=parameters)


def test_optimizer_hooks_run():
    def make():
        model, x = linear()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def halve(optimizer, args, kwargs):
            for p in optimizer.param_groups[0]["params"]:
                p.grad.mul_(0.5)

        optimizer.register_step_pre_hook(halve)

        def step():
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()

        return step, list(model.parameters())

    step, parameters = make()
    assert_equal_to_eager(step, calls=3, state=parameters)


def test_hooks_on_saved_tensors_around_a_step_are_refused():
    w = torch.ones(3, requires_grad=True)
    step = tracejit.compile(lambda: (w * w).sum())
    for _ in range(4):
        step()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with hooks, pytest.raises(SideEffectError, match="hooks on saved tensors"):
        step()
    step()


# ---- what autograd says of intermediates


def test_retain_grad():
    def step(w):
        h = w.exp()
        h.retain_grad()
        v = h[1:]
        v.retain_grad()
        unused = w * 2
        unused.retain_grad()
        flags = h.retains_grad, w.retains_grad, (w * 1).retains_grad
        (v * v).sum().backward(retain_graph=True)
        first = h.grad.clone()
        (h * 3).sum().backward()
        return h.grad, first, v.grad, unused.grad, flags

    same(step, leaf(4))


def test_retain_grad_after_a_write():
    def step(w):
        h = w * 2
        h.retain_grad()
        h.mul_(3)
        (h * h).sum().backward()
        return h.grad

    same(step, leaf(4))


def test_retain_grad_is_refused_as_eager():
    step = lambda w: w.detach().retain_grad()  # noqa: E731
    for run in (step, lambda w: call(step, w)):
        with pytest.raises(RuntimeError, match="can't retain_grad on Tensor"):
            run(torch.ones(3, requires_grad=True))


def test_requires_grad_of_intermediates_and_grad_mode():
    def step(w):
        x = (w.detach() * 2).requires_grad_()
        y = w.detach().exp()
        y.requires_grad = True
        flags = [torch.is_grad_enabled(), x.is_leaf, y.requires_grad]
        with torch.no_grad():
            flags += [torch.is_grad_enabled(), (x * 2).requires_grad]
            with torch.enable_grad():
                flags += [torch.is_grad_enabled(), (x * 2).requires_grad]
        with torch.set_grad_enabled(False):
            flags.append(torch.is_grad_enabled())
        (x * y * w).sum().backward()
        return x.grad, y.grad, flags

    same(step, leaf(4))


class OwnLazy(nn.modules.lazy.LazyModuleMixin, nn.Module):
    """A lazy module of the user's, with a buffer, called with a keyword."""

    def __init__(self):
        super().__init__()
        self.weight = nn.UninitializedParameter()
        self.register_buffer("shift", nn.UninitializedBuffer())

    def initialize_parameters(self, x, *, other):
        with torch.no_grad():
            self.weight.materialize((x.shape[-1], other.shape[-1]))
            self.weight.normal_()
            self.shift.materialize(other.shape[-1:])
            self.shift.fill_(0.5)

    def forward(self, x, *, other):
        return x @ self.weight + other + self.shift


class CallsOwn(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = OwnLazy()

    def forward(self, x):
        return self.inner(x * 2, other=x[:, :1])


LAZY = {
    "linear": lambda: nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(1)),
    "norm": lambda: nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.LazyLinear(1)),
    "alone": lambda: nn.LazyLinear(1, bias=False),
    "half": lambda: nn.Sequential(nn.Linear(6, 3), nn.LazyLinear(1)),
    "own": CallsOwn,
}


@pytest.mark.parametrize("name", LAZY)
def test_lazy_modules(name):
    """Initialized in the first call, with eager's random numbers; replayed later."""

    def made(how):
        torch.manual_seed(0)
        model = LAZY[name]()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        def step(x, y):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            return loss

        return model, how(step)

    (model, step), (ours, compiled) = made(lambda step: step), made(tracejit.compile)
    for _ in range(5):
        x, y = torch.randn(4, 6), torch.randn(4, 1)
        before = torch.get_rng_state()
        expected, after = step(x, y), torch.get_rng_state()
        torch.set_rng_state(before)
        torch.testing.assert_close(compiled(x, y), expected)
        assert torch.equal(torch.get_rng_state(), after)
    assert compiled.stats.replays > 0
    assert repr(ours) == repr(model) and not torch.nn.parameter.is_lazy(next(ours.parameters()))
    torch.testing.assert_close(ours.state_dict(), model.state_dict(), rtol=1e-3, atol=1e-4)


def test_a_lazy_parameter_used_by_itself_is_refused():
    layer = nn.LazyLinear(2)
    step = tracejit.compile(lambda x: torch.nn.functional.linear(x, layer.weight))
    with pytest.raises(RuntimeError, match="test_modules.*a parameter that is not initialized"):
        step(torch.ones(1, 2))
    layer(torch.ones(1, 2))
    assert step(torch.ones(1, 2)).shape == (1, 2)
