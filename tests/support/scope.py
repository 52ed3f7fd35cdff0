"""What `make test` leaves to `make test-all`: a part of each large sweep, the same in every run."""

from __future__ import annotations

import os
import zlib

WHOLE = os.environ.get("TRACEJIT_TEST_ALL") == "1"


def sampled(name: str, of: int = 2) -> bool:
    """Whether a case is among those that `make test` runs too: one of so many."""
    return WHOLE or zlib.crc32(name.encode()) % of == 0
