"""Attention that is written out: products, a softmax of their rows, and products of these.

In: a graph in normal form. Out: the same graph where a softmax of scores, and what is computed of
its weights, became primitives of attention, which keep no scores (`ir/ops/attention.py`); also in
the backward pass, whose formulas are those of the primitives that stood here
(`written_attention.py` finds them). Rounding differs, as between eager's own implementations of
attention: of half types, the primitives round results only.

A row that sees no key is NaN in eager, and makes its gradients NaN; or it weighs all keys alike, if
scores are set to a finite number instead of -inf. Both are kept, by what the masks say of rows.

What dropout multiplies weights by is the noise of the primitives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import field

import numpy as np

from tracejit.ir.graph import Builder, Graph, Node, Value
from tracejit.ir.ops.attention import row_products, wide
from tracejit.ir.ops.movement import transpose
from tracejit.ir.types import DType, f32
from tracejit.passes.dce import dce
from tracejit.passes.readers import Unknown
from tracejit.passes.rewrite import substituted, with_nodes
from tracejit.passes.simplify import simplify
from tracejit.passes.written_attention import HIDDEN, Known, Match, Step
from tracejit.records import dataclass

LARGE = 1 << 21  # scores, of all heads: fewer are faster to keep than to compute once more


def find_attention(graph: Graph) -> Graph:
    """Make primitives of attention that is written out."""
    softmaxes = _softmaxes(graph)
    if not softmaxes:
        return graph
    known = Known(graph)
    placed: dict[Value, _Placed] = {}
    for softmax in softmaxes:
        try:
            match = Match(known, softmax)
            if match.scores.type.numel >= LARGE:
                placed |= _Emission(known, match).run()
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


# ---- what stands instead


@dataclass(slots=True)
class _Masks:
    """What steps add to scores: a bias, and which rows see no key (None: all rows see one).

    alike: such rows weigh all keys alike; else they are NaN, and so are gradients of scores if
    something is added.
    added: whether something is.
    share: if other numbers than -inf are added, of each key in a row to whose scores so small a
    number is added that nothing else is left of them; else 1. The log-sum of such a row is that
    number.
    """

    bias: Value | float = 0.0
    causal: bool = False
    none: Value | None = None
    alike: bool = False
    added: bool = False
    share: Value | None = None


@dataclass(slots=True)
class _Placed:
    """Nodes that come before one of the graph, and what stands for its result."""

    nodes: list[Node] = field(default_factory=list)
    instead: Value | None = None


class _Emission:
    """The nodes that stand for a match, by the nodes that they come before."""

    def __init__(self, known: Known, match: Match):
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
        if hosts and match.dtype.narrow:  # they are rounded in other places
            raise Unknown
        q = self._times(q, hosts)
        masks = self._masks()
        if masks.alike:
            q = self._rows(masks.none, 0.0, q)
        k = self._turned(match.turned_k, (*match.batch, match.c, match.n))
        v = self._shaped(match.v, (*keys, match.d))
        how = {"causal": masks.causal, "scale": scale}
        lost = None if masks.alike else masks.none
        attend = _Attend(b, (q, k, v), masks.bias, self._noise(), how)
        self._instead(match.out, self._rows(lost, math.nan, attend.result()))
        gradients = [n for n in (match.dv, match.dq, match.turned_dk) if n is not None]
        if gradients:
            gradients.sort(key=lambda n: n.out.id)  # as they stand in the graph
            attend.keep()
            self._at(gradients[0])
            g = self._shaped(match.g, with_d)
            attend.come(g, masks.share)
            every = None if lost is None else self._any(lost)
        for node in gradients:
            self._at(node)
            if node is match.dv:
                x = self._rows(every, math.nan, attend.gradient("attention_dv"))
            elif node is match.dq:
                x = self._times(attend.gradient("attention_dq"), hosts)
                x = self._rows(masks.none, 0.0, x) if masks.alike else x
                x = self._rows(lost, math.nan, x) if masks.added else x
            else:
                x = attend.gradient("attention_dk")
                x = self._rows(every, math.nan, x) if masks.added else x
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

    def _times(self, x: Value, hosts: Sequence[Step]) -> Value:
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

    def _noise(self) -> tuple[Value, ...]:
        """What dropout multiplies weights by."""
        match = self.match
        if match.dropout is None:
            return ()
        noise = self._shaped(match.dropout.noise, match.scores.type.shape)
        return (_cast(self.b, noise, wide(match.dtype)),)

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
        soft = any(s.kind == "add" and not s.hard for s in steps)
        if match.finite and finite:
            raise Unknown
        kind, dtype = match.scores.type, wide(match.dtype)
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
                other = _cast(b, other, dtype)
                bias = b.add(bias, other) if isinstance(bias, Value) else other
            else:
                if not isinstance(bias, Value):
                    bias = b.full(0.0, shape=common, dtype=dtype, device=kind.device)
                args = (bias, -math.inf) if step.inverted else (-math.inf, bias)
                bias = b.where(other, *args)
        last = (len(common) - 1,)
        top = b.reduce_max(bias, axes=last)
        none = b.eq(top, -math.inf)
        masks = _Masks(none=self._of_rows(none), alike=bool(finite))
        if finite:
            bias = self._rows(none, 0.0, bias)
        masks.added = any(s.kind == "add" for s in steps)
        if soft:
            ones = b.cast(b.eq(bias, self._along(top, common)), dtype=dtype)
            share = b.div(common[-1] / match.n, b.reduce_sum(ones, axes=last))
            far = b.and_(b.le(top, HIDDEN), b.not_(none))
            masks.share = self._of_rows(b.where(far, share, 1.0))
        masks.bias = b.expand(bias, shape=kind.shape)
        if match.finite:  # such rows are 0, as those of the primitives
            masks.none = None
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


class _Attend:
    """The primitives of one attention; its noise is that of dropout, if there is any."""

    def __init__(
        self,
        b: Builder,
        operands: tuple[Value, Value, Value],
        bias: Value | float,
        noise: tuple[Value, ...],
        how: dict[str, object],
    ):
        self.b, self.operands, self.bias, self.noise, self.how = b, operands, bias, noise, how

    def result(self) -> Value:
        """The result, before what masks make of rows."""
        self.out = self.b.attention(*self.operands, self.bias, *self.noise, **self.how)
        return self.out

    def keep(self) -> None:
        """Compute what the gradients need of the forward pass."""
        q, k, _ = self.operands
        self.lse = self.b.attention_lse(q, k, self.bias, **self.how)

    def come(self, g: Value, share: Value | None) -> None:
        """The cotangent of the result is there. `share` is what weights are multiplied by that
        the log-sums give, if they do not say all of each row."""
        b = self.b
        if share is not None:
            wider = b.expand(b.reshape(share, shape=(*share.type.shape, 1)), shape=g.type.shape)
            g = _cast(b, b.mul(_cast(b, g, wider.type.dtype), wider), g.type.dtype)
        delta = row_products(b, g, self.out)
        self.given = *self.operands, self.bias, self.lse, delta, g, *self.noise

    def gradient(self, name: str) -> Value:
        """That of an operand: "attention_dq", …."""
        return getattr(self.b, name)(*self.given, **self.how)


def _cast(b: Builder, x: Value, dtype: DType) -> Value:
    return x if x.type.dtype is dtype else b.cast(x, dtype=dtype)


def _replaced(graph: Graph, placed: dict[Value, _Placed]) -> Graph:
    instead = {v: p.instead for v, p in placed.items() if p.instead is not None}
    nodes = []
    for node in graph.nodes:
        found = placed.get(node.out, _Placed())
        these = (*found.nodes, *(() if found.instead else (node,)))
        nodes += (substituted(one, instead) for one in these)
    return with_nodes(graph, nodes, instead)
