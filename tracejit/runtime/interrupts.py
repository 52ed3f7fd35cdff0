"""Holding back Ctrl-C while a plan writes: a step runs to its end, then the interrupt is raised."""

from __future__ import annotations

# the C functions themselves: signal.signal() spends microseconds on enums
from _signal import SIGINT, getsignal, signal
from threading import get_ident, main_thread

_MAIN = main_thread().ident


class uninterrupted:
    """Defer SIGINT until the block is over (main thread; other threads never get it)."""

    __slots__ = ("handler", "pending")

    def __enter__(self) -> None:
        self.handler = None
        if get_ident() != _MAIN:
            return
        handler = getsignal(SIGINT)
        if callable(handler):  # else ignored, default, or not installed from Python
            self.pending: list[tuple] = []
            signal(SIGINT, self._defer)
            self.handler = handler

    def _defer(self, *args: object) -> None:
        self.pending.append(args)

    def __exit__(self, *exception: object) -> None:
        if self.handler is not None:
            signal(SIGINT, self.handler)
            if self.pending and exception[0] is None:
                self.handler(*self.pending[-1])
