"""`torch.utils.checkpoint` in steps that are called several times, against eager.

See `support/worlds.py`; functions that eager must run twice are refused.
"""

from __future__ import annotations

import contextlib
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import (
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from support.worlds import Case, World, X, Y, check, same, setting, table
from tracejit.errors import TracejitWarning
from tracejit.testing import assert_equal_to_eager

CASES: dict[str, Case] = {}
case = table(CASES)
TWICE: dict[str, Case] = {}  # refused, as a whole and after Python's state has changed
twice = table(TWICE)
plain, reentrant = ({"use_reentrant": on} for on in (False, True))


class Net(nn.Module):
    """A network whose middle part is checkpointed as it is told to be."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.part = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 6))

    def forward(self, x, run):
        return self.last(run(self.part, self.first(x)))


def training(w, run, **options):
    """A step of SGD, and the step's world."""
    w.net = Net(**options)
    w.opt = torch.optim.SGD(w.net.parameters(), lr=0.1)

    def step():
        w.opt.zero_grad()
        loss = (w.net(X, run) - Y).square().mean()
        loss.backward()
        w.opt.step()
        return loss.detach()

    return step


@case("replay")
def without_reentrant(w):
    return training(w, partial(checkpoint, **plain))


@case("replay")
def with_reentrant(w):
    return training(w, partial(checkpoint, **reentrant))


@case("replay")
def dropout_without_reentrant(w):
    return training(w, partial(checkpoint, **plain), dropout=0.4)


@case("replay")
def dropout_with_reentrant(w):
    return training(w, partial(checkpoint, **reentrant), dropout=0.4)


@case("replay", changes={4: setting(on=False), 7: setting(on=True)}, calls=11)
def checkpointed_by_a_flag(w):
    w.on = True
    run = partial(checkpoint, **plain)
    return training(w, lambda f, x: run(f, x) if w.on else f(x), dropout=0.4)


@case("replay")
def nested(w):
    inner = partial(checkpoint, **plain)

    def run(f, x):
        return checkpoint(lambda y: inner(f, y).sin() + inner(f, y), x, **plain)

    return training(w, run, dropout=0.4)


@case("replay")
def nested_of_the_other_kind(w):
    def run(f, x):
        return checkpoint(lambda y: checkpoint(f, y, **plain).sin(), x, **reentrant)

    return training(w, run)


@case("replay")
def sequences(w):
    return training(w, lambda f, x: checkpoint_sequential(f, 2, x, **plain), dropout=0.4)


@case("replay")
def several_results_and_keywords(w):
    def pair(f, x, *, factor):
        return f(x) * factor, {"again": [f(x)]}

    def run(f, x):
        a, b = checkpoint(pair, f, x, factor=0.5, **plain)
        return a + b["again"][0]

    return training(w, run)


@case("replay")
def determinism_not_checked_and_contexts(w):
    def contexts():
        return contextlib.nullcontext(), contextlib.nullcontext()

    options = {"determinism_check": "none", "context_fn": contexts, "early_stop": False}
    return training(w, partial(checkpoint, **options, **plain))


@case("replay")
def selected_operations(w):
    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    return training(w, partial(checkpoint, context_fn=contexts, **plain))


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return g * (y + x * y)


def around(*within):
    """What runs a function, and others on what it gives, all of it checkpointed."""

    def all_of(f, x):
        x = f(x)
        for g in within:
            x = g(x)
        return x

    return lambda f, x: checkpoint(partial(all_of, f), x.sin(), **plain)


def scattered(x):
    """Sorted, summed along the way, and put back."""
    values, places = x.sort(-1)
    total = torch.cumsum(values * x.gather(1, places.flip(-1)), 1)
    return torch.zeros_like(total).scatter_add(1, places, total)


def solved(x):
    a = x.T @ x + 2 * torch.eye(6)
    return torch.linalg.solve(a, x.T).T


WITHIN = {
    "a_function_of_the_users": (Scaled.apply, torch.tanh),
    "writes_in_place": (lambda x: x.cos().mul_(2).relu_(),),
    "places_that_values_say": (scattered,),
    "decompositions": (solved,),
    "a_vmap": (torch.vmap(lambda row: row.sin() * row.sum()),),
}


def _registered(name, within):
    def build(w):
        return training(w, around(*within), dropout=0.3)

    build.__name__ = f"within_{name}"
    case("replay")(build)


for _name, _within in WITHIN.items():
    _registered(_name, _within)


@case("replay")
def what_is_in_it_is_read_outside_too(w):
    def run(f, x):
        y, h = checkpoint(lambda z: (f(z), f[0](z)), x, **plain)
        return y + 0.1 * h.square()

    return training(w, run)


@case("replay")
def two_losses(w):
    """The second one's backward follows at once; the first one's waits for it."""
    w.net = Net()

    def step():
        w.net.zero_grad()

        def loss_of(x):
            return (w.net(x, lambda f, h: f(h)) - Y).square().mean()

        loss = checkpoint(loss_of, X, **plain) + checkpoint(loss_of, X.cos(), **plain)
        loss.backward()
        return loss.detach(), [p.grad for p in w.net.parameters()]

    return step


@case("replay")
def backward_twice(w):
    w.net = Net(dropout=0.3)

    def step():
        w.net.zero_grad()
        y = w.net(X, partial(checkpoint, **plain))
        y.square().mean().backward(retain_graph=True)
        y.cos().mean().backward()
        return [p.grad for p in w.net.parameters()]

    return step


@case("replay")
def a_value_is_read_before_the_backward(w):
    w.net = Net(dropout=0.3)

    def step():
        w.net.zero_grad()
        loss = (w.net(X, partial(checkpoint, **plain)) - Y).square().mean()
        (loss * (2.0 if loss.item() > 0.1 else 1.0)).backward()
        norm = nn.utils.clip_grad_norm_(w.net.parameters(), 0.1)
        return loss.detach(), norm.item(), [p.grad for p in w.net.parameters()]

    return step


@case("replay")
def in_lower_precision(w):
    def run(f, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = checkpoint(torch.matmul, x.sign(), w.net.part[0].weight.sign(), **plain)
        return f(y.float())

    return training(w, run)


@case("replay")
def no_gradient_for_what_has_none(w):
    """With use_reentrant=True parameters alone make nothing differentiable."""
    w.net = Net()

    def step():
        with torch.no_grad():
            x = w.net.first(X)
        a, b = (checkpoint(w.net.part, x, **kind) for kind in (plain, reentrant))
        return a.requires_grad, b.requires_grad, a.detach(), b

    return step


@case("replay")
def gradients_asked_for(w):
    w.net = Net()

    def step():
        loss = checkpoint(w.net, X, lambda f, x: f(x), **plain).square().sum()
        return torch.autograd.grad(loss, [*w.net.parameters()])

    return step


@case("replay")
def not_preserved_and_nothing_drawn(w):
    return training(w, partial(checkpoint, preserve_rng_state=False, **plain))


@case("refused: eager draws other numbers", says="preserve_rng_state")
def not_preserved(w):
    return training(w, partial(checkpoint, preserve_rng_state=False, **plain), dropout=0.4)


@case("refused: eager updates the statistics twice", says="writes to a tensor from outside")
def statistics(w):
    w.norm = nn.BatchNorm1d(6)
    run = partial(checkpoint, **plain)
    return training(w, lambda f, x: run(lambda y: w.norm(f(y)), x))


@case("refused: eager adds twice", says="writes to a tensor from outside")
def a_total(w):
    w.total = torch.zeros(())

    def counted(f, x):
        y = f(x)
        w.total.add_(1)
        return y.sin()

    return training(w, lambda f, x: checkpoint(counted, f, x, **reentrant))


@twice("")
def a_counter(w):
    class Counted(nn.Module):
        n = 0

        def forward(self, x):
            self.n += 1
            return x.sin()

    w.counted = Counted()
    run = partial(checkpoint, **plain)
    return training(w, lambda f, x: run(lambda y: w.counted(f(y)), x))


@twice("")
def a_counter_in_a_dict(w):
    w.seen = {"n": 0}

    def counted(f, x):
        w.seen["n"] += 1
        return f(x).sin()

    return training(w, lambda f, x: checkpoint(counted, f, x, **reentrant))


@twice("")
def a_list_that_grows(w):
    w.seen = []

    def noted(f, x):
        w.seen.append(len(w.seen))
        return f(x).sin()

    return training(w, lambda f, x: checkpoint(noted, f, x, **plain))


@case("replay")
def lists_of_its_own(w):
    def several(f, x):
        found = []
        for k in range(3):
            found.append(f(x) * k)
        return torch.stack(found).sum(0).sin()

    return training(w, lambda f, x: checkpoint(several, f, x, **plain))


@case("refused: it runs in the backward", says="context_fn")
def other_contexts(w):
    def contexts():
        return torch.no_grad(), contextlib.nullcontext()

    return training(w, partial(checkpoint, context_fn=contexts, **plain))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::tracejit.errors.TracejitWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.sweep(4)
def test_checkpoint(name):
    check(CASES[name])


@pytest.mark.parametrize("name", TWICE)
def test_what_python_does_twice(name):
    """Eager runs the function again in its backward: so does the fallback."""
    eager = World(TWICE[name], None)
    ours = World(TWICE[name], "auto", on_unsupported="eager")
    with pytest.warns(TracejitWarning, match="outlives it .*test_checkpoint.py"):
        for i in range(5):
            same(ours.call(i), eager.call(i), f"call {i}")
    assert ours.step.stats.eager == 5


def test_a_wrong_check_is_an_error():
    with pytest.raises(ValueError, match="determinism_check"):
        assert_equal_to_eager(lambda: checkpoint(torch.sin, X, determinism_check="x", **plain))
