"""What generated C programs start with: the functions that C templates call, types, flags.

Integer functions take any integer operands as int64; assigning their result to the narrower type
wraps as numpy does.

The float32 functions are branch-free, so that the compiler turns a loop of them into vector code:
they compute in double, where range reduction and a short polynomial leave errors far below half a
unit of the float result, and round once. `exp`, which softmax and cross-entropy live on, computes
in float with the worst rounding error carried along, which is five times as fast and at most 0.92
units off. The float64 ones are those of libm.
"""

from __future__ import annotations

import math
import re

from tracejit.codegen.c_moves import KEYS, SORTS, STREAM

C_TYPES = {
    "f64": "double",
    "f32": "float",
    "f16": "float",
    "bf16": "float",
    "i64": "int64_t",
    "i32": "int32_t",
    "i16": "int16_t",
    "i8": "int8_t",
    "u8": "uint8_t",
    "b1": "bool",
}

# Signed integers wrap; a * b + c rounds twice, as two eager operations do.
C_FLAGS = ("-fwrapv", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")

C_HEADER = """\
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
"""

_REMAINDER = """
/* Floor division: the exact remainder first, so that the quotient is near an integer. */
static inline {T} tj_floordiv{f}({T} a, {T} b) {
  if (b == 0) return a / b;
  {T} rest = fmod{f}(a, b);
  {T} quotient = (a - rest) / b;
  if (rest != 0 && (b < 0) != (rest < 0)) quotient -= 1;
  if (quotient == 0) return copysign{f}(0, a / b);
  {T} floored = floor{f}(quotient);
  return quotient - floored > ({T})0.5 ? floored + 1 : floored;
}

/* Remainder with the sign of the divisor; a zero keeps the sign of the dividend. */
static inline {T} tj_mod{f}({T} a, {T} b) {
  {T} rest = fmod{f}(a, b);
  return rest != 0 && (b < 0) != (rest < 0) ? rest + b : rest;
}
"""

_INTEGER = """
/* Floor division and remainder of integers; 0 where the divisor is 0. */
static inline int64_t tj_floordiv_int(int64_t a, int64_t b) {
  if (b == 0) return 0;
  if (b == -1) return -a; /* INT64_MIN / -1 traps */
  return a / b - (a % b != 0 && (a < 0) != (b < 0));
}

static inline int64_t tj_mod_int(int64_t a, int64_t b) {
  if (b == 0 || b == -1) return 0;
  int64_t rest = a % b;
  return rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
}

/* The remainder of truncated division; 0 where the divisor is 0. */
static inline int64_t tj_fmod_int(int64_t a, int64_t b) {
  return b == 0 || b == -1 ? 0 : a % b;
}

/* The greatest common divisor, by Euclid's algorithm. */
static inline int64_t tj_gcd(int64_t a, int64_t b) {
  a = a < 0 ? -a : a;
  b = b < 0 ? -b : b;
  while (b) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

/* Integer power by squaring; a negative power is 1 / a^-b truncated, 0 for a = 0. */
static inline int64_t tj_pow_int(int64_t a, int64_t b) {
  if (b < 0) return a == 1 ? 1 : a == -1 ? (b & 1 ? -1 : 1) : 0;
  int64_t power = 1;
  for (; b > 0; b >>= 1, a *= a)
    if (b & 1) power *= a;
  return power;
}

/* Shifts by the width or more, or by less than 0, shift everything out. */
static inline int64_t tj_shl(int64_t a, int64_t b) {
  return b < 0 || b > 63 ? 0 : (int64_t)((uint64_t)a << b);
}

static inline int64_t tj_shr(int64_t a, int64_t b) {
  return a >> (b < 0 || b > 63 ? 63 : b);
}

/* 31 random bits: Philox2x32-10. */
static inline int64_t tj_philox(int64_t counter, int64_t key) {
  uint32_t left = (uint32_t)counter, k = (uint32_t)key;
  uint32_t right = (uint32_t)((uint64_t)counter >> 32) ^ (uint32_t)((uint64_t)key >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; round++) {
    const uint64_t product = (uint64_t)left * 0xd256d193u;
    left = (uint32_t)(product >> 32) ^ k ^ right;
    right = (uint32_t)product;
    k += 0x9e3779b9u;
  }
  return left >> 1;
}
"""

_BITS = """
/* The bits of a number, and back. */
static inline uint32_t tj_bits_f32(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

static inline float tj_f32_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

static inline uint64_t tj_bits_f64(double x) {
  uint64_t bits;
  memcpy(&bits, &x, 8);
  return bits;
}

static inline double tj_f64_of(uint64_t bits) {
  double x;
  memcpy(&x, &bits, 8);
  return x;
}
"""

_FMA = """
/* a * b + c, rounded once where the CPU does that in one instruction. */
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__FP_FAST_FMAF)
#define tj_fma __builtin_fma
#define tj_fmaf __builtin_fmaf
#else
#define tj_fma(a, b, c) ((a) * (b) + (c))
#define tj_fmaf(a, b, c) ((a) * (b) + (c))
#endif
"""

# gcc takes the float of an integer of a float for a rounding of the float: -0.3 becomes -0, and
# what the integer cannot hold stays as it is (the C standard leaves that undefined). So it may not
# know that `tj_nothing` is zero. Test: test_casts_as_eager in tests/test_c_executor.py.
_CONVERT = """
/* Floats to integers, as x86 does it: toward zero, and the least integer for what is out of range
   and for NaN. Narrower integers are the low bits of one of 32 bits, uint8 of a double of 64. */
__attribute__((weak, visibility("hidden"))) uint32_t tj_nothing;

static inline int32_t tj_intf(float x) {
  int32_t whole = x >= -0x1p31f && x < 0x1p31f ? (int32_t)x : INT32_MIN;
  return whole ^ (int32_t)tj_nothing;
}

static inline int32_t tj_int(double x) {
  int32_t whole = x >= -0x1p31 && x < 0x1p31 ? (int32_t)x : INT32_MIN;
  return whole ^ (int32_t)tj_nothing;
}

static inline int64_t tj_longf(float x) {
  int64_t whole = x >= -0x1p63f && x < 0x1p63f ? (int64_t)x : INT64_MIN;
  return whole ^ (int64_t)tj_nothing;
}

static inline int64_t tj_long(double x) {
  int64_t whole = x >= -0x1p63 && x < 0x1p63 ? (int64_t)x : INT64_MIN;
  return whole ^ (int64_t)tj_nothing;
}

static inline uint8_t tj_bytef(float x) { return (uint8_t)tj_intf(x); }
static inline uint8_t tj_byte(double x) { return (uint8_t)tj_long(x); }
"""

_NARROW = """
/* bf16 and f16 in memory, and floats rounded to them (nearest even, a NaN stays one). */
static inline float tj_load_bf16(uint16_t bits) {
  return tj_f32_of((uint32_t)bits << 16);
}

static inline uint16_t tj_store_bf16(float x) {
  uint32_t bits = tj_bits_f32(x);
  uint32_t rounded = (bits + (((bits >> 16) & 1) + 0x7fffu)) >> 16;
  return (uint16_t)(x != x ? 0x7fc0u : rounded);
}

static inline float tj_round_bf16(float x) {
  uint32_t bits = tj_bits_f32(x);
  uint32_t rounded = (bits + (((bits >> 16) & 1) + 0x7fffu)) & 0xffff0000u;
  return tj_f32_of(x != x ? 0x7fc00000u : rounded);
}

static inline float tj_load_f16(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = (uint32_t)(half & 0x7fff) << 13;
  float x = tj_f32_of(rest) * 0x1p112f; /* also right for subnormals */
  uint32_t special = tj_bits_f32(x) | 0x7f800000u; /* infinities and NaN */
  return tj_f32_of(sign | (rest >= 0x0f800000u ? special : tj_bits_f32(x)));
}

static inline float tj_round_f16(float x) {
  float size = fabsf(x);
  /* Adding and subtracting 2^13 ulp of the float rounds to the 10 bits of a half; below the
     smallest normal half the steps are those of 2^-14. */
  uint32_t exponent = tj_bits_f32(size < 0x1p-14f ? 0x1p-14f : size) & 0x7f800000u;
  float step = tj_f32_of(exponent) * 0x1.8p13f;
  float rounded = size >= 65520.0f ? INFINITY : (size + step) - step;
  return copysignf(x != x ? x : rounded, x);
}

static inline uint16_t tj_store_f16(float x) {
  float rounded = tj_round_f16(x);
  uint32_t bits = tj_bits_f32(rounded), sign = bits >> 16 & 0x8000u;
  uint32_t finite = tj_bits_f32(fabsf(rounded) * 0x1p-112f) >> 13;
  uint32_t special = x != x ? 0x7e00u : 0x7c00u;
  return (uint16_t)(sign | (fabsf(rounded) < 65520.0f ? finite : special));
}
"""


def _polynomial(variable: str, coefficients: list[float]) -> str:
    """A polynomial by Horner's rule, lowest coefficient first."""
    text = repr(coefficients[-1])
    for c in reversed(coefficients[:-1]):
        text = f"tj_fma({variable}, {text}, {c!r})"
    return text


_EXP_TERMS = [1 / math.factorial(k) for k in range(10)]
_ERF_TERMS = [
    2 / math.sqrt(math.pi) * (-1) ** k / (math.factorial(k) * (2 * k + 1)) for k in range(13)
]
_ERFC_TERMS = [-1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806]
_ERFC_TERMS += [0.27886807, -1.13520398, 1.48851587, -0.82215223, 0.17087277]
_LOG_TERMS = [2 / (2 * k + 1) for k in range(9)]
_ATAN_TERMS = [(-1) ** k / (2 * k + 1) for k in range(13)]
_SIN_TERMS = [(-1) ** k / math.factorial(2 * k + 1) for k in range(7)]
_COS_TERMS = [(-1) ** k / math.factorial(2 * k) for k in range(8)]

_EXP = f"""
/* e^z of a double in -700 … 700: 2^n · e^r with |r| <= log(2) / 2, by e^r's Taylor series. */
static inline double tj_exp_core(double z) {{
  double shifted = z * {1 / math.log(2)!r} + 0x1.8p52; /* n in the low bits */
  double n = shifted - 0x1.8p52;
  double r = z - n * 0x1.62e42fefa0000p-1 - n * 0x1.cf79abc9e3b3ap-40;
  double power = {_polynomial("r", _EXP_TERMS)};
  return tj_f64_of(tj_bits_f64(power) + (tj_bits_f64(shifted) << 52));
}}

/* The same in float: 2^n · (1 + r + r² · q(r)); `lost` is what the rounding of r leaves out. The
   low bits of `shifted` are n + 254, and 2^n is applied as two halves, as the result may be
   subnormal. The limits are written so that one comparison does both. */
static inline float tj_expf(float x) {{
  float z = fabsf(x) > 105.0f ? copysignf(105.0f, x) : x;
  float shifted = tj_fmaf(z, 0x1.715476p+0f, 0x1.8001fcp23f), n = shifted - 0x1.8001fcp23f;
  float less = tj_fmaf(n, -0x1.62e4p-1f, z); /* exact: n · 0x1.62e4 has few bits */
  float r = tj_fmaf(n, -0x1.7f7d1cp-20f, less);
  float lost = tj_fmaf(n, -0x1.7f7d1cp-20f, less - r);
  float q = tj_fmaf(r, tj_fmaf(r, 0x1.6db4e8p-10f, 0x1.123bdep-7f), 0x1.55545ep-5f);
  q = tj_fmaf(r, tj_fmaf(r, q, 0x1.55548ep-3f), 0.5f);
  float power = 1 + (r + tj_fmaf(r * r, q, lost));
  uint32_t bits = tj_bits_f32(shifted), half = bits >> 1;
  return power * tj_f32_of(half << 23) * tj_f32_of((bits - half) << 23);
}}

static inline float tj_expm1f(float x) {{
  double z = x > 200.0f ? 200.0 : x < -200.0f ? -200.0 : x;
  double small = z * (1 + z * (0.5 + z / 6));
  return (float)(fabs(z) < 1e-4 ? small : tj_exp_core(z) - 1);
}}

/* By its Taylor series, and 1 - erfc by the fit of "Numerical Recipes", which is right to 1.2e-7 of
   an erfc below 0.16. */
static inline float tj_erff(float x) {{
  double size = fabs((double)x), z = size > 5.0 ? 5.0 : size, z2 = z * z;
  double near = z * ({_polynomial("z2", _ERF_TERMS)});
  double t = 1 / (1 + 0.5 * z);
  double exponent = {_polynomial("t", _ERFC_TERMS)};
  double far = 1 - t * tj_exp_core(exponent - z2);
  return (float)(x != x ? x : copysign(size < 1 ? near : far, x));
}}

/* By the same fit. */
static inline float tj_erfcf(float x) {{
  double size = fabs((double)x), z = size > 12.0 ? 12.0 : size, t = 1 / (1 + 0.5 * z);
  double exponent = {_polynomial("t", _ERFC_TERMS)};
  double tail = t * tj_exp_core(exponent - z * z);
  return (float)(x != x ? x : x < 0 ? 2 - tail : tail);
}}

static inline float tj_tanhf(float x) {{
  double size = fabs((double)x), z = size > 20.0 ? 20.0 : size;
  double ratio = 1 - 2 / (tj_exp_core(2 * z) + 1);
  double small = z - z * z * z / 3;
  double result = size < 1e-4 ? small : ratio;
  return (float)(x != x ? x : copysign(result, x));
}}
"""

_LOG = f"""
/* log of a positive, finite, normal double: n · log(2) + 2 · atanh((m - 1) / (m + 1)) with m in
   √½ … √2. */
static inline double tj_log_core(double x) {{
  uint64_t bits = tj_bits_f64(x) - 0x3fe6a09e667f3bcdull; /* less √½ */
  /* the exponent as a double: biased by 1024 to be positive, in the low bits of 2^52 + … */
  double n = tj_f64_of(((bits + 0x4000000000000000ull) >> 52) | 0x4330000000000000ull)
             - 0x1.00000000004p52;
  double m = tj_f64_of((bits & 0x000fffffffffffffull) + 0x3fe6a09e667f3bcdull);
  double s = (m - 1) / (m + 1), s2 = s * s;
  double series = s * ({_polynomial("s2", _LOG_TERMS)});
  return n * {math.log(2)!r} + series;
}}

static inline float tj_logf(float x) {{
  double result = tj_log_core(x);
  result = x < 0 ? NAN : x == 0 ? -INFINITY : result;
  return (float)(x < INFINITY ? result : x); /* infinity and NaN stay */
}}

static inline float tj_log1pf(float x) {{
  double z = x, small = z * (1 + z * (-0.5 + z / 3)), result = tj_log_core(1 + z);
  result = fabs(z) < 1e-4 ? small : result;
  result = x < -1 ? NAN : x == -1 ? -INFINITY : result;
  return (float)(x < INFINITY ? result : x);
}}

static inline float tj_powf(float x, float y) {{
  double size = fabs((double)x), wide = y;
  double log_size = size == 0 ? -INFINITY : size < INFINITY ? tj_log_core(size) : size;
  double z = wide * log_size;
  z = z > 200 ? 200 : z < -200 ? -200 : z;
  double power = tj_exp_core(z);
  power = size == 0 || size == INFINITY ? ((y > 0) == (size > 0) ? INFINITY : 0.0) : power;
  double half = wide * 0.5;
  bool whole = floor(wide) == wide, odd = whole && floor(half) != half;
  double negative = whole || size == INFINITY || size == 0 ? (odd ? -power : power) : NAN;
  double result = signbit(x) ? negative : power;
  result = x != x || y != y ? NAN : result;
  return (float)(x == 1.0f || y == 0.0f || (size == 1 && fabs(wide) == INFINITY) ? 1.0 : result);
}}
"""

# 2/pi in binary, as 32-bit words that start at every 8th bit: the product with a float's mantissa
# keeps the bits around the point whatever the exponent.
_TWO_OVER_PI_HEX = (
    "a2f9836e4e441529fc2757d1f534ddc0db6295993c439041fe5163abdebbc561b7246e3a424dd2e0"
)
_WORDS = ", ".join(f"0x{('000000' + _TWO_OVER_PI_HEX)[2 * i : 2 * i + 8]}u" for i in range(24))

_SIN = f"""
/* x less the nearest multiple of pi/2, and that multiple modulo 4.

   A large x is a 24-bit integer times a power of 2, so 2/pi · x modulo 4 needs only 96 bits of
   2/pi, from a place that the exponent gives: those before make multiples of 4. */
static inline double tj_reduce(float x, uint32_t *quadrant) {{
  static const uint64_t words[24] = {{
      {_WORDS}}};
  uint32_t bits = tj_bits_f32(x) & 0x7fffffffu;
  int64_t place = bits >> 23;
  place = place < 128 ? 0 : place > 254 ? 126 : place - 128; /* smaller x: not used below */
  uint64_t m = (uint64_t)((bits & 0x7fffffu) | 0x800000u) << (place & 7);
  const uint64_t *from = words + (place >> 3);
  uint64_t high = (m * from[0]) << 32, middle = m * from[4], low = (m * from[8]) >> 32;
  uint64_t turns = high + middle + low; /* quarter turns, in units of 2^-62 */
  uint64_t nearest = (turns + (1ull << 61)) >> 62;
  double large = (double)(int64_t)(turns - (nearest << 62)) * {math.pi / 2 * 2.0**-62!r};
  double size = fabs((double)x);
  double shifted = size * {2 / math.pi!r} + 0x1.8p52, n = shifted - 0x1.8p52;
  double small = size - n * 0x1.921fb54400000p+0 - n * 0x1.0b4611a626331p-34;
  bool is_small = size < 1000.0;
  *quadrant = (uint32_t)(is_small ? tj_bits_f64(shifted) : nearest) & 3;
  return is_small ? small : large;
}}

static inline double tj_sine(double r, uint32_t quadrant) {{
  double r2 = r * r;
  double sine = r * ({_polynomial("r2", _SIN_TERMS)});
  double cosine = {_polynomial("r2", _COS_TERMS)};
  double result = quadrant & 1 ? cosine : sine;
  return quadrant & 2 ? -result : result;
}}

static inline float tj_sinf(float x) {{
  uint32_t quadrant;
  double r = tj_reduce(x, &quadrant);
  double result = copysign(1.0, x) * tj_sine(r, quadrant);
  return (float)(fabsf(x) < INFINITY ? result : NAN);
}}

static inline float tj_cosf(float x) {{
  uint32_t quadrant;
  double r = tj_reduce(x, &quadrant);
  double result = tj_sine(r, quadrant + 1);
  return (float)(fabsf(x) < INFINITY ? result : NAN);
}}
"""

_ATAN = f"""
/* atan by its Taylor series below tan(pi/8); above, and beyond 1, by the angle's complements. */
static inline float tj_atan2f(float y, float x) {{
  double height = fabs((double)y), width = fabs((double)x);
  double large = height > width ? height : width, small = height > width ? width : height;
  double t = small == large ? (large > 0) : small / large; /* also of infinities, and of zeros */
  bool steep = t > {math.sqrt(2) - 1!r};
  double s = steep ? (t - 1) / (t + 1) : t, s2 = s * s;
  double angle = s * ({_polynomial("s2", _ATAN_TERMS)}) + (steep ? {math.pi / 4!r} : 0);
  angle = height > width ? {math.pi / 2!r} - angle : angle;
  angle = signbit(x) ? {math.pi!r} - angle : angle;
  return (float)(x != x || y != y ? NAN : copysign(angle, (double)y));
}}
"""

_F64 = """
/* The float64 functions, by the names that templates make. */
#define tj_exp exp
#define tj_log log
#define tj_expm1 expm1
#define tj_log1p log1p
#define tj_erf erf
#define tj_erfc erfc
#define tj_atan2 atan2
#define tj_tanh tanh
#define tj_sin sin
#define tj_cos cos
#define tj_pow pow
"""


def _float(c_type: str, suffix: str) -> str:
    return _REMAINDER.replace("{T}", c_type).replace("{f}", suffix)


# In dependency order; each part uses only those before it.
C_PARTS = (
    _BITS,
    _float("float", "f"),
    _float("double", ""),
    _INTEGER,
    _CONVERT,
    _NARROW,
    _FMA,
    _EXP,
    _LOG,
    _SIN,
    _ATAN,
    _F64,
    STREAM,
    KEYS,
    *SORTS,
)
C_PRELUDE = C_HEADER + "".join(C_PARTS)

_DEFINED = re.compile(r"^(?:static .*?|#define |void \*|int64_t )(tj_\w+)", re.MULTILINE)
_USED = re.compile(r"\btj_\w+")


def prelude_for(text: str, parts: tuple[str, ...] = C_PARTS) -> str:
    """The parts of the prelude that a program text needs, and what these need."""
    kept: list[str] = []
    used = set(_USED.findall(text))
    for part in reversed(parts):
        if not used.isdisjoint(_DEFINED.findall(part)):
            kept.insert(0, part)
            used.update(_USED.findall(part))
    return C_HEADER + "".join(kept)
