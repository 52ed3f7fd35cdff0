"""The private folder of this process: what is compiled passes through it.

It is removed when the process ends, and made anew where it is gone, or is a parent's. A lock on one
of its files, which the kernel takes back whenever a process ends, tells whether somebody uses it:
what killed processes have left behind is removed by the next one of the same user.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

from tracejit.forks import own_lock
from tracejit.records import dataclass

PREFIX = "tracejit-private-"
UNLOCKED_SECONDS = 3600.0  # a folder without a lock is left by a crash when it is so old
_TRIES = 8

_lock = own_lock(sys.modules[__name__], "_lock", threading.Lock)


@dataclass(frozen=True)
class _Held:
    path: Path
    process: int
    descriptor: int  # of the file that is locked


_held: _Held | None = None


def private_folder() -> Path:
    """A temporary folder that only this process uses. Raises OSError where there can be none."""
    global _held
    with _lock:
        if _held is None or _held.process != os.getpid() or not _held.path.is_dir():
            if _held is not None:
                with contextlib.suppress(OSError):
                    os.close(_held.descriptor)
                _held = None
            remove_left()
            _held = _made()
            atexit.register(_remove, _held)
        return _held.path


def remove_left() -> None:
    """Remove the private folders whose processes are gone."""
    try:
        with os.scandir(tempfile.gettempdir()) as entries:
            found = [Path(x.path) for x in entries if x.name.startswith(PREFIX)]
    except OSError:
        return
    for path in found:
        with contextlib.suppress(OSError):
            if _is_left(path):
                shutil.rmtree(path, ignore_errors=True)


def _made() -> _Held:
    for _ in range(_TRIES):
        path = Path(tempfile.mkdtemp(prefix=PREFIX))
        descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        with contextlib.suppress(OSError):  # as where the file system has no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path / "lock"), os.fstat(descriptor)):
                return _Held(path, os.getpid(), descriptor)
        os.close(descriptor)  # another process has taken it for one that was left
    raise OSError("no private folder stays where it was made")


def _is_left(path: Path) -> bool:
    status = os.lstat(path)
    if status.st_uid != os.getuid() or not path.is_dir() or path.is_symlink():
        return False
    try:
        descriptor = os.open(path / "lock", os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:  # it is being made just now, or its process was killed there
        return abs(time.time() - status.st_mtime) > UNLOCKED_SECONDS
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _remove(held: _Held) -> None:
    if os.getpid() == held.process:  # a child made by fork ends too
        shutil.rmtree(held.path, ignore_errors=True)
