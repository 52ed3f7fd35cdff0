"""Actions in child processes: what they return or raise, or that they never end."""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

DEADLINE = 120.0  # seconds after which a child is said to hang: for none that is well


@dataclass(frozen=True)
class Outcome:
    """How a child ended: its exit code, or minus the signal; what its action returned; the text
    that it has written to stderr."""

    code: int
    value: object
    text: str

    def result(self) -> object:
        """What the action returned, in a child that ended well."""
        assert self.code == 0, f"exit code {self.code}\n{self.text}"
        return self.value


def forked(action: Callable[[], object], deadline: float = DEADLINE) -> Outcome:
    """Run an action in a child made by fork, which ends without the exit handlers of this one."""
    values, texts = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(texts[1], 2)
            sys.stderr = open(2, "w", closefd=False, errors="replace")  # noqa: SIM115
            value = pickle.dumps(action())
            with open(values[1], "wb") as out:
                out.write(value)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    for end in (values[1], texts[1]):
        os.close(end)
    found = {values[0]: b"", texts[0]: b""}
    open_ends, last = set(found), time.monotonic() + deadline
    while open_ends and time.monotonic() < last:
        for end in select.select(list(open_ends), [], [], 0.2)[0]:
            piece = os.read(end, 1 << 16)
            found[end] += piece
            if not piece:
                open_ends.discard(end)
        if open_ends and (ended := os.waitid(os.P_PID, child, _LOOK)) is not None and ended.si_pid:
            last = min(last, time.monotonic() + 1.0)  # its own children may hold the pipes
    hangs = os.waitid(os.P_PID, child, _LOOK) is None
    if hangs and open_ends:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for end in found:
        os.close(end)
    text = found[texts[0]].decode(errors="replace")
    assert not (hangs and open_ends), f"the child hangs\n{text}"
    return Outcome(code, pickle.loads(found[values[0]]) if code == 0 else None, text)


_LOOK = os.WEXITED | os.WNOHANG | os.WNOWAIT
