"""What attention that is written out looks like: its nodes, forward and backward.

In: a graph in normal form, and a softmax in it. Out: a `Match`, which names the operands and says
what is done to the scores, and which nodes compute results; or Unknown is raised. It is no match
where scores or weights have another reader: they are returned, or a mask has a gradient. Casts
between scores, weights and products are seen through.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tracejit.ir.graph import Arg, Builder, Graph, Node, Value, next_id
from tracejit.ir.interp import evaluate
from tracejit.ir.ops.attention import fits
from tracejit.ir.types import b1, f16
from tracejit.passes.cone import cone
from tracejit.passes.readers import Readers, Unknown
from tracejit.records import dataclass

HIDDEN = -9.9e8  # scores that are set to this, or less, weigh nothing beside others
_LOWEST_F16 = -65504.0  # and among those of f16
KNOWN = 1 << 22  # elements of a constant mask that is looked at


class Known(Readers):
    """What is known of a graph, and what is emitted beside it."""

    def __init__(self, graph: Graph):
        super().__init__(graph, casts=True)
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
class Dropout:
    """Weights are multiplied by noise: by a number where a mask is true, by 0 elsewhere."""

    node: Node
    noise: Value


@dataclass(frozen=True, slots=True)
class Step:
    """What is done to scores: "mul" by a number, "add" of a bias, or "hide" where `what` is true
    (or false, if `inverted`), with `number` as the score. `hard`: a bias of 0 and -inf only."""

    kind: str
    what: Arg
    number: float = 0.0
    inverted: bool = False
    hard: bool = False


class Match:
    """The nodes of one attention.

    inner: values that no other nodes may read.
    """

    def __init__(self, known: Known, softmax: Node):
        self.known, self.weights = known, softmax.out
        self.inner: list[Value] = []
        self.nodes: set[Value] = set()
        self.finite: set[str] = set()  # reductions that are, also of rows that see no key
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
        if len(self.finite) == 1:
            raise Unknown
        self.steps: list[Step] = []  # from the product on
        self.product = self._product(self.scores)
        q, k = self.product.args
        kind, batch = self.scores.type, self.scores.type.shape[:-2]
        if len(kind.shape) < 2:
            raise Unknown
        m, n = kind.shape[-2:]
        if self.product.out.type.shape[-2:] != (m, n) or not q.type.dtype.is_float:
            raise Unknown
        self.q, self.turned_k, self.dtype = q, k, q.type.dtype
        self.dropout, self.read = self._dropout(), self.weights  # what v is multiplied with
        if self.dropout is not None:
            self.read = self.dropout.node.out
            self._inside(self.dropout.node)
        read = self.known.readers.get(self.known.root(self.read), ())
        outs = [n for n, at, axes in read if n.op.name == "matmul" and at == 0 and not axes]
        if len(outs) != 1:
            raise Unknown
        (self.out,) = outs
        self.nodes.add(self.out.out)
        self.v = self.out.args[1]
        if self.out.args[0].type.shape[-2:] != (m, n):
            raise Unknown
        self.batch, self.m, self.n = batch, m, n
        self.c, self.d = q.type.shape[-1], self.v.type.shape[-1]
        if not fits(kind.device, self.dtype, max(self.c, self.d)):
            raise Unknown
        if any(x.type.dtype is not self.dtype for x in (k, self.v, self.out.out)):
            raise Unknown

    def _dropout(self) -> Dropout | None:
        """What is done to the weights before they weigh values."""
        known = self.known
        for node, at, axes in known.readers.get(known.root(self.weights), ()):
            if node.op.name != "mul" or axes or not isinstance(node.args[1 - at], Value):
                continue
            noise = node.args[1 - at]
            scaled = known.made.get(known.root(noise))
            if scaled is None or scaled.op.name not in ("mul", "div"):
                continue
            mask, number = scaled.args
            made = known.made.get(known.root(mask)) if isinstance(mask, Value) else None
            if made is None or made.op.name != "cast" or not _is_number(number):
                continue
            if made.args[0].type.dtype is b1:
                return Dropout(node, noise)
        return None

    def _spread(self, value: Arg, name: str) -> Node:
        """The reduction of rows that is expanded to a value."""
        node = self.known.producer(value, "expand")
        if node.args[0].type.shape != (*value.type.shape[:-1], 1) or node.out != value:
            raise Unknown
        self._inside(node)
        node = self._kept_finite(self.known.producer(node.args[0], name, "where"), name)
        shape = value.type.shape
        if node.attr("axes") != (len(shape) - 1,) or node.args[0].type.shape != shape:
            raise Unknown
        return node

    def _kept_finite(self, node: Node, name: str) -> Node:
        """A reduction, which something finite may stand for where a row sees no key."""
        if node.op.name != "where":
            return node
        none, number, of = node.args
        empty = self.known.producer(none, "eq")
        instead = (-math.inf, 0.0) if name == "reduce_max" else (0.0, 1.0)
        if not self.known.same(empty.args[0], of) or (empty.args[1], number) != instead:
            raise Unknown
        self._inside(node, empty)
        self.finite.add(name)
        return self.known.producer(of, name)

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
            self.steps.append(Step(node.op.name, number))
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
                    self.steps.append(Step("add", bias, hard=self._is_hard(bias)))
                    return product
        if node.op.name == "where":
            hidden, x, number = node.args
            inverted = not isinstance(x, Value)
            if inverted:
                x, number = number, x
            if isinstance(number, Value) or not isinstance(x, Value):
                raise Unknown
            if number > HIDDEN and not (x.type.dtype is f16 and number == _LOWEST_F16):
                raise Unknown
            product = self._product(x)
            self.steps.append(Step("hide", hidden, float(number), not inverted))
            return product
        raise Unknown

    def _is_hard(self, bias: Value) -> bool:
        """Whether a bias is 0 where a mask says so, and -inf elsewhere."""
        made = self.known.made.get(self.known.root(bias))
        if made is not None and made.op.name == "expand":
            made = self.known.made.get(self.known.root(made.args[0]))
        if made is None or made.op.name != "where":
            return False
        numbers = [self._literal(x) for x in made.args[1:]]
        return None not in numbers and {*numbers} == {0.0, -math.inf}

    def _literal(self, arg: Arg) -> float | None:
        """The number that a value is everywhere."""
        made = self.known.made.get(self.known.root(arg)) if isinstance(arg, Value) else None
        if made is not None and made.op.name == "expand":
            return self._literal(made.args[0])
        if made is not None and made.op.name == "full":
            arg = made.args[0]
        return None if isinstance(arg, Value) else float(arg)

    # -- backward

    def _backward(self) -> None:
        """The gradients that there are."""
        products = []
        readers = [*self.known.readers[self.known.root(self.weights)]]
        if self.dropout is not None:
            readers += self.known.readers[self.known.root(self.read)]
        for node, at, axes in readers:
            if node is self.out or (self.dropout is not None and node is self.dropout.node):
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
        if value.type.dtype is not self.dtype:
            raise Unknown
        self.g = self.g or value

    def _slopes(self, products: Sequence[Node]) -> Value:
        """The cotangent of the scores, w·dw - w·sum(w·dw), of products of the weights w."""
        known = self.known
        for node in products:
            x, y = node.args
            slope = y if known.same(x, self.weights) else x
            made = known.made.get(known.root(slope)) if isinstance(slope, Value) else None
            undone = None
            if self.dropout is not None and made is not None and made.op.name == "mul":
                undone, (x, y) = made, made.args
                noisy = [v for v, n in ((x, y), (y, x)) if known.same(n, self.dropout.noise)]
                made = known.made.get(known.root(noisy[0])) if noisy else None
            if self.dropout is not None and undone is None:
                continue
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
            if undone is not None:
                self._inside(undone)
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
            if node.out.type.dtype is not self.dtype:
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
