"""Launches taken apart: one kernel each, with plain numbers as sizes."""

from __future__ import annotations

from tracejit.schedule.cpu.plan import CpuKernel, CpuLaunch
from tracejit.schedule.plan import Launch, Plan
from tracejit.schedule.sizes import substitute


def unpack(plan: Plan) -> list[CpuLaunch]:
    """Every kernel of a plan as a launch of its own, its sizes replaced by their values."""
    return [_concrete(one) for together in plan.launches for one in together.alone()]


def _concrete(launch: Launch) -> CpuLaunch:
    sizes = dict(zip(launch.kernel.sizes, launch.sizes, strict=True))
    kernel = CpuKernel(substitute(launch.kernel, sizes))
    return CpuLaunch(kernel, launch.buffers, launch.scalars, launch.loop)
