"""The interpreter's profiler, for the time of a block."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Profile = Callable[[FrameType, str, object], object]


def is_free() -> bool:
    """Whether a profile can be taken: no other profiler is active that cannot be called along."""
    before = sys.getprofile()
    return before is None or callable(before)


@contextmanager
def profiled(profile: Profile) -> Iterator[None]:
    """Call `profile` at what runs inside on this thread, and after it a profiler that is active."""
    before = sys.getprofile()

    def both(frame: FrameType, event: str, arg: object) -> None:
        profile(frame, event, arg)
        before(frame, event, arg)

    sys.setprofile(profile if before is None else both)
    try:
        yield
    finally:
        sys.setprofile(before)


@contextmanager
def suspended() -> Iterator[None]:
    """Without what notes the functions and lines that run: those inside are of no interest."""
    profile, trace = sys.getprofile(), sys.gettrace()
    if callable(profile):  # else it is one of C, which cannot be put back
        sys.setprofile(None)
    sys.settrace(None)
    try:
        yield
    finally:
        if callable(profile):
            sys.setprofile(profile)
        sys.settrace(trace)
