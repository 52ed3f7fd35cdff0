"""Static graphs: written down without values, then equal to the same calls made eagerly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tracejit
from examples import static_graph
from tracejit import Graph
from tracejit.errors import StaticGraphError


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(20, 30, bias=False), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 5)]
    return nn.Sequential(*layers)


def test_a_classifier_trains_as_in_eager():
    ours, eager = network(), network()
    with Graph() as graph:
        x, y = graph.placeholder("x", (16, 20)), graph.placeholder("y", (16,), torch.int64)
        scale = graph.variable("scale", torch.ones(20))
        logits = graph.module("net", ours)(x * scale)
        loss = F.cross_entropy(logits, y, label_smoothing=0.1)
        best, place = logits.max(1)
        right = (place == y).float().mean()
        optimizer = graph.minimize(loss, torch.optim.AdamW, lr=0.01)
    run = graph.compile(loss, right, best, on_unsupported="raise")
    assert ours[1].num_batches_tracked == 0
    theirs = torch.ones(20, requires_grad=True)
    other = torch.optim.AdamW([theirs, *eager.parameters()], lr=0.01)
    for call in range(8):
        a, b = torch.randn(16, 20), torch.randint(0, 5, (16,))
        if call == 5:
            for group in (*optimizer.param_groups, *other.param_groups):
                group["lr"] = 0.1
        found = run(a, y=b)
        logits = eager(a * theirs)
        expected = F.cross_entropy(logits, b, label_smoothing=0.1)
        other.zero_grad()
        expected.backward()
        other.step()
        accuracy = (logits.max(1).indices == b).float().mean()
        for mine, his in zip(found, (expected, accuracy, logits.max(1).values), strict=True):
            torch.testing.assert_close(mine, his.detach(), rtol=1e-4, atol=1e-5)
    assert run.explain_mode().startswith("replay") and ours[1].num_batches_tracked == 8
    for mine, his in zip(ours.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine, his, rtol=1e-3, atol=1e-4)
    assert graph.variables["scale"].grad is not None
    assert graph.variables["net_0_weight"] is ours[0].weight


def test_in_place_updates_and_several_results():
    with Graph() as graph:
        x = graph.placeholder("x", (4, 6))
        mean = graph.variable("mean", torch.zeros(6), trainable=False)
        count = graph.variable("count", torch.zeros((), dtype=torch.int64))
        first, *rest = x.split(2, dim=1)
        graph.assign(mean, mean * 0.5 + x.mean(0))
        count.add_(1)
        top = torch.topk(torch.cat([first, rest[-1]], 1), k=2, dim=1)
        picked = x[:, 1:5:2]
    run = graph.compile(top.values, top.indices, picked, count)
    expected = torch.zeros(6)
    for call in range(5):
        x = torch.randn(4, 6)
        values, indices, picked, count = run(x)
        expected = expected * 0.5 + x.mean(0)
        whole = torch.topk(torch.cat([x[:, :2], x[:, 4:]], 1), 2, dim=1)
        assert torch.equal(values, whole.values) and torch.equal(indices, whole.indices)
        assert torch.equal(picked, x[:, 1:5:2]) and count == call + 1
        torch.testing.assert_close(graph.variables["mean"], expected)


def test_nothing_is_computed_while_it_is_written():
    weight = torch.ones(3)
    with Graph() as graph:
        x = graph.placeholder("x", (2, 3))
        w = graph.variable("w", weight)
        loss = (x * w).sum()
        graph.minimize(loss, lr=0.1)
    assert loss.is_meta and torch.equal(weight, torch.ones(3)) and weight.grad is None
    assert "optimizer.step()" in graph.code and "return None" in graph.code


@pytest.mark.parametrize(
    "feeds, said",
    [
        ({"x": torch.zeros(3, 3)}, r"x is torch.float32 of shape \(3, 3\), and was declared"),
        ({"x": torch.zeros(2, 3).double()}, "x is torch.float64"),
    ],
)
def test_other_feeds_are_refused(feeds, said):
    with Graph() as graph:
        total = graph.placeholder("x", (2, 3)).sum()
    run = graph.compile(total)
    for _ in range(4):
        assert run(torch.ones(2, 3)) == 6
    with pytest.raises(StaticGraphError, match=said):
        run(**feeds)
    with pytest.raises(TypeError, match="missing"):
        run()


def test_what_cannot_be_written_is_refused():
    with Graph() as graph:
        x = graph.placeholder("x", (2, 3))
        with pytest.raises(StaticGraphError, match="'x' is taken"):
            graph.variable("x", torch.zeros(3))
        with pytest.raises(StaticGraphError, match="no name for a tensor"):
            graph.placeholder("1x", (2,))
        with pytest.raises(StaticGraphError, match="no variable to train"):
            graph.minimize(x.sum())
        with pytest.raises(StaticGraphError, match="not of this graph"):
            _ = x + torch.empty(3, device="meta")
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            x.sum().item()
    with pytest.raises(StaticGraphError, match="not of this graph"):
        graph.compile(torch.zeros(3))


def test_the_example(tmp_path):
    first, last = static_graph.main(str(tmp_path / "graph.step"), steps=60)
    assert last < 0.5 * first
    loaded = tracejit.load(tmp_path / "graph.step")
    assert {"w1", "w2"} <= {name.rpartition(".")[2] for name in loaded.state_dict()}
