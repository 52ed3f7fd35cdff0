"""A run of repetitions as a loop.

In: a body, taken apart. Out: a `scan`, the nodes around it, and what of its flat result stands for
which values of the graph.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from tracejit.ir.graph import Arg, Builder, Graph, Node, Param, Result, Value
from tracejit.ir.ops.loop import sections
from tracejit.ir.types import DType, Type, b1, f32, f64, i64
from tracejit.passes.columns import SOURCES, Body, Column, NoLoop
from tracejit.passes.dce import live
from tracejit.passes.rewrite import substituted
from tracejit.passes.rows import Family, Rows, all_moved, moved
from tracejit.passes.totals import Totals, mask_of_all, moved_on, total
from tracejit.records import dataclass

Key = tuple[int, tuple[int, ...]]  # what is carried: its place, and the first values by their ids
LARGE = 1 << 26  # bytes that what is only carried may take for all repetitions


@dataclass
class Rolled:
    """A loop in the place of a run: the nodes that stand for it, before and after the loop."""

    at: int
    nodes: list[Node]
    families: list[Family]
    views: list[Node]  # of values of the body, which others read


class Loop:
    """A body as a loop."""

    def __init__(self, body: Body, outside: Builder, consumed: Set[int]):
        self.body, self.world, self.gone = body, body.world, consumed
        self.totals = Totals(body)
        self.skipped = self.totals.skipped
        self.outside = outside
        self.inside = Builder()
        self.begin = len(self.outside.nodes)
        self.families: list[Family] = []
        self.instead: dict[Value, Value] = {}
        self.whole: dict[int, tuple[Value, Value]] = {}  # operands, and params
        self.read: dict[tuple, tuple[Rows, Value]] = {}
        self.carried: dict[Key, tuple[Value, Value]] = {}  # the first value, and the param
        self.longer: dict[int, Key] = {}  # of operands that are carried over several, by identity
        self.values: list[Value | None] = []
        self.constant: set[int] = set()  # places of what is computed of literals alone
        self.stacks: dict[tuple, Value] = {}
        self.at = body.start + body.run.period

    # ---- what becomes of the run

    def consumed(self) -> set[int]:
        body = self.body
        fixed = {body.start + q for q in body.fixed}
        return set(range(body.start, body.stop)) - fixed

    def same(self) -> dict[int, Value]:
        """What stands for values that are the same in all repetitions: those of the first one."""
        body = self.body
        return {
            body.node(q, r).out.id: body.node(q).out
            for q in body.fixed
            for r in range(1, body.times)
        }

    def rolled(self) -> Rolled:
        kept = self._kept()
        self.reverse = self._goes_back()
        self._emit_body()
        self._emit_loop(kept)
        body = self.body
        views = [
            body.node(q, r)
            for q in sorted(body.outside)
            if body.is_view(q)
            for r in sorted(body.outside[q])
        ]
        views.sort(key=lambda n: self.world.index[n.out.id])
        nodes = self.outside.nodes[self.begin :]
        return Rolled(self.at, nodes, self.families, views)

    def _kept(self) -> list[int]:
        """Places of the body whose values are kept, row by row."""
        body = self.body
        totals = {t.place for t in (*self.totals.all, *self.totals.taken)}
        kept = {
            q
            for q in body.outside
            if q not in body.fixed and q not in totals and not body.is_view(q)
        }
        for found in self.totals.all:
            for term in found.terms:
                if term.how != "summed":
                    self._lift(term.column.place, kept)
        return sorted(kept)

    def _lift(self, place: int, kept: set[int]) -> None:
        """Note what has to be kept, so that all rows of a node's operands are known."""
        body = self.body
        for k, column in enumerate(body.columns[place]):
            if column.kind not in ("inside", "carried") or column.place in body.fixed:
                continue
            if column.back > 1:
                self._carried(column, self._firsts(place, k, column))
            if column.kind == "carried":
                if column.place in {t.place for t in self.totals.all}:
                    raise NoLoop
                kept.add(column.place)
            elif body.is_view(column.place) and column.place not in body.sliced:
                self._lift(column.place, kept)
            elif column.place not in body.sliced:
                if column.place in self.skipped:
                    raise NoLoop
                kept.add(column.place)

    def _goes_back(self) -> bool:
        """Whether more is read from the end to the beginning than the other way round."""
        found = {}
        for columns in self.body.columns:
            for column in columns:
                if column.kind == "rows":
                    found[column.rows.key] = column.rows
        for rows in self.body.sliced.values():
            found[rows.key] = rows
        sides = [0, 0]
        for rows in found.values():
            one = rows.of.shape if isinstance(rows.of, Family) else rows.of.out.type.shape
            size = 1
            for n in one:
                size *= n
            sides[rows.descending()] += size
        return sides[1] > sides[0]

    # ---- the body

    def _emit_body(self) -> None:
        body = self.body
        for place in range(body.run.period):
            node = body.node(place)
            self.inside.line = node.where
            if place in self.skipped:
                self.values.append(None)
            elif place in body.sliced:
                self.values.append(self._rows_inside(body.sliced[place]))
            elif place in body.fixed and not self._is_made_inside(node, place):
                self.values.append(None if node.out.type.is_host else self._whole(node.out))
            else:
                args = self._args(place, node)
                known = None not in args  # else it is a view of what is added to a total
                found = self.inside.emit(node.op, *args, **dict(node.attrs)) if known else None
                self.values.append(found)

    def _is_made_inside(self, node: Node, place: int = -1) -> bool:
        """Whether a body computes what is the same in all repetitions, since it costs nothing: it
        moves nothing, or is computed of constants. `place` is that of a node of the body."""
        if any(a.type.is_host for a in node.inputs):
            return False
        if place >= 0 and node.op.family in ("elementwise", "movement", "source"):
            known = (
                c.kind == "literal" or c.place in self.constant for c in self.body.columns[place]
            )
            if all(known):
                self.constant.add(place)
                return True
        return node.op.name in ("reshape", "expand", "alias", *SOURCES)

    def _args(self, place: int, node: Node) -> list[Arg | None]:
        columns = self.body.columns[place]
        like = node.out.type
        return [
            self._carried(c, self._firsts(place, k, c))
            if c.kind == "carried"
            else self._inside(c, self.world.args(node)[k], like)
            for k, c in enumerate(columns)
        ]

    def _firsts(self, place: int, k: int, column: Column) -> list[Value]:
        """What an operand that is carried is in the first repetitions, the last one first."""
        nodes = [self.body.node(place, r) for r in range(column.back)]
        return [self.world.args(node)[k] for node in reversed(nodes)]

    def _inside(self, column: Column, first: Arg, like: Type) -> Arg | None:
        """An operand of a node in the body, None if that is not computed there. `first` is that of
        the first repetition."""
        if column.kind == "literal":
            return column.literal
        if column.kind == "same" or column.kind == "inside" and column.place in self.body.fixed:
            if first.type.is_host:
                return self._number(first, like)
            if column.kind == "same":
                return self._whole(column.value)
        if column.kind == "rows":
            return self._rows_inside(column.rows)
        return self.values[column.place]

    def _number(self, number: Value, like: Type) -> Value:
        """A number of the host, which a body cannot read, as a tensor."""
        if like.dtype not in (f32, f64):
            raise NoLoop
        ones = (1,) * len(like.shape)
        x = self.outside.full(number, shape=ones, dtype=like.dtype, device=like.device)
        key = number.id, ones
        x = self.stacks.setdefault(("number", *key), x)
        return self.inside.expand(self._whole(x), shape=like.shape)

    def _whole(self, value: Value) -> Value:
        if value.type.is_host:
            raise NoLoop
        made = self.world.index.get(value.id)
        if made is not None and made not in self.gone:
            node = self.world.nodes[made]
            if not self.body.start <= made < self.body.stop and self._is_made_inside(node):
                args = [
                    self._whole(a) if a.__class__ is Value else a for a in self.world.args(node)
                ]
                return self.inside.emit(node.op, *args, **dict(node.attrs))
        if value.id not in self.whole:
            self.whole[value.id] = value, self.inside.value(value.type)
        return self.whole[value.id][1]

    def _rows_inside(self, rows: Rows) -> Value:
        key = rows.key
        if key not in self.read:
            of = rows.of
            if isinstance(of, Family):
                like = self.families_type(of)
            else:
                like = of.out.type
            self.read[key] = rows, self.inside.value(like)
        return moved(self.inside, self.read[key][1], rows.moves)

    @staticmethod
    def families_type(family: Family) -> Type:
        return Type(family.dtype, family.shape, family.flat.type.device)

    def _carried(self, column: Column, firsts: Sequence[Value]) -> Value:
        """What an earlier repetition has computed. `firsts` are the values that the first ones are
        given, that of the very first one last; each is handed on from one to the next."""
        body, start = self.body, self.body.start
        kind = body.node(column.place).out.type
        for n, first in enumerate(firsts, 1):
            key = column.place, tuple(v.id for v in firsts[:n])
            if key not in self.carried:
                made = self.world.index.get(first.id, -1)
                outside = not start <= made < body.stop or made - start in body.fixed
                if first.type != kind or not outside:
                    raise NoLoop
                self.carried[key] = first, self.inside.value(kind)
        if column.back > 1:
            self.longer[id(column)] = key
        return self.carried[key][1]

    def _next(self, key: Key) -> Value | None:
        """What is carried on in the place of a param."""
        place, firsts = key
        return self.carried[place, firsts[:-1]][1] if len(firsts) > 1 else self.values[place]

    # ---- the loop

    def _emit_loop(self, kept: Sequence[int]) -> None:
        body, b = self.body, self.outside
        b.line = body.node(0).where
        summed = [
            (found, term)
            for found in self.totals.all
            for term in found.terms
            if term.how == "summed"
        ]
        sums = [self._term_inside(term.column, term.moves) for _, term in summed]
        for place in kept:
            if self.values[place] is None:
                raise NoLoop
        carried, nodes = self._needed([self.values[q] for q in kept], sums)
        places = {place for place, firsts in carried if len(firsts) == 1}
        rest = [q for q in kept if q not in places]
        results = [self._next(key) for key in carried]
        results += [self.values[q] for q in rest]
        for place, _ in carried:
            size = body.node(place).out.type.nbytes * body.times
            if place not in kept and size > LARGE:
                raise NoLoop
        if not results and not sums:
            raise NoLoop
        dtype = _common([v.type.dtype for v in (*results, *sums)])
        if dtype.narrow and sums:
            dtype = f32
        graph, operands = self._graph(carried, nodes, [*results, *sums], dtype)
        flat = b.scan(
            *operands,
            body=graph,
            carried=len(carried),
            sliced=self.sliced,
            steps=body.times,
            reverse=self.reverse,
            summed=len(sums),
        )
        shapes = [v.type.shape for v in (*results, *sums)]
        found = sections(shapes, len(carried), body.times, len(sums))
        of: dict[object, Family] = {}  # by place, or by what is carried over several
        for k, key in enumerate([*carried, *((q, ()) for q in rest)]):
            place, firsts = key
            name = key if len(firsts) > 1 else place
            if name in of:
                continue
            own = max(len(firsts) - 1, 0)
            values = {r + own: body.node(place, r).out for r in range(body.times - own)}
            for n in range(len(firsts)):
                values[own - 1 - n] = self.carried[place, firsts[: n + 1]][0]
            kind = body.node(place).out.type
            layout = found[k].start, found[k].rows, kind.shape, kind.dtype
            of[name] = Family(values, flat, *layout, self.reverse, bool(firsts), own)
        self.families = list(of.values())
        self._emit_totals(of, flat, found[len(results) :])

    def _needed(self, kept: Sequence[Value], sums: Sequence[Value]) -> tuple[list[Key], list[Node]]:
        """What is carried to compute some values, and the nodes that do."""
        carried: dict[Key, None] = dict.fromkeys(self.longer.values())
        while True:
            roots = [*kept, *sums, *map(self._next, carried)]
            if any(v is None for v in roots):
                raise NoLoop
            nodes = live(self.inside.nodes, roots)
            used = {a.id for n in nodes for a in n.inputs} | {v.id for v in roots}
            more = [
                key
                for key, (_, param) in self.carried.items()
                if param.id in used and key not in carried
            ]
            if not more:
                self.used = used
                return list(carried), nodes
            carried.update(dict.fromkeys(more))

    def _term_inside(self, column: Column, moves: Sequence[int]) -> Value:
        found = self.values[column.place] if column.kind == "inside" else None
        if found is None:
            raise NoLoop
        return found

    def _graph(
        self,
        carried: Sequence[Key],
        nodes: list[Node],
        results: Sequence[Value],
        dtype: DType,
    ) -> tuple[Graph, list[Value]]:
        """The body as a graph whose results are of one dtype, and the loop's operands."""
        b, outside = self.inside, self.outside
        params: list[Param] = []
        operands: list[Value] = []
        instead: dict[Value, Value] = {}
        b.nodes = []
        for key in carried:
            first, param = self.carried[key]
            kind = param.type
            wide = b.value(Type(dtype, kind.shape, kind.device))
            params.append(Param(wide))
            instead[param] = _cast(b, wide, kind.dtype)
            operands.append(_cast(outside, first, dtype))
        before = b.nodes
        rows = [(r, param) for r, param in self.read.values() if param.id in self.used]
        self.sliced = len(rows)
        for row, param in rows:
            params.append(Param(param))
            operands.append(self._stack(row))
        for value, param in self.whole.values():
            if param.id in self.used:
                params.append(Param(param))
                operands.append(value)
        b.nodes = [*before, *(substituted(n, instead) for n in nodes)]
        given = [_cast(b, instead.get(v, v), dtype) for v in results]
        graph = Graph("body", tuple(params), tuple(b.nodes), tuple(map(Result, given)), ())
        return graph.canonical(), operands

    def _stack(self, rows: Rows) -> Value:
        if rows.key not in self.stacks:
            self.stacks[rows.key] = rows.stacked(self.outside, self.reverse)
        return self.stacks[rows.key]

    # ---- totals

    def _emit_totals(self, of: dict[object, Family], flat: Value, sums: Sequence) -> None:
        body, b = self.body, self.outside
        parts = iter(sums)
        for found in self.totals.all:
            value = found.first
            for term in found.terms:
                if term.how == "summed":
                    section = next(parts)
                    part = b.slice(flat, starts=(section.start,), stops=(section.stop,), steps=(1,))
                    x = b.reshape(part, shape=section.shape)
                    x = _cast(b, x, body.node(term.column.place).out.type.dtype)
                    x = moved_on(b, body, term, x)
                else:

                    def lifted(column: Column) -> Value:
                        return self._lifted(column, of)

                    x = total(b, body, term, lifted, self.reverse)
                if term.how == "set":
                    mask = body.placed[term.column.place]
                    there = mask_of_all(b, mask, body.times, value.type)
                    value = b.where(there, x, value)
                else:
                    value = b.add(value, x)
            if any(term.how == "placed" for term in found.terms):
                value = b.add(value, 0.0)  # as eager has added zeros: no -0.0 is left
            self.instead[body.node(found.place, body.times - 1).out] = value
        for taken in self.totals.taken:
            there = mask_of_all(b, taken.mask, body.times, taken.first.type)
            value = b.where(there, 0.0, taken.first)
            value = b.add(value, 0.0) if taken.zeros else value
            self.instead[body.node(taken.place, body.times - 1).out] = value

    def _lifted(self, column: Column, of: dict[object, Family]) -> Value:
        """All rows of an operand, as the loop goes."""
        body, b = self.body, self.outside
        if column.kind == "rows":
            return self._rows_lifted(column.rows)
        if column.kind == "same" or column.place in body.fixed:
            value = column.value if column.kind == "same" else body.node(column.place).out
            kind = value.type
            one = b.reshape(value, shape=(1, *kind.shape))
            return b.expand(one, shape=(body.times, *kind.shape))
        if column.kind == "inside" and column.place in body.sliced:
            return self._rows_lifted(body.sliced[column.place])
        if column.kind == "inside" and column.place not in of and body.is_view(column.place):
            node = body.node(column.place)
            x = self._lifted(body.columns[column.place][0], of)
            return all_moved(b, x, node.op, dict(node.attrs))
        family = of.get(self.longer.get(id(column), column.place))
        if family is None:
            raise NoLoop
        first = -1 if column.kind == "carried" else 0
        if first < 0 and not family.carried:
            raise NoLoop
        rows = Rows(family, first, 1, [True] * body.times)
        key = "own", id(family), first
        if key not in self.stacks:
            self.stacks[key] = rows.stacked(b, self.reverse)
        return self.stacks[key]

    def _rows_lifted(self, rows: Rows) -> Value:
        x = self._stack(rows)
        for op, attrs in rows.moves:
            x = all_moved(self.outside, x, op, dict(attrs))
        return x


def _cast(b: Builder, x: Value, dtype: DType) -> Value:
    return x if x.type.dtype is dtype else b.cast(x, dtype=dtype)


def _common(dtypes: Sequence[DType]) -> DType:
    """A dtype that holds all values of these exactly."""
    kinds = set(dtypes)
    if len(kinds) == 1:
        return dtypes[0]
    floats = {d for d in kinds if d.is_float}
    whole = kinds - floats - {b1}
    if not floats:
        return i64
    if any(d.itemsize > 4 for d in whole):
        raise NoLoop
    return f64 if f64 in floats or whole else f32
