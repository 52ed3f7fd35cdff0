"""Golden files: what a text was when a person last accepted it."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "golden"


@dataclass(frozen=True)
class Golden:
    """`golden(name, text)` compares with <folder>/<name>; TRACEJIT_ACCEPT=1 rewrites it."""

    folder: Path = FOLDER

    def __call__(self, name: str, text: str) -> None:
        path, text = self.folder / name, text.rstrip("\n") + "\n"
        if os.environ.get("TRACEJIT_ACCEPT") == "1":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            return
        assert path.exists(), f"{path} does not exist; `make accept` writes it"
        rows = difflib.unified_diff(
            path.read_text().splitlines(), text.splitlines(), f"golden/{name}", "now", lineterm=""
        )
        diff = "\n".join(rows)
        assert not diff, f"{diff}\n`make accept` rewrites the file once this is what is wanted"
