"""What a guard reads of lists that a step appends to and looks at (`python/histories.py`)."""

from __future__ import annotations

from collections.abc import Sequence

from tracejit.capture.effects.effects import Call
from tracejit.capture.proof.heap import Walk
from tracejit.capture.trace.scalars import Path


def numbers_of_records(walk: Walk, paths: Sequence[Path], call: Call) -> dict[Path, str]:
    """The runtime scalars that lists which the step appends to are asked for."""
    found = {}
    lists = {id(record.items): record.place.path for record in walk.records if record.looked_at}
    for path, number in zip(paths, call.scalars, strict=True):
        holder = call.holders[path[1]] if path[0] == "entry" else None
        if id(holder) not in lists:
            continue
        at, key = walk.holder(holder), path[2]
        name = walk.local(f"{at}[{key}]" if type(key) is int else f"{key[:-1]}{at})")
        kind = type(number).__name__
        walk.check(f"type({name}) is {kind}", f"{lists[id(holder)]} holds something else now")
        found[path] = name
    return found
