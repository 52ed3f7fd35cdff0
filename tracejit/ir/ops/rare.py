"""Element-wise primitives that few programs use: common divisors, the next number, bits.

They are Ops like those of `elementwise`.
"""

from __future__ import annotations

import numpy as np

from tracejit.ir.ops.elementwise import same
from tracejit.ir.ops.record import EDGES, NO_GRAD, Op, require, require_tensor
from tracejit.ir.types import (
    DType,
    Type,
    bf16,
    bits_to_float,
    f16,
    f32,
    f64,
    float_to_bits,
    i16,
    i32,
    i64,
)

_infer_gcd, _infer_floats = same("gcd", "iu"), same("nextafter", "f")


def _eval_gcd(x: np.ndarray, z: np.ndarray) -> np.ndarray:
    """By Euclid's algorithm, of sizes: that of the least integer wraps, as in eager."""
    x, z = np.broadcast_arrays(np.abs(x), np.abs(z))
    while np.any(z):
        x, z = np.where(z != 0, z, x), np.where(z != 0, np.fmod(x, np.where(z != 0, z, 1)), 0)
    return x


def _infer_nextafter(x: Type, z: Type) -> Type:
    found = _infer_floats(x, z)
    require(not found.dtype.narrow, f"nextafter is not defined on {found.dtype}")
    return found


# The integers that hold the bits of floats.
BITS_OF = {f64: i64, f32: i32, bf16: i16, f16: i16}


def _infer_bitcast(x: Type, *, of: DType, dtype: DType) -> Type:
    require_tensor("bitcast", x)
    pair = BITS_OF.get(of) is dtype or BITS_OF.get(dtype) is of
    require(pair and x.dtype is of, f"bitcast of {x} from {of} to {dtype}")
    return Type(dtype, x.shape, x.device)


def _eval_bitcast(x: np.ndarray, *, of: DType, dtype: DType) -> np.ndarray:
    """bf16 and f16 are float32 in numpy, of which `of` tells the one from the other."""
    x = np.asarray(x)
    if of is bf16:
        return float_to_bits(x).view(np.int16)
    if of is f16:
        return x.astype(np.float16).view(np.int16)
    if dtype is bf16:
        return bits_to_float(x.view(np.uint16))
    if dtype is f16:
        return x.view(np.float16).astype(np.float32)
    return x.view(dtype.compute)


# The largest integer that divides both; 0 of two zeros.
gcd = Op(
    "gcd",
    "elementwise",
    _infer_gcd,
    _eval_gcd,
    (NO_GRAD, NO_GRAD),
    cost=200,
    exact=EDGES,
    rounds=False,
    host=None,
)
# The next number after x in the direction of z.
nextafter = Op(
    "nextafter",
    "elementwise",
    _infer_nextafter,
    np.nextafter,
    (NO_GRAD, NO_GRAD),
    cost=20,
    exact=EDGES,
    rounds=False,
    host=None,
)
# The bits of a float as an integer of its size, or back: bf16 may come back as another NaN.
bitcast = Op(
    "bitcast",
    "elementwise",
    _infer_bitcast,
    _eval_bitcast,
    (NO_GRAD,),
    cost=1,
    exact=EDGES,  # a constant does not say which NaN it is
    rounds=False,
    host=None,
)
