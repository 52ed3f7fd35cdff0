"""The C text of a program."""

from __future__ import annotations

from tracejit.codegen.c import emit_kernel, unit
from tracejit.ir.text import parse
from tracejit.schedule import schedule
from tracejit.schedule.cpu.lower import lower


def printed(program: str) -> str:
    """The C unit of a program's kernels."""
    kernels = lower(schedule(parse(program)), 64).kernels.values()
    return unit([emit_kernel(kernel, i) for i, kernel in enumerate(kernels)], 64).text
