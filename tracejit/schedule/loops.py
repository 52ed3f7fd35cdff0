"""A scan in a plan: the launches of its body, over rows of the buffers outside.

In: a group that is a loop, where the values around it lie, and the plans of its body and of the
copy of what it starts with. Out: launches of the outer plan. What is carried goes from one row of
the result to the next; what is kept is stored straight into its row; so nothing is copied per step.
What is summed starts as zeros, to which the body adds in place.
"""

from __future__ import annotations

from dataclasses import replace

from tracejit.errors import InvalidGraph
from tracejit.ir.graph import Builder, Graph, Node, Result, Write, next_id
from tracejit.records import dataclass
from tracejit.schedule.groups import Group
from tracejit.schedule.plan import Launch, Plan, PlanBuffer
from tracejit.schedule.tasks import sections_of, summed, sums_of
from tracejit.schedule.values import Memory


@dataclass(frozen=True, slots=True)
class Loop:
    """The launches of a loop, those that come before it first, and the buffers that it uses."""

    launches: tuple[Launch, ...]
    steps: int
    buffers: tuple[str, ...]
    scalars: tuple = ()  # of the host: none


def beginning(node: Node) -> Graph:
    """The graph that copies what a loop carries at first, and gives zeros to add to."""
    body, b = node.attr("body"), Builder()
    first = [b.param(p.value.type) for p in body.params[: node.attr("carried")]]
    for result in _sums(node):
        kind = result.value.type
        first.append(b.full(0, shape=kind.shape, dtype=kind.dtype, device=kind.device))
    return b.graph("begin", tuple(map(Result, first)))


def repeated(node: Node) -> Graph:
    """The graph of a step. What it adds to sums it writes to params that come after its own."""
    body, sums = node.attr("body"), _sums(node)
    if not sums:
        return body
    b = Builder(next_id(body.values()))
    b.params, b.nodes = list(body.params), list(body.nodes)
    writes = []
    for result in sums:
        total = b.param(result.value.type)
        writes.append(Write(total, b.add(total, result.value)))
    return b.graph(body.name, body.results[: -len(sums)], tuple(writes))


def _sums(node: Node) -> tuple[Result, ...]:
    """The results of a loop's body of which it gives the sum."""
    results = node.attr("body").results
    return results[len(results) - summed(node) :]


def lower_loop(group: Group, memory: Memory, begin: Plan, body: Plan) -> Loop:
    """The launches of a loop whose `body` and `begin` are scheduled."""
    return _Lowering(group, memory).run(begin, body)


class _Lowering:
    def __init__(self, group: Group, memory: Memory):
        node = group.apart.node
        attrs = dict(node.attrs)
        self.offsets = attrs["offsets"]  # in elements, of the operands in their buffers
        body = attrs["body"]
        self.inputs = [p.value.type for p in body.params]
        self.node, self.memory = node, memory
        self.steps, self.reverse = attrs["steps"], attrs["reverse"]
        self.carried, self.sliced = attrs["carried"], attrs["sliced"]
        self.results = [r.value.type for r in body.results]
        self.kept = len(self.results) - summed(node)
        self.sections = sections_of(node)
        self.used: dict[str, None] = {}
        self.rows: dict[tuple, str] = {}
        stored = {t.demands[0].origin.id: t.buffer for t in group.tasks if t.kind == "store"}
        outs = [stored.get(v.id) or self._new(PlanBuffer("", "arena", v.type)) for v in node.outs]
        self.used.update(dict.fromkeys(outs))
        self.flat, self.apart = outs[0], outs[len(outs) - len(sums_of(node)) :]

    def run(self, begin: Plan, body: Plan) -> Loop:
        if body.loops:
            raise InvalidGraph(reason=f"cannot schedule a loop in a loop ({self.node.where})")
        assert not begin.scalars and not body.scalars, "a loop reads no numbers of the host"
        carried = self.carried
        sums = [self._sum(i) for i in range(self.kept, len(self.results))]
        first = self._launches(
            begin,
            [self._operand(i) for i in range(carried)],
            [*(self._carry(i, 0, moves=False) for i in range(carried)), *sums],
        )
        operands = range(len(self.node.args))
        inside = self._launches(
            body,
            [*(self._carry(i, 0) if i < carried else self._read(i) for i in operands), *sums],
            [self._carry(i, 1) if i < carried else self._kept(i) for i in range(self.kept)],
        )
        launches = (*first, *(replace(launch, loop=0) for launch in inside))
        return Loop(launches, self.steps, tuple(self.used))

    def _launches(self, plan: Plan, inputs: list[str], outputs: list[str]) -> list[Launch]:
        """The launches of a plan with other buffers."""
        names: dict[str, str] = {}
        for b in plan.buffers:
            if b.kind == "arena":
                names[b.name] = self._new(PlanBuffer("", "arena", b.type))
                self.used[names[b.name]] = None
            else:
                names[b.name] = (inputs if b.kind == "input" else outputs)[b.index]
        return [
            replace(launch, buffers=tuple(names[n] for n in launch.buffers))
            for launch in plan.launches
        ]

    def _new(self, buffer: PlanBuffer) -> str:
        name = f"t{len(self.memory.buffers)}"
        self.memory.buffers[name] = replace(buffer, name=name)
        return name

    def _operand(self, i: int) -> str:
        """What is read whole: of a loop's first values, or in each of its steps."""
        name = self.memory.located[self.node.args[i].id]
        self.used[name] = None
        if self.node.args[i].type == self.inputs[i]:
            return name
        return self._row(name, self.inputs[i], self.offsets[i], 0, moves=False)

    def _read(self, i: int) -> str:
        """An operand that all steps read whole, or row by row."""
        if i >= self.carried + self.sliced:
            return self._operand(i)
        name = self.memory.located[self.node.args[i].id]
        self.used[name] = None
        return self._row(name, self.inputs[i], self.offsets[i], self._first(0))

    def _carry(self, i: int, after: int, *, moves: bool = True) -> str:
        """What is carried, before or after a step."""
        section = self.sections[i]
        return self._row(self.flat, self.results[i], section.start, self._first(after, 1), moves)

    def _kept(self, i: int) -> str:
        return self._row(self.flat, self.results[i], self.sections[i].start, self._first(0))

    def _sum(self, i: int) -> str:
        if self.apart:
            return self.apart[i - self.kept]
        return self._row(self.flat, self.results[i], self.sections[i].start, 0, moves=False)

    def _first(self, after: int, more: int = 0) -> int:
        """The row of the first step, in a section that has some rows more than there are steps."""
        return self.steps - 1 + more - after if self.reverse else after

    def _row(self, of: str, kind, start: int, row: int, moves: bool = True) -> str:
        step = kind.nbytes * moves * (-1 if self.reverse else 1)
        offset = start * kind.dtype.itemsize + row * kind.nbytes
        key = of, kind, offset, step
        if key not in self.rows:
            found = PlanBuffer("", "row", kind, offset=offset, of=of, step=step)
            self.rows[key] = self._new(found)
        return self.rows[key]
