"""How far a long call is: a line on a terminal, one entry in the log elsewhere.

    with telling("step"):           # a call that may trace and compile
        stage("schedule")           # anywhere below, on the same thread
        stage("load", "of 12 launches")

Nothing is said in the first two seconds. After that a line on stderr is rewritten twice a second
with a bar of the stages, and wiped when the call is over. Where stderr is no terminal, one line
goes to the logger "tracejit" at level INFO. TRACEJIT_PROGRESS=0 turns it off.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from tracejit import knobs

STAGES = ("capture", "passes", "schedule", "load", "run")
PATIENCE = 2.0  # seconds in which nothing is said
_INTERVAL = 0.5
_CLEAR = "\r\033[K"


class Line:
    """The progress of one call.

    clock and stream: the time in seconds, and where the line goes.
    """

    def __init__(self, name: str, clock: Callable[[], float], stream: TextIO):
        self.name, self.clock, self.stream = name, clock, stream
        self.stage, self.detail = STAGES[0], ""
        self._started = clock()
        self._shown = self._logged = False

    def text(self) -> str:
        """What is shown now."""
        at = STAGES.index(self.stage) + 1
        bar = "#" * at + "." * (len(STAGES) - at)
        detail = f" {self.detail}" if self.detail else ""
        seconds = self.clock() - self._started
        return f"tracejit: {self.name} [{bar}] {self.stage}{detail}, {seconds:.0f} s"

    def tick(self) -> None:
        """Some time has passed: show it if it is long enough."""
        if self.clock() - self._started < PATIENCE:
            return
        if self.stream.isatty():
            self.stream.write(_CLEAR + self.text())
            self.stream.flush()
            self._shown = True
        elif not self._logged:
            self._logged = True
            logging.getLogger("tracejit").info("%s", self.text())

    def wipe(self) -> None:
        """The call is over."""
        if self._shown:
            self.stream.write(_CLEAR)
            self.stream.flush()


_here = threading.local()


def stage(name: str, detail: str = "") -> None:
    """The call on this thread that is told of, if any, has come to a stage."""
    line = getattr(_here, "line", None)
    if line is not None:
        line.stage, line.detail = name, detail


@contextmanager
def telling(name: str) -> Iterator[None]:
    """Tell how far the call inside is, from another thread, once it takes long."""
    if not knobs.progress() or getattr(_here, "line", None) is not None or sys.stderr is None:
        yield
        return
    line, over = Line(name, time.monotonic, sys.stderr), threading.Event()

    def tell() -> None:
        left = PATIENCE
        while not over.wait(left):
            line.tick()
            left = _INTERVAL

    beside = threading.Thread(target=tell, name="tracejit-progress", daemon=True)
    beside.start()
    _here.line = line
    try:
        yield
    finally:
        _here.line = None
        over.set()
        beside.join()
        line.wipe()
