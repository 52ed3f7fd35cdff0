"""The list of launches that are known to fall short of their GPU, with the numbers.

It is strict: what is not listed, or worse than listed, fails, and so does a line whose launch no
longer falls short, or does so less. TRACEJIT_ACCEPT=1 takes better numbers into the list and takes
lines off it; it never adds one, and never makes a number worse.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tracejit.report import Report
from tracejit.rows import shortfalls

LIST = Path(__file__).parents[1] / "shortfalls.txt"


Key = tuple[str, str, str, str]  # target, program, launch and form, what falls short


def found_in(program: str, reports: Sequence[Report]) -> dict[Key, float]:
    """What falls short in the plans of a program."""
    found, before = {}, 0
    for one in reports:
        for short in shortfalls(one):
            form = short.kernel.rpartition("_")[0]
            key = f"sm_{one.target}", program, f"{before + short.launch} {form}", short.what
            found[key] = float(f"{short.number:.3g}")
        before += len(one.rows)
    return found


@dataclass(frozen=True)
class Known:
    """The list in a file; its first line names the version of Triton that its numbers are of."""

    path: Path = LIST

    def triton(self) -> str:
        return self.path.read_text().splitlines()[0].removeprefix("# Triton ")

    def read(self) -> dict[Key, float]:
        found = {}
        for line in self.path.read_text().splitlines()[2:]:
            first, launch, last = line.split(" | ")
            target, _, program = first.partition(" ")
            what, _, number = last.rpartition(" ")
            found[target, program, launch, what] = float(number)
        return found

    def write(self, known: Mapping[Key, float]) -> None:
        head = self.path.read_text().splitlines()[:2]
        lines = [f"{t} {p} | {at} | {what} {n:g}" for (t, p, at, what), n in known.items()]
        self.path.write_text("\n".join([*head, *lines]) + "\n")

    def check(self, found: Mapping[Key, float], programs: Sequence[str], target: str) -> list[str]:
        """What is wrong with the list, for some programs; what may be accepted is written."""
        known, wrong, better = self.read(), [], {}
        for key, number in found.items():
            if key not in known:
                wrong.append(f"{' | '.join(key)} {number:g} is not on the list")
            elif _is_worse(key[-1], number, known[key]):
                wrong.append(f"{' | '.join(key)} is {number:g}, on the list {known[key]:g}")
            elif number != known[key]:
                better[key] = number
        gone = {
            key: None
            for key in known
            if key[0] == target and key[1] in programs and key not in found
        }
        changed = better | gone
        if changed and os.environ.get("TRACEJIT_ACCEPT") == "1":
            kept = {k: better.get(k, n) for k, n in known.items() if k not in gone}
            self.write(kept)
            changed = {}
        for key, number in changed.items():
            now = "no longer falls short" if number is None else f"is better now: {number:g}"
            wrong.append(f"{' | '.join(key)} {now}; `make accept` takes it into the list")
        return wrong


def _is_worse(what: str, number: float, known: float) -> bool:
    more_is_better = what in ("in flight", "balance")
    return number < known if more_is_better else number > known
