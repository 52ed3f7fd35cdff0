"""A barrier across all programs of a launch, which must all be on the GPU at once (a cooperative
launch sees to that)."""

import triton
import triton.language as tl


@triton.jit
def wait_for_all(counter_ptr, target):
    """Count this program in, and wait until `target` have been counted. What any program has stored
    before is seen by all programs behind it.

    The counter, an int32, starts at 0 and only grows: each barrier of a launch has a higher target.
    The first barrier orders the program's own stores before the release, the second one what it
    loads next behind the acquire.
    """
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < target:
        pass
    tl.debug_barrier()
