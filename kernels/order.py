"""The order of the elements of a tile, by a bitonic network.

K. E. Batcher, "Sorting networks and their applications" (1968). The network is a loop: each step
compares every element with the one whose number differs in one bit. Elements are distinct by their
places, so that equal values keep their order, and all runs give the same.
"""

import triton
import triton.language as tl


@triton.jit
def _bits(x):
    """Integers that stand in the order of the values, NaN last; -0.0 is 0.0."""
    if x.dtype == tl.float64:
        bits = tl.where(x == 0, 0.0, x).to(tl.float64).to(tl.int64, bitcast=True)
        most = tl.full(x.shape, 0x7FFFFFFFFFFFFFFF, tl.int64)
        bits = tl.where(bits < 0, bits ^ most, bits)
        return tl.where(x != x, most, bits)
    elif x.dtype.is_floating():
        bits = tl.where(x == 0, 0.0, x).to(tl.float32).to(tl.int32, bitcast=True)
        most = tl.full(x.shape, 0x7FFFFFFF, tl.int32)
        bits = tl.where(bits < 0, bits ^ most, bits)
        return tl.where(x != x, most, bits)
    elif x.dtype == tl.int64:
        return x
    else:
        return x.to(tl.int32)


@triton.jit
def _flat(keys, inside):
    """Keys with the largest one where there is no element: those come last, by their places."""
    if keys.dtype == tl.int64:
        return tl.where(inside, keys, 0x7FFFFFFFFFFFFFFF)
    else:
        return tl.where(inside, keys, 0x7FFFFFFF)


@triton.jit
def places_in_order(x, inside, DESCENDING: tl.constexpr):
    """Where in a tile [N] the element stands that is the first one in order, the second, …; N is a
    power of two. `inside`: which elements exist."""
    N: tl.constexpr = x.shape[0]
    at = tl.arange(0, N)
    keys = _bits(x)
    if DESCENDING:
        keys = ~keys
    keys = _flat(keys, inside)
    if keys.dtype == tl.int64:
        place, run, apart = at, 2, 1
        while run <= N:
            mate = at ^ apart
            other, there = tl.gather(keys, mate, 0), tl.gather(place, mate, 0)
            first = ((at & apart) == 0) == ((at & run) == 0)
            less = (other < keys) | ((other == keys) & (there < place))
            keys = tl.where(less == first, other, keys)
            place = tl.where(less == first, there, place)
            apart = apart >> 1
            run = tl.where(apart == 0, run * 2, run)
            apart = tl.where(apart == 0, run >> 1, apart)
        return place
    else:
        both = (keys.to(tl.int64) << 32) | at.to(tl.int64)
        run, apart = 2, 1
        while run <= N:
            other = tl.gather(both, at ^ apart, 0)
            first = ((at & apart) == 0) == ((at & run) == 0)
            both = tl.where((other < both) == first, other, both)
            apart = apart >> 1
            run = tl.where(apart == 0, run * 2, run)
            apart = tl.where(apart == 0, run >> 1, apart)
        return both.to(tl.int32)
