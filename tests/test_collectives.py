"""Collectives in a step: equal to eager on two ranks, in replay, in order, and safe."""

from __future__ import annotations

import pytest
import torch

from support import rank_cases
from support.ranks import Ranks
from tracejit.ir.text import parse
from tracejit.passes import optimize
from tracejit.passes.buckets import put_in_buckets
from tracejit.passes.dce import dce
from tracejit.passes.simplify import simplify
from tracejit.schedule import schedule
from tracejit.schedule.plan_text import parse_plan

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch without gloo",
)
REPLAYS = 2  # of the calls of a case


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as found:
        yield found


# ---- equal to eager


@pytest.mark.parametrize("name", rank_cases.PLAIN)
@pytest.mark.sweep(0.17)
def test_as_eager(ranks: Ranks, name: str):
    assert ranks(rank_cases.plain, name) == [REPLAYS, REPLAYS]


@pytest.mark.parametrize("name", ["all_reduce", "in_the_middle", "all_gather"])
def test_by_numpy(ranks: Ranks, name: str):
    assert ranks(rank_cases.plain, name, "numpy") == [REPLAYS, REPLAYS]


@pytest.mark.parametrize("name", rank_cases.PLAIN)
@pytest.mark.sweep(3)
def test_on_a_fake_device(ranks: Ranks, name: str):
    assert ranks(rank_cases.on_a_fake_device, name) == [REPLAYS, REPLAYS]


def test_a_callers_graph_is_refused(ranks: Ranks):
    for said in ranks(rank_cases.captured):
        assert "has collectives" in said and "outside of the capture" in said


def test_built_for_a_gpu_that_is_not_here(ranks: Ranks):
    pytest.importorskip("triton")
    assert ranks(rank_cases.built) == [6, 6]


def test_collectives_of_numbers_that_nobody_needs(ranks: Ranks):
    """They are made all the same: another rank may need them, or wait for this one."""
    assert ranks(rank_cases.numbers) == 2 * [[REPLAYS, 3]]


def test_uneven_parts(ranks: Ranks):
    assert ranks(rank_cases.uneven) == [REPLAYS, REPLAYS]


@pytest.mark.parametrize("name", rank_cases.FORMS)
@pytest.mark.sweep(0.34)
def test_functional_forms_and_their_gradients(ranks: Ranks, name: str):
    assert ranks(rank_cases.form, name) == [REPLAYS, REPLAYS]


@pytest.mark.parametrize("op", rank_cases.REDUCTIONS)
@pytest.mark.sweep(0.34)
def test_reductions(ranks: Ranks, op: str):
    assert ranks(rank_cases.reduction, op) == [REPLAYS, REPLAYS]


@pytest.mark.parametrize("op", rank_cases.REDUCTIONS)
@pytest.mark.sweep(0.34)
def test_reductions_to_one_rank_and_in_parts(ranks: Ranks, op: str):
    assert all(ranks(rank_cases.reduction_to_parts, op))


@pytest.mark.parametrize("dtype", rank_cases.DTYPES)
def test_dtypes(ranks: Ranks, dtype: str):
    assert ranks(rank_cases.dtype, dtype) == [REPLAYS, REPLAYS]


def test_groups(ranks: Ranks):
    assert ranks(rank_cases.groups) == [REPLAYS, REPLAYS]


# ---- ranks stay together

LIMIT = 10  # seconds


def ends(found: list, *words: str) -> None:
    """Every rank has said these words in time."""
    for said, seconds in found:
        assert said and seconds < LIMIT, (said, seconds)
        for word in words:
            assert word in said, said


def test_another_branch_on_one_rank(ranks: Ranks):
    found = ranks(rank_cases.another_branch)
    ends(found, "RanksDiffer", "of 8+64 by=SUM", "of 1+8+64 by=SUM", "rank_cases.py:")


def test_another_branch_on_one_rank_on_a_fake_device(ranks: Ranks):
    ends(ranks(rank_cases.another_branch_on_a_fake_device), "RanksDiffer", "of 1+8+64 by=SUM")


def test_another_learning_rate_on_one_rank(ranks: Ranks):
    ends(ranks(rank_cases.another_rate), "RanksDiffer", "lr is 0.1 on rank 0, and 1.1 on rank 1")


def test_another_shape_on_one_rank(ranks: Ranks):
    found = ranks(rank_cases.another_shape)
    ends(found, "RanksDiffer", "all_reduce f32 of 4", "all_reduce f32 of 5")


def test_an_exception_on_one_rank(ranks: Ranks):
    first, (second, _) = ranks(rank_cases.an_exception)
    ends([first], "RanksDiffer", "rank 1 has left the step with ShapeError")
    assert second.startswith("ShapeError")


def test_an_exception_after_a_value_on_one_rank(ranks: Ranks):
    first, (second, _) = ranks(rank_cases.an_exception_after_a_value)
    ends([first], "RanksDiffer", "rank 1 has left the step with ValueError")
    assert second.startswith("ValueError: the loss is ")


def test_one_rank_runs_eagerly(ranks: Ranks):
    ends(ranks(rank_cases.eagerly), "RanksDiffer", "runs its plan", "runs the step eagerly")


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_a_rank_is_killed(when: str):
    with Ranks(2) as ranks:
        (ok, first), (_, second) = ranks.ended(rank_cases.killed, when)
    assert ok, first
    ends([first], "CollectiveError")
    assert second == "the process has ended with 7"


# ---- the plan

STEP = """
f(%0: f32[4,4], %1: f32[4], %2: f32[4,4]) {
  %3: f32[4,4] = matmul(%0, %2)
  %4: f32[16] = reshape(%3, shape=(16,))
  %5: f32[16] = all_reduce(%4, by='SUM', group='0', ranks=2, number=0)
  %6: f32[4] = mul(%1, 2.0)
  %7: f32[4] = all_reduce(%6, by='MAX', group='0', ranks=2, number=1)
  %8: f32[4,4] = reshape(%5, shape=(4, 4))
  %9: f32[4,4] = add(%0, %8)
  %10: f32[4,4] = exp(%2)
  %11: u8[1] = barrier(group='0', ranks=2, number=2)
  return %10
  write %0 <- %9
  write %1 <- %7
}"""


def test_order_of_launches(golden):
    """Each starts when what it sends is there, others run, and all end before anything is
    written."""
    plan = schedule(optimize(parse(STEP)))
    assert str(parse_plan(str(plan))) == str(plan)
    golden("collectives.txt", f"{plan}\n")


def test_they_are_neither_dropped_nor_merged():
    graph = parse("""
    f(%0: f32[4]) {
      %1: f32[4] = all_reduce(%0, by='SUM', group='0', ranks=2, number=0)
      %2: f32[4] = all_reduce(%0, by='SUM', group='0', ranks=2, number=1)
      %3: f32[4] = add(%0, %0)
      return %3
    }""")
    assert [n.op.name for n in dce(simplify(graph)).nodes] == ["all_reduce", "all_reduce", "add"]
    assert str(parse(str(graph))) == str(graph)


def test_a_learning_rate_is_in_common_and_a_weight_of_the_loss_is_not():
    from tracejit.runtime.agreement import numbers_in_common

    graph = parse("""
    f(%0: f32[4], %1: f64[]@host, %2: f64[]@host, %3: f64[]@host, %4: f32[]) {
      %5: f32[4] = mul(%0, %1)
      %6: f32[4] = all_reduce(%5, by='SUM', group='0', ranks=2, number=0)
      %7: f32[4] = mul(%6, %2)
      %8: f32[4] = sub(%0, %7)
      %9: f32[] = mul(%4, %3)
      write %0 <- %8
      write %4 <- %9
    }""")
    assert numbers_in_common(graph) == (2,)


AVERAGED = """
f(%0: f32[4], %1: f32[6]) {
  %2: f32[6] = exp(%1)
  %3: f32[4] = exp(%0)
  %4: f32[4] = all_reduce(%3, by='SUM', group='0', ranks=2, number=0)
  %5: f32[4] = mul(%4, 0.5)
  %6: f32[6] = all_reduce(%2, by='SUM', group='0', ranks=2, number=1)
  %7: f32[6] = mul(%6, 0.5)
  write %0 <- %5
  write %1 <- %7
}"""
TOGETHER = """
f(%0: f32[4], %1: f32[6]) {
  %2: f32[6] = exp(%1)
  %3: f32[4] = exp(%0)
  %4: f32[10] = all_reduce(%2, %3, by='SUM', group='0', ranks=2, number=0, of='1,0')
  %5: f32[6] = slice(%4, starts=(0,), stops=(6,), steps=(1,))
  %6: f32[4] = slice(%4, starts=(6,), stops=(10,), steps=(1,))
  %7: f32[4] = mul(%6, 0.5)
  %8: f32[6] = mul(%5, 0.5)
  write %0 <- %7
  write %1 <- %8
}"""


def test_reductions_by_hand_are_put_together():
    """In the order in which their operands are computed."""
    assert str(put_in_buckets(parse(AVERAGED)).canonical()) == str(parse(TOGETHER))


@pytest.mark.parametrize("change", ["by='MAX'", "group='1'", "ranks=2, number=1, of='3'"])
def test_reductions_that_stay_apart(change: str):
    old = {"b": "by='SUM'", "g": "group='0'", "r": "ranks=2, number=1"}[change[0]]
    first, second = AVERAGED.split("%6: f32[6]")
    graph = parse(f"{first}%6: f32[6]{second.replace(old, change, 1)}")
    assert str(put_in_buckets(graph).canonical()) == str(graph)


def test_a_reduction_of_what_is_reduced_stays_apart():
    chained = parse("""
    f(%0: f32[4]) {
      %1: f32[4] = all_reduce(%0, by='SUM', group='0', ranks=2, number=0)
      %2: f32[4] = exp(%1)
      %3: f32[4] = all_reduce(%2, by='SUM', group='0', ranks=2, number=1)
      write %0 <- %3
    }""")
    assert str(put_in_buckets(chained).canonical()) == str(chained)
