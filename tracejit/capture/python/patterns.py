"""Whether two texts, of which code tells some parts, can be equal.

In: texts as their parts, from left to right: strings, and anything else for what is not told.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def apart(a: Sequence[object], b: Sequence[object]) -> bool:
    """Whether two texts are never equal: their beginnings differ, or their ends."""
    if _is_whole(a):
        a, b = b, a
    (begins, ends), (other_begins, other_ends) = _edges(a), _edges(b)
    if _is_whole(a):
        return begins != other_begins
    if _is_whole(b):
        fits = other_begins.startswith(begins) and other_ends.startswith(ends)
        return not fits or len(other_begins) < len(begins) + len(ends)
    pairs = (begins, other_begins), (ends, other_ends)
    return any(x[: len(y)] != y[: len(x)] for x, y in pairs)


def _is_whole(parts: Sequence[object]) -> bool:
    return all(type(x) is str for x in parts)


def _edges(parts: Sequence[object]) -> tuple[str, str]:
    """How a text begins, and backwards how it ends, as far as is told."""
    backwards = (part[::-1] for part in _told(reversed(parts)))
    return "".join(_told(parts)), "".join(backwards)


def _told(parts: Iterable[object]) -> Iterator[str]:
    for part in parts:
        if type(part) is not str:
            return
        yield part
