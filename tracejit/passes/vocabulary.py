"""Logits of a large vocabulary, some rows at a time.

In: a graph with a product of two matrices so large that it is worth it, rows of which a softmax is
taken. What is computed of these rows one by one, in the forward and in the backward pass, becomes
the body of a loop over parts of the rows. Out: the same graph with that loop. So neither the logits
nor their gradient are ever in memory as a whole; a weight's gradient is a sum over the parts, and
nothing is computed twice. It is left alone where such a row leaves the loop (logits that are
returned), where what comes back to a row depends on all rows (the square of a mean loss), where
targets are as large as the logits, or where an operation is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import field

from tracejit.ir.graph import Arg, Builder, Graph, Node, Param, Result, Value, next_id
from tracejit.ir.ops.loop import sections
from tracejit.ir.types import DType, Type, f32, f64
from tracejit.passes.dce import dce
from tracejit.passes.rewrite import substituted, with_nodes
from tracejit.passes.simplify import simplify
from tracejit.records import dataclass

# Bytes of logits that are split: at 16 MiB (512 rows of 8192) parts take 1.11 times as long as
# whole logits, at 32 MiB (512 rows of 16384) 1.06, at 64 MiB 1.04 times, at a fifth of the memory.
LARGE = 1 << 25
ROWS = 256  # of a part: each part reads the weight twice and adds to its gradient
LEAST = 128
# Bytes of logits on a GPU that are split, and of a part there: a part of 256 rows of 50257 would
# take longer for the weight and its gradient than for its products. An estimate.
ON_GPU = 1 << 28
SUM = -1  # the place of the rows in a sum over all of them


class _Apart(Exception):
    """What was found cannot be a loop."""


def split_rows(graph: Graph) -> Graph:
    """Compute logits of a large vocabulary, and all that their rows are for, part by part."""
    tried: set[Value] = set()
    while True:
        seeds = (n for n in graph.nodes if n.out not in tried and _is_large_product(n))
        seed = next(seeds, None)
        if seed is None:
            return graph
        tried.add(seed.out)
        graph = next(_splits(graph, seed), graph)


def _splits(graph: Graph, seed: Node) -> Iterator[Graph]:
    """The graph with a loop for what is computed of a product's rows, or of its columns."""
    rank = len(seed.out.type.shape)
    for place in (rank - 2, rank - 1):
        with suppress(_Apart):
            region = _region(graph, seed, place)
            for count in _counts(region):
                with suppress(_Apart):
                    yield _Split(graph, region, count).run()


def _is_large_product(node: Node) -> bool:
    kind = node.out.type
    one = all(n == 1 for n in kind.shape[:-2])
    large = LARGE if kind.device == "cpu" else ON_GPU
    return node.op.name == "matmul" and one and kind.nbytes >= large


# ---- what is computed row by row


@dataclass(slots=True)
class _Region:
    """Nodes of a graph that become the body, in order.

    large: a value of so many elements may not leave it.
    rows:  which axis of each value are the rows, or SUM.
    """

    seed: Node
    large: int
    nodes: list[Node] = field(default_factory=list)
    rows: dict[Value, int] = field(default_factory=dict)

    def is_large(self, value: Value) -> bool:
        return value.type.numel >= self.large and self.rows.get(value, 0) != SUM


def _region(graph: Graph, seed: Node, place: int) -> _Region:
    """The readers of large values, and all that is computed on the way to them."""
    below, wanted = {seed.out}, {seed.out}
    later = []
    for node in graph.nodes:
        if not below.isdisjoint(node.inputs):
            below.add(node.out)
            later.append(node)
    while True:
        needed = set(wanted)
        for node in reversed(later):
            if node.out in needed:
                needed.update(below.intersection(node.inputs))
        region = _Region(seed, seed.out.type.numel // 2, [seed], {seed.out: place})
        for node in later:
            if node.out in needed:
                region.nodes.append(node)
                region.rows[node.out] = _rows(node, region.rows)
        large = {v for v in region.rows if region.is_large(v)}
        found = {n.out for n in later if not large.isdisjoint(n.inputs)} - wanted
        if not found:
            break
        wanted |= found
    softmax = any(n.op.name == "reduce_max" and n.args[0] in large for n in region.nodes)
    if not softmax or not large.isdisjoint(graph.outputs()):
        raise _Apart
    return region


def _rows(node: Node, known: dict[Value, int]) -> int:
    """Which axis of a result are the rows, by that of its operands; SUM where it is over all of
    them."""
    places = {known[v] for v in node.inputs if v in known}
    if len(places) > 1 and node.op.name != "matmul" or SUM in places:
        raise _Apart
    place, name, shape = max(places), node.op.name, node.out.type.shape
    if node.op.family == "elementwise" or name == "alias":
        return place
    if name == "reshape":
        return _reshaped(node.args[0].type.shape, shape, place)
    if name == "expand":
        return place
    if name == "permute":
        return node.attr("axes").index(place)
    if node.op.family == "reduce":
        axes = node.attr("axes")
        if place not in axes:
            return place - sum(a < place for a in axes)
        if name == "reduce_sum":
            return SUM
    if name == "matmul":
        return _rows_of_product(node, known)
    if name in ("slice", "pad") and node.args[0].type.shape[place] == shape[place]:
        return place
    raise _Apart


def _reshaped(shape: Sequence[int], new: Sequence[int], place: int) -> int:
    """Where an axis begins after a reshape, if what is before it stays together."""
    before = math.prod(shape[:place])
    places = [q for q in range(len(new)) if math.prod(new[:q]) == before]
    if not places:
        raise _Apart
    return places[-1]


def _rows_of_product(node: Node, known: dict[Value, int]) -> int:
    x, y = (known.get(v) for v in node.args)
    m, k = (len(node.out.type.shape) - i for i in (2, 1))
    if x == m and y is None or x == k and y == m:
        return m if y is None else SUM
    if y == k and x is None:
        return k
    if x is None and y == m or y is None and x == k:  # the other one is sliced too
        return SUM
    if x == y and x is not None and x < m:
        return x
    raise _Apart


def _counts(region: _Region) -> list[int]:
    """In how many parts the rows may be split, the best number first."""
    common = 0
    for value, place in region.rows.items():
        if place != SUM:
            common = math.gcd(common, value.type.shape[place])
    kind = region.seed.out.type
    rows = kind.shape[region.rows[region.seed.out]]
    best = ROWS if kind.device == "cpu" else max(ROWS, ON_GPU * rows // kind.nbytes)
    counts = [c for c in range(2, common + 1) if common % c == 0 and rows // c >= LEAST]
    return sorted(counts, key=lambda c: abs(math.log(rows / c / best)))


# ---- the loop


class _Split:
    """A graph with a region as a loop of so many steps."""

    def __init__(self, graph: Graph, region: _Region, count: int):
        self.graph, self.region, self.count = graph, region, count
        self.made = graph.producers()
        self.outside = Builder(next_id(graph.values()))
        self.body = Builder()
        self.outside.line = self.body.line = region.seed.where
        self.inside: dict[tuple[Value, int | None], Value] = {}
        self.sliced: dict[tuple[Value, int], tuple[Value, Value]] = {}  # operands, and params
        self.wholes: dict[Value, tuple[Value, Value]] = {}

    def run(self) -> Graph:
        region = self.region
        for node in region.nodes:
            self.body.line = node.where
            place = region.rows[node.out]
            self.inside[node.out, place] = self._emitted(node, place)
        instead, late = self._results()
        loop = {n.out for n in region.nodes}
        before, after, below = [], [], set(loop)
        for node in self.graph.nodes:
            if node.out in loop:
                continue
            if below.isdisjoint(node.inputs):
                before.append(node)
                continue
            below.add(node.out)
            if node.out not in late:
                after.append(substituted(node, instead))
        nodes = (*before, *self.outside.nodes, *after)
        return dce(with_nodes(self.graph, nodes, instead))

    # -- into the body

    def _emitted(self, node: Node, place: int) -> Value:
        """A node over the rows of a part. `place` is that of the rows in its result."""
        attrs, shape = dict(node.attrs), node.out.type.shape
        if node.op.name in ("reshape", "expand", "full", "iota"):
            attrs["shape"] = self._part(shape, place)
        if node.op.name == "iota" and node.attr("axis") == place:
            raise _Apart
        if node.op.name == "slice":
            attrs["stops"] = self._part(attrs["stops"], place)
        return self.body.emit(node.op, *self._operands(node, place), **attrs)

    def _operands(self, node: Node, place: int) -> Iterable[Arg]:
        name = node.op.name
        if name == "matmul":
            x, y = (self._place_in_product(node, i, place) for i in (0, 1))
            return [self._within(v, p) for v, p in zip(node.args, (x, y), strict=True)]
        if node.op.family == "elementwise":
            like = next(v for v in node.inputs if not v.type.is_host)
            return [self._operand(a, place, like) for a in node.args]
        if name == "full":
            if isinstance(node.args[0], Value):
                raise _Apart
            return node.args
        if name == "iota":
            return ()
        if node.op.family not in ("movement", "reduce") or name in ("flip", "window", "unwindow"):
            raise _Apart
        (x,) = node.args
        shape = x.type.shape
        if name == "permute":
            return (self._within(x, node.attr("axes")[place]),)
        if name == "reshape":
            return (self._within(x, _reshaped(node.out.type.shape, shape, place)),)
        if name == "expand":
            one = shape[place] == 1 != node.out.type.shape[place]
            return (self._within(x, None if one else place),)
        if node.op.family == "reduce":
            kept = [k for k in range(len(shape)) if k not in node.attr("axes")]
            return (self._within(x, self.region.rows[x] if place == SUM else kept[place]),)
        if name in ("slice", "pad"):
            return (self._within(x, place),)
        raise _Apart

    def _place_in_product(self, node: Node, side: int, place: int) -> int | None:
        """Which axis of an operand of a product are the rows; None if it has none."""
        m, k = (len(node.out.type.shape) - i for i in (2, 1))
        if place == SUM:
            return m if side else k
        if place < m:
            return place
        return place if side == (place == k) else None

    def _operand(self, arg: Arg, place: int, like: Value) -> Arg:
        if not isinstance(arg, Value):
            return arg
        if not arg.type.is_host:
            return self._within(arg, place)
        if like.type.dtype not in (f32, f64):
            raise _Apart
        ones = (1,) * len(like.type.shape)
        kind = like.type
        number = self.outside.full(arg, shape=ones, dtype=kind.dtype, device=kind.device)
        return self.body.expand(self._whole(number), shape=self._part(kind.shape, place))

    def _within(self, value: Value, place: int | None) -> Value:
        """A value in the body: the rows of a part along an axis, or the whole of it."""
        found = self.inside.get((value, place))
        if found is None:
            if value in self.region.rows:
                raise _Apart
            if place is None:
                found = self._whole(value)
            elif self._is_made_inside(value, place):
                found = self._emitted(self.made[value], place)
            else:
                found = self._sliced(value, place)
            self.inside[value, place] = found
        return found

    def _is_made_inside(self, value: Value, place: int) -> bool:
        """Whether the body computes a value that is known before the loop: one that is large, a
        reduction of one, or turned."""
        node = self.made.get(value)
        if node is None:
            return False
        if node.op.name in ("reshape", "permute"):
            turned = place and node.op.name == "permute"
            return bool(turned) or self._is_made_inside(node.args[0], 0)
        if node.op.family == "reduce":
            return self.region.is_large(node.args[0])
        return self.region.is_large(value) and (
            node.op.family == "elementwise" or node.op.name in ("expand", "full", "iota")
        )

    def _whole(self, value: Value) -> Value:
        """A value that all parts read; movement costs nothing and is made in the body."""
        node = self.made.get(value)
        if node is not None and node.op.name in ("permute", "reshape"):
            return self.body.emit(node.op, self._within(node.args[0], None), **dict(node.attrs))
        if value not in self.wholes:
            self.wholes[value] = value, self.body.value(value.type)
        return self.wholes[value][1]

    def _sliced(self, value: Value, place: int) -> Value:
        if self.region.is_large(value):  # the loop would read a copy of it
            raise _Apart
        kind, b = value.type, self.outside
        front = _to_front(b, value, place)
        part = self._part(front.type.shape, 0)
        operand = b.reshape(front, shape=(self.count, *part))
        param = self.body.value(Type(kind.dtype, part, kind.device))
        self.sliced[value, place] = operand, param
        return _from_front(self.body, param, place)

    def _part(self, shape: Sequence[int], place: int) -> tuple[int, ...]:
        """A shape with the rows of a part."""
        if place == SUM:
            return tuple(shape)
        if shape[place] % self.count:
            raise _Apart
        return tuple(n // self.count if k == place else n for k, n in enumerate(shape))

    # -- out of it

    def _results(self) -> tuple[dict[Value, Value], set[Value]]:
        """Emit the loop: what stands for the values of the region that others read, and which later
        nodes it computes as well."""
        loop = {n.out for n in self.region.nodes}
        outputs = set(self.graph.outputs())
        readers: dict[Value, list[Node]] = {}
        for node in self.graph.nodes:
            for v in node.inputs if node.out not in loop else ():
                readers.setdefault(v, []).append(node)
        kept, summed, late = [], [], set()
        for value in (n.out for n in self.region.nodes):
            if value not in outputs and value not in readers:
                continue
            place = self.region.rows[value]
            if not value.type.dtype.is_float or self.region.is_large(value):
                raise _Apart
            x = self.inside[value, place]
            if place != SUM:
                kept.append((value, place, _to_front(self.body, x, place)))
                continue
            while value not in outputs and len(readers[value]) == 1:  # stored as it is wanted
                (turned,) = readers[value]
                if turned.op.name not in ("permute", "reshape"):
                    break
                x, value = self.body.emit(turned.op, x, **dict(turned.attrs)), turned.out
                late.add(value)
            summed.append((value, place, x))
        dtype = f64 if any(v.type.dtype is f64 for v, *_ in (*kept, *summed)) else f32
        rows = [_cast(self.body, x, dtype) for *_, x in (*kept, *summed)]
        operands = [*self.sliced.values(), *self.wholes.values()]
        body = Graph(
            "body",
            tuple(Param(p) for _, p in operands),
            tuple(self.body.nodes),
            tuple(map(Result, rows)),
            (),
        )
        b = self.outside
        flat = b.scan(
            *(x for x, _ in operands),
            body=dce(simplify(body)).canonical(),
            carried=0,
            sliced=len(self.sliced),
            steps=self.count,
            reverse=False,
            summed=len(summed),
        )
        places = sections([x.type.shape for x in rows], 0, self.count, len(summed))
        instead = {}
        for (value, place, _), section in zip((*kept, *summed), places, strict=True):
            first, *others = section.shape or (1,)
            shape = section.shape if place == SUM else (section.rows * first, *others)
            part = b.slice(flat, starts=(section.start,), stops=(section.stop,), steps=(1,))
            x = b.reshape(part, shape=shape)
            x = _from_front(b, x, place)
            instead[value] = _cast(b, x, value.type.dtype)
        return instead, late


def _to_front(b: Builder, x: Value, place: int) -> Value:
    """An axis first, the others after it."""
    axes = (place, *(k for k in range(len(x.type.shape)) if k != place))
    return b.permute(x, axes=axes) if place > 0 else x


def _from_front(b: Builder, x: Value, place: int) -> Value:
    """The first axis where it was before."""
    others = range(1, len(x.type.shape))
    axes = (*others[: max(place, 0)], 0, *others[max(place, 0) :])
    return b.permute(x, axes=axes) if place > 0 else x


def _cast(b: Builder, x: Value, dtype: DType) -> Value:
    return x if x.type.dtype is dtype else b.cast(x, dtype=dtype)
