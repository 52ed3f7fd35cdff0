"""What repetitions read: one run of a graph, taken apart by the places of its body.

In: a run, cut into repetitions. Out: for each operand of each node of the body what it is in all
repetitions (a `Column`), in which of them that holds, and who reads what outside of the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, replace

import numpy as np

from tracejit.ir.graph import Arg, Node, Value
from tracejit.passes.repeats import LEAST, Run
from tracejit.passes.rewrite import identity
from tracejit.passes.rows import Rows, Sources
from tracejit.records import dataclass

SOURCES = ("full", "iota")  # made where they are wanted
STAYS = ("loop", "matrices", "host")  # families that no body has
VIEWS = ("reshape", "permute", "alias", "expand")
BACK = 4  # repetitions back, whose values are carried on


class NoLoop(Exception):
    """A run is no loop."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A pad that stands at another place along an axis in each repetition."""

    axis: int
    first: int
    step: int
    shape: tuple[int, ...]  # of what is padded

    def cut(self, low: int) -> Placed:
        """Without the first repetitions."""
        return replace(self, first=self.first + low * self.step)


@dataclass(frozen=True, slots=True)
class Column:
    """An operand in all repetitions.

    kind:  "literal"; "inside", a value of the same repetition; "carried", of the one `back` before;
           "same", a value from outside; "rows" of one; "mask", true where a pad stands.
    place: of the node in the body.
    """

    kind: str
    place: int = -1
    literal: Arg = 0
    value: Value | None = None
    rows: Rows | None = None
    placed: Placed | None = None
    back: int = 0


@dataclass
class World:
    """The graph that is looked at."""

    nodes: Sequence[Node]
    index: Mapping[int, int]  # of values, where they are made
    readers: Mapping[int, list[int]]  # of values, who reads them
    outputs: set[int]
    sources: Sources

    def args(self, node: Node) -> tuple[Arg, ...]:
        same = self.sources.same
        return tuple([same.get(a.id, a) if a.__class__ is Value else a for a in node.args])


@dataclass
class Body:
    """A run by the places of its body. `low` and `high` are the repetitions that are alike."""

    world: World
    run: Run
    columns: list[list[Column]] = field(default_factory=list)
    fixed: set[int] = field(default_factory=set)  # the same in all repetitions
    sliced: dict[int, Rows] = field(default_factory=dict)
    placed: dict[int, Placed] = field(default_factory=dict)
    taken: dict[int, Rows] = field(default_factory=dict)  # slices of what is carried, moving
    outside: dict[int, set[int]] = field(default_factory=dict)  # by place, whose values are read
    low: int = 0
    high: int = 0

    def __post_init__(self) -> None:
        self.holds = np.ones(self.run.times, bool)
        self.follows: dict[int, np.ndarray] = {}  # an earlier one, in what is carried, by `back`
        for place in range(self.run.period):
            self._place(place)
        self._cut()
        self._read_outside()

    @property
    def times(self) -> int:
        return self.high - self.low

    @property
    def start(self) -> int:
        return self.run.start + self.low * self.run.period

    @property
    def stop(self) -> int:
        return self.run.start + self.high * self.run.period

    def node(self, place: int, repetition: int = 0) -> Node:
        """A node of the body as it stands in a repetition, of those that are alike."""
        return self.world.nodes[self.start + repetition * self.run.period + place]

    # ---- operands

    def _all(self, place: int) -> Sequence[Node]:
        run = self.run
        return self.world.nodes[run.start + place : run.stop : run.period]

    def _place(self, place: int) -> None:
        nodes = self._all(place)
        one = nodes[(len(nodes) - 1) // 2]
        if one.op.family in ("loop", "matrices"):
            raise NoLoop
        args = [self.world.args(n) for n in nodes]
        columns = [self._column(place, list(c)) for c in zip(*args, strict=True)]
        self.columns.append(columns)
        fixed = all(
            c.kind in ("literal", "same") or c.kind == "inside" and c.place in self.fixed
            for c in columns
        )
        if one.op.name in ("slice", "pad") and any(n.attrs != one.attrs for n in nodes):
            self._moving(place, nodes, columns[0], fixed)
            return
        if fixed:
            self.fixed.add(place)
        elif one.op.family == "host":
            raise NoLoop

    def _column(self, place: int, values: list[Arg]) -> Column:
        middle = (len(values) - 1) // 2
        one = values[middle]
        if one.__class__ is not Value:
            return Column("literal", literal=one)
        ids = np.fromiter((v.id for v in values), np.int64, len(values))
        alike = ids == one.id
        if alike.all():
            return self._same(one)
        index, run = self.world.index, self.run
        at = np.fromiter((index.get(v.id, -1) for v in values), np.int64, len(values))
        distance = at - np.arange(run.start, run.stop, run.period)
        there = int(distance[middle])
        if run.start <= at[middle] < run.stop:
            if 0 <= there < place:
                self.holds &= distance == there
                return Column("inside", there)
            back = -(there // run.period)
            if 0 < back <= BACK:
                follows = self.follows.setdefault(back, np.ones(run.times, bool))
                follows &= distance == there
                return Column("carried", there + back * run.period, back=back)
            raise NoLoop
        if values[middle + 1].id == one.id:
            self.holds &= alike
            return self._same(one)
        rows = self.world.sources.rows(values)
        if rows is None:
            return self._equal(values, at) or self._mask(values)
        self.holds &= np.array(rows.valid)
        return Column("rows", rows=rows)

    def _equal(self, values: Sequence[Value], at: np.ndarray) -> Column | None:
        """The same constant for each repetition, made outside of all: cotangents of losses."""
        made, middle = self.world.sources.made, (len(values) - 1) // 2
        one = made.get(values[middle].id)
        if one is None or one.op.name not in SOURCES or one.inputs:
            return None
        nodes = [made.get(v.id) for v in values]
        alike = [n is not None and identity(n) == identity(one) for n in nodes]
        alike &= (at < self.run.start) | (at >= self.run.stop)
        self.holds &= alike
        return self._same(values[int(np.where(alike, at, at.max() + 1).argmin())])

    def _mask(self, values: list[Value]) -> Column:
        nodes = [self.world.sources.made.get(v.id) for v in values]
        pads = all(n is not None and n.op.name == "pad" for n in nodes)
        if not pads or not all(_is_full(self.world, n.args[0], True) for n in nodes):
            raise NoLoop
        return Column("mask", placed=self._pads(nodes))

    def mask(self, column: Column) -> Placed | None:
        """Where an operand is true, if it is a mask of a pad."""
        if column.kind == "mask":
            return column.placed
        if column.kind != "inside" or column.place not in self.placed:
            return None
        true = _is_full(self.world, self.node(column.place).args[0], True)
        return self.placed[column.place] if true else None

    def is_zero(self, column: Column) -> bool:
        """Whether an operand is a pad of zeros."""
        if column.kind != "inside" or column.place not in self.placed:
            return False
        return _is_full(self.world, self.node(column.place).args[0], 0)

    def _same(self, value: Value) -> Column:
        made = self.world.index.get(value.id, -1)
        if self.run.start <= made < self.run.stop:
            raise NoLoop
        return Column("same", value=value)

    def _moving(self, place: int, nodes: Sequence[Node], column: Column, fixed: bool) -> None:
        """A slice or a pad that stands at another place in each repetition."""
        middle = (len(nodes) - 1) // 2
        if nodes[0].op.name == "pad":
            self.placed[place] = self._pads(nodes)
            return
        base = nodes[middle].args[0]
        alike = [Node(n.op, (base,), n.attrs, n.outs, n.where) for n in nodes]
        rows = self.world.sources.slices(alike, middle)
        if rows is None or not (fixed or column.kind == "inside"):
            raise NoLoop
        self.holds &= np.array(rows.valid)
        if fixed:
            self.sliced[place] = rows
        else:
            self.taken[place] = rows

    def _pads(self, nodes: Sequence[Node]) -> Placed:
        middle = (len(nodes) - 1) // 2
        lows = np.array([n.attr("low") for n in nodes])
        axes = np.flatnonzero(lows[middle + 1] != lows[middle])
        if len(axes) != 1:
            raise NoLoop
        (axis,) = axes
        step = lows[middle + 1] - lows[middle]
        expected = lows[middle] + (np.arange(len(nodes)) - middle)[:, None] * step
        self.holds &= (lows == expected).all(1)
        shape = nodes[middle].args[0].type.shape
        extent = shape[axis]
        alone = any(nodes[middle].attr("interior")) or nodes[middle].attr("value") != 0
        if alone or abs(step[axis]) < extent or extent > 1 and abs(step[axis]) != extent:
            raise NoLoop
        return Placed(int(axis), int(expected[0][axis]), int(step[axis]), shape)

    # ---- repetitions

    def _cut(self) -> None:
        """The longest stretch of repetitions that are alike."""
        best = low = 0
        for r in range(self.run.times + 1):
            ends = r == self.run.times or not self.holds[r]
            lost = [b for b, x in self.follows.items() if not ends and not x[r] and r - low >= b]
            if ends or lost:
                if r - low > best:
                    best, self.low, self.high = r - low, low, r
                low = r + 1 if ends else r + 1 - min(lost)
        if best < LEAST:
            raise NoLoop
        if best < self.run.times:
            self._cut_rows()

    def _cut_rows(self) -> None:
        low, high = self.low, self.high
        for columns in self.columns:
            for k, column in enumerate(columns):
                if column.kind == "rows":
                    columns[k] = Column("rows", rows=column.rows.cut(low, high))
                elif column.kind == "mask":
                    columns[k] = Column("mask", placed=column.placed.cut(low))
        self.sliced = {q: rows.cut(low, high) for q, rows in self.sliced.items()}
        self.taken = {q: rows.cut(low, high) for q, rows in self.taken.items()}
        self.placed = {q: p.cut(low) for q, p in self.placed.items()}

    def _read_outside(self) -> None:
        """Which values of the body others read, or are outputs."""
        world, start, stop, period = self.world, self.start, self.stop, self.run.period
        for i in range(start, stop):
            id = world.nodes[i].outs[0].id
            readers = world.readers.get(id, ())
            if id in world.outputs or any(not start <= r < stop for r in readers):
                repetition, place = divmod(i - start, period)
                self.outside.setdefault(place, set()).add(repetition)
        for place in range(period - 1, -1, -1):
            if place not in self.outside or not self.is_view(place):
                continue
            column = self.columns[place][0]
            if column.kind in ("inside", "carried"):
                read = {r - column.back for r in self.outside[place] if r >= column.back}
                self.outside.setdefault(column.place, set()).update(read)

    def is_view(self, place: int) -> bool:
        """Whether a value of the body only shows another one, or is rows of one from outside."""
        if place in self.placed:
            return self.columns[place][0].place in self.fixed
        if place in self.fixed or place in self.taken:
            return False
        if place in self.sliced:
            return True
        column = self.columns[place][0] if self.columns[place] else None
        one = self.node(place)
        return one.op.name in VIEWS and column.kind in ("inside", "carried", "rows")


def _is_full(world: World, value: Value, of: object) -> bool:
    """Whether all elements of a value are a literal."""
    while (node := world.sources.made.get(value.id)) is not None:
        if node.op.name == "full":
            return type(node.args[0]) in (type(of), float) and node.args[0] == of
        if node.op.name not in VIEWS:
            return False
        value = node.args[0]
    return False
