"""DistributedDataParallel and averaging by hand: 20 steps on two ranks, equal to eager."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from support import rank_models
from support.ranks import Ranks

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch without gloo",
)

ROOT = Path(__file__).parents[1]
LIMIT = 10  # seconds, until an error is there


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as found:
        yield found


def trains(ranks: Ranks, name: str, how: Callable = rank_models.trained) -> list[dict]:
    """A case is equal to eager on every rank, and replays."""
    found = ranks(how, name)
    for rank in found:
        assert rank["difference"] < rank_models.RELATIVE, rank
        assert rank["loss"] < rank_models.RELATIVE_LOSS, rank
        assert rank["same on ranks"], rank
        assert rank["replays"] >= rank_models.STEPS // 2, rank
        assert rank["collectives"], rank
    return found


@pytest.mark.parametrize("name", rank_models.CASES)
@pytest.mark.sweep(1)
def test_trains_like_eager(ranks: Ranks, name: str):
    trains(ranks, name)


@pytest.mark.parametrize("name", rank_models.CASES)
@pytest.mark.sweep(3)
def test_trains_on_a_fake_device(ranks: Ranks, name: str):
    """Memory, streams and events are those of a GPU; no order is left to chance."""
    trains(ranks, name, rank_models.trained_on_a_fake_device)


def test_order_on_a_fake_device(ranks: Ranks, golden):
    """Each bucket is reduced on the engine's stream, behind an event, while others are computed;
    the update waits for all of them."""
    (first, _) = trains(ranks, "small buckets", rank_models.trained_without_graphs)
    golden("data_parallel_on_a_gpu.txt", "\n".join(first["log"]) + "\n")


@pytest.mark.sweep(0.17)
@pytest.mark.parametrize("name", ["small buckets", "zero", "decisions", "residual"])
def test_graphs_between_collectives(ranks: Ranks, name: str, golden):
    """Each stretch of kernels is a graph; collectives are given between them, behind events."""
    found = trains(ranks, name, rank_models.trained_by_graphs)
    for rank in found:
        own = [x for x in rank["log"] if "launch" in x and "of a graph" not in x]
        assert own and all("launch a graph" in x for x in own), own
    if name == "small buckets":
        golden("data_parallel_by_graphs.txt", "\n".join(found[0]["log"]) + "\n")


def test_an_event_less_between_graphs_is_found_out(ranks: Ranks):
    for said in ranks(rank_models.without_events_between_graphs):
        assert "all_reduce on stream" in said and "no event between them" in said, said


def test_an_event_less_is_found_out(ranks: Ranks):
    for said in ranks(rank_models.without_events):
        assert "all_reduce on stream 1 may still write: no event between them" in said


def test_buckets(ranks: Ranks):
    """The gradients of a layer are reduced while those of the layer before are computed."""
    (first, _) = ranks(rank_models.trained, "small buckets")
    assert first["collectives"] >= 3


def test_the_ledger(ranks: Ranks):
    """It says of every bucket what a rank sends, beside which launches, and how that scales."""
    found, other = ranks(rank_models.explained)
    assert found["sent_bytes"] == other["sent_bytes"]
    buckets = found["collectives"]
    assert len(buckets) >= 3 and {x["ranks"] for x in buckets} == {2}
    # as many bytes as there are in all parameters: of two ranks each sends half of them twice
    assert (
        found["sent_bytes"] == sum(x["bytes"] for x in buckets) == 4 * (7 * 32 + 33 * 32 + 33 * 4)
    )
    assert all(f"# sends {x['sent']:,} bytes" in found["plan"] for x in buckets)
    assert any(x["beside"] for x in buckets[:-1]) and 0 <= found["hidden"] <= 1
    assert [x["ranks"] for x in found["scaling"]] == 2 * [2**i for i in range(1, 11)]
    assert all(0 < x["efficiency"] <= 1 for x in found["scaling"])
    assert "sent by a rank in" in found["text"] and "more ranks, by NVLink 4" in found["text"]


def test_a_parameter_without_a_gradient(ranks: Ranks):
    for said in ranks(rank_models.unused_by_mistake):
        assert "unused.weight, unused.bias" in said and "find_unused_parameters=True" in said


@pytest.mark.sweep(0.17)
@pytest.mark.parametrize("how", ["plain", "views", "device"])
def test_ranks_that_use_other_parameters(ranks: Ranks, how: str):
    """Some use what others do not, and others in each call: eager's gradients, in replay."""
    for found in ranks(rank_models.other_parameters, how == "views", how == "device"):
        assert found["difference"] < rank_models.RELATIVE and found["same on ranks"], found
        assert found["replays"] >= 8, found


def test_one_rank_asks_what_others_use(ranks: Ranks):
    for said, seconds in ranks(rank_models.asked_in_vain, "alone"):
        assert said.startswith("RanksDiffer") and seconds < LIMIT, (said, seconds)
        assert "asks which of 8 parameters" in said


def test_a_rank_leaves_after_it_has_asked(ranks: Ranks):
    (said, seconds), (other, _) = ranks(rank_models.asked_in_vain, "left")
    assert said.startswith("RanksDiffer") and seconds < LIMIT, (said, seconds)
    assert "rank 1 has left the step with ValueError" in said
    assert other.startswith("ValueError")


def test_accumulation_over_calls_of_a_part_of_the_parameters(ranks: Ranks):
    for said in ranks(rank_models.unsynced):
        assert "no_sync()" in said and "in one call" in said


def test_between_eager_steps(ranks: Ranks):
    assert max(ranks(rank_models.then_eagerly)) < rank_models.RELATIVE


def test_no_step_with_collectives_is_saved(ranks: Ranks, tmp_path):
    """It would be run in another world."""
    for said in ranks(rank_models.saved, str(tmp_path)):
        assert "2 ranks" in said and "Compile it in each world" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp with adamw and clipping", "language", "by hand"])
def test_four_ranks(name: str):
    with Ranks(4) as four:
        trains(four, name)


@pytest.mark.slow
def test_the_example():
    """By torchrun, as its first lines say; the loss falls."""
    command = "-m torch.distributed.run --standalone --nproc-per-node=2 examples/data_parallel.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    given = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    found = subprocess.run([sys.executable, *command.split()], timeout=240, **given)
    assert found.returncode == 0, found.stderr
    losses = [float(x) for x in re.findall(r"loss ([0-9.]+)", found.stdout)]
    assert len(losses) == 5 and losses[-1] < losses[0] / 2, found.stdout
    assert "of 2 processes" in found.stdout
