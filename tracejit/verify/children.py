"""Work in child processes: what may crash, or hang, ends there and is told as data.

In: a function. Out: `Ended`, with what it returned, what it raised, or the signal that killed it. A
child is forked, so it has all that this process has, and nothing that it changes is left.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tracejit.records import dataclass

_PACKAGE = str(Path(__file__).parents[1]) + os.sep


@dataclass(frozen=True)
class Raised:
    """An error of a child: its class, what it says, the function of ours that raised it and its
    module ("" if none did), the file where it was raised, and its traceback."""

    kind: str
    text: str
    function: str
    module: str
    file: str
    trace: str


@dataclass(frozen=True)
class Ended:
    """How a child ended: it returned a value, it raised, or neither, as `died` says."""

    value: object = None
    raised: Raised | None = None
    died: str = ""


def in_child(work: Callable[[], object], seconds: float) -> Ended:
    """Do some work in a child, for so long at most. What it returns is pickled."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _work(work, writing)
    os.close(writing)
    data, ends = b"", time.monotonic() + seconds
    hung = False
    try:
        while True:
            left = ends - time.monotonic()
            if left <= 0 or not select.select([reading], [], [], left)[0]:
                hung = True
                break
            part = os.read(reading, 1 << 20)
            if not part:
                break
            data += part
    finally:
        os.close(reading)
        if hung:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if hung:
        return Ended(died="hangs")
    if os.WIFSIGNALED(status):
        return Ended(died=f"dies by {signal.Signals(os.WTERMSIG(status)).name}")
    try:
        return pickle.loads(data)
    except Exception:
        return Ended(died=f"ends with status {os.waitstatus_to_exitcode(status)}")


def _work(work: Callable[[], object], writing: int) -> None:
    """The life of a child."""
    try:
        with contextlib.suppress(Exception):
            faulthandler.disable()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        try:
            ended = Ended(value=work())
        except BaseException as error:
            ended = Ended(raised=raised(error))
        data = memoryview(pickle.dumps(ended))
        while data:
            data = data[os.write(writing, data) :]
    finally:
        os._exit(0)


def raised(error: BaseException) -> Raised:
    """An error as data."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = (f for f in frames if f.filename != __file__)
    ours = [f for f in inside if f.filename.startswith(_PACKAGE)]
    inner = frames and frames[-1].filename
    return Raised(
        type(error).__name__,
        str(error),
        ours[-1].name if ours else "",
        os.path.basename(ours[-1].filename) if ours else "",
        os.path.basename(inner or ""),
        "".join(traceback.format_exception(error)),
    )
