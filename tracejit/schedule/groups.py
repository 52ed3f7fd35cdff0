"""Groups of tasks that become one kernel, and the merging of two of them.

A group has a domain; each of its tasks has a place in it. Two groups merge when one's domain maps
onto the other's so that every value passed between them is read exactly where it is computed, no
third kernel stands between them, and the kernel stays within bounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import field

from tracejit.ir.ops.attention import FORWARD
from tracejit.ir.types import contiguous_strides
from tracejit.records import dataclass
from tracejit.schedule.index import (
    Indices,
    extents_of,
    flatten,
    identity,
    invert,
    substitute,
    unflatten,
)
from tracejit.schedule.tasks import APART, ATTENTION, IN_ORDER, Demand, Task, sums_of

MAX_BUFFERS = 24
MAX_TASKS = 400  # keeps one kernel's compile time bounded
ONE_PROGRAM = 4096  # elements that one program reduces as fast as many that wait for each other
SAVED_BYTES = 1 << 20  # of reads and writes that are worth a full reduction's waiting


@dataclass(eq=False, slots=True)
class Group:
    """Tasks of one kernel. `inner`: reduced axes of the domain (None: nothing is reduced);
    `again`: it goes over the elements of a full reduction once more, with the result. `in_order`:
    a task in order, the only one but for the store that says where its values are put; `apart`: a
    loop, with a task for each of its results, and their stores, or a call of the host and its
    store. `attends`: attention with the same operands, and plain stores of theirs, each over its
    own axes."""

    id: int
    shape: tuple[int, ...]
    tasks: list[Task]
    inner: tuple[int, ...] | None = None
    dot: Task | None = None
    in_order: Task | None = None
    apart: Task | None = None
    attends: bool = False
    reads: set[int] = field(default_factory=set)
    stores: int = 0
    again: bool = False
    preds: set[int] = field(default_factory=set)
    waits: set[int] = field(default_factory=set)  # values that other kernels compute before

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def outer(self) -> tuple[int, ...]:
        """The axes that are not reduced."""
        inner = self.inner or ()
        return tuple(k for k in range(len(self.shape)) if k not in inner)

    @property
    def outer_numel(self) -> int:
        return math.prod(self.shape[k] for k in self.outer)


class Groups:
    """All groups of a schedule, their order (who must run before whom), and merging. `gather`:
    computed numbers that are put together will lie together, so they count as one buffer."""

    def __init__(self, gather: bool = False) -> None:
        self.gather = gather
        self.pieces: set[int] = set()  # such numbers
        self.all: dict[int, Group] = {}  # live groups by id
        self.consumers: dict[int, list[tuple[Task, Demand]]] = {}  # readers by origin id
        self.tasks: dict[int, Task] = {}  # the task that computes a value, by value id
        self.results: dict[int, int] = {}  # how many results store a value, by value id
        self.strided: set[str] = set()  # buffers of results that do not lie row by row
        self._merged_into: dict[int, int] = {}
        self._before: dict[int, int] = {}  # bit set of the groups that must run earlier
        self._depths: dict[int, int] = {}  # what `_depth` found, while it holds
        self._next = 0

    def add(self, task: Task) -> Group:
        """A new group for a task."""
        group = Group(self._next, task.shape, [task])
        self._next += 1
        self.all[group.id] = group
        task.group, task.place = group, identity(task.shape)
        if task.kind == "reduce":
            group.inner = _reduced_axes(task)
        elif task.kind == "dot":
            group.dot = task
        elif task.kind in IN_ORDER:
            group.in_order = task
        elif task.kind in APART.values():
            group.apart = task
        group.attends = task.kind == ATTENTION
        if task.kind == "store":
            group.stores = task.value.id not in self.tasks
        else:
            self.tasks[task.value.id] = task
            group.stores = self.results.get(task.value.id, 0)
        before = 0
        for demand in task.demands:
            group.reads.add(demand.origin.id)
            self.consumers.setdefault(demand.origin.id, []).append((task, demand))
            producer = self.tasks.get(demand.origin.id)
            if producer is not None:
                if self.gather and demand.mask and demand.origin.type.numel == 1:
                    self.pieces.add(demand.origin.id)
                group.preds.add(producer.group.id)
                before |= self._before[producer.group.id] | 1 << producer.group.id
        self._before[group.id] = before
        return group

    def read(self, task: Task, demand: Demand) -> None:
        """Note that a task reads an origin, for a task that joins a group later; the origin's
        group, if it has one, must run before the task's anyway."""
        group = task.group
        group.reads.add(demand.origin.id)
        self.consumers.setdefault(demand.origin.id, []).append((task, demand))
        producer = self.tasks.get(demand.origin.id)
        if producer is not None and producer.group is not group:
            self.order(producer.group, group)

    def find(self, id: int) -> int:
        """The live group that an id belongs to by now."""
        while id in self._merged_into:
            id = self._merged_into[id]
        return id

    def before(self, group: Group) -> set[int]:
        """The ids of the groups that must run right before a group, and of some before those."""
        return {self.find(id) for id in group.preds} - {group.id}

    def runs_before(self, a: Group, b: Group) -> bool:
        """Whether a must run before b."""
        return bool(self._before[b.id] >> a.id & 1)

    def order(self, a: Group, b: Group) -> None:
        """Make a run before b; the caller knows that b need not run before a."""
        b.preds.add(a.id)
        self._forget_depths(b)
        new = self._before[a.id] | 1 << a.id
        self._spread(b, new)

    def _spread(self, group: Group, new: int) -> None:
        """Add predecessors to a group and to all groups after it."""
        if new & ~self._before[group.id] == 0:
            return
        self._before[group.id] |= new
        bit = 1 << group.id
        for other in self.all:
            if self._before[other] & bit:
                self._before[other] |= new

    def _apart(self, a: Group, b: Group) -> bool:
        """Whether a third group must run between a and b."""
        for first, last in ((a, b), (b, a)):
            for id in last.preds:
                middle = self.find(id)
                if middle not in (a.id, b.id) and self._before[middle] >> first.id & 1:
                    return True
        return False

    def edges(self, a: Group, b: Group) -> Iterator[tuple[Task, Task, Demand]]:
        """(producer, reader, demand) for every value passed between two groups."""
        small, large = (a, b) if len(a.tasks) <= len(b.tasks) else (b, a)
        for task in small.tasks:
            for demand in task.demands:
                producer = self.tasks.get(demand.origin.id)
                if producer is not None and producer.group is large:
                    yield producer, task, demand
            if task.kind != "store":
                for reader, demand in self.consumers.get(task.value.id, ()):
                    if reader.group is large:
                        yield task, reader, demand

    def merge(self, a: Group, b: Group, guard=None) -> Group | None:
        """Make a and b one group, or None where they must stay apart.

        `guard(base, moved, place_of)` may veto, once the places of the moved tasks are known.
        """
        if a is b:
            return a
        if any(t.value.id in w.waits for w, g in ((a, b), (b, a)) if w.waits for t in g.tasks):
            return None
        if a.attends or b.attends:
            return self._attend_together(a, b)
        if a.apart is not None or b.apart is not None:
            return self._loop_together(a, b)
        base, moved = (b, a) if _rank(b) > _rank(a) else (a, b)
        if not _compatible(base, moved) or self._apart(a, b) or not _stores_for(base, moved):
            return None
        edges = list(self.edges(a, b))
        stores_here = edges and len(moved.tasks) == 1 and moved.tasks[0].kind == "store"
        if not stores_here and (not self._fits(a, b) or self._delays(a, b, edges)):
            return None
        if not all(demand.aligned and not demand.mask for _, _, demand in edges):
            return None
        for axes, outer in self._candidates(base, moved, edges):
            if self._aligned(base, moved, axes, outer, edges) and (
                guard is None or guard(base, moved, axes)
            ):
                again = _is_again(base, moved, outer, edges)
                return self._join(base, moved, axes, outer, again)
        return None

    def _attend_together(self, a: Group, b: Group) -> Group | None:
        """Merge with a group of attention another one, or the plain store of one of its values."""
        base, moved = (a, b) if a.attends else (b, a)
        if self._apart(a, b) or not self._fits(a, b):
            return None
        if moved.attends:
            ours, theirs = ([t for t in g.tasks if t.kind == ATTENTION] for g in (base, moved))
            if not all(is_same_attention(one, other) for one in ours for other in theirs):
                return None
        else:
            task, *others = moved.tasks
            values = {t.value.id for t in base.tasks if t.kind == ATTENTION}
            if others or task.kind != "store" or task.value.id not in values:
                return None
        return self._join(base, moved, identity(moved.shape), False, False)

    def _loop_together(self, a: Group, b: Group) -> Group | None:
        """Merge with a loop another result of it, or the plain store of a sum of its."""
        base, moved = (a, b) if a.apart is not None else (b, a)
        if base.apart.kind == "host" or self._apart(a, b):
            return None
        if moved.apart is None:
            task, *others = moved.tasks
            known = {t.demands[0].origin.id for t in base.tasks if t.kind == "store"}
            plain = task.kind == "store" and task.target is None
            plain = plain and task.value in sums_of(base.apart.node)
            if others or not plain or task.value.id in known or task.buffer in self.strided:
                return None
        elif moved.apart.node is not base.apart.node:
            return None
        return self._join(base, moved, identity(moved.shape), False, False)

    def _fits(self, a: Group, b: Group) -> bool:
        return (
            len(a.tasks) + len(b.tasks) <= MAX_TASKS
            and len((a.reads | b.reads) - self.pieces) + a.stores + b.stores <= MAX_BUFFERS
        )

    def _delays(self, a: Group, b: Group, edges) -> bool:
        """Whether a full reduction would wait for what it does not need, and that saves little.

        All readers of its result would wait too; in a kernel of its own it finds company in an
        earlier launch.
        """
        if not (_is_total(a) or _is_total(b)):
            return False
        others = (self.before(a) | self.before(b)) - {a.id, b.id}
        known = self._depths
        start = max((known[x] if x in known else self._depth(x) for x in others), default=-1) + 1
        if not any(_is_total(g) and self._depth(g.id) < start for g in (a, b)):
            return False
        passed = {producer.value.id: producer.value for producer, _, _ in edges}
        shared = {
            d.origin.id: d.origin
            for group in (a, b)
            for task in group.tasks
            for d in task.demands
            if d.origin.id in a.reads & b.reads
        }
        return sum(v.type.nbytes for v in (passed | shared).values()) < SAVED_BYTES

    def _depth(self, id: int) -> int:
        """The length of the longest chain of groups that must run before a group."""
        stack = [id]
        while stack:
            before = self.before(self.all[stack[-1]])
            unknown = [p for p in before if p not in self._depths]
            if unknown:
                stack += unknown
            else:
                depth = max((self._depths[p] + 1 for p in before), default=0)
                self._depths[stack.pop()] = depth
        return self._depths[id]

    def _forget_depths(self, group: Group) -> None:
        """A group's place in the order has changed, and so that of the groups after it."""
        bit = 1 << group.id
        self._depths = {
            id: depth
            for id, depth in self._depths.items()
            if id != group.id and not self._before[id] & bit
        }

    def _candidates(self, base: Group, moved: Group, edges) -> Iterator[tuple[Indices, bool]]:
        """Indices of moved's domain over base's axes, and whether they use outer axes only."""
        extents = extents_of(base.shape)
        if moved.numel == base.numel:
            yield _same_flat(base.shape, moved.shape), False
        if base.inner is not None and moved.inner is None and moved.numel == base.outer_numel:
            axes = tuple(identity(base.shape)[k] for k in base.outer)
            shape = tuple(base.shape[k] for k in base.outer)
            flat = flatten(axes, contiguous_strides(shape))
            yield unflatten(flat, moved.shape, extents), True
        if moved.numel != base.numel:
            return
        for producer, reader, demand in edges:
            if producer.group is base and reader.place == identity(moved.shape):
                axes = invert(
                    demand.indices,
                    demand.origin.type.shape,
                    reader.shape,
                    producer.value_place,
                    extents,
                )
            elif producer.group is moved and producer.value_place == identity(moved.shape):
                axes = placed(demand.indices, reader)
                own = moved.shape
                if invert(axes, own, base.shape, identity(own), extents_of(own)) is None:
                    axes = None
            else:
                axes = None
            if axes is not None:
                yield axes, False
                return

    def _aligned(self, base: Group, moved: Group, axes: Indices, outer: bool, edges) -> bool:
        """Whether every value is read where it is computed if moved's domain is mapped so."""
        if not _reductions_fit(base, moved, axes):
            return False
        extents = extents_of(base.shape)
        for producer, reader, demand in edges:
            produced, read = producer.value_place, placed(demand.indices, reader)
            if producer.group is moved:
                produced = _over(produced, axes, moved, extents)
            else:
                read = _over(read, axes, moved, extents)
            if produced != read:
                return False
        one_program = base.dot is None and base.numel <= ONE_PROGRAM
        return one_program or not _is_again(base, moved, outer, edges)

    def _join(self, base: Group, moved: Group, axes: Indices, outer: bool, again: bool) -> Group:
        """Move all tasks of `moved` into `base`."""
        kept, gone = (base, moved) if len(base.tasks) >= len(moved.tasks) else (moved, base)
        extents = extents_of(base.shape)
        exact = axes == identity(moved.shape) and len(moved.shape) == len(base.shape)
        for task in moved.tasks:
            if not exact:
                task.place = _over(task.place, axes, moved, extents)
            task.outer = task.outer or outer
        inner = base.inner
        if inner is None and moved.inner is not None:
            full = moved.outer_numel == 1
            inner = tuple(range(len(base.shape))) if full else moved.inner
        kept.shape, kept.inner, kept.dot = base.shape, inner, base.dot or moved.dot
        kept.in_order, kept.apart = base.in_order, base.apart
        kept.again = base.again or moved.again or again
        for task in gone.tasks:
            task.group = kept
        computed = {t.value.id for t in gone.tasks if t.kind != "store"}
        computed_kept = self.tasks
        kept.reads = {r for r in kept.reads if r not in computed}
        kept.reads |= {
            r for r in gone.reads if r not in computed_kept or computed_kept[r].group is not kept
        }
        kept.tasks.extend(gone.tasks)
        kept.stores += gone.stores
        kept.waits |= gone.waits
        kept.preds |= gone.preds
        kept.preds -= {kept.id, gone.id}
        both = 1 << kept.id | 1 << gone.id
        before = (self._before[kept.id] | self._before.pop(gone.id)) & ~both
        del self.all[gone.id]
        self._merged_into[gone.id] = kept.id
        self._depths.pop(gone.id, None)
        unchanged = before & ~self._before[kept.id] == 0
        self._before[kept.id] = before
        after = before | 1 << kept.id
        if not (unchanged and gone.id == self._next - 1):
            for other in self.all:
                if self._before[other] & both:
                    self._before[other] |= after
        self._forget_depths(kept)
        return kept


def is_same_attention(a: Task, b: Task) -> bool:
    """Whether two tasks of attention can share a kernel: of the same operands, both forward or both
    gradients. The log-sums have no v."""
    one, other = a.node, b.node
    forward = one.op.name in FORWARD
    if one.attrs != other.attrs or forward != (other.op.name in FORWARD):
        return False
    if forward and one.op is not other.op:
        whole, sums = (one, other) if other.op.name == "attention_lse" else (other, one)
        return (*whole.args[:2], whole.args[3]) == sums.args
    return one.args == other.args


def _rank(group: Group) -> int:
    """Which of two merging groups keeps its domain: in order, contraction, reduction, map."""
    if group.in_order is not None:
        return 3
    return 2 if group.dot is not None else 1 if group.inner is not None else 0


def _is_total(group: Group) -> bool:
    """Whether a group reduces its whole domain. Many programs do that, and the last one folds their
    results. A small domain has one program, which may go over it again with the result."""
    return group.inner is not None and group.outer_numel == 1


def _is_again(base: Group, moved: Group, outer: bool, edges) -> bool:
    """Whether a full reduction's result is passed to what runs over all elements."""
    return (_is_total(base) or _is_total(moved)) and any(
        (producer.kind == "reduce" or _is_outer(producer, moved, outer))
        and not _is_outer(reader, moved, outer)
        for producer, reader, _ in edges
    )


def _reduced_axes(task: Task) -> tuple[int, ...]:
    """The domain axes that a reduction reduces: all of them if nothing else has an extent."""
    axes = task.node.attr("axes")
    if all(n == 1 for k, n in enumerate(task.shape) if k not in axes):
        return tuple(range(len(task.shape)))
    return tuple(sorted(k for k in axes))


def _compatible(base: Group, moved: Group) -> bool:
    """Whether the reductions and contractions of two groups can share a kernel."""
    if moved.dot is not None or (base.dot is not None and moved.again):
        return False
    if moved.inner is None:
        return True
    if base.dot is not None or moved.outer_numel == 1:
        return moved.outer_numel == 1 and (base.inner is None or base.outer_numel == 1)
    return base.shape == moved.shape and base.inner == moved.inner


def _stores_for(base: Group, moved: Group) -> bool:
    """Whether `moved` is the place where `base` puts its values, if it goes in order."""
    if base.in_order is None:
        return True
    (store, *others) = moved.tasks
    is_store = store.kind == "store" and store.value is base.in_order.value
    return is_store and not others and len(base.tasks) == 1


def _reductions_fit(base: Group, moved: Group, axes: Indices) -> bool:
    """Partial reductions keep their axes; full ones may run over any bijection."""
    if moved.inner is None or moved.outer_numel == 1:
        return True
    return axes == identity(base.shape)


def _same_flat(shape: tuple[int, ...], wanted: tuple[int, ...]) -> Indices:
    """Indices of `wanted` over the axes of `shape`, at equal row-major positions."""
    if shape == wanted:
        return identity(shape)
    flat = flatten(identity(shape), contiguous_strides(shape))
    return unflatten(flat, wanted, extents_of(shape))


def placed(indices: Indices, task: Task) -> Indices:
    """A demand's indices over the axes of its task's group."""
    if task.place == identity(task.shape):
        return indices
    extents = extents_of(task.group.shape)
    return tuple(substitute(i, task.place, extents) for i in indices)


def _over(indices: Indices, axes: Indices, moved: Group, extents) -> Indices:
    """Indices over moved's axes as indices over the axes of the base."""
    if axes == identity(moved.shape):
        return indices
    return tuple(substitute(i, axes, extents) for i in indices)


def _is_outer(task: Task, moved: Group, outer: bool) -> bool:
    """Whether a task will be computed once per outer point."""
    return task.outer or (outer and task.group is moved)
