"""All launches of a plan as one launch in phases: what several steps in one launch are made of.

The kernels of a launch are a phase, whose programs need not wait for each other; a phase begins
when all programs of the one before have ended.
"""

from __future__ import annotations

from collections.abc import Sequence

from tracejit.records import dataclass
from tracejit.schedule.lower import Lowered
from tracejit.schedule.pack import side_by_side
from tracejit.schedule.plan import Launch

MAX_PARTS = 32
MAX_STATEMENTS = 1500
MAX_DOTS = 12  # their code is what takes long to compile


@dataclass(frozen=True)
class Phases:
    """launch: the kernels of all phases as its parts, in order.
    counts:    how many of them each phase has."""

    launch: Launch
    counts: tuple[int, ...]


def phases_of(launches: Sequence[Launch]) -> Phases | None:
    """The phases of a plan without loops; None where the host is asked in between, or where it
    would be too much code."""
    alone = [launch.alone() for launch in launches]
    parts = [one for each in alone for one in each]
    if any(one.kernel.call is not None for one in parts) or not 0 < len(parts) <= MAX_PARTS:
        return None
    dots = sum(stage.dot is not None for one in parts for stage in one.kernel.stages)
    statements = sum(1 for one in parts for _ in one.kernel.statements)
    if dots > MAX_DOTS or statements > MAX_STATEMENTS:
        return None
    lowered = [Lowered(one.kernel, one.buffers, one.scalars) for one in parts]
    together, sizes = side_by_side(lowered, [one.sizes for one in parts])
    launch = Launch(together.kernel, together.buffers, sizes, together.scalars)
    return Phases(launch, tuple(map(len, alone)))
