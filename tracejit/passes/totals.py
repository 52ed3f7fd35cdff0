"""What repetitions only add to: gradients of weights, and tensors that are filled row by row.

In: a body. Out: for each value that is carried for this alone, what each repetition adds. It leaves
the loop: a product of matrices becomes one over the rows of all repetitions, a sum one over them,
rows go where they belong at once, and of anything else the loop gives the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tracejit.ir.graph import Builder, Node, Value
from tracejit.ir.types import Type, b1
from tracejit.passes.columns import Body, Column, NoLoop, Placed
from tracejit.passes.rows import Rows
from tracejit.records import dataclass

SMALL = 256  # elements of a total that is carried: it is added up as eager does

Lifted = Callable[[Column], Value]  # all rows of an operand, outside of the loop


@dataclass(frozen=True, slots=True)
class Term:
    """What is added in each repetition.

    column: it, as an operand of the body.
    moves:  places of the views on the way from what is summed to it, innermost first.
    how:    "product", "sum", "placed", or "summed" by the loop; "set" if it takes the place of
            what was there.
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


@dataclass(frozen=True, slots=True)
class Taken:
    """A value that is carried while row after row of it is read, and set to 0: the gradient of a
    tensor that was filled row by row.

    place:  of what the next repetition gets.
    rows:   by the place of the slice that reads them, those of the value at first.
    passed: places of nodes that go.
    zeros:  whether zeros have been added.
    """

    place: int
    first: Value
    rows: dict[int, Rows]
    mask: Placed
    passed: tuple[int, ...]
    zeros: bool


class Totals:
    """The totals of a body."""

    def __init__(self, body: Body):
        self.body = body
        self.inside: dict[int, list[tuple[int, int]]] = {}
        self.carried: dict[int, list[tuple[int, int]]] = {}
        self.longer: set[int] = set()  # places that are read more than one repetition later
        for place, columns in enumerate(body.columns):
            for k, column in enumerate(columns):
                if column.back > 1:
                    self.longer.add(column.place)
                elif column.kind in ("inside", "carried"):
                    readers = self.inside if column.kind == "inside" else self.carried
                    readers.setdefault(column.place, []).append((place, k))
        found = (self._total(place) for place in sorted(self.carried))
        self.all = [total for total in found if total is not None]
        taken = (self._taken(place) for place in sorted(self.carried))
        self.taken = [x for x in taken if x is not None]
        self.skipped = {q for t in self.all for q in t.adds} | set(body.placed)
        self.skipped |= {q for t in self.taken for q in t.passed}
        for one in self.taken:
            for place in one.rows:
                del body.taken[place]
            body.sliced.update(one.rows)
        if body.taken:
            raise NoLoop
        self._check_pads()

    def _check_pads(self) -> None:
        """What is padded at another place in each repetition is only added to a total."""
        body = self.body
        for place in body.placed:
            gone = all(q in self.skipped for q, _ in self.inside.get(place, ()))
            known = {t.column.place for total in self.all for t in total.terms}
            if not gone and place not in known or place in body.outside and not body.is_view(place):
                raise NoLoop

    def _taken(self, place: int) -> Taken | None:
        """Row after row of a value is read, then set to 0 in what is carried on."""
        body = self.body
        readers = self.carried[place]
        masks = [body.mask(body.columns[at][0]) for at, _ in readers]
        if len(readers) != 2 or {k for _, k in readers} != {1, 2} or masks[0] is None:
            return None
        if masks[0] != masks[1] or any(body.node(at).op.name != "where" for at, _ in readers):
            return None
        (first,) = {body.world.args(body.node(at))[k].id for at, k in readers}
        ((part, _),) = [r for r in readers if r[1] == 1]
        ((rest, _),) = [r for r in readers if r[1] == 2]
        zero = [body.columns[part][2], body.columns[rest][1]]
        if any(c.kind != "literal" or c.literal != 0 for c in zero) or body.outside.get(part):
            return None
        first = body.world.args(body.node(part))[1]
        rows: dict[int, Rows] = {}
        for at, _ in self.inside.get(part, ()):
            found = body.taken.get(at)
            mask = masks[0]
            if found is None or at in body.outside:
                return None
            shape, place_of = found.of.out.type.shape, (found.axis, found.first, found.step)
            if shape != mask.shape or place_of != (mask.axis, mask.first, mask.step):
                return None
            node = found.of
            of = Node(node.op, (first,), node.attrs, node.outs, node.where)
            rows[at] = replace(found, of=of)
        passed, at = [part, rest], rest
        while at != place:
            following = self.inside.get(at, ())
            if len(following) != 1 or body.outside.get(at):
                return None
            ((at, k),) = following
            if body.node(at).op.name != "add" or not body.is_zero(body.columns[at][1 - k]):
                return None
            passed.append(at)
        if self.inside.get(place) or not body.outside.get(place, set()) <= {body.times - 1}:
            return None
        if not self.longer.isdisjoint(passed):
            return None
        return Taken(place, first, rows, masks[0], tuple(passed), len(passed) > 2)

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
            if node.out.type != kind or at in self.longer:
                return None
            adds.append(at)
            if node.op.name == "where" and k == 2:
                terms.append(self._set(body.columns[at]))
            elif node.op.name == "add":
                terms.append(self._term(body.columns[at][1 - k]))
            else:
                return None
            if at == place:
                break
            readers = self.inside.get(at, [])
            if len(readers) != 1 or body.outside.get(at):
                return None
            ((at, k),) = readers
        placed = any(term.how in ("placed", "set") for term in terms)
        if any(term.how == "set" for term in terms) and len(terms) > 1:
            return None
        if kind.numel <= SMALL and not placed:
            return None
        if any(term.how == "" for term in terms) or kind.dtype.kind == "b":
            return None
        if kind.dtype.narrow and any(term.how == "summed" for term in terms):
            return None
        return Total(place, tuple(adds), first, tuple(terms))

    def _set(self, columns: Sequence[Column]) -> Term:
        """What takes the place of what was there, row by row."""
        body = self.body
        mask, new = body.mask(columns[0]), columns[1]
        if mask is None or new.kind != "inside" or body.placed.get(new.place) != mask:
            return Term(new, (), "")
        return Term(new, (), "set")

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
    """The sum of the products x[r] · y[r] over all r, as one. x: [r, …, m, k], y: [r, …, k, n]."""
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
    return b.reshape(x, shape=(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :]))


def total(b: Builder, body: Body, term: Term, lifted: Lifted, reverse: bool) -> Value:
    """What all repetitions add, but for what the loop sums."""
    if term.how in ("placed", "set"):
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


def mask_of_all(b: Builder, placed: Placed, count: int, like: Type) -> Value:
    """Where the pads of all repetitions stand, in a value of this type."""
    x = b.full(True, shape=(count, *placed.shape), dtype=b1, device=like.device)
    low, high = [0] * len(like.shape), [0] * len(like.shape)
    for k, n in enumerate(placed.shape):
        high[k] = like.shape[k] - n if k != placed.axis else 0
    if any(high):
        raise NoLoop
    return put(b, x, placed, {"low": low, "high": high, "value": False}, like.shape, False)


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
