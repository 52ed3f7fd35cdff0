"""Generated Triton, run by the interpret executor, against the numpy evaluator."""

import os
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("interprets, so it needs TRITON_INTERPRET=1", allow_module_level=True)

from support.graph_texts import SIDE_BY_SIDE
from support.interpret_checks import check, fill, run
from support.op_samples import SAMPLES, Tensor
from support.plan_checks import TOLERANCE, make_inputs
from support.random_graphs import RandomProgram
from tracejit.codegen.triton_indirect import indirect
from tracejit.ir.interp import evaluate
from tracejit.ir.ops import OPS
from tracejit.ir.text import parse
from tracejit.ir.types import Type, f32
from tracejit.runtime import interpreter, triton_executor, triton_source
from tracejit.runtime.interpreted_plan import InterpretedPlan
from tracejit.runtime.interpreter import OutOfBoundsAccess
from tracejit.runtime.triton_executor import COUNTERS, TritonExecutor
from tracejit.runtime.triton_launch import TRITON_NAME
from tracejit.schedule import schedule
from tracejit.schedule.kernel_text import parse_kernel
from tracejit.schedule.plan import Launch, Plan, PlanBuffer

pytestmark = pytest.mark.interpret

ELEMENTWISE = [name for name, op in OPS.items() if op.family == "elementwise"]
# Others agree to the bit.
APPROXIMATE = {"exp", "log", "tanh", "sin", "cos", "pow", "expm1", "log1p", "erf", "erfc", "atan2"}


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.sweep(2)
def test_every_elementwise_op(name):
    for sample in SAMPLES[name]:
        graph = sample.graph(name)
        pairs = zip(sample.operands, sample.build(), strict=True)
        inputs = [
            np.asarray(x) if isinstance(operand, Tensor) else x
            for operand, x in pairs
            if isinstance(operand, Tensor) or sample.host
        ]
        (expected,), _ = evaluate(graph, inputs)
        (result,), _, _ = run(graph, inputs)
        assert result.shape == expected.shape, sample
        if name in ("floordiv", "mod", "fmod") and expected.dtype.kind in "iu":
            divisor = np.broadcast_to(np.asarray(sample.build()[1]), expected.shape)
            expected = np.where(divisor == 0, result, expected)  # undefined on a GPU
        inexact = name in APPROXIMATE and expected.dtype.kind == "f"
        eps = 4 * np.finfo(expected.dtype).eps if inexact else 0.0
        with np.errstate(invalid="ignore"):
            np.testing.assert_allclose(result, expected, rtol=eps, atol=0, err_msg=str(sample))
        if expected.dtype.kind == "f":
            signs = np.signbit(result) == np.signbit(expected)
            assert (signs | np.isnan(expected)).all(), sample


# --- forms of kernels -------------------------------------------------------------------------

FUSION = """
f(%0: f32[{n}], %1: f32[{n}], %2: f32[{n}]) {{
  %3: f32[{n}] = maximum(%0, 0.0)
  %4: f32[{n}] = sub(%3, %1)
  %5: f32[{n}] = mul(%4, %4)
  %6: f32[] = reduce_sum(%5, axes=(0,))
  %7: f32[{n}] = mul(%4, 2.0)
  %8: b1[{n}] = gt(%0, 0.0)
  %9: f32[{n}] = where(%8, %7, 0.0)
  %10: f32[{n}] = add(%2, %9)
  return %6
  write %2 <- %10
}}"""

SOFTMAX = """
f(%0: {t}[{r},{c}]) {{
  %1: {t}[{keep}] = reduce_max(%0, axes=({axis},))
  %2: {t}[{kept}] = reshape(%1, shape=({kept}))
  %3: {t}[{r},{c}] = expand(%2, shape=({r}, {c}))
  %4: {t}[{r},{c}] = sub(%0, %3)
  %5: {t}[{r},{c}] = exp(%4)
  %6: {t}[{keep}] = reduce_sum(%5, axes=({axis},))
  %7: {t}[{kept}] = reshape(%6, shape=({kept}))
  %8: {t}[{r},{c}] = expand(%7, shape=({r}, {c}))
  %9: {t}[{r},{c}] = div(%5, %8)
  return %9
}}"""

EPS = {"f64": 1e-12, "f32": 1e-5, "bf16": 2e-2, "f16": 2e-3}


def softmax(r, c, axis, dtype="f32"):
    keep, kept = (c, f"1,{c}") if axis == 0 else (r, f"{r},1")
    return SOFTMAX.format(r=r, c=c, axis=axis, keep=keep, kept=kept, t=dtype)


@pytest.mark.parametrize("n", [5, 123, 1000])
def test_fused_reduction_is_one_kernel_of_several_programs(n):
    loaded = check(FUSION.format(n=n), forms=["reduce"])
    assert loaded.sources[0].geometry((n,), 64).grid == (-(-n // 64),)


def test_programs_of_a_reduction_loop_in_a_fixed_order(monkeypatch):
    from tracejit.codegen import geometry

    monkeypatch.setattr(geometry, "MAX_PROGRAMS", 3)
    check(FUSION.format(n=1000), forms=["reduce"])


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("max_tile", [64, 8192])
@pytest.mark.sweep(3)
def test_softmax(dtype, axis, max_tile):
    for r, c in ((1, 5), (33, 77)):
        check(softmax(r, c, axis, dtype), max_tile=max_tile, tolerance=EPS[dtype])


@pytest.mark.parametrize("dtype, max_tile", [("f32", 64), ("f32", 8192), ("bf16", 8192)])
def test_rows_with_numbers_for_each_column(monkeypatch, dtype, max_tile):
    """Of 35 rows and 250 columns in tiles of 16 × 128; also numbers for each row."""
    from tracejit.codegen import geometry

    monkeypatch.setattr(geometry, "SMALL", 1 << 10)
    text = f"""f(%0: {dtype}[5,7,250], %1: {dtype}[250], %2: {dtype}[5,1,1], %3: f64[]@host) {{
      %4: {dtype}[1,1,250] = reshape(%1, shape=(1, 1, 250))
      %5: {dtype}[5,7,250] = expand(%4, shape=(5, 7, 250))
      %6: {dtype}[5,7,250] = expand(%2, shape=(5, 7, 250))
      %7: {dtype}[5,7,250] = mul(%0, %5)
      %8: {dtype}[5,7,250] = add(%7, %6)
      %9: {dtype}[5,7,250] = mul(%8, %3)
      return %9
    }}"""
    loaded = check(text, forms=["pointwise_tiled"], tolerance=EPS[dtype], max_tile=max_tile)
    constants = loaded.launched[0].geometry.constants
    assert constants == {"BLOCK_O": min(16, max_tile // 64), "BLOCK_I": min(128, max_tile)}


@pytest.mark.parametrize("op", ["sum", "max", "min"])
@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16", "f16", "i64", "i32", "i8", "u8", "b1"])
@pytest.mark.sweep(3)
def test_reductions(op, dtype):
    for axes, keep in (((0, 1), ""), ((0,), "29"), ((1,), "13")):
        text = f"""
        f(%0: {dtype}[13,29]) {{
          %1: {dtype}[{keep}] = reduce_{op}(%0, axes={axes})
          return %1
        }}"""
        for max_tile in (16, 8192):
            check(text, max_tile=max_tile, tolerance=EPS.get(dtype, 0.0))


def test_reductions_keep_nan():
    for op in ("sum", "max", "min"):
        for axes, keep in (((0, 1), ""), ((1,), "7")):
            text = (
                f"f(%0: f32[7,9]) {{\n%1: f32[{keep}] = reduce_{op}(%0, axes={axes})\nreturn %1\n}}"
            )
            graph, x = parse(text), np.ones((7, 9), np.float32)
            x[3, 4] = np.nan
            (result,), _, _ = run(graph, [x], 16)
            assert np.array_equal(np.isnan(result), np.isnan(np.sum(x, axes)))


def test_layer_norm_with_several_reductions_and_outputs():
    check("""
    f(%0: f32[19,37], %1: f32[37]) {
      %2: f32[19] = reduce_sum(%0, axes=(1,))
      %3: f32[19] = div(%2, 37.0)
      %4: f32[19,1] = reshape(%3, shape=(19, 1))
      %5: f32[19,37] = expand(%4, shape=(19, 37))
      %6: f32[19,37] = sub(%0, %5)
      %7: f32[19,37] = mul(%6, %6)
      %8: f32[19] = reduce_sum(%7, axes=(1,))
      %9: f32[19] = div(%8, 37.0)
      %10: f32[19] = add(%9, 1e-05)
      %11: f32[19] = sqrt(%10)
      %12: f32[19,1] = reshape(%11, shape=(19, 1))
      %13: f32[19,37] = expand(%12, shape=(19, 37))
      %14: f32[19,37] = div(%6, %13)
      %15: f32[1,37] = reshape(%1, shape=(1, 37))
      %16: f32[19,37] = expand(%15, shape=(19, 37))
      %17: f32[19,37] = mul(%14, %16)
      return %17, %3, %11
    }""")


MATMUL = """
f(%0: {t}[{m},{k}], %1: {t}[{k},{n}]) {{
  %2: {t}[{m},{n}] = matmul(%0, %1)
  return %2
}}"""


@pytest.mark.parametrize("dtype", [*EPS, "i64", "i32"])
@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (5, 7, 3), (40, 33, 70)])
def test_matmul(dtype, m, n, k):
    text = MATMUL.format(t=dtype, m=m, n=n, k=k)
    short = k == 70 and dtype in ("f64", "i64", "i32")  # tiles of k, of which there are many then
    form = "matmul_split" if short else "matmul"
    check(text, forms=[form], tolerance=EPS.get(dtype, 0.0))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(
    "m, n, k, even",
    [
        (64, 96, 64, "mnk"),
        (64, 33, 32, "mk"),
        (5, 96, 64, "nk"),
        (40, 33, 64, "k"),
        (64, 32, 5, "mn"),
    ],
)
def test_a_matmul_whose_tiles_end_where_it_does(dtype, m, n, k, even):
    """Without masks. An operand and a sum are made of numbers for each row only."""
    text = f"""f(%0: {dtype}[{m},1], %1: {dtype}[{k},{n}], %2: {dtype}[{m},1]) {{
      %3: {dtype}[{m},{k}] = expand(%0, shape=({m}, {k}))
      %4: {dtype}[{m},{k}] = maximum(%3, 0.5)
      %5: {dtype}[{m},{n}] = matmul(%4, %1)
      %6: {dtype}[{m},1] = abs(%2)
      %7: {dtype}[{m},{n}] = expand(%6, shape=({m}, {n}))
      %8: {dtype}[{m},{n}] = add(%5, %7)
      %9: {dtype}[] = reduce_max(%7, axes=(0, 1))
      %10: {dtype}[] = reduce_sum(%8, axes=(0, 1))
      return %8, %9, %10
    }}"""
    loaded = check(text, tolerance=EPS[dtype])
    (source,) = (s for s in loaded.sources if "matmul" in s.text)
    assert f"even_{even}" in source.variants
    for name, ranges in (("load_a", "mk"), ("load_b", "kn"), ("epilogue", "mn")):
        function = source.text.partition(f"def {name}")[2].partition("@triton.jit")[0]
        masked = {x for x in "mnk" if f"in_{x} =" in function}
        assert masked <= set(ranges) - set(even) and ("mask=" in function) <= bool(masked)


def test_matmul_with_transposes_prologue_and_epilogue():
    check("""
    f(%0: f32[33,70], %1: f32[40,33], %2: f32[40], %3: f32[70,40], %4: f64[]@host) {
      %5: f32[70,33] = permute(%0, axes=(1, 0))
      %6: f32[33,40] = permute(%1, axes=(1, 0))
      %7: f32[33,40] = exp(%6)
      %8: f32[70,40] = matmul(%5, %7)
      %9: f32[1,40] = reshape(%2, shape=(1, 40))
      %10: f32[70,40] = expand(%9, shape=(70, 40))
      %11: f32[70,40] = add(%8, %10)
      %12: f32[70,40] = mul(%11, %4)
      %13: f32[70,40] = sub(%3, %12)
      return %11
      write %3 <- %13
    }""")


@pytest.mark.parametrize("k, groups", [(333, 1), (5001, 7)])
def test_matmul_whose_k_is_split(k, groups):
    """With a prologue, an epilogue and a full reduction, and a batched one in the same launch."""
    both = f"%8: bf16[2,9,{k}], %9: bf16[2,{k},7]"
    text = f"""f(%0: f32[19,{k}], %1: f32[{k},33], %2: f32[33], {both}) {{
      %3: f32[19,{k}] = maximum(%0, 0.0)
      %4: f32[19,33] = matmul(%3, %1)
      %12: f32[1,33] = reshape(%2, shape=(1, 33))
      %5: f32[19,33] = expand(%12, shape=(19, 33))
      %6: f32[19,33] = add(%4, %5)
      %7: f32[] = reduce_sum(%6, axes=(0, 1))
      %10: bf16[2,9,7] = matmul(%8, %9)
      return %6, %7, %10
    }}"""
    loaded = check(text, forms=["joint"], tolerance=2e-2, max_tile=256)
    constants = loaded.launched[0].geometry.constants
    splits = [constants.get(f"SPLITS_{i}", 1) for i in range(2)]
    assert splits[0] > 1 and (splits[1] > 1) == (k > 1000)
    assert -(-splits[0] // constants["GROUP_0"]) == groups


@pytest.mark.parametrize("dtype, rows", [("f32", 1031), ("bf16", 520), ("i64", 641)])
def test_sums_of_columns_in_two_steps(dtype, rows):
    text = f"""f(%0: {dtype}[{rows},5]) {{
      %1: {dtype}[{rows},5] = mul(%0, %0)
      %2: {dtype}[5] = reduce_sum(%1, axes=(0,))
      %3: {dtype}[5] = reduce_sum(%0, axes=(0,))
      return %2, %3
    }}"""
    check(text, tolerance=EPS.get(dtype, 0.0), max_tile=2048, gpu=True)


def test_matmul_with_full_reductions_in_its_epilogue():
    check(
        """
    f(%0: f32[70,9], %1: f32[9,50], %2: f32[70,50]) {
      %3: f32[70,50] = matmul(%0, %1)
      %4: f32[70,50] = sub(%3, %2)
      %5: f32[70,50] = mul(%4, %4)
      %6: f32[] = reduce_sum(%5, axes=(0, 1))
      %7: f32[] = div(%6, 3500.0)
      %8: f32[70,50] = mul(%4, 2.0)
      %9: f32[] = reduce_max(%4, axes=(0, 1))
      return %7, %8, %9
    }""",
        forms=["matmul"],
    )


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_batched_matmul(dtype):
    check(
        f"""
    f(%0: {dtype}[2,3,5,17], %1: {dtype}[2,3,17,9]) {{
      %2: {dtype}[2,3,5,9] = matmul(%0, %1)
      %3: {dtype}[2,3,5,9] = maximum(%2, 0.0)
      return %3
    }}""",
        forms=["matmul"],
        tolerance=EPS[dtype],
    )


def test_training_step_of_two_layers():
    check("""
    f(%0: f32[40,70], %1: f32[40,10], %2: f32[70,33], %3: f32[33,10]) {
      %4: f32[40,33] = matmul(%0, %2)
      %5: f32[40,33] = maximum(%4, 0.0)
      %6: f32[40,10] = matmul(%5, %3)
      %7: f32[40,10] = sub(%6, %1)
      %8: f32[40,10] = mul(%7, %7)
      %9: f32[] = reduce_sum(%8, axes=(0, 1))
      %10: f32[40,10] = mul(%7, 2.0)
      %11: f32[33,40] = permute(%5, axes=(1, 0))
      %12: f32[33,10] = matmul(%11, %10)
      %13: f32[10,33] = permute(%3, axes=(1, 0))
      %14: f32[40,33] = matmul(%10, %13)
      %15: b1[40,33] = lt(%4, 0.0)
      %16: f32[40,33] = where(%15, 0.0, %14)
      %17: f32[70,40] = permute(%0, axes=(1, 0))
      %18: f32[70,33] = matmul(%17, %16)
      %19: f32[70,33] = mul(%18, 1e-06)
      %20: f32[70,33] = sub(%2, %19)
      %21: f32[33,10] = mul(%12, 1e-06)
      %22: f32[33,10] = sub(%3, %21)
      return %9
      write %2 <- %20
      write %3 <- %22
    }""")


def test_movement_becomes_index_maps():
    check("""
    f(%0: f32[6,35], %1: i64[4]) {
      %2: f32[6,5,7] = reshape(%0, shape=(6, 5, 7))
      %3: f32[7,6,5] = permute(%2, axes=(2, 0, 1))
      %4: f32[7,3,4] = slice(%3, starts=(0, 1, 1), stops=(7, 6, 5), steps=(1, 2, 1))
      %6: f32[9,3,7] = pad(%4, low=(1, 0, 0), high=(1, 0, 0), interior=(0, 0, 1), value=0)
      %7: f32[9,3,7] = exp(%6)
      %8: f32[9,3,7] = iota(axis=2, shape=(9, 3, 7), dtype=f32, device='cpu')
      %9: f32[9,3,7] = add(%7, %8)
      return %9
    }""")


def test_float64_literals_are_exact():
    text = """
    f(%0: f64[5]) {
      %1: f64[5] = mul(%0, 0.1)
      %2: f64[5] = maximum(%1, 0.3)
      %3: f64[5] = pow(%2, 0.7)
      return %1, %2, %3
    }"""
    check(text, tolerance=1e-15)


def test_kernels_are_shared_among_plans():
    text = "f(%0: f32[{n}]) {{\n%1: f32[{n}] = tanh(%0)\n%2: f32[{n}] = cos(%1)\nreturn %2\n}}"
    check(text.format(n=17))
    compiles, hits = COUNTERS.compiles, COUNTERS.hits
    check(text.format(n=18))
    assert (COUNTERS.compiles, COUNTERS.hits) == (compiles, hits + 1)


def test_kernels_are_forgotten_least_recently_used_first(monkeypatch):
    monkeypatch.setattr(triton_executor, "MAX_KERNELS", 1)
    monkeypatch.setattr(triton_executor, "_kernels", OrderedDict())  # what earlier tests left
    text = "f(%0: f32[29]) {{\n%1: f32[29] = {}(%0)\nreturn %1\n}}"
    one, two = text.format("sin"), text.format("log")
    for text, compiled in ((one, 1), (one, 0), (two, 1), (one, 1)):
        before = COUNTERS.compiles
        check(text)
        assert COUNTERS.compiles - before == compiled


def test_sources_are_files_and_may_vanish():
    graph = parse("f(%0: f32[9]) {\n%1: f32[9] = sqrt(%0)\nreturn %1\n}")
    _, _, loaded = run(graph, fill(graph))
    (source,) = loaded.sources
    paths = list((triton_source.DISK.root / "triton").glob("*.py"))
    (path,) = [path for path in paths if source.text in path.read_text()]
    path.unlink()
    run(graph, fill(graph))


@pytest.mark.parametrize("fuse", [True, False])
def test_kernels_that_load_their_addresses(monkeypatch, fuse):
    """Every other pointer of a launch lies in a table, as in a CUDA graph."""
    launched = []

    def run_launch(self, launch, addresses, table, number):
        source, names = launch.source, launch.function.arg_names
        places = [addresses[i] for i in launch.buffers]
        through = [i % 2 == number % 2 for i in range(len(places))]
        wrapped = indirect(source, names, [True if x else None for x in through])
        listed = np.array([a for a, x in zip(places, through, strict=True) if x], np.int64)
        memory = [(a, self._sizes[i]) for a, i in zip(places, launch.buffers, strict=True)]
        pointers = [interpreter.Pointer(listed.ctypes.data, "i64")]
        memory.append((listed.ctypes.data, listed.nbytes))
        for a, x, buffer in zip(places, through, source.kernel.buffers, strict=True):
            if not x:
                pointers.append(interpreter.Pointer(a, TRITON_NAME[buffer.dtype.name]))
        if source.has_scalars:
            first = table.ctypes.data + 8 * launch.first_scalar
            pointers.append(interpreter.Pointer(first, "fp64"))
            memory.append((first, 8 * len(source.kernel.scalars)))
        if launch.geometry.workspace:
            place = self._workspace.ctypes.data + launch.workspace
            pointers.append(interpreter.Pointer(place, "i8"))
            memory.append((place, launch.geometry.workspace))
        function = triton_source.import_source(wrapped)
        grid, constants = launch.geometry.grid, launch.constants
        interpreter.run(function, grid, pointers, constants, buffers=memory, seed=number)
        launched.append(wrapped.name)

    monkeypatch.setattr(InterpretedPlan, "_run_launch", run_launch)
    text = """f(%0: f32[20,30], %1: f32[30,9], %2: bf16[20,9], %3: f64[]@host) {
      %4: f32[20,9] = matmul(%0, %1)
      %5: f32[20,9] = cast(%2, dtype=f32)
      %6: f32[20,9] = add(%4, %5)
      %7: f32[20,9] = mul(%6, %3)
      %8: f32[] = reduce_sum(%7, axes=(0, 1))
      %9: b1[20,9] = gt(%7, 0.0)
      return %7, %8, %9
    }"""
    graph = parse(text)
    inputs = fill(graph)
    expected, _ = evaluate(graph, inputs)
    found, _, _ = run(graph, inputs, fuse=fuse)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert launched and all("_indirect_" in name for name in launched)


def test_out_of_bounds_access_is_found():
    graph = parse("f(%0: f32[90]) {\n%1: f32[90] = sqrt(%0)\nreturn %1\n}")
    plan = schedule(graph)
    (launch,) = plan.launches
    plan = replace(plan, launches=(replace(launch, sizes=(91,)),))
    memory = [np.ones(90, np.float32), np.zeros(90, np.float32)]
    with pytest.raises(OutOfBoundsAccess):
        TritonExecutor("interpret").load(plan)([array.ctypes.data for array in memory], [])


def test_workspace_is_left_as_it_was_found():
    graph = parse("f(%0: f32[300]) {\n%1: f32[] = reduce_sum(%0, axes=(0,))\nreturn %1\n}")
    loaded = TritonExecutor("interpret", max_tile=64).load(schedule(graph))
    for value in (1.0, 2.0, 3.0):
        x, out = np.full(300, value, np.float32), np.zeros((), np.float32)
        loaded([x.ctypes.data, out.ctypes.data], [])
        assert out == 300 * value


@pytest.mark.parametrize("n", [(1 << 17) + 1, (1 << 17) - 1])
def test_large_domains_of_odd_size(n):
    ragged = "_ragged" if n > 1 << 17 else ""
    check(FUSION.format(n=n), max_tile=1024, forms=[f"reduce{ragged}"])
    start = f"""
    f(%0: f32[{n}]) {{
      %1: f32[{n}] = mul(%0, 2.0)
      %2: f32[{n}] = full(-3.0, shape=({n},), dtype=f32, device='cpu')
    """
    check(start + "return %1, %2\n}", max_tile=1024, forms=[f"pointwise{ragged}"])
    end = f"%3: f32[] = reduce_max(%2, axes=(0,))\n%4: f32[{n}] = abs(%1)\nreturn %3, %4\n}}"
    check(start + end, max_tile=1024)


@pytest.mark.parametrize("max_tile", [64, 8192])
def test_kernels_side_by_side(max_tile):
    check(SIDE_BY_SIDE, max_tile=max_tile, forms=["joint"])


def test_workspaces_of_kernels_side_by_side():
    graph = parse("""
    f(%0: f32[300], %1: f32[200], %2: f32[40]) {
      %3: f32[] = reduce_sum(%0, axes=(0,))
      %4: f32[] = reduce_sum(%1, axes=(0,))
      %5: f32[] = add(%3, %4)
      %6: f32[40] = mul(%2, 2.0)
      %7: f32[] = reduce_max(%6, axes=(0,))
      return %5, %7
    }""")
    plan = schedule(graph)
    assert [len(launch.kernel.parts) for launch in plan.launches] == [3, 0]
    loaded = TritonExecutor("interpret", max_tile=16).load(plan)
    arena = np.empty(plan.arena_bytes, np.uint8)
    for value in (1.0, 2.0, 3.0):
        memory = [np.full(n, value, np.float32) for n in (300, 200, 40)]
        memory += [np.zeros((), np.float32), np.zeros((), np.float32)]
        addresses = [array.ctypes.data for array in memory]
        arenas = [b for b in plan.buffers if b.kind == "arena"]
        addresses += [arena.ctypes.data + b.offset for b in arenas]
        loaded(addresses, [])
        assert (memory[3], memory[4]) == (500 * value, 2 * value)


ONE_OF_EACH = (FUSION.format(n=123), softmax(9, 23, 1), MATMUL.format(t="f32", m=5, n=7, k=3))


@pytest.mark.parametrize("text", ONE_OF_EACH)
def test_without_fusion(text):
    check(text, fuse=False)


def test_strided_inputs_and_outputs():
    check("""
    f(%0: f32[7,9] strides (1, 7), %1: f32[7,9] strides (20, 2)) {
      %2: f32[7,9] = add(%0, %1)
      %3: f32[7] = reduce_sum(%2, axes=(1,))
      return %2 strides (1, 8), %3
      write %1 <- %2
    }""")


def test_empty_tensors():
    check("f(%0: f32[0,5]) {\n%1: f32[0,5] = exp(%0)\nreturn %1\n}")
    for axes, keep in (((0,), "5"), ((0, 1), ""), ((1,), "0")):
        check(f"f(%0: f32[0,5]) {{\n%1: f32[{keep}] = reduce_sum(%0, axes={axes})\nreturn %1\n}}")
    check("f(%0: f32[4,0], %1: f32[0,5]) {\n%2: f32[4,5] = matmul(%0, %1)\nreturn %2\n}")
    check("f(%0: f32[0,4], %1: f32[4,5]) {\n%2: f32[0,5] = matmul(%0, %1)\nreturn %2\n}")


@pytest.mark.parametrize("text", ONE_OF_EACH)
def test_64_bit_indices(text):
    graph = parse(text)
    plan = schedule(graph)
    wide = tuple(replace(x, kernel=replace(x.kernel, index64=True)) for x in plan.launches)
    inputs = fill(graph)
    expected, _ = evaluate(graph, inputs)
    results, _, loaded = run(graph, inputs, plan=replace(plan, launches=wide))
    assert all("tl.int64" in source.text for source in loaded.sources)
    for ours, theirs in zip(results, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_several_full_reductions_in_one_kernel():
    check(
        """
    f(%0: f32[13,29], %1: f64[]@host) {
      %2: f32[] = reduce_sum(%0, axes=(0, 1))
      %3: f32[] = reduce_max(%0, axes=(0, 1))
      %4: b1[13,29] = gt(%0, 0.5)
      %5: b1[] = reduce_sum(%4, axes=(0, 1))
      %6: f32[] = mul(%2, %1)
      %7: f32[] = where(%5, %6, %3)
      return %2, %3, %5, %7
    }""",
        forms=["reduce"],
    )


def test_one_scalar_in_several_dtypes():
    check("""
    f(%0: f32[33], %1: f64[33], %2: i64[33], %3: f64[]@host, %4: bf16[33]) {
      %5: f32[33] = mul(%0, %3)
      %6: f64[33] = mul(%1, %3)
      %7: bf16[33] = mul(%4, %3)
      %8: f32[33] = full(%3, shape=(33,), dtype=f32, device='cpu')
      return %5, %6, %7, %8
    }""")


NORMALIZE = """
kernel(b0: f32 r, b1: f32 w, b2: f32 w; n0) over () {
  stage (i0: n0) {
    v0: f32 = load b0[i0]
    v1: f32 = reduce_sum v0
  }
  stage (i0: n0) {
    v2: f32 = load b0[i0]
    v3: f32 = div(v2, v1)
    store b1[i0] <- v3
  }
  stage () {
    store b2[0] <- v1
  }
}"""


@pytest.mark.parametrize("max_tile", [64, 8192])
def test_full_reduction_read_by_a_later_loop_is_one_program(max_tile):
    kernel = parse_kernel(NORMALIZE)
    shapes = ((300,), (300,), ())
    buffers = tuple(
        PlanBuffer(f"t{i}", "input", Type(f32, shape), index=i) for i, shape in enumerate(shapes)
    )
    launch = Launch(kernel, tuple(b.name for b in buffers), (300,), ())
    plan = Plan("p", buffers, (launch,), (), (), (), (), (), 0, "cpu")
    x = np.random.default_rng(0).uniform(0.5, 1.5, 300).astype(np.float32)
    memory = [x, np.zeros_like(x), np.zeros((), np.float32)]
    loaded = TritonExecutor("interpret", max_tile=max_tile).load(plan)
    loaded([array.ctypes.data for array in memory], [])
    np.testing.assert_allclose(memory[1], x / x.sum(), rtol=1e-6)
    np.testing.assert_allclose(memory[2], x.sum(), rtol=1e-6)


def test_random_programs():
    joined = 0
    for seed in range(40):
        graph = RandomProgram(seed).graph()
        inputs = make_inputs(graph, seed)
        plan = schedule(graph)
        joined += sum(bool(launch.kernel.parts) for launch in plan.launches)
        expected, written = evaluate(graph, inputs)
        results, targets, _ = run(graph, inputs, max_tile=16, plan=plan)
        found = zip([*results, *targets], [*expected, *written], graph.outputs(), strict=True)
        for ours, theirs, value in found:
            tolerance = TOLERANCE.get(value.type.dtype.name, 0)
            scale = tolerance * max(1.0, float(np.abs(theirs).max(initial=0)))
            np.testing.assert_allclose(
                ours, theirs, rtol=tolerance, atol=scale, err_msg=f"seed {seed}:\n{graph}"
            )
    assert joined >= 10
