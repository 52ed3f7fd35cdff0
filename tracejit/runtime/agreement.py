"""Ranks stay together: before each run of a plan with collectives the ranks compare what they do.

Guards, retraces and decisions are each rank's own, so ranks can come to one call with different
plans. Each rank sends a digest of its plan's collectives, and of the numbers that must be the same
on all of them, to the others, over a group of its own on the CPU. That goes on while the plan
computes; it is waited for before the first collective. Where digests differ, all ranks raise, with
what each was about to do, and nothing has been communicated or written.

What a rank must have in common with others: the collectives of a group, in their order; and the
runtime scalars, such as a learning rate, that have a part in what is written beside the result of a
collective: it would be the same on all ranks but for them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from tracejit.errors import CollectiveError, RanksDiffer
from tracejit.ir import exchange, process_groups
from tracejit.ir.exchange import Exchange, bare, digest
from tracejit.ir.graph import Graph
from tracejit.schedule.collectives import collectives_of, joins_of, shadows_of
from tracejit.schedule.plan import Plan


def numbers_in_common(graph: Graph) -> tuple[int, ...]:
    """The positions of the runtime scalars that ranks must have in common."""
    bit: dict[object, int] = {}
    for position, param in enumerate(graph.params):
        if param.value.type.is_host:
            bit[param.value] = 1 << position
    reduced: set[object] = set()
    for node in graph.nodes:
        found = 0
        if not node.is_ordered:
            for value in node.inputs:
                found |= bit.get(value, 0)
        for out in node.outs:
            bit[out] = found
        if node.is_ordered or not reduced.isdisjoint(node.inputs):
            reduced.update(node.outs)
    common = 0
    for write in graph.writes:
        if write.value in reduced:
            common |= bit.get(write.value, 0)
    return tuple(i for i in range(len(graph.params)) if common >> i & 1)


class Agreement:
    """What the ranks compare before a run of one plan."""

    def __init__(self, plan: Plan, positions: Sequence[int], names: Sequence[str] = ()):
        self.step, self.positions = plan.name, tuple(positions)
        self.goes_on = False  # the call has another plan to run afterwards
        self.names = [names[i] if i < len(names) else f"number {i}" for i in self.positions]
        self.sequences: dict[str, list[str]] = {}
        self.ranks: dict[str, int] = {}
        for group, ranks, what, where in collectives_of(plan):
            self.ranks[group] = ranks
            self.sequences.setdefault(group, []).append(f"{what} ({where})" if where else what)
        self._digests = {
            group: digest("\n".join([self.step, *map(bare, sequence)]).encode())
            for group, sequence in self.sequences.items()
        }
        self.joins = joins_of(plan)
        self.shadows = shadows_of(plan) if self.joins else {}
        self._pack = struct.Struct(f"{len(self.positions)}d").pack
        self._groups: dict[str, object] = {}  # as they were at the first run

    def begin(self, *numbers: float) -> None:
        """Send what this rank is about to do; before the first collective it is compared."""
        packed = self._pack(*numbers)
        exchange.tell(goes_on=self.goes_on)
        self._announce()
        before = process_groups.before()
        before.clear()
        exchanges = []
        for group, mine in self._digests.items():
            found = self._group(group)
            if found.size() > 1:
                exchanges.append((group, Exchange(found, digest(mine + packed))))
        before.append(lambda: self._compare(exchanges, numbers))

    def otherwise(self, what: str, *, fails: bool = False) -> None:
        """Say that this rank does not run a plan in this call, but `what`; return if no rank does.
        RanksDiffer where others do, unless this one `fails` anyway."""
        try:
            self._announce()
            groups = [self._group(name) for name in self._digests]
        except (CollectiveError, RanksDiffer):
            if fails:
                return
            raise
        exchange.otherwise(groups, self.step, what, fails=fails)

    def _announce(self) -> None:
        """Tell ranks that have joined that this one has not."""
        for group, (device, throws) in self.joins.items():
            exchange.announce(self._group(group), device, throws=throws)

    def _group(self, name: str) -> object:
        """A group that is still the one of the first run, with as many ranks as the plan is for."""
        group = process_groups.group_named(name)
        if group.size() != self.ranks[name]:
            raise CollectiveError(
                what=f"{self.step} on process group {name!r}",
                reason=f"it was compiled for {self.ranks[name]} ranks, and the group has "
                f"{group.size()}; compile the step in this world",
            )
        if self._groups.setdefault(name, group) is not group:
            raise CollectiveError(
                what=f"{self.step} on process group {name!r}",
                reason="it is another group than the step was compiled for; call step.reset()",
            )
        return group

    def _compare(self, exchanges: Sequence[tuple[str, Exchange]], numbers: tuple) -> None:
        for group, each in exchanges:
            each.settle(self.step, lambda group=group: self._said(group, numbers))
            process_groups.note_active(group, each.active)

    def _said(self, group: str, numbers: tuple) -> dict:
        """What the ranks compare where their digests differ, and what those hear that have
        joined."""
        return {
            "collectives": self.sequences[group],
            "numbers": dict(zip(self.names, map(repr, map(float, numbers)), strict=True)),
            "shadows": self.shadows.get(group, []),
            "goes on": self.goes_on,
        }
