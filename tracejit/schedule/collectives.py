"""Collectives in a plan: each is two launches, one that starts it and one that waits for it.

In: groups, and who must run before whom. Out: the order in which they run, with a collective twice.
It starts as soon as what it sends is there, and in the order of the step; it is waited for when
nothing is left to do that does not need a result. So the ranks communicate while they compute.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import replace

from tracejit.ir.process_groups import IN_PLACE, THROWS, joins, place
from tracejit.ir.torch_types import TO_TORCH
from tracejit.ir.types import Type
from tracejit.records import dataclass
from tracejit.schedule.groups import Group, Groups
from tracejit.schedule.lower import Lowered
from tracejit.schedule.plan import Plan
from tracejit.schedule.tasks import Task

START, WAIT = "start", "wait"


@dataclass(frozen=True, slots=True)
class Turn:
    """A group's turn to run: `phase` says which half of a collective."""

    group: Group
    phase: str = ""
    before: tuple[int, ...] = ()  # the positions of turns that come first


def is_collective(group: Group) -> bool:
    """Whether a group is a collective and nothing else."""
    return group.apart is not None and group.apart.node.is_ordered


def turns(groups: Sequence[Group], all: Groups) -> list[Turn]:
    """The turns of groups that stand in an order in which they may run."""
    before = {group.id: sorted(all.before(group)) for group in groups}
    if not any(map(is_collective, groups)):
        at = {group.id: i for i, group in enumerate(groups)}
        return [Turn(group, "", tuple(at[id] for id in before[group.id])) for group in groups]
    return _Turns(groups, before, all).run()


class _Turns:
    """A list schedule of turns: what starts a collective first, what waits for one last."""

    def __init__(self, groups: Sequence[Group], before: dict[int, list[int]], all: Groups):
        self.groups = groups
        self.collective = {group.id for group in groups if is_collective(group)}
        self.needs: dict[tuple[int, str], set[tuple[int, str]]] = {}
        for group in groups:
            if group.id not in self.collective:
                self.needs[group.id, ""] = {self._end(id) for id in before[group.id]}
                continue
            read = {
                all.tasks[d.origin.id].group.id
                for d in group.apart.demands
                if d.origin.id in all.tasks
            }
            start = {self._end(id) for id in before[group.id] if id not in self.collective}
            start |= {self._end(id) for id in read}
            wait = {(group.id, START)}
            for id in before[group.id]:
                if id in self.collective:  # they start and end in their order
                    start.add((id, START))
                    wait.add((id, WAIT))
            self.needs[group.id, START], self.needs[group.id, WAIT] = start, wait

    def _end(self, id: int) -> tuple[int, str]:
        return (id, WAIT) if id in self.collective else (id, "")

    def run(self) -> list[Turn]:
        rank = {group.id: i for i, group in enumerate(self.groups)}
        by_id = {group.id: group for group in self.groups}
        first = {START: 0, "": 1, WAIT: 2}
        waiting = {turn: len(needs) for turn, needs in self.needs.items()}
        followers: dict[tuple[int, str], list[tuple[int, str]]] = {}
        for turn, needs in self.needs.items():
            for need in needs:
                followers.setdefault(need, []).append(turn)
        ready = [(first[p], rank[id], id, p) for (id, p), n in waiting.items() if not n]
        heapq.heapify(ready)
        found: list[Turn] = []
        at: dict[tuple[int, str], int] = {}
        while ready:
            _, _, id, phase = heapq.heappop(ready)
            needs = tuple(sorted(at[need] for need in self.needs[id, phase]))
            at[id, phase] = len(found)
            found.append(Turn(by_id[id], phase, needs))
            for turn in followers.get((id, phase), ()):
                waiting[turn] -= 1
                if not waiting[turn]:
                    heapq.heappush(ready, (first[turn[1]], rank[turn[0]], *turn))
        assert len(found) == len(self.needs)
        return found


def half(lowered: Lowered, phase: str) -> Lowered:
    """The launch that starts a collective, or that waits for it."""
    kernel = lowered.kernel
    buffers = kernel.buffers
    if phase == WAIT:
        buffers = tuple(replace(b, access="rw" if b.access == "w" else b.access) for b in buffers)
    call = replace(kernel.call, phase=phase)
    return replace(lowered, kernel=replace(kernel, buffers=buffers, call=call))


def in_place(task: Task, located: dict[int, str], groups: Groups) -> str:
    """The buffer of a collective's only operand, if the result may lie there: nobody else reads it,
    and the engine works in place. Else empty."""
    if task.kind != "host" or not task.node.is_ordered or task.node.op.name not in IN_PLACE:
        return ""
    if len(task.demands) != 1 or len(task.node.args) != 1:
        return ""
    (demand,) = task.demands
    if demand.origin.type != task.value.type or demand.origin is not demand.top:
        return ""
    if len(groups.consumers[demand.origin.id]) != 1:
        return ""
    return located.get(demand.origin.id, "") if demand.origin.id in groups.tasks else ""


def collectives_of(plan: Plan) -> list[tuple[str, int, str, str]]:
    """What the ranks must agree on: of each collective the group, how many ranks that has, what is
    done, and the user's line."""
    types = {b.name: b.type for b in plan.buffers}
    found = []
    for launch in plan.launches:
        call = launch.kernel.call
        if call is not None and call.phase == START:
            attrs = dict(call.attrs)
            said = [
                f"{k}={v}"
                for k, v in attrs.items()
                if k not in ("group", "number", "here", "sent", "received")
            ]
            kind = types[launch.buffers[-1]].dtype
            sizes = "+".join(str(types[name].numel) for name in launch.buffers[:-1])
            shapes = "" if attrs.get("here") is not None else f" of {sizes}"
            what = f"{call.op.name} {kind}{shapes} {' '.join(said)}"
            found.append((attrs["group"], attrs["ranks"], what, call.where))
    return found


def joins_of(plan: Plan) -> dict[str, tuple[str, bool]]:
    """Under which groups' `join()` a plan runs: on which device the ranks tell that they have not
    joined, and whether all raise where one has."""
    found: dict[str, tuple[str, bool]] = {}
    for attrs, _, type in _started(plan):
        if mark := joins(attrs):
            found[attrs["group"]] = place(type.device), mark == THROWS
    return found


def shadows_of(plan: Plan) -> dict[str, list[dict]]:
    """By group, what a rank that has joined has to do beside a plan: of each collective its name,
    reduction and root, dtype and number of elements, and whether it is one of a module under
    `join()`."""
    found: dict[str, list[dict]] = {}
    for attrs, name, type in _started(plan):
        said = {"name": name, "dtype": str(TO_TORCH[type.dtype]).rpartition(".")[2]}
        said |= {"count": type.numel, "own": bool(joins(attrs))}
        said |= {k: attrs[k] for k in ("by", "root") if k in attrs}
        found.setdefault(attrs["group"], []).append(said)
    return found


def _started(plan: Plan) -> Iterator[tuple[dict, str, Type]]:
    """The attributes, name and type of the result of each collective, as they start."""
    types = {b.name: b.type for b in plan.buffers}
    for launch in plan.launches:
        call = launch.kernel.call
        if call is not None and call.phase == START:
            yield dict(call.attrs), call.op.name, types[launch.buffers[-1]]
