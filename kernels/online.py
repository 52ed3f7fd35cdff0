"""Sums of exponentials that go with the maximum they are relative to, in one pass."""

import triton
import triton.language as tl
from tracejit.kernels.device import exp, maximum


@triton.jit
def online_sum(most, total, x):
    """The maxima so far and one more value, and the sums of exp(value - maximum).

    Each lane has its own maximum: one exponential for each value, of how far it lies from what was
    the maximum before. -inf of a lane that has met nothing else counts as what it is to itself, 1:
    against a finite maximum of another lane it is exp(-inf).
    """
    apart = tl.where(x == most, 1.0, exp(-tl.abs(x - most))).to(x.dtype)
    total = tl.where(x > most, total * apart + 1.0, total + apart)
    return maximum(most, x), total
