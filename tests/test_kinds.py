"""Kinds of calls, and the short function that knows one of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tracejit
from tracejit.errors import TracejitWarning
from tracejit.kinds import counted, kind_of

x, y = torch.zeros(3, 2), torch.zeros(4)
CALLS = [
    ((), {}),
    ((x,), {}),
    ((x, x), {}),
    ((y,), {}),
    ((torch.zeros(0),), {}),
    ((torch.tensor(1.0),), {}),
    ((x.double(),), {}),
    ((x.t(),), {}),
    ((x, None), {}),
    ((x, True), {}),
    ((x, False), {}),
    ((x, 0), {}),
    ((x, 1.5), {}),
    ((x, [y]), {}),
    ((x, {"y": y}), {}),
    ((x,), {"y": y}),
    ((x,), {"z": y}),
    ((x,), {"y": y, "flag": True}),
    ((x,), {"flag": True, "y": y}),
    ((), {"x": x, "y": None}),
]


def modes():
    yield torch.enable_grad()
    yield torch.no_grad()
    yield torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("of", range(len(CALLS)))
def test_the_short_function_knows_one_kind(of):
    network = vars(nn.Linear(2, 2))
    for mode in modes():
        counter = SimpleNamespace(left=10_000)
        with mode:
            network["training"] = True
            known = kind_of(*CALLS[of], [network])
            takes = counted(counter, *CALLS[of], [network])
        hits = 0
        for training in (True, False):
            network["training"] = training
            for other in modes():
                for call in CALLS:
                    with other:
                        same = kind_of(*call, [network]) == known
                        assert takes(*call) is same
                    hits += same
        assert 1 <= hits <= 2 and counter.left == 10_000 - hits  # x.t() of (3, 2) is of (2, 3)


def test_it_counts_down():
    counter = SimpleNamespace(left=2)
    takes = counted(counter, (x,), {}, [])
    assert [takes((x,), {}) for _ in range(4)] == [True, True, False, False]


def test_other_classes_of_tensors_are_left_to_the_long_way():
    takes = counted(SimpleNamespace(left=9), (x,), {}, [])
    assert not takes((nn.Parameter(x),), {})
    takes = counted(SimpleNamespace(left=9), (nn.Parameter(x),), {}, [])
    assert takes((nn.Parameter(x),), {}) and not takes((x,), {})


def test_what_changes_between_quick_calls_is_seen():
    """Calls that run eagerly at once, and one among them that can be compiled."""
    net = nn.Linear(2, 2)

    @tracejit.compile(on_unsupported="eager")
    def step(x, dense=False):
        if dense:
            return net(x).sum()
        return net(x).to_sparse().sum()

    with pytest.warns(TracejitWarning, match="to_sparse"):
        for _ in range(40):
            torch.testing.assert_close(step(x), net(x).sum())
    eager = step.stats.eager
    for _ in range(4):
        torch.testing.assert_close(step(x, dense=True), net(x).sum())
    assert step.stats.eager == eager and step.stats.replays > 0
    net.eval()
    torch.testing.assert_close(step(x), net(x).sum())
    with pytest.raises(RuntimeError):
        step(torch.zeros(3, 7))
    net.train()
    with torch.no_grad():
        assert not step(x).requires_grad
