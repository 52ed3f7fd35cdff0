"""Settings read from the environment, in one place; read at each use so that tests can set them.

TRACEJIT_DEBUG   0..5   the debugging ladder (docs/design.md)
TRACEJIT_DUMP    dir    save every stage of every plan as a readable file
TRACEJIT_CACHE   dir    the disk cache; default $XDG_CACHE_HOME/tracejit or ~/.cache/tracejit,
                        or of who has no home a folder in the system's temporary one
TRACEJIT_VERIFY  0|1    rerun type inference on every node after every pass
TRACEJIT_ON_UNSUPPORTED  eager|raise  what `tracejit.compile` does by default with what it refuses
TRACEJIT_VERIFY_CALLS  k  what `tracejit.compile(verify=…)` is by default (docs/trust.md)
TRACEJIT_GRAPHS  0|1    whether steps on a GPU become CUDA graphs (default 1)
TRACEJIT_PROGRESS  0|1  whether a long first call tells how far it is (default 1)
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def debug() -> int:
    """The rung of the debugging ladder, 0 (quiet) to 5 (IR after every pass)."""
    text = os.environ.get("TRACEJIT_DEBUG", "0")
    return int(text) if text.isdigit() else 0


def dump_dir() -> Path | None:
    """Where every stage is saved as a file, or None."""
    text = os.environ.get("TRACEJIT_DUMP")
    return Path(text) if text else None


def cache_dir() -> Path:
    """Root of the disk cache."""
    text = os.environ.get("TRACEJIT_CACHE")
    if text:
        return Path(text)
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification says that others are to be ignored
        home = os.path.expanduser("~")
        if os.environ.get("HOME") == "" or not os.path.isabs(home):
            return Path(tempfile.gettempdir()) / f"tracejit-{os.getuid()}"
        base = os.path.join(home, ".cache")
    return Path(base) / "tracejit"


def verify() -> bool:
    """Whether each pass's result is verified (always in the tests)."""
    return os.environ.get("TRACEJIT_VERIFY", "0") == "1" or debug() >= 5


def on_unsupported() -> str:
    """What steps do with what capture refuses, where `compile` is not told: "eager" or "raise"."""
    return os.environ.get("TRACEJIT_ON_UNSUPPORTED", "eager")


def verified_calls() -> int | str:
    """What `compile(verify=…)` is where it is not told."""
    text = os.environ.get("TRACEJIT_VERIFY_CALLS", "0")
    return int(text) if text.isdigit() else text


def graphs() -> bool:
    """Whether the launches of a plan on a GPU become a CUDA graph."""
    return os.environ.get("TRACEJIT_GRAPHS", "1") != "0"


def progress() -> bool:
    """Whether a long first call tells how far it is."""
    return os.environ.get("TRACEJIT_PROGRESS", "1") != "0"
