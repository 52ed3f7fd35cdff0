"""How a step with collectives scales: what the ranks send, and how much of that time is hidden.

In: the launches of a call in their order, with the seconds that each takes alone. Out: the cost of
each collective, and the efficiency with another number of ranks.

Launches run one after another. Beside them the collectives run, also one after another, each from
where it is started, or from the end of the one before; where one is waited for, launches wait. All
ranks are taken to do as much as this one, however many there are, and to come to a collective at
the same time: an efficiency of 1 is a step that takes as long as its launches alone. A group of all
ranks grows with them; what is sent stays as large in all (`schedule/wire.py`), such as the
gradients of a model.
"""

from __future__ import annotations

from collections.abc import Sequence

from tracejit.ledger import CollectiveCost, Efficiency
from tracejit.links import ETHERNET, RANKS, Link, link_of, name_of
from tracejit.records import dataclass
from tracejit.schedule.collectives import START
from tracejit.schedule.kernel import Kernel
from tracejit.schedule.wire import ranks_of, sent, steps, whole


@dataclass(frozen=True)
class Timed:
    """A launch of a call, and its seconds; a half of a collective takes none by itself."""

    kernel: Kernel
    seconds: float

    @property
    def is_collective(self) -> bool:
        """Whether it is a half of a collective."""
        return self.kernel.call is not None and self.kernel.call.is_collective


@dataclass(frozen=True)
class Passage:
    """One collective in a call: what it takes, how long launches wait for it, and the launches
    that stand between its start and its wait, with their seconds."""

    kernel: Kernel
    seconds: float
    waited: float
    launches: int
    beside: float

    @property
    def hidden(self) -> float:
        """The share of its time that launches do not wait for."""
        return 1.0 - self.waited / self.seconds if self.seconds else 1.0


def passages(
    timeline: Sequence[Timed], cluster: Sequence[Link], world: int, ranks: int
) -> list[Passage]:
    """The collectives of a call, if its `world`, the ranks of its largest group, were `ranks`."""
    clock = free = 0.0  # of the launches; when the link is free again
    under_way: dict[object, tuple[Kernel, float, float, int, float]] = {}
    count, computed = 0, 0.0
    found: list[Passage] = []
    for one in timeline:
        if not one.is_collective:
            clock += one.seconds
            count, computed = count + 1, computed + one.seconds
            continue
        kernel = one.kernel
        number = dict(kernel.call.attrs)["number"]
        if kernel.call.phase == START:
            n = _grown(kernel, world, ranks)
            took = link_of(cluster, n).seconds(sent(kernel, n), steps(kernel, n)) if n > 1 else 0.0
            free = max(clock, free) + took
            under_way[number] = kernel, took, free, count, computed
            continue
        kernel, took, end, before, then = under_way.pop(number)
        waited = max(0.0, end - clock)
        clock += waited
        found.append(Passage(kernel, took, waited, count - before, computed - then))
    return found


def _grown(kernel: Kernel, world: int, ranks: int) -> int:
    """How many ranks a collective's group would have."""
    mine = ranks_of(kernel.call)
    return ranks if mine == world else min(mine, ranks)


def world_of(timeline: Sequence[Timed]) -> int:
    """The ranks of the largest group; 1 without collectives."""
    return max((ranks_of(x.kernel.call) for x in timeline if x.is_collective), default=1)


def collective_costs(timeline: Sequence[Timed], cluster: Sequence[Link]) -> list[CollectiveCost]:
    """Of each collective, with the ranks that there are."""
    world = world_of(timeline)
    return [
        CollectiveCost(
            collective=p.kernel.call.op.name,
            lines=p.kernel.lines,
            ranks=ranks_of(p.kernel.call),
            bytes=whole(p.kernel),
            sent=sent(p.kernel),
            seconds=p.seconds,
            beside=p.launches,
            beside_seconds=p.beside,
            hidden=p.hidden,
        )
        for p in passages(timeline, cluster, world, world)
    ]


def hidden_share(timeline: Sequence[Timed], cluster: Sequence[Link], ranks: int) -> float | None:
    """The share of all time on the wire that launches do not wait for; None where there is none."""
    found = passages(timeline, cluster, world_of(timeline), ranks)
    total = sum(p.seconds for p in found)
    return 1.0 - sum(p.waited for p in found) / total if total else None


def efficiency(timeline: Sequence[Timed], cluster: Sequence[Link], ranks: int) -> float:
    """The time of the launches alone, over their time with what they wait for."""
    computed = sum(x.seconds for x in timeline if not x.is_collective)
    waited = sum(p.waited for p in passages(timeline, cluster, world_of(timeline), ranks))
    return computed / (computed + waited) if waited else 1.0


def efficiencies(timeline: Sequence[Timed], cluster: Sequence[Link]) -> list[Efficiency]:
    """With each number of ranks of `links.RANKS`, over a cluster's links, and over Ethernet."""
    if world_of(timeline) == 1:
        return []
    return [
        Efficiency(
            links=name_of(links),
            ranks=n,
            link=link_of(links, n).name,
            efficiency=efficiency(timeline, links, n),
            hidden=hidden_share(timeline, links, n),
        )
        for links in (cluster, ETHERNET)
        for n in RANKS
    ]
