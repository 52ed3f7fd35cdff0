"""What repetitions only add to: gradients of weights, and tensors that are filled row by row.

In: a body. Out: for each value that is carried for this alone, what each repetition adds. It leaves
the loop: a product of matrices becomes one over the rows of all repetitions, a sum one over them,
rows go where they belong at once, and of anything else the loop gives the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tracejit.ir.graph import Builder, Value
from tracejit.passes.columns import Body, Column, Placed

SMALL = 256  # elements of a total that is carried: it is added up as eager does

Lifted = Callable[[Column], Value]  # all rows of an operand, outside of the loop


@dataclass(frozen=True, slots=True)
class Term:
    """What is added in each repetition.

    column: it, as an operand of the body.
    moves:  places of the views on the way from what is summed to it, innermost first.
    how:    "product", "sum", "placed", or "summed" by the loop.
    """

    column: Column
    moves: tuple[int, ...]
    how: str


@dataclass(frozen=True, slots=True)
class Total:
    """A value that is carried to be added to.

    place: of its last addition, whose result the next repetition gets.
    adds:  the places of all of them.
    first: what the first one adds to.
    """

    place: int
    adds: tuple[int, ...]
    first: Value
    terms: tuple[Term, ...]


class Totals:
    """The totals of a body."""

    def __init__(self, body: Body):
        self.body = body
        self.inside: dict[int, list[tuple[int, int]]] = {}
        self.carried: dict[int, list[tuple[int, int]]] = {}
        for place, columns in enumerate(body.columns):
            for k, column in enumerate(columns):
                if column.kind in ("inside", "carried"):
                    readers = self.inside if column.kind == "inside" else self.carried
                    readers.setdefault(column.place, []).append((place, k))
        found = (self._total(place) for place in sorted(self.carried))
        self.all = [total for total in found if total is not None]

    def _total(self, place: int) -> Total | None:
        body = self.body
        if len(self.carried[place]) != 1 or self.inside.get(place):
            return None
        if not body.outside.get(place, set()) <= {body.times - 1}:
            return None
        ((at, k),) = self.carried[place]
        first = body.world.args(body.node(at))[k]
        adds, terms = [], []
        kind = body.node(place).out.type
        while True:
            node = body.node(at)
            if node.op.name != "add" or node.out.type != kind:
                return None
            adds.append(at)
            terms.append(self._term(body.columns[at][1 - k]))
            if at == place:
                break
            readers = self.inside.get(at, [])
            if len(readers) != 1 or body.outside.get(at):
                return None
            ((at, k),) = readers
        placed = any(term.how == "placed" for term in terms)
        if kind.numel <= SMALL and not placed:
            return None
        if any(term.how == "" for term in terms) or kind.dtype.kind == "b":
            return None
        if kind.dtype.narrow and any(term.how == "summed" for term in terms):
            return None
        return Total(place, tuple(adds), first, tuple(terms))

    def _term(self, column: Column) -> Term:
        body, moves = self.body, []
        while column.kind == "inside" and column.place not in body.fixed:
            place = column.place
            node = body.node(place)
            if place in body.placed:
                return Term(column, tuple(reversed(moves)), "placed")
            if node.op.name in ("reshape", "permute", "alias"):
                moves.append(place)
                column = body.columns[place][0]
                continue
            if node.op.name == "matmul" and not node.out.type.dtype.narrow:
                return Term(column, tuple(reversed(moves)), "product")
            if node.op.name == "reduce_sum" and not node.out.type.dtype.narrow:
                return Term(column, tuple(reversed(moves)), "sum")
            return Term(column, tuple(reversed(moves)), "summed")
        return Term(column, (), "")


def product_of_all(b: Builder, x: Value, y: Value) -> Value:
    """The sum of products: x[r] · y[r] for all r, as one product. x: [r, …, m, k], y: [r, …, k, n]."""
    rank = len(x.type.shape)
    front = tuple(range(1, rank - 2))
    x = b.permute(x, axes=(*front, 0, rank - 1, rank - 2))
    y = b.permute(y, axes=(*front, 0, rank - 2, rank - 1))
    x, y = (_merged(b, v, len(front)) for v in (x, y))
    last = len(front)
    return b.matmul(b.permute(x, axes=(*range(last), last + 1, last)), y)


def _merged(b: Builder, x: Value, axis: int) -> Value:
    """An axis and the next one as one."""
    shape = x.type.shape
    return b.reshape(
        x, shape=(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
    )


def total(b: Builder, body: Body, term: Term, lifted: Lifted, reverse: bool) -> Value:
    """What all repetitions add, but for what the loop sums."""
    if term.how == "placed":
        x = lifted(body.columns[term.column.place][0])
        pad = body.node(term.column.place)
        x = put(b, x, body.placed[term.column.place], dict(pad.attrs), pad.out.type.shape, reverse)
    elif term.how == "product":
        x = product_of_all(b, *map(lifted, body.columns[term.column.place]))
    else:
        x = lifted(body.columns[term.column.place][0])
        axes = body.node(term.column.place).attr("axes")
        x = b.reduce_sum(x, axes=(0, *(a + 1 for a in axes)))
    return moved_on(b, body, term, x)


def moved_on(b: Builder, body: Body, term: Term, x: Value) -> Value:
    """A sum over all repetitions after the term's views."""
    for place in term.moves:
        node = body.node(place)
        x = x if node.op.name == "alias" else b.emit(node.op, x, **dict(node.attrs))
    return x


def put(
    b: Builder, x: Value, placed: Placed, attrs: dict, shape: Sequence[int], reverse: bool
) -> Value:
    """Rows, the first repetition's first, or last if `reverse`, where their pads stand."""
    if (placed.step < 0) != reverse:
        x = b.flip(x, axes=(0,))
    count, axis = x.type.shape[0], placed.axis
    extent = x.type.shape[1 + axis]
    axes = (*range(1, axis + 1), 0, *range(axis + 1, len(x.type.shape)))
    x = b.permute(x, axes=axes)
    rest = x.type.shape
    x = b.reshape(x, shape=(*rest[:axis], count * extent, *rest[axis + 2 :]))
    gap = abs(placed.step) - 1 if extent == 1 else 0
    last = placed.first + (count - 1) * placed.step
    low, high = list(attrs["low"]), list(attrs["high"])
    low[axis] = min(placed.first, last)
    high[axis] = shape[axis] - (max(placed.first, last) + extent)
    interior = [0] * len(low)
    interior[axis] = gap
    return b.pad(
        x, low=tuple(low), high=tuple(high), interior=tuple(interior), value=attrs["value"]
    )


