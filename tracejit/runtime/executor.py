"""The interface that all executors share: a Plan in, something callable on memory out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tracejit.schedule.plan import Plan


class LoadedPlan(Protocol):
    """A plan ready to run. Everything that does not depend on addresses has been done."""

    def __call__(self, addresses: Sequence[int], scalars: Sequence[float]) -> None:
        """Run all launches in order.

        `addresses`: of element 0 of every buffer, in the order of `plan.buffers` (for arena buffers
        the arena's address plus the offset). `scalars`: the table, one float64 per slot.
        """


class Executor(Protocol):
    """Turns plans into loaded plans."""

    name: str

    def load(self, plan: Plan) -> LoadedPlan:
        """Prepare a plan's kernels; they may be shared with plans loaded earlier."""
