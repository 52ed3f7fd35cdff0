"""Step counters of an optimizer: numbers in tensors that are one number as a rule.

In: what was captured, and where a replay reads its numbers. Out: which of the runtime scalars such
counters are; and the test, in each call, whether they are one number.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

from tracejit.capture.effects.captured import Captured
from tracejit.capture.proof.places import Places

_MANY = 8  # from which on it pays to ask


def counters_of(captured: Captured, places: Places) -> list[int]:
    """The runtime scalars that are read from tensors of one dtype, where these are many: the step
    counters of an optimizer, which are all the same as a rule."""
    kinds: dict[object, list[int]] = {}
    for i, path in enumerate(captured.paths):
        if path[0] == "item" and (kind := places.kind(path[1])) is not None:
            kinds.setdefault(kind, []).append(i)
    found = max(kinds.values(), key=len, default=[])
    return found if len(found) >= _MANY else []


class Alike:
    """Whether some of the scalars are one number, which is not 0: there are two of these."""

    def __init__(self, indices: Sequence[int]):
        start, count = indices[0], len(indices)
        in_a_row = [*indices] == [*range(start, start + count)]
        self._get = itemgetter(*[slice(start, start + count)] if in_a_row else indices)
        self._count = count

    def __call__(self, scalars: list) -> bool:
        found = self._get(scalars)
        return found.count(found[0]) == self._count and bool(found[0])
