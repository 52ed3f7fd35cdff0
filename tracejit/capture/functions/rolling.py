"""Rolling up: a layer of a recurrent network as one `scan` over its steps.

In: what one step computes, emitted once, into the body of the loop. Its derivative is emitted right
behind it; what that reads of the step is kept, row by row, and it becomes the body of a loop that
goes the other way. A weight's gradient is one product after that loop, over the rows of all steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tracejit.autodiff import Entry, Tape, backward, zeros
from tracejit.capture.functions.common import expand
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Builder, Graph, Node, Param, Result, Value
from tracejit.ir.ops.loop import Section, sections
from tracejit.ir.types import Type
from tracejit.passes.dce import live
from tracejit.records import dataclass

State = tuple[Value, ...]
Weight = tuple[Value, Value | None]  # of a linear function, and its bias
Product = Callable[[Value], Value]  # x·weightᵀ + bias
Step = Callable[..., State]  # of the trace, the input's row, the products, the state, other rows
Whole = Callable[[Value, State, Sequence[Weight]], tuple[Value, State]]


@dataclass(frozen=True, slots=True)
class _Backwards:
    """The derivative of a step as a body.

    reads:  what it reads of the step, row by row.
    wholes: and what does not change, as values of the body.
    given:  which of its kept results is the cotangent of the input, and those of the products.
    """

    body: Graph
    reads: tuple[Value, ...]
    wholes: tuple[Value, ...]
    given: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Body:
    """A step as a body: what it keeps, where its results lie, and its derivative, if wanted.

    operands, results: which of the loop's a value of the step is.
    weights: of which product a value is the weight.
    multiplied: by product, what its weight is multiplied with.
    """

    body: Graph
    sections: tuple[Section, ...]
    operands: dict[Value, int]
    results: dict[Value, int]
    weights: dict[Value, int]
    multiplied: tuple[Value, ...]
    backwards: _Backwards | None


def roll(
    t: Trace,
    step: Step,
    unrolled: Whole,
    x: Value,
    state: State,
    weights: Sequence[Weight],
    back: bool,
    others: Sequence[Value] = (),
) -> tuple[Value, State] | None:
    """`step` over the rows of x, as a loop: the states after each step, stacked, and the last one.
    It reads the rows of `others` too, which have no derivative. None where its values are of
    several dtypes. Second derivatives go through `unrolled`."""
    inputs = (x, *state, *(v for pair in weights for v in pair if v is not None))
    wanted = t.grad_on and any(v in t.tape.tracked for v in inputs)
    if len({v.type.dtype for v in (*inputs, *others)}) > 1:
        return None
    body = _emitted(t, step, (x, *others), state, weights, wanted)
    if body is None:
        return None
    steps, count = x.type.shape[0], len(state)
    with t.untaped():
        turned = [(t.b.permute(w, axes=(1, 0)), bias) for w, bias in weights]
        operands = (*state, x, *others, *(v for pair in turned for v in pair if v is not None))
        sliced = 1 + len(others)
        flat = t.b.scan(
            *operands, body=body.body, carried=count, sliced=sliced, steps=steps, reverse=back
        )
        after = 0 if back else 1
        rows = [_rows(t, flat, s, after, steps) for s in body.sections[:count]]
        ends = tuple(
            t.b.reshape(_rows(t, flat, s, 0 if back else steps, 1), shape=s.shape)
            for s in body.sections[:count]
        )
    if not wanted:
        return rows[0], ends

    def derivative(b: Builder, cts: Sequence[Value], need: Sequence[bool]):
        if t.grad_on:
            return _again(t, unrolled, inputs, x, state, weights, cts)
        return _derived(t, body, flat, operands, weights, back, cts, need)

    t.tape.add(Entry(inputs, (rows[0], *ends), derivative, "scan", saved=state))
    return rows[0], ends


def _rows(t: Trace, flat: Value, section: Section, first: int, count: int) -> Value:
    """Some rows of a loop's result."""
    size = math.prod(section.shape)
    low, high = section.start + first * size, section.start + (first + count) * size
    part = t.b.slice(flat, starts=(low,), stops=(high,), steps=(1,))
    return t.b.reshape(part, shape=(count, *section.shape))


# ---- bodies


def _emitted(
    t: Trace, step: Step, xs: State, state: State, weights: Sequence[Weight], wanted: bool
) -> _Body | None:
    """The body of the loop over the rows of `xs`, of which the first is the input."""
    b, tape = Builder(t.b.next_id), Tape()
    b.line = t.b.line
    b.on_emit = lambda node: tape.record(node) if t.grad_on else None
    with t.inside(b, tape):
        now = tuple(b.param(v.type) for v in state)
        row, *others = [b.param(Type(x.type.dtype, x.type.shape[1:], x.type.device)) for x in xs]
        products, stand_ins, of_weights = [], [], {}
        for k, pair in enumerate(weights):
            made = _Product(t, *pair, row.type.shape[0])
            products.append(made)
            stand_ins.append(made.stand_in)
            of_weights[made.weight] = k
        for value in (*now, row, *stand_ins):
            tape.watch(value)
        after = step(t, row, products, now, *others)
        end = len(b.nodes)
        backwards = (
            _reversed(t, b, tape, now, row, stand_ins, after, of_weights) if wanted else None
        )
    if [v.type for v in after] != [v.type for v in state]:
        return None
    operands = {p.value: i for i, p in enumerate(b.params)}
    results = {v: i for i, v in enumerate(after)}
    multiplied = tuple(product.multiplied for product in products)
    for value in (*backwards.reads, *multiplied) if backwards else ():
        if value not in operands:
            results.setdefault(value, len(results))
    kinds = {(v.type.dtype, v.type.device) for v in results}
    if backwards is not None:
        kinds |= {(r.value.type.dtype, r.value.type.device) for r in backwards.body.results}
    if len(kinds) > 1 or len(results) < len(after):
        return None
    body = _graph(b.params, b.nodes[:end], tuple(results))
    places = sections([v.type.shape for v in results], len(state), xs[0].type.shape[0])
    return _Body(body, tuple(places), operands, results, of_weights, multiplied, backwards)


class _Product:
    """x·weightᵀ + bias in a body. `weight` is what the derivative multiplies by, and `stand_in`
    gets the cotangent of the result."""

    def __init__(self, t: Trace, weight: Value, bias: Value | None, rows: int):
        kind = weight.type
        self.t, b = t, t.b
        self.turned = b.param(Type(kind.dtype, kind.shape[::-1], kind.device))
        self.bias = None if bias is None else b.param(bias.type)
        self.weight = b.value(kind)
        self.stand_in = b.value(Type(kind.dtype, (rows, kind.shape[0]), kind.device))

    def __call__(self, x: Value) -> Value:
        t, self.multiplied = self.t, x
        with t.untaped():
            y = t.b.matmul(x, self.turned)
            if self.bias is not None:
                y = t.b.add(y, expand(t, self.bias, y.type.shape))
        return t.derive(
            "linear",
            (x, self.stand_in),
            y,
            lambda b, cts, need: (b.matmul(cts[0], self.weight) if need[0] else None, cts[0]),
        )


def _reversed(
    t: Trace,
    b: Builder,
    tape: Tape,
    now: State,
    row: Value,
    stand_ins: Sequence[Value],
    after: State,
    of_weights: dict[Value, int],
) -> _Backwards:
    """The derivative of a step, which is emitted behind it."""
    start = len(b.nodes)
    carried = tuple(b.value(v.type) for v in after)
    arrived = b.value(after[0].type)  # at the step's output
    wanted = (*now, row, *stand_ins)
    with t.untaped():
        first = b.add(carried[0], arrived)
        roots = list(zip(after, (first, *carried[1:]), strict=True))
        found = backward(
            tape, b, roots, wanted, retain_graph=True, enter=lambda entry, cotangents: None
        )
        cts = [found[v] if v in found else zeros(b, v) for v in wanted]
    results, kept = cts[: len(now)], list(dict.fromkeys(cts[len(now) :]))
    nodes = live(b.nodes[start:], [*results, *kept])
    made = {out for node in nodes for out in node.outs} | {*carried, arrived}
    used = dict.fromkeys(
        v for v in (*(v for node in nodes for v in node.inputs), *results, *kept) if v not in made
    )
    wholes = tuple(v for v in used if v in of_weights)
    reads = tuple(v for v in used if v not in of_weights)
    params = [Param(v) for v in (*carried, arrived, *reads, *wholes)]
    given = tuple(kept.index(v) for v in cts[len(now) :])
    return _Backwards(_graph(params, nodes, (*results, *kept)), reads, wholes, given)


def _graph(params: Sequence[Param], nodes: Sequence[Node], results: Sequence[Value]) -> Graph:
    found = tuple(Result(v) for v in results)
    return Graph("body", tuple(params), tuple(nodes), found, ()).canonical()


# ---- derivatives


def _derived(
    t: Trace,
    body: _Body,
    flat: Value,
    operands: Sequence[Value],
    weights: Sequence[Weight],
    back: bool,
    cts: Sequence[Value],
    need: Sequence[bool],
) -> list[Value | None]:
    """The cotangents of x, of the first state, and of weights and biases, by the reverse loop."""
    backwards, b = body.backwards, t.b
    count, steps = len(cts) - 1, cts[0].type.shape[0]

    def rows_of(value: Value) -> Value:
        """What a value of the step is in all steps."""
        i = body.operands.get(value)
        if i is None:
            k = body.results[value]
            after = k < count and not back
            return _rows(t, flat, body.sections[k], int(after), steps)
        if i < count:
            return _rows(t, flat, body.sections[i], int(back), steps)
        return operands[i]

    reads = [rows_of(v) for v in backwards.reads]
    wholes = [weights[body.weights[v]][0] for v in backwards.wholes]
    results = backwards.body.results
    found = b.scan(
        *cts[1:],
        cts[0],
        *reads,
        *wholes,
        body=backwards.body,
        carried=count,
        sliced=1 + len(reads),
        steps=steps,
        reverse=not back,
    )
    places = sections([r.value.type.shape for r in results], count, steps)
    kept = [_rows(t, found, s, 0, steps) for s in places[count:]]
    first = [
        b.reshape(_rows(t, found, s, steps if back else 0, 1), shape=s.shape)
        for s in places[:count]
    ]
    of_input, *of_products = (kept[k] for k in backwards.given)
    given: list[Value | None] = [of_input, *first]
    wanted = iter(need[1 + count :])
    for k, (_, bias) in enumerate(weights):
        g, xs = (_flattened(b, v) for v in (of_products[k], rows_of(body.multiplied[k])))
        given.append(b.matmul(b.permute(g, axes=(1, 0)), xs) if next(wanted) else None)
        if bias is not None:
            given.append(b.reduce_sum(g, axes=(0,)) if next(wanted) else None)
    return given


def _flattened(b: Builder, x: Value) -> Value:
    """The rows of all steps, one after another."""
    steps, rows, columns = x.type.shape
    return b.reshape(x, shape=(steps * rows, columns))


def _again(
    t: Trace,
    unrolled: Whole,
    inputs: Sequence[Value],
    x: Value,
    state: State,
    weights: Sequence[Weight],
    cts: Sequence[Value],
) -> list[Value | None]:
    """The same cotangents with a history: the steps are taken once more, one by one."""
    before = len(t.tape.entries)
    outputs, ends = unrolled(x, state, weights)
    steps = Tape(t.tape.entries[before:], t.tape.tracked)
    roots = list(zip((outputs, *ends), cts, strict=True))
    found = backward(
        steps, t.b, roots, inputs, retain_graph=True, enter=lambda entry, cotangents: None
    )
    return [found.get(v) for v in inputs]
