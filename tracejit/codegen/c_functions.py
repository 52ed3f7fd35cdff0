"""Functions of float32 as C, which a compiler turns into vector code: without branches.

Most compute in double, where range reduction and a short polynomial leave errors far below half a
unit of the float result, and round once. `exp`, `tanh` and `erf`, which softmax, cross-entropy,
recurrent networks and GELU live on, compute in float with the worst rounding errors carried along,
which is two to five times as fast and less than a unit off. The float64 ones are those of libm.
"""

from __future__ import annotations

import math


def _polynomial(variable: str, coefficients: list[float], f: str = "") -> str:
    """A polynomial by Horner's rule, lowest coefficient first; `f`: of floats."""
    text = f"{coefficients[-1]!r}{f}"
    for c in reversed(coefficients[:-1]):
        text = f"tj_fma{f}({variable}, {text}, {c!r}{f})"
    return text


_EXP_TERMS = [1 / math.factorial(k) for k in range(10)]
_ERF_TERMS = [0.12837917, -0.37612635, 0.11283743, -0.026863476, 0.0052161342, -0.00084186054]
_ERF_TERMS += [0.00010821546, -8.463403e-06]
_LOG_ERFC_TERMS = [-1.1286972, -0.63495833, -0.10654902, 0.024025403, -0.0037645958, 0.00035231313]
_LOG_ERFC_TERMS.append(-1.413166e-05)
_TANH_TERMS = [-0.33333313, 0.13332471, -0.053839233, 0.02101423, -0.0061885803]
_ERFC_TERMS = [-1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806]
_ERFC_TERMS += [0.27886807, -1.13520398, 1.48851587, -0.82215223, 0.17087277]
_LOG_TERMS = [2 / (2 * k + 1) for k in range(9)]
_ATAN_TERMS = [(-1) ** k / (2 * k + 1) for k in range(13)]
_SIN_TERMS = [(-1) ** k / math.factorial(2 * k + 1) for k in range(7)]
_COS_TERMS = [(-1) ** k / math.factorial(2 * k) for k in range(8)]

EXP = f"""
/* e^z of a double in -700 … 700: 2^n · e^r with |r| <= log(2) / 2, by e^r's Taylor series. */
static inline double tj_exp_core(double z) {{
  double shifted = z * {1 / math.log(2)!r} + 0x1.8p52; /* n in the low bits */
  double n = shifted - 0x1.8p52;
  double r = z - n * 0x1.62e42fefa0000p-1 - n * 0x1.cf79abc9e3b3ap-40;
  double power = {_polynomial("r", _EXP_TERMS)};
  return tj_f64_of(tj_bits_f64(power) + (tj_bits_f64(shifted) << 52));
}}

/* (e^r - 1 - r) / r², |r| <= log(2) / 2. */
static inline float tj_exp_rest(float r) {{
  float q = tj_fmaf(r, tj_fmaf(r, 0x1.6db4e8p-10f, 0x1.123bdep-7f), 0x1.55545ep-5f);
  return tj_fmaf(r, tj_fmaf(r, q, 0x1.55548ep-3f), 0.5f);
}}

/* e^x in float: 2^n · (1 + r + r² · tj_exp_rest(r)); `lost` is what rounding r leaves out. The
   low bits of `shifted` are n + 254, and 2^n is applied as two halves, as the result may be
   subnormal. The limits are written so that one comparison does both. */
static inline float tj_expf(float x) {{
  float z = fabsf(x) > 105.0f ? copysignf(105.0f, x) : x;
  float shifted = tj_fmaf(z, 0x1.715476p+0f, 0x1.8001fcp23f), n = shifted - 0x1.8001fcp23f;
  float less = tj_fmaf(n, -0x1.62e4p-1f, z); /* exact: n · 0x1.62e4 has few bits */
  float r = tj_fmaf(n, -0x1.7f7d1cp-20f, less);
  float lost = tj_fmaf(n, -0x1.7f7d1cp-20f, less - r);
  float power = 1 + (r + tj_fmaf(r * r, tj_exp_rest(r), lost));
  uint32_t bits = tj_bits_f32(shifted), half = bits >> 1;
  return power * tj_f32_of(half << 23) * tj_f32_of((bits - half) << 23);
}}

static inline float tj_expm1f(float x) {{
  double z = x > 200.0f ? 200.0 : x < -200.0f ? -200.0 : x;
  double small = z * (1 + z * (0.5 + z / 6));
  return (float)(fabs(z) < 1e-4 ? small : tj_exp_core(z) - 1);
}}
"""

ERF = f"""
/* x + x · p(x²) up to 1, and 1 - e^(x · q(x)) up to 4, from where on it is 1: fits whose largest
   errors are 2^-28 of the result. What rounding leaves out of x² is put right by the slope of p, of
   some -0.26; what it leaves out of the exponent, by one more factor of the power. */
static inline float tj_erff(float x) {{
  float size = fabsf(x), z = size > 4.0f ? 4.0f : size, z2 = x * x;
  float p = {_polynomial("z2", _ERF_TERMS, "f")};
  float near = tj_fmaf(x, tj_fmaf(tj_fmaf(x, x, -z2), -0.26f, p), x);
  float q = {_polynomial("z", _LOG_ERFC_TERMS, "f")};
  float exponent = z * q, power = tj_expf(exponent);
  float far = 1 - tj_fmaf(power, tj_fmaf(z, q, -exponent), power);
  return size < 1.0f ? near : copysignf(far, x);
}}

/* By the fit of "Numerical Recipes", which is right to 1.2e-7 of the result. */
static inline float tj_erfcf(float x) {{
  double size = fabs((double)x), z = size > 12.0 ? 12.0 : size, t = 1 / (1 + 0.5 * z);
  double exponent = {_polynomial("t", _ERFC_TERMS)};
  double tail = t * tj_exp_core(exponent - z * z);
  return (float)(x != x ? x : x < 0 ? 2 - tail : tail);
}}
"""

TANH = f"""
/* x + x³ · p(x²) up to 0.5625, by a fit whose largest error is 2^-29 of x. Beyond, by
   1 - 2 / (e^2x + 1) with e^2x as in tj_expf; what is lost by rounding e^2x, the sum, the quotient
   and the difference is added at the end. */
static inline float tj_tanhf(float x) {{
  float size = fabsf(x), z = size > 10.0f ? 20.0f : 2 * size, x2 = x * x;
  float near = tj_fmaf(x * x2, {_polynomial("x2", _TANH_TERMS, "f")}, x);
  float shifted = tj_fmaf(z, 0x1.715476p+0f, 0x1.8000fep23f), n = shifted - 0x1.8000fep23f;
  float less = tj_fmaf(n, -0x1.62e4p-1f, z), r = tj_fmaf(n, -0x1.7f7d1cp-20f, less);
  float lost = tj_fmaf(n, -0x1.7f7d1cp-20f, less - r);
  float more = r + tj_fmaf(r * r, tj_exp_rest(r), lost), power = 1 + more;
  float scale = tj_f32_of(tj_bits_f32(shifted) << 23);
  float e = power * scale, sum = e + 1;
  float rest = (1 - (sum - e)) + (more - (power - 1)) * scale;
  float quotient = 2 / sum, result = 1 - quotient;
  float over = tj_fmaf(-quotient, sum, 2.0f) - quotient * rest;
  result += ((1 - result) - quotient) - over * quotient * 0.5f;
  return size < 0.5625f ? near : copysignf(result, x);
}}
"""

LOG = f"""
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

SIN = f"""
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

ATAN = f"""
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
