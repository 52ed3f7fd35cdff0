"""The CTC loss in whole steps: one program whatever the lengths are, which does not grow with the
steps; what eager refuses; and what its gradient is."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import tracejit
from tracejit.errors import AutogradError, ShapeError
from tracejit.testing import assert_equal_to_eager

STEPS, BATCH, CLASSES = 9, 4, 6


def batch(seed: int) -> tuple[torch.Tensor, ...]:
    """Sounds, labels, and how many there are of both in each sequence; some have no alignment."""
    torch.manual_seed(seed)
    sounds = torch.randn(STEPS, BATCH, 3)
    labels = torch.randint(1, CLASSES, (BATCH, 5))
    return sounds, labels, torch.randint(0, STEPS + 1, (BATCH,)), torch.randint(0, 6, (BATCH,))


class Listener(nn.Module):
    def __init__(self, **how: object):
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.loss = nn.Linear(3, CLASSES), nn.CTCLoss(**how)

    def forward(self, sounds, labels, lasts, counts):
        return self.loss(self.layer(sounds).log_softmax(-1), labels, lasts, counts)


def trained(backend: str | None, how: dict, calls: int = 5) -> tuple:
    """Losses and weights of some steps, each on another batch; and the step."""
    net = Listener(**how)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def step(*given):
        optimizer.zero_grad()
        loss = net(*given)
        loss.sum().backward()
        optimizer.step()
        return loss.detach()

    run = step if backend is None else tracejit.compile(step, backend=backend)
    losses = [run(*batch(seed)) for seed in range(calls)]
    return losses, list(net.parameters()), run


@pytest.mark.parametrize("backend", ["c", "numpy"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_trains_like_eager_with_other_lengths_on_each_call(backend: str, reduction: str):
    how = {"reduction": reduction, "zero_infinity": True}
    losses, weights, _ = trained(None, how)
    ours, our_weights, step = trained(backend, how)
    torch.testing.assert_close(ours, losses)
    torch.testing.assert_close(our_weights, weights)
    assert len(step.plans) == 1 and step.explain_mode().startswith("replay")


@pytest.mark.interpret
def test_on_triton():
    how = {"reduction": "sum", "zero_infinity": True}
    losses, weights, _ = trained(None, how, calls=2)
    ours, our_weights, _ = trained("interpret", how, calls=2)
    torch.testing.assert_close(ours, losses)
    torch.testing.assert_close(our_weights, weights)


def gradient(x, labels, lasts, counts):
    loss = functional.ctc_loss(x, labels, lasts, counts, reduction="none")
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


def test_the_program_does_not_grow_with_the_steps():
    launches = []
    for steps in (5, 40):
        step = tracejit.compile(gradient)
        x = torch.randn(steps, 2, 4).log_softmax(-1).requires_grad_()
        given = (x, torch.tensor([[1, 2], [3, 3]]), torch.tensor([5, 4]), torch.tensor([2, 1]))
        torch.testing.assert_close(step(*given), gradient(*given))
        launches.append(len(step.plans[0].launches))
    assert launches[0] == launches[1]


@pytest.mark.parametrize("fuse", [True, False])
def test_long_sequences(fuse: bool):
    """Of many steps, whose likelihoods are far below the smallest float."""

    def given():
        torch.manual_seed(2)
        x = (9 * torch.randn(200, 3, 12, dtype=torch.float64)).log_softmax(-1).requires_grad_()
        labels = torch.randint(1, 12, (70,))
        return x, labels, torch.tensor([200, 150, 90]), torch.tensor([30, 0, 40])

    assert_equal_to_eager(gradient, given, calls=2, backend="c", fuse=fuse)


X = torch.randn(5, 2, 4).log_softmax(-1)
ROWS, FLAT = torch.tensor([[1, 2], [3, 1]]), torch.tensor([1, 2, 3])
BAD = {
    "more steps than there are": (X, ROWS, torch.tensor([5, 6]), torch.tensor([2, 2])),
    "steps below zero": (X, ROWS, torch.tensor([-1, 5]), torch.tensor([2, 2])),
    "more labels than there are": (X, ROWS, torch.tensor([5, 5]), torch.tensor([3, 2])),
    "labels below zero": (X, ROWS, torch.tensor([5, 5]), torch.tensor([2, -1])),
    "labels left over": (X, FLAT, torch.tensor([5, 5]), torch.tensor([1, 1])),
    "labels missing": (X, FLAT, torch.tensor([5, 5]), torch.tensor([2, 2])),
}


@pytest.mark.parametrize("name", BAD)
def test_lengths_that_do_not_fit_are_refused_on_any_call(name: str):
    x, labels, lasts, counts = BAD[name]
    with pytest.raises(RuntimeError):
        functional.ctc_loss(x, labels, lasts, counts)
    step = tracejit.compile(lambda *given: functional.ctc_loss(*given))
    good = x, labels, torch.tensor([5, 4]), torch.tensor([2, 1])
    for _ in range(3):
        torch.testing.assert_close(step(*good), functional.ctc_loss(*good))
    with pytest.raises(ShapeError, match="Expected"):
        step(x, labels, lasts, counts)
    torch.testing.assert_close(step(*good), functional.ctc_loss(*good))


def test_there_is_no_second_derivative():
    def step(x):
        loss = functional.ctc_loss(x, ROWS, (5, 5), (2, 2))
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        assert g.requires_grad
        g.square().sum().backward()

    for run in (step, tracejit.compile(step)):
        with pytest.raises(RuntimeError, match="_ctc_loss_backward'? is not implemented"):
            run(X.clone().requires_grad_())


@pytest.mark.parametrize("written", ["targets", "log_probs", "loss"])
def test_what_it_saved_must_stay(written: str):
    def step(x, labels):
        x, labels = x * 1, labels + 0
        loss = functional.ctc_loss(x, labels, (5, 5), (2, 2), reduction="none")
        total = loss.sum()
        {"targets": labels, "log_probs": x, "loss": loss}[written].mul_(2)
        total.backward()

    with pytest.raises(RuntimeError, match="modified by an inplace"):
        step(X.clone().requires_grad_(), ROWS)
    with pytest.raises(AutogradError, match="modified by an inplace"):
        tracejit.compile(step)(X.clone().requires_grad_(), ROWS)
