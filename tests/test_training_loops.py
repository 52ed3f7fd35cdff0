"""Whole training loops, against eager after every call: what users do around and between steps."""

from __future__ import annotations

import copy
import io
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tracejit
from support.worlds import Trainer, X, Y, picture, same
from tracejit.capture.trace.trace import Trace
from tracejit.compile import CompiledStep

pytestmark = pytest.mark.filterwarnings("ignore::tracejit.errors.TracejitWarning")


@dataclass
class Loop:
    """A training run: its step, everything to compare, and what is done before each call."""

    step: Callable
    state: object
    between: Callable[[int], object] = lambda i: None
    args: Callable[[int], tuple] = lambda i: ()

    def call(self, i: int, step: Callable) -> list:
        self.between(i)
        return picture((step(*self.args(i)), self.state))


def alike(make: Callable[[], Loop], *, calls: int = 14, backend: str = "numpy") -> CompiledStep:
    """Run a loop in eager, in rerun mode and in auto mode; all that it shows is the same after
    every call. Returns the step of auto mode."""
    for mode in ("eager", "rerun", "auto"):
        torch.manual_seed(0)
        random.seed(0)
        loop = make()
        if mode == "eager":
            expected = [loop.call(i, loop.step) for i in range(calls)]
            continue
        step = tracejit.compile(loop.step, backend=backend, mode=mode)
        for i, theirs in enumerate(expected):
            same(loop.call(i, step), theirs, f"call {i}, mode {mode}")
    return step


def net(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def adam() -> Trainer:
    return Trainer(torch.optim.Adam, lr=0.02)


OPTIMIZERS = {
    "SGD": {"momentum": 0.9, "lr": 0.1},
    "Adam": {},
    "AdamW": {"weight_decay": 0.1},
    "RMSprop": {},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.sweep(2)
def test_state_dicts_round_trip(name, assign):
    """Saved to a file in the middle, trained on, and loaded again."""

    def make():
        t = Trainer(getattr(torch.optim, name), **({"lr": 0.02} | OPTIMIZERS[name]))
        file = io.BytesIO()

        def between(i):
            if i == 5:
                torch.save((t.model.state_dict(), t.opt.state_dict()), file)
            if i == 9:
                file.seek(0)
                model, optimizer = torch.load(file)
                t.model.load_state_dict(model, assign=assign)
                t.opt.load_state_dict(optimizer)

        return Loop(t.step, t, between)

    step = alike(make)
    assert step.explain_mode().startswith("replay") and step.stats.replays >= 5
    if not assign:  # which leaves the optimizer with the old parameters
        assert step.stats.compiles == 2  # with and without state of the optimizer


def test_state_dicts_into_another_trainer():
    def make():
        first, second = adam(), adam()
        for _ in range(3):
            first.step()

        def between(i):
            if i == 6:
                second.model.load_state_dict(first.model.state_dict())
                second.opt.load_state_dict(copy.deepcopy(first.opt.state_dict()))

        return Loop(second.step, (first, second), between)

    assert alike(make).stats.replays > 5


@pytest.mark.parametrize("inside", [False, True])
def test_gradients_accumulate_across_calls(inside):
    """Four backward passes for an update: the update in the step, or between steps."""

    def make():
        t = adam()
        t.micro = 0

        def step(x, y):
            loss = (t.model(x) - y).pow(2).mean() / 4
            loss.backward()
            if inside:
                t.micro += 1
                if t.micro % 4 == 0:
                    t.opt.step()
                    t.opt.zero_grad()
            return loss.detach()

        def between(i):
            if not inside and i and i % 4 == 0:
                t.opt.step()
                t.opt.zero_grad()

        return Loop(step, t, between, lambda i: (X * (1 + i % 4), Y))

    step = alike(make, calls=20)
    assert step.explain_mode().startswith("replay")
    assert step.stats.compiles <= 6


def test_two_optimizers_of_a_gan():
    def make():
        class Gan:
            def __init__(self):
                self.g, self.d = net(3, 8, 4), net(4, 8, 1)
                self.g_opt = torch.optim.Adam(self.g.parameters(), lr=0.01, betas=(0.5, 0.9))
                self.d_opt = torch.optim.Adam(self.d.parameters(), lr=0.02, betas=(0.5, 0.9))
                self.bce = nn.BCEWithLogitsLoss()

            def step(self, real, noise):
                ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
                fake = self.g(noise)
                self.d_opt.zero_grad()
                d_loss = self.bce(self.d(real), ones) + self.bce(self.d(fake.detach()), zeros)
                d_loss.backward()
                self.d_opt.step()
                self.g_opt.zero_grad()
                g_loss = self.bce(self.d(fake), ones)
                g_loss.backward()
                self.g_opt.step()
                return {"d": d_loss.detach(), "g": g_loss.detach()}

        gan = Gan()
        noise = torch.arange(15.0).view(5, 3)
        return Loop(gan.step, gan, args=lambda i: (X * i / 9, torch.sin(noise * i)))

    step = alike(make)
    assert step.explain_mode().startswith("replay") and step.stats.replays >= 10


@pytest.mark.parametrize("decay", [0.9, 0.99])
@pytest.mark.sweep(2)
def test_exponential_average_of_a_model(decay):
    """A copy that follows the model, read in eval between the calls."""

    def make():
        t = adam()
        t.ema, t.decay = copy.deepcopy(t.model).requires_grad_(False), decay

        def step():
            loss = t.step()
            with torch.no_grad():
                for average, p in zip(t.ema.parameters(), t.model.parameters(), strict=True):
                    average.mul_(t.decay).add_(p, alpha=1 - t.decay)
            return loss

        def between(i):
            if i == 6:
                t.decay = 0.5
            if i == 9:
                t.ema.load_state_dict(t.model.state_dict())

        return Loop(step, t, between)

    assert alike(make).explain_mode().startswith("replay")


def test_tied_weights():
    def make():
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.enter, self.leave = nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False)
                self.leave.weight = nn.Parameter(self.enter.weight.detach().t().clone())
                self.again = nn.Linear(4, 6, bias=False)
                self.again.weight = self.enter.weight

            def forward(self, x):
                return self.leave(torch.tanh(self.enter(x)) + torch.tanh(self.again(x * 2)))

        t = adam()
        t.model = Tied()
        t.opt = torch.optim.SGD(t.model.parameters(), lr=0.1, momentum=0.9)

        def between(i):
            if i == 7:  # untied
                t.model.again.weight = nn.Parameter(t.model.enter.weight.detach().clone())

        return Loop(lambda: t.step(X, X), t, between)

    assert alike(make).explain_mode().startswith("replay")


def test_gradient_penalty():
    """A derivative of a derivative."""

    def make():
        t = Trainer(lr=0.05)
        t.critic = net(4, 5, 1)
        t.opt = torch.optim.SGD(t.critic.parameters(), lr=0.003)

        def step(x):
            x = x.clone().requires_grad_()
            out = t.critic(x)
            (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            penalty = (gradient.norm(2, dim=1) - 1).pow(2).mean()
            t.opt.zero_grad()
            (out.mean() + 10 * penalty).backward()
            t.opt.step()
            return penalty.detach()

        return Loop(step, t, args=lambda i: (X + 0.1 * i,))

    assert alike(make).explain_mode().startswith("replay")


@pytest.mark.parametrize("new", [True, False])
def test_weight_norm(new):
    def make():
        t = adam()
        norm = torch.nn.utils.parametrizations.weight_norm if new else torch.nn.utils.weight_norm
        t.model = nn.Sequential(norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3))
        t.opt = torch.optim.SGD(t.model.parameters(), lr=0.1)
        return Loop(t.step, t.model)

    alike(make, calls=10)


def test_parameters_frozen_and_unfrozen():
    def make():
        t = Trainer(lr=0.1, momentum=0.9)

        def between(i):
            if i == 4:
                t.model[0].requires_grad_(False)
            if i == 8:
                t.model[0].requires_grad_(True)
                t.model[2].requires_grad_(False)
            if i == 12:
                t.model.requires_grad_(True)

        return Loop(t.step, t, between)

    step = alike(make, calls=18)
    assert step.explain_mode().startswith("replay") and step.stats.replays >= 6


def test_evaluation_and_back():
    """The same step serves training and evaluation, as its flag and grad mode say."""

    def make():
        t = adam()
        t.model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
        t.opt = torch.optim.SGD(t.model.parameters(), lr=0.02)
        data = torch.randn(5, 4)

        def step(x):
            if not t.model.training:
                with torch.no_grad():
                    return (t.model(x) - Y).pow(2).mean()
            return t.step(x)

        def between(i):
            t.model.train(i % 5 < 3)

        return Loop(step, t, between, lambda i: (data + 0.1 * i,))

    step = alike(make, calls=20)
    assert step.explain_mode().startswith("replay") and step.stats.replays >= 12
    assert step.stats.compiles == 2


def test_a_layer_swapped_out():
    def make():
        t = Trainer(lr=0.1)

        def between(i):
            if i == 5:
                t.model[2] = nn.Linear(6, 3, bias=False)
                t.opt = torch.optim.SGD(t.model.parameters(), lr=0.05)
            if i == 9:
                t.model[1] = nn.Sigmoid()

        return Loop(t.step, t, between)

    step = alike(make, calls=15)
    assert step.explain_mode().startswith("replay") and step.stats.replays >= 7


# ---- data


def loader(n: int = 22, batch: int = 5, *, shuffle: bool = True, as_dict: bool = False):
    x = torch.randn(n, 4)
    y = torch.randn(n, 3)
    if as_dict:
        rows = [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]
        return DataLoader(rows, batch_size=batch, shuffle=shuffle)
    return DataLoader(TensorDataset(x, y), batch_size=batch, shuffle=shuffle)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("backend", ["numpy", "c"])
@pytest.mark.sweep(3)
def test_epochs_of_a_data_loader(shuffle, as_dict, backend):
    """One plan for each shape; no trace after the first epoch in which each shape came twice."""
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        t = adam()
        step = (lambda b, t=t: t.step(b["x"], b["y"])) if as_dict else (lambda b, t=t: t.step(*b))
        if compiled:
            step = tracejit.compile(step, backend=backend)
        data, losses, traces = loader(shuffle=shuffle, as_dict=as_dict), [], []
        for _ in range(4):
            losses.append([step(batch).item() for batch in data])
            traces.append(step.stats.traces if compiled else 0)
        runs.append((losses, picture(t)))
    (theirs, eager), (ours, mine) = runs
    for a, b in zip(theirs, ours, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    same(mine, eager, "after four epochs")
    assert step.stats.compiles == 3  # the first call makes state; full batches; the odd one
    assert traces[1] == traces[3], f"traces after each epoch: {traces}"
    full, odd = ({launch.kernel for launch in plan.launches} for plan in step.plans[1:])
    assert len(full - odd) == 1  # the one that divides by the number of elements


def test_a_batch_size_that_keeps_changing():
    def make():
        t = adam()
        return Loop(t.step, t, args=lambda i: (X[: 1 + i % 4], Y[: 1 + i % 4]))

    step = alike(make, calls=24)
    assert step.stats.compiles == 5 and step.stats.replays >= 12


# ---- control flow that changes


class DynamicNet(nn.Module):
    """The tutorial's: a random number of hidden layers, all with the same weights."""

    def __init__(self):
        super().__init__()
        self.enter, self.middle, self.leave = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.enter(x).clamp(min=0)
        for _ in range(random.randint(0, 3)):
            h = self.middle(h).clamp(min=0)
        return self.leave(h)


@pytest.mark.parametrize("backend", ["numpy", pytest.param("c", marks=pytest.mark.slow)])
def test_dynamic_net(backend):
    def make():
        model = DynamicNet()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9)
        loss_of = nn.MSELoss(reduction="sum")

        def step(x, y):
            loss = loss_of(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return Loop(step, (model, optimizer), args=lambda i: (X, Y))

    step = alike(make, calls=40, backend=backend)
    assert step.explain_mode().startswith("replay")  # the depth is drawn anew in each call
    assert step.stats.replays >= 20 and step.stats.branches >= 4
    assert step.stats.compiles <= 5  # a plan for each depth, and one for the first call


def test_a_choice_in_replay_mode_is_refused():
    def step():
        return X.sum() * random.choice([1, 2])

    step = tracejit.compile(step, mode="replay", backend="numpy")
    with pytest.raises(tracejit.errors.ReplayNotArmed, match="random.choice"):
        step()


def test_a_scheduler_and_a_counter_of_the_user():
    def make():
        t = Trainer(lr=0.1)
        t.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(t.opt, 10)

        def step():
            loss = t.step()
            t.scheduler.step()
            return loss, t.scheduler.get_last_lr()[0]

        return Loop(step, (t.model, t.opt))

    assert alike(make).stats.compiles <= 2


def rules_run(monkeypatch) -> list:
    """The torch calls for which rules run from now on, as they come."""
    called, apply = [], Trace.apply

    def noted(self, func, args, kwargs):
        called.append(func)
        return apply(self, func, args, kwargs)

    monkeypatch.setattr(Trace, "apply", noted)
    return called


SAYS = {
    "an f-string": lambda n, loss: print(f"iter {n}: loss {loss:.3f}"),
    "arguments": lambda n, loss: print("iter", n, "loss", loss),
    "str": lambda n, loss: print("iter " + str(n) + ": " + repr(loss)),
    "format": lambda n, loss: print("iter {:4d}: {:.2f}".format(n, loss)),  # noqa: UP032
    "percent": lambda n, loss: print("iter %d" % n, flush=True),  # noqa: UP031
    "a variable": lambda n, loss: print(text := f"iter {n}", len(text)),
    "a file": lambda n, loss: sys.stdout.write(f"iter {n}\n"),
}


def saying(how: str) -> Callable:
    """A step that shows something in every third call."""
    torch.manual_seed(0)
    model, x, w = torch.nn.Linear(4, 4), torch.randn(3, 4), SimpleNamespace(n=0)

    def step():
        loss = model(x).pow(2).mean()
        w.n += 1
        if w.n % 3 == 0:
            SAYS[how](w.n, loss.item())
        return loss

    return step


@pytest.mark.parametrize("how", SAYS)
def test_a_call_that_prints_goes_as_the_last_one_that_did(how, capsys, monkeypatch):
    """Its text is another one each time, and no rule runs for that."""
    plain, step = saying(how), tracejit.compile(saying(how), backend="numpy")
    for _ in range(75):
        plain()
    said = capsys.readouterr().out
    for _ in range(60):
        step()
    called = rules_run(monkeypatch)
    for _ in range(15):
        step()
    assert capsys.readouterr().out == said
    assert called == []
    assert how == "a file" or step.stats.replays > 30  # which a step can reach, and is not guarded


class Printing:
    """A loop's body that prints in every fifth call, and keeps a checkpoint in every sixteenth."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Linear(4, 4)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1)
        self.n, self.running, self.checkpoint = 0, -1.0, None

    def step(self, x: torch.Tensor) -> torch.Tensor:
        loss = self.model(x).pow(2).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.n % 5 == 0:
            now = loss.item()
            self.running = now if self.running == -1.0 else 0.9 * self.running + 0.1 * now
            print(f"iter {self.n}: loss {now:.3f}, {self.running:.3f}")
        if self.n % 16 == 0 and self.n > 0:
            state = {name: t.clone() for name, t in self.model.state_dict().items()}
            self.checkpoint = {"model": state, "n": self.n}
        self.n += 1
        return loss.detach()


def test_calls_that_print_do_not_keep_the_others_from_replay(capsys):
    """For good: the checkpoint is another dict from time to time, which is learned late."""
    compiled, plain, x = Printing(), Printing(), torch.randn(3, 4)
    step = tracejit.compile(compiled.step, on_unsupported="raise")
    losses, said = [], []
    for run in (step, plain.step):
        for i in range(140):
            if i == 100 and run is step:
                before = step.stats.replays
            losses.append(run(x).item())
        said.append(capsys.readouterr().out)
    assert step.stats.replays - before >= 25, step.explain_retraces()
    assert torch.allclose(torch.tensor(losses[:140]), torch.tensor(losses[140:]))
    assert said[0] == said[1] and compiled.n == plain.n
    assert compiled.checkpoint["n"] == plain.checkpoint["n"] == 128
    for name, t in plain.checkpoint["model"].items():
        assert torch.allclose(compiled.checkpoint["model"][name], t)
