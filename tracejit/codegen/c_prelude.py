"""What generated C programs start with: the functions that C templates call, types, flags.

Integer functions take any integer operands as int64; assigning their result to the narrower type
wraps as numpy does.

The float32 functions are those of c_functions.py, the float64 ones those of libm.
"""

from __future__ import annotations

import re

from tracejit.codegen.c_functions import ATAN, ERF, EXP, LOG, SIN, TANH
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
    EXP,
    ERF,
    TANH,
    LOG,
    SIN,
    ATAN,
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
