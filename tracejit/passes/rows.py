"""Values that lie in rows of one tensor, one row for each repetition of a body.

In: for each repetition the value that it reads. Out: the tensor, and which of its rows they are:
slices of it at places in arithmetic progression, or what the repetitions of an earlier loop gave;
reshaped and permuted in whatever way, as long as it is the same way for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, replace

from tracejit.ir.graph import Builder, Node, Value
from tracejit.ir.types import DType
from tracejit.records import dataclass

MOVES = ("reshape", "permute", "alias", "expand", "flip")  # each row in the same way


@dataclass(eq=False)
class Family:
    """What a loop gives for one value of its body: rows of its flat result.

    values: of the graph before, by repetition; -1 is what is carried at first.
    flat:   the loop's result; `start` and `rows` of the section in it.
    dtype:  of the values; that of the flat result may be wider.
    own:    the first repetition whose value the loop computes; those before it are given to it.
    """

    values: dict[int, Value]
    flat: Value
    start: int
    rows: int
    shape: tuple[int, ...]
    dtype: DType
    reverse: bool
    carried: bool
    own: int = 0

    def place(self, repetition: int) -> int:
        """The row of a repetition."""
        if self.reverse:
            return self.rows - 1 - self.carried - repetition
        return repetition + self.carried

    def stacked(self, b: Builder) -> Value:
        """All rows, as they lie."""
        size = 1
        for n in self.shape:
            size *= n
        low, high = self.start, self.start + self.rows * size
        part = b.slice(self.flat, starts=(low,), stops=(high,), steps=(1,))
        return b.reshape(part, shape=(self.rows, *self.shape))

    def row(self, b: Builder, repetition: int) -> Value:
        """That of one repetition."""
        size = 1
        for n in self.shape:
            size *= n
        low = self.start + self.place(repetition) * size
        part = b.slice(self.flat, starts=(low,), stops=(low + size,), steps=(1,))
        found = b.reshape(part, shape=self.shape)
        return found if found.type.dtype is self.dtype else b.cast(found, dtype=self.dtype)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows first, first + step, … of a family, or slices of a tensor that begin there.

    of:    a Family, or the slice node of the repetition in the middle.
    axis:  along which slices move.
    moves: what is done to each row then, innermost first: primitive and attributes.
    valid: in which repetitions it holds.
    """

    of: Family | Node
    first: int
    step: int
    valid: list[bool]
    axis: int = 0
    moves: tuple[tuple, ...] = ()

    @property
    def key(self) -> tuple:
        """What tells the rows apart that a loop reads, whatever is done to them then."""
        if isinstance(self.of, Family):
            return id(self.of), self.first, self.step
        return self.base.id, self.axis, self.first, self.step, *_others(self.of, self.axis)

    @property
    def base(self) -> Value:
        return self.of.args[0]

    def cut(self, low: int, high: int) -> Rows:
        """Those of some repetitions alone."""
        return replace(self, first=self.first + low * self.step, valid=self.valid[low:high])

    def descending(self) -> bool:
        """Whether later repetitions read what lies before."""
        reverse = isinstance(self.of, Family) and self.of.reverse
        return (self.step < 0) != reverse

    def stacked(self, b: Builder, reverse: bool) -> Value:
        """A tensor with a row for each repetition; in a loop that goes `reverse` the last one's
        first. Without the moves."""
        count = len(self.valid)
        if isinstance(self.of, Family):
            low, high = sorted((self.of.place(self.first), self.of.place(self._last())))
            whole, step = self.of.stacked(b), abs(self.step)
            rest = self.of.shape
            found = b.slice(
                whole,
                starts=(low, *(0 for _ in rest)),
                stops=(high + 1, *rest),
                steps=(step, *(1 for _ in rest)),
            )
            if found.type.dtype is not self.of.dtype:
                found = b.cast(found, dtype=self.of.dtype)
        else:
            found = self._slices(b, count)
        if self.descending() != reverse:
            found = b.flip(found, axes=(0,))
        return found

    def _last(self) -> int:
        return self.first + (len(self.valid) - 1) * self.step

    def _slices(self, b: Builder, count: int) -> Value:
        """Slices in order of where they begin."""
        node, axis = self.of, self.axis
        extent = node.out.type.shape[axis]
        low, high = sorted((self.first, self._last()))
        starts, stops = list(node.attr("starts")), list(node.attr("stops"))
        steps = list(node.attr("steps"))
        starts[axis], stops[axis] = low, high + extent
        if extent == 1:
            steps[axis] = abs(self.step)
        x = b.slice(self.base, starts=tuple(starts), stops=tuple(stops), steps=tuple(steps))
        shape = list(node.out.type.shape)
        x = b.reshape(x, shape=(*shape[:axis], count, extent, *shape[axis + 1 :]))
        others = (k for k in range(len(shape) + 1) if k != axis)
        return b.permute(x, axes=(axis, *others))


def _others(node: Node, axis: int) -> tuple:
    starts = node.attr("starts")
    return starts[:axis], starts[axis + 1 :], node.out.type.shape, node.attr("steps")


Producers = Mapping[int, Node]


@dataclass
class Sources:
    """What is known of the values that repetitions read.

    same: what stands for a value that is the same in all repetitions of a loop.
    """

    made: Producers
    same: dict[int, Value] = field(default_factory=dict)
    members: dict[int, list[tuple[Family, int]]] = field(default_factory=dict)

    def add(self, family: Family) -> None:
        for repetition, value in family.values.items():
            self.members.setdefault(value.id, []).append((family, repetition))

    def rows(self, values: Sequence[Value]) -> Rows | None:
        """The rows that these are, one for each repetition; None if they are none."""
        middle = (len(values) - 1) // 2
        found = self._of_family(values, middle)
        if found is not None:
            return found
        nodes = [self.made.get(v.id) for v in values]
        one, two = nodes[middle], nodes[middle + 1]
        if one is None or two is None or one.op is not two.op:
            return None
        if one.op.name == "slice":
            found = self.slices(nodes, middle)
            if found is not None:
                return found
        if one.op.name not in (*MOVES, "slice") or one.attrs != two.attrs:
            return None
        like = [n is not None and n.op is one.op and n.attrs == one.attrs for n in nodes]
        below = self.rows(
            [self._first(n if ok else one) for n, ok in zip(nodes, like, strict=True)]
        )
        if below is None:
            return None
        valid = [a and b for a, b in zip(below.valid, like, strict=True)]
        return replace(below, valid=valid, moves=(*below.moves, (one.op, one.attrs)))

    def _first(self, node: Node) -> Value:
        value = node.args[0]
        return self.same.get(value.id, value)

    def _of_family(self, values: Sequence[Value], middle: int) -> Rows | None:
        ones = self.members.get(values[middle].id, ())
        twos = {id(f): at for f, at in self.members.get(values[middle + 1].id, ())}
        best: Rows | None = None
        for family, at in ones:
            step = twos.get(id(family), at) - at
            if step == 0:
                continue
            first = at - step * middle
            places = (family.values.get(first + r * step) for r in range(len(values)))
            valid = [x is not None and x.id == v.id for x, v in zip(places, values, strict=True)]
            if best is None or sum(valid) > sum(best.valid):
                best = Rows(family, first, step, valid)
        return best

    def slices(self, nodes: Sequence[Node | None], middle: int) -> Rows | None:
        one, two = nodes[middle], nodes[middle + 1]
        starts, other = one.attr("starts"), two.attr("starts")
        axes = [k for k in range(len(starts)) if starts[k] != other[k]]
        base = self._first(one)
        if base.id != self._first(two).id or len(axes) != 1:
            return None
        (axis,) = axes
        step, extent = other[axis] - starts[axis], one.out.type.shape[axis]
        if extent > 1 and (abs(step) != extent or one.attr("steps")[axis] != 1):
            return None
        first = starts[axis] - step * middle
        rest = _others(one, axis)
        one = Node(one.op, (base,), one.attrs, one.outs, one.where)
        valid = [
            n is not None
            and n.op is one.op
            and self._first(n).id == base.id
            and n.attr("starts")[axis] == first + r * step
            and _others(n, axis) == rest
            for r, n in enumerate(nodes)
        ]
        return Rows(one, first, step, valid, axis)


def moved(b: Builder, x: Value, moves: Sequence[tuple]) -> Value:
    """A row after its moves."""
    for op, attrs in moves:
        x = b.emit(op, x, **dict(attrs))
    return x


def all_moved(b: Builder, x: Value, op, attrs: dict) -> Value:
    """A move of each row, for all rows at once: x has them along its first axis."""
    count = x.type.shape[0]
    if op.name == "alias":
        return x
    if op.name == "reshape" or op.name == "expand":
        return b.emit(op, x, shape=(count, *attrs["shape"]))
    if op.name == "permute":
        return b.permute(x, axes=(0, *(a + 1 for a in attrs["axes"])))
    if op.name == "flip":
        return b.flip(x, axes=tuple(a + 1 for a in attrs["axes"]))
    return b.slice(
        x,
        starts=(0, *attrs["starts"]),
        stops=(count, *attrs["stops"]),
        steps=(1, *attrs["steps"]),
    )
