"""Recomputing instead of storing: what kernels need not keep in memory for each other.

In: groups after merging. Some values would be stored only because other groups read them. If all
kernels together then move fewer bytes, the readers compute such a value again instead. An example
is the weight's gradient of a layer norm: it reads the rows and two numbers for each, which costs
as much as reading one stored product, and nothing is stored for it. Out: the same groups, with
copies of such tasks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field, replace

from tracejit.ir.graph import Value
from tracejit.records import dataclass
from tracejit.schedule.groups import Group, Groups, placed
from tracejit.schedule.index import Indices
from tracejit.schedule.tasks import CHEAP_LIMIT, Analysis, Demand, Task, node_cost

WORTH = 1 << 16  # bytes that a change must save
SMALL = 8  # times smaller than a value, its origins' own operations do not count


@dataclass(slots=True)
class _Candidate:
    """A value that could be recomputed: its task, who reads it, and what that takes."""

    task: Task
    readers: list[tuple[Task, Demand]]
    chain: dict[int, Task] = field(default_factory=dict)  # the tasks to copy, by value
    leaves: dict[int, Demand] = field(default_factory=dict)  # what they read, by origin

    @property
    def groups(self) -> dict[int, Group]:
        return {task.group.id: task.group for task, _ in self.readers}

    @property
    def nbytes(self) -> int:
        return _stored(d for _, d in self.readers)


def recompute(
    groups: Groups,
    analysis: Analysis,
    stored: set[int],
    maps: bool = False,
    halfway: bool = False,
) -> list[Task]:
    """Copy tasks into the groups that read them; `stored` are values that are stored anyway.
    `maps`: those of groups that nothing is summed in, too. `halfway`: also from values of the same
    group that take too long to compute again. Returns the copies."""
    copies: list[Task] = []
    for group in reversed(list(groups.all.values())):  # readers first: what they copy reads others
        if maps or any(task.kind != "map" for task in group.tasks):
            found = _candidates(group, groups, analysis, stored, halfway)
            for candidate in _chosen(found, group, groups, stored):
                copies += _apply(candidate, groups)
    return copies


def _candidates(
    group: Group, groups: Groups, analysis: Analysis, stored: set[int], halfway: bool
) -> list[_Candidate]:
    """The values of a group that others could compute themselves."""
    found = []
    for task in group.tasks:
        consumers = groups.consumers.get(task.value.id, ())
        readers = [(t, d) for t, d in consumers if t.group is not group]
        if task.kind != "map" or task.value.id in stored or not readers:
            continue
        candidate = _Candidate(task, readers)
        if (
            all(d.aligned and not d.mask for _, d in readers)
            and _collect(task, candidate, groups, analysis, halfway) <= CHEAP_LIMIT
            and _one_place(candidate)
        ):
            found.append(candidate)
    return found


def _collect(
    task: Task, candidate: _Candidate, groups: Groups, analysis: Analysis, halfway: bool
) -> int:
    """Add a task, and the tasks of its group that it needs, to what a candidate copies; `halfway`:
    not those that would be too many.

    Returns the operations per element; more than CHEAP_LIMIT if the task cannot be copied.
    """
    if task.value.id in candidate.chain:
        return 0
    if task.node.op.family not in ("elementwise", "alias") or len(candidate.chain) > CHEAP_LIMIT:
        return CHEAP_LIMIT + 1
    candidate.chain[task.value.id] = task
    cost = node_cost(task.node)
    for arg in task.node.inputs:
        origin = analysis.origins.get(arg.id)
        if origin is None or origin.main is None or analysis.is_task(arg):
            continue
        if origin.main.type.numel * SMALL > task.value.type.numel:
            cost += origin.cost
    for demand in task.demands:
        below = groups.tasks.get(demand.origin.id)
        if below is None or below.group is not task.group or below.kind != "map":
            candidate.leaves[demand.origin.id] = demand
        elif demand.mask or not demand.aligned:
            return CHEAP_LIMIT + 1
        else:
            chain, leaves = dict(candidate.chain), dict(candidate.leaves)
            more = _collect(below, candidate, groups, analysis, halfway)
            if halfway and cost + more > CHEAP_LIMIT:
                candidate.chain, candidate.leaves = chain, leaves
                candidate.leaves[demand.origin.id], more = demand, 0
            cost += more
    return cost


def _one_place(candidate: _Candidate) -> bool:
    """Whether each group reads the value at one place only."""
    places: dict[int, set[Indices]] = {}
    for task, demand in candidate.readers:
        places.setdefault(task.group.id, set()).add(placed(demand.indices, task))
    return all(len(found) == 1 for found in places.values())


def _chosen(
    found: list[_Candidate], group: Group, groups: Groups, stored: set[int]
) -> list[_Candidate]:
    """The candidates of a group that together save most, if that is enough."""
    gain = _gain(found, group, groups, stored)
    while found:
        fewer = [[c for c in found if c is not left_out] for left_out in found]
        gains = [_gain(f, group, groups, stored) for f in fewer]
        if max(gains) <= gain:
            break
        gain = max(gains)
        found = fewer[gains.index(gain)]
    return found if gain >= WORTH else []


def _gain(found: list[_Candidate], group: Group, groups: Groups, stored: set[int]) -> int:
    """How many bytes fewer are moved if all these values are recomputed."""
    gone = {c.task.value.id for c in found}
    saved = sum(c.nbytes * (1 + len(c.groups)) for c in found)
    read: dict[int, dict[int, Demand]] = {}
    for c in found:
        for reader in c.groups.values():
            new = {id: d for id, d in c.leaves.items() if not _is_read(id, reader, group, groups)}
            read.setdefault(reader.id, {}).update(new)
    leaves = {id: d for c in found for id, d in c.leaves.items()}
    for id, demand in leaves.items():
        producer = groups.tasks.get(id)
        if producer is None or producer.group is not group or id in stored:
            continue
        if all(t.group is group or id in gone for t, _ in groups.consumers.get(id, ())):
            saved -= _stored([demand])
    return saved - sum(_stored([d]) for new in read.values() for d in new.values())


def _is_read(id: int, reader: Group, producer: Group, groups: Groups) -> bool:
    """Whether a kernel reads an origin, or one that can join it then does."""
    if id in reader.reads:
        return True
    others = (t.group for t, _ in groups.consumers.get(id, ()))
    alone = reader.dot is not None or reader.attends
    return not alone and any(
        other is not producer
        and other.dot is None
        and not other.attends
        and other.inner == reader.inner
        and other.shape == reader.shape
        for other in others
    )


def _stored(demands: Iterable[Demand]) -> int:
    """The bytes stored for all demands of one origin: its own, or those of a smaller value that
    all of them can read in its stead."""
    demands = list(demands)
    whole = demands[0].origin.type.nbytes
    tops: dict[int, Value] = {d.top.id: d.top for d in demands}
    return min(whole, *(v.type.nbytes for v in tops.values())) if len(tops) == 1 else whole


def _apply(candidate: _Candidate, groups: Groups) -> list[Task]:
    """Copy the tasks of a candidate into all groups that read it."""
    id = candidate.task.value.id
    copies: list[Task] = []
    at: dict[int, tuple[Group, Indices]] = {}
    for reader, demand in candidate.readers:
        at[reader.group.id] = reader.group, placed(demand.indices, reader)
    for group, place in at.values():
        outer = all(t.outer for t, _ in candidate.readers if t.group is group)
        copies += _copied(candidate, candidate.task, group, place, outer, groups)
        group.reads.discard(id)
    groups.consumers[id] = [(t, d) for t, d in groups.consumers[id] if t.group.id not in at]
    return copies


def _copied(
    candidate: _Candidate, task: Task, group: Group, place: Indices, outer: bool, groups: Groups
) -> list[Task]:
    """Copies of a task, and of those below it, in a group."""
    if any(t.value is task.value and t.place == place for t in group.tasks):
        return []
    copy = replace(task, group=group, place=place, outer=outer)
    group.tasks.append(copy)
    copies = [copy]
    for demand in task.demands:
        below = candidate.chain.get(demand.origin.id)
        if below is not None:
            at = placed(demand.indices, copy)
            copies += _copied(candidate, below, group, at, outer, groups)
        else:
            groups.read(copy, demand)
    return copies
