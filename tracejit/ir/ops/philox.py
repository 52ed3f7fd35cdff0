"""Philox2x32-10, the counter-based generator of Salmon et al. (2011), in numpy."""

from __future__ import annotations

import numpy as np

MULTIPLIER, WEYL, ROUNDS = 0xD256D193, 0x9E3779B9, 10
_LOW = np.uint64(0xFFFFFFFF)


def philox(left: np.ndarray, right: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two random words for a counter of two words and a key; words of 32 bits in uint64."""
    for _ in range(ROUNDS):
        product = left * np.uint64(MULTIPLIER)
        left, right = product >> np.uint64(32) ^ key ^ right, product & _LOW
        key = key + np.uint64(WEYL) & _LOW
    return left, right


def random_bits(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """31 random bits, as int64, for integers of 64 bits: a counter, and a key whose high word is
    mixed with the counter's."""
    with np.errstate(over="ignore"):
        counter, key = (np.asarray(x).astype(np.int64).view(np.uint64) for x in (counter, key))
        high = np.uint64(32)
        first, _ = philox(counter & _LOW, counter >> high ^ key >> high, key & _LOW)
        return (first >> np.uint64(1)).view(np.int64)
