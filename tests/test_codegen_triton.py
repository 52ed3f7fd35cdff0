"""Generated Triton as text, and compiled ahead of time for sm_80, sm_90 and sm_100."""

import os
import subprocess
import sys
from collections import OrderedDict

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, so it needs a process without the interpreter", allow_module_level=True)

import torch

from support.graph_texts import SIDE_BY_SIDE, convolution
from support.machine_code import each_target, facts, mostly_90, only_launch
from tracejit.aot import check_limits
from tracejit.codegen.geometry import MAX_PROGRAMS
from tracejit.codegen.triton import emit
from tracejit.errors import BackendUnavailable, InvalidGraph
from tracejit.ir.ops import OPS
from tracejit.ir.text import parse
from tracejit.ir.types import f32, f64
from tracejit.passes import dce
from tracejit.runtime import triton_executor
from tracejit.runtime.select import executor_for
from tracejit.runtime.triton_executor import TritonExecutor
from tracejit.schedule import schedule
from tracejit.schedule.kernel import (
    Axis,
    Buffer,
    Compute,
    Index,
    Kernel,
    Load,
    Reduce,
    Stage,
    Store,
    Var,
)
from tracejit.schedule.kernel_text import parse_kernel

AXPY = """
f(%0: f32[{n}], %1: f32[{n}], %2: f64[]@host) {{
  %3: f32[{n}] = mul(%0, %2)                     # model.py:7
  %4: f32[{n}] = add(%3, %1)                     # model.py:7
  return %4
}}"""

FUSION = """
f(%0: f32[{n}], %1: f32[{n}]) {{
  %2: f32[{n}] = maximum(%0, 0.0)                # model.py:1
  %3: f32[{n}] = sub(%2, %1)                     # model.py:2
  %4: f32[{n}] = mul(%3, %3)                     # model.py:3
  %5: f32[] = reduce_sum(%4, axes=(0,))          # model.py:4
  %6: f32[{n}] = mul(%3, 2.0)                    # model.py:5
  %7: b1[{n}] = gt(%0, 0.0)                      # model.py:5
  %8: f32[{n}] = where(%7, %6, 0.0)              # model.py:5
  return %5, %8
}}"""

SOFTMAX = """
f(%0: f32[{r},{c}]) {{
  %1: f32[{kept}] = reduce_max(%0, axes=({axis},))
  %2: f32[{wide}] = reshape(%1, shape=({wide}))
  %3: f32[{r},{c}] = expand(%2, shape=({r}, {c}))
  %4: f32[{r},{c}] = sub(%0, %3)
  %5: f32[{r},{c}] = exp(%4)
  %6: f32[{kept}] = reduce_sum(%5, axes=({axis},))
  %7: f32[{wide}] = reshape(%6, shape=({wide}))
  %8: f32[{r},{c}] = expand(%7, shape=({r}, {c}))
  %9: f32[{r},{c}] = div(%5, %8)
  return %9
}}"""

UPDATE = """
f(%0: {t}[{k},{m}], %1: {t}[{k},{n}], %2: {t}[{m},{n}], %3: f64[]@host) {{
  %4: {t}[{m},{k}] = permute(%0, axes=(1, 0))
  %5: {t}[{m},{n}] = matmul(%4, %1)
  %6: {t}[{m},{n}] = mul(%5, %3)
  %7: {t}[{m},{n}] = sub(%2, %6)
  %8: {t}[{m},{n}] = mul(%7, %7)
  %9: {t}[] = reduce_sum(%8, axes=(0, 1))
  return %9
  write %2 <- %7
}}"""


def softmax(r, c, axis=1):
    kept, wide = (r, f"{r},1") if axis == 1 else (c, f"1,{c}")
    return SOFTMAX.format(r=r, c=c, axis=axis, kept=kept, wide=wide)


# --- text -------------------------------------------------------------------------------------


def test_pointwise_text():
    launch = only_launch(AXPY.format(n=123))
    source = emit(launch.kernel, launch.sizes)
    assert (
        source.text
        == f'''\
import triton
import triton.language as tl


@triton.jit
def {source.name}(b0, b1, b2, scalars, n0: tl.constexpr, BLOCK: tl.constexpr):
    """Element-wise over (i0: n0). Reads b0, b1. Writes b2."""
    s0 = tl.load(scalars).to(tl.float32)
    i0 = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_x = i0 < n0
    v0 = tl.load(b0 + i0, mask=in_x)
    v3 = v0 * s0                      # model.py:7
    v1 = tl.load(b1 + i0, mask=in_x)
    v4 = v3 + v1                      # model.py:7
    tl.store(b2 + i0, v4, mask=in_x)  # model.py:7
'''
    )


@pytest.mark.parametrize(
    "text, form",
    [
        (AXPY.format(n=123), "pointwise"),
        (FUSION.format(n=123), "reduce"),
        (softmax(5, 123), "rows"),
        (UPDATE.format(t="f32", m=5, n=7, k=3), "matmul"),
    ],
)
def test_source_is_a_function_of_the_kernel(text, form):
    launch = only_launch(text)
    source = emit(launch.kernel, launch.sizes)
    again = emit(parse_kernel(str(launch.kernel)), launch.sizes)
    assert (again.name, again.text) == (source.name, source.text)
    assert emit(launch.kernel).text == source.text
    prefix, _, digest = source.name.rpartition("_")
    assert prefix == form and len(digest) == 8 and int(digest, 16) >= 0
    assert f"def {source.name}(" in source.text
    compile(source.text, source.name, "exec")


@pytest.mark.slow
def test_source_is_the_same_in_another_process():
    launch = only_launch(UPDATE.format(t="f32", m=5, n=7, k=3))
    script = (
        "import sys\n"
        "from tracejit.codegen.triton import emit\n"
        "from tracejit.schedule.kernel_text import parse_kernel\n"
        "sys.stdout.write(emit(parse_kernel(sys.stdin.read())).text)\n"
    )
    command = [sys.executable, "-c", script]
    found = subprocess.run(
        command, input=str(launch.kernel), capture_output=True, text=True, check=True
    )
    assert found.stdout == emit(launch.kernel, launch.sizes).text


def test_sizes_are_not_in_the_text():
    few, many = only_launch(FUSION.format(n=777)), only_launch(FUSION.format(n=4_000_000))
    assert emit(few.kernel, few.sizes).text == emit(many.kernel, many.sizes).text
    assert "777" not in emit(few.kernel, few.sizes).text


def test_each_row_is_read_once_where_it_fits_a_tile_else_twice():
    small, large = only_launch(softmax(64, 1000)), only_launch(softmax(64, 100_000))
    assert emit(small.kernel, small.sizes).text.count("tl.load(") == 1
    assert emit(small.kernel, small.sizes).text.count("tj.exp(") == 1
    looped = emit(large.kernel, large.sizes)
    assert looped.name.startswith("rows_looped_")
    assert looped.text.count("tl.load(") == 2 and looped.text.count("for start in range(") == 2


def test_precision_is_passed_to_the_contraction():
    launch = only_launch(UPDATE.format(t="f32", m=5, n=7, k=3))
    for precision in ("ieee", "tf32", "tf32x3"):
        assert f'"{precision}"' in emit(launch.kernel, launch.sizes, precision=precision).text


def pointwise_kernel(dtype, *computes):
    """b1 = computes(b0), element-wise."""
    at = Index((("i0", 1),))
    body = (Load(Var(0, dtype), "b0", at), *computes, Store("b1", at, computes[-1].out))
    buffers = (Buffer("b0", dtype, "r"), Buffer("b1", dtype, "w"))
    return Kernel(buffers, ("n0",), (), (Axis("i0", "n0"),), (Stage((), body),))


@pytest.mark.parametrize(
    "dtype, op, operands, printed",
    [
        (f32, "mul", (Var(0, f32), 0.1), "v0 * 0.1"),
        (f64, "mul", (Var(0, f64), 0.1), "v0 * 0.1"),
        (f32, "maximum", (Var(0, f32), 0.1), "tj.maximum(v0, 0.1)"),
        (f32, "maximum", (Var(0, f32), 1e-40), "tj.maximum(v0, tl.full((), 1e-40, tl.float32))"),
        (f64, "maximum", (Var(0, f64), 0.1), "tj.maximum(v0, tl.full((), 0.1, tl.float64))"),
        (f32, "div", (1, Var(0, f32)), "tj.div(tl.full((), 1.0, tl.float32), v0)"),
        (f32, "add", (Var(0, f32), float("-inf")), 'v0 + float("-inf")'),
        (f32, "mul", (Var(0, f32), -0.0), "v0 * (-1.0 * tl.full((), 0.0, tl.float32))"),
    ],
)
def test_literals(dtype, op, operands, printed):
    kernel = pointwise_kernel(dtype, Compute(Var(1, dtype), OPS[op], operands))
    assert f"    v1 = {printed}\n" in emit(kernel).text


def test_64_bit_indices():
    kernel = pointwise_kernel(f32, Compute(Var(1, f32), OPS["exp"], (Var(0, f32),)))
    wide = Kernel(kernel.buffers, kernel.sizes, (), kernel.axes, kernel.stages, index64=True)
    assert "tl.program_id(0).to(tl.int64) * BLOCK" in emit(wide).text
    assert "int64" not in emit(kernel).text


def test_malformed_kernels_are_refused():
    reduce = Reduce(Var(2, f32), OPS["reduce_sum"], Var(0, f32))
    good = pointwise_kernel(f32, Compute(Var(1, f32), OPS["exp"], (Var(0, f32),)))
    stage = Stage((), (*good.stages[0].body, reduce))
    with pytest.raises(InvalidGraph, match="reduction needs a stage with axes"):
        emit(Kernel(good.buffers, good.sizes, (), good.axes, (stage,)))
    undefined = pointwise_kernel(f32, Compute(Var(1, f32), OPS["exp"], (Var(9, f32),)))
    with pytest.raises(InvalidGraph, match="v9 is read where it is not defined"):
        emit(undefined)


def test_grid_of_a_reduction_is_bounded():
    launch = only_launch(FUSION.format(n=123_456_789))
    shape = emit(launch.kernel, launch.sizes).geometry(launch.sizes)
    covered = shape.grid[0] * shape.constants["BLOCK"] * shape.constants["STEPS"]
    assert shape.grid[0] <= MAX_PROGRAMS and covered >= 123_456_789


def test_backends_that_cannot_run_say_so(monkeypatch):

    plan = schedule(parse(AXPY.format(n=5)))
    with pytest.raises(BackendUnavailable, match="TRITON_INTERPRET"):
        TritonExecutor("interpret").load(plan)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailable, match="no CUDA device"):
        executor_for("triton", "cuda").load(plan)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(BackendUnavailable, match="AMD's GPUs"):
        executor_for("triton", "cuda").load(plan)


# --- machine code -----------------------------------------------------------------------------


@each_target
def test_contiguous_pointwise_moves_128_bits(target):
    form, found = facts(AXPY.format(n=4_000_000), target)
    check_limits(found)
    assert form == "pointwise"
    assert found.loads == {64: 1, 128: 4} and found.stores == {128: 2}  # 64: the scalar


@each_target
@pytest.mark.sweep(1)
def test_fusion_showcase_streams_128_bits(target):
    form, found = facts(FUSION.format(n=4_000_000), target)
    check_limits(found)
    assert form == "reduce"
    assert found.loads[128] == 4 and found.stores[128] == 2 and found.atomics == 1


@mostly_90
@pytest.mark.parametrize(
    ("text", "form", "loads"), [(AXPY, "pointwise", 4), (FUSION, "reduce", 4)], ids=["axpy", "sum"]
)
@pytest.mark.sweep(1)
def test_odd_sizes_move_128_bits_but_at_the_end(text, form, loads, target):
    form_found, found = facts(text.format(n=1_000_001), target)
    assert form_found == f"{form}_ragged" and found.spills == 0
    assert (found.loads[128], found.stores[128]) == (loads, 2)  # 1024 elements, 128 threads
    assert facts(text.format(n=1_000_000), target)[0] == form


@mostly_90
@pytest.mark.parametrize("shape", [(4096, 1000), (4096, 8192), (64, 100_000)])
@pytest.mark.sweep(1)
def test_rows_move_128_bits(shape, target):
    _, found = facts(softmax(*shape), target)
    check_limits(found, want_wide=1.0)


@mostly_90
@pytest.mark.parametrize("shape", [(128, 4096), (4096, 4096)])
@pytest.mark.sweep(1)
def test_columns_move_128_bits(shape, target):
    _, found = facts(softmax(*shape, axis=0), target)
    check_limits(found, want_wide=1.0)


@mostly_90
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
@pytest.mark.sweep(1)
def test_matmul_with_update_and_reduction(dtype, target):
    form, found = facts(UPDATE.format(t=dtype, m=1000, n=100, k=64), target)
    check_limits(found)
    assert form.startswith("matmul") and found.atomics == 1


@mostly_90
@pytest.mark.parametrize(
    "text", [AXPY.format(n=4_000_000), UPDATE.format(t="bf16", m=1000, n=100, k=64)]
)
@pytest.mark.sweep(1)
def test_addresses_in_memory_cost_a_load_each(text, target):
    """As kernels of CUDA graphs have them: what they are used for is as wide as ever."""
    _, plain = facts(text, target)
    _, found = facts(text, target, in_memory=True)
    check_limits(found)
    buffers = len(only_launch(text).kernel.buffers)
    assert found.stores == plain.stores and found.loads[128] == plain.loads[128]
    assert sum(found.loads.values()) - sum(plain.loads.values()) <= buffers
    assert (found.wgmma, found.mma, found.ffma) == (plain.wgmma, plain.mma, plain.ffma)


@mostly_90
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_convolution_is_a_matmul_without_spills(dtype, target):
    form, found = facts(convolution(dtype, o=64), target)
    check_limits(found)
    assert form.startswith("matmul") and found.spills == 0
    assert (found.ffma > 50) == (dtype == "f32") and (found.mma + found.wgmma > 0) == (
        dtype == "bf16"
    )


@pytest.mark.parametrize("precision, wgmma", [("ieee", False), ("tf32", True)])
@pytest.mark.sweep(1)
def test_large_matmul_on_tensor_cores(precision, wgmma):
    _, found = facts(UPDATE.format(t="f32", m=4096, n=4096, k=1024), 90, precision)
    check_limits(found, want_wgmma=wgmma)
    assert (found.ffma > 1000) == (precision == "ieee")


BIAS = """
f(%0: bf16[512,2048], %1: bf16[512,2048], %2: bf16[2048]) {{
  %3: bf16[2048,512] = permute(%0, axes=(1, 0))
  %4: bf16[2048,2048] = matmul(%3, %1)
  {bias}
  return %4
}}"""
COLUMN_SUM = """%5: bf16[2048] = reduce_sum(%1, axes=(0,))
  %6: bf16[2048] = add(%2, %5)"""


@mostly_90
@pytest.mark.slow
def test_company_costs_a_matmul_nothing(target):
    form, alone = facts(BIAS.format(bias=""), target)
    assert form.startswith("matmul")
    form, together = facts(BIAS.format(bias=COLUMN_SUM).replace("return", "return %6,"), target)
    assert form == "joint" and together.spills == alone.spills == 0
    assert (together.shared_bytes, together.tensor_memory) == (
        alone.shared_bytes,
        alone.tensor_memory,
    )
    assert (together.wgmma, together.mma) == (alone.wgmma, alone.mma)
    assert together.registers <= alone.registers + 16  # one CTA a multiprocessor either way


@each_target
@pytest.mark.sweep(1)
def test_kernels_of_every_form_side_by_side(target):
    form, found = facts(SIDE_BY_SIDE, target)
    assert form == "joint" and found.spills == 0 and found.registers <= 128


# --- memory that a kernel reads and overwrites ------------------------------------------------


def stores_of(body: str, shape: str = "64,80") -> list[str]:
    """Of the only kernel of `step(%0, %1)`, the last lines up to each store."""
    kind = f"f32[{shape}]"
    launch = only_launch(f"step(%0: {kind}, %1: {kind}) {{{body.format(kind=kind)}\n}}")
    lines = [
        line.strip().partition("  #")[0]
        for line in emit(launch.kernel, launch.sizes).text.splitlines()
    ]
    return [
        "barrier" if "debug_barrier" in before else "none"
        for before, line in zip(lines, lines[1:], strict=False)
        if line.startswith("tl.store(")
    ]


def test_what_is_overwritten_with_something_else_waits_for_all_threads():
    """Threads need not store the elements that they have loaded."""
    swapped = """
      %2: {kind} = mul(%0, 2.0)
      return %2
      write %0 <- %1"""
    assert sorted(stores_of(swapped)) == ["barrier", "none"]
    zeroed = """
      %2: {kind} = mul(%0, 2.0)
      %3: {kind} = full(0.0, shape=(64, 80), dtype=f32, device="cpu")
      return %2
      write %0 <- %3"""
    assert sorted(stores_of(zeroed)) == ["barrier", "none"]


def test_an_update_of_what_was_loaded_needs_no_barrier():
    update = """
      %2: {kind} = mul(%1, 0.1)
      %3: {kind} = sub(%0, %2)
      %4: {kind} = maximum(%3, 0.0)
      return %2
      write %0 <- %4"""
    assert stores_of(update) == ["none", "none"]


@pytest.mark.parametrize(("width", "expected"), [(80, "none"), (40_000, "barrier")])
def test_rows_that_are_overwritten(width, expected):
    """On one tile the new values are made of all that was loaded; block by block, other threads
    may still go over the row."""
    kind = f"f32[64,{width}]"
    text = f"""
    step(%0: {kind}) {{
      %1: f32[64] = reduce_sum(%0, axes=(1,))
      %2: f32[64,1] = reshape(%1, shape=(64, 1))
      %3: {kind} = expand(%2, shape=(64, {width}))
      %4: {kind} = div(%0, %3)
      write %0 <- %4
    }}"""
    launch = only_launch(text)
    lines = emit(launch.kernel, launch.sizes).text.splitlines()
    (at,) = (i for i, line in enumerate(lines) if "tl.store(" in line)
    assert ("debug_barrier" in lines[at - 1]) == (expected == "barrier")


def test_the_last_block_of_a_ragged_domain_is_found_without_a_wrap():
    n = 2**31 - (1 << 23) - 3  # ragged, and as large as 32-bit indices serve
    launch = only_launch(f"step(%0: f32[{n}]) {{\n%1: f32[{n}] = add(%0, 1.0)\nreturn %1\n}}")
    assert not launch.kernel.index64
    assert "if first <= n0 - BLOCK:" in emit(launch.kernel, launch.sizes).text


def test_triton_sees_neither_lines_nor_the_numbers_of_values(monkeypatch):
    """Its cache of machine code is by the text of a function: the same in every plan."""
    text = """
    f(%0: f32[1000]) {
      UNUSED
      %2: f32[1000] = mul(%0, 2.0)  # net.py:LINE
      %3: f32[1000] = exp(%2)  # net.py:LINE
      return %3
    }"""
    shown, seen = [], []
    for line, unused in (("5", ""), ("9", ""), ("5", "%1: f32[1000] = exp(%0)")):
        graph = dce(parse(text.replace("LINE", line).replace("UNUSED", unused)))
        (launch,) = schedule(graph).launches
        monkeypatch.setattr(triton_executor, "_kernels", OrderedDict())  # as in another process
        executor = executor_for("triton", "cuda:0")
        source, _, function = triton_executor.load_kernel(executor, launch, 132)
        shown.append(source.text)
        seen.append(function.src)
    assert "net.py:5" in shown[0] and "net.py:9" in shown[1]
    assert len({*seen}) == 1 and "net.py" not in seen[0]
