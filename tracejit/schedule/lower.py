"""Lowering: a Group of tasks → a Kernel with concrete sizes.

Each stage evaluates what its reductions and stores ask for, at their places in the domain; movement
nodes only change the indices on the way down to the loads. Axes of extent 1 are dropped, adjacent
axes that every index walks as one are joined, and what is left is named i0, i1, … (outer first).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from tracejit.ir.graph import Value
from tracejit.ir.ops.attention import FORWARD
from tracejit.ir.types import DType
from tracejit.records import dataclass
from tracejit.schedule.axes import along_memory, tidy
from tracejit.schedule.groups import Group
from tracejit.schedule.index import (
    ZERO,
    extents_of,
    flatten,
    identity,
)
from tracejit.schedule.kernel import (
    Attend,
    Axis,
    Bound,
    Buffer,
    Dot,
    Index,
    Kernel,
    Load,
    Reduce,
    Side,
    Sort,
    Stage,
    Store,
    axes_of_result,
)
from tracejit.schedule.running import Combining
from tracejit.schedule.tasks import ATTENTION, Analysis, Demand, Task, dot_indices
from tracejit.schedule.values import LARGEST, Memory, Scope, Values

PADDING = 1 << 23  # points that tiles may count beyond the end of a domain


@dataclass(frozen=True, slots=True)
class Lowered:
    """A kernel and what its buffers and scalars are bound to, in the kernel's order."""

    kernel: Kernel
    buffers: tuple[str, ...]
    scalars: tuple[Value, ...]


def lower(group: Group, analysis: Analysis, memory: Memory, *, gpu: bool = False) -> Lowered:
    """The kernel of a group; for a `gpu` it goes along memory."""
    lowered = _Lowering(group, analysis, memory).run()
    kernel = along_memory(lowered.kernel) if gpu else lowered.kernel
    return replace(lowered, kernel=tidy(kernel))


class _Lowering(Values):
    def __init__(self, group: Group, analysis: Analysis, memory: Memory):
        super().__init__(group.tasks, analysis, memory)
        self.group = group

    def run(self) -> Lowered:
        """All stages."""
        shape = self.group.shape
        inner = self.group.inner or ()
        one = self.group.in_order
        if self.group.attends:
            stages = [self._attend()]
        elif one is not None:
            inner = (one.node.attr("axis"),)
            along = {"scatter": self._scatter, "argsort": self._argsort}
            stages = along.get(one.kind, self._running)(one)
        else:
            times = self._times()
            stages = []
            for time in sorted(set(times.values())):
                roots = [t for t in self.tasks if times.get(id(t)) == time]
                stages.append(self._stage(time, roots))
        whole = self.group.dot is not None or self.group.attends
        outer = () if whole else tuple(k for k in range(len(shape)) if k not in inner)
        axes = tuple(Axis(f"i{k}", shape[k]) for k in outer)
        kernel = Kernel(
            buffers=tuple(
                Buffer(name, self.memory.buffers[plan].type.dtype, _access(used))
                for plan, (name, used) in self.buffers.items()
            ),
            sizes=(),
            scalars=tuple(name for name, _ in self.scalars.values()),
            axes=axes,
            stages=tuple(stages),
            index64=self.big or _counted(axes, stages) > LARGEST - PADDING,
        )
        scalars = tuple(value for _, value in self.scalars.values())
        return Lowered(kernel, tuple(self.buffers), scalars)

    def _times(self) -> dict[int, int]:
        """The stage number of each reduction and store: even over all axes, odd over outer ones.

        A value is ready one stage after the last reduction that it needs. A store over an input
        waits for the last stage that reads the old value.
        """
        ready: dict[int, int] = {}  # by value id
        when: dict[int, int] = {}  # by id of task: the first stage that can evaluate it
        for task in self.tasks:
            below = [ready[d.origin.id] for d in task.demands if d.origin.id in self.own]
            first = max(below, default=0)
            outer = task.outer and self.group.inner is not None
            when[id(task)] = first + (first % 2 != outer)
            if task.kind == "reduce":
                first = when[id(task)] + 1
            if task.kind != "store":
                ready[task.value.id] = first
        times = {id(t): when[id(t)] for t in self.tasks if t.kind != "map"}
        while self._delay_writes(times, when):
            pass
        return times

    def _delay_writes(self, times: dict[int, int], when: dict[int, int]) -> bool:
        """Move stores over inputs behind the last stage that reads the input; True if any moved."""
        if all(task.target is None for task in self.tasks):
            return False
        last = when | times  # the last stage that evaluates each task
        for task in reversed(self.tasks):
            for demand in task.demands:
                below = self.own.get(demand.origin.id)
                if below is not None and below.kind != "reduce":
                    last[id(below)] = max(last[id(below)], last[id(task)])
        reads: dict[int, int] = {}
        for task in self.tasks:
            for demand in task.demands:
                latest = max(reads.get(demand.origin.id, 0), last[id(task)])
                reads[demand.origin.id] = latest
        moved = False
        for task in self.tasks:
            if task.target is not None:
                until = reads.get(task.target.id, 0)
                until += until % 2 != times[id(task)] % 2
                if until > times[id(task)]:
                    times[id(task)], moved = until, True
        return moved

    def _stage(self, time: int, roots: list[Task]) -> Stage:
        """The stage that evaluates `roots`: reductions in order, then stores."""
        group = self.group
        scope = Scope(extents_of(group.shape))
        dot = None
        axes: tuple[int, ...] = ()
        if group.dot is not None and time == 0:
            axes = tuple(range(len(group.shape)))
            dot = self._dot(group.dot)
            scope.known[group.dot.value.id] = [(group.dot.place, (), dot.out)]
        elif group.inner is not None and time % 2 == 0:
            axes = group.inner
        for task in self._needed(roots):
            if task.kind == "map":
                self._value(task.value, task.place, (), scope)
            elif task.kind == "reduce":
                value = self._value(task.node.args[0], task.place, (), scope)
                out = self._var(task.value)
                self.reduced[task.value.id] = out
                scope.body.append(Reduce(out, task.node.op, value, task.node.where))
        stores = [self._store(task, scope) for task in roots if task.kind == "store"]
        scope.body.extend(stores)  # after all loads: a store may overwrite what they read
        return Stage(tuple(Axis(f"i{k}", group.shape[k]) for k in axes), tuple(scope.body), dot)

    def _needed(self, roots: list[Task]) -> list[Task]:
        """The tasks that a stage evaluates, in order: roots and what they are computed from."""
        needed: dict[int, Task] = {}
        stack = list(roots)
        while stack:
            task = stack.pop()
            if id(task) in needed:
                continue
            needed[id(task)] = task
            for demand in task.demands:
                below = self.own.get(demand.origin.id)
                if below is not None and below.kind == "map":
                    stack.append(below)
        return sorted(needed.values(), key=lambda t: t.order)

    def _dot(self, task: Task) -> Dot:
        a, b, extents = dot_indices(task.node)
        k = f"i{len(task.shape)}"
        sides = []
        for arg, indices in zip(task.node.args, (a, b), strict=True):
            scope = Scope(extents)
            value = self._value(arg, indices, (), scope)
            sides += [tuple(scope.body), value]
        out = self._var(task.value)
        return Dot(out, Axis(k, extents[k]), *sides, task.node.where)

    def _attend(self) -> Stage:
        """Results of attention with the same operands, and their stores."""
        tasks = [task for task in self.tasks if task.kind == ATTENTION]
        node = max((t.node for t in tasks), key=lambda n: len(n.args))  # the log-sums have no v
        args = list(node.args)
        if node.op.name == "attention_lse":
            args.insert(2, 0.0)
        (*batch, m, c), n = args[0].type.shape, args[1].type.shape[-2]
        d = args[2].type.shape[-1] if isinstance(args[2], Value) else 1
        shape = (*batch, m, n, c, d)
        extents, places = extents_of(shape), identity(shape)
        rank = len(batch)
        of_batch, (at_m, at_n, at_c, at_d) = places[:rank], places[rank:]
        over = [(at_m, at_c), (at_n, at_c), (at_n, at_d), (at_m, at_n)]
        if node.op.name not in FORWARD:
            over += [(at_m,), (at_m,), (at_m, at_d)]
        sides = []
        for arg, at in zip(args, [*over, (at_m, at_n)], strict=False):  # noise comes last
            scope, value = Scope(extents), arg
            if isinstance(arg, Value):
                value = self._value(arg, (*of_batch, *at), (), scope)
            sides.append(Side(tuple(scope.body), value))
        axes = tuple(Axis(f"i{k}", n) for k, n in enumerate(shape))
        outs = {task.node.op.name: (task.node.op, self._var(task.value)) for task in tasks}
        attrs = dict(node.attrs)
        attend = Attend(
            tuple(outs.values()), *axes[rank:], attrs["causal"], attrs["scale"], tuple(sides),
            node.where,
        )  # fmt: skip
        where = {a.name: p for a, p in zip(axes, places, strict=True)}
        stores = []
        for task in (task for task in self.tasks if task.kind == "store"):
            producer = self.analysis.producer[task.value.id]
            own = axes_of_result(attend, producer.op.name)
            at = (*of_batch, *(where[a.name] for a in own))
            index = flatten(at, self.memory.strides(task.buffer))
            self._check(index, Scope(extents))
            name = self._buffer(task.buffer, "w")
            stores.append(Store(name, index, outs[producer.op.name][1], producer.where))
        return Stage(axes[:rank], tuple(stores), attend=attend)

    def _scatter(self, task: Task) -> list[Stage]:
        """What is there before, unless it lies in that place already; then what is scattered over
        it, one index along the axis after another."""
        node, shape, axis = task.node, task.shape, task.node.attr("axis")
        (store,) = (t for t in self.tasks if t.kind == "store")
        strides, name = self.memory.strides(store.buffer), self._buffer(store.buffer, "w")
        before, index, source = node.args
        scope = Scope(extents_of(shape))
        value = self._value(before, task.place, (), scope)
        there = flatten(task.place, strides)
        self._check(there, scope)
        stages = []
        (first, *rest) = scope.body
        lies = isinstance(first, Load) and not rest and (first.buffer, first.index) == (name, there)
        if not lies:
            body = (*scope.body, Store(name, there, value, node.where))
            stages.append(Stage((Axis(f"i{axis}", shape[axis]),), body))
        step = Axis(f"i{len(shape)}", index.type.shape[axis])
        scope = Scope(extents_of((*shape, step.extent)))
        number = Index(((step.name, 1),)) if step.extent > 1 else ZERO
        at = (*task.place[:axis], number, *task.place[axis + 1 :])
        position = self._value(index, at, (), scope)
        value = self._value(source, at, (), scope)
        scope.extents = {**scope.extents, position: shape[axis]}
        where = Index(((position, 1),))
        target = flatten((*task.place[:axis], where, *task.place[axis + 1 :]), strides)
        self._check(target, scope)
        self._buffer(store.buffer, "r")
        combine, inside = node.attr("combine"), (Bound(where, shape[axis]),)
        fold = "" if combine == "last" else combine
        scope.body.append(Store(name, target, value, node.where, inside, fold))
        stages.append(Stage((step,), tuple(scope.body), in_order=True))
        return stages

    def _running(self, task: Task) -> list[Stage]:
        """Each element and, before it, what has just been stored of the one before."""
        node, axis = task.node, task.node.attr("axis")
        (store,) = (t for t in self.tasks if t.kind == "store")
        strides, name = self.memory.strides(store.buffer), self._buffer(store.buffer, "w")
        scope, along = Scope(extents_of(task.shape)), Axis(f"i{axis}", task.shape[axis])
        values = [self._value(arg, task.place, (), scope) for arg in node.args]
        there, previous = flatten(task.place, strides), Index(((along.name, 1),), -1)
        self._check(there, scope)
        self._buffer(store.buffer, "r")
        at = flatten((*task.place[:axis], previous, *task.place[axis + 1 :]), strides)
        inside = (Bound(previous, along.extent),)
        so_far = self._var(task.value)
        scope.body.append(Load(so_far, name, at, inside, node.where))
        made = Combining(lambda dtype: self._var(task.value, dtype), node, scope.body)
        scope.body.append(Store(name, there, made.total(so_far, values, inside), node.where))
        return [Stage((along,), tuple(scope.body), in_order=True)]

    def _argsort(self, task: Task) -> list[Stage]:
        """The values along the axis, and the places of the first of them in order."""
        node, axis = task.node, task.node.attr("axis")
        topk = dict(node.attrs).get("topk", "")
        (store,) = (t for t in self.tasks if t.kind == "store")
        along = Axis(f"i{len(task.shape)}", node.args[0].type.shape[axis])
        scope = Scope(extents_of((*task.shape, along.extent)))
        number = Index(((along.name, 1),))
        at = (*task.place[:axis], number, *task.place[axis + 1 :])
        value, out = self._value(node.args[0], at, (), scope), self._var(task.value)
        scope.body.append(Sort(out, value, node.attr("descending"), topk, node.where))
        there = flatten(task.place, self.memory.strides(store.buffer))
        self._check(there, scope)
        first = Axis(f"i{axis}", task.shape[axis])
        stored = Store(self._buffer(store.buffer, "w"), there, out, node.where)
        return [Stage((along,), tuple(scope.body)), Stage((first,), (stored,))]

    def _store(self, task: Task, scope: Scope) -> Store:
        """The store of a task's value, which is evaluated in the scope."""
        index = flatten(task.place, self.memory.strides(task.buffer))
        self._check(index, scope)
        producer = self.analysis.producer.get(task.value.id)
        where = producer.where if producer is not None else ""
        if task.value.type.is_host:
            value = self._operand(task.value)
        elif producer is not None and producer.op.name == "full":
            value = self._operand(_literal(producer.args[0], task.value.type.dtype))
        else:
            value = self._value(task.value, task.place, (), scope)
        return Store(self._buffer(task.buffer, "w"), index, value, where)


def _access(used: set[str]) -> str:
    return "rw" if len(used) == 2 else next(iter(used))


def _literal(value: object, dtype: DType) -> object:
    """A literal as a Python number of the dtype's kind; host values as they are."""
    if isinstance(value, Value):
        return value
    return {"f": float, "i": int, "u": int, "b": bool}[dtype.kind](value)


def arena_store(task: Task, value: Value, buffer: str, order: int) -> Task:
    """The store, beside a task, of its value (or of a cheap value at the same place)."""
    demand = Demand(task.value, value, task.value_place, ())
    store = Task(order, "store", value, value.type.shape, (demand,), None, buffer)
    store.group, store.place, store.outer = task.group, task.value_place, task.outer
    if task.kind == "reduce":
        store.outer = True
    return store


def _counted(axes: Sequence[Axis], stages: Sequence[Stage]) -> int:
    """The points of the largest domain that a kernel counts through: its own, or that of a stage.
    A contraction counts along each axis; attention goes over its blocks."""
    domains = [axes, *(stage.axes for stage in stages)]
    if any(stage.dot is not None for stage in stages):
        domains = [(axis,) for domain in domains for axis in domain]
    return max((math.prod(axis.extent for axis in domain) for domain in domains), default=1)
