"""A picture as one HTML page that needs nothing else: no network, no library.

In: a `Picture`. Out: the text of the page. Its style and scripts are files beside this one.
"""

from __future__ import annotations

import json
from html import escape
from importlib.resources import files as packaged
from pathlib import Path

from tracejit.pictures.grouping import VIEWS, Group, hidden, tree, unfold
from tracejit.pictures.picture import LANES, Picture

OPEN = 48  # boxes that are shown at first, if there are so many
FEW = 60  # nodes, up to which views and constants are shown
MOST_LINES = 3000  # of a file that is shown whole
AROUND = 30  # lines, around what is used of a longer one
SCRIPTS = ("layout.js", "graph.js", "draw.js", "panels.js", "page.js")


def page(picture: Picture) -> str:
    """The text of the page."""
    name = escape(picture.name)
    data = json.dumps(content(picture), ensure_ascii=False, separators=(",", ":"))
    options = "".join(f'<option value="{view}">{view}</option>' for view in VIEWS)
    legend = "".join(f'<span><i class="{lane}"></i>{lane}</span>' for lane in LANES)
    return _PAGE.format(
        title=f"{name} · tracejit",
        name=name,
        legend=legend,
        options=options,
        style=_packaged("page.css"),
        data=data.replace("<", "\\u003c"),
        scripts="\n".join(map(_packaged, SCRIPTS)),
    )


def shows_views(picture: Picture) -> bool:
    """Whether what kernels see through is shown at first: where there are few nodes."""
    return len(picture.nodes) <= FEW


def _packaged(name: str) -> str:
    return packaged(__package__).joinpath(name).read_text("utf-8")


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{name}</h1>
<div class="legend">{legend}</div>
<label>group by <select id="group">{options}</select></label>
<label title="reshape, permute, constants: kernels see through them"><input type="checkbox"
  id="views"> views</label>
<input id="search" type="search" placeholder="Search: op, module, f32[…], k3, file.py:12"
  aria-label="Search nodes"><span id="hits" role="status"></span>
<button id="open" title="Unfold all groups">Unfold</button>
<button id="fold" title="Fold all groups">Fold</button>
<button id="in" aria-label="Zoom in">+</button><button id="out" aria-label="Zoom out">−</button>
<button id="fit" title="Show all (0)">Fit</button>
<button id="hide-left" aria-pressed="true">Source</button>
<button id="hide-right" aria-pressed="true">Kernels</button>
<span id="count"></span>
</header>
<aside id="left" class="panel" aria-label="Source"><div id="source"></div></aside>
<main>
<svg id="graph" tabindex="0" role="application"
  aria-label="Graph: arrow keys move, Enter unfolds or selects, / searches">
<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"
  markerUnits="userSpaceOnUse" orient="auto"><path d="M0,0.8L8,4L0,7.2Z"/></marker></defs>
<g id="stage"></g>
</svg>
<div id="said" aria-live="polite"></div>
<div class="hint"><kbd>/</kbd> search <kbd>←↑↓→</kbd> move <kbd>Enter</kbd> unfold
<kbd>+</kbd> <kbd>−</kbd> <kbd>0</kbd> zoom</div>
</main>
<aside id="right" class="panel" aria-label="Kernels">
<section id="detail" hidden></section>
<h2>Step</h2><dl id="summary"></dl><div id="notes"></div>
<h2>Kernels (<span id="kernel-count"></span>)</h2><div id="kernels"></div>
</aside>
<script id="data" type="application/json">{data}</script>
<script>
{scripts}</script>
</body>
</html>
"""


def content(picture: Picture) -> dict[str, object]:
    """What the page's script reads: lists instead of records, lines and files by number."""
    lines = list(dict.fromkeys(n.line for n in picture.nodes if n.line is not None))
    number = {line: i for i, line in enumerate(lines)}
    paths = list(dict.fromkeys(line.file for line in lines))
    shown = [(path, found) for path in paths if (found := _file(path, lines)) is not None]
    at = {path: i for i, (path, _) in enumerate(shown)}
    gone, views = hidden(picture, views=shows_views(picture)), {}
    for view in VIEWS:
        groups = tree(picture, view)
        unfold(groups, OPEN, gone)
        views[view] = [_group(g) for g in groups]
    return {
        "name": picture.name,
        "device": picture.device,
        "showViews": shows_views(picture),
        "summary": picture.summary,
        "notes": picture.notes,
        "nodes": [
            [
                *(n.name, n.op, n.type, n.nbytes, LANES.index(n.lane), ".".join(n.module)),
                *(n.kind, -1 if n.line is None else number[n.line], n.attrs, n.operands),
                *(n.kernels, int(n.free), n.leaves),
            ]
            for n in picture.nodes
        ],
        "kernels": [
            {
                "name": k.name,
                "lines": k.lines,
                "text": k.text,
                "language": k.language,
                "cost": k.cost,
                "seconds": k.seconds,
            }
            for k in picture.kernels
        ],
        "lines": [[at.get(line.file, -1), line.number, str(line), line.function] for line in lines],
        "files": [
            {"name": Path(path).name, "path": path, "first": first, "text": text}
            for path, (first, text) in shown
        ],
        "views": views,
    }


def _group(group: Group) -> list[object]:
    children = [c if isinstance(c, int) else _group(c) for c in group.children]
    return [group.label, group.kind, LANES.index(group.lane), group.open, children]


def _file(path: str, lines: list) -> tuple[int, list[str]] | None:
    """The number of the first line that is shown of a file, and the lines; None where it cannot be
    read."""
    try:
        text = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    if len(text) <= MOST_LINES:
        return 1, text
    used = [line.number for line in lines if line.file == path]
    first = max(1, min(used) - AROUND)
    return first, text[first - 1 : max(used) + AROUND]
