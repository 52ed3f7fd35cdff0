"""Memory for kernels that run one after another, whatever launches they share."""

from __future__ import annotations

from collections.abc import Sequence

from tracejit.ir.types import contiguous_strides
from tracejit.schedule.cpu.attention import Attention
from tracejit.schedule.cpu.host_calls import working_bytes
from tracejit.schedule.cpu.plan import Call, CpuKernel, CpuLaunch, CpuPlan, Place
from tracejit.schedule.cpu.sorting import chunk_bytes
from tracejit.schedule.cpu.tiles import Contraction
from tracejit.schedule.memory import Lifetime, Room, plan_memory
from tracejit.schedule.plan import Plan, PlanBuffer


def place(plan: Plan, launches: Sequence[CpuLaunch], parts: Sequence[int]) -> CpuPlan:
    """Place intermediates and what kernels work in, in outputs not yet written where they fit.

    A plan's own layout knows launches only, and nothing of what kernels work in. What a loop uses
    it holds from its beginning to its end. Each of the `parts` of a loop has working memory of its
    own.
    """
    rows = {b.name: b for b in plan.buffers if b.kind == "row"}
    inside: dict[int, list[int]] = {}
    for number, launch in enumerate(launches):
        if launch.loop is not None:
            inside.setdefault(launch.loop, []).append(number)
    spans: dict[str, tuple[int, int]] = {}
    pieces: dict[str, Lifetime] = {}
    kernels: dict[CpuKernel, str] = {}
    calls, working = [], []
    for number, launch in enumerate(launches):
        first, *_, last = inside.get(launch.loop, (number, number)) * 2
        for name in launch.buffers:
            name = rows[name].of if name in rows else name
            spans[name] = spans.get(name, (first, last))[0], last
        nbytes, memory = scratch_bytes(launch.kernel), ""
        if nbytes:
            memory = f"w{len(working)}"
            working.append((memory, nbytes))
            count = 1 if launch.loop is None else parts[launch.loop]
            span = (first, last) if count > 1 else (number, number)
            pieces[memory] = Lifetime(nbytes * count, *span)
        kernel = kernels.setdefault(launch.kernel, f"k{len(kernels)}")
        of_launch = launch.buffers, launch.scalars, memory, launch.loop, launch.apart
        calls.append(Call(kernel, *of_launch))
    arena = [b for b in plan.buffers if b.kind == "arena" and b.name in spans]
    pieces = {b.name: Lifetime(b.type.nbytes, *spans[b.name]) for b in arena} | pieces
    outputs = [b for b in plan.buffers if b.kind == "output"]
    never = len(launches)
    rooms = [Room(_span(b), spans.get(b.name, (never, never))[0]) for b in outputs]
    found, total = plan_memory(list(pieces.values()), rooms)
    places = tuple(
        Place(name, "" if at.room is None else outputs[at.room].name, at.offset)
        for name, at in zip(pieces, found, strict=True)
    )
    places += tuple(
        Place(row.name, at.room, at.offset + row.offset)
        for at in places
        for row in rows.values()
        if row.of == at.memory
    )
    named = {name: kernel for kernel, name in kernels.items()}
    return CpuPlan(tuple(calls), named, tuple(working), places, total, plan.loops, tuple(parts))


def scratch_bytes(kernel: CpuKernel) -> int:
    """The bytes that a kernel works in: packed operands, blocks of scores, items that are sorted,
    parts of column sums, what LAPACK works in."""
    if kernel.kernel.call is not None and kernel.kernel.call.is_collective:
        return 0
    if kernel.kernel.call is not None:
        return working_bytes(kernel.kernel.call, kernel.kernel.buffers[-1].dtype.itemsize)
    if kernel.blocks is not None:
        return Attention(kernel.kernel, kernel.blocks).scratch_bytes
    if kernel.tiling is not None:
        return Contraction(kernel.kernel, kernel.tiling).scratch_bytes
    if kernel.kernel.sort is not None:
        return kernel.outer.chunks * chunk_bytes(kernel.kernel)
    return kernel.partial_offsets[-1]


def _span(buffer: PlanBuffer) -> int:
    """The bytes from a buffer's first element to its last."""
    shape = buffer.type.shape
    strides = buffer.strides or contiguous_strides(shape)
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    return 0 if 0 in shape else (last + 1) * buffer.type.dtype.itemsize
