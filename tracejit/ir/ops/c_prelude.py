"""What generated C programs start with: the functions that C templates call, types, flags.

Integer functions take any integer operands as int64; assigning their result to the narrower type
wraps as numpy does.
"""

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
C_FLAGS = ("-fwrapv", "-ffp-contract=off", "-fno-math-errno")

_FLOAT = """
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
  return b < 0 || b > 63 ? 0 : a << b;
}

static inline int64_t tj_shr(int64_t a, int64_t b) {
  return a >> (b < 0 || b > 63 ? 63 : b);
}
"""


def _float(c_type: str, suffix: str) -> str:
    return _FLOAT.replace("{T}", c_type).replace("{f}", suffix)


C_PRELUDE = (
    "#include <math.h>\n#include <stdbool.h>\n#include <stdint.h>\n"
    + _float("float", "f")
    + _float("double", "")
    + _INTEGER
)
