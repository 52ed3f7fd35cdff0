"""Running results along the rows of a tile: sums, products, extrema, log-sums and recurrences.

A tile is [O, I], a block of the elements of O rows. `before` is [O, 1], the totals so far, which
count where `later` holds: the tile is not the first of its rows. Elements are combined in a fixed
order that the tile's shape decides, as a tree, so that each result is the same every time.

A tree multiplies factors before it knows what they meet. Where such a product might leave the range
of the numbers though no result does, the elements are taken one after another.
"""

import triton
import triton.language as tl
from tracejit.kernels.device import exp, log1p, maximum, minimum

WITHIN = tl.constexpr(900.0)  # powers of two that products in fp64 stay within
NARROW = tl.constexpr(100.0)  # those in fp32


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _multiply(a, b):
    return a * b


@triton.jit
def _larger(a, b):
    """The last one of equal ones, and the first NaN."""
    return tl.where((b >= a) | (b != b), b, a)


@triton.jit
def _smaller(a, b):
    return tl.where((b <= a) | (b != b), b, a)


@triton.jit
def _log_add(a, b):
    most, least = maximum(a, b), minimum(a, b)
    alike = (least == most) & (tl.abs(most) == float("inf"))
    return tl.where(alike, most, most + log1p(exp(least - most)))


@triton.jit
def _follow(factor_a, term_a, factor_b, term_b):
    """y -> factor·y + term, for a and then b."""
    return factor_a * factor_b, factor_b * term_a + term_b


@triton.jit
def _places(x):
    """The places along a tile's rows."""
    return tl.arange(0, x.shape[1])[None, :]


@triton.jit
def column_where(x, here):
    """[O, 1]: the element of each row where `here` holds, with all of its bits."""
    if x.dtype == tl.float64:
        bits = tl.where(here, x.to(tl.int64, bitcast=True), 0)
        return tl.sum(bits, 1)[:, None].to(tl.float64, bitcast=True)
    elif x.dtype.is_floating():
        bits = tl.where(here, x.to(tl.int32, bitcast=True), 0)
        return tl.sum(bits, 1)[:, None].to(tl.float32, bitcast=True)
    else:
        return tl.sum(tl.where(here, x, 0), 1)[:, None].to(x.dtype)


@triton.jit
def last_column(x):
    """[O, 1]: the last element of each row of a tile."""
    return column_where(x, _places(x) == x.shape[1] - 1)


@triton.jit
def running_sum(x, before, later, inside):
    """Sums of floats or integers."""
    first = (_places(x) == 0) & later
    return tl.associative_scan(tl.where(first, before + x, x), 1, _add)


@triton.jit
def running_max(x, before, later, inside):
    """The largest: the last one of equal ones, and NaN from the first NaN on."""
    first = (_places(x) == 0) & later
    return tl.associative_scan(tl.where(first, _larger(before, x), x), 1, _larger)


@triton.jit
def running_min(x, before, later, inside):
    """The smallest, likewise."""
    first = (_places(x) == 0) & later
    return tl.associative_scan(tl.where(first, _smaller(before, x), x), 1, _smaller)


@triton.jit
def running_log_sum(x, before, later, inside):
    """log(Σ exp(x)) of floats."""
    first = (_places(x) == 0) & later
    return tl.associative_scan(tl.where(first, _log_add(before, x), x), 1, _log_add)


@triton.jit
def _within(factors):
    """Whether products of neighbours in a row stay within the numbers' range."""
    sizes = tl.abs(tl.log2(tl.abs(factors).to(tl.float32)))
    sizes = tl.where((factors == 0) | (factors != factors), 0.0, sizes)
    most = tl.max(tl.sum(sizes, 1), 0)
    if factors.dtype == tl.float64:
        return most < WITHIN
    else:
        return most < NARROW


@triton.jit
def _one_by_one(factors, terms):
    """The recurrence, one element after another; the first one is its term."""
    at = _places(terms)
    results = terms
    total = column_where(terms, at == 0)
    for k in range(1, terms.shape[1]):
        here = at == k
        total = column_where(factors, here) * total + column_where(terms, here)
        results = tl.where(here, total, results)
    return results


@triton.jit
def _products(x):
    """Products, one element after another."""
    at = _places(x)
    results = x
    total = column_where(x, at == 0)
    for k in range(1, x.shape[1]):
        here = at == k
        total = total * column_where(x, here)
        results = tl.where(here, total, results)
    return results


@triton.jit
def running_product(x, before, later, inside):
    """Products of floats or integers; `inside`: which elements exist."""
    first = (_places(x) == 0) & later
    x = tl.where(first, before * x, x)
    if x.dtype.is_floating():
        x = tl.where(inside, x, 1.0)
        if _within(x):
            results = tl.associative_scan(x, 1, _multiply)
        else:
            results = _products(x)
        return results
    else:
        return tl.associative_scan(x, 1, _multiply)


@triton.jit
def recurrence(factors, terms, before, later, inside):
    """Each is its term, and its factor times the one before it; `inside`: which elements exist."""
    start = _places(terms) == 0
    terms = tl.where(start & later, factors * before + terms, terms)
    factors = tl.where(start | (inside == 0), 1.0, factors)
    if _within(factors):
        _, results = tl.associative_scan((factors, terms), 1, _follow)
    else:
        results = _one_by_one(factors, terms)
    return results
