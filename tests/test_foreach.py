"""Kernels that are alike as one launch: which these are, what its tables say, that it does the
same."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

import tracejit
from support.fake import FAKE, log_of
from support.foreach_steps import OPTIMIZERS, SIZES, Updates, close, large, plan_of
from support.plan_checks import check
from tracejit.codegen import triton_foreach
from tracejit.codegen.triton import emit
from tracejit.codegen.triton_foreach import chunks_of, is_reduced, steps_of, wide_of, workspace_of
from tracejit.errors import InvalidGraph
from tracejit.ir.text import parse
from tracejit.runtime import foreach as launching
from tracejit.runtime.fake_clock import Fault
from tracejit.runtime.launches import Table
from tracejit.schedule import schedule
from tracejit.schedule.foreach import MIN_ROWS, _levels, _ordered, columns_of, rows_of
from tracejit.schedule.kernel_text import canonical
from tracejit.schedule.memory import layout_of
from tracejit.schedule.plan import Plan
from tracejit.schedule.plan_text import parse_plan
from tracejit.schedule.sound import check_plan
from tracejit.schedule.traffic import bytes_apart, bytes_moved, operations
from tracejit.testing import fake_device

BF16 = torch.bfloat16


def shape_of(plan: Plan) -> list[int]:
    """Of each launch, its rows; 0 for one that is no foreach."""
    return [len(x.kernel.parts) if x.kernel.foreach else 0 for x in plan.launches]


# --- what becomes a launch ------------------------------------------------------------------------


def test_adam_over_200_tensors_is_one_launch():
    plan = plan_of(large(shape=(7,)))
    assert shape_of(plan) == [200]
    (launch,) = plan.launches
    assert len(launch.scalars) == len(set(launch.scalars)) == 4 + 2 * 200  # shared ones once
    assert columns_of(launch.kernel).words == 4 * 200
    assert str(plan).count("sqrt(") == 1  # the body is printed once


def test_clipping_is_two_more():
    """The norms, stored side by side; what is made of them; and the update, which scales."""
    plan = plan_of(large(shape=(7,), clip=1.0))
    assert shape_of(plan) == [200, 0, 200]
    norms, total, _ = plan.launches
    rows = [b for b in plan.buffers if b.kind == "row"]
    assert len(rows) == 200 and {b.of for b in rows} < {*total.buffers}
    assert {b.name for b in rows} < {*norms.buffers} and len(total.buffers) == 2


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_plan_is_its_text(dtype, clip):
    plan = plan_of(Updates(dtypes=(dtype,), clip=clip).step)
    again = parse_plan(str(plan))
    assert again == plan and str(again) == str(plan)
    (last,) = [x for x in again.launches if x.kernel.foreach and len(x.scalars)]
    assert len({id(part.kernel) for part in last.kernel.parts}) == 1


def test_dtypes_have_launches_of_their_own():
    """And what is of another kind stays as it is."""
    plan = plan_of(Updates(sizes=[5, 6] * 9, dtypes=(torch.float32, BF16)).step)
    assert sorted(shape_of(plan)) == [9, 9]
    assert sorted(shape_of(plan_of(Updates(sizes=[5, 6] * 4).step))) == [8]
    assert 0 < MIN_ROWS == 8 and sum(shape_of(plan_of(Updates(sizes=[5] * 7).step))) == 0


def test_cpus_have_none():
    assert sum(shape_of(plan_of(Updates().step, gpu=False))) == 0


def test_a_tensor_of_one_element_is_a_row():
    plan = plan_of(Updates("SGD", sizes=[1, 9, *[20] * 8]).step)
    (launch,) = [x for x in plan.launches if x.kernel.foreach]
    assert sorted(launch.sizes)[:2] == [1, 9] and len(plan.launches) == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_it_does_what_kernels_alone_do(name, clip):
    """numpy runs them one by one; bytes and operations are those of the plan without."""
    step = Updates(name, clip=clip).step
    step()  # so that it has a state
    graph = tracejit.capture(step).optimized().graph
    ours, alone = schedule(graph, gpu=True), schedule(graph, gpu=False)
    assert sum(shape_of(ours)) >= MIN_ROWS and sum(shape_of(alone)) == 0
    check(graph, ours)
    check_plan(ours, layout_of(ours))
    assert operations(ours) == operations(alone) or clip
    assert sum(bytes_moved(ours)) <= sum(bytes_moved(alone))
    for launch in (x for x in ours.launches if x.kernel.foreach):
        rows = [replace(ours, launches=(one,)) for one in launch.alone()]
        (apart,) = bytes_apart(ours, launch)
        shared = 4 * (len(rows) - 1) * (clip is not None and len(launch.scalars) > 0)
        assert apart == sum(sum(bytes_moved(row)) for row in rows) - shared


# --- in which order -------------------------------------------------------------------------------


def waiting(first: int, second: int) -> str:
    """Some values, and then as many that need the one at that place among them."""
    lines = []
    for i in range(first):
        lines.append(f"%{100 + i}: f32[{50 + i}] = exp(%{i})")
        lines.append(f"%{200 + i}: f32[] = reduce_sum(%{100 + i}, axes=(0,))")
    for i in range(second):
        n, size, total = 300 + i, 50 + i, 200 + (i + 1) % first
        lines.append(f"%{n + 400}: f32[1] = reshape(%{total}, shape=(1,))")
        lines.append(f"%{n}: f32[{size}] = expand(%{n + 400}, shape=({size},))")
        lines.append(f"%{n + 100}: f32[{size}] = mul(%{i}, %{n})")
        lines.append(f"%{n + 200}: f32[{size}] = exp(%{n + 100})")
        lines.append(f"%{n + 300}: f32[] = reduce_sum(%{n + 200}, axes=(0,))")
    params = ", ".join(f"%{i}: f32[{50 + i}]" for i in range(first))
    results = ", ".join(f"%{600 + i}" for i in range(second))
    return f"f({params}) {{\n" + "\n".join(lines) + f"\nreturn {results}\n}}"


def test_those_that_wait_for_each_other_are_launches_one_after_another():
    graph = parse(waiting(9, 9))
    plan = schedule(graph, gpu=True)
    assert shape_of(plan) == [9, 9]
    check(graph, plan)


def test_levels():
    """a → b and c → d: a and d together exclude b and c."""
    before = [set(), {0}, set(), {2}]
    assert _levels(before, [[0, 2], [1, 3]]) == [0, 1, 0, 1]
    assert _levels(before, [[0, 3]]) == [1, 2, 0, 1]
    assert _levels(before, [[0, 3], [1, 2]]) is None
    assert _levels(before, [[0, 1]]) is None


def test_the_order_of_random_kernels():
    rng = random.Random(0)
    found = 0
    for _ in range(300):
        n = rng.randint(4, 30)
        before = [{j for j in range(i) if rng.random() < 2 / n} for i in range(n)]
        left = [*range(n)]
        rng.shuffle(left)
        groups = [sorted(left[k : k + 3]) for k in range(0, rng.randint(3, n), 3)]
        if _levels(before, groups) is None:
            continue
        found += 1
        item = {i: g for g, group in enumerate(groups) for i in group}
        members = [*groups, *([i] for i in range(n) if i not in item)]
        item = {i: k for k, group in enumerate(members) for i in group}
        waits = [{item[j] for i in group for j in before[i]} for group in members]
        assert all(k not in others for k, others in enumerate(waits))
        order = _ordered(waits, [group[-1] for group in members])
        place = {k: at for at, k in enumerate(order)}
        assert sorted(order) == [*range(len(members))]
        assert all(place[j] < place[k] for k, others in enumerate(waits) for j in others)
    assert found > 30


# --- chunks ---------------------------------------------------------------------------------------


def foreach_of(sizes: list[int], *, reduced: bool = False, dtype: torch.dtype = torch.float32):
    """The launch of rows of these sizes."""
    step = Updates("SGD", sizes=sizes, dtypes=(dtype,), clip=0.5 if reduced else None)
    plan = plan_of(step.step)
    return next(x for x in plan.launches if x.kernel.foreach and is_reduced(x.kernel) == reduced)


@pytest.mark.sweep(0.17)
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_chunks_have_each_element_once(reduced, dtype):
    rng = random.Random(1)
    for _ in range(30):
        many = rng.random() < 0.3
        sizes = [rng.choice([2, 3, 8, 1000, 1024, 1025, 5000, 100_003]) for _ in range(9)]
        launch = foreach_of(sizes, reduced=reduced, dtype=dtype)
        launch = replace(launch, sizes=tuple(n * (1 + 200 * many) for n in launch.sizes))
        rows = rows_of(launch.kernel, launch.sizes)
        aligned = [rng.random() < 0.7 for _ in rows]
        wide, rest = chunks_of(launch.kernel, launch.sizes, aligned)
        span = triton_foreach.BLOCK * steps_of(launch.kernel, launch.sizes)
        step = wide_of(launch.kernel)
        assert not (wide[:, 1:3] % step).any() and all(aligned[row] for row in wide[:, 0])
        for row, n in enumerate(rows):
            pieces = np.concatenate([wide[wide[:, 0] == row], rest[rest[:, 0] == row]])
            ends = sorted(pieces[:, 1:3].tolist())
            assert ends[0][0] == 0 and ends[-1][1] == n
            assert all(a[1] == b[0] for a, b in zip(ends, ends[1:], strict=False))
            assert all(0 < b - a <= span for a, b in ends)
            if aligned[row] and n % step == 0:
                assert not (rest[:, 0] == row).any()
        if reduced:
            chunks = np.concatenate([wide, rest])
            places = chunks[:, 3] + 8 * chunks[:, 4]
            assert len(set(places.tolist())) == len(chunks) and places.min() >= 4 * len(rows)
            assert places.max() + 8 == workspace_of(launch.kernel, launch.sizes)


def test_a_few_rows_are_dealt_to_many_programs():
    """Tiles are put together in chunks where there are enough of them all the same."""
    few, many = foreach_of([10_000] * 9), foreach_of([10_000] * 9)
    many = replace(many, sizes=tuple(300 * n for n in many.sizes))
    assert steps_of(few.kernel, few.sizes) == 1 and steps_of(many.kernel, many.sizes) == 4
    wide, rest = chunks_of(few.kernel, few.sizes)
    assert (len(wide), len(rest)) == (9 * 10, 0)


def test_what_is_printed_does_not_depend_on_the_number_of_rows():
    texts = {
        emit(canonical(launch.kernel), launch.sizes).text
        for launch in (foreach_of([20] * 8), foreach_of([*range(20, 40)]))
    }
    assert len(texts) == 1


def test_scalars_that_lie_elsewhere_are_refused():
    launch = foreach_of([20, 30] * 5)
    step = plan_of(large(9, (7,))).launches[0]
    turned = replace(step.kernel, parts=step.kernel.parts[::-1])
    with pytest.raises(InvalidGraph, match="do not lie in order"):
        columns_of(turned)
    assert columns_of(launch.kernel).rows == 10


# --- on the fake device ---------------------------------------------------------------------------


@pytest.fixture
def device():
    with fake_device(compiled=False) as found:
        yield found


def train(step: Updates, calls: int = 8, **options: object):
    """A compiled step after some calls, the last of which are replays."""
    compiled = tracejit.compile(step.step, backend=FAKE, on_unsupported="raise", **options)
    for _ in range(calls):
        compiled()
    assert compiled.stats.replays >= 1, compiled.explain_mode()
    return compiled


def eager(step: Updates, calls: int = 8) -> Updates:
    for _ in range(calls):
        step.step()
    return step


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_replays_equal_eager(device, name, clip, offset):
    options = {"clip": clip, "offset": offset}
    ours = Updates(name, **options)
    compiled = train(ours)
    assert sum(shape_of(compiled.plans[-1])) >= len(SIZES) - 1
    assert close(ours.tensors, eager(Updates(name, **options)).tensors)


@pytest.mark.parametrize("foreach", [False, True])
def test_foreach_and_single(device, foreach):
    ours = Updates(foreach=foreach)
    train(ours)
    assert close(ours.tensors, eager(Updates(foreach=foreach)).tensors)


def test_two_dtypes(device):
    options = {"sizes": [*SIZES, *SIZES[::-1]], "dtypes": (torch.float32, BF16), "clip": 0.5}
    ours = Updates(**options)
    train(ours)
    assert close(ours.tensors, eager(Updates(**options)).tensors)


def test_what_is_aligned_is_apart_from_what_is_not(device):
    def launches(sizes, offset):
        ours = Updates("SGD", sizes=sizes, offset=offset)
        step = train(ours)
        return [line for line in log_of(device, step) if "foreach" in line]

    even, odd = [4096] * 8, [4099] * 8
    assert launches(even, 0) == ["stream 0: launch foreach of 32 programs"]
    assert launches(even, 1) == ["stream 0: launch foreach of 32 programs"]
    assert launches(odd, 0) == [
        "stream 0: launch foreach of 32 programs",
        "stream 0: launch foreach of 8 programs",
    ]
    assert launches([7] * 8, 0) == ["stream 0: launch foreach of 8 programs"]


@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_memory_moves_between_calls(device, clip, required):
    """Gradients are other tensors in each call, and a parameter now and then: also in a graph,
    which is not captured again for it."""
    ours, theirs = Updates(clip=clip), Updates(clip=clip)
    compiled = tracejit.compile(ours.step, backend=FAKE, require_graph=required)
    for call in range(14):
        for step in (ours, theirs):
            for p in step.parameters:
                p.grad = torch.full_like(p, 0.1 * (call + 1))
            if call in (8, 10):
                step.parameters[call].data = step.parameters[call].detach().clone()
        compiled()
        theirs.step()
    assert close(ours.tensors, theirs.tensors) and compiled.stats.replays >= 5
    captures = [line for line in device.log if "capture" in line]
    assert len(captures) <= 2 * (required or clip is not None)


def test_streams_have_tables_of_their_own(device):
    steps = [Updates(clip=0.5) for _ in range(2)]
    alone = eager(Updates(clip=0.5), 20)

    compiled = [tracejit.compile(step.step, backend=FAKE) for step in steps]
    for _ in range(20):
        for number, step in enumerate(compiled):
            with device.on(number):
                step()
    device.synchronize()
    for step in steps:
        assert close(step.tensors, alone.tensors)


@pytest.mark.parametrize("verify", [None, 100])
def test_a_graph_of_the_caller(device, verify):
    """The call that is captured, and each replay, trains on; numbers are those of the capture. No
    eager runs beside that call: it would be captured too."""
    ours, theirs = Updates("SGD", clip=0.5), Updates("SGD", clip=0.5)
    with device.on(device.stream()):
        graph = device.graph_of(train(ours, 5, verify=verify))
        for _ in range(3):
            graph()
    device.synchronize()
    assert close(ours.tensors, eager(theirs, 8).tensors)


def rows_are_shifted(monkeypatch) -> None:
    """Each row has the memory of the next one."""
    table = launching.table_of
    monkeypatch.setattr(
        "tracejit.runtime.launched_plan.table_of", lambda x: [*table(x)[4:], *table(x)[:4]]
    )


def all_is_aligned(monkeypatch) -> None:
    monkeypatch.setattr(launching, "_is_aligned", lambda *given: True)


def a_chunk_is_missing(monkeypatch) -> None:
    chunks = launching.chunks_of

    def fewer(*given):
        wide, rest = chunks(*given)
        return wide[:-1], rest

    monkeypatch.setattr(launching, "chunks_of", fewer)


def addresses_stay(monkeypatch) -> None:
    table = Table.__call__

    def stale(self, words, bases):
        if self.bases is not None:
            self.bases = bases
        return table(self, words, bases)

    monkeypatch.setattr(Table, "__call__", stale)


@pytest.mark.parametrize(
    "plant", [rows_are_shifted, all_is_aligned, a_chunk_is_missing, addresses_stay]
)
def test_wrong_tables_are_seen(device, monkeypatch, plant):
    plant(monkeypatch)
    with pytest.raises((AssertionError, Fault)):
        test_memory_moves_between_calls(device, None, False)
        test_replays_equal_eager(device, "SGD", None, 1)
