"""Settings: the options of `tracejit.compile`; and what is read from the environment, each time, so
that tests can set it.

TRACEJIT_DEBUG   0..5   the debugging ladder (docs/design.md)
TRACEJIT_DUMP    dir    save every stage of every plan as a readable file
TRACEJIT_CACHE   dir    the disk cache; default $XDG_CACHE_HOME/tracejit or ~/.cache/tracejit
TRACEJIT_VERIFY  0|1    rerun type inference on every node after every pass
TRACEJIT_ON_UNSUPPORTED  eager|raise  what `tracejit.compile` does by default with what it refuses
TRACEJIT_PROGRESS  0|1  whether a long first call tells how far it is (default 1)
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_CHOICES = {
    "mode": ("auto", "rerun", "replay"),
    "backend": ("auto", "c", "numpy", "triton", "interpret"),
    "on_unsupported": ("eager", "raise"),
    "randomness": ("eager", "fast"),
}


class Options(NamedTuple):
    """What `tracejit.compile` takes besides the step."""

    mode: str
    backend: str
    fuse: bool
    keep_grads: bool
    on_unsupported: str
    randomness: str = "eager"

    def check(self, backends: Iterable[str]) -> None:
        """Raise ValueError unless each is one of its choices; there may be more backends."""
        for name, known in _CHOICES.items():
            x, known = getattr(self, name), (*known, *(backends if name == "backend" else ()))
            if x not in known:
                raise ValueError(f"{name} is one of {known}, not {x!r}")


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
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tracejit"


def verify() -> bool:
    """Whether each pass's result is verified (always in the tests)."""
    return os.environ.get("TRACEJIT_VERIFY", "0") == "1" or debug() >= 5


def on_unsupported() -> str:
    """What steps do with what capture refuses, where `compile` is not told: "eager" or "raise"."""
    return os.environ.get("TRACEJIT_ON_UNSUPPORTED", "eager")


def progress() -> bool:
    """Whether a long first call tells how far it is."""
    return os.environ.get("TRACEJIT_PROGRESS", "1") != "0"
