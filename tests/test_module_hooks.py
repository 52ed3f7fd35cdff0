"""Full backward hooks of modules: called in the step's backward, with what eager calls them."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import tracejit
from tracejit.errors import UnsupportedOperation

X = torch.linspace(-1, 2, 12).reshape(4, 3)


class Two(nn.Module):
    """Two inputs and two outputs, one of which nobody may use."""

    def forward(self, a, b):
        return a * b, a - b


class Net(nn.Module):
    def __init__(self, *, second: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act, self.last = nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)
        self.two = Two()
        self.second = second

    def forward(self, x):
        h = self.act(self.first(x))
        product, difference = self.two(h, torch.ones(5))
        return self.last(product + difference if self.second else product)


def recorded(seen: list) -> Callable:
    def hook(module, grad_in, grad_out):
        seen.append([None if g is None else g.clone() for g in (*grad_in, *grad_out)])

    return hook


def scaled(module, grad_in, grad_out):
    return tuple(None if g is None else g * 3 for g in grad_in)


def scaled_before(module, grad_out):
    return tuple(None if g is None else g * 2 for g in grad_out)


def none(module, grad_in, grad_out):
    return None


def on_all(hook: Callable) -> Callable:
    def add(net, seen):
        for module in net.modules():
            module.register_full_backward_hook(hook)

    return add


ADD: dict[str, Callable] = {  # (net, what hooks saw)
    "recorded": lambda net, seen: net.act.register_full_backward_hook(recorded(seen)),
    "everywhere": lambda net, seen: on_all(recorded(seen))(net, seen),
    "two inputs": lambda net, seen: net.two.register_full_backward_hook(recorded(seen)),
    "scaled": lambda net, seen: net.act.register_full_backward_hook(scaled),
    "scaled before": lambda net, seen: net.last.register_full_backward_pre_hook(scaled_before),
    "several": lambda net, seen: [
        net.act.register_full_backward_hook(scaled),
        net.act.register_full_backward_hook(recorded(seen)),
        net.act.register_full_backward_pre_hook(scaled_before),
        net.act.register_full_backward_pre_hook(scaled_before, prepend=True),
    ],
    "none": lambda net, seen: on_all(none)(net, seen),
    "and forward": lambda net, seen: [
        net.act.register_full_backward_hook(scaled),
        net.act.register_forward_hook(lambda module, args, out: out * 2),
        net.act.register_forward_pre_hook(lambda module, args: (args[0] - 0.1,)),
    ],
}


def trained(add: Callable, compiled: bool, *, second: bool = True, calls: int = 5) -> tuple:
    """The losses, parameters, gradients and what hooks saw, after some calls; and the step."""
    net, seen = Net(second=second), []
    add(net, seen)

    def step():
        net.zero_grad()
        loss = net(X).pow(2).mean()
        loss.backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.001 * p.grad
        return loss.detach()

    run = tracejit.compile(step) if compiled else step
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of hooks on a module none of whose inputs requires grad
        losses = [run() for _ in range(calls)]
    return [losses, list(net.parameters()), [p.grad for p in net.parameters()], seen], run


def agree(ours: object, theirs: object) -> None:
    if isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            agree(a, b)
    elif theirs is None:
        assert ours is None
    else:
        assert not type(ours).__module__.startswith("tracejit")
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("name", ADD)
@pytest.mark.sweep(2)
def test_as_eager(name, second):
    theirs, _ = trained(ADD[name], False, second=second)
    ours, step = trained(ADD[name], True, second=second)
    agree(ours, theirs)
    if not theirs[3] and name != "none":  # which warns, as eager does
        assert step.stats.replays >= 2, step.explain_mode()


def test_a_hook_changes_the_gradient():
    """The comparison above would see a hook that is ignored."""
    plain, _ = trained(lambda net, seen: None, True, calls=1)
    hooked, _ = trained(ADD["scaled"], True, calls=1)
    torch.testing.assert_close(hooked[2][0], plain[2][0] * 3)
    torch.testing.assert_close(hooked[2][-1], plain[2][-1])


def test_a_hook_added_and_removed_between_replays():
    def run(compiled: bool) -> list:
        net, grads = Net(), []

        def step():
            net.zero_grad()
            net(X).pow(2).mean().backward()

        call = tracejit.compile(step) if compiled else step
        for k in range(12):
            if k == 4:
                handle = net.act.register_full_backward_hook(scaled)
            if k == 8:
                handle.remove()
            call()
            grads.append([p.grad.clone() for p in net.parameters()])
        return grads

    agree(run(True), run(False))


def test_global_hooks():
    register = nn.modules.module.register_module_full_backward_hook
    seen: list[list] = [[], []]
    grads = []
    for compiled in (False, True):
        handle = register(recorded(seen[compiled]))
        try:
            grads.append(trained(lambda net, seen: None, compiled)[0])
        finally:
            handle.remove()
    agree(grads[1], grads[0])
    agree(seen[1], seen[0])
    assert seen[1]


def test_second_derivatives_go_through_hooks():
    def run(compiled: bool) -> torch.Tensor:
        net = Net()
        net.act.register_full_backward_hook(scaled)
        x = X.clone().requires_grad_()

        def step():
            (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
            g.pow(2).sum().backward()

        (tracejit.compile(step) if compiled else step)()
        return [x.grad, *(p.grad for p in net.parameters())]

    agree(run(True), run(False))


def test_a_write_to_a_hooked_output_is_refused_as_in_eager():
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
    net[0].register_full_backward_hook(none)
    for run in (net, tracejit.compile(lambda x: net(x).sum().backward())):
        with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
            run(X)


def test_backward_after_the_step_says_what_to_do():
    net = Net()
    net.act.register_full_backward_hook(none)
    step = tracejit.compile(lambda: net(X).sum())
    for _ in range(4):
        loss = step()
        torch.testing.assert_close(loss.detach(), net(X).sum().detach())
        with pytest.raises(RuntimeError, match="backward hooks.*call backward inside the step"):
            loss.backward()


def test_the_old_kind_of_hook_is_refused():
    net = Net()
    net.act.register_backward_hook(none)
    with pytest.raises(UnsupportedOperation, match="use register_full_backward_hook") as caught:
        tracejit.compile(lambda: net(X).sum().backward())()
    assert str(caught.value).startswith(f"{__file__}:")
    assert net.last.weight.grad is None
