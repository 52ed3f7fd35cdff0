"""Figures for people: tables as lines of text, lines of code, bytes, seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

Columns = Mapping[str, Callable[..., str]]  # heading of a column -> its cell in a row

LEFT = ("kernel", "form", "bound", "lines")  # columns of words, aligned to the left


def table(rows: Sequence[object], columns: Columns) -> list[str]:
    """The rows as lines of text under their headings."""
    cells = [list(columns), *cells_of(rows, columns)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        padded = (
            text.ljust(width) if name in LEFT else text.rjust(width)
            for name, text, width in zip(columns, line, widths, strict=True)
        )
        lines.append("  ".join(padded).rstrip())
    return lines


def cells_of(rows: Sequence[object], columns: Columns) -> list[list[str]]:
    """The cells of each row."""
    return [[cell(row) for cell in columns.values()] for row in rows]


def joined(lines: Sequence[str]) -> str:
    """`net.py:5`, `net.py:3` as `net.py:3,5`."""
    files: dict[str, list[str]] = {}
    for where in lines:
        file, _, number = where.rpartition(":")
        files.setdefault(file, []).append(number)
    return " ".join(f"{f}:{','.join(sorted(ns, key=int))}" for f, ns in files.items())


def size(nbytes: int) -> str:
    """Bytes, to four digits."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.4g} {name}"
    return f"{nbytes} B"


def duration(seconds: float) -> str:
    """Seconds, to three digits."""
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{1e6 * seconds:.3g} µs"


def micro(seconds: float | None) -> str:
    """Microseconds as a number; nothing for what is not known."""
    return "" if seconds is None else f"{1e6 * seconds:.1f}"
