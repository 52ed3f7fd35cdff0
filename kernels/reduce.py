"""A deterministic full reduction in one launch: the last program to finish folds the partials.

Every program calls `publish` and `is_last`; the one that gets True calls `collect_*` and stores
the result. The order of the fold is that of program ids, whatever order the programs ran in.
The workspace holds one partial per program in the accumulator's dtype (fp32, fp64, int64), and an
int32 counter, 0 before the first launch and left at 0 by every launch.
"""

import triton
import triton.language as tl
from tracejit.kernels.device import maximum, minimum, reduce_max, reduce_min


@triton.jit
def publish(partials_ptr, value, pid):
    """Store the scalar partial of program `pid`."""
    tl.store(partials_ptr + pid, value)


@triton.jit
def is_last(counter_ptr, num_programs):
    """Count this program in; True in the last one, which sees every partial published before.

    The barrier orders the program's own stores before the release, and the acquire orders the
    partials of all others before what the last program loads next.
    """
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    last = arrived == num_programs - 1
    tl.store(counter_ptr, 0, mask=last)
    return last


@triton.jit
def collect_sum(partials_ptr, NUM, BLOCK: tl.constexpr):
    """Sum NUM partials in fixed order; a scalar of the partials' dtype."""
    total = tl.zeros([BLOCK], partials_ptr.dtype.element_ty)
    for start in range(0, NUM, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(partials_ptr + index, mask=index < NUM, other=0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def collect_max(partials_ptr, NUM, BLOCK: tl.constexpr):
    """Maximum of NUM partials; NaN if any is NaN."""
    index = tl.arange(0, BLOCK)
    # Lanes past the end read the last partial again: no identity element is needed.
    best = tl.load(partials_ptr + tl.minimum(index, NUM - 1), cache_modifier=".cg")
    for start in range(BLOCK, NUM, BLOCK):
        last = tl.minimum(start + index, NUM - 1)
        best = maximum(best, tl.load(partials_ptr + last, cache_modifier=".cg"))
    return reduce_max(best, 0)


@triton.jit
def collect_min(partials_ptr, NUM, BLOCK: tl.constexpr):
    """Minimum of NUM partials; NaN if any is NaN."""
    index = tl.arange(0, BLOCK)
    best = tl.load(partials_ptr + tl.minimum(index, NUM - 1), cache_modifier=".cg")
    for start in range(BLOCK, NUM, BLOCK):
        last = tl.minimum(start + index, NUM - 1)
        best = minimum(best, tl.load(partials_ptr + last, cache_modifier=".cg"))
    return reduce_min(best, 0)


@triton.jit
def fold_tiles(first, count, NUM: tl.constexpr, APART: tl.constexpr):
    """Sum `count` partial tiles, NUM at most, that lie APART elements apart, in order; a tile of
    the partials' dtype. `first` has the pointers of the first tile.

    Of small tiles several are loaded at a time.
    """
    AT_ONCE: tl.constexpr = min(NUM, min(8, 16384 // first.numel) if first.numel <= 4096 else 1)
    total = tl.zeros(first.shape, first.dtype.element_ty)
    for i in range(0, NUM, AT_ONCE):
        for j in tl.static_range(AT_ONCE):
            mine = first + (i + j) * APART
            total += tl.load(mine, mask=i + j < count, other=0, cache_modifier=".cg")
    return total
