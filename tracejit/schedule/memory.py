"""Memory planning: places by liveness.

In: for each piece of memory its size and the first and last launch that touch it, and rooms that
stand empty for some time. Out: places such that pieces alive at one time do not overlap, and the
size of the arena, which holds the pieces that fit no room.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tracejit.records import dataclass
from tracejit.schedule.plan import Plan

ALIGNMENT = 128  # bytes; a cache line, and enough for every vector load
ATTEMPTS = 8  # to place pieces, beside the first one in an order
WORK = 120_000  # pairs of pieces to look at in all attempts in an order


@dataclass(frozen=True, slots=True)
class Lifetime:
    """A piece of `nbytes` used by launches first … last (inclusive)."""

    nbytes: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Room:
    """Memory of `nbytes` that holds nothing before launch `until`: an output not yet written."""

    nbytes: int
    until: int


@dataclass(frozen=True, slots=True)
class Place:
    """`offset` bytes from the start of a room, or of the arena where `room` is None."""

    room: int | None
    offset: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a plan's kernels work.

    places: by position among the addresses of a run; a room is the position of an output there.
    count:  of these addresses: the plan's buffers, then memory that kernels work in.
    """

    places: Mapping[int, Place]
    count: int
    arena_bytes: int


def layout_of(plan: Plan) -> Layout:
    """The layout that a plan says itself."""
    start = {b.name: b.offset for b in plan.buffers if b.kind == "arena"}
    arena = {
        i: Place(None, start.get(b.of, 0) + b.offset)
        for i, b in enumerate(plan.buffers)
        if b.kind in ("arena", "row")
    }
    return Layout(arena, len(plan.buffers), plan.arena_bytes)


def plan_arena(lifetimes: Sequence[Lifetime]) -> tuple[list[int], int]:
    """Offsets in an arena (first fit, largest pieces first), and its size in bytes."""
    order = sorted(range(len(lifetimes)), key=lambda i: (-lifetimes[i].nbytes, i))
    places, total = _fitted(lifetimes, (), order)
    return [place.offset for place in places], total


def plan_memory(lifetimes: Sequence[Lifetime], rooms: Sequence[Room]) -> tuple[list[Place], int]:
    """Places in rooms and an arena, and the arena's size: the best of some attempts.

    The first one places the largest pieces first, another one those that live longest. Further
    ones place those first that reached the end of the arena in the attempt before.
    """
    by_size = sorted(range(len(lifetimes)), key=lambda i: (-lifetimes[i].nbytes, i))
    by_life = sorted(by_size, key=lambda i: lifetimes[i].first - lifetimes[i].last)
    least = _least(lifetimes, rooms)
    attempts = min(ATTEMPTS, WORK // (len(lifetimes) + 1) ** 2)
    found = []
    for order in (by_size, by_life):
        for _ in range(attempts + 1):
            found.append(_fitted(lifetimes, rooms, order))
            places, total = found[-1]
            if total <= least or not attempts:
                return min(found, key=lambda x: x[1])
            high = {
                i
                for i, place in enumerate(places)
                if place.room is None and place.offset + _padded(lifetimes[i].nbytes) == total
            }
            order = [*(i for i in order if i in high), *(i for i in order if i not in high)]
    return min(found, key=lambda x: x[1])


def _least(lifetimes: Sequence[Lifetime], rooms: Sequence[Room]) -> int:
    """A lower bound of the arena's size: the largest piece that fits no room; or at some time, what
    is alive then less what the rooms that are empty then can hold."""
    alone = [
        _padded(x.nbytes)
        for x in lifetimes
        if not any(x.nbytes <= room.nbytes and x.last < room.until for room in rooms)
    ]
    steps = range(max((x.last for x in lifetimes), default=-1) + 1)
    alive = [sum(_padded(x.nbytes) for x in lifetimes if x.first <= t <= x.last) for t in steps]
    empty = [sum(_padded(room.nbytes) for room in rooms if room.until > t) for t in steps]
    return max((*alone, *(a - e for a, e in zip(alive, empty, strict=True))), default=0)


def _fitted(
    lifetimes: Sequence[Lifetime], rooms: Sequence[Room], order: Sequence[int]
) -> tuple[list[Place], int]:
    """Places by first fit in some order: in the smallest room that does, else in the arena."""
    places: list[Place] = [Place(None, 0)] * len(lifetimes)
    placed: dict[int | None, list[int]] = {}
    total = 0
    by_size = sorted(range(len(rooms)), key=lambda i: rooms[i].nbytes)
    for i in order:
        mine = lifetimes[i]
        for at in (*by_size, None):
            if at is not None and (mine.last >= rooms[at].until or mine.nbytes > rooms[at].nbytes):
                continue
            taken = sorted(
                (places[j].offset, places[j].offset + _padded(lifetimes[j].nbytes))
                for j in placed.get(at, ())
                if lifetimes[j].first <= mine.last and mine.first <= lifetimes[j].last
            )
            offset = 0
            for low, high in taken:
                if offset + mine.nbytes <= low:
                    break
                offset = max(offset, high)
            if at is None or offset + mine.nbytes <= rooms[at].nbytes:
                break
        places[i] = Place(at, offset)
        placed.setdefault(at, []).append(i)
        if at is None:
            total = max(total, offset + _padded(mine.nbytes))
    return places, total


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
