"""A hand-written tiled matmul over a batch; loads and stores are generated functions.

`LOAD_A(bufs, scalars, SIZES, b, rm, rk)` returns a [BLOCK_M, BLOCK_K] tile, 0 outside the matrix;
`LOAD_B(bufs, scalars, SIZES, b, rk, rn)` a [BLOCK_K, BLOCK_N] tile likewise; both of one dtype.
`EPILOGUE(acc, bufs, scalars, workspace, SIZES, b, rm, rn, pid, num_programs)` stores what follows
from the [BLOCK_M, BLOCK_N] accumulator. rm, rn, rk are int32 ranges, `b` is the batch index.
`bufs` is a tuple of pointers, `scalars` an fp64 table of runtime scalars, `workspace` a pointer
for partials and counters, `SIZES` a tuple of ints (strides, extents) those functions index.
The tile sizes come from `tracejit.kernels.tiles`.
"""

import triton
import triton.language as tl


@triton.jit
def matmul(
    bufs,
    scalars,
    workspace,
    SIZES: tl.constexpr,
    LOAD_A: tl.constexpr,
    LOAD_B: tl.constexpr,
    EPILOGUE: tl.constexpr,
    B: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    FIRST=0,
):
    """One program per (batch, tile): acc[ACC] = A @ B over K, then EPILOGUE.

    Grid: B * cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N) programs from number FIRST on. DOT is "tensor"
    (tl.dot with input_precision=PRECISION; BLOCK_K >= 16) or "sum" (multiply and add in ACC, for
    dtypes that tl.dot lacks). ACC is fp32, fp64 or an integer dtype. Tiles go down GROUP_M rows
    before the next column, so that neighbouring programs share their operands in L2.
    """
    TILES_M: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0) - FIRST
    b = pid // (TILES_M * TILES_N)
    tile = pid % (TILES_M * TILES_N)
    group = tile // (GROUP_M * TILES_N)
    rows = tl.minimum(TILES_M - group * GROUP_M, GROUP_M)
    tile = tile % (GROUP_M * TILES_N)
    rm = (group * GROUP_M + tile % rows) * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = (tile // rows) * BLOCK_N + tl.arange(0, BLOCK_N)
    rk = tl.arange(0, BLOCK_K)

    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for k in range(0, K, BLOCK_K):
        a_tile = LOAD_A(bufs, scalars, SIZES, b, rm, k + rk)
        b_tile = LOAD_B(bufs, scalars, SIZES, b, k + rk, rn)
        if DOT == "tensor":
            acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION, out_dtype=ACC)
        else:
            products = a_tile.to(ACC)[:, :, None] * b_tile.to(ACC)[None, :, :]
            acc += tl.sum(products, 1)
    EPILOGUE(acc, bufs, scalars, workspace, SIZES, b, rm, rn, pid, B * TILES_M * TILES_N)
