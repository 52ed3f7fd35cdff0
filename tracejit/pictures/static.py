"""A scene as SVG text, or as a PNG file by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from tracejit.pictures.layered import Point
from tracejit.pictures.picture import BACKWARD, FORWARD, UPDATE
from tracejit.pictures.scene import MARGIN, Curve, Rect, Scene, Text

_INK, _SOFT, _EDGE, _PAPER = "#1c2330", "#5b6576", "#8b95a5", "#ffffff"
_STROKE = {FORWARD: "#2563c9", BACKWARD: "#b4540a", UPDATE: "#1f7a4d"}
_FILL = {FORWARD: "#e6effc", BACKWARD: "#fdeedd", UPDATE: "#e0f3e8"}
_PALE = {FORWARD: "#f4f8fe", BACKWARD: "#fef8f1", UPDATE: "#f3faf6"}
_FONT = "DejaVu Sans Mono, Menlo, Consolas, monospace"
_POINTS = {"title": 12, "small": 10, "edge": 10, "leaf": 10}
_DPI = 200  # of a PNG, whose units are 1/96 inch


def svg(scene: Scene) -> str:
    """The scene as SVG that stands alone."""
    w, h = scene.w + 2 * MARGIN, scene.h + 2 * MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{w:.0f}" height="{h:.0f}" '
        f'viewBox="{-MARGIN:g} {-MARGIN:g} {w:.1f} {h:.1f}" font-family="{_FONT}">',
        f'<rect x="{-MARGIN:g}" y="{-MARGIN:g}" width="{w:.1f}" height="{h:.1f}" fill="{_PAPER}"/>',
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" markerUnits="userSpaceOnUse" orient="auto">'
        f'<path d="M0,0.8L8,4L0,7.2Z" fill="{_EDGE}"/></marker></defs>',
    ]
    lines += [_rect(r) for r in scene.rects]
    lines += [
        f'<path d="{_path(c.points)}" fill="none" stroke="{_EDGE}" stroke-width="{c.width:g}" '
        'marker-end="url(#arrow)"/>'
        for c in scene.curves
    ]
    lines += [_text(t) for t in scene.texts]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _look(r: Rect) -> tuple[str, str, float]:
    """Fill, stroke, and its width."""
    stroke = _STROKE[r.lane]
    match r.style:
        case "badge":
            return _PAPER, "none", 0.0
        case "lane" | "frame":
            return _PALE[r.lane], stroke, 0.4 if r.style == "lane" else 0.7
        case "input" | "free":
            return _PAPER, stroke, 1.2
        case _:
            return _FILL[r.lane], stroke, 1.2


def _rect(r: Rect) -> str:
    fill, stroke, width = _look(r)
    dashes = ' stroke-dasharray="3 2.5"' if r.style == "free" else ""
    kind = ' class="box"' if r.style in ("node", "input", "free", "folded") else ""
    return (
        f'<rect{kind} x="{r.x:.1f}" y="{r.y:.1f}" width="{r.w:.1f}" height="{r.h:.1f}" '
        f'rx="{r.radius:g}" fill="{fill}" stroke="{stroke}" stroke-width="{width:g}"{dashes}/>'
    )


def _text(t: Text) -> str:
    colour = _colour(t)
    heavy = ' font-weight="600"' if t.lane else ""
    halo = ""
    if t.style == "edge":
        halo = f' paint-order="stroke" stroke="{_PAPER}" stroke-width="2.5"'
    return (
        f'<text x="{t.x:.1f}" y="{t.y:.1f}" font-size="{_POINTS[t.style]}" fill="{colour}" '
        f'text-anchor="{t.anchor}"{heavy}{halo}>{escape(t.text)}</text>'
    )


def _colour(t: Text) -> str:
    if t.lane:
        return _STROKE[t.lane]
    return _INK if t.style == "title" else _SOFT


def _pieces(points: Sequence[Point]) -> list[tuple[Point, ...]]:
    """A curve in pieces: a point is a line there, three are a Bézier curve."""
    pieces: list[tuple[Point, ...]] = []
    for (x0, y0), (x, y) in zip(points, points[1:], strict=False):
        m = (y0 + y) / 2
        straight = x0 == x or y0 == y
        pieces.append(((x, y),) if straight else ((x0, m), (x, m), (x, y)))
    return pieces


def _path(points: Sequence[Point]) -> str:
    parts = [f"M{points[0][0]:.1f},{points[0][1]:.1f}"]
    for piece in _pieces(points):
        letter = "L" if len(piece) == 1 else "C"
        parts.append(letter + " ".join(f"{x:.1f},{y:.1f}" for x, y in piece))
    return "".join(parts)


def png(scene: Scene, path: Path) -> None:
    """Write the scene as PNG. ImportError where matplotlib, of the extra `pictures`, is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "a PNG is drawn by matplotlib, which is missing: pip install 'tracejit[pictures]', or "
            "draw an .svg, which needs nothing"
        ) from error
    w, h = scene.w + 2 * MARGIN, scene.h + 2 * MARGIN
    figure = Figure(figsize=(w / 96, h / 96), dpi=_DPI)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-MARGIN, w - MARGIN)
    axes.set_ylim(h - MARGIN, -MARGIN)
    axes.axis("off")
    _paint(axes, scene)
    figure.savefig(path, format="png")


def _paint(axes, scene: Scene) -> None:
    from matplotlib import patheffects
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
    from matplotlib.path import Path as Outline

    unit = 72 / 96  # points
    for r in scene.rects:
        fill, stroke, width = _look(r)
        dashes = (0, (3, 2.5)) if r.style == "free" else "solid"
        shape = f"round,pad=0,rounding_size={min(r.radius, r.h / 2)}"
        look = {"facecolor": fill, "edgecolor": stroke, "linewidth": width * unit}
        box = FancyBboxPatch((r.x, r.y), r.w, r.h, boxstyle=shape, linestyle=dashes, **look)
        axes.add_patch(box)
    for c in scene.curves:
        axes.add_patch(_arrow(c, FancyArrowPatch, Outline, unit))
    halo = [patheffects.withStroke(linewidth=2, foreground=_PAPER)]
    alignments = {"middle": "center", "start": "left", "end": "right"}
    for t in scene.texts:
        axes.text(
            *(t.x, t.y, t.text),
            fontsize=_POINTS[t.style] * unit,
            family="DejaVu Sans Mono",
            color=_colour(t),
            ha=alignments[t.anchor],
            va="baseline",
            weight="bold" if t.lane else "normal",
            path_effects=halo if t.style == "edge" else None,
        )


def _arrow(c: Curve, patch: type, outline: type, unit: float) -> object:
    points, codes = [c.points[0]], [outline.MOVETO]
    for piece in _pieces(c.points):
        points += piece
        codes += [outline.LINETO] if len(piece) == 1 else [outline.CURVE4] * 3
    return patch(
        path=outline(points, codes),
        arrowstyle="-|>",
        mutation_scale=5,
        color=_EDGE,
        linewidth=c.width * unit,
        shrinkA=0,
        shrinkB=0,
    )
