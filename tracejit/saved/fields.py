"""Reading JSON that somebody else may have written: each value is asked what it is.

An `Item` is a value and where it stands. Its methods give it as what it has to be, or raise Damaged
with the place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from tracejit.records import dataclass
from tracejit.saved.archive import Damaged

LIMIT = 1 << 48  # of sizes, offsets and positions
_MOST_DIGITS = 40


@dataclass(frozen=True, slots=True)
class Item:
    """A value of JSON."""

    value: object
    at: str

    def wrong(self, what: str) -> Damaged:
        """The error that it is something else."""
        shown = repr(self.value)
        shown = shown if len(shown) < 60 else f"{shown[:57]}…"
        return Damaged(f"{self.at} is {what}, not {shown}")

    def table(self, *names: str, more: Sequence[str] = ()) -> dict[str, Item]:
        """A table of exactly these names, of which there may be some `more`."""
        known = type(self.value) is dict and {*names} <= self.value.keys() <= {*names, *more}
        if not known:
            raise self.wrong(f"a table of {', '.join(names)}")
        return {name: self[name] for name in (*names, *more) if name in self.value}

    def items(self) -> dict[str, Item]:
        """A table of any names."""
        if type(self.value) is not dict:
            raise self.wrong("a table")
        return {name: self[name] for name in self.value}

    def rows(self, count: int | None = None) -> list[Item]:
        """A list, of a length if one is given."""
        if type(self.value) is not list or count not in (None, len(self.value)):
            raise self.wrong("a list" if count is None else f"a list of {count}")
        return [self[i] for i in range(len(self.value))]

    def text(self, *allowed: str) -> str:
        """A text; one of these, if any are given."""
        if type(self.value) is not str or (allowed and self.value not in allowed):
            raise self.wrong(f"one of {', '.join(allowed)}" if allowed else "a text")
        return self.value

    def whole(self, below: int = LIMIT, least: int = 0) -> int:
        """An integer in [least, below)."""
        if type(self.value) is not int or not least <= self.value < below:
            raise self.wrong(f"a whole number in [{least}, {below})")
        return self.value

    def wholes(self, below: int = LIMIT, least: int = 0) -> tuple[int, ...]:
        """A row of such integers."""
        return tuple(item.whole(below, least) for item in self.rows())

    def flag(self) -> bool:
        """True or false."""
        if type(self.value) is not bool:
            raise self.wrong("true or false")
        return self.value

    def number(self) -> int | float:
        """An integer or a float, which JSON has no infinite ones of: these are texts."""
        if self.value in ("nan", "inf", "-inf"):
            return float(self.value)
        if type(self.value) not in (int, float):
            raise self.wrong("a number")
        return self.value

    def __getitem__(self, key: str | int) -> Item:
        at = f"{self.at}[{key}]" if isinstance(key, int) else f"{self.at}.{key}"
        return Item(self.value[key], at)


def number_text(x: int | float) -> int | float | str:
    """A number as `Item.number` reads it."""
    return x if isinstance(x, int) or math.isfinite(x) else str(float(x))


def read_json(content: bytes, at: str) -> Item:
    """A text in JSON, in which no name stands twice and no number is endless."""
    try:
        text = content.decode()
        value = json.loads(text, object_pairs_hook=_unique, parse_int=_whole, parse_constant=_no)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{at} is no JSON ({error})") from error
    return Item(value, at)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in a table")
    return found


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _no(name: str) -> float:
    raise ValueError(f"a number {name}")
