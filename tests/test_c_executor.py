"""The C executor against the evaluator and eager: every op, plans, programs, threads, its cache."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import tracejit
from examples import fused_chain, two_layer_autograd, two_layer_manual
from support.c_flags import optimize
from support.op_checks import (
    ACCUMULATING,
    EPS,
    INEXACT,
    ZERO_SIGN_OPEN,
    assert_same_numbers,
    assert_within,
    run,
    summed_magnitude,
    tensors_of,
)
from support.op_samples import SAMPLES
from support.plan_checks import Memory, PlanChecks, make_inputs, stored
from support.random_graphs import RandomProgram
from tracejit.codegen import c as c_printer
from tracejit.codegen.c_pool import POOL_SOURCE
from tracejit.errors import BackendUnavailable
from tracejit.ir.graph import Builder, Result
from tracejit.ir.ops import OPS
from tracejit.ir.text import parse
from tracejit.ir.types import DType, contiguous_strides, f64
from tracejit.runtime import c_compiler, c_kernels
from tracejit.runtime.c_executor import CExecutor, LoadedCPlan
from tracejit.schedule import schedule
from tracejit.schedule.cpu import tiles
from tracejit.schedule.cpu.lower import lower, lower_kernel
from tracejit.schedule.cpu.tiles import orient
from tracejit.schedule.cpu.unpack import unpack
from tracejit.schedule.memory import Layout, Place, layout_of
from tracejit.schedule.plan import Plan
from tracejit.testing import assert_equal_to_eager

ULPS = 2  # of functions that IEEE does not fix to the bit
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def compiler() -> tuple[str, ...]:
    try:
        return c_compiler.find_compiler()
    except BackendUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def executor() -> CExecutor:
    return CExecutor(2)


@pytest.fixture(autouse=True)
def as_users(monkeypatch):
    """Compile as users do, also in `make test`."""
    optimize(monkeypatch, "-O3")


@pytest.fixture
def quick(monkeypatch):
    optimize(monkeypatch, "-O1")


# --- every op ----------------------------------------------------------------------------------


def assert_close(name: str, dtype: DType, attrs: dict, arrays: list, ours, right) -> None:
    """As the tests of the C templates: exact but for transcendental functions and sums."""
    if name in ACCUMULATING and dtype.is_float:
        size = summed_magnitude(name, arrays, attrs)
        step = EPS["f64" if dtype is f64 else "f32"]
        # that rounds at each addition, of which samples have two at a place
        rounded = 2 * size if name == "scatter" else np.abs(right)
        assert_within(ours, right, 4 * step * size + EPS[dtype.name] * rounded)
    elif name == "scan" and dtype.is_float:  # its bodies have matmuls and functions such as tanh
        assert_within(ours, right, 8 * EPS[dtype.name] * (1 + np.abs(right)))
    elif OPS[name].family == "matrices":
        assert_within(ours, right, 256 * EPS[dtype.name] * (1 + np.max(np.abs(right))))
    elif name in INEXACT and dtype.is_float:
        step = ULPS * EPS["f64" if dtype is f64 else "f32"]
        assert_within(
            ours, right, max(step, EPS[dtype.name] * dtype.narrow) * np.abs(right) + 1e-30
        )
    else:
        assert_same_numbers(ours, right, zero_sign=name not in ZERO_SIGN_OPEN)


def pads_with_minus_zero(sample) -> bool:
    """A masked load gives +0 for it on every executor."""
    return np.signbit(sample.attrs.get("value", 0)) and sample.attrs["value"] == 0


@pytest.mark.parametrize("name", [n for n, op in OPS.items() if op.family != "host"])
@pytest.mark.sweep(8)
def test_every_op(name, quick, plans):
    """All samples of an op, a kernel each, in one unit."""
    b, inputs = Builder(), []
    samples = [s for s in SAMPLES[name] if not pads_with_minus_zero(s)]
    results = tuple(Result(sample.emit(b, name)[1]) for sample in samples)
    for sample in samples:
        inputs += tensors_of(sample, sample.build())
    graph = b.graph(name, results)
    found, _ = plans.run(schedule(graph, fuse=False), graph, inputs)
    for sample, ours, result in zip(samples, found, results, strict=True):
        arrays = sample.build()
        right = run(sample.graph(name), *tensors_of(sample, arrays))
        assert_close(name, result.value.type.dtype, sample.attrs, arrays, ours, right)


# Both sides of what each integer dtype holds, as far as the float dtypes have such numbers.
EDGES = [-1.2, -0.3, -0.0, 0.7, 255.5, 256.3, 300.0, -129.0, 4e4, 7e4, -7e4]
EDGES += [sign * size for size in (2.0**31, 3e9, 2.0**63, 1e20, math.inf) for sign in (1, -1)]
EDGES += [2.0**31 - 128, 2.0**31 + 131, -(2.0**31) - 5, 2.0**33 + 5001, 2.0**40 + 77, math.nan]
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


@pytest.mark.parametrize("backend", ["c", "numpy"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.sweep(2)
def test_casts_as_eager(dtype, backend):
    """Floats to integers and back, in one kernel: -0.3 comes back as 0, not as -0; what is out of
    range is what x86 makes of it. In vector bodies, their tails, alone, and strided."""

    def step(x):
        results = []
        for integer in INTEGERS:
            y = x.to(integer)
            results += [y, y.to(x.dtype), 1 / y.float(), y.long().double(), y.to(torch.int16)]
            results.append(torch.where(x > 0, y, x.neg().to(integer)).float())
        return results

    compiled = tracejit.compile(step, backend=backend)
    x = torch.tensor(EDGES, dtype=torch.float64).to(dtype).repeat(3)
    for given in (x, x[:1], x[:7], x[1::3], torch.stack([x, x], 1)[:, 0]):
        torch.testing.assert_close(compiled(given), step(given), rtol=0, atol=0, equal_nan=True)
    back = compiled(x[:1] * 0 - 0.3)[24 + 1]
    assert back.item() == 0 and not back.signbit()


# --- plans -------------------------------------------------------------------------------------

MATMULS = [
    (64, 100, 1000),
    (100, 10, 64),
    (1, 300, 77),
    (1, 1100, 601),
    (300, 1, 77),
    (33, 65, 2100),
    (257, 129, 130),
    (5, 48, 3),
    (70, 36, 90),
    (9, 20, 67),
    (300, 513, 600),
]


@pytest.mark.parametrize("m, n, k", MATMULS)
@pytest.mark.sweep(2)
def test_matmul_in_all_layouts(m, n, k, plans):
    a, at, b, bt = (f"f32[{x},{y}]" for x, y in ((m, k), (k, m), (k, n), (n, k)))
    plans.both(f"""
    step(%0: {a}, %1: {at}, %2: {b}, %3: {bt}, %4: f32[{m},{n}]) {{
      %5: f32[{m},{k}] = permute(%1, axes=(1,0))
      %6: f32[{k},{n}] = permute(%3, axes=(1,0))
      %7: f32[{m},{k}] = maximum(%0, 0.0)
      %8: f32[{m},{n}] = matmul(%0, %2)
      %9: f32[{m},{n}] = matmul(%5, %6)
      %10: f32[{m},{n}] = matmul(%7, %6)
      %11: f32[{m},{n}] = sub(%10, %4)
      %12: f32[{m},{n}] = mul(%11, %11)
      %13: f32[] = reduce_sum(%12, axes=(0,1))
      %14: f32[] = reduce_max(%8, axes=(0,1))
      return %8, %9, %11, %13, %14
    }}""")


@pytest.mark.parametrize("dtype", ["f64", "bf16", "f16"])
def test_matmul_in_other_dtypes(dtype, plans):
    plans.both(f"""
    step(%0: {dtype}[3,65,130], %1: {dtype}[3,130,43]) {{
      %2: {dtype}[3,65,43] = matmul(%0, %1)
      %3: {dtype}[3,65,43] = mul(%2, 0.1)
      %4: {dtype}[] = reduce_sum(%3, axes=(0,1,2))
      return %3, %4
    }}""")


@pytest.mark.parametrize("m, k, n", [(30, 64, 20), (1, 64, 20), (30, 64, 1), (300, 70, 190)])
def test_a_transposed_result_is_written_along_memory(m, k, n, quick, plans):
    """A linear layer's weight gradient and update, which are made for the transposed weight."""
    fused, _ = plans.both(f"""
    step(%0: f32[2,{k},{m}], %1: f32[2,{k},{n}], %2: f32[2,{n},{m}]) {{
      %3: f32[2,{m},{k}] = permute(%0, axes=(0,2,1))
      %4: f32[2,{m},{n}] = matmul(%3, %1)
      %5: f32[2,{n},{m}] = permute(%4, axes=(0,2,1))
      %6: f32[2,{n},{m}] = mul(%5, %5)
      %7: f32[2,{n},{m}] = sub(%2, %6)
      %8: f32[] = reduce_sum(%7, axes=(0,1,2))
      return %5, %8
      write %2 <- %7
    }}""")
    *_, rows, columns = orient(unpack(fused)[0].kernel).kernel.stages[0].axes
    assert (rows.extent, columns.extent) == ((n, m) if min(m, n) > 1 else (m, n))


@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16", "i64"])
@pytest.mark.parametrize("m, n, k", [(65, 64, 64), (130, 96, 300), (33, 65, 2100), (7, 100, 65)])
@pytest.mark.sweep(2)
def test_a_transposed_operand_is_packed_in_strips(m, n, k, dtype, plans):
    """As it lies, unless it is near, and computed on the way; a ragged last strip; slices and
    passes of k; batches."""
    a, b = (f"{dtype}[{k},{x}]" for x in (m, n))
    two = "2" if dtype == "i64" else "2.0"
    fused, _ = plans.both(f"""
    step(%0: {a}, %1: {b}, %2: {dtype}[3,{k},{m}], %8: {dtype}[3,{k},{n}]) {{
      %3: {dtype}[{m},{k}] = permute(%0, axes=(1,0))
      %4: {dtype}[{m},{n}] = matmul(%3, %1)
      %5: {dtype}[{m},{k}] = mul(%3, {two})
      %6: {dtype}[{m},{n}] = matmul(%5, %1)
      %7: {dtype}[3,{m},{k}] = permute(%2, axes=(0,2,1))
      %9: {dtype}[3,{m},{n}] = matmul(%7, %8)
      return %4, %6, %9
    }}""")
    kernels = (lower_kernel(launch.kernel, 32) for launch in unpack(fused))
    found = [kernel.tiling.a for kernel in kernels if kernel.tiling is not None]
    near = k <= tiles.NEAR_DEPTH and dtype != "bf16"
    as_it_lies = "direct" if near else "strips"
    assert found == [as_it_lies, "strips", as_it_lies]


@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16"])
@pytest.mark.parametrize("m, n, k", [(123, 37, 2100), (37, 123, 2100), (70, 9, 5000)])
@pytest.mark.sweep(3)
def test_a_small_gradient_of_many_rows_packs_the_narrower_operand(m, n, k, dtype, plans):
    """Its parts along k are dealt to threads. Its update goes along memory all the same."""
    fused, _ = plans.both(f"""
    step(%0: {dtype}[{k},{m}], %1: {dtype}[{k},{n}], %2: {dtype}[{m},{n}]) {{
      %3: {dtype}[{m},{k}] = permute(%0, axes=(1,0))
      %4: {dtype}[{m},{n}] = matmul(%3, %1)
      %5: {dtype}[{m},{n}] = mul(%4, 0.1)
      %6: {dtype}[{m},{n}] = sub(%2, %5)
      %7: {dtype}[] = reduce_sum(%6, axes=(0, 1))
      return %4, %7
      write %2 <- %6
    }}""")
    kernel = lower_kernel(unpack(fused)[0].kernel, 32)
    *_, rows, columns = kernel.kernel.stages[0].axes
    assert kernel.tiling.way == "slices" and rows.extent <= columns.extent


@pytest.mark.parametrize("kept", [False, True])
def test_operands_with_gaps_of_zeros_are_packed_in_runs(kept, plans):
    """Every second element of a remainder of k, to whose ends no bound says anything: the gradient
    of what was read by `x[:, ::2]`; loaded, or a constant where it is."""
    value = "%1" if kept else "%9"
    fused, _ = plans.both(f"""
    step(%0: f32[3,49], %1: f32[7,4,5]) {{
      %9: f32[7,4,5] = full(1.5, shape=(7, 4, 5), dtype=f32, device='cpu')
      %2: f32[7,7,5] = pad({value}, low=(0,0,0), high=(0,0,0), interior=(0,1,0), value=0.0)
      %3: f32[49,5] = reshape(%2, shape=(49, 5))
      %4: f32[3,5] = matmul(%0, %3)
      return %4
    }}""")
    assert any("step 2" in str(launch.kernel) for launch in unpack(fused))


@pytest.mark.parametrize("m, n, k", [(70, 70, 1024), (50, 512, 130), (130, 1024, 1024)])
def test_rows_that_would_collide_are_packed(m, n, k, plans):
    plans.both(f"""
    step(%0: f32[{m},{k}], %1: f32[{k},{n}]) {{
      %2: f32[{m},{n}] = matmul(%0, %1)
      %3: f32[{m},{k}] = maximum(%0, 0.0)
      %4: f32[{m},{n}] = matmul(%3, %1)
      return %2, %4
    }}""")


@pytest.mark.parametrize("axes", ["(0,)", "(1,)", "(0, 1)"])
def test_products_of_operands_that_are_read_backwards(plans, axes):
    graph = parse(
        "step(%0: f32[7,1], %1: f32[1,3], %2: f32[7,5], %3: f32[5,3]) {\n"
        f"%4: f32[7,1] = flip(%0, axes={axes})\n%5: f32[7,3] = matmul(%4, %1)\n"
        f"%6: f32[7,5] = flip(%2, axes={axes})\n%7: f32[7,3] = matmul(%6, %3)\n"
        "return %5, %7\n}"
    )
    plans.check(graph, schedule(graph))


def test_batches_in_rounds(monkeypatch, plans):
    monkeypatch.setattr(tiles, "SCRATCH", 20_000)
    plans.both("""
    step(%0: f32[7,33,20], %1: f32[7,17,20]) {
      %2: f32[7,20,17] = permute(%1, axes=(0,2,1))
      %3: f32[7,33,17] = matmul(%0, %2)
      %4: f32[] = reduce_sum(%3, axes=(0,1,2))
      return %3, %4
    }""")


SOFTMAX = """
step(%0: f32[{m},{n}]) {{
  %1: f32[{kept}] = reduce_max(%0, axes=({axis},))
  %2: f32[{one}] = reshape(%1, shape=({one},))
  %3: f32[{m},{n}] = expand(%2, shape=({m},{n}))
  %4: f32[{m},{n}] = sub(%0, %3)
  %5: f32[{m},{n}] = exp(%4)
  %6: f32[{kept}] = reduce_sum(%5, axes=({axis},))
  %7: f32[{one}] = reshape(%6, shape=({one},))
  %8: f32[{m},{n}] = expand(%7, shape=({m},{n}))
  %9: f32[{m},{n}] = div(%5, %8)
  return %9
}}"""


@pytest.mark.parametrize("m, n", [(5, 7), (300, 1001), (1001, 300), (3, 5000), (5000, 3)])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.sweep(2)
def test_softmax_by_rows_and_columns(m, n, axis, plans):
    kept, one = (n, f"1,{n}") if axis == 0 else (m, f"{m},1")
    plans.both(SOFTMAX.format(m=m, n=n, axis=axis, kept=kept, one=one))


@pytest.mark.parametrize("shape, kept", [("50", "1"), ("50,60", "1,60")])
def test_a_reduced_value_decides_what_is_read(shape, kept, quick, plans):
    """Its later stage has no other use for it than as an index."""
    short = kept.partition(",")[2]
    plans.both(f"""
    step(%0: i64[{shape}], %1: f32[{shape}]) {{
      %2: i64[{short}] = reduce_max(%0, axes=(0,))
      %3: i64[{kept}] = reshape(%2, shape=({kept},))
      %4: i64[{shape}] = expand(%3, shape=({shape},))
      %5: f32[{shape}] = gather(%1, %4, axis=0)
      %6: f32[{shape}] = mul(%5, 2.0)
      return %2, %6
    }}""")


def test_full_reduction_is_as_accurate_as_torch(plans):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).uniform(0, 1, 3_000_001).astype(np.float32)
    graph = parse(
        f"step(%0: f32[{x.size}]) {{\n%1: f32[] = reduce_sum(%0, axes=(0,))\nreturn %1\n}}"
    )
    (ours,), _ = plans.run(schedule(graph), graph, [x])
    right = np.sum(x, dtype=np.float64)
    theirs = abs(float(torch.from_numpy(x).sum()) - right)
    assert abs(float(ours) - right) <= max(theirs, np.spacing(np.float32(right)))


@pytest.mark.parametrize("block", range(4))
@pytest.mark.sweep(4)
def test_random_programs(block, quick, plans):
    for seed in range(block * 10, block * 10 + 10):
        graph = RandomProgram(seed).graph()
        try:
            for fuse in (True, False):
                plans.check(graph, schedule(graph, fuse=fuse), seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}:\n{graph}") from error


# --- programs ----------------------------------------------------------------------------------

STEPS = {
    "manual": two_layer_manual.make_step,
    **{v: (lambda v=v: two_layer_autograd.make_step(v)) for v in two_layer_autograd.UPDATES},
    "grad": lambda: two_layer_autograd.make_step("grad"),
    "chain": lambda: fused_chain.make_step(100_003),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.sweep(2)
def test_programs_equal_eager(name):
    step, _ = STEPS[name]()
    compiled = assert_equal_to_eager(step, calls=6, backend="c")
    assert compiled.explain_mode().startswith("replay")


# --- threads -----------------------------------------------------------------------------------

WORK = """
step(%0: f32[300,1001], %1: f32[1001,64]) {
  %2: f32[300,1001] = exp(%0)
  %3: f32[] = reduce_sum(%2, axes=(0,1))
  %4: f32[1001] = reduce_sum(%2, axes=(0,))
  %5: f32[300,64] = matmul(%2, %1)
  return %2, %3, %4, %5
}"""


def results_on(threads: int) -> list[np.ndarray]:
    graph = parse(WORK)
    return PlanChecks(CExecutor(threads)).run(schedule(graph), graph, make_inputs(graph))[0]


def test_results_do_not_depend_on_the_number_of_threads():
    first = results_on(1)
    for threads in (1, 2, 3, 3):
        for ours, right in zip(results_on(threads), first, strict=True):
            np.testing.assert_array_equal(ours, right)


SCATTERED = """
step(%0: {0}[{2}], %1: i64[{1}], %2: {0}[{1}]) {{
  %3: {0}[{2}] = scatter(%0, %1, %2, axis=0, combine='{3}')
  return %3
}}"""


@pytest.mark.parametrize("combine", ["add", "max", "min", "mul"])
@pytest.mark.parametrize("dtype", ["f32", "f64", "i64", "i8"])
@pytest.mark.parametrize(("indices", "places"), [(65536, 5), (70001, 9), (1 << 18, 30000)])
@pytest.mark.sweep(1)
def test_parts_of_indices_do_not_depend_on_threads(combine, dtype, indices, places):
    """Many indices for few places are dealt to threads; the parts are combined in their order."""
    graph = parse(SCATTERED.format(dtype, indices, places, combine))
    (kernel,) = lower(schedule(graph), 32).kernels.values()
    assert kernel.partials
    rng = np.random.default_rng(0)
    x, values = (rng.uniform(0.5, 1.5, n) for n in (places, indices))
    if combine == "mul":
        values = values**0.01
    if dtype[0] == "i":
        x, values = np.round(x * 9), np.round(values * 9)
    kind = graph.params[0].value.type.dtype.compute
    inputs = [x.astype(kind), rng.integers(0, places, indices), values.astype(kind)]
    results = [
        PlanChecks(CExecutor(n)).run(schedule(graph), graph, inputs)[0][0] for n in (1, 2, 3)
    ]
    right = inputs[0].astype(np.float64 if dtype[0] == "f" else kind)
    of = {"add": np.add, "max": np.maximum, "min": np.minimum, "mul": np.multiply}[combine]
    of.at(right, inputs[1], inputs[2])
    np.testing.assert_allclose(results[0], right, rtol=2e-5 if dtype == "f32" else 1e-11)
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


def test_parts_of_indices_keep_negative_zeros_and_nan():
    """Places that no index names stay as they are; a NaN stays where it is."""
    graph = parse(SCATTERED.format("f32", 65536, 3, "add"))
    x = np.array([-0.0, -0.0, 1.0], np.float32)
    index = np.full(65536, 2)
    index[7], values = 1, np.zeros(65536, np.float32)
    values[7], values[9] = -0.0, np.nan
    found = PlanChecks(CExecutor(2)).run(schedule(graph), graph, [x, index, values])[0][0]
    assert np.signbit(found[:2]).all() and np.isnan(found[2])


def in_child(action) -> int:
    """The exit status of a forked child that runs the action, within 30 seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python 3.12 and later: forking with threads
        child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_forked_child_has_a_pool_of_its_own():
    first = results_on(3)

    def again() -> None:
        for _ in range(3):
            for ours, right in zip(results_on(3), first, strict=True):
                np.testing.assert_array_equal(ours, right)

    assert in_child(again) == 0
    assert in_child(lambda: in_child(again) == 0 or os._exit(1)) == 0
    again()


RACES = """
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
enum { N = 1 << 14 };
struct job { double in[N], out[N], sums[128]; int64_t chunks; };
static void square(void *arguments, int64_t chunk) {
  struct job *job = arguments;
  double sum = 0;
  for (int64_t i = chunk * N / job->chunks; i < (chunk + 1) * N / job->chunks; i++)
    sum += job->out[i] = job->in[i] * job->in[i];
  job->sums[chunk] = sum;
}
static void *caller(void *unused) {
  (void)unused;
  struct job *job = calloc(1, sizeof *job);
  for (int round = 0; round < 1500; round++) {
    job->chunks = 1 + round % 100;
    for (int i = 0; i < N; i += 97) job->in[i] = round % 7;
    if (round % 100 == 0) usleep(2000); /* the workers sleep */
    if (round % 50 == 0) tj_pool_wake();
    tj_pool_launch(square, job, job->chunks, 1 + round % 4);
    double sum = 0;
    for (int i = 0; i < job->chunks; i++) sum += job->sums[i];
    double right = (double)(round % 7) * (round % 7) * ((N + 96) / 97);
    if (sum != right) { printf("sum %g is not %g\\n", sum, right); exit(1); }
  }
  free(job);
  return 0;
}
int main(void) {
  pthread_t second;
  pthread_create(&second, 0, caller, 0);
  caller(0);
  pthread_join(second, 0);
  puts("fine");
  return 0;
}
"""


def test_the_pool_has_no_races(tmp_path, compiler):
    """Jobs from two threads at once under ThreadSanitizer."""
    (tmp_path / "races.c").write_text(POOL_SOURCE + RACES)
    line = [*compiler, "-O1", "-g", "-fsanitize=thread", "-pthread", "races.c", "-o", "races"]
    if subprocess.run(line, cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("the C compiler has no ThreadSanitizer")
    found = subprocess.run(["./races"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    if "unexpected memory mapping" in found.stderr:
        pytest.skip("ThreadSanitizer does not run with this kernel's address layout")
    assert found.returncode == 0 and found.stdout == "fine\n", found.stderr[:3000]


# --- compiler and cache ------------------------------------------------------------------------

SMALL = "step(%0: f32[5]) {\n%1: f32[5] = add(%0, 1.0)\nreturn %1\n}"


@pytest.fixture
def compiled(monkeypatch, tmp_path) -> list[str]:
    """Sources handed to the compiler, with a cache folder of the test's own."""
    monkeypatch.setenv("TRACEJIT_CACHE", str(tmp_path / "cache"))
    CExecutor(1).load(schedule(parse(SMALL)))  # the pool, which stays loaded
    for entry in entries(tmp_path):
        entry.unlink()
    sources: list[str] = []
    original = c_compiler.compile_c

    def counted(command, source, *flags):
        sources.append(source)
        return original(command, source, *flags)

    monkeypatch.setattr(c_compiler, "compile_c", counted)
    return sources


def entries(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "c").glob("*"))


def check_small() -> None:
    graph = parse(SMALL)
    PlanChecks(CExecutor(2)).check(graph, schedule(graph))


def test_kernels_that_do_the_same_are_compiled_once(compiled, plans):
    rows = [f"%{i + 4}: f32[7] = exp(%{i})" for i in range(4)]
    graph = parse(
        "step(%0: f32[7], %1: f32[7], %2: f32[7], %3: f32[7]) {\n"
        + "\n".join(rows)
        + "\nreturn %4, %5, %6, %7\n}"
    )
    plan = schedule(graph, fuse=False)
    assert len(plan.launches) == 4
    plans.check(graph, plan)
    (source,) = compiled
    assert source.count("void kernel") == 1
    both = parse("step(%0: f32[7]) {\n%1: f32[7] = exp(%0)\n%2: f32[7] = sin(%1)\nreturn %1, %2\n}")
    plans.check(both, schedule(both, fuse=False))
    assert len(compiled) == 2 and "tj_sinf(" in compiled[1] and "tj_expf(" not in compiled[1]


def test_many_kernels_are_compiled_side_by_side(compiled, monkeypatch, plans):
    monkeypatch.setattr(c_kernels, "WORTH_A_UNIT", 500)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3))
    graph = parse(WORK)
    plans.check(graph, schedule(graph, fuse=False))
    assert len(compiled) == 3
    kernels = [text.partition("#define TJ_TASK")[2] for text in compiled]
    largest, smallest = max(kernels, key=len), min(kernels, key=len)  # a kernel is not cut
    assert largest.count("void kernel") == 1 or len(largest) < 3 * len(smallest)
    plans.check(graph, schedule(graph, fuse=False))
    assert len(compiled) == 3


def test_a_warm_start_prints_no_kernel(compiled, monkeypatch):
    check_small()
    monkeypatch.setattr(c_printer, "emit_kernel", None)
    check_small()
    assert len(compiled) == 1


def test_a_plan_is_compiled_once(compiled, tmp_path):
    check_small()
    check_small()
    assert len(compiled) == 1
    (entry,) = entries(tmp_path)
    assert entry.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_a_damaged_library_is_rebuilt(compiled, tmp_path, damage):
    check_small()
    (entry,) = entries(tmp_path)
    body = bytearray(entry.read_bytes())
    if damage == "flip":
        body[-100] ^= 1
    entry.write_bytes(
        {"cut": body[:-50], "empty": b"", "other": b"\x7fELF" + bytes(body)}.get(
            damage, bytes(body)
        )
    )
    check_small()
    check_small()
    assert len(compiled) == 2


def test_a_library_of_another_compiler_is_not_used(compiled, monkeypatch):
    check_small()
    monkeypatch.setattr(c_compiler, "version", lambda command: "another 1.0")
    check_small()
    assert len(compiled) == 2


def test_what_others_may_write_is_not_loaded(compiled, tmp_path):
    check_small()
    (entry,) = entries(tmp_path)
    entry.chmod(0o666)
    with pytest.warns(RuntimeWarning, match="others? users? own or may write"):
        check_small()
    assert len(compiled) == 2


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(BackendUnavailable, match="no C compiler"):
        CExecutor()


def test_a_compiler_that_fails(monkeypatch, compiled):
    monkeypatch.setenv("CC", shutil.which("false"))
    with pytest.raises(BackendUnavailable, match="does not run"):
        CExecutor()


def test_the_compiler_asked_for_is_taken(monkeypatch, compiler):
    monkeypatch.setenv("CC", f"{compiler[0]} -DASKED")
    assert c_compiler.find_compiler() == (compiler[0], "-DASKED")


# --- sanitizers --------------------------------------------------------------------------------

SANITIZED = (
    WORK,
    SMALL,
    SOFTMAX.format(m=33, n=1030, axis=1, kept=33, one="33,1"),
    SOFTMAX.format(m=40, n=300, axis=0, kept=300, one="1,300"),
    """
    step(%0: f32[64,1000], %1: f32[1000,100], %2: bf16[33,7], %3: f16[33,7], %4: i64[9]) {
      %5: f32[64,100] = matmul(%0, %1)
      %6: f32[] = reduce_sum(%5, axes=(0,1))
      %7: f32[33,7] = cast(%2, dtype=f32)
      %8: f32[33,7] = cast(%3, dtype=f32)
      %9: f32[33,7] = sin(%7)
      %10: f32[33,7] = pow(%8, %9)
      %11: f32[36,15] = pad(%10, low=(1,2), high=(2,0), interior=(0,1), value=1.5)
      %12: f16[36,15] = cast(%11, dtype=f16)
      %13: i64[9] = shl(%4, 62)
      %14: i64[9] = mul(%13, %4)
      return %5, %6, %12, %14
    }""",
    """
    step(%0: f32[2,9,7,6], %1: f32[11,9,3,3], %2: f32[2,11,4,6]) {
      %3: f32[2,9,9,8] = pad(%0, low=(0,0,1,1), high=(0,0,1,1), interior=(0,0,0,0), value=0)
      %4: f32[2,9,9,8,1,1] = reshape(%3, shape=(2,9,9,8,1,1))
      %5: f32[2,9,9,8,3,3] = expand(%4, shape=(2,9,9,8,3,3))
      %6: f32[2,9,4,8,3,3] = window(%5, axes=(2,4), stride=2, dilation=1, count=4)
      %7: f32[2,9,4,6,3,3] = window(%6, axes=(3,5), stride=1, dilation=1, count=6)
      %8: f32[9,3,3,2,4,6] = permute(%7, axes=(1,4,5,0,2,3))
      %9: f32[11,81] = reshape(%1, shape=(11,81))
      %10: f32[81,48] = reshape(%8, shape=(81,48))
      %11: f32[11,48] = matmul(%9, %10)
      %12: f32[11,2,4,6] = permute(%2, axes=(1,0,2,3))
      %13: f32[11,48] = reshape(%12, shape=(11,48))
      %14: f32[48,81] = permute(%10, axes=(1,0))
      %15: f32[11,81] = matmul(%13, %14)
      return %11, %15
    }""",
)


def exact_memory(buffer) -> Memory:
    """Memory of a buffer without a byte to spare, so that any access outside is noticed."""
    shape = buffer.type.shape
    strides = buffer.strides or contiguous_strides(shape)
    dtype = stored(buffer.type.dtype)
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if 0 not in shape else -1
    raw = np.empty((last + 1) * dtype.itemsize, np.uint8)
    view = np.ndarray(shape, dtype, raw.data, 0, tuple(s * dtype.itemsize for s in strides))
    return Memory(raw, view, 0, raw.nbytes)


def apart(loaded: LoadedCPlan, plan: Plan) -> Layout:
    """Nothing lies in an output: the plan's own arena, and behind it what each kernel works in."""
    own = layout_of(plan)
    places, end = dict(own.places), own.arena_bytes
    for i, (_, nbytes) in enumerate(loaded.plan.working, len(plan.buffers)):
        places[i] = Place(None, end)
        end += -(-nbytes // 64) * 64
    return Layout(places, own.count + len(loaded.plan.working), end)


def run_sanitized() -> None:
    """What the process under the sanitizers runs."""
    plans = PlanChecks(CExecutor(3), exact_memory, apart)
    flags = (*c_compiler.FLAGS, "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    c_compiler.FLAGS = flags
    for text in SANITIZED:
        graph = parse(text)
        for fuse in (True, False):
            plans.check(graph, schedule(graph, fuse=fuse))
    print("sanitized")


@pytest.mark.slow
def test_no_access_outside_and_no_undefined_behaviour(compiler):
    line = [*compiler, "-print-file-name=libasan.so"]
    library = subprocess.run(line, capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(library):
        pytest.skip("the C compiler has no AddressSanitizer")
    environment = os.environ | {
        "LD_PRELOAD": os.path.realpath(library),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }
    program = "import test_c_executor; test_c_executor.run_sanitized()"
    found = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.stdout.endswith("sanitized\n"), (found.stdout + found.stderr)[-4000:]
