"""Device helpers, reductions, the matmul kernel and the interpreter's checks, on CPU memory."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("interprets, so it needs TRITON_INTERPRET=1", allow_module_level=True)

import triton.language as tl
from tracejit.kernels.costs import accumulators
from tracejit.kernels.matmul import matmul
from tracejit.kernels.tiles import dot_path, tiles, workspace

from support import kernels
from tracejit.runtime.interpreter import OutOfBoundsAccess, Pointer, run

pytestmark = pytest.mark.interpret

ACCUMULATOR = {torch.float64: tl.float64, torch.int64: tl.int64, torch.int32: tl.int32}
NAME = {torch.float64: "f64", torch.int64: "i64", torch.bfloat16: "bf16", torch.float16: "f16"}


def launch(kernel, grid, *args, touch=(), **options):
    """Run a kernel on tensors, which are also its buffers, and other arguments."""
    tensors = [a for a in args if isinstance(a, torch.Tensor)] + list(touch)
    pointers = [Pointer.of(a) if isinstance(a, torch.Tensor) else a for a in args]
    buffers = [(t.data_ptr(), t.nbytes) for t in tensors]
    return run(kernel, grid, pointers, buffers=buffers, **options)


def cdiv(n, block):
    return -(-n // block)


# --- device helpers ---------------------------------------------------------------------------

SPECIAL = (0.0, -0.0, 1.0, -1.0, 0.5, -2.5, 3.0, 1e-3, 88.0, -100.0, np.inf, -np.inf, np.nan)


def float_operands(dtype):
    special = torch.tensor(SPECIAL, dtype=dtype)
    x, y = (t.reshape(-1) for t in torch.meshgrid(special, special, indexing="ij"))
    random = torch.randn(2, 123, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 3
    return torch.cat([x, random[0]]), torch.cat([y, random[1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float_helpers_match_torch(dtype):
    x, y = float_operands(dtype)
    out = torch.empty(len(kernels.FLOAT_HELPERS), len(x), dtype=dtype)
    launch(kernels.every_float_helper, (cdiv(len(x), 128),), x, y, out, len(x), 128)
    binary = {"maximum", "minimum", "div", "pow", "floor_divide", "remainder"}
    exact = {"maximum", "minimum", "div", "reciprocal", "floor", "abs", "sign", "neg"}
    exact |= {"floor_divide", "remainder"}
    for name, result in zip(kernels.FLOAT_HELPERS, out, strict=True):
        eager = getattr(torch, name)(*((x, y) if name in binary else (x,)))
        limit = 0.0 if name in exact else 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(result, eager, rtol=limit, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("name", ["floor_divide", "neg"])
def test_zeros_have_the_sign_of_eager(name):
    x, y = float_operands(torch.float32)
    out = torch.empty(len(kernels.FLOAT_HELPERS), len(x))
    launch(kernels.every_float_helper, (cdiv(len(x), 128),), x, y, out, len(x), 128)
    ours = out[kernels.FLOAT_HELPERS.index(name)]
    eager = torch.floor_divide(x, y) if name == "floor_divide" else torch.neg(x)
    number = ~eager.isnan()
    assert torch.equal(torch.signbit(ours)[number], torch.signbit(eager)[number])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_int_helpers_match_torch(dtype):
    big = 2**62 + 1 if dtype is torch.int64 else 2**30 + 1  # beyond what a float can hold
    values = torch.tensor([1, -1, 2, -3, 7, -7, big, -big], dtype=dtype)
    x, y = (t.reshape(-1) for t in torch.meshgrid(values, values, indexing="ij"))
    out = torch.empty(len(kernels.INT_HELPERS), len(x), dtype=dtype)
    launch(kernels.every_int_helper, (cdiv(len(x), 32),), x, y, out, len(x), 32)
    for name, result in zip(kernels.INT_HELPERS, out, strict=True):
        binary = name in {"maximum", "minimum", "floor_divide", "remainder"}
        eager = getattr(torch, name)(*((x, y) if binary else (x,)))
        assert torch.equal(result, eager), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_block_reductions(dtype):
    x = torch.arange(64).sub(20).to(dtype)
    out = torch.empty(3, dtype=dtype)
    launch(kernels.block_reductions, (1,), x, out, 64)
    assert torch.equal(out, torch.stack([x.max(), x.min(), x.sum()]))
    if dtype.is_floating_point:
        x[5] = torch.nan
        launch(kernels.block_reductions, (1,), x, out, 64)
        assert out.isnan().all()


# --- one-launch reductions --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sum", "max", "min"])
@pytest.mark.parametrize("n", [1, 123, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_full_reduction(kind, n, dtype):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)).mul(100).to(dtype)
    num = cdiv(n, 64)
    out, partials = torch.empty(1, dtype=dtype), torch.empty(num, dtype=dtype)
    counter = torch.zeros(1, dtype=torch.int32)
    results = set()
    for seed in range(3):
        args = (x, out, partials, counter, n, 64, num, 4, kind)
        launch(kernels.reduce_all, (num,), *args, seed=seed)
        assert counter.item() == 0
        results.add(out.item())
    assert len(results) == 1  # the same bits, whatever the order of the programs
    expected = {"sum": x.sum, "max": x.max, "min": x.min}[kind]()
    torch.testing.assert_close(out[0], expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kind", ["sum", "max", "min"])
def test_full_reduction_keeps_nan(kind):
    x = torch.zeros(1000)
    x[777] = torch.nan
    out, partials = torch.empty(1), torch.empty(4)
    counter = torch.zeros(1, dtype=torch.int32)
    launch(kernels.reduce_all, (4,), x, out, partials, counter, 1000, 256, 4, 4, kind)
    assert out.isnan().all()


# --- matmul -----------------------------------------------------------------------------------


def launch_matmul(
    a, b, out, epilogue, extra=(), lr=0.0, tile=None, precision="ieee", times=1, **options
):
    """Launch it so many times in one workspace, which is returned with what the last run did."""
    B, M, K = a.shape
    N = b.shape[2]
    choice = tiles(M, N, K, NAME.get(a.dtype, "f32"), precision) | (tile or {})
    choice = {k: v for k, v in choice.items() if k not in ("num_warps", "num_stages")}
    each = B * cdiv(M, choice["BLOCK_M"]) * cdiv(N, choice["BLOCK_N"])
    programs = each * choice["SPLITS"]
    calls = choice["PIECES"] * accumulators(choice["BLOCK_N"])  # of the epilogue
    places = workspace(choice, each, 8, 16 + 4 * each * calls)
    end = places.pop("END")
    tensors = (a, b, out, *extra)
    scalars = torch.tensor([lr], dtype=torch.float64)
    space = torch.zeros(end, dtype=torch.int8)
    constants = {
        "SIZES": (M, N, K, *a.stride(), *b.stride(), *out.stride()),
        "LOAD_A": kernels.load_a,
        "LOAD_B": kernels.load_b,
        "EPILOGUE": epilogue,
        "B": B,
        "M": M,
        "N": N,
        "K": K,
        "PRECISION": precision,
        "DOT": dot_path(NAME.get(a.dtype, "f32")) if a.dtype.is_floating_point else "sum",
        "ACC": ACCUMULATOR.get(a.dtype, tl.float32),
        **choice,
        **places,
    }
    args = (tuple(map(Pointer.of, tensors)), Pointer.of(scalars), Pointer.of(space))
    touched = (*tensors, scalars, space)
    buffers = [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in touched]
    for _ in range(times):
        found = run(matmul, (programs,), args, constants, buffers=buffers, **options)
    counters = space[places["COUNTERS"] : places["PARTIALS"]]
    assert not space[:4].any() and not counters.any()  # at rest
    return found


def operands(B, M, N, K, dtype):
    generator = torch.Generator().manual_seed(M)
    a, b = (torch.randn(s, generator=generator) * 4 for s in ((B, M, K), (B, K, N)))
    return a.to(dtype), b.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 5, 1, 3), (2, 40, 70, 50), (1, 33, 17, 1)])
def test_matmul(dtype, shape):
    a, b = operands(*shape, dtype)
    out = torch.full((shape[0], shape[1], shape[2]), -7, dtype=dtype)
    launch_matmul(a, b, out, kernels.store_tile)
    expected = (a.double() @ b.double()).to(dtype) if dtype.is_floating_point else a @ b
    tolerance = {torch.bfloat16: 1e-2, torch.float64: 1e-12}.get(dtype, 1e-5)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=100 * tolerance)


def test_matmul_of_transposed_operand_in_grouped_order():
    a, b = operands(1, 100, 60, 20, torch.float32)
    b = b.transpose(1, 2).contiguous().transpose(1, 2)
    out = torch.empty(1, 100, 60)
    tile = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "GROUP_M": 3}
    launch_matmul(a, b, out, kernels.store_tile, tile=tile)
    torch.testing.assert_close(out, a @ b, rtol=1e-5, atol=1e-4)


def test_matmul_with_update_and_reduction_in_the_epilogue():
    a, b = operands(1, 64, 50, 33, torch.float32)
    weight = torch.randn(1, 64, 50)
    expected = weight - 0.1 * (a @ b).clamp(min=0)
    loss = torch.empty(1)
    accesses = launch_matmul(
        a, b, weight, kernels.update_and_loss, extra=(loss,), lr=0.1, record=True
    )
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(loss[0], expected.sum(), rtol=1e-4, atol=1e-3)
    assert [accesses[i] for i in range(4)] == [
        (a.nbytes, 0),
        (b.nbytes, 0),
        (weight.nbytes, weight.nbytes),
        (0, 4),
    ]


SPLIT = [(2, 2), (7, 3), (20, 5), (20, 20)]


@pytest.mark.sweep(0.25)
@pytest.mark.parametrize(
    "dtype, splits",
    [
        *((torch.float32, n) for n in SPLIT),
        *((t, (7, 3)) for t in (torch.float64, torch.int64, torch.bfloat16)),
    ],
)
def test_matmul_whose_k_is_split(dtype, splits):
    a, b = operands(2, 17, 19, 321, dtype)  # the last stretch is short, or 13 have nothing
    expected = (a.double() @ b.double()).to(dtype) if dtype.is_floating_point else a @ b
    tolerance = {torch.bfloat16: 1e-2, torch.float64: 1e-12}.get(dtype, 1e-5)
    tile = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 2}
    tile |= dict(zip(("SPLITS", "GROUP"), splits, strict=True))
    found = []
    for options in ({"order": "forward"}, {"order": "reversed"}, {"seed": 1}, {"seed": 2}):
        out = torch.full((2, 17, 19), -7, dtype=dtype)
        times = 1 + ("order" in options)
        launch_matmul(a, b, out, kernels.store_tile, tile=tile, times=times, **options)
        found.append(out)
    torch.testing.assert_close(found[0], expected, rtol=tolerance, atol=100 * tolerance)
    assert all(torch.equal(found[0], other) for other in found)


def test_partial_tiles_are_added_up_in_order():
    """Not one after another as they come: 1e8 + 1 - 1e8 depends on it."""
    a = torch.tensor([1e8, 1.0, -1e8, 1.0])[:, None].expand(4, 16).reshape(1, 1, 64).clone()
    a[:, :, 1::16], a[:, :, 2:16] = 0, 0
    b = torch.zeros(1, 64, 1)
    b[:, ::16] = 1.0
    tile = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "SPLITS": 4}
    for group, expected in ((4, 1.0), (2, 0.0)):  # ((0 + 1e8) + 1) - 1e8 + 1; pairs
        for seed in range(4):
            out = torch.empty(1, 1, 1)
            launch_matmul(a, b, out, kernels.store_tile, tile=tile | {"GROUP": group}, seed=seed)
            assert out.item() == expected


def test_a_split_matmul_with_update_and_reduction_in_the_epilogue():
    a, b = operands(1, 64, 50, 333, torch.float32)
    start = torch.randn(1, 64, 50)
    expected = start - 0.1 * (a @ b).clamp(min=0)
    tile = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "SPLITS": 6, "GROUP": 3}
    found = []
    for seed in range(3):
        weight, loss = start.clone(), torch.empty(1)
        launch_matmul(a, b, weight, kernels.update_and_loss, (loss,), lr=0.1, tile=tile, seed=seed)
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(loss[0], expected.sum(), rtol=1e-4, atol=1e-3)
        found.append((weight, loss))
    assert all(torch.equal(x, y) for other in found for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_tile_in_two_halves(pieces):
    """Three quarters of a power of two wide; the second tile's right half is all outside."""
    a, b = operands(2, 17, 75, 70, torch.bfloat16)
    tile = {"BLOCK_M": 16, "BLOCK_N": 48, "BLOCK_K": 16, "SPLITS": 1, "PIECES": pieces}
    out = torch.full((2, 17, 75), -7, dtype=a.dtype)
    launch_matmul(a, b, out, kernels.store_tile, tile=tile)
    expected = (a.double() @ b.double()).to(a.dtype)
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1.0)
    a, b = operands(1, 40, 100, 33, torch.float32)
    start, loss = torch.randn(1, 40, 100), torch.empty(1)
    expected, weight = start - 0.1 * (a @ b).clamp(min=0), start.clone()
    launch_matmul(a, b, weight, kernels.update_and_loss, (loss,), lr=0.1, tile=tile)
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(loss[0], expected.sum(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("splits", [1, 5])
def test_an_epilogue_in_pieces(splits):
    """The loss is a sum over all pieces of all tiles; 50 columns end within a piece."""
    a, b = operands(1, 64, 50, 333, torch.float32)
    start = torch.randn(1, 64, 50)
    expected = start - 0.1 * (a @ b).clamp(min=0)
    tile = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "SPLITS": splits, "GROUP": 3}
    found = []
    for pieces in (1, 2, 4):
        for seed in range(2):
            weight, loss = start.clone(), torch.empty(1)
            how = tile | {"PIECES": pieces}
            launch_matmul(
                a, b, weight, kernels.update_and_loss, (loss,), lr=0.1, tile=how, seed=seed
            )
            torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(loss[0], expected.sum(), rtol=1e-4, atol=1e-3)
            found.append(weight)
    assert all(torch.equal(found[0], other) for other in found)


def test_tf32_rounds_the_operands():
    a, b = torch.full((1, 16, 16), 1 + 2.0**-12), torch.eye(16)[None].contiguous()
    out = torch.empty(1, 16, 16)
    launch_matmul(a, b, out, kernels.store_tile, precision="tf32")
    assert torch.equal(out, torch.ones(1, 16, 16))


def test_small_shapes_get_small_tiles():
    small, large = tiles(64, 100, 1000, "f32"), tiles(4096, 4096, 4096, "f32")
    assert small["BLOCK_M"] == small["BLOCK_N"] == 32
    assert large["BLOCK_M"] * large["BLOCK_N"] == 128 * 128
    assert tiles(1000, 100, 64, "f32")["BLOCK_M"] == 32
    assert tiles(64, 10, 3, "f32")["BLOCK_K"] == 16
    many = tiles(512, 512, 64, "f32", batch=96)  # of a batch there are tiles enough
    assert many["BLOCK_M"] * many["BLOCK_N"] == 128 * 128


@pytest.mark.parametrize("sms", [1, 16, 108, 132, 148, 1000])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64", "i32", "i8", "b1"])
def test_splits_fill_a_gpu_and_leave_no_program_without_work(sms, dtype):
    for m, n, k in ((64, 100, 1000), (512, 256, 50257), (5, 1, 3), (4096, 4096, 4096), (1, 1, 0)):
        chosen = tiles(m, n, k, dtype, sms=sms)
        splits, depth = chosen["SPLITS"], chosen["BLOCK_K"]
        trips = cdiv(k, depth)
        assert cdiv(trips, cdiv(trips, splits)) == splits if k else splits == 1
        assert 1 <= chosen["GROUP"] <= splits
        if splits > 1:
            before = cdiv(m, chosen["BLOCK_M"]) * cdiv(n, chosen["BLOCK_N"])
            assert before < 8 * sms and (sms > 1 or trips > 1)
    assert tiles(64, 100, 1000, dtype, sms=132)["SPLITS"] > 1
    deep = tiles(512, 256, 50257, dtype, sms=sms)
    assert sms < 100 or cdiv(50257, deep["BLOCK_K"] * deep["SPLITS"]) <= 64 or dtype != "f32"


# --- repairs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_round_once_per_operation(dtype):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = torch.randn(1000, generator=torch.Generator().manual_seed(2)).to(dtype)
    out = torch.empty_like(x)
    launch(kernels.half_chain, (4,), x, y, out, 1000, 256)
    assert torch.equal(out, x * y + x)
    launch(kernels.half_direct, (4,), x, y, out, 1000, 256)
    assert torch.equal(out, torch.where(x > y, x * y + x, -x))


def test_nan_in_maximum_and_clamp():
    x = torch.tensor([torch.nan, -3.0, 0.5, 7.0])
    out = torch.empty(3, 4)
    launch(kernels.tie_breaks, (1,), x, out, 4)
    nan = torch.nan
    expected = [[1.0, 1.0, 1.0, 7.0], [nan, 1.0, 1.0, 7.0], [nan, 0.0, 0.5, 1.0]]
    torch.testing.assert_close(out, torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


def test_casts():
    x = torch.tensor([1.9, -1.9, 0.0, torch.nan, torch.inf, -torch.inf, 3e9, 1.00390625])
    ints, bools = torch.empty(8, dtype=torch.int32), torch.empty(8, dtype=torch.bool)
    half = torch.empty(8, dtype=torch.bfloat16)
    launch(kernels.casts, (1,), x, ints, bools, half, 8)
    top = 2**31 - 1
    assert ints.tolist() == [1, -1, 0, 0, top, -top - 1, top, 1]
    assert torch.equal(bools, x > 0)
    expected = torch.where(x > 0, x, -x).to(torch.bfloat16)
    torch.testing.assert_close(half, expected, rtol=0, atol=0, equal_nan=True)


def test_runtime_loop_bound():
    out = torch.empty(1)
    launch(kernels.runtime_range, (1,), out, 5)
    assert out.item() == 10


# --- checks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n, programs", [(1, 1), (5, 1), (1000, 4)])
def test_streams_touch_each_byte_once(n, programs):
    x, y, out = torch.randn(n), torch.randn(n), torch.empty(n)
    accesses = launch(kernels.axpy, (programs,), x, y, out, n, 256, record=True)
    assert torch.equal(out, 2 * x + y)
    assert accesses == {0: (4 * n, 0), 1: (4 * n, 0), 2: (0, 4 * n)}


def test_load_out_of_bounds_raises():
    x, out = torch.randn(1000), torch.empty(1000)
    message = r"out_of_bounds, program \(3, 0, 0\): load of 4 bytes at byte 4000 of buffer 0"
    with pytest.raises(OutOfBoundsAccess, match=message):
        launch(kernels.out_of_bounds, (4,), x, out, 1000, 256)


def test_store_out_of_bounds_raises_before_it_stores():
    out = torch.ones(16)
    with pytest.raises(OutOfBoundsAccess, match="store of 4 bytes"):
        run(kernels.unmasked_store, (1,), (Pointer.of(out), 16), buffers=[(out.data_ptr(), 60)])
    assert torch.equal(out, torch.ones(16))


def test_masked_lanes_are_poisoned():
    out = torch.empty(1)
    launch(kernels.leaks_padding, (1,), torch.ones(8), out, 8, 8)
    assert out.item() == 8
    launch(kernels.leaks_padding, (1,), torch.ones(8), out, 5, 8)
    assert out.isnan().item()


def test_program_order():
    def ranks(**options):
        counter, out = torch.zeros(1, dtype=torch.int32), torch.empty(8, dtype=torch.int32)
        launch(kernels.program_order, (8,), counter, out, **options)
        return out.tolist()

    forward = list(range(8))
    assert ranks(order="forward") == forward
    assert ranks(order="reversed") == forward[::-1]
    assert ranks(seed=1) == ranks(seed=1) != ranks(seed=2)
    assert sorted(ranks(seed=1)) == forward
    with pytest.raises(ValueError, match="order is 'random'"):
        ranks(order="random")


def test_overlapping_buffers_count_apart():
    x, out = torch.randn(100), torch.empty(100)
    buffers = [(t.data_ptr(), t.nbytes) for t in (x, out, out[50:], out[:0])]
    args = (Pointer.of(x), Pointer.of(x), Pointer.of(out), 100, 64)
    accesses = run(kernels.axpy, (2,), args, buffers=buffers, record=True)
    assert accesses == {0: (400, 0), 1: (0, 400), 2: (0, 200), 3: (0, 0)}


def python_without_interpreter(code):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_prepare_sets_the_process_up():
    code = "from tracejit.runtime.interpreter import prepare; prepare(); prepare()"
    assert python_without_interpreter(code).returncode == 0


def test_a_process_that_compiles_cannot_interpret():
    code = "import triton; from tracejit.runtime.interpreter import prepare; prepare()"
    error = python_without_interpreter(code).stderr
    assert "BackendUnavailable" in error and "Set TRITON_INTERPRET=1" in error
