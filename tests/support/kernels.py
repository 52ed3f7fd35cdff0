"""Triton kernels that the tests run in the interpreter and compile ahead of time."""

import triton
import triton.language as tl
from tracejit.kernels import device as tj
from tracejit.kernels.reduce import collect_max, collect_min, collect_sum, is_last, publish


@triton.jit
def every_float_helper(x_ptr, y_ptr, out_ptr, N: tl.constexpr, BLOCK: tl.constexpr):
    """out[i, :] = helper i of (x, y); the order is that of FLOAT_HELPERS."""
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < N
    x = tl.load(x_ptr + offset, mask=mask)
    y = tl.load(y_ptr + offset, mask=mask)
    tl.store(out_ptr + 0 * N + offset, tj.maximum(x, y), mask=mask)
    tl.store(out_ptr + 1 * N + offset, tj.minimum(x, y), mask=mask)
    tl.store(out_ptr + 2 * N + offset, tj.div(x, y), mask=mask)
    tl.store(out_ptr + 3 * N + offset, tj.reciprocal(x), mask=mask)
    tl.store(out_ptr + 4 * N + offset, tj.sqrt(x), mask=mask)
    tl.store(out_ptr + 5 * N + offset, tj.rsqrt(x), mask=mask)
    tl.store(out_ptr + 6 * N + offset, tj.exp(x), mask=mask)
    tl.store(out_ptr + 7 * N + offset, tj.expm1(x), mask=mask)
    tl.store(out_ptr + 8 * N + offset, tj.log(x), mask=mask)
    tl.store(out_ptr + 9 * N + offset, tj.log1p(x), mask=mask)
    tl.store(out_ptr + 10 * N + offset, tj.tanh(x), mask=mask)
    tl.store(out_ptr + 11 * N + offset, tj.sigmoid(x), mask=mask)
    tl.store(out_ptr + 12 * N + offset, tj.sin(x), mask=mask)
    tl.store(out_ptr + 13 * N + offset, tj.cos(x), mask=mask)
    tl.store(out_ptr + 14 * N + offset, tj.erf(x), mask=mask)
    tl.store(out_ptr + 15 * N + offset, tj.pow(x, y), mask=mask)
    tl.store(out_ptr + 16 * N + offset, tj.floor(x), mask=mask)
    tl.store(out_ptr + 17 * N + offset, tj.abs(x), mask=mask)
    tl.store(out_ptr + 18 * N + offset, tj.sign(x), mask=mask)
    tl.store(out_ptr + 19 * N + offset, tj.floor_div(x, y), mask=mask)
    tl.store(out_ptr + 20 * N + offset, tj.remainder(x, y), mask=mask)
    tl.store(out_ptr + 21 * N + offset, tj.neg(x), mask=mask)


FLOAT_HELPERS = (
    "maximum",
    "minimum",
    "div",
    "reciprocal",
    "sqrt",
    "rsqrt",
    "exp",
    "expm1",
    "log",
    "log1p",
    "tanh",
    "sigmoid",
    "sin",
    "cos",
    "erf",
    "pow",
    "floor",
    "abs",
    "sign",
    "floor_divide",
    "remainder",
    "neg",
)


@triton.jit
def every_int_helper(x_ptr, y_ptr, out_ptr, N: tl.constexpr, BLOCK: tl.constexpr):
    """out[i, :] = helper i of (x, y); the order is that of INT_HELPERS."""
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < N
    x = tl.load(x_ptr + offset, mask=mask, other=1)
    y = tl.load(y_ptr + offset, mask=mask, other=1)
    tl.store(out_ptr + 0 * N + offset, tj.maximum(x, y), mask=mask)
    tl.store(out_ptr + 1 * N + offset, tj.minimum(x, y), mask=mask)
    tl.store(out_ptr + 2 * N + offset, tj.floor_div(x, y), mask=mask)
    tl.store(out_ptr + 3 * N + offset, tj.remainder(x, y), mask=mask)
    tl.store(out_ptr + 4 * N + offset, tj.sign(x), mask=mask)
    tl.store(out_ptr + 5 * N + offset, tj.abs(x), mask=mask)
    tl.store(out_ptr + 6 * N + offset, tj.floor(x), mask=mask)
    tl.store(out_ptr + 7 * N + offset, tj.neg(x), mask=mask)


INT_HELPERS = ("maximum", "minimum", "floor_divide", "remainder", "sign", "abs", "floor", "neg")


@triton.jit
def block_reductions(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """out = max, min, sum of one block."""
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(out_ptr + 0, tj.reduce_max(x))
    tl.store(out_ptr + 1, tj.reduce_min(x))
    tl.store(out_ptr + 2, tj.reduce_sum(x).to(x.dtype))


@triton.jit
def half_chain(x_ptr, y_ptr, out_ptr, N: tl.constexpr, BLOCK: tl.constexpr):
    """out = x * y + x in a half type, rounded once per operation as eager does."""
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < N
    half = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + offset, mask=mask).to(tl.float32)
    y = tl.load(y_ptr + offset, mask=mask).to(tl.float32)
    product = tj.round_to(x * y, half)
    tl.store(out_ptr + offset, (product + x).to(half), mask=mask)


@triton.jit
def half_direct(x_ptr, y_ptr, out_ptr, N: tl.constexpr, BLOCK: tl.constexpr):
    """out = x * y + x with the arithmetic on the half type itself."""
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < N
    x = tl.load(x_ptr + offset, mask=mask)
    y = tl.load(y_ptr + offset, mask=mask)
    tl.store(out_ptr + offset, tl.where(x > y, x * y + x, -x), mask=mask)


@triton.jit
def reduce_all(
    x_ptr,
    out_ptr,
    partials_ptr,
    counter_ptr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM: tl.constexpr,
    FOLD: tl.constexpr,
    KIND: tl.constexpr,
):
    """out[0] = sum, max or min of all of x in one launch of NUM programs."""
    pid = tl.program_id(0)
    offset = pid * BLOCK + tl.arange(0, BLOCK)
    if KIND == "sum":
        x = tl.load(x_ptr + offset, mask=offset < N, other=0)
        partial = tj.reduce_sum(x)
    elif KIND == "max":
        x = tl.load(x_ptr + tl.minimum(offset, N - 1))
        partial = tj.reduce_max(x)
    else:
        x = tl.load(x_ptr + tl.minimum(offset, N - 1))
        partial = tj.reduce_min(x)
    publish(partials_ptr, partial, pid)
    if is_last(counter_ptr, NUM):
        if KIND == "sum":
            tl.store(out_ptr, collect_sum(partials_ptr, NUM, FOLD))
        elif KIND == "max":
            tl.store(out_ptr, collect_max(partials_ptr, NUM, FOLD))
        else:
            tl.store(out_ptr, collect_min(partials_ptr, NUM, FOLD))


# SIZES of the functions below: (M, N, K, then the strides b, row, column of A, B and the output).


@triton.jit
def load_a(bufs, scalars, SIZES, b, rm, rk):
    """A tile of bufs[0], zero outside."""
    mask = (rm[:, None] < SIZES[0]) & (rk[None, :] < SIZES[2])
    offset = b * SIZES[3] + rm[:, None] * SIZES[4] + rk[None, :] * SIZES[5]
    return tl.load(bufs[0] + offset, mask=mask, other=0)


@triton.jit
def load_b(bufs, scalars, SIZES, b, rk, rn):
    """A tile of bufs[1], zero outside."""
    mask = (rk[:, None] < SIZES[2]) & (rn[None, :] < SIZES[1])
    offset = b * SIZES[6] + rk[:, None] * SIZES[7] + rn[None, :] * SIZES[8]
    return tl.load(bufs[1] + offset, mask=mask, other=0)


@triton.jit
def store_tile(acc, bufs, scalars, workspace, SIZES, b, rm, rn, pid, num_programs):
    """bufs[2] = A @ B."""
    mask = (rm[:, None] < SIZES[0]) & (rn[None, :] < SIZES[1])
    offset = b * SIZES[9] + rm[:, None] * SIZES[10] + rn[None, :] * SIZES[11]
    tl.store(bufs[2] + offset, acc.to(bufs[2].dtype.element_ty), mask=mask)


@triton.jit
def update_and_loss(acc, bufs, scalars, workspace, SIZES, b, rm, rn, pid, num_programs):
    """bufs[2] -= lr * relu(A @ B), and bufs[3] = the sum of the new bufs[2], in one launch.

    The counter is the first 4 bytes of the workspace, the partials start after 16 bytes.
    """
    mask = (rm[:, None] < SIZES[0]) & (rn[None, :] < SIZES[1])
    offset = b * SIZES[9] + rm[:, None] * SIZES[10] + rn[None, :] * SIZES[11]
    lr = tl.load(scalars).to(tl.float32)
    old = tl.load(bufs[2] + offset, mask=mask)
    zero = tl.full((), 0.0, tl.float32)
    new = old - lr * tj.maximum(acc, zero)
    tl.store(bufs[2] + offset, new, mask=mask)
    partials = workspace.to(tl.pointer_type(tl.float32)) + 4
    publish(partials, tj.reduce_sum(tl.where(mask, new, 0.0)), pid)
    if is_last(workspace.to(tl.pointer_type(tl.int32)), num_programs):
        tl.store(bufs[3], collect_sum(partials, num_programs, 64))


@triton.jit
def axpy(x_ptr, y_ptr, out_ptr, N: tl.constexpr, BLOCK: tl.constexpr):
    """out = 2 * x + y, contiguous."""
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < N
    x = tl.load(x_ptr + offset, mask=mask)
    y = tl.load(y_ptr + offset, mask=mask)
    tl.store(out_ptr + offset, 2.0 * x + y, mask=mask)


@triton.jit
def strided_copy(x_ptr, out_ptr, N: tl.constexpr, BLOCK: tl.constexpr):
    """Bad on purpose: every access has stride 2, so nothing vectorizes."""
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < N
    tl.store(out_ptr + 2 * offset, tl.load(x_ptr + 2 * offset, mask=mask), mask=mask)


@triton.jit
def out_of_bounds(x_ptr, out_ptr, N: tl.constexpr, BLOCK: tl.constexpr):
    """Bad on purpose: the tail mask is off by one."""
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offset <= N
    tl.store(out_ptr + offset, tl.load(x_ptr + offset, mask=mask), mask=offset < N)


@triton.jit
def unmasked_store(out_ptr, BLOCK: tl.constexpr):
    """Bad on purpose: stores a whole block."""
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32))


@triton.jit
def leaks_padding(x_ptr, out_ptr, N: tl.constexpr, BLOCK: tl.constexpr):
    """Bad on purpose: sums lanes that were masked off without `other`."""
    offset = tl.arange(0, BLOCK)
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + offset, mask=offset < N), 0))


@triton.jit
def program_order(counter_ptr, out_ptr):
    """out[pid] = how many programs ran before."""
    tl.store(out_ptr + tl.program_id(0), tl.atomic_add(counter_ptr, 1))


@triton.jit
def tie_breaks(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Three maxima of x and 1: dropping NaN, propagating NaN, clamped to [0, 1]."""
    offset = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset)
    tl.store(out_ptr + offset, tl.maximum(x, 1.0))
    tl.store(out_ptr + BLOCK + offset, tl.maximum(x, 1.0, propagate_nan=tl.PropagateNan.ALL))
    clamped = tl.clamp(x, 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + 2 * BLOCK + offset, clamped)


@triton.jit
def casts(x_ptr, int_ptr, bool_ptr, half_ptr, BLOCK: tl.constexpr):
    """fp32 to int32, bool and bf16; the bool is read back and selects."""
    offset = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset)
    tl.store(int_ptr + offset, x.to(tl.int32))
    tl.store(bool_ptr + offset, x > 0)
    positive = tl.load(bool_ptr + offset)
    tl.store(half_ptr + offset, tl.where(positive, x, -x).to(tl.bfloat16))


@triton.jit
def runtime_range(out_ptr, n):
    """out = 0 + 1 + ... + (n - 1), with a runtime bound; and fma."""
    total = tl.zeros([1], tl.float32)
    for i in range(n):
        total = tl.fma(total, 1.0, (i + tl.zeros([1], tl.int32)).to(tl.float32))
    tl.store(out_ptr + tl.arange(0, 1), total)
