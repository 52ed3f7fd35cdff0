"""Row kernels in C: values kept from stage to stage, and column sums that ride along."""

from __future__ import annotations

import re

import numpy as np
import pytest

from support.c_flags import optimize
from support.c_text import printed
from support.graph_texts import normalized, softmax, softmax_gradient, weight_gradients
from support.plan_checks import PlanChecks, make_inputs
from tracejit.codegen import c_loops, c_outer
from tracejit.errors import BackendUnavailable
from tracejit.ir.text import parse
from tracejit.runtime import c_compiler
from tracejit.runtime.c_executor import CExecutor
from tracejit.schedule import schedule
from tracejit.schedule.cpu import columns as cpu_columns
from tracejit.schedule.cpu import loops as cpu_loops
from tracejit.schedule.cpu.columns import fuse_columns
from tracejit.schedule.cpu.rows import keep_rows
from tracejit.schedule.cpu.unpack import unpack
from tracejit.schedule.kernel import Kernel, Load, Store
from tracejit.schedule.kernel_text import parse_kernel


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Kernels are compiled with -O1, and those of changed limits are not cached."""
    try:
        c_compiler.find_compiler()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    monkeypatch.setenv("TRACEJIT_CACHE", str(tmp_path))
    optimize(monkeypatch, "-O1")


@pytest.fixture
def executor() -> CExecutor:
    return CExecutor(2)


def kernels(text: str) -> list[Kernel]:
    """The kernels of a program, sizes as plain numbers."""
    return [launch.kernel.kernel for launch in fuse_columns(unpack(schedule(parse(text))))]


# --- kept values -------------------------------------------------------------------------------


def test_a_row_of_a_softmax_computes_each_exponential_and_quotient_once():
    text = printed(softmax_gradient(300, 1000))
    assert len(re.findall(r"= tj_expf\(", text)) == 1
    assert len(re.findall(r"const float v\d+ = v\d+ / v\d+;", text)) == 1
    assert "float row0[1000]" in text and "float row1[1000]" in text and "row2" not in text


def test_what_is_kept_is_stored_by_the_first_stage_and_loaded_by_later_ones():
    (kernel,) = kernels(softmax_gradient(300, 1000))
    changed, local = keep_rows(kernel)
    assert [b.name for b in local] == ["row0", "row1"]
    stored = [[s.buffer for s in t.body if isinstance(s, Store)] for t in changed.stages]
    loaded = [[s.buffer for s in t.body if isinstance(s, Load)] for t in changed.stages]
    assert stored == [[], ["row0"], ["b2", "row1"], ["b3"]]
    assert loaded == [["b0"], ["b0"], ["row0", "b1"], ["row1", "b1"]]


def test_cheap_values_are_computed_again():
    """A difference costs less than a store and a load."""
    mean = normalized(300, 200, "%10: f32[300] = reduce_sum(%9, axes=(1,))\n return %9, %10")
    assert not keep_rows(kernels(mean)[0])[1]


def test_rows_that_do_not_fit_are_computed_again():
    (short,) = kernels(softmax(40, 16_000, 1))
    (long,) = kernels(softmax(40, 17_000, 1))
    assert keep_rows(short)[1] and not keep_rows(long)[1]


def test_a_row_that_is_overwritten_is_kept_too(plans):
    """All loads come before its stores."""
    forward, _, _ = softmax(30, 200, 1).partition("return")
    text = forward + "write %0 <- %9\n}"
    assert len(re.findall(r"= tj_expf\(", printed(text))) == 1
    plans.both(text)


def test_what_is_loaded_after_a_store_is_another_value():
    rows = """
    kernel(b0: f32 rw) over (i0: 8) {
      stage (i1: 9) {
        v1: f32 = load b0[i0 * 9 + i1]
        v2: f32 = exp(v1)
        store b0[i0 * 9 + i1] <- v2
      }
      stage (i1: 9) {
        v3: f32 = load b0[i0 * 9 + i1]
        v4: f32 = exp(v3)
        store b0[i0 * 9 + i1] <- v4
      }
    }"""
    assert not keep_rows(parse_kernel(rows))[1]


@pytest.mark.parametrize("rows, columns", [(5, 1), (7, 33), (3, 5000), (300, 1024), (2, 17_000)])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.sweep(2)
def test_softmax_and_its_gradient(rows, columns, dtype, plans):
    plans.both(softmax_gradient(rows, columns, dtype))


def test_a_kept_row_goes_to_memory_past_the_caches(plans):
    """The streamed store takes it from there; it has no block of its own."""
    rows = c_loops.STREAMED // 4096 + 1
    text = printed(softmax_gradient(rows, 1024))
    assert "row1 + 0, " in text and "b2_block" not in text and "b3_block" in text
    plans.check(*planned(softmax_gradient(rows, 1024)))


def planned(text: str) -> tuple:
    graph = parse(text)
    return graph, schedule(graph)


# --- rides -------------------------------------------------------------------------------------


def rides(text: str) -> int:
    launches = fuse_columns(unpack(schedule(parse(text))))
    return sum(launch.kernel.columns is not None for launch in launches)


@pytest.mark.parametrize("rows, columns", [(300, 200), (257, 129), (1000, 1500), (5000, 33)])
@pytest.mark.parametrize("small", [False, True])
def test_column_sums_ride_along_with_their_rows(rows, columns, small, monkeypatch, plans):
    if small:  # many chunks, runs and blocks
        monkeypatch.setattr(cpu_columns, "GRAIN", 64)
        monkeypatch.setattr(cpu_loops, "BLOCK", 64)
        monkeypatch.setattr(c_outer, "RUN", 4)
    text = weight_gradients(rows, columns)
    assert rides(text) == 1
    plans.check(*planned(text))


def test_what_the_rows_write_may_be_read_by_what_rides(monkeypatch, plans):
    text = normalized(
        300,
        200,
        """
      %11: f32[300] = reduce_max(%9, axes=(1,))
      %12: f32[200] = reduce_sum(%9, axes=(0,))
      %13: f32[200] = mul(%12, 0.5)
      return %9, %11, %13""",
    )
    assert rides(text) == 1
    plans.check(*planned(text))


def test_maxima_and_other_dtypes_ride(plans):
    for dtype, op in (("f32", "reduce_max"), ("f64", "reduce_sum"), ("bf16", "reduce_min")):
        text = weight_gradients(300, 200).replace("f32", dtype)
        text = re.sub(r"(%1[23]: \w+\[\d+\] = )reduce_sum", rf"\1{op}", text)
        assert rides(text) == 1
        plans.check(*planned(text))


def test_a_nan_reaches_the_maximum_of_its_column(plans):
    kind = "f32[300,200]"
    text = normalized(
        300,
        200,
        f"""
      %10: {kind} = mul(%2, %9)
      %11: f32[300] = reduce_sum(%10, axes=(1,))
      %12: f32[200] = reduce_max(%10, axes=(0,))
      return %11, %12""",
    )
    assert rides(text) == 1
    graph, plan = planned(text)
    inputs = make_inputs(graph)
    inputs[2][123, 7] = np.nan
    (_, columns), _ = plans.run(plan, graph, inputs)
    assert np.flatnonzero(np.isnan(columns)).tolist() == [7]


def test_columns_that_read_another_row_do_not_ride(plans):
    """The row below is not there yet when a row is done."""
    kind = "f32[300,200]"
    text = normalized(
        300,
        200,
        f"""
      %11: f32[300] = reduce_max(%9, axes=(1,))
      %12: f32[299,200] = slice(%9, starts=(1, 0), stops=(300, 200), steps=(1, 1))
      %13: {kind} = pad(%12, low=(0, 0), high=(1, 0), interior=(0, 0), value=0)
      %14: {kind} = mul(%9, %13)
      %15: f32[200] = reduce_sum(%14, axes=(0,))
      return %9, %11, %15""",
    )
    assert rides(text) == 0
    plans.check(*planned(text))


def test_rides_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(cpu_columns, "GRAIN", 64)
    graph, plan = planned(weight_gradients(1000, 300))
    inputs, found = make_inputs(graph), []
    for threads in (1, 2, 3):
        found.append(PlanChecks(CExecutor(threads)).run(plan, graph, inputs)[0])
    for other in found[1:]:
        for ours, right in zip(other, found[0], strict=True):
            np.testing.assert_array_equal(ours, right)


def test_long_columns_are_summed_exactly(plans):
    """Runs of floats within doubles: the error does not grow with the number of rows."""
    rows, columns = 200_000, 3
    graph, plan = planned(weight_gradients(rows, columns))
    inputs = make_inputs(graph)
    inputs[2] = np.random.default_rng(0).uniform(0, 1, (rows, columns)).astype(np.float32)
    (_, _, sums), _ = plans.run(plan, graph, inputs)
    right = inputs[2].sum(axis=0, dtype=np.float64)
    assert np.all(np.abs(sums - right) <= np.spacing(right.astype(np.float32)))
