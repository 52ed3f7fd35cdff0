"""Hand-written attention that stores no scores; loads, scores and stores are generated functions.

`LOAD_X(bufs, scalars, SIZES, b, rows, columns)` returns a tile of q, k, v or g, 0 outside;
`LOAD_LSE` and `LOAD_DELTA(bufs, scalars, SIZES, b, rm)` a number of each query, 0 outside.
`SCORE(s, bufs, scalars, SIZES, b, rm, rn)` gives the scores of scaled products: with their bias,
and -inf where a key does not exist or is hidden.
`NOISE(bufs, scalars, SIZES, b, rm, rn)` gives what weights are multiplied by, or is None.
`STORE(acc, bufs, scalars, SIZES, b, rows, columns)` stores a tile of a result, or is None.
b is the batch; bufs, scalars and SIZES are as for `tracejit.kernels.matmul`. DOT is "tensor" or
"sum" as there, ACC the type that is computed in, OPERAND that of the operands in memory.
The formulas stand in `tracejit/ir/ops/attention.py`.
"""

import triton
import triton.language as tl
from tracejit.kernels import device as tj


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr):
    """acc + a @ b."""
    if DOT == "tensor":
        return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
    else:
        return acc + tl.sum(a.to(ACC)[:, :, None] * b.to(ACC)[None, :, :], 1)


@triton.jit
def _power(x, OPERAND: tl.constexpr):
    """e to the x, which is at most 0. Of half types by the hardware's approximation, which is right
    to 19 bits where the result is more than 2 ** -24: weights are rounded to 11 bits at most."""
    if tl.bfloat16 == OPERAND or tl.float16 == OPERAND:
        return tl.exp(x)
    else:
        return tj.exp(x)


@triton.jit
def _slopes(
    p,
    left,
    g,
    v,
    delta,
    NOISE: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """The cotangents of a block's scaled products, of which the weights are p, and `left` of these
    what noise leaves."""
    zero = tl.zeros([g.shape[0], v.shape[0]], ACC)
    mixed = _dot(g, tl.trans(v), zero, PRECISION, DOT, ACC)
    if NOISE is not None:
        return (left * mixed - p * delta[:, None]) * SCALE
    else:
        return p * (mixed - delta[:, None]) * SCALE


@triton.jit
def attend_forward(
    bufs,
    scalars,
    SIZES: tl.constexpr,
    LOAD_Q: tl.constexpr,
    LOAD_K: tl.constexpr,
    LOAD_V: tl.constexpr,
    SCORE: tl.constexpr,
    NOISE: tl.constexpr,
    STORE: tl.constexpr,
    STORE_LSE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    OPERAND: tl.constexpr,
    FIRST=0,
):
    """One program per (batch, block of queries): it walks the keys that these see, with the maximum
    and the sum of each row so far. The queries that see most come first."""
    TILES: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0) - FIRST
    b = pid // TILES
    tile = TILES - 1 - pid % TILES
    rm = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rc = tl.arange(0, BLOCK_C)
    rd = tl.arange(0, BLOCK_D)
    q = LOAD_Q(bufs, scalars, SIZES, b, rm, rc)
    top = tl.full([BLOCK_M], float("-inf"), ACC)
    total = tl.zeros([BLOCK_M], ACC)
    acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    end = tl.minimum(N, (tile + 1) * BLOCK_M) if CAUSAL else N
    for n in range(0, end, BLOCK_N):
        rn = n + tl.arange(0, BLOCK_N)
        k = LOAD_K(bufs, scalars, SIZES, b, rn, rc)
        s = _dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], ACC), PRECISION, DOT, ACC)
        s = SCORE(s * SCALE, bufs, scalars, SIZES, b, rm, rn)
        new = tl.maximum(top, tl.max(s, 1))  # a NaN is no maximum, but each power of its row
        base = tl.where(new == float("-inf"), 0.0, new)
        p = _power(s - base[:, None], OPERAND)
        less = _power(top - base, OPERAND)
        total = total * less + tl.sum(p, 1)
        if STORE is not None:
            v = LOAD_V(bufs, scalars, SIZES, b, rn, rd)
            if NOISE is not None:
                p = p * NOISE(bufs, scalars, SIZES, b, rm, rn)
            acc = _dot(p.to(OPERAND), v, acc * less[:, None], PRECISION, DOT, ACC)
        top = new
    total = tl.where(total == 0.0, 1.0, total)
    if STORE is not None:
        STORE(tj.div(acc, total[:, None]), bufs, scalars, SIZES, b, rm, rd)
    if STORE_LSE is not None:
        lse = tl.where(top == float("-inf"), 0.0, top) + tj.log(total)
        STORE_LSE(lse, bufs, scalars, SIZES, b, rm)


@triton.jit
def attend_gradients(
    bufs,
    scalars,
    SIZES: tl.constexpr,
    LOAD_Q: tl.constexpr,
    LOAD_K: tl.constexpr,
    LOAD_V: tl.constexpr,
    SCORE: tl.constexpr,
    NOISE: tl.constexpr,
    LOAD_LSE: tl.constexpr,
    LOAD_DELTA: tl.constexpr,
    LOAD_G: tl.constexpr,
    STORE_DQ: tl.constexpr,
    STORE_DK: tl.constexpr,
    STORE_DV: tl.constexpr,
    B: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    OPERAND: tl.constexpr,
    FIRST=0,
):
    """One program per (batch, block of keys) for dk and dv, then one per (batch, block of queries)
    for dq, as far as they are stored. Each walks the other's blocks: all sums have one order."""
    KEYS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    QUERIES: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    OF_KEYS: tl.constexpr = B * KEYS if STORE_DK is not None or STORE_DV is not None else 0
    pid = tl.program_id(0) - FIRST
    rc = tl.arange(0, BLOCK_C)
    rd = tl.arange(0, BLOCK_D)
    if pid < OF_KEYS:
        if STORE_DK is not None or STORE_DV is not None:
            b = pid // KEYS
            first = (pid % KEYS) * BLOCK_N
            rn = first + tl.arange(0, BLOCK_N)
            k = LOAD_K(bufs, scalars, SIZES, b, rn, rc)
            if STORE_DK is not None:
                v = LOAD_V(bufs, scalars, SIZES, b, rn, rd)
            dk = tl.zeros([BLOCK_N, BLOCK_C], ACC)
            dv = tl.zeros([BLOCK_N, BLOCK_D], ACC)
            start = first // BLOCK_M * BLOCK_M if CAUSAL else 0
            for m in range(start, M, BLOCK_M):
                rm = m + tl.arange(0, BLOCK_M)
                q = LOAD_Q(bufs, scalars, SIZES, b, rm, rc)
                lse = LOAD_LSE(bufs, scalars, SIZES, b, rm)
                s = _dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], ACC), PRECISION, DOT, ACC)
                s = SCORE(s * SCALE, bufs, scalars, SIZES, b, rm, rn)
                p = _power(s - lse[:, None], OPERAND)
                g = LOAD_G(bufs, scalars, SIZES, b, rm, rd)
                left = p
                if NOISE is not None:
                    left = p * NOISE(bufs, scalars, SIZES, b, rm, rn)
                if STORE_DV is not None:
                    dv = _dot(tl.trans(left.to(OPERAND)), g, dv, PRECISION, DOT, ACC)
                if STORE_DK is not None:
                    delta = LOAD_DELTA(bufs, scalars, SIZES, b, rm)
                    slopes = _slopes(p, left, g, v, delta, NOISE, SCALE, PRECISION, DOT, ACC)
                    dk = _dot(tl.trans(slopes.to(OPERAND)), q, dk, PRECISION, DOT, ACC)
            if STORE_DK is not None:
                STORE_DK(dk, bufs, scalars, SIZES, b, rn, rc)
            if STORE_DV is not None:
                STORE_DV(dv, bufs, scalars, SIZES, b, rn, rd)
    else:
        if STORE_DQ is not None:
            b = (pid - OF_KEYS) // QUERIES
            tile = QUERIES - 1 - (pid - OF_KEYS) % QUERIES
            rm = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            q = LOAD_Q(bufs, scalars, SIZES, b, rm, rc)
            g = LOAD_G(bufs, scalars, SIZES, b, rm, rd)
            lse = LOAD_LSE(bufs, scalars, SIZES, b, rm)
            delta = LOAD_DELTA(bufs, scalars, SIZES, b, rm)
            dq = tl.zeros([BLOCK_M, BLOCK_C], ACC)
            end = tl.minimum(N, (tile + 1) * BLOCK_M) if CAUSAL else N
            for n in range(0, end, BLOCK_N):
                rn = n + tl.arange(0, BLOCK_N)
                k = LOAD_K(bufs, scalars, SIZES, b, rn, rc)
                s = _dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], ACC), PRECISION, DOT, ACC)
                s = SCORE(s * SCALE, bufs, scalars, SIZES, b, rm, rn)
                p = _power(s - lse[:, None], OPERAND)
                v = LOAD_V(bufs, scalars, SIZES, b, rn, rd)
                left = p
                if NOISE is not None:
                    left = p * NOISE(bufs, scalars, SIZES, b, rm, rn)
                slopes = _slopes(p, left, g, v, delta, NOISE, SCALE, PRECISION, DOT, ACC)
                dq = _dot(slopes.to(OPERAND), k, dq, PRECISION, DOT, ACC)
            STORE_DQ(dq, bufs, scalars, SIZES, b, rm, rc)
