"""Whether the memory of a CpuPlan is sound, with what kernels work in: see `schedule/sound.py`."""

from __future__ import annotations

from collections.abc import Iterator

from tracejit.schedule.cpu.plan import Call, CpuPlan
from tracejit.schedule.plan import Plan
from tracejit.schedule.sound import Access, Step, check, pieces_of, reads_first, touching


def check_cpu_plan(plan: Plan, cpu_plan: CpuPlan) -> None:
    """Check a plan as the CPU's passes have laid it out. Raises InvalidGraph."""
    count = len(plan.buffers)
    works = {name: (count + i, nbytes) for i, (name, nbytes) in enumerate(cpu_plan.working)}
    pieces = pieces_of(plan.buffers, cpu_plan.layout(plan.buffers), works)
    steps = [Step(tuple(_accesses(cpu_plan, call)), call.loop) for call in cpu_plan.calls]
    check(plan, pieces, steps, cpu_plan.arena_bytes)


def _accesses(cpu_plan: CpuPlan, call: Call) -> Iterator[Access]:
    """What a call does, both halves of it. Each has all buffers; what one of them adds up in memory
    of its own, the other one stores."""
    kernel = cpu_plan.kernels[call.kernel]
    memory = dict(zip((b.name for b in kernel.bound), call.buffers, strict=True))
    stored: set[str] = set()
    for half in (kernel, kernel.columns):
        for buffer in () if half is None else half.kernel.buffers:
            if buffer.name not in memory:
                continue
            writes = "w" in buffer.access
            if (
                writes
                and half.kernel.call is None
                and not touching(half.kernel.statements, buffer.name)
            ):
                continue
            reads = buffer.name not in stored and reads_first(half.kernel, buffer)
            yield Access(memory[buffer.name], reads, writes)
            stored |= {buffer.name} if writes else set()
    if call.working:
        yield Access(call.working, False, True)
