"""Sums down columns in two steps, in plans for GPUs."""

from __future__ import annotations

import math

import pytest

from support.kernel_cases import plan_of
from support.plan_checks import PlanChecks
from tracejit.codegen.triton import emit
from tracejit.gpus import GPUS
from tracejit.ir.text import parse
from tracejit.runtime.numpy_executor import NumpyExecutor
from tracejit.schedule import schedule
from tracejit.schedule.kernel import Reduce
from tracejit.schedule.plan import Plan


def sum_of(*shape: int, axes: tuple[int, ...], dtype: str = "f32") -> str:
    left = ",".join(str(n) for k, n in enumerate(shape) if k not in axes)
    whole = f"{dtype}[{','.join(map(str, shape))}]"
    return f"""f(%0: {whole}) {{
      %1: {whole} = mul(%0, 2.0)
      %2: {dtype}[{left}] = reduce_sum(%1, axes={axes})
      return %2
    }}"""


def summed(plan: Plan) -> list[tuple[int, int]]:
    """Of each kernel with a sum: its results, and what each of them is the sum of."""
    found = []
    for launch in plan.launches:
        for alone in launch.alone():
            sizes = dict(zip(alone.kernel.sizes, alone.sizes, strict=True))
            for stage in alone.kernel.stages:
                if any(isinstance(s, Reduce) for s in stage.body):
                    axes = alone.kernel.axes, stage.axes
                    found.append(
                        tuple(math.prod(sizes.get(a.extent, a.extent) for a in x) for x in axes)
                    )
    return sorted(found)


def scheduled(text: str) -> Plan:
    """Checked against the evaluator, where it is small."""
    graph = parse(text)
    plan = schedule(graph, gpu=True)
    if graph.params[0].value.type.numel < 1 << 21:
        PlanChecks(NumpyExecutor()).check(graph, plan)
    return plan


@pytest.mark.parametrize(
    "shape, axes, stretch",
    [
        ((4096, 768), (0,), 128),  # 16384 sums are of 192 rows each; a divisor of 4096 near that
        ((1000, 7), (0,), 50),  # a divisor of 1000 near 64
        ((1031, 7), (0,), 64),  # of a prime the last stretch is filled up
        ((3, 347, 9), (0, 1), 64),
        ((2, 500, 3, 5), (0, 1), 50),
    ],
)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
def test_sums_of_columns(shape, axes, stretch, dtype):
    rows = math.prod(shape[: len(axes)])
    parts, columns = -(-rows // stretch), math.prod(shape[len(axes) :])
    plan = scheduled(sum_of(*shape, axes=axes, dtype=dtype))
    assert summed(plan) == sorted([(parts * columns, stretch), (columns, parts)])


@pytest.mark.parametrize(
    "shape, axes",
    [
        ((512, 7), (0,)),  # few rows
        ((600, 100000), (0,)),  # many columns
        ((7, 1000), (1,)),  # rows
        ((9, 1000, 5), (1,)),  # neither
        ((1000, 7), (0, 1)),  # everything
    ],
)
def test_sums_that_stay_one(shape, axes):
    plan = scheduled(sum_of(*shape, axes=axes))
    assert len(summed(plan)) == 1


def test_columns_of_what_is_turned_are_rows():
    plan = scheduled("""f(%0: f32[7,1000]) {
      %1: f32[1000,7] = permute(%0, axes=(1, 0))
      %2: f32[1000,7] = mul(%1, 2.0)
      %3: f32[7] = reduce_sum(%2, axes=(0,))
      return %3
    }""")
    assert summed(plan) == [(7, 1000)]


def test_on_the_cpu_sums_stay_one():
    graph = parse(sum_of(4096, 768, axes=(0,)))
    assert summed(schedule(graph, gpu=False)) == [(768, 4096)]


@pytest.mark.parametrize("gpu", ["A100", "H200", "B200"])
def test_columns_have_two_programs_for_each_sm(gpu):
    plan, sms = plan_of("column sums 4096x768"), GPUS[gpu].sms
    launch = plan.launches[0]
    grid = emit(launch.kernel, launch.sizes, sms=sms).geometry(launch.sizes).grid
    assert grid[0] >= 2 * sms


def test_gradients_of_a_layer_norms_weights_share_a_kernel():
    plan = plan_of("layer norm 1024x4096")
    assert len(plan.launches) == 3  # rows, with the loss; both sums of columns; what they end in
    assert summed(plan).count((4 * 4096, 256)) == 1
