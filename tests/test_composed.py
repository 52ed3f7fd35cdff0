"""Functions that are composed of others in whole steps: their modules, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import tracejit
from support.oracle import call
from tracejit.testing import assert_equal_to_eager

functional = torch.nn.functional
_classes = torch.tensor([2, 0, 1, 2, 1])
_signs = torch.tensor([1, -1, 1, 1, -1])
_bags = torch.tensor([[0, 2, 1], [4, 4, 3]])


def rows() -> torch.Tensor:
    return torch.linspace(-1.7, 1.3, 20).reshape(5, 4).cos()


LOSSES = {
    "MarginRankingLoss": lambda y: nn.MarginRankingLoss(0.3)(y[:, 0], y[:, 1], _signs),
    "HingeEmbeddingLoss": lambda y: nn.HingeEmbeddingLoss(2.0)(y[:, 0], _signs),
    "CosineEmbeddingLoss": lambda y: nn.CosineEmbeddingLoss(0.1)(y, rows(), _signs),
    "TripletMarginLoss": lambda y: nn.TripletMarginLoss(swap=True)(y, rows(), y.flip(0)),
    "TripletMarginWithDistanceLoss": lambda y: nn.TripletMarginWithDistanceLoss()(
        y, rows(), y.flip(0)
    ),
    "MultiMarginLoss": lambda y: nn.MultiMarginLoss(p=2)(y, _classes),
    "MultiLabelMarginLoss": lambda y: nn.MultiLabelMarginLoss()(
        y, torch.stack([_classes, _classes - 1, _classes, _classes], 1)
    ),
    "MultiLabelSoftMarginLoss": lambda y: nn.MultiLabelSoftMarginLoss()(y, (rows() > 0).float()),
    "PoissonNLLLoss": lambda y: nn.PoissonNLLLoss(full=True)(y, rows().abs() * 3),
    "GaussianNLLLoss": lambda y: nn.GaussianNLLLoss()(y[:, 0], y[:, 1], y[:, 2].exp()),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.sweep(2)
def test_losses_train(name):
    torch.manual_seed(0)
    model, x = nn.Linear(3, 4), torch.randn(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        loss = LOSSES[name](model(x))
        loss.backward()
        optimizer.step()
        return loss

    compiled = assert_equal_to_eager(step, calls=6, state=list(model.parameters()))
    assert compiled.explain_mode().startswith("replay")


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_and_bilinear_forms_train(mode):
    torch.manual_seed(0)
    table, form = nn.EmbeddingBag(5, 3, mode=mode, padding_idx=1), nn.Bilinear(3, 3, 2)
    state = [*table.parameters(), *form.parameters()]
    optimizer = torch.optim.SGD(state, lr=0.1)
    flat, offsets = torch.tensor([0, 2, 1, 4, 4, 3]), torch.tensor([0, 4])

    def step():
        optimizer.zero_grad()
        loss = form(table(_bags), table(flat, offsets)).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    assert_equal_to_eager(step, calls=6, state=state)


def test_a_bag_knows_nothing_of_rows_in_others():
    table = torch.ones(3, 2)
    table[2] = math.nan
    i, offsets = torch.tensor([0, 1, 2]), torch.tensor([0, 2])
    for mode in ("sum", "mean", "max"):
        found = call(lambda mode=mode: functional.embedding_bag(i, table, offsets, mode=mode))
        assert found[0].isfinite().all()
        assert found[1].isnan().all()


def test_values_that_eager_refuses():
    """Bounds are looked at on every call, before anything is changed."""
    table, x = torch.randn(5, 3), torch.randn(5)
    cases = [
        (lambda i: functional.embedding_bag(i, table, torch.tensor([0, 1])), v(0, 4), v(0, 5)),
        (lambda o: functional.embedding_bag(_classes, table, o), v(0, 3), v(1, 3)),
        (lambda z: functional.multi_margin_loss(table, z), v(0, 1, 2, 0, 1), v(0, 1, 3, 0, 1)),
        (lambda s: functional.gaussian_nll_loss(x, x, s), v(1.0).expand(5), v(-1.0).expand(5)),
        (lambda q: torch.quantile(x, q), v(0.5), v(1.5)),
    ]
    for function, good, bad in cases:
        compiled = tracejit.compile(function)
        for _ in range(3):
            torch.testing.assert_close(compiled(good), function(good))
        with pytest.raises((RuntimeError, ValueError)):
            function(bad)
        with pytest.raises((RuntimeError, ValueError)):
            compiled(bad)


def v(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def test_large_triangles():
    for row, col, offset in ((700, 700, 1), (3, 2000, -1), (2000, 3, 5)):
        for function in (torch.tril_indices, torch.triu_indices):
            made = call(lambda f=function, s=(row, col, offset): f(*s))
            assert torch.equal(made, function(row, col, offset))


def test_autocast_leaves_alone_what_it_has_cast():
    """cdist is computed in float32, and its product with it; a tensordot's product is not."""
    x, y = torch.randn(30, 5), torch.randn(30, 5)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            return torch.cdist(x, y), torch.tensordot(x, y.t(), 1)

    for ours, eager in zip(call(step), step(), strict=True):
        assert ours.dtype is eager.dtype
        torch.testing.assert_close(ours, eager)


def test_long_scans():
    x = torch.linspace(-1, 1, 1000).cos().requires_grad_()

    def step():
        most, place = (x * 1.0).cummax(0)
        total = x.logcumsumexp(0).mean() + x.cumprod(0).sum() + most.sum()
        return torch.autograd.grad(total, x)[0], place

    for ours, eager in zip(call(step), step(), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("n", [1, 2, 37])
def test_the_gradient_of_a_running_log_sum_is_a_scan_itself(n):
    """In n·log2(n) steps, not n²; right for one element too, and without large exponents."""

    def step(x):
        x = x.detach().requires_grad_()
        y = x.logcumsumexp(0)
        (y * torch.linspace(-1, 1, n, dtype=x.dtype)).sum().backward()
        return y, x.grad

    compiled = tracejit.compile(step, on_unsupported="raise", backend="numpy")
    for scale in (1.0, 300.0):
        x = torch.linspace(-2, 3, n, dtype=torch.float64).sin() * scale
        for mine, his in zip(compiled(x), step(x), strict=True):
            torch.testing.assert_close(mine, his)
    graph = tracejit.capture(step, torch.zeros(n)).graph
    assert max(node.out.type.numel for node in graph.nodes) <= n
