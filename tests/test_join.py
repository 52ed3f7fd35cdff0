"""`join()` of DistributedDataParallel: ranks with uneven inputs, equal to eager."""

from __future__ import annotations

import pytest
import torch

from support import rank_joins
from support.ranks import Ranks

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch without gloo",
)
LIMIT = 10  # seconds, until an error is there


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as found:
        yield found


@pytest.mark.sweep(0.17)
@pytest.mark.parametrize("name", rank_joins.CASES)
def test_trains_like_eager(ranks: Ranks, name: str):
    """In four epochs, in which a rank has more inputs, and in the last one the other has none."""
    found = ranks(rank_joins.trained, name)
    for rank in found:
        assert rank["difference"] < 1e-5 and rank["same on ranks"], rank
        assert rank["replays"] >= 2 and not rank["eager"], rank


def test_all_raise_where_one_has_no_more_inputs(ranks: Ranks):
    """With throw_on_early_termination, in eager's words, and with nothing changed."""
    for eager, ours in ranks(rank_joins.throws):
        assert eager == ours
        assert "exhausted all inputs" in ours or "Throwing across all ranks. True" in ours


def test_a_rank_leaves_while_another_has_joined(ranks: Ranks):
    (first, seconds), (second, _) = ranks(rank_joins.left)
    assert first.startswith("RanksDiffer") and seconds < LIMIT, (first, seconds)
    assert "rank 1 has left the step with ValueError: bad" in first
    assert second.startswith("ValueError")


def test_eager_steps(ranks: Ranks):
    for difference, eager in ranks(rank_joins.eagerly):
        assert difference == 0 and eager >= 3


def test_collectives_that_nobody_would_answer(ranks: Ranks):
    for said, seconds in ranks(rank_joins.by_hand):
        assert said.startswith("UnsupportedOperation") and seconds < LIMIT
        assert "Under join()" in said


def test_one_rank_runs_eagerly(ranks: Ranks):
    for said, seconds in ranks(rank_joins.one_eagerly):
        assert said.startswith("RanksDiffer") and seconds < LIMIT, (said, seconds)
        assert "runs the step eagerly" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "divided by those that are left", "buffers"])
def test_four_ranks(name: str):
    """Two of them join first."""
    with Ranks(4) as four:
        for rank in four(rank_joins.trained, name):
            assert rank["difference"] < 1e-5 and rank["same on ranks"], rank
