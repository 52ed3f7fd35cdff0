"""A ledger as one HTML page: no script, no network, legible in light and dark, and on paper."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tracejit.tables import LEFT, Columns, cells_of

_STYLE = """
:root { color-scheme: light dark; --line: #8885; --bar: #3b82f6aa; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { text-align: left; font-weight: 600; }
.number { text-align: right; white-space: nowrap; }
.scroll { overflow-x: auto; }
.bar { display: inline-block; height: .7rem; background: var(--bar); }
"""


def page(
    title: str,
    summary: Sequence[tuple[str, str]],
    tables: Sequence[tuple[str, Sequence[object], Columns]],
    drawn: str,
) -> str:
    """The page's text. The column called `drawn` gets a bar for each of its numbers, in the tables
    that have it."""
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        f'<head><meta charset="utf-8"><title>{escape(title)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_STYLE}</style></head>",
        "<body>",
        f"<h1>{escape(title)}</h1>",
        "<table>",
        *(f"<tr><th>{escape(n)}</th><td>{escape(text)}</td></tr>" for n, text in summary),
        "</table>",
    ]
    for heading, rows, columns in tables:
        lines += [f"<h2>{escape(heading)}</h2>", *_table(list(columns), rows, columns, drawn)]
    return "\n".join([*lines, "</body>", "</html>"]) + "\n"


def _table(head: Sequence[str], rows: Sequence[object], columns: Columns, drawn: str) -> list[str]:
    """One table; bars are as wide as their share of the largest number."""
    cells = cells_of(rows, columns)
    at = head.index(drawn) if drawn in head else None
    numbers = [0.0 if at is None else float(line[at] or 0) for line in cells]
    most = max(numbers, default=0) or 1.0
    names = "".join(f"<th{_kind(name)}>{escape(name)}</th>" for name in head)
    lines = ['<div class="scroll"><table>', f"<tr>{names}<th></th></tr>"]
    for line, number in zip(cells, numbers, strict=True):
        found = "".join(
            f"<td{_kind(name)}>{escape(text)}</td>" for name, text in zip(head, line, strict=True)
        )
        bar = f'<span class="bar" style="width: {12 * number / most:.2f}rem"></span>'
        lines.append(f"<tr>{found}<td>{bar}</td></tr>")
    return [*lines, "</table></div>"]


def _kind(name: str) -> str:
    return "" if name in LEFT else ' class="number"'
