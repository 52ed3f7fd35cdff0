"""A hand-written tiled matmul over a batch; loads and stores are generated functions.

`LOAD_A(bufs, scalars, SIZES, b, rm, rk)` returns a [BLOCK_M, BLOCK_K] tile, 0 outside the matrix;
`LOAD_B(bufs, scalars, SIZES, b, rk, rn)` a [BLOCK_K, BLOCK_N] tile likewise; both of one dtype.
`EPILOGUE(acc, bufs, scalars, workspace, SIZES, b, rm, rn, tile, num_tiles)` stores what follows
from the [BLOCK_M, BLOCK_N] accumulator. rm, rn, rk are int32 ranges, `b` is the batch index.
`bufs` is a tuple of pointers, `scalars` an fp64 table of runtime scalars, `workspace` a pointer
for partials and counters, `SIZES` a tuple of ints (strides, extents) those functions index.
The tile sizes and splits come from `tracejit.kernels.tiles`.
"""

import triton
import triton.language as tl
from tracejit.kernels.reduce import fold_tiles, is_last


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
    SPLITS: tl.constexpr = 1,
    GROUP: tl.constexpr = 1,
    COUNTERS: tl.constexpr = 0,
    PARTIALS: tl.constexpr = 0,
    PIECES: tl.constexpr = 1,
    FIRST=0,
):
    """One program per (batch, split, tile): acc[ACC] = A @ B over its K, then EPILOGUE.

    Grid: B * SPLITS * cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N) programs from number FIRST on. DOT is
    "tensor" (tl.dot with input_precision=PRECISION; BLOCK_K >= 16) or "sum" (multiply and add in
    ACC, for dtypes that tl.dot lacks). ACC is fp32, fp64 or an integer dtype. Tiles go down GROUP_M
    rows before the next column, so that neighbouring programs share their operands in L2.

    With SPLITS each program of a tile takes a stretch of K. Partial tiles lie in the workspace from
    byte PARTIALS on. The last of GROUP neighbours adds up theirs in order, and the last of all
    groups their sums: the same sums whatever order programs ran in. int32 counters lie from byte
    COUNTERS on: (groups + 1) a tile, 0 before and after each launch.

    BLOCK_N is a power of two, or three quarters of one: then a tile has two accumulators, one of
    them twice as wide as the other, and is not split. So 768 columns are four tiles.

    EPILOGUE is called for each of PIECES (1, 2 or 4) stretches of an accumulator's columns, one
    after another: what it computes takes registers beside the whole accumulator.
    """
    TILES_M: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    TILES: tl.constexpr = TILES_M * TILES_N
    STEPS: tl.constexpr = (K + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS)
    pid = tl.program_id(0) - FIRST
    b = pid // (TILES * SPLITS)
    split = pid // TILES % SPLITS
    number = b * TILES + pid % TILES
    tile = pid % TILES
    group = tile // (GROUP_M * TILES_N)
    rows = tl.minimum(TILES_M - group * GROUP_M, GROUP_M)
    tile = tile % (GROUP_M * TILES_N)
    rm = (group * GROUP_M + tile % rows) * BLOCK_M + tl.arange(0, BLOCK_M)
    cn = (tile // rows) * BLOCK_N
    RIGHT: tl.constexpr = BLOCK_N // 3 if BLOCK_N % 3 == 0 else 0
    LEFT: tl.constexpr = BLOCK_N - RIGHT
    rn = cn + tl.arange(0, LEFT)
    rk = split * (STEPS * BLOCK_K) + tl.arange(0, BLOCK_K)
    depth = STEPS * BLOCK_K
    if (SPLITS > 1) & (K % (BLOCK_K * SPLITS) != 0):
        depth = tl.minimum(depth, K - split * depth)  # the last stretch is short

    acc = tl.zeros([BLOCK_M, LEFT], ACC)
    if RIGHT > 0:
        right = tl.zeros([BLOCK_M, RIGHT], ACC)
        rr = cn + LEFT + tl.arange(0, RIGHT)
    for k in range(0, depth, BLOCK_K):
        a_tile = LOAD_A(bufs, scalars, SIZES, b, rm, k + rk)
        b_tile = LOAD_B(bufs, scalars, SIZES, b, k + rk, rn)
        if DOT == "tensor":
            acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION, out_dtype=ACC)
        else:
            products = a_tile.to(ACC)[:, :, None] * b_tile.to(ACC)[None, :, :]
            acc += tl.sum(products, 1)
        if RIGHT > 0:
            b_tile = LOAD_B(bufs, scalars, SIZES, b, k + rk, rr)
            right = tl.dot(a_tile, b_tile, right, input_precision=PRECISION, out_dtype=ACC)
    if RIGHT > 0:
        number, many = 2 * number, 2 * B * TILES
        finish(acc, bufs, scalars, workspace, SIZES, EPILOGUE, b, rm, cn, number, many, PIECES)
        number, cn = number + 1, cn + LEFT
        finish(right, bufs, scalars, workspace, SIZES, EPILOGUE, b, rm, cn, number, many, PIECES)
    elif SPLITS == 1:
        finish(acc, bufs, scalars, workspace, SIZES, EPILOGUE, b, rm, cn, number, B * TILES, PIECES)
    else:
        SIZE: tl.constexpr = BLOCK_M * BLOCK_N
        GROUPS: tl.constexpr = (SPLITS + GROUP - 1) // GROUP
        place = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        # 64-bit, as the workspace may be large
        partials = (workspace + PARTIALS).to(tl.pointer_type(ACC)) + place
        partials += number.to(tl.int64) * (SPLITS * SIZE)
        counters = (workspace + COUNTERS).to(tl.pointer_type(tl.int32)) + number * (GROUPS + 1)
        mine = split // GROUP
        tl.store(partials + split * SIZE, acc)
        count = tl.minimum(SPLITS - mine * GROUP, GROUP)
        if is_last(counters + mine, count):
            acc = fold_tiles(partials + mine * GROUP * SIZE, count, GROUP, SIZE)
            if GROUPS == 1:
                finish(
                    acc, bufs, scalars, workspace, SIZES, EPILOGUE, b, rm, cn, number, B * TILES,
                    PIECES,
                )  # fmt: skip
            else:
                tl.store(partials + mine * GROUP * SIZE, acc)
                if is_last(counters + GROUPS, GROUPS):
                    acc = fold_tiles(partials, GROUPS, GROUPS, GROUP * SIZE)
                    finish(
                        acc, bufs, scalars, workspace, SIZES, EPILOGUE, b, rm, cn, number,
                        B * TILES, PIECES,
                    )  # fmt: skip


@triton.jit
def finish(
    acc,
    bufs,
    scalars,
    workspace,
    SIZES: tl.constexpr,
    EPILOGUE: tl.constexpr,
    b,
    rm,
    first,
    tile,
    tiles,
    PIECES: tl.constexpr,
):
    """Call EPILOGUE for each of PIECES stretches of a tile's columns; `first` is its first one."""
    N: tl.constexpr = acc.shape[1]
    if PIECES == 1:
        rn = first + tl.arange(0, N)
        EPILOGUE(acc, bufs, scalars, workspace, SIZES, b, rm, rn, tile, tiles)
    else:
        M: tl.constexpr = acc.shape[0]
        LESS: tl.constexpr = PIECES // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, [M, 2, N // 2]), (0, 2, 1)))
        number, many = 2 * tile, 2 * tiles
        finish(left, bufs, scalars, workspace, SIZES, EPILOGUE, b, rm, first, number, many, LESS)
        first, number = first + N // 2, number + 1
        finish(right, bufs, scalars, workspace, SIZES, EPILOGUE, b, rm, first, number, many, LESS)
