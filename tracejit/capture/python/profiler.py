"""The interpreter's profiler, for the time of a block."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from tracejit.capture.python import doubts

Profile = Callable[[FrameType, str, object], object]


def is_free() -> bool:
    """Whether a profile can be taken: no other profiler is active that cannot be called along."""
    before = sys.getprofile()
    return before is None or callable(before)


class _Watching(threading.local):
    """What is in place on a thread."""

    profile: Profile | None = None  # the profiler, if all of it is ours
    paused: tuple[Profile, object] | None = None  # that and the tracing of lines, meanwhile


_watching = _Watching()


@contextmanager
def profiled(profile: Profile) -> Iterator[None]:
    """Call `profile` at what runs inside on this thread, and after it a profiler that is active."""
    before, known = sys.getprofile(), _watching.profile

    def both(frame: FrameType, event: str, arg: object) -> None:
        profile(frame, event, arg)
        before(frame, event, arg)

    ours = profile if before is None else both
    if before is known:
        _watching.profile = ours
    sys.setprofile(ours)
    try:
        yield
    finally:
        sys.setprofile(before)
        _watching.profile = known


def pause() -> bool:
    """Note nothing of what runs until `go_on`, if there is a profiler here that is ours, and no
    debugger; says whether. Nearly all that runs in a trace is rules."""
    ours = _watching.profile
    if ours is None or sys.getprofile() is not ours:
        return False
    sys.setprofile(None)  # first, so that it does not hear of what follows
    trace = sys.gettrace()
    if trace is not None and getattr(trace, "__module__", "") != doubts.__name__:
        sys.setprofile(ours)
        return False
    if trace is not None:
        sys.settrace(None)
    _watching.paused = ours, trace
    return True


def go_on() -> None:
    """Note what runs again."""
    (profile, trace), _watching.paused = _watching.paused, None
    if trace is not None:
        sys.settrace(trace)
    sys.setprofile(profile)


@contextmanager
def heard() -> Iterator[None]:
    """Note what runs inside, after a `pause` too."""
    if _watching.paused is None:
        yield
        return
    go_on()
    try:
        yield
    finally:
        _watching.paused = _watching.profile, sys.gettrace()
        sys.setprofile(None)
        sys.settrace(None)


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
