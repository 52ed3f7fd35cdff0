"""Kernels compiled for sm_80, sm_90 and sm_100 without a GPU: no spills, wide accesses, limits."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, so it needs a process without the interpreter", allow_module_level=True)

import triton.language as tl
from tracejit.kernels.matmul import matmul
from tracejit.kernels.tiles import dot_path, tiles

from support.kernels import (
    axpy,
    block_reductions,
    every_float_helper,
    every_int_helper,
    half_chain,
    load_a,
    load_b,
    reduce_all,
    store_tile,
    strided_copy,
    update_and_loss,
)
from support.machine_code import each_target, mostly_90
from tracejit.aot import LimitExceeded, check_limits, compile_for

TRITON_DTYPE = {"f32": "fp32", "f64": "fp64", "bf16": "bf16", "f16": "fp16", "i64": "i64"}
ACCUMULATOR = {"f64": tl.float64, "i64": tl.int64}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def pointers(dtype, *names):
    return dict.fromkeys(names, f"*{dtype}")


def compile_matmul(M, N, K, dtype="f32", precision="ieee", epilogue=store_tile, target=90, **over):
    choice = dict(tiles(M, N, K, dtype, precision, epilogue_weight=int(epilogue is not store_tile)))
    choice |= over
    options = {name: choice.pop(name) for name in ("num_warps", "num_stages")}
    pointer = f"*{TRITON_DTYPE[dtype]}"
    constants = {
        "SIZES": (M, N, K, M * K, K, 1, K * N, N, 1, M * N, N, 1),
        "LOAD_A": load_a,
        "LOAD_B": load_b,
        "EPILOGUE": epilogue,
        "B": 1,
        "M": M,
        "N": N,
        "K": K,
        "PRECISION": precision,
        "DOT": dot_path(dtype),
        "ACC": ACCUMULATOR.get(dtype, tl.float32),
        **choice,
    }
    signature = {"bufs": (pointer,) * 4, "scalars": "*fp64", "workspace": "*i8"}
    return compile_for(matmul, signature, constants, target=target, **options)


@mostly_90
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_float_helpers_compile(dtype, target):
    signature = pointers(dtype, "x_ptr", "y_ptr", "out_ptr")
    facts = compile_for(every_float_helper, signature, {"N": 1024, "BLOCK": 128}, target=target)
    check_limits(facts, max_spills=10)  # sin and cos keep a table in local memory


@each_target
@pytest.mark.sweep(2)
def test_int_helpers_compile(target):
    signature = pointers("i32", "x_ptr", "y_ptr", "out_ptr")
    facts = compile_for(every_int_helper, signature, {"N": 1024, "BLOCK": 128}, target=target)
    check_limits(facts)


@mostly_90
@pytest.mark.parametrize("dtype", ["fp32", "fp64", "i64"])
@pytest.mark.sweep(2)
def test_block_reductions_compile(dtype, target):
    signature = pointers(dtype, "x_ptr", "out_ptr")
    check_limits(compile_for(block_reductions, signature, {"BLOCK": 1024}, target=target))


@each_target
@pytest.mark.sweep(2)
def test_half_chain_compiles(target):
    signature = pointers("bf16", "x_ptr", "y_ptr", "out_ptr")
    constants = {"N": 4096, "BLOCK": 1024}
    check_limits(compile_for(half_chain, signature, constants, target=target), want_wide=1.0)


@each_target
def test_contiguous_stream_moves_128_bits(target):
    signature = pointers("fp32", "x_ptr", "y_ptr", "out_ptr")
    facts = compile_for(axpy, signature, {"N": 4_000_000, "BLOCK": 1024}, target=target)
    check_limits(facts, want_wide=1.0)
    assert sum(facts.loads.values()) == 2 * sum(facts.stores.values())
    assert str(facts).startswith(f"axpy sm_{target}: ") and "\n" not in str(facts)


@mostly_90
@pytest.mark.parametrize("kind, dtype", [("sum", "fp32"), ("max", "fp32"), ("min", "fp64")])
def test_reduction_compiles(kind, dtype, target):
    signature = pointers(dtype, "x_ptr", "out_ptr", "partials_ptr") | {"counter_ptr": "*i32"}
    constants = {"N": 1 << 20, "BLOCK": 4096, "NUM": 256, "FOLD": 256, "KIND": kind}
    facts = compile_for(reduce_all, signature, constants, target=target)
    check_limits(facts)
    assert facts.atomics == 1 and facts.barriers >= 1


@mostly_90
@pytest.mark.parametrize("shape", [(64, 100, 1000), (1000, 100, 64), (100, 10, 8)])
def test_small_matmul_with_update(shape, target):
    facts = compile_matmul(*shape, epilogue=update_and_loss, target=target)
    check_limits(facts)
    splits = tiles(*shape, "f32", "ieee", 1).get("SPLITS", 1)
    assert facts.ffma > 0 and facts.atomics == 1 + (splits > 1)  # counters: the loss's, a tile's


@pytest.mark.parametrize(
    "dtype, precision, wgmma",
    [("f32", "ieee", False), ("f32", "tf32", True), ("bf16", "tf32", True)],
)
@pytest.mark.parametrize("target", [90, 100])
@pytest.mark.sweep(4)
def test_large_matmul(dtype, precision, wgmma, target):
    facts = compile_matmul(4096, 4096, 1024, dtype, precision, target=target)
    check_limits(facts, want_wgmma=wgmma)


@each_target
@pytest.mark.parametrize("dtype", ["f64", "i64"])
@pytest.mark.sweep(2)
def test_dtypes_without_dot(dtype, target):
    facts = compile_matmul(100, 50, 40, dtype, target=target)
    check_limits(facts)
    assert facts.mma == facts.wgmma == 0


def test_strided_kernel_fails_the_limits():
    signature = pointers("fp32", "x_ptr", "out_ptr")
    facts = compile_for(strided_copy, signature, {"N": 1 << 20, "BLOCK": 1024})
    with pytest.raises(LimitExceeded, match="0% of accesses are wide, wanted 90%"):
        check_limits(facts, want_wide=0.9)


def test_unaligned_pointer_fails_the_limits():
    signature = pointers("fp32", "x_ptr", "y_ptr", "out_ptr")
    constants = {"N": 1 << 20, "BLOCK": 1024}
    facts = compile_for(axpy, signature, constants, unaligned={"x_ptr"})
    assert 128 in facts.stores
    with pytest.raises(LimitExceeded, match="wide"):
        check_limits(facts, want_wide=1.0)


def test_spilling_kernel_fails_the_limits():
    facts = compile_matmul(128, 128, 16, BLOCK_M=64, BLOCK_N=128, num_warps=1, num_stages=1)
    with pytest.raises(LimitExceeded, match="spill instructions"):
        check_limits(facts)
