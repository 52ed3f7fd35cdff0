"""How each adversarial case ends: the table `golden/endings.tsv`, and what it is compared with.

A row is the module of a case, its name, and one of ENDINGS. Each test of a case compares its own
row; with TRACEJIT_ACCEPT=1 it writes it.
"""

from __future__ import annotations

import os
from functools import cache

from support.golden import FOLDER

TABLE = FOLDER / "endings.tsv"
SUITE = ("test_adversarial_", "test_python_", "test_looked_up")  # how its modules begin
ENDINGS = ("replay", "replay with cuts", "rerun", "eager")

Row = tuple[str, str]  # of a case: its module without "test_", and its name


@cache
def endings() -> dict[Row, str]:
    """The table as it was accepted."""
    if not TABLE.exists():
        return {}
    rows = (line.split("\t") for line in TABLE.read_text().splitlines())
    return {(module, name): ending for module, name, ending in rows}


def check_ending(module: str, name: str, ending: str) -> None:
    """A case of the suite ends as the table says."""
    if not module.startswith(SUITE):
        return
    row, known = (module.removeprefix("test_"), name), endings()
    if os.environ.get("TRACEJIT_ACCEPT") == "1" and known.get(row) != ending:
        known[row] = ending
        lines = ("\t".join((*key, known[key])) for key in sorted(known))
        TABLE.write_text("\n".join([*lines, ""]))
    assert known.get(row) == ending, f"{name} ends in {ending!r}, in {TABLE.name}: {known.get(row)}"
