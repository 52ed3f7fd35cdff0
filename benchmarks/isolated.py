"""Items run one after another in processes that may die: what fails stops no other.

A child gets a list of items and writes a line of JSON to the file $BENCH_LINES as each begins, and
as it ends (`Lines`). It may end early, by a crash, or because the device is of no more use after a
failure; then another child gets what is left. An item that takes too long is given up with its
child. What failed with an error of the device is run once more, alone and with launches that wait,
so that the error stands where it arises.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VARIABLE = "BENCH_LINES"
PATHS = {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep)}
BLOCKING = {"CUDA_LAUNCH_BLOCKING": "1"}
SAID = 6000  # characters of an error or of what a child said last
# what CUDA, torch or Triton say where the device, or its context, is of no more use
FATAL = ("CUDA error", "illegal memory access", "misaligned address", "unspecified launch failure")
FATAL += ("device-side assert", "cudaErrorLaunch", "an illegal instruction")

Note = Callable[[str, Mapping], None]  # is told the result of an item


class Lines:
    """A child's side: what it writes for its parent."""

    def __init__(self) -> None:
        self._path = os.environ.get(VARIABLE)

    def known(self, item: str) -> None:
        """There is an item."""
        self._write({"item": item})

    def begin(self, item: str) -> None:
        """An item begins."""
        self._write({"begin": item})

    def end(self, item: str, status: str, text: str = "", **more: object) -> None:
        """An item is over: "passed", "failed" or "skipped", and why."""
        self._write({"end": item, "status": status, "text": clipped(text)} | more)

    def _write(self, line: Mapping) -> None:
        if self._path:
            with open(self._path, "a") as file:
                file.write(json.dumps(line) + "\n")


def clipped(text: str) -> str:
    """The beginning and the end of a long text."""
    half = SAID // 2
    return text if len(text) <= SAID else f"{text[:half]}\n…\n{text[-half:]}"


def fatal(text: str) -> bool:
    """Whether an error is one after which a process cannot use the device any more."""
    return any(sign in text for sign in FATAL)


def run_items(
    items: Sequence[str],
    command: Callable[[Sequence[str]], Sequence[str]],
    note: Note,
    *,
    deadline: float,
    limit: float,
    root: Path = ROOT,
) -> None:
    """Run all items; `note(item, {"status", "text", "seconds"})` is called for each as it ends.

    command:  the child for some items.
    deadline: of time.monotonic, when no more is begun; what is left is "not begun".
    limit:    seconds for one item, the start of a child included.
    root:     the working directory of children.
    """
    left = list(items)
    while left and time.monotonic() < deadline:
        done, rest, said = _child(left, command, {}, note, deadline, limit, root)
        if not done:
            note(left[0], {"status": "failed", "text": f"its process did not begin it\n{said}"})
            rest = left[1:]
        left = rest
    for item in left:
        note(item, {"status": "not begun"})


def _child(
    items: Sequence[str],
    command: Callable[[Sequence[str]], Sequence[str]],
    environment: Mapping[str, str],
    note: Note,
    deadline: float,
    limit: float,
    root: Path,
) -> tuple[list[str], list[str], str]:
    """Run one child: the items that came to an end, those that did not begin, what it said."""
    with tempfile.TemporaryDirectory(prefix="tracejit-isolated-") as folder:
        lines, log = Path(folder, "lines"), Path(folder, "log")
        lines.touch()
        with log.open("w") as file:
            child = subprocess.Popen(
                command(items),
                cwd=root,
                env=os.environ | PATHS | environment | {VARIABLE: str(lines)},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        done, read, begun, since = [], 0, "", time.monotonic()
        ended = hung = False
        while not ended:
            ended = child.poll() is not None
            text = lines.read_text()
            whole = text[: text.rfind("\n") + 1]
            for line in whole[read:].splitlines():
                found = json.loads(line)
                if "begin" in found:
                    begun = found["begin"]
                    continue
                item = found.pop("end")
                found["seconds"] = round(time.monotonic() - since, 2)
                if found["status"] == "failed" and fatal(found["text"]) and not environment:
                    found |= _again(item, command, deadline, limit, root)
                note(item, found)
                done.append(item)
                begun, since = "", time.monotonic()
            read = len(whole)
            if not ended and time.monotonic() > min(since + limit, deadline):
                hung = ended = True
                kill(child)
            elif not ended:
                time.sleep(0.05)
        said = log.read_text(errors="replace")
    if begun:
        if hung and time.monotonic() > deadline:
            why, status = "the time was up", "not finished"
        else:
            why = f"it took more than {limit:.0f} s" if hung else f"exit status {child.returncode}"
            status = "hung" if hung else "crashed"
        note(begun, {"status": status, "text": f"{why}\n{clipped(said)}"})
        done.append(begun)
    return done, [item for item in items if item not in done], clipped(said)


def _again(
    item: str,
    command: Callable[[Sequence[str]], Sequence[str]],
    deadline: float,
    limit: float,
    root: Path,
) -> dict[str, object]:
    """An item alone, with launches that wait: where its error arises."""
    if time.monotonic() > deadline:
        return {}
    found: list[Mapping] = []
    _child([item], command, BLOCKING, lambda _, x: found.append(x), deadline, limit, root)
    return {"blocking": dict(found[-1])} if found else {}


def kill(child: subprocess.Popen) -> None:
    """End a child and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(10)  # a driver may hold it
