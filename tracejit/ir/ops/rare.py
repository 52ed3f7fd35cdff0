"""Element-wise primitives that few programs use: common divisors, the next number.

They are Ops like those of `elementwise`.
"""

from __future__ import annotations

import numpy as np

from tracejit.ir.ops.elementwise import same
from tracejit.ir.ops.record import EDGES, NO_GRAD, Op, require
from tracejit.ir.types import Type

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
