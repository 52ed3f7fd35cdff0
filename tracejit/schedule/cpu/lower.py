"""Plan → CpuPlan: the passes that decide what runs on the CPU, in their order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from tracejit.schedule.cpu.apart import deal_loops
from tracejit.schedule.cpu.attention import cut_attention
from tracejit.schedule.cpu.columns import fuse_columns
from tracejit.schedule.cpu.layout import place
from tracejit.schedule.cpu.loops import choose_loops
from tracejit.schedule.cpu.parts import deal_scattered
from tracejit.schedule.cpu.phases import write_out_phases
from tracejit.schedule.cpu.plan import CpuKernel, CpuPlan
from tracejit.schedule.cpu.planes import copy_planes
from tracejit.schedule.cpu.rows import cache_rows
from tracejit.schedule.cpu.sorting import deal_sorted
from tracejit.schedule.cpu.taps import write_out_taps
from tracejit.schedule.cpu.tiles import orient, tile
from tracejit.schedule.cpu.unpack import unpack
from tracejit.schedule.plan import Plan


def lower(
    plan: Plan, vector_bytes: int, met: Callable[[CpuKernel], object] = lambda kernel: None
) -> CpuPlan:
    """What the C executor runs for a plan, on a machine whose vectors have so many bytes. `met` is
    called with each different kernel as soon as it is lowered."""
    launches, parts = deal_loops(plan, fuse_columns(unpack(plan)))
    lowered: dict[CpuKernel, CpuKernel] = {}
    for launch in launches:
        if launch.kernel not in lowered:
            lowered[launch.kernel] = lower_kernel(launch.kernel, vector_bytes)
            met(lowered[launch.kernel])
    launches = [replace(launch, kernel=lowered[launch.kernel]) for launch in launches]
    return place(plan, launches, parts)


def lower_kernel(kernel: CpuKernel, vector_bytes: int) -> CpuKernel:
    """The passes over one kernel; a call of the host is as it is."""
    if kernel.kernel.call is not None:
        return kernel
    passes: tuple[Callable[[CpuKernel], CpuKernel], ...] = (
        orient,
        write_out_phases,
        copy_planes,
        write_out_taps,
        deal_scattered,
        choose_loops,  # first: caching a row is worth it only if loops go along it
        deal_sorted,
        cache_rows,
        partial(tile, vector_bytes=vector_bytes),
        partial(cut_attention, vector_bytes=vector_bytes),
    )
    for step in passes:
        kernel = step(kernel)
    return kernel
