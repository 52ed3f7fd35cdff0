"""No false alarm: steps that are right, of which a verified call once said that they are not."""

from __future__ import annotations

import collections
import warnings
from collections.abc import Callable

import pytest
import torch

import tracejit
from support.faults import rule_of
from tracejit.errors import TracejitWarning, WrongResult


def verified(step: Callable, calls: int = 8, between: Callable | None = None, **options: object):
    """The certificate of some calls, none of which may warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", TracejitWarning)
        step = tracejit.compile(step, **{"verify": 2, "backend": "numpy"} | options)
        for call in range(calls):
            if between is not None:
                between(call)
            step(torch.full((3,), 1.0 + call))
    certificate = step.certificate()
    assert certificate.holds and not certificate.withdrawn, certificate
    return step


class Record:
    """What a step keeps in tuples."""

    def __init__(self):
        self.n, self.best = 0, (0.5, 0)
        self.pairs = collections.deque([(0.0, 0)] * 3, maxlen=3)


def best_of_all(r: Record, x: torch.Tensor) -> torch.Tensor:
    loss = (x * 2.0).sum()
    r.best = min(r.best, (loss.item(), r.n))
    return loss


def last_pairs(r: Record, x: torch.Tensor) -> torch.Tensor:
    r.pairs.append((0.5 * r.n, r.n))
    return x * sum(a for a, _ in r.pairs)


def the_same_again(r: Record, x: torch.Tensor) -> torch.Tensor:
    r.best = (*r.best[:1], 0 * r.n)
    return x * r.best[0]


@pytest.mark.parametrize("change", [best_of_all, last_pairs, the_same_again])
def test_a_tuple_is_what_it_holds(change):
    """Eager keeps the tuple that was there, a replay makes an equal one."""
    r = Record()

    def step(x: torch.Tensor) -> torch.Tensor:
        r.n += 1
        return change(r, x)

    verified(step)


def test_another_tuple_is_found():
    """In one that is compared by what it holds."""
    from support.faults import in_run

    r = Record()

    def step(x: torch.Tensor) -> torch.Tensor:
        r.n += 1
        r.best = (0.5, r.n)
        return x * 2.0

    def wrong(function: Callable) -> Callable:
        def perform(*given: object) -> object:
            returned = function(*given)
            r.best = (0.5, -1)
            return returned

        return perform

    with in_run(wrong)():
        compiled = tracejit.compile(step, verify=2, backend="numpy", on_unsupported="eager")
        with pytest.warns(TracejitWarning, match=r"best.*-1, in eager"):
            for _ in range(8):
                compiled(torch.ones(3))
    assert r.best == (0.5, 8)


def test_the_place_of_a_mode_is_open():
    """Of rows of more than 16 elements eager's depends on how the C++ library sorts."""
    x = torch.arange(600).reshape(2, 300) % 7
    step = tracejit.compile(lambda x: x.mode(1), verify=2, backend="numpy")
    assert not torch.equal(x.mode(1).indices, tracejit.compile(lambda x: x.mode(1))(x)[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracejitWarning)
        for _ in range(6):
            values, places = step(x)
            assert torch.equal(values, x.mode(1).values)
            assert torch.equal(x.gather(1, places[:, None])[:, 0], values)
        step.verify(x)
    found = step.certificate()
    assert not found.withdrawn and step.stats.eager == 0 and step.stats.replays
    assert found.unverified == ["torch leaves open at which of equal elements it finds a mode"]


def test_the_value_of_a_mode_is_not():
    x = torch.arange(600).reshape(2, 300) % 7
    step = tracejit.compile(lambda x: x.mode(1), verify=2, backend="numpy")
    fault = rule_of(torch.Tensor.mode, lambda own: lambda t, x, dim: own(t, x.flip(0), dim))
    with fault, pytest.raises(WrongResult, match="mode is computed otherwise than by eager"):
        step(x + torch.tensor([[0], [1]]))
    assert step.certificate().withdrawn
