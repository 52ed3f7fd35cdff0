"""How hard the C compiler works in a test."""

from __future__ import annotations

import pytest

from tracejit.runtime import c_compiler


def optimize(patch: pytest.MonkeyPatch, level: str) -> None:
    """Compile with `level`. "-O1" takes gcc two thirds of the time, and still makes vector code of
    the loops marked for it; "-O0" takes it half, and does not."""
    patch.setattr(c_compiler, "FLAGS", (level, *c_compiler.FLAGS[1:]))
