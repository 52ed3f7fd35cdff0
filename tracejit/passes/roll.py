"""Time loops that are written out: what repeats itself becomes a `scan`.

In: a graph as it was traced, with a copy of the body for each step of a loop in Python, in the
forward and in the backward pass. Out: the same graph with a loop for each run of repetitions that
read what is the same for all of them, rows of tensors, and what the one before has computed. What a
body computes of values that are the same in all repetitions is computed once, before the loop.
"""

from __future__ import annotations

from collections.abc import Sequence

from tracejit.ir.graph import Builder, Graph, Node, Value, next_id
from tracejit.passes.columns import Body, NoLoop, World
from tracejit.passes.dce import dce
from tracejit.passes.ladders import stacked_ladders
from tracejit.passes.repeats import LEAST, Run, aligned, find_runs
from tracejit.passes.rewrite import substituted, with_nodes
from tracejit.passes.rolled import Loop, Rolled
from tracejit.passes.rows import Sources

FEW = 128  # nodes that are left as they are; of element-wise bodies, which fuse, MANY
MANY = 1024


def roll_up(graph: Graph, few: int = FEW, many: int = MANY) -> Graph:
    """Make loops of what is repeated, from so many nodes on."""
    if len(graph.nodes) < few:
        return graph
    live = dce(graph)
    runs = find_runs(live.nodes)
    return _Rolling(live, few, many).run(runs) if runs else graph


class _Rolling:
    def __init__(self, graph: Graph, few: int, many: int):
        self.few, self.many = few, many
        self.graph, self.nodes = graph, list(graph.nodes)
        self.b = Builder(next_id(graph.values()))
        index = {n.outs[0].id: i for i, n in enumerate(self.nodes)}
        readers: dict[int, list[int]] = {}
        for i, node in enumerate(self.nodes):
            for a in node.args:
                if a.__class__ is Value:
                    readers.setdefault(a.id, []).append(i)
        outputs = {v.id for v in graph.outputs()}
        made = {n.outs[0].id: n for n in self.nodes}
        self.sources = Sources(made)
        self.world = World(self.nodes, index, readers, outputs, self.sources)
        self.instead: dict[Value, Value] = {}
        self.consumed: set[int] = set()
        self.rolled: dict[int, Rolled] = {}

    def run(self, runs: Sequence[Run]) -> Graph:
        small = [run for run in runs if not self._is_worth_it(run)]
        large = [run for run in runs if run not in small]
        self._roll(large)
        self._roll_with_feeders([run for run in large if not self._is_taken(run)], small)
        if not self.rolled:
            return self.graph
        self._roll([run for run in small if self._reads_rows(run) and not self._is_taken(run)])
        return self._assembled()

    def _roll(self, runs: Sequence[Run]) -> None:
        while runs:
            chosen: list[Run] = []
            for run in runs:
                if all(run.stop <= c.start or run.start >= c.stop for c in chosen):
                    chosen.append(run)
            for run in sorted(chosen, key=lambda r: r.start):
                self._try(run)
            runs = [r for r in runs if r not in chosen and not self._is_taken(r)]

    def _roll_with_feeders(self, runs: Sequence[Run], small: Sequence[Run]) -> None:
        """Roll what is no loop by itself, but becomes one together with short runs before it, each
        of whose repetitions gives a value to one of its own: the cotangents of a decayed sum of
        losses. These become loops only if it does."""
        for run in runs:
            feeders = [x for x in small if x.stop <= run.start and self._feeds(x, run)]
            feeders = [x for x in feeders if not self._is_taken(x)]
            if not feeders or self._is_taken(run):
                continue
            before = self._state()
            self._roll(feeders)
            self._try(run)
            if not self._is_taken(run):
                self._go_back(before)

    def _feeds(self, feeder: Run, run: Run) -> bool:
        """Whether repetitions of a run read what those of an earlier one compute."""
        made = {n.outs[0].id for n in self.nodes[feeder.start : feeder.stop]}
        seen = {v.id for n in self.nodes[run.start : run.stop] for v in n.inputs if v.id in made}
        return len(seen) >= LEAST

    def _state(self) -> tuple:
        sources = self.sources
        members = {id: list(of) for id, of in sources.members.items()}
        kept = self.instead, self.rolled, sources.same
        return *map(dict, kept), members, set(self.consumed), list(self.b.nodes), self.b.next_id

    def _go_back(self, state: tuple) -> None:
        self.instead, self.rolled, self.sources.same, self.sources.members = state[:4]
        self.consumed, self.b.nodes, self.b.next_id = state[4:]

    def _is_worth_it(self, run: Run) -> bool:
        families = self._families(run)
        fuses = families <= {"elementwise", "movement", "source", "host"}
        return run.stop - run.start >= (self.many if fuses else self.few) and families != {
            "movement"
        }

    def _families(self, run: Run) -> set[str]:
        return {n.op.family for n in self.nodes[run.start : run.start + run.period]}

    def _reads_rows(self, run: Run) -> bool:
        """Whether the repetitions read what those of a loop give, as a sum of losses does: else
        each of the rows would be read by itself."""
        if self._families(run) == {"movement"}:
            return False
        nodes, members = self.nodes[run.start : run.stop], self.sources.members
        return sum(v.id in members for n in nodes for v in n.inputs) >= LEAST

    def _is_taken(self, run: Run) -> bool:
        return any(i in self.consumed for i in (run.start, run.stop - 1)) or any(
            run.start <= at < run.stop for at in self.rolled
        )

    def _try(self, run: Run) -> None:
        for cut in aligned(self.nodes, run):
            try:
                body = Body(self.world, cut)
                loop = Loop(body, self.b, self.consumed)
                self.rolled[loop.at] = loop.rolled()
            except NoLoop:
                continue
            self.consumed.update(loop.consumed())
            for family in loop.families:
                self.sources.add(family)
            self.sources.same.update(loop.same())
            self.instead.update(loop.instead)
            return

    def _assembled(self) -> Graph:
        """The graph with the loops in the places of the runs."""
        ladders = stacked_ladders(self.nodes, self.world, self.consumed, self.b)
        items: list[Node | Rolled] = []
        for i, node in enumerate(self.nodes):
            if i in self.rolled:
                items.append(self.rolled[i])
            if i in ladders:
                items += ladders[i]
                self.instead[node.out] = ladders[i][-1].out
            elif i not in self.consumed:
                items.append(node)
        instead = {v.id: x for v, x in self.instead.items()}
        instead |= self.sources.same

        def now(value: Value) -> int:
            while value.id in instead and instead[value.id].id != value.id:
                value = instead[value.id]
            return value.id

        wanted = {now(v) for v in self.graph.outputs()}
        kept: list[Node] = []

        def keep(nodes: Sequence[Node]) -> None:
            for node in reversed(nodes):
                if node.outs[0].id in wanted or node.is_ordered:
                    wanted.update(now(a) for a in node.args if a.__class__ is Value)
                    kept.append(node)

        for item in reversed(items):
            if isinstance(item, Node):
                keep([item])
                continue
            keep(item.views)
            keep(self._single_rows(item, wanted))
            keep(item.nodes)
        for family in (f for r in self.rolled.values() for f in r.families):
            for value in family.values.values():
                instead.update({value.id: self.instead[value]} if value in self.instead else {})
        mapping = _Resolved(instead)
        nodes = [substituted(node, mapping) for node in reversed(kept)]
        return with_nodes(self.graph, nodes, mapping)

    def _single_rows(self, item: Rolled, wanted: set[int]) -> list[Node]:
        """Rows of a loop's result that something reads by themselves."""
        found = len(self.b.nodes)
        for family in item.families:
            for repetition, value in family.values.items():
                if repetition >= family.own and value.id in wanted and value not in self.instead:
                    self.instead[value] = family.row(self.b, repetition)
                    wanted.add(self.instead[value].id)
        nodes = self.b.nodes[found:]
        return nodes


class _Resolved(dict):
    """Values by what stands for them at last; asked by value."""

    def __init__(self, instead: dict[int, Value]):
        super().__init__()
        self.by_id = instead

    def __contains__(self, value: object) -> bool:
        return value.id in self.by_id

    def __bool__(self) -> bool:
        return bool(self.by_id)

    def get(self, value: Value, default: Value | None = None) -> Value:
        while value.id in self.by_id and self.by_id[value.id].id != value.id:
            value = self.by_id[value.id]
        return value
