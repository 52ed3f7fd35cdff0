"""The static drawing of a picture as shapes: what SVG and PNG show, folded as the page is at first.

In: a `Picture`. Out: a `Scene` of rectangles, curves and texts, with the places that the page gives
its boxes (`graph.js` and `draw.js` draw the same).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import field

from tracejit.pictures.grouping import Group, hidden, tree, unfold, without
from tracejit.pictures.layered import GAP_Y, Layout, Point, layered
from tracejit.pictures.picture import FORWARD, Picture, PictureNode
from tracejit.records import dataclass
from tracejit.tables import size

CHAR, SMALL = 7.3, 6.1  # widths of letters of the two monospaced sizes
NODE_H, FOLDED_H, HEAD, PAD, LANE_GAP = 26.0, 42.0, 26.0, 11.0, 84.0
TITLE, LEAF, MARGIN = 30, 34, 12.0  # letters of titles and of fates; around all


@dataclass(frozen=True)
class Rect:
    """`fill` and `stroke` are words: a phase, "paper", "soft" or "none"; `box` where it stands for
    a node or a folded group."""

    x: float
    y: float
    w: float
    h: float
    radius: float
    lane: str
    style: str  # node, input, free, folded, frame, lane, badge


@dataclass(frozen=True)
class Curve:
    points: tuple[Point, ...]
    width: float


@dataclass(frozen=True)
class Text:
    x: float
    y: float
    text: str
    style: str  # title, small, edge, leaf
    anchor: str = "middle"
    lane: str = ""


@dataclass
class Scene:
    """Shapes in the order in which they are drawn, and the size of all."""

    w: float = 0.0
    h: float = 0.0
    rects: list[Rect] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)


@dataclass
class _Link:
    start: int
    end: int
    values: dict[int, None] = field(default_factory=dict)


@dataclass
class _Open:
    """A group that is open, laid out."""

    layout: Layout
    links: list[_Link]
    sizes: list[tuple[float, float]]
    inner: list[_Open | None]


class _Artist:
    """Lays out and draws the groups of a picture."""

    def __init__(self, picture: Picture, most: int, *, views: bool):
        self.nodes = picture.nodes
        gone, groups = hidden(picture, views=views), tree(picture, "module")
        unfold(groups, most, gone)
        self.lanes = without(groups, gone)
        self.operands = _seen_through(picture.nodes, gone)
        self.links: dict[int, list[_Link]] = {}
        self.scene = Scene()
        self._link()

    def _link(self) -> None:
        """Each edge stands in the innermost group that has both of its ends."""
        ways: dict[int, list[tuple[int, int]]] = {}
        root = Group("", "root", FORWARD, list(self.lanes))
        self.root = root

        def walk(group: Group, way: list[tuple[int, int]]) -> None:
            for k, child in enumerate(group.children):
                here = [*way, (id(group), k)]
                if isinstance(child, int):
                    ways[child] = here
                else:
                    walk(child, here)

        walk(root, [])
        found: dict[tuple[int, int, int], _Link] = {}
        for to, some in enumerate(self.operands):
            for a in some:
                depth = 0
                while ways[a][depth] == ways[to][depth]:
                    depth += 1
                (group, start), (_, end) = ways[a][depth], ways[to][depth]
                key = group, start, end
                if key not in found:
                    found[key] = _Link(start, end)
                    self.links.setdefault(group, []).append(found[key])
                found[key].values[a] = None

    # ---- sizes

    def _size(self, child: Group | int) -> tuple[tuple[float, float], _Open | None]:
        if isinstance(child, int):
            return size_of_node(self.nodes[child]), None
        note = self._note(child)
        label = child.label if len(child.label) <= TITLE else "x" * TITLE
        if not child.open:
            w = max(CHAR * len(label) + 34, SMALL * len(note) + 20)
            return (w, FOLDED_H), None
        inner = self._lay_out(child)
        title = CHAR * len(label) + SMALL * len(note) + 60
        w, h = inner.layout.w + 2 * PAD, inner.layout.h + HEAD + 2 * PAD
        return (max(w, title), h), inner

    def _lay_out(self, group: Group) -> _Open:
        both = [self._size(child) for child in group.children]
        sizes, inner = [s for s, _ in both], [i for _, i in both]
        links = self.links.get(id(group), [])
        found = layered(sizes, [(link.start, link.end) for link in links])
        label = max((SMALL * len(self._said(link)) for link in links), default=0.0)
        more = max(0.0, (label - found.w) / 2)  # for labels, on either side
        places = [(x + more, y) for x, y in found.places]
        routes = [[(x + more, y) for x, y in points] for points in found.routes]
        return _Open(Layout(places, routes, found.w + 2 * more, found.h), links, sizes, inner)

    def _note(self, group: Group) -> str:
        some = group.nodes()
        kernels = {k for i in some for k in self.nodes[i].kernels}
        text = f"{len(some)} node{'s' * (len(some) != 1)}"
        return f"{text} · {len(kernels)} kernel{'s' * (len(kernels) != 1)}" if kernels else text

    def _said(self, link: _Link) -> str:
        some = [self.nodes[i] for i in link.values]
        if all(n.type.endswith("@host") for n in some):
            return "a number" if len(some) == 1 else f"{len(some)} numbers"
        total = size(sum(n.nbytes for n in some))
        return f"{some[0].type} · {total}" if len(some) == 1 else f"{len(some)} tensors · {total}"

    # ---- shapes

    def draw(self) -> Scene:
        scene = self.scene
        both = [self._size(lane) for lane in self.lanes]
        places: list[Point] = []
        y = 0.0
        for k, ((w, h), _) in enumerate(both):  # the first lane, and the others to the right of it
            if not k:
                places.append((0.0, 0.0))
            else:
                places.append((both[0][0][0] + LANE_GAP, y))
                y += h + LANE_GAP
            scene.w = max(scene.w, places[-1][0] + w)
            scene.h = max(scene.h, places[-1][1] + h)
        for lane, (box, inner), place in zip(self.lanes, both, places, strict=True):
            self._open(lane, inner, place, box)
        for link in self.links.get(id(self.root), []):
            a, b = ((places[k], both[k][0]) for k in (link.start, link.end))
            points, x, y = between(a, b, onward=link.end > link.start)
            scene.curves.append(Curve(points, 1.5))
            for k, part in enumerate(self._said(link).split(" · ")):
                scene.texts.append(Text(x, y - 5 + 16 * k, part, "edge"))
        return scene

    def _open(self, group: Group, inner: _Open, at: Point, box: tuple[float, float]) -> None:
        (x, y), (w, h), lane = at, box, group.lane
        outer = group.kind == "lane"
        self.scene.rects.append(Rect(x, y, w, h, 9, lane, "lane" if outer else "frame"))
        self.scene.texts.append(
            Text(x + 12, y + 17, short(group.label, TITLE), "title", "start", lane)
        )
        self.scene.texts.append(Text(x + w - 12, y + 17, self._note(group), "small", "end"))
        x0, y0 = x + (w - inner.layout.w) / 2, y + HEAD + PAD
        taken = []
        for child, place, extent, deeper in zip(
            group.children, inner.layout.places, inner.sizes, inner.inner, strict=True
        ):
            corner = (x0 + place[0], y0 + place[1])
            taken.append((*corner, *extent))
            if isinstance(child, int):
                self._node(self.nodes[child], corner, extent)
            elif deeper is None:
                self._folded(child, corner, extent)
            else:
                self._open(child, deeper, corner, extent)
        self._links(inner, x0, y0, taken)

    def _node(self, node: PictureNode, at: Point, box: tuple[float, float]) -> None:
        (x, y), (w, _), texts = at, box, self.scene.texts
        style = "input" if node.is_input else "free" if node.free else "node"
        self.scene.rects.append(Rect(x, y, w, NODE_H, 13 if node.is_input else 5, node.lane, style))
        badge = badge_of(node)
        room = SMALL * len(badge) + 12 if badge else 0.0
        title = node.name if node.is_input else node.op
        texts.append(Text(x + (w - room) / 2, y + 17, short(title, TITLE), "title"))
        if badge:
            wide = SMALL * len(badge) + 8
            left = x + w - wide - 5
            self.scene.rects.append(Rect(left, y + 6, wide, 14, 4, node.lane, "badge"))
            texts.append(Text(left + wide / 2, y + 16.5, badge, "small"))
        for k, leaf in enumerate(node.leaves):
            place = y + NODE_H + 11 + 14 * k
            texts.append(Text(x + w / 2, place, f"→ {short(leaf, LEAF)}", "leaf"))

    def _folded(self, group: Group, at: Point, box: tuple[float, float]) -> None:
        (x, y), (w, h) = at, box
        self.scene.rects.append(Rect(x, y, w, h, 7, group.lane, "folded"))
        middle = x + w / 2
        self.scene.texts.append(Text(middle, y + 18, short(group.label, TITLE), "title"))
        self.scene.texts.append(Text(middle, y + 33, self._note(group), "small"))

    def _links(self, inner: _Open, x0: float, y0: float, taken: list) -> None:
        said = set()
        for link, route in zip(inner.links, inner.layout.routes, strict=True):
            points = tuple((x + x0, y + y0) for x, y in route)
            self.scene.curves.append(Curve(points, 1.0))
            one = (link.start, next(iter(link.values))) if len(link.values) == 1 else None
            if one in said:
                continue
            text = self._said(link)
            at = _free_place(points, SMALL * len(text) + 4, taken, (x0, x0 + inner.layout.w))
            if at is not None:
                self.scene.texts.append(Text(at[0], at[1] + 3.5, text, "edge"))
                w = SMALL * len(text) + 4
                taken.append((at[0] - w / 2, at[1] - 6, w, 12))
                if one is not None:
                    said.add(one)


def scene(picture: Picture, most: int, *, views: bool) -> Scene:
    """The drawing of a picture, with at most so many boxes as far as groups can be folded.
    views: whether what kernels see through is drawn."""
    return _Artist(picture, most, views=views).draw()


def size_of_node(node: PictureNode) -> tuple[float, float]:
    """The size of a node's box, with what becomes of it below."""
    badge = badge_of(node)
    title = node.name if node.is_input else node.op
    w = CHAR * min(len(title), TITLE) + 18 + (SMALL * len(badge) + 12 if badge else 0.0)
    below = max((SMALL * min(len(x), LEAF) + 14 for x in node.leaves), default=0.0)
    return max(44.0, w, below), NODE_H + 14 * len(node.leaves)


def badge_of(node: PictureNode) -> str:
    """The kernels of a node in a few letters."""
    more = len(node.kernels) - 1
    return "" if more < 0 else f"k{node.kernels[0]}" + (f"+{more}" if more else "")


def short(text: str, most: int) -> str:
    """The end of a text that is too long."""
    return text if len(text) <= most else "…" + text[len(text) - most + 1 :]


def between(
    a: tuple[Point, tuple[float, float]], b: tuple[Point, tuple[float, float]], *, onward: bool
) -> tuple[tuple[Point, ...], float, float]:
    """The points of an arrow between two lanes, and the middle of its label."""
    (ax, ay), (aw, ah) = a
    (bx, by), (bw, bh) = b
    if ax == bx:
        x = ax + 60 + (0 if onward else 90)
        start, end = (ay + ah, by) if onward else (ay, by + bh)
        return ((x, start), (x, end)), x, (start + end) / 2
    left, right = (a, b) if ax < bx else (b, a)
    y = 13 + (0 if onward else 34) + right[0][1]
    edge = left[0][0] + left[1][0]
    foot = left[0][1] + left[1][1]
    far = right[0][0]
    points = [(edge, y), (far, y)]
    if y >= foot - 12:
        points = [(edge - 30, foot), (edge - 30, y), (far, y)]
    return tuple(points if onward else points[::-1]), (edge + far) / 2, y


def _seen_through(nodes: Sequence[PictureNode], hidden: Sequence[bool]) -> list[list[int]]:
    """Of each node, the nodes that it reads, seen through those that are hidden."""
    through: list[list[int]] = []
    found: list[list[int]] = []
    for i, node in enumerate(nodes):
        behind = [k for a in node.operands for k in through[a]]
        through.append(list(dict.fromkeys(behind)) if hidden[i] else [i])
        found.append([] if hidden[i] else list(dict.fromkeys(behind)))
    return found


def _free_place(
    points: Sequence[Point], w: float, taken: Sequence[tuple], within: tuple[float, float]
) -> Point | None:
    """Somewhere on an edge, in a gap between rows, where a label hides nothing."""
    for x, y in _places(points):
        x = min(max(x, within[0] + w / 2), within[1] - w / 2)
        box = (x - w / 2, y - 6, w, 12.0)
        if not any(overlap(box, other, 1.0) for other in taken):
            return x, y
    return None


def _places(points: Sequence[Point]) -> Iterator[Point]:
    for (xa, ya), (xb, yb) in zip(points, points[1:], strict=False):
        if GAP_Y - 2 <= abs(yb - ya) <= GAP_Y + 2:
            for t in (0.5, 0.22, 0.78):
                s = t * t * (3 - 2 * t)  # about where the curve is
                yield xa + (xb - xa) * s, ya + (yb - ya) * t


def overlap(a: Sequence[float], b: Sequence[float], by: float) -> bool:
    """Whether two boxes (x, y, w, h) come nearer to each other than that."""
    return (
        a[0] < b[0] + b[2] + by
        and b[0] < a[0] + a[2] + by
        and a[1] < b[1] + b[3] + by
        and b[1] < a[1] + a[3] + by
    )
