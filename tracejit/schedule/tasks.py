"""Tasks: the values of a Graph that cannot be recomputed for free, and what each of them reads.

In: a Graph. Out: `Analysis`, its live nodes in a simpler vocabulary and, per value, its *origin*.

A value is *cheap* when it is an element-wise and movement expression over one tensor (its origin)
beside scalars, and short: reading it elsewhere costs no more than loading the origin. Every other
computed value is its own origin and becomes a `Task`, to be grouped into kernels; so does every
store of an output. A task's demands are the origins that it reads and at which indices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from dataclasses import field, replace
from math import isqrt

from tracejit.errors import InvalidGraph
from tracejit.ir.graph import Builder, Graph, Node, Param, Result, Value, next_id
from tracejit.ir.ops import OPS
from tracejit.ir.ops.indexing import missing
from tracejit.ir.ops.loop import Section, sections
from tracejit.ir.types import Type, contiguous_strides
from tracejit.records import dataclass, record
from tracejit.schedule.index import Indices, extents_of, identity, operand_indices
from tracejit.schedule.kernel import Mask

ATTENTION = "attend"  # the kind of a task of attention
# Primitives with kernels of their own, that go along an axis: step by step, or to sort it.
RUNNING = ("cumsum", "accumulate", "recurrence")
IN_ORDER = ("scatter", "argsort", *RUNNING)
APART = {"loop": "loop", "matrices": "host", "collective": "host"}  # lowered as they are
CHEAP_LIMIT = 8  # of the units of `node_cost`: what may be recomputed instead of loaded


@record
class Origin:
    """What a value is computed from: `main` (None: nothing but scalars and literals).

    `view`: the last movement on the way from the origin (the origin itself if there was none);
    `pure`: no computed scalar joins in; `cost`: operations between the origin and the value.
    """

    main: Value | None
    view: Value | None
    cost: int = 0
    pure: bool = True


@record
class Demand:
    """A task reads `origin` at `indices` over the task's own axes, where `mask` holds.

    `top` is a value computed from the origin, as near to the reader as possible, that could be
    stored instead of it. `aligned` is False for a contraction's operands, which are read at other
    points too, and for what a gather or attention reads: at many points; `indices` is then empty.
    """

    origin: Value
    top: Value
    indices: Indices
    mask: Mask
    aligned: bool = True


@dataclass(eq=False, slots=True)
class Task:
    """One unit of work. kind: "map", "reduce", "dot", "attend", "scatter" (or another that goes
    in order: `RUNNING`, "argsort"), "loop", "host" (a call), or "store" (of `value` in a buffer).

    `shape` is the domain: of the value, of a reduction's operand. `place` gives the task's own
    indices over the axes of its group's domain; `outer` says that they use outer axes only.
    """

    order: int
    kind: str
    value: Value
    shape: tuple[int, ...]
    demands: tuple[Demand, ...]
    node: Node | None = None
    buffer: str = ""
    target: Value | None = None
    group: object = None
    place: Indices = ()
    outer: bool = False
    time: int = 0

    @property
    def value_place(self) -> Indices:
        """The indices of the task's value: for a reduction, those of the kept dimensions."""
        if self.kind != "reduce":
            return self.place
        reduced = self.node.attr("axes")
        return tuple(p for k, p in enumerate(self.place) if k not in reduced)


@dataclass(slots=True)
class Analysis:
    """Live nodes, aliases resolved; producers and origins by value id. `new` makes a value that the
    graph does not have."""

    nodes: list[Node]
    alias: dict[int, Value]
    params: set[int]
    producer: dict[int, Node]
    new: Callable[[Type], Value]
    origins: dict[int, Origin] = field(default_factory=dict)

    def resolve(self, value: Value) -> Value:
        """The value behind aliases."""
        return self.alias.get(value.id, value)

    def is_task(self, value: Value) -> bool:
        """Whether the value is computed by a task of its own."""
        origin = self.origins.get(value.id)
        return origin is not None and origin.main is value and value.id not in self.params

    def demands(self, root: Value, indices: Indices, extents, aligned=True) -> list[Demand]:
        """The origins that `root` at `indices` reads; `root` itself if it is a task or param."""
        found: list[Demand] = []
        stack: list[tuple[Value, Indices, Mask, Value | None]] = [(root, indices, (), None)]
        while stack:
            value, at, mask, top = stack.pop()
            origin = self.origins[value.id]
            if value.id in self.params or origin.main is value:
                node = self.producer.get(value.id)
                if node is not None and _stores_itself(node):
                    top = None
                new = Demand(value, top or value, at, mask, aligned)
                if not any(
                    d.origin is value and d.indices == at and d.mask == mask and d.top is new.top
                    for d in found
                ):
                    found.append(new)
                continue
            node = self.producer[value.id]
            if node.op.family == "movement":
                below, bound = operand_indices(node, at, extents)
                stack.append((node.args[0], below, mask + bound, None))
            elif node.op.family == "elementwise":
                if not origin.pure:
                    top = None
                elif top is None and origin.view is origin.main:
                    top = value
                stack.extend((arg, at, mask, top) for arg in reversed(_tensors(node)))
        return found

    def scattered(self, root: Value) -> list[Demand]:
        """The origins of a value that is read at points which other values decide."""
        shape = root.type.shape
        found = self.demands(root, identity(shape), extents_of(shape), aligned=False)
        unique = dict.fromkeys((d.origin, d.top) for d in found)
        return [Demand(origin, top, (), (), aligned=False) for origin, top in unique]

    def task(self, order: int, node: Node, value: Value | None = None) -> Task:
        """The task of a node's result that is its own origin."""
        value, family = value or node.out, node.op.family
        if family == "contraction":
            shape = value.type.shape
            return Task(order, "dot", value, shape, tuple(self._dot_demands(node)), node)
        if family in APART:
            found = dict.fromkeys(d for arg in node.inputs for d in self.scattered(arg))
            return Task(order, APART[family], value, value.type.shape, tuple(found), node)
        if family == "attention":
            found = dict.fromkeys(d for arg in _tensors(node) for d in self.scattered(arg))
            return Task(order, ATTENTION, value, value.type.shape, tuple(found), node)
        kind = "reduce" if family == "reduce" else "map"
        if node.op.name in IN_ORDER:
            kind = node.op.name
        shape = node.args[0].type.shape if kind == "reduce" else value.type.shape
        demands: dict[int, list[Demand]] = {}
        for position, arg in enumerate(_tensors(node)):
            elsewhere = position == 0 if kind in ("map", "argsort") else position > 0
            if family == "indexing" and kind not in RUNNING and elsewhere:
                found = self.scattered(arg)
            else:
                found = self.demands(arg, identity(shape), extents_of(shape))
            for demand in found:
                known = demands.setdefault(demand.origin.id, [])
                if demand not in known:
                    known.append(demand)
        return Task(
            order, kind, value, shape, tuple(d for ds in demands.values() for d in ds), node
        )

    def store(self, order: int, value: Value, buffer: str, target: Value | None) -> Task:
        """The task that stores a value in an output buffer, or over the input `target`."""
        shape = value.type.shape
        found: list[Demand] = []
        if not value.type.is_host:
            found = self.demands(value, identity(shape), extents_of(shape))
        return Task(order, "store", value, shape, tuple(found), None, buffer, target)

    def _dot_demands(self, node: Node) -> Iterator[Demand]:
        a, b, extents = dot_indices(node)
        for arg, indices in zip(node.args, (a, b), strict=True):
            yield from self.demands(arg, indices, extents, aligned=False)


def _stores_itself(node: Node) -> bool:
    """Whether a value must be stored as it is: it is stored step by step, or by a template."""
    return node.op.name in IN_ORDER or node.op.family in ("attention", *APART)


def dot_indices(node: Node) -> tuple[Indices, Indices, dict[str, int]]:
    """Operand indices of a matmul over (batch…, m, n) and the contraction as one more axis."""
    shape, k = node.out.type.shape, node.args[0].type.shape[-1]
    axes = identity((*shape, k))
    *batch, m, n, last = axes
    return (*batch, m, last), (*batch, last, n), extents_of((*shape, k))


def node_cost(node: Node) -> int:
    """What recomputing an element-wise operation costs beside a load from memory, an addition
    being 1. The root of the op's cost: the dearer it is, the more of it hides behind the load."""
    return isqrt(node.op.cost)


def _tensors(node: Node) -> list[Value]:
    """The arguments of a node that are tensors."""
    return [a for a in node.inputs if not a.type.is_host]


def _as_source(node: Node, value: object) -> Node:
    kind = node.out.type
    attrs = (("shape", kind.shape), ("dtype", kind.dtype), ("device", kind.device))
    return Node(OPS["full"], (value,), attrs, node.outs, node.where)


def _simplify(node: Node) -> Node:
    """Rewrite degenerate nodes: empty operands to a constant, reductions of size 1 to a reshape."""
    name, first = node.op.name, node.args[0] if node.args else None
    if name == "pad" and first.type.numel == 0:
        return _as_source(node, node.attr("value"))
    if name == "unwindow" and first.type.numel == 0:
        return _as_source(node, 0)
    if name == "matmul" and first.type.numel == 0:
        return _as_source(node, 0)
    nothing = name == "scatter" and node.args[1].type.numel == 0
    if nothing or (name in RUNNING and first.type.shape[node.attr("axis")] == 1):
        shape, kept = (("shape", node.out.type.shape),), node.args[-(name in RUNNING)]
        return Node(OPS["reshape"], (kept,), shape, node.outs, node.where)
    if name == "argsort" and (first.type.shape[node.attr("axis")] == 1 or not node.out.type.numel):
        return _as_source(node, 0)
    if name == "scan" and node.out.type.numel == 0:
        return _as_source(node, 0)
    if name == "gather" and first.type.numel == 0:
        return _as_source(node, missing(first.type.dtype))
    if node.op.family == "reduce":
        if first.type.numel == 0:
            return _as_source(node, 0)
        if all(first.type.shape[k] == 1 for k in node.attr("axes")):
            shape = (("shape", node.out.type.shape),)
            return Node(OPS["reshape"], (first,), shape, node.outs, node.where)
    return node


_FAMILIES = ("elementwise", "movement", "reduce", "contraction", "attention", "indexing")
_FAMILIES += ("source", "host", "order", *APART)


def analyse(
    graph: Graph, fuse: bool, *, body: bool = False, copies: Set[int] = frozenset()
) -> Analysis:
    """Resolve aliases, drop dead and empty nodes, and find every value's origin.

    Without `fuse` no computed value is cheap: each element-wise node becomes a task. In the `body`
    of a loop no result is: it is stored by the kernel of the others that are computed with it.
    `copies` are aliases that are to be values of their own.
    """
    own = {result.value.id for result in graph.results} if body else set()
    alias: dict[int, Value] = {}
    nodes: list[Node] = []
    producer: dict[int, Node] = {}
    copied = set(copies)  # what loops and hosts read: values of their own, which lie row by row
    plain = {p.value.id for p in graph.params if is_row_major(p)}
    whole = set(plain)  # what a host reads where it is
    new = Builder(next_id(graph.values())).value
    turns = _Turns()
    apart = _apart(graph)
    sums: dict[int, Value] = {}  # of loops, by the slices that take them
    for node in graph.nodes:
        if node.op.family not in _FAMILIES:
            raise InvalidGraph(reason=f"cannot schedule {node.op.name} ({node.where or 'no line'})")
        if node.op.name in ("alias", "after") and node.out.id not in copies:
            first = node.args[0]
            alias[node.out.id] = alias.get(first.id, first)
            continue
        node = _simplify(node)
        if any(isinstance(a, Value) and a.id in alias for a in node.args):
            args = tuple(alias.get(a.id, a) if isinstance(a, Value) else a for a in node.args)
            node = Node(node.op, args, node.attrs, node.outs, node.where)
        if turns.are_many(node):
            copy = Node(OPS["alias"], (node.args[0],), (), (new(node.args[0].type),))
            nodes.append(copy)
            copied.add(copy.out.id)
            node = replace(node, args=(copy.out, *node.args[1:]))
        turns.count(node)
        if node.op.family in APART:
            args, offsets = [], []
            loop = node.op.family == "loop"
            rows = node.attr("carried") + node.attr("sliced") if loop else 0
            for k, arg in enumerate(node.args):
                if loop:
                    in_place = k >= rows and arg.id in plain
                    found = (arg, 0) if in_place else _in_place(arg, producer)
                else:
                    found = (arg, 0) if arg.id in whole else None
                if found is None:
                    copy = Node(OPS["alias"], (arg,), (), (new(arg.type),))
                    nodes.append(copy)
                    copied.add(copy.out.id)
                    found = copy.out, 0
                args.append(found[0])
                offsets.append(found[1])
            node = replace(node, args=tuple(args))
            if loop:
                node = replace(node, attrs=(*node.attrs, ("offsets", tuple(offsets))))
            else:
                whole.add(node.out.id)
            if loop and node.out.id in apart:
                outs = tuple(map(new, _types_apart(node)))
                parts = zip(apart[node.out.id], outs[-summed(node) :], strict=True)
                sums |= {slice: value for slices, value in parts for slice in slices}
                alias[node.out.id] = outs[0]  # the slices of what is kept
                node = replace(node, outs=outs, attrs=(*node.attrs, ("apart", True)))
        if node.out.id in sums:
            total = sums[node.out.id]
            node = _reshaped(node, total)
        if node.op.name == "reshape" and node.args[0].id in sums:
            total = sums[node.args[0].id]
            if node.out.type == total.type:
                alias[node.out.id] = total
                continue
            node = _reshaped(node, total)
        producer.update((out.id, node) for out in node.outs)
        nodes.append(node)
    live = {alias.get(v.id, v).id for v in graph.outputs() if v.type.numel}
    live |= {node.out.id for node in nodes if node.is_ordered}
    kept: list[Node] = []
    for node in reversed(nodes):
        if any(out.id in live for out in node.outs):
            live.update(v.id for v in node.inputs)
            kept.append(node)
    kept.reverse()
    analysis = Analysis(
        nodes=kept,
        alias=alias,
        params={p.value.id for p in graph.params},
        producer={out.id: n for n in kept for out in n.outs},
        new=new,
    )
    for param in graph.params:
        analysis.origins[param.value.id] = Origin(param.value, param.value)
    for node in kept:
        if node.op.family == "loop":
            analysis.origins.update((out.id, Origin(out, out)) for out in node.outs)
        elif node.op.family != "host":
            apart = node.out.id in copied or (node.out.id in own and _computes(node))
            origin = Origin(node.out, node.out) if apart else _origin(node, analysis, fuse)
            analysis.origins[node.out.id] = origin
    return analysis


class _Turns:
    """How often values were reshaped after their axes had been permuted. Each time the index of an
    element splits into a quotient and a remainder of what it was: it grows by a factor of two."""

    MOST = 5

    def __init__(self) -> None:
        self._of: dict[int, tuple[int, bool]] = {}  # by value: how often, and whether once more

    def are_many(self, node: Node) -> bool:
        """Whether what a node reads is to be a value of its own in memory."""
        if node.op.name != "reshape":
            return False
        turns, permuted = self._of.get(node.args[0].id, (0, False))
        return permuted and turns >= self.MOST

    def count(self, node: Node) -> None:
        """Take a node into account, what it reads being so already."""
        if node.op.family not in ("movement", "elementwise"):
            return
        found = [self._of[x.id] for x in node.inputs if x.id in self._of]
        turns, permuted = max(found, default=(0, False))
        if node.op.name == "permute":
            permuted = True
        elif node.op.name == "reshape" and permuted:
            turns, permuted = turns + 1, False
        if turns or permuted:
            self._of[node.out.id] = turns, permuted


def _computes(node: Node) -> bool:
    return node.op.family == "elementwise"


def _apart(graph: Graph) -> dict[int, list[list[int]]]:
    """The loops whose sums may lie apart from the rest of the result, since it is only read by
    slices of one or the other; and the slices of each sum."""
    loops = {n.out.id: n for n in graph.nodes if summed(n)}
    if not loops:
        return {}
    for value in graph.outputs():
        loops.pop(value.id, None)
    found = {id: [[] for _ in range(summed(node))] for id, node in loops.items()}
    for reader in graph.nodes:
        for id in {v.id for v in reader.inputs} & found.keys():
            sums = sections_of(loops[id])[-summed(loops[id]) :]
            if reader.op.name != "slice" or reader.attr("steps") != (1,):
                del found[id]
                continue
            ((start,), (stop,)) = reader.attr("starts"), reader.attr("stops")
            whole = [k for k, s in enumerate(sums) if (s.start, s.stop) == (start, stop)]
            if whole:
                found[id][whole[0]].append(reader.out.id)
            elif stop > sums[0].start:
                del found[id]
    return found


def sums_of(loop: Node) -> tuple[Value, ...]:
    """The sums of a loop that lie apart from its other results."""
    return loop.outs[-summed(loop) :] if dict(loop.attrs).get("apart") else ()


def summed(node: Node) -> int:
    """Of how many results of its body a loop gives the sum; 0 for other nodes."""
    return dict(node.attrs).get("summed", 0)


def sections_of(loop: Node) -> list[Section]:
    """Where in a loop's flat result those of its body lie."""
    shapes = [r.value.type.shape for r in loop.attr("body").results]
    return sections(shapes, loop.attr("carried"), loop.attr("steps"), summed(loop))


def _types_apart(node: Node) -> list[Type]:
    """Of what a loop carries and keeps, if it is anything, and of each sum."""
    total, kind = summed(node), node.out.type
    kept = sections_of(node)[-total].start
    results = node.attr("body").results
    types = [r.value.type for r in results[len(results) - total :]]
    return [replace(kind, shape=(kept,)), *types] if kept else types


def _reshaped(node: Node, of: Value) -> Node:
    """A reshape in a node's place."""
    return Node(OPS["reshape"], (of,), (("shape", node.out.type.shape),), node.outs, node.where)


def is_row_major(place: Param | Result) -> bool:
    """Whether an input or a result lies row by row."""
    return place.strides in (None, contiguous_strides(place.value.type.shape))


def _in_place(value: Value, producer: dict[int, Node]) -> tuple[Value, int] | None:
    """The result of a loop, and the element from which on it holds a value row by row. Any other
    value that a loop reads is copied, which costs nothing where a kernel computes it."""
    offset = 0
    while (node := producer.get(value.id)) is not None:
        if node.op.name == "scan":
            return value, offset
        if node.op.name == "slice" and len(value.type.shape) == 1 and node.attr("steps") == (1,):
            offset += node.attr("starts")[0]
        elif node.op.name != "reshape":
            return None
        value = node.args[0]
    return None


def _origin(node: Node, analysis: Analysis, fuse: bool) -> Origin:
    """The origin of a node's result, given those of its operands."""
    own = Origin(node.out, node.out)
    family = node.op.family
    if family == "source":
        return Origin(None, None)
    if family == "movement":
        below = analysis.origins[node.args[0].id]
        view = node.out if below.main is not None else None
        return Origin(below.main, view, below.cost, below.pure)
    if family != "elementwise" or not fuse:
        return own
    main = view = None
    cost, pure = node_cost(node), True
    for arg in _tensors(node):
        below = analysis.origins[arg.id]
        cost += below.cost
        pure = pure and below.pure
        if below.main is None:
            continue
        if below.main.type.numel == 1 and node.out.type.numel > 1:
            pure = pure and below.main.id in analysis.params
        elif main is None:
            main, view = below.main, below.view
        elif main is not below.main or view is not below.view:
            return own
    if cost > CHEAP_LIMIT:
        return own
    return Origin(main, view, cost, pure)
