"""Packing: kernels that need not wait for each other share a launch.

In: lowered kernels in an order in which they may run, and who must run before whom. Out: the
kernels of each launch, and a launch's Kernel with its parts.

A launch costs some microseconds and drains the GPU at its end. Small kernels (a bias gradient, a
parameter's update, a loss's mean) take less than that alone, and a matmul of a few tiles leaves
most multiprocessors idle: side by side they fill them, and nobody's work changes, as each program
belongs to one of the kernels. What they share is that each program reserves the registers and the
shared memory of the hungriest. So a large stream, which lives on many warps, stays alone; a large
matmul, which is hungry itself, takes small company, but no second one of its size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from tracejit.records import dataclass
from tracejit.schedule.foreach import Foreach
from tracejit.schedule.kernel import Buffer, Kernel, Part
from tracejit.schedule.loops import Loop
from tracejit.schedule.lower import Lowered
from tracejit.schedule.plan import PlanBuffer

SMALL_BYTES = 8 << 20  # of the memory that a kernel uses: read in less time than a launch takes
SMALL_TILES = 256  # of 64 × 64 results of a matmul: fewer than two for each multiprocessor
MAX_BUFFERS = 64
MAX_DOTS = 4  # matmuls in one launch: their code is what takes long to compile
MAX_STATEMENTS = 600


@dataclass(frozen=True, slots=True)
class _Cost:
    """What a kernel adds to a launch."""

    buffers: frozenset[str]
    statements: int
    depth: int  # of its contraction, 0 if it has none
    size: str  # "small", or a large "matmul", or "stream", which stays alone


def pack(
    kernels: Sequence[Lowered | Loop | Foreach],
    before: Sequence[set[int]],
    buffers: dict[str, PlanBuffer],
) -> list[list[int]]:
    """Positions of the kernels of each launch, a launch's longest programs first.

    `before` has the positions of the kernels that a kernel waits for, lower than its own. A kernel
    goes to the first launch after all of these that has room for it.
    """
    costs = [_cost(one, buffers) for one in kernels]
    launches: list[list[int]] = []
    launch_of: list[int] = []
    begun = 0  # the launch after the last collective's start, behind which others stay
    for i in range(len(kernels)):
        first = max((launch_of[j] + 1 for j in before[i]), default=0)
        first = max(first, begun)
        room = (n for n in range(first, len(launches)) if _fits(costs, launches[n], i))
        at = next(room, len(launches))
        if at == len(launches):
            launches.append([])
        launches[at].append(i)
        launch_of.append(at)
        if starts(kernels[i]):
            begun = at + 1
    return [sorted(launch, key=lambda i: -costs[i].depth) for launch in launches]


def starts(one: Lowered | Loop | Foreach) -> bool:
    """Whether a kernel starts a collective: what runs after it is hidden behind it."""
    call = one.kernel.call if isinstance(one, Lowered) else None
    return call is not None and call.phase == "start"


def _cost(one: Lowered | Loop | Foreach, buffers: dict[str, PlanBuffer]) -> _Cost:
    if not isinstance(one, Lowered):
        return _Cost(frozenset(one.buffers), 0, 0, "stream")  # it stays alone
    kernel = one.kernel
    if kernel.call is not None:
        return _Cost(frozenset(one.buffers), 0, 0, "stream")  # nor does the host share a launch
    first = kernel.stages[0]
    if first.attend is not None:
        depth, size = 0, "stream"  # it fills the registers
    elif first.dot is None:
        depth, nbytes = 0, sum(buffers[name].type.nbytes for name in one.buffers)
        size = "small" if nbytes <= SMALL_BYTES else "stream"
    else:
        tiles, depth = 1, first.dot.k.extent
        for axis in first.axes[:-2]:
            tiles *= axis.extent
        for axis in first.axes[-2:]:
            tiles *= -(-axis.extent // 64)
        size = "small" if tiles < SMALL_TILES else "matmul"
    statements = sum(1 for _ in kernel.statements)
    return _Cost(frozenset(one.buffers), statements, depth, size)


def _fits(costs: Sequence[_Cost], launch: Iterable[int], new: int) -> bool:
    """Whether a launch has room for one more kernel."""
    together = [costs[i] for i in (*launch, new)]
    sizes = [cost.size for cost in together]
    return (
        "stream" not in sizes
        and sizes.count("matmul") <= 1
        and len(frozenset().union(*(cost.buffers for cost in together))) <= MAX_BUFFERS
        and sum(cost.depth > 0 for cost in together) <= MAX_DOTS
        and sum(cost.statements for cost in together) <= MAX_STATEMENTS
    )


def side_by_side(kernels: Sequence[Lowered], sizes: Sequence[tuple[int, ...]]) -> tuple:
    """(the Lowered whose kernel holds these kernels as parts, the values of its sizes).

    Sizes are named after their part (`n0_1` is the second kernel's n0), buffers are those of the
    plan that any part uses, and scalars stand in the order of the parts.
    """
    names: dict[str, str] = {}
    declared: dict[str, Buffer] = {}
    parts: list[Part] = []
    scalars: list[str] = []
    for number, one in enumerate(kernels):
        own = []
        for buffer, memory in zip(one.kernel.buffers, one.buffers, strict=True):
            name = names.setdefault(memory, f"b{len(names)}")
            known = declared.get(name, replace(buffer, name=name))
            access = known.access if known.access == buffer.access else "rw"
            declared[name] = replace(known, access=access)
            own.append(name)
        mine = [f"s{len(scalars) + i}" for i in range(len(one.scalars))]
        scalars += mine
        own_sizes = tuple(f"{size}_{number}" for size in one.kernel.sizes)
        parts.append(Part(one.kernel, tuple(own), own_sizes, tuple(mine)))
    kernel = Kernel(
        buffers=tuple(declared.values()),
        sizes=tuple(size for part in parts for size in part.sizes),
        scalars=tuple(scalars),
        axes=(),
        stages=(),
        index64=any(one.kernel.index64 for one in kernels),
        parts=tuple(parts),
    )
    together = Lowered(kernel, tuple(names), tuple(v for one in kernels for v in one.scalars))
    return together, tuple(value for values in sizes for value in values)
