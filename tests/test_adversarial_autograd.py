"""What a step does to autograd itself: flags of tensors from outside, hooks on saved tensors.

Each case is compared with eager after every call; see `support/worlds.py`.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from support.worlds import Case, Trainer, X, Y, check, table

CASES: dict[str, Case] = {}
case = table(CASES)


# ---- requires_grad of tensors from outside


def fresh(i: int) -> tuple[torch.Tensor]:
    """A new input for each call."""
    return (X * (i + 1) / 4,)


@case("replay", args=fresh)
def saliency_of_an_argument(w):
    w.t = t = Trainer()

    def step(x):
        x.requires_grad_()
        t.model(x).pow(2).sum().backward()
        t.model.zero_grad()
        return x.grad.abs().sum(), x.grad

    return step


@case("replay", args=fresh)
def flag_of_an_argument_set_and_history_returned(w):
    def step(x):
        x.requires_grad = True
        return (x * 2).tanh().sum()

    return step


@case("replay", changes={4: lambda w: w.x.requires_grad_(False)}, calls=9)
def flag_of_an_attribute(w):
    w.x = x = torch.ones(3)

    def step():
        before = x.requires_grad
        x.requires_grad_()
        return (x * 2).sum(), before, x.requires_grad, x.is_leaf

    return step


@case("replay", args=fresh, calls=9)
def flag_taken_back(w):
    def step(x):
        x.requires_grad_(True)
        y = (x * x).sum()
        (g,) = torch.autograd.grad(y, x)
        x.requires_grad_(False)
        return g, y.detach(), (x * 3).requires_grad

    return step


@case("replay", args=fresh)
def flag_taken_back_with_history_returned(w):
    def step(x):
        x.requires_grad_()
        y = (x * 2).sum()
        x.requires_grad_(False)
        return y, x

    return step


@case("replay", args=fresh, backend="c")
def frozen_while_another_loss_is_computed(w):
    w.t = t = Trainer(lr=0.01)
    w.critic = critic = nn.Linear(3, 1)

    def step(x):
        critic.requires_grad_(False)
        t.opt.zero_grad()
        loss = critic(t.model(x)).mean()
        loss.backward()
        t.opt.step()
        critic.requires_grad_(True)
        critic.zero_grad()
        own = critic(t.model(x).detach()).pow(2).mean()
        own.backward()
        return loss.detach(), own.detach()

    return step


@case("replay", args=fresh)
def frozen_between_forward_and_backward(w):
    w.t = t = Trainer()

    def step(x):
        t.opt.zero_grad()
        first = t.model[0]
        first.weight.requires_grad_(True)
        loss = (t.model(x) - Y).pow(2).mean()
        first.weight.requires_grad_(False)
        loss.backward()
        return loss.detach(), first.weight.grad is None, first.weight.requires_grad

    return step


@case("replay", changes={4: lambda w: w.on.update(first=True)}, calls=10)
def layers_frozen_by_a_flag(w):
    w.t = t = Trainer()
    w.on = on = {"first": False}

    def step():
        for p in t.model[0].parameters():
            p.requires_grad_(on["first"])
        t.opt.zero_grad()
        loss = t.loss(X, Y)
        loss.backward()
        t.opt.step()
        return loss.detach()

    return step


@case("replay", args=fresh)
def flag_of_what_the_step_made_taken_back(w):
    def step(x):
        y = x * 2
        part = y[:2]
        y.requires_grad_()
        ((y**2).sum() + part.sum()).backward()
        y.requires_grad_(False)
        return y.grad, y.requires_grad, part.requires_grad, (y + 1).requires_grad

    return step


@case("refused: its gradient lies otherwise than the memory", says="clone it", args=fresh)
def flag_of_a_view(w):
    def step(x):
        turned = (x @ x.t()).t().detach().requires_grad_()
        (turned * torch.arange(25.0).reshape(5, 5)).sum().backward()
        return turned.grad

    return step


def carried(i: int) -> tuple[torch.Tensor]:
    """A state that was computed outside."""
    start = torch.full((3,), 0.1 * (i + 1), requires_grad=True)
    return (start * 2,)


@case("replay", args=carried)
def state_detached_in_place(w):
    w.cell = cell = nn.Linear(3, 3)

    def step(h):
        h.detach_()
        cell.zero_grad()
        out = cell(h).tanh()
        out.sum().backward()
        return out.detach()

    return step


@case("replay", args=lambda i: (torch.full((3,), 0.1 * i, requires_grad=True),))
def leaf_detached_in_place(w):
    def step(x):
        y = (x * 2).sum()
        x.detach_()
        y.backward()
        return x.grad, x.requires_grad, y

    return step


@case("replay", args=fresh)
def buffer_detached_after_a_differentiated_write(w):
    w.t = t = Trainer(lr=0.01)
    w.memory = memory = torch.zeros(5, 3)

    def step(x):
        t.opt.zero_grad()
        memory.copy_(t.model(x))
        memory.pow(2).sum().backward()
        memory.detach_()
        t.opt.step()
        return memory.requires_grad, memory.sum()

    return step


def used_before_it_is_detached(w):
    w.cell = cell = nn.Linear(3, 3)

    def step(h):
        out = cell(h).sum()
        h.detach_()
        return out.detach(), h.requires_grad

    return step


case("refused: gradients would go to its old history", says="detach", args=carried)(
    used_before_it_is_detached
)


# ---- hooks on saved tensors


@case("replay", args=fresh)
def saved_tensors_counted(w):
    w.t = t = Trainer()
    w.seen = seen = {"packed": 0, "unpacked": 0}

    def pack(x):
        seen["packed"] += 1
        return x.detach()

    def unpack(x):
        seen["unpacked"] += 1
        return x

    def step(x):
        t.opt.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            loss = t.loss(x, Y)
        loss.backward()
        t.opt.step()
        return loss.detach()

    return step


@case("replay", args=fresh)
def saved_on_the_cpu_in_part(w):
    w.t = t = Trainer()

    def step(x):
        t.opt.zero_grad()
        with torch.autograd.graph.save_on_cpu(pin_memory=False):
            h = t.model[1](t.model[0](x))
        loss = (t.model[2](h) - Y).pow(2).mean()
        loss.backward()
        t.opt.step()
        return loss.detach()

    return step


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sweep(2)
def test_autograd(name):
    check(CASES[name])
