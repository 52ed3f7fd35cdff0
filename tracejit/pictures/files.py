"""Writing a picture into a file, as the end of its name says."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tracejit.pictures.page import OPEN, page, shows_views
from tracejit.pictures.picture import Picture
from tracejit.pictures.scene import scene
from tracejit.pictures.static import png, svg

ENDS = (".html", ".svg", ".png")


def write(make: Callable[[], Picture], path: str | os.PathLike) -> None:
    """Write a picture; `make` makes it, once it is known that it can be written. ValueError for an
    end of the name that says of no form."""
    path = Path(path)
    end = path.suffix.lower()
    if end not in ENDS:
        raise ValueError(f"a picture's name ends with {', '.join(ENDS)}, not {end or path.name!r}")
    found = make()
    if end == ".html":
        path.write_text(page(found), "utf-8")
        return
    drawn = scene(found, OPEN, views=shows_views(found))
    if end == ".svg":
        path.write_text(svg(drawn), "utf-8")
    else:
        png(drawn, path)
