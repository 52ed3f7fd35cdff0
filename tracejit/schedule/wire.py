"""What a collective puts on the wire: the bytes that a rank sends, and in how many steps.

The algorithm is taken to be a ring, in which each rank sends to the next one. With S bytes in all
and n ranks:

    all_reduce                  2 (n-1)/n S in 2 (n-1) steps: reduce_scatter, then all_gather
    reduce_scatter, all_gather  (n-1)/n S in n-1 steps; S is the whole
    broadcast, reduce_to        S in n-1 steps: in parts, from rank to rank
    all_to_all                  (n-1)/n S in n-1 steps; parts are taken to be of one size
    gather_ranks, scatter_ranks (n-1)/n S in n-1 steps, at the root, whose link is the busiest
    barrier                     nothing in 2 (n-1) steps

An engine may use another algorithm; none for all_reduce sends less than a ring. What the ranks send
to compare their plans is not counted. Parts of a byte are rounded up.
"""

from __future__ import annotations

import math

from tracejit.schedule.kernel import HostCall, Kernel

_ONCE = ("broadcast", "reduce_to")
_TWICE = ("all_reduce", "barrier")  # around the ring


def ranks_of(call: HostCall) -> int:
    """How many ranks the group of a collective has."""
    return dict(call.attrs)["ranks"]


def whole(kernel: Kernel) -> int:
    """The bytes that a collective is about: S above."""
    call, itemsize = kernel.call, kernel.buffers[-1].dtype.itemsize
    if call.op.name == "barrier":
        return 0
    *operands, result = (math.prod(shape) * itemsize for shape in call.shapes)
    attrs, given = dict(call.attrs), sum(operands)
    if call.op.name == "gather_ranks":
        return given * attrs["ranks"]
    if call.op.name == "scatter_ranks":
        return result * attrs["ranks"]
    return result if call.op.name == "all_gather" else given


def sent(kernel: Kernel, ranks: int | None = None) -> int:
    """The bytes that a rank sends in a collective; `ranks`: if its group had so many."""
    n, name = ranks or ranks_of(kernel.call), kernel.call.op.name
    if n == 1 or name in _ONCE:
        return whole(kernel) if n > 1 else 0
    return -(-whole(kernel) * (n - 1) * (2 if name in _TWICE else 1) // n)


def steps(kernel: Kernel, ranks: int | None = None) -> int:
    """How many steps that takes, one after another."""
    n = ranks or ranks_of(kernel.call)
    return (n - 1) * (2 if kernel.call.op.name in _TWICE else 1)
