"""Attention that is written out: products, a softmax of their rows, and products of these.

In: a graph in normal form. Out: the same graph where a softmax of scores, and what is computed of
its weights, became primitives of attention, which keep no scores (`ir/ops/attention.py`); also in
the backward pass, whose formulas are those of the primitives that stood here. It is left alone
where scores or weights have another reader: they are returned, or dropped out, or a mask has a
gradient, or are half types. Rounding differs, as between eager's own implementations of attention.

A row that sees no key is NaN in eager, and makes its gradients NaN; or it weighs all keys alike, if
scores are set to a finite number instead of -inf. Both are kept, by what the masks say of rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tracejit.ir.graph import Arg, Builder, Graph, Node, Value, next_id
from tracejit.ir.interp import evaluate
from tracejit.ir.ops.attention import fits, row_products
from tracejit.ir.ops.movement import transpose
from tracejit.ir.types import f32, f64
from tracejit.passes.cone import cone
from tracejit.passes.dce import dce
from tracejit.passes.readers import Readers, Unknown
from tracejit.passes.rewrite import substituted, with_nodes
from tracejit.passes.simplify import simplify

LARGE = 1 << 21  # scores, of all heads: fewer are faster to keep than to compute once more
HIDDEN = -1e9  # scores that are set to this, or less, weigh nothing beside others
KNOWN = 1 << 22  # elements of a constant mask that is looked at


def find_attention(graph: Graph) -> Graph:
    """Make primitives of attention that is written out."""
    softmaxes = _softmaxes(graph)
    if not softmaxes:
        return graph
    known = _Known(graph)
    placed: dict[Value, _Placed] = {}
    for softmax in softmaxes:
        try:
            placed |= _Emission(known, _Match(known, softmax)).run()
        except Unknown:
            continue
    return dce(simplify(_replaced(graph, placed))) if placed else graph


def _softmaxes(graph: Graph) -> list[Node]:
    """Quotients of exponentials."""
    powers: set[Value] = set()
    found = []
    for node in graph.nodes:
        if node.op.name == "exp":
            powers.add(node.out)
        elif node.op.name == "div" and node.args[0] in powers:
            found.append(node)
    return found


class _Known(Readers):
    """What is known of a graph, and what is emitted beside it."""

    def __init__(self, graph: Graph):
        super().__init__(graph)
        self.masks: dict[Value, np.ndarray | None] = {}
        self.b = Builder(next_id(graph.values()))

    def mask(self, value: Value) -> np.ndarray | None:
        """A mask that is the same in each call; axes that it is expanded along have one element."""
        found = self.made.get(self.root(value))
        base = found.args[0] if found is not None and found.op.name == "expand" else value
        if base not in self.masks:
            self.masks[base] = None
            if base.type.numel <= KNOWN:
                alone, params = cone(self.graph, [base], "mask")
                if not params:
                    self.masks[base] = evaluate(alone, [])[0][0].astype(bool)
        return self.masks[base]


@dataclass(frozen=True, slots=True)
class _Step:
    """What is done to scores: "mul" by a number, "add" of a bias, or "hide" where `what` is true
    (or false, if `inverted`), with `number` as the score."""

    kind: str
    what: Arg
    number: float = 0.0
    inverted: bool = False


class _Match:
    """The nodes of one attention.

    inner: values that no other nodes may read.
    """

    def __init__(self, known: _Known, softmax: Node):
        self.known, self.weights = known, softmax.out
        self.inner: list[Value] = []
        self.nodes: set[Value] = set()
        self.g: Value | None = None  # the cotangent of the result
        self.dq = self.turned_dk = self.dv = None
        self._forward(softmax)
        self._backward()
        for value in self.inner:
            read = {node.out for node, *_ in known.readers.get(value, ())}
            if value in known.outputs or not read <= self.nodes:
                raise Unknown

    def _inside(self, *nodes: Node) -> None:
        self.nodes.update(node.out for node in nodes)
        self.inner += (self.known.root(node.out) for node in nodes)

    # -- forward

    def _forward(self, softmax: Node) -> None:
        power = self.known.producer(softmax.args[0], "exp")
        total = self._spread(softmax.args[1], "reduce_sum")
        less = self.known.producer(power.args[0], "sub")
        top = self._spread(less.args[1], "reduce_max")
        self.scores = less.args[0]
        if total.args[0] != power.out or top.args[0] != self.scores:
            raise Unknown
        self._inside(softmax, power, total, less, top)
        self.steps: list[_Step] = []  # from the product on
        self.product = self._product(self.scores)
        q, k = self.product.args
        kind, batch = self.scores.type, self.scores.type.shape[:-2]
        if len(kind.shape) < 2:
            raise Unknown
        m, n = kind.shape[-2:]
        if self.product.out.type.shape[-2:] != (m, n) or kind.dtype not in (f32, f64):
            raise Unknown
        self.q, self.turned_k = q, k
        read = self.known.readers.get(self.known.root(self.weights), ())
        outs = [n for n, at, axes in read if n.op.name == "matmul" and at == 0 and not axes]
        if len(outs) != 1 or kind.numel < LARGE:
            raise Unknown
        (self.out,) = outs
        self.nodes.add(self.out.out)
        self.v = self.out.args[1]
        if self.out.args[0].type.shape[-2:] != (m, n):
            raise Unknown
        self.batch, self.m, self.n = batch, m, n
        self.c, self.d = q.type.shape[-1], self.v.type.shape[-1]
        if not fits(kind.device, kind.dtype, max(self.c, self.d)):
            raise Unknown

    def _spread(self, value: Arg, name: str) -> Node:
        """The reduction of rows that is expanded to a value."""
        node = self.known.producer(value, "expand")
        if node.args[0].type.shape != (*value.type.shape[:-1], 1) or node.out != value:
            raise Unknown
        self._inside(node)
        node = self.known.producer(node.args[0], name)
        shape = value.type.shape
        if node.attr("axes") != (len(shape) - 1,) or node.args[0].type.shape != shape:
            raise Unknown
        return node

    def _product(self, scores: Value) -> Node:
        """The product that scores begin with, and the steps to them."""
        node = self.known.producer(scores)
        self._inside(node)
        if node.op.name == "matmul":
            return node
        if node.op.name in ("mul", "div"):
            x, number = node.args
            if node.op.name == "mul" and not _is_number(number):
                x, number = number, x
            if not _is_number(number) or not isinstance(x, Value) or x.type.is_host:
                raise Unknown
            if not isinstance(number, Value) and number <= 0:
                raise Unknown
            product = self._product(x)
            self.steps.append(_Step(node.op.name, number))
            return product
        if node.op.name == "add":
            for x, bias in (node.args, node.args[::-1]):
                if isinstance(x, Value) and isinstance(bias, Value) and not bias.type.is_host:
                    before = list(self.inner), set(self.nodes), list(self.steps)
                    try:
                        product = self._product(x)
                    except Unknown:
                        self.inner, self.nodes, self.steps = before
                        continue
                    self.steps.append(_Step("add", bias))
                    return product
        if node.op.name == "where":
            hidden, x, number = node.args
            inverted = not isinstance(x, Value)
            if inverted:
                x, number = number, x
            if isinstance(number, Value) or not isinstance(x, Value) or number > HIDDEN:
                raise Unknown
            product = self._product(x)
            self.steps.append(_Step("hide", hidden, float(number), not inverted))
            return product
        raise Unknown

    # -- backward

    def _backward(self) -> None:
        """The gradients that there are."""
        products = []
        for node, at, axes in self.known.readers[self.known.root(self.weights)]:
            if node is self.out:
                continue
            if axes:
                turned = node.op.name == "matmul" and at == 0 and self.dv is None
                if not turned or not self.known.is_turned(node.args[0], self.out.args[0]):
                    raise Unknown
                self.dv = node
                self.nodes.add(node.out)
                self._cotangent(node.args[1])
            elif node.op.name == "mul":
                products.append(node)
            else:
                raise Unknown
        if products:
            self._gradients(self._slopes(products))

    def _cotangent(self, value: Value) -> None:
        if self.g is not None and not self.known.same(self.g, value):
            raise Unknown
        self.g = self.g or value

    def _slopes(self, products: Sequence[Node]) -> Value:
        """The cotangent of the scores, w·dw - w·sum(w·dw), of products of the weights w."""
        known = self.known
        for node in products:
            x, y = node.args
            slope = y if known.same(x, self.weights) else x
            made = known.made.get(known.root(slope)) if isinstance(slope, Value) else None
            differences = [n for n, at in known.read(node.out) if n.op.name == "sub" and at == 0]
            if made is None or made.op.name != "matmul" or len(differences) != 1:
                continue
            if made.out.type.shape[-2:] != (self.m, self.n):
                raise Unknown
            self._cotangent(made.args[0])
            if not known.is_turned(made.args[1], self.v):
                raise Unknown
            again = known.producer(differences[0].args[1], "mul")
            total = self._spread(again.args[1], "reduce_sum")
            if not known.same(again.args[0], self.weights) or not known.same(
                total.args[0], node.out
            ):
                raise Unknown
            self._inside(made, node, differences[0], again, total)
            return differences[0].out
        raise Unknown

    def _gradients(self, slopes: Value) -> None:
        known = self.known
        for step in reversed(self.steps):
            if step.kind == "add":
                continue
            if len(known.read(slopes)) != 1:
                raise Unknown
            ((node, at),) = known.read(slopes)
            if step.kind == "hide":
                number, place = (node.args[2], 1) if step.inverted else (node.args[1], 2)
                if (
                    node.op.name != "where"
                    or at != place
                    or not known.same(node.args[0], step.what)
                ):
                    raise Unknown
                if isinstance(number, Value) or number != 0:
                    raise Unknown
            elif node.op.name != step.kind or at != 0 or node.args[1] != step.what:
                raise Unknown
            self._inside(node)
            slopes = node.out
        for node, at in known.read(slopes):
            if node.op.name != "matmul" or node.args[at].type.shape[-2:] != (self.m, self.n):
                raise Unknown
            if at == 0 and self.dq is None and known.is_turned(node.args[1], self.turned_k):
                self.dq = node
            elif at == 1 and self.turned_dk is None and known.is_turned(node.args[0], self.q):
                self.turned_dk = node
            else:
                raise Unknown
            self.nodes.add(node.out)


def _is_number(arg: Arg) -> bool:
    return not isinstance(arg, Value) or arg.type.is_host


# ---- what stands instead


@dataclass(slots=True)
class _Masks:
    """What steps add to scores: a bias, and which rows see no key (None: all rows see one).

    alike: such rows weigh all keys alike; else they are NaN, and so are gradients of scores if
    something is added.
    share: if something is added, of each key in a row to whose scores so small a number is added
    that nothing else is left of them; else 1. The log-sum of such a row is that number.
    """

    bias: Value | float = 0.0
    causal: bool = False
    none: Value | None = None
    alike: bool = False
    share: Value | None = None


@dataclass(slots=True)
class _Placed:
    """Nodes that come before one of the graph, and what stands for its result."""

    nodes: list[Node] = field(default_factory=list)
    instead: Value | None = None


class _Emission:
    """The nodes that stand for a match, by the nodes that they come before."""

    def __init__(self, known: _Known, match: _Match):
        self.known, self.match, self.b = known, match, known.b
        self.placed: dict[Value, _Placed] = {}

    def run(self) -> dict[Value, _Placed]:
        match, b = self.match, self.b
        rows, keys = (*match.batch, match.m), (*match.batch, match.n)
        with_d = (*rows, match.d)
        self._at(match.out)
        scale, q = 1.0, self._shaped(match.q, (*rows, match.c))
        hosts = []
        for step in match.steps:
            if step.kind in ("mul", "div"):
                if isinstance(step.what, Value):
                    hosts.append(step)
                else:
                    scale = scale * step.what if step.kind == "mul" else scale / step.what
        q = self._times(q, hosts)
        masks = self._masks()
        if masks.alike:
            q = self._rows(masks.none, 0.0, q)
        k = self._turned(match.turned_k, (*match.batch, match.c, match.n))
        v = self._shaped(match.v, (*keys, match.d))
        how = {"causal": masks.causal, "scale": scale}
        out = b.attention(q, k, v, masks.bias, **how)
        lost = None if masks.alike else masks.none
        self._instead(match.out, self._rows(lost, math.nan, out))
        gradients = [n for n in (match.dv, match.dq, match.turned_dk) if n is not None]
        if gradients:
            gradients.sort(key=lambda n: n.out.id)  # as they stand in the graph
            lse = b.attention_lse(q, k, masks.bias, **how)
            self._at(gradients[0])
            g = self._shaped(match.g, with_d)
            if masks.share is not None:
                g = b.mul(g, self._along(masks.share, g.type.shape))
            operands = q, k, v, masks.bias, lse, row_products(b, g, out), g
            every = None if lost is None else self._any(lost)
        for node in gradients:
            self._at(node)
            if node is match.dv:
                x = self._rows(every, math.nan, b.attention_dv(*operands, **how))
            elif node is match.dq:
                x = self._times(b.attention_dq(*operands, **how), hosts)
                x = self._rows(masks.none, 0.0, x) if masks.alike else x
                x = self._rows(lost, math.nan, x) if masks.share is not None else x
            else:
                x = b.attention_dk(*operands, **how)
                x = self._rows(every, math.nan, x) if masks.share is not None else x
                x = transpose(b, x)
            self._instead(node, x)
        return self.placed

    def _at(self, node: Node) -> None:
        """What is emitted from now on comes before a node."""
        self.b.line = node.where
        found = self.placed.setdefault(node.out, _Placed())
        self.b.nodes = found.nodes

    def _instead(self, node: Node, x: Value) -> None:
        self.placed[node.out].instead = self._shaped(x, node.out.type.shape)

    def _shaped(self, x: Value, shape: Sequence[int]) -> Value:
        shape = tuple(shape)
        if math.prod(shape) != x.type.numel:
            raise Unknown
        return x if x.type.shape == shape else self.b.reshape(x, shape=shape)

    def _turned(self, x: Value, shape: Sequence[int]) -> Value:
        return transpose(self.b, self._shaped(x, shape))

    def _times(self, x: Value, hosts: Sequence[_Step]) -> Value:
        for step in hosts:
            x = getattr(self.b, step.kind)(x, step.what)
        return x

    def _rows(self, which: Value | None, number: float, x: Value) -> Value:
        """x with a number in some rows."""
        if which is None:
            return x
        return self.b.where(self._along(which, x.type.shape), number, x)

    def _any(self, rows: Value) -> Value:
        """Whether any row of a head is one of these, for each of its keys."""
        b, match = self.b, self.match
        some = b.reduce_max(b.cast(rows, dtype=f32), axes=(len(rows.type.shape) - 1,))
        shape = (*match.batch, match.n)
        some = b.expand(b.reshape(some, shape=(*match.batch, 1)), shape=shape)
        return b.ne(some, 0.0)

    # -- masks

    def _masks(self) -> _Masks:
        """What all steps add to scores. It is computed before it is expanded to their shape."""
        match, b = self.match, self.b
        steps = [s for s in match.steps if s.kind in ("add", "hide")]
        if not steps:
            return _Masks()
        if len(steps) == 1 and steps[0].kind == "hide":
            mask = self.known.mask(steps[0].what)
            if mask is not None and mask.shape[-2:] == (match.m, match.n):
                seen = mask if steps[0].inverted else ~mask
                if (seen == np.tri(match.m, match.n, dtype=bool)).all():
                    return _Masks(causal=True)
        finite = [s for s in steps if s.kind == "hide" and s.number != -math.inf]
        if finite and len(steps) > 1:
            raise Unknown  # which one hides a row is not known
        kind = match.scores.type
        bases = [self._base(s.what) for s in steps]
        common = (
            tuple(map(max, *(x.type.shape for x in bases))) if bases[1:] else bases[0].type.shape
        )
        bias: Value | float = 0.0
        rest = iter(bases)
        for step in match.steps:
            if step.kind in ("mul", "div"):
                bias = getattr(b, step.kind)(bias, step.what) if isinstance(bias, Value) else bias
                continue
            other = b.expand(next(rest), shape=common)
            if step.kind == "add":
                bias = b.add(bias, other) if isinstance(bias, Value) else other
            else:
                if not isinstance(bias, Value):
                    bias = b.full(0.0, shape=common, dtype=kind.dtype, device=kind.device)
                args = (bias, -math.inf) if step.inverted else (-math.inf, bias)
                bias = b.where(other, *args)
        last = (len(common) - 1,)
        top = b.reduce_max(bias, axes=last)
        none = b.eq(top, -math.inf)
        masks = _Masks(none=self._of_rows(none), alike=bool(finite))
        if finite:
            bias = self._rows(none, 0.0, bias)
        if any(s.kind == "add" for s in steps):
            ones = b.cast(b.eq(bias, self._along(top, common)), dtype=kind.dtype)
            share = b.div(common[-1] / match.n, b.reduce_sum(ones, axes=last))
            far = b.and_(b.le(top, HIDDEN), b.not_(none))
            masks.share = self._of_rows(b.where(far, share, 1.0))
        masks.bias = b.expand(bias, shape=kind.shape)
        return masks

    def _base(self, mask: Value) -> Value:
        """A mask before it is expanded to the scores' shape."""
        shape = self.match.scores.type.shape
        found = self.known.made.get(self.known.root(mask))
        if found is not None and found.op.name == "expand" and found.out.type.shape == shape:
            return found.args[0]
        return self._shaped(mask, shape)

    def _along(self, rows: Value, shape: Sequence[int]) -> Value:
        """A number of each row, for each of its elements."""
        return self.b.expand(self.b.reshape(rows, shape=(*rows.type.shape, 1)), shape=tuple(shape))

    def _of_rows(self, x: Value) -> Value:
        """What is known of rows of a mask, for each row of scores."""
        return self.b.expand(x, shape=self.match.scores.type.shape[:-1])


def _replaced(graph: Graph, placed: dict[Value, _Placed]) -> Graph:
    instead = {v: p.instead for v, p in placed.items() if p.instead is not None}
    nodes = []
    for node in graph.nodes:
        found = placed.get(node.out, _Placed())
        these = (*found.nodes, *(() if found.instead else (node,)))
        nodes += (substituted(one, instead) for one in these)
    return with_nodes(graph, nodes, instead)
