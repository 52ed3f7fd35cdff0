"""Layered drawing of one level of a graph, as `layout.js` does it on the page.

layers (longest path) → rows of at most WIDE boxes, about BROAD wide → places for edges that
pass rows → order in the rows (barycenters) → x (least squares without overlap) → y
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import field

from tracejit.records import dataclass

GAP_X, GAP_Y = 18.0, 42.0
PASS, WIDE, BROAD, SWEEPS = 10.0, 7, 1200.0, 6
_COUNTED = 400  # ends of edges below a row, up to which crossings are counted

Point = tuple[float, float]
Size = tuple[float, float]
Edge = tuple[int, int]


@dataclass
class Item:
    """A box, or the place where edges from one box pass a row; `x` is its middle."""

    w: float
    h: float
    passes: bool = False
    up: list[int] = field(default_factory=list)
    down: list[int] = field(default_factory=list)
    x: float = 0.0


@dataclass(frozen=True)
class Layout:
    """Where boxes lie (their upper left corners), the points of each edge, the size of all."""

    places: list[Point]
    routes: list[list[Point]]
    w: float
    h: float


def layered(boxes: Sequence[Size], edges: Sequence[Edge]) -> Layout:
    """Lay out boxes, which are in an order in which edges go forward as far as they can."""
    count = len(boxes)
    if not count:
        return Layout([], [], 0.0, 0.0)
    down = [(min(e), max(e)) for e in edges]  # an edge back is drawn upward
    ins: list[list[int]] = [[] for _ in boxes]
    outs: list[list[int]] = [[] for _ in boxes]
    for a, b in down:
        outs[a].append(b)
        ins[b].append(a)
    grid = _rows(boxes, _layers(count, ins, outs))
    row = [0] * count
    for r, some in enumerate(grid):
        for i in some:
            row[i] = r
    items = [Item(w, h) for w, h in boxes]
    chains = _chains(down, row, grid, items)
    _order(grid, items)
    _place(grid, items)

    tops, y = [], 0.0
    heights = [max((items[i].h for i in some), default=0.0) for some in grid]
    for h in heights:
        tops.append(y)
        y += h + GAP_Y
    left = min(it.x - it.w / 2 for it in items)
    right = max(it.x + it.w / 2 for it in items)
    row_of = {i: r for r, some in enumerate(grid) for i in some}
    places = [(items[i].x - boxes[i][0] / 2 - left, tops[row[i]]) for i in range(count)]
    routes = []
    for chain, edge in zip(chains, edges, strict=True):
        points: list[Point] = []
        for k, i in enumerate(chain):
            x, r = items[i].x - left, row_of[i]
            top, bottom = tops[r], tops[r] + heights[r]
            if k == 0:
                points += [(x, top + boxes[i][1]), (x, bottom)]
            elif k == len(chain) - 1:
                points.append((x, top))
            else:
                points += [(x, top), (x, bottom)]
        routes.append(points if edge[0] < edge[1] else points[::-1])
    return Layout(places, routes, right - left, y - GAP_Y)


def _layers(count: int, ins: list[list[int]], outs: list[list[int]]) -> list[int]:
    """The longest path from above; what nothing comes before goes down to where it is read."""
    layer = [0] * count
    for i in range(count):
        for a in ins[i]:
            layer[i] = max(layer[i], layer[a] + 1)
    for i in reversed(range(count)):
        if not ins[i] and outs[i]:
            layer[i] = min(layer[b] for b in outs[i]) - 1
    return layer


def _rows(boxes: Sequence[Size], layer: Sequence[int]) -> list[list[int]]:
    layers: dict[int, list[int]] = {}
    for i, number in enumerate(layer):
        layers.setdefault(number, []).append(i)
    rows = []
    for _, some in sorted(layers.items()):
        total = sum(boxes[i][0] + GAP_X for i in some)
        count = max(math.ceil(len(some) / WIDE), math.ceil(total / BROAD))
        row: list[int] = []
        w = 0.0
        for i in some:
            full = len(row) >= len(some) / count or w + boxes[i][0] / 2 > total / count
            if row and full:
                rows.append(row)
                row, w = [], 0.0
            row.append(i)
            w += boxes[i][0] + GAP_X
        rows.append(row)
    return rows


def _chains(
    down: Sequence[Edge], row: Sequence[int], grid: list[list[int]], items: list[Item]
) -> list[list[int]]:
    """The items along each edge; rows that are passed get a place for all edges from one box."""
    trunks: dict[tuple[int, int], int] = {}
    chains = []
    for a, b in down:
        chain = [a]
        for r in range(row[a] + 1, row[b]):
            if (a, r) not in trunks:
                trunks[a, r] = len(items)
                grid[r].append(len(items))
                items.append(Item(PASS, 0.0, passes=True))
            chain.append(trunks[a, r])
        chain.append(b)
        for upper, lower in zip(chain, chain[1:], strict=False):
            if lower not in items[upper].down:
                items[upper].down.append(lower)
                items[lower].up.append(upper)
        chains.append(chain)
    return chains


def _mean(near: Sequence[int], of: Callable[[int], float], otherwise: float) -> float:
    return sum(map(of, near)) / len(near) if near else otherwise


def _order(grid: list[list[int]], items: Sequence[Item]) -> None:
    """Order the rows so that few edges cross."""
    at = [0.0] * len(items)

    def note(some: Sequence[int]) -> None:
        for k, i in enumerate(some):
            at[i] = k

    for some in grid:
        note(some)
    best, fewest = [list(some) for some in grid], _crossings(grid, items, at)
    for sweep in range(SWEEPS):
        if fewest <= 0:
            break
        downward = sweep % 2 == 0
        for some in grid if downward else grid[::-1]:
            key = {}
            for i in some:
                near = items[i].up if downward else items[i].down
                key[i] = _mean(near, at.__getitem__, at[i]), at[i]
            some.sort(key=key.__getitem__)
            note(some)
        now = _crossings(grid, items, at)
        if now < fewest:
            best, fewest = [list(some) for some in grid], now
    grid[:] = best


def _crossings(grid: Sequence[Sequence[int]], items: Sequence[Item], at: Sequence[float]) -> int:
    count = 0
    for some in grid:
        ends = [at[k] for i in some for k in sorted(items[i].down, key=at.__getitem__)]
        if len(ends) > _COUNTED:
            return len(ends)  # not worth the time
        count += sum(ends[k] > ends[i] for i in range(len(ends)) for k in range(i))
    return count


def _place(grid: Sequence[Sequence[int]], items: Sequence[Item]) -> None:
    """Each row in turn as near as it can be to the rows beside it; the order stays."""
    for some in grid:
        x = 0.0
        for i in some:
            items[i].x = x + items[i].w / 2
            x += items[i].w + GAP_X
        for i in some:
            items[i].x -= (x - GAP_X) / 2
    for sweep in range(2 * SWEEPS):
        downward = sweep % 2 == 0
        for some in grid if downward else grid[::-1]:
            wanted = []
            for i in some:
                near = items[i].up if downward else items[i].down
                wanted.append(_mean(near, lambda k: items[k].x, items[i].x))
            weights = [4 if items[i].passes else 1 for i in some]
            found = settle([items[i].w for i in some], wanted, weights)
            for i, x in zip(some, found, strict=True):
                items[i].x = x


def settle(
    widths: Sequence[float], wanted: Sequence[float], weights: Sequence[float]
) -> list[float]:
    """Centers nearest to those that are wanted, GAP_X apart: blocks that would overlap are one
    (pool adjacent violators)."""
    shift, total = [], 0.0
    for i, w in enumerate(widths):
        total += (widths[i - 1] + w) / 2 + GAP_X if i else 0.0
        shift.append(total)
    blocks: list[tuple[float, float, int]] = []  # mean, weight, count
    for i, x in enumerate(wanted):
        mean, weight, count = x - shift[i], float(weights[i]), 1
        while blocks and blocks[-1][0] >= mean:
            last, heavy, many = blocks.pop()
            mean = (last * heavy + mean * weight) / (heavy + weight)
            weight, count = heavy + weight, many + count
        blocks.append((mean, weight, count))
    found: list[float] = []
    for mean, _, count in blocks:
        for _ in range(count):
            found.append(mean + shift[len(found)])
    return found
