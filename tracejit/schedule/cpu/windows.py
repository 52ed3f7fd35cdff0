"""An operand read through sliding windows, laid out so that a place is a row's plus a depth's.

In: the statements of a contraction's operand over its row and k, which read at quotients and
remainders of both: of a row, the image, the line and the column of a pixel; of k, the channel and
the tap. Out: the same over planes, the positions that digits of the row and of k say together (a
line and a tap: a line of the padded image). Where the operand is copied plane by plane, what lies
outside of an image is zeros there, each value is computed once instead of once for each tap, and
its place is a sum over digits: a table for the rows and one for k.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

from tracejit.ir.types import contiguous_strides
from tracejit.records import dataclass
from tracejit.schedule.axes import map_statements
from tracejit.schedule.cpu.access import places
from tracejit.schedule.cpu.digits import Digits, extents_of, over_digits, run_score, taken_apart
from tracejit.schedule.index import add
from tracejit.schedule.kernel import Axis, Index, Load, Statement

FIRST = 1000  # of the numbers of planes
COPIED_BYTES = 64 << 20  # of a copy, at most
GROWN = 4  # times as many elements as are read, at most


@dataclass(frozen=True, slots=True)
class Plane:
    """An axis of the copy: the sum of digits times steps, counted from its least value."""

    name: str
    extent: int
    low: int
    steps: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Windows:
    """How rows and k read: `apart` are the statements over digits, `statements` over planes, the
    slowest first; `place` is where an element lies in the copy, over digits."""

    rows: Digits
    depth: Digits
    apart: tuple[Statement, ...]
    planes: tuple[Plane, ...]
    statements: tuple[Statement, ...]
    place: Index

    @property
    def elements(self) -> int:
        """Of the copy."""
        return math.prod(p.extent for p in self.planes)

    @property
    def share(self) -> float:
        """The elements of the copy beside those that are read."""
        return self.elements / (self.rows.axis.extent * self.depth.axis.extent)

    @property
    def runs_along_rows(self) -> bool:
        """Whether longer stretches of memory are read along rows than along k."""
        most = self.elements
        scores = [run_score(axis, self.apart, most) for axis in (self.rows, self.depth)]
        return scores[0] > scores[1]

    def is_worth_a_copy(self, size: int) -> bool:
        """Whether the copy is small beside what is read through the windows."""
        return self.elements * size <= COPIED_BYTES and self.share <= GROWN


@lru_cache(512)
def windows_of(row: Axis, k: Axis, statements: tuple[Statement, ...]) -> Windows | None:
    """The windows that statements read through; None where they read no such things."""
    digits = taken_apart((row, k), statements)
    if all(len(d.digits) == 1 for d in digits):
        return None
    apart = over_digits(statements, digits, {row.name: row.extent, k.name: k.extent})
    indices = [index for s in apart for index in places(s)]
    if not all(isinstance(atom, str) for index in indices for atom, _ in index.terms):
        return None
    planes, directions = _planes(digits, indices, _widest(apart))
    if not planes:
        return None
    strides = contiguous_strides(tuple(p.extent for p in planes))
    parts = []
    for plane, stride in zip(planes, strides, strict=True):
        terms = tuple((name, step * stride) for name, step in plane.steps)
        parts.append(Index(terms, -plane.low * stride))
    known = dict(zip(indices, zip(*directions, strict=True), strict=True))

    def over_planes(index: Index) -> Index:
        of = list(zip(planes, known[index], strict=True))
        terms = tuple((plane.name, c) for plane, c in of if c)
        return Index(terms, index.offset + sum(plane.low * c for plane, c in of))

    return Windows(*digits, apart, planes, map_statements(apart, over_planes), add(parts))


def _widest(statements: Sequence[Statement]) -> Index:
    """The index of the load that moves with the most digits."""
    loads = [s.index for s in statements if isinstance(s, Load)]
    return max(loads, key=lambda index: len(index.terms), default=Index())


def _planes(
    digits: Sequence[Digits], indices: Sequence[Index], order: Index
) -> tuple[tuple[Plane, ...], tuple[tuple[int, ...], ...]]:
    """The planes, and how each index moves with each of them. Digits with which all indices move
    in one ratio are of one plane; planes stand as they lie in memory."""
    extents = extents_of(digits)
    coefficients = [dict(index.terms) for index in indices]
    groups: dict[tuple[int, ...], list[tuple[str, int]]] = {}
    for name, extent in extents.items():
        moves = [c.get(name, 0) for c in coefficients]
        step = math.gcd(*moves)
        if extent == 1 or not step:
            continue
        if next(c for c in moves if c) < 0:
            step = -step
        groups.setdefault(tuple(c // step for c in moves), []).append((name, step))
    found = []
    for direction, whole in groups.items():
        for members in _close(whole, extents):
            common = math.gcd(*(step for _, step in members))
            steps = tuple((name, step // common) for name, step in members)
            found.append((tuple(c * common for c in direction), steps))
    at = next((i for i, index in enumerate(indices) if index == order), 0)
    found.sort(key=lambda one: -abs(one[0][at]))
    planes = []
    for number, (_, steps) in enumerate(found):
        ends = [step * (extents[name] - 1) for name, step in steps]
        low, high = sum(min(e, 0) for e in ends), sum(max(e, 0) for e in ends)
        planes.append(Plane(f"i{FIRST + number}", high - low + 1, low, steps))
    return tuple(planes), tuple(direction for direction, _ in found)


def _close(
    members: Sequence[tuple[str, int]], extents: Mapping[str, int]
) -> list[list[tuple[str, int]]]:
    """Digits that move in one ratio, parted where their positions lie apart, such as an image and a
    channel with pixels between them. A plane of both would be mostly gaps."""
    parts: list[list[tuple[str, int]]] = []
    span = 0  # of the digits so far
    for name, step in sorted(members, key=lambda member: abs(member[1])):
        if not parts or abs(step) > span + abs(parts[-1][0][1]):
            parts.append([])
        parts[-1].append((name, step))
        span += abs(step) * (extents[name] - 1)
    return parts
