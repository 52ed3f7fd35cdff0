"""What `make test` leaves to `make test-all`: a part of each large sweep, the same in every run."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

WHOLE = os.environ.get("TRACEJIT_TEST_ALL") == "1"
FEWER = 12  # than a sweep says, so that `make test` stays within ten minutes on two slow cores


def sampled(name: str, of: float = 2) -> bool:
    """Whether a case is among those that `make test` runs too: one of `FEWER` times so many. A
    table of which every second case runs is `of` 0.17."""
    return WHOLE or zlib.crc32(name.encode()) % round(of * FEWER) == 0


def sample(cases: Sequence[pytest.Item], of: float = 2) -> list[pytest.Item]:
    """The cases of a sweep that `make test` runs: one of so many, and at least one."""
    return [case for case in cases if sampled(case.name, of)] or list(cases[:1])
