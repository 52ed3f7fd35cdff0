"""Fusion: which tasks share a kernel, and which values are kept in memory between kernels.

In: a Graph and its Analysis. Out: a `Fusion`: groups in launch order, and the values that some
kernel stores for another to load. Tasks join in graph order: first the kernels that compute what
they read, then kernels that read the same elements. Writes over inputs come last, when all readers
of the old values are known: a write joins a kernel only if no reader of the old value runs after
it, and else becomes a copy at the end.
"""

from __future__ import annotations

import heapq

from tracejit.ir.graph import Graph, Node, Value
from tracejit.ir.ops import OPS
from tracejit.records import dataclass
from tracejit.schedule.groups import Group, Groups, is_same_attention, placed
from tracejit.schedule.index import Indices, identity
from tracejit.schedule.recompute import recompute
from tracejit.schedule.tasks import ATTENTION, Analysis, Origin, Task, is_row_major
from tracejit.schedule.waits import NOTHING, waits

SIBLINGS = 6  # how many earlier readers of a tensor are tried as company
MATES = 8  # how many kernels of the same size are tried for a constant fill


@dataclass(slots=True)
class Fusion:
    """Groups in launch order; `realized`: values loaded by other groups than their own, with the
    buffer that an output store already fills, or "" where the arena must hold them."""

    groups: list[Group]
    realized: dict[int, tuple[Value, str]]
    tasks: dict[int, Task]


class Fuser:
    """Builds the groups of one graph. `maps`: as `recompute` has it. `gpu`: for a GPU, whose sums
    may be in two steps (`parts.py`)."""

    def __init__(
        self,
        graph: Graph,
        analysis: Analysis,
        fuse: bool,
        again: bool = True,
        maps: bool = False,
        gather: bool = False,
        gpu: bool = False,
    ):
        self.graph, self.analysis, self.fuse, self.again = graph, analysis, fuse, again
        self.maps, self.gpu = maps, gpu
        self.groups = Groups(gather)
        self.order = 0
        self.by_numel: dict[int, list[int]] = {}
        self.ordered: Group | None = None  # the last collective so far
        self.waits = waits(graph, analysis)

    def run(self, outputs: list[str], inputs: dict[int, str]) -> Fusion:
        """Group everything. `outputs`: buffer per result; `inputs`: buffer per param id."""
        for result, buffer in zip(self.graph.results, outputs, strict=True):
            if not is_row_major(result):
                self.groups.strided.add(buffer)
            id = self.analysis.resolve(result.value).id
            self.groups.results[id] = self.groups.results.get(id, 0) + 1
        for node in self.analysis.nodes:
            for out in node.outs:
                if self.analysis.is_task(out):
                    group = self.place(self.analysis.task(self.tick(), node, out))
                    if node.is_ordered:
                        if self.ordered is not None:
                            self.groups.order(self.ordered, group)
                        self.ordered = group
        written = {w.target.id for w in self.graph.writes}
        writes = [
            (w.target, self._detached(w.target, self.analysis.resolve(w.value), written))
            for w in self.graph.writes
            if w.value.type.numel and self.analysis.resolve(w.value) is not w.target
        ]
        for result, buffer in zip(self.graph.results, outputs, strict=True):
            if result.value.type.numel:
                value = self.analysis.resolve(result.value)
                self.place(self.analysis.store(self.tick(), value, buffer, None))
        if self.fuse:
            self._retry()
        if self.fuse and self.again:
            self._recompute({value.id for _, value in writes})
        for target, value in writes:
            store = self.analysis.store(self.tick(), value, inputs[target.id], target)
            self.place_write(store)
        return Fusion(self._launch_order(), self._realize(), self.groups.tasks)

    def tick(self) -> int:
        """The next position in the order of tasks."""
        self.order += 1
        return self.order

    def _detached(self, target: Value, value: Value, written: set[int]) -> Value:
        """The value to write, behind a task of its own if it reads inputs that are overwritten.

        Reading the target itself at the very element that is written needs no such care.
        """
        if value.type.is_host or self.analysis.is_task(value):
            return value
        probe = self.analysis.store(0, value, "", target)
        here = identity(probe.shape)
        if all(
            d.origin.id not in written or (d.origin is target and d.indices == here and not d.mask)
            for d in probe.demands
        ):
            return value
        copy = self.analysis.new(value.type)
        node = Node(OPS["alias"], (value,), (), (copy,))
        self.analysis.producer[copy.id] = node
        self.analysis.origins[copy.id] = Origin(copy, copy)
        self.place(self.analysis.task(self.tick(), node))
        return copy

    def place(self, task: Task) -> Group:
        """Put a task in a group of its own, then merge that with its neighbours."""
        group = self.groups.add(task)
        for id in self.waits.get(task.value.id, NOTHING) if task.kind != "store" else ():
            if id in self.groups.tasks and self.groups.tasks[id].group is not group:
                self.groups.order(self.groups.tasks[id].group, group)
                group.waits.add(id)
        if task.kind == ATTENTION:
            return self._place_attention(task, group)
        if task.kind == "loop" and task.value is not task.node.out:
            return self.groups.merge(self.groups.tasks[task.node.out.id].group, group)
        if self.fuse or self._is_plain_store(task):
            for producer in self._producers(task):
                group = self.groups.merge(producer.group, group) or group
        if self.fuse:
            group = self._join_sibling(task, group)
            if task.kind == "store" and len(group.tasks) == 1 and not task.demands:
                for mate in self._mates(task):
                    merged = self.groups.merge(mate, group)
                    if merged is not None:
                        group = merged
                        break
        self.by_numel.setdefault(group.numel, []).append(group.id)
        return group

    def _place_attention(self, task: Task, group: Group) -> Group:
        """Merge with an earlier task of attention that has the same operands."""
        readers = self.groups.consumers[task.demands[0].origin.id] if self.fuse else ()
        for other, _ in readers:
            if other.kind == ATTENTION and other is not task and is_same_attention(other, task):
                group = self.groups.merge(other.group, group) or group
        return group

    def _is_plain_store(self, task: Task) -> bool:
        """Whether a store writes a task's value as it is."""
        return task.kind == "store" and self.analysis.is_task(task.value)

    def _producers(self, task: Task) -> list[Task]:
        """The tasks that a task reads at its own points, the latest first, one per group."""
        found = [
            self.groups.tasks[d.origin.id]
            for d in task.demands
            if d.aligned and d.origin.id in self.groups.tasks
        ]
        return sorted(found, key=lambda t: -t.order)

    def _join_sibling(self, task: Task, group: Group) -> Group:
        """Merge with an earlier kernel that reads a full-size tensor at the same elements."""
        here = task.place == identity(task.shape)
        if group.dot is not None or group.attends or not (here or self.gpu):
            return group
        for demand in task.demands:
            if demand.origin.type.numel != group.numel or not demand.aligned:
                continue
            readers = self.groups.consumers[demand.origin.id]
            for other, read in reversed(readers[-SIBLINGS - 1 : -1]):
                near = other.group
                if (
                    near is not group
                    and near.dot is None
                    and not near.attends
                    and near.shape == group.shape
                    and (self.gpu or other.place == identity(other.shape))
                    and placed(read.indices, other) == placed(demand.indices, task)
                ):
                    group = self.groups.merge(near, group) or group
        return group

    def _mates(self, task: Task) -> list[Group]:
        """Kernels over as many elements as a fill stores, the one of fewest buffers first."""
        ids = {self.groups.find(i): None for i in reversed(self.by_numel.get(_numel(task), []))}
        mates = [self.groups.all[i] for i in ids if self.groups.all[i] is not task.group]
        mates.sort(key=lambda g: len(g.reads) + g.stores)
        return mates[:MATES]

    def _retry(self) -> None:
        """Try once more to merge neighbours: domains may have gained reductions meanwhile."""
        for consumers in list(self.groups.consumers.values()):
            for task, demand in consumers:
                producer = self.groups.tasks.get(demand.origin.id)
                if producer is not None and demand.aligned and producer.group is not task.group:
                    self.groups.merge(producer.group, task.group)

    def _recompute(self, written: set[int]) -> None:
        """Recompute what is cheaper to compute again than to store; then kernels read the same."""
        stored = written | set(self.groups.results)
        for task in recompute(self.groups, self.analysis, stored, self.maps, self.gpu):
            self._join_sibling(task, task.group)

    def place_write(self, store: Task) -> None:
        """Put a write where no kernel still needs the value that it overwrites, and after the last
        collective: one that fails leaves everything as it was."""
        group = self.groups.add(store)
        readers = self.groups.consumers.get(store.target.id, ())
        last = self.ordered

        def unread(base: Group, moved: Group, place: Indices) -> bool:
            if last is not None and (last is base or self.groups.runs_before(base, last)):
                return False
            for reader, demand in readers:
                if reader.group in (base, moved):
                    same = reader is store or placed(demand.indices, reader) == place
                    if demand.mask or not demand.aligned or not same:
                        return False
                elif self.groups.runs_before(base, reader.group):
                    return False
            return True

        near = [t.group for t in self._producers(store)]
        if self.fuse:
            near += [t.group for t, _ in readers if t is not store]
            if not store.demands:
                near += self._mates(store)
        elif not self._is_plain_store(store):
            near = []
        for other in dict.fromkeys(near):
            merged = self.groups.merge(other, group, unread)
            if merged is not None:
                group = merged
                break
        for reader, _ in readers:
            if reader.group is not group:
                self.groups.order(reader.group, group)
        if last is not None:
            self.groups.order(last, group)
        self.by_numel.setdefault(group.numel, []).append(group.id)

    def _realize(self) -> dict[int, tuple[Value, str]]:
        """Which values other kernels load: an origin, or the one cheap value of it they want."""
        wanted: dict[int, dict[int, Value]] = {}
        for origin, consumers in self.groups.consumers.items():
            producer = self.groups.tasks.get(origin)
            if producer is None:
                continue
            tops = {d.top.id: d.top for t, d in consumers if t.group is not producer.group}
            if tops:
                wanted[origin] = tops
        stored = {
            (task.value.id, group.id): task.buffer
            for group in self.groups.all.values()
            for task in group.tasks
            if task.kind == "store"
        }
        realized: dict[int, tuple[Value, str]] = {}
        for origin, tops in wanted.items():
            producer = self.groups.tasks[origin]
            missing = []
            for id, top in tops.items():
                buffer = stored.get((id, producer.group.id))
                if buffer is not None:
                    realized[id] = (top, buffer)
                else:
                    missing.append(top)
            if len(missing) == 1 and missing[0].type.nbytes <= producer.value.type.nbytes:
                realized[missing[0].id] = (missing[0], "")
            elif missing:
                realized[origin] = (producer.value, stored.get((origin, producer.group.id), ""))
        return realized

    def _launch_order(self) -> list[Group]:
        """Groups sorted so that predecessors come first, else by their earliest task."""
        followers: dict[int, list[int]] = {}
        waiting: dict[int, int] = {}
        first = {id: min(t.order for t in g.tasks) for id, g in self.groups.all.items()}
        for id, group in self.groups.all.items():
            before = self.groups.before(group)
            waiting[id] = len(before)
            for p in before:
                followers.setdefault(p, []).append(id)
        ready = [(first[id], id) for id, count in waiting.items() if count == 0]
        heapq.heapify(ready)
        ordered = []
        while ready:
            _, id = heapq.heappop(ready)
            ordered.append(self.groups.all[id])
            for follower in followers.get(id, ()):
                waiting[follower] -= 1
                if waiting[follower] == 0:
                    heapq.heappush(ready, (first[follower], follower))
        assert len(ordered) == len(self.groups.all)
        return ordered


def _numel(task: Task) -> int:
    return task.value.type.numel
