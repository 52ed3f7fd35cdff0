"""Numerics of PyTorch as Triton device functions; generated code imports this as `tj`.

Operands are tensors (blocks or scalars) of one dtype: fp32, fp64, or integers where it says so.
Half types are computed in fp32 by the caller and rounded with `round_to`. Literals become typed
scalars first: `tl.full((), value, dtype)`. Built for `enable_fp_fusion=False`.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

# --- element-wise -----------------------------------------------------------------------------


@triton.jit
def maximum(x, y):
    """max(x, y) of floats or integers; NaN if either is NaN."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(x, y):
    """min(x, y) of floats or integers; NaN if either is NaN."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def div(x, y):
    """x / y of floats, correctly rounded."""
    if x.dtype == tl.float64:
        return x / y  # already correctly rounded; tl.div_rn takes fp32 only
    else:
        return tl.div_rn(x, y)


@triton.jit
def reciprocal(x):
    """1 / x of floats, correctly rounded."""
    return div(tl.full(x.shape, 1.0, x.dtype), x)


@triton.jit
def sqrt(x):
    """Square root of floats, correctly rounded."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)  # already correctly rounded; tl.sqrt_rn takes fp32 only
    else:
        return tl.sqrt_rn(x)


@triton.jit
def rsqrt(x):
    """1 / sqrt(x) of floats, within 2 ulp."""
    return libdevice.rsqrt(x)


@triton.jit
def exp(x):
    """Natural exponential of floats."""
    return libdevice.exp(x)


@triton.jit
def expm1(x):
    """exp(x) - 1 of floats without cancellation near 0."""
    return libdevice.expm1(x)


@triton.jit
def log(x):
    """Natural logarithm of floats."""
    return libdevice.log(x)


@triton.jit
def log1p(x):
    """log(1 + x) of floats without cancellation near 0."""
    return libdevice.log1p(x)


@triton.jit
def tanh(x):
    """Hyperbolic tangent of floats."""
    return libdevice.tanh(x)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) of floats."""
    return reciprocal(1.0 + libdevice.exp(-x))


@triton.jit
def sin(x):
    """Sine of floats, with full argument reduction."""
    return libdevice.sin(x)


@triton.jit
def cos(x):
    """Cosine of floats, with full argument reduction."""
    return libdevice.cos(x)


@triton.jit
def erf(x):
    """Error function of floats."""
    return libdevice.erf(x)


@triton.jit
def erfc(x):
    """1 - erf(x) of floats without cancellation."""
    return libdevice.erfc(x)


@triton.jit
def round(x):
    """The nearest integer of floats, the even one at a tie."""
    return libdevice.rint(x)


@triton.jit
def copysign(x, y):
    """|x| with the sign of y, of floats."""
    return libdevice.copysign(x, y)


@triton.jit
def atan2(y, x):
    """The angle of the point (x, y), of floats, with C's special cases."""
    return libdevice.atan2(y, x)


@triton.jit
def nextafter(x, y):
    """The next number after x in the direction of y, of floats."""
    return libdevice.nextafter(x, y)


@triton.jit
def gcd(x, y):
    """The greatest common divisor of integers, by Euclid's algorithm: 93 steps are the most that
    64 bits take."""
    a, b = tl.abs(x), tl.abs(y)
    for _ in range(93):
        left = b != 0
        rest = tl.where(left, a % tl.where(left, b, 1), 0)
        a = tl.where(left, b, a)
        b = rest
    return a


@triton.jit
def fmod(x, y):
    """The remainder of x / y truncated, which has the sign of x: floats and integers."""
    if x.dtype.is_floating():
        return libdevice.fmod(x, y)
    else:
        return x % y


@triton.jit
def pow(x, y):
    """x to the power y of floats, with C's special cases."""
    return libdevice.pow(x, y)


@triton.jit
def pow_int(x, y):
    """x to the power y of integers, wrapping around; for y < 0 it is 1 / x^-y, truncated."""
    result = (x ^ x) + (y ^ y) + 1
    base, rest = x, y
    for _ in range(x.dtype.primitive_bitwidth):
        result = tl.where((rest & 1) == 1, result * base, result)
        base = base * base
        rest = rest >> 1
    odd = tl.where((y & 1) == 1, x, x * x)
    return tl.where(y < 0, tl.where(tl.abs(x) == 1, odd, 0), result)


@triton.jit
def floor(x):
    """Largest integer not above x; the identity on integers."""
    if x.dtype.is_floating():
        return tl.floor(x)
    else:
        return x


@triton.jit
def abs(x):
    """|x| of floats or integers."""
    return tl.abs(x)


@triton.jit
def neg(x):
    """-x of floats or integers; Triton's -x is 0 - x before 3.9, which loses the sign of -0.0."""
    if x.dtype.is_floating():
        return x * -1.0
    else:
        return -x


@triton.jit
def sign(x):
    """-1, 0 or 1 in x's dtype; 0 for NaN, as torch.sign."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def floor_div(x, y):
    """Python's x // y: floats as torch.floor_divide rounds them, integers exactly."""
    if x.dtype.is_floating():
        # c10::div_floor_floating: exact remainder first, so that the quotient is near an integer.
        rest = libdevice.fmod(x, y)
        quotient = div(x - rest, y)
        quotient = tl.where((rest != 0) & ((y < 0) != (rest < 0)), quotient - 1.0, quotient)
        floored = tl.floor(quotient)
        floored = tl.where(quotient - floored > 0.5, floored + 1.0, floored)
        exact = div(x, y)
        zero = libdevice.copysign(exact - exact, exact)  # a literal -0.0 would lose its sign
        return tl.where(y == 0, exact, tl.where(quotient != 0, floored, zero))
    else:
        quotient = x // y
        return quotient - ((x - quotient * y != 0) & ((x < 0) != (y < 0))).to(x.dtype)


@triton.jit
def remainder(x, y):
    """Python's x % y, which has the sign of y: floats and integers."""
    if x.dtype.is_floating():
        rest = libdevice.fmod(x, y)
        return tl.where((rest != 0) & ((y < 0) != (rest < 0)), rest + y, rest)
    else:
        rest = x % y
        return tl.where((rest != 0) & ((y < 0) != (rest < 0)), rest + y, rest)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """fp32 rounded to the values of a half type (nearest even), still as fp32."""
    return x.to(dtype).to(tl.float32)


@triton.jit
def philox(counter, key):
    """31 random bits, as int64, of a counter and a key of 64 bits: Philox2x32-10."""
    left = counter.to(tl.uint32)
    right = (counter >> 32).to(tl.uint32) ^ (key >> 32).to(tl.uint32)
    k = key.to(tl.uint32)
    for _ in tl.static_range(10):
        product = left.to(tl.uint64) * 0xD256D193
        left = (product >> 32).to(tl.uint32) ^ k ^ right
        right = product.to(tl.uint32)
        k = k + tl.full((), 0x9E3779B9, tl.uint32)
    return (left >> 1).to(tl.int64)


# --- reductions of a block --------------------------------------------------------------------


@triton.jit
def reduce_max(x, axis: tl.constexpr = None):
    """Maximum along an axis (all elements if None), NaN if any is NaN; tl.max would drop NaN."""
    return tl.reduce(x, axis, maximum)


@triton.jit
def reduce_min(x, axis: tl.constexpr = None):
    """Minimum along an axis (all elements if None), NaN if any is NaN; tl.min would drop NaN."""
    return tl.reduce(x, axis, minimum)


@triton.jit
def reduce_sum(x, axis: tl.constexpr = None):
    """Sum along an axis (all elements if None); integers and bools are summed as int64."""
    if x.dtype.is_floating():
        return tl.sum(x, axis)
    else:
        return tl.sum(x.to(tl.int64), axis)


@triton.jit
def stands_before(a, b, earlier, DESCENDING: tl.constexpr):
    """Whether a comes before b in order; `earlier`: where they are equal. NaN is the largest."""
    if DESCENDING:
        less = (a > b) | ((a != a) & (b == b))
    else:
        less = (a < b) | ((b != b) & (a == a))
    same = (a == b) | ((a != a) & (b != b))
    return less | (same & earlier)
