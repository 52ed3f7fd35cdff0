"""The C text of a program."""

from __future__ import annotations

from tracejit.codegen.c import emit_kernel, pieces, unit
from tracejit.ir.text import parse
from tracejit.schedule import schedule


def printed(program: str) -> str:
    """The C unit of a program's kernels."""
    found = pieces(schedule(parse(program)))
    return unit([emit_kernel(piece, number=i) for i, piece in enumerate(found)])
