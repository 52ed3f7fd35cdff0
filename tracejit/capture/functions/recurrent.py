"""Recurrent networks: the cells of rnn, lstm and gru, and whole sequences of several layers.

The formulas and the order of their operations are those of torch (aten/native/RNN.cpp). Gates are
[rows, k·hidden]: those of the input are one product for all steps of a layer, those of the hidden
state are one product a step. The derivative of a weight is one product over all steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from tracejit.autodiff import Entry
from tracejit.capture.functions.assembly import joined
from tracejit.capture.functions.common import cast, expand, promote_two
from tracejit.capture.functions.contraction import linear
from tracejit.capture.functions.dropout import dropout as drop
from tracejit.capture.functions.movement import select, transpose
from tracejit.capture.functions.packed import Batches, batches, dropped, padded_of, rows_of
from tracejit.capture.functions.rolling import Product, Weight, roll
from tracejit.capture.functions.rows import emitted
from tracejit.capture.functions.unary import FUNCTIONS
from tracejit.capture.trace import location
from tracejit.capture.trace.autocast import casted
from tracejit.capture.trace.table import RULES, rule
from tracejit.capture.trace.tensor import Handle, Ints, TracedTensor, elementwise_strides
from tracejit.capture.trace.trace import Trace
from tracejit.errors import AxisError
from tracejit.ir.graph import Arg, Builder, Value
from tracejit.ir.ops.movement import part
from tracejit.ir.types import b1, contiguous_strides

Tensor = torch.Tensor
State = tuple[Value, ...]  # the hidden state, and of lstm the cell state, [rows, hidden] each
Cell = Callable[[Trace, Value, Value, State], State]  # of the input's gates and the state's

# Of one layer and direction: the weights of input and state, their biases, lstm's projection.
Params = tuple[Tensor | None, ...]

_TOGETHER = 4  # pieces that are joined at once
ROLLED = 2  # steps from which on there is a loop


# ---- the cells


def _applied(t: Trace, name: str, x: Value) -> Value:
    """An element-wise torch function."""
    if x.type.dtype.is_float:
        return emitted(t, RULES[getattr(torch, name)].row, (x,))
    return t.read(FUNCTIONS[name](t, t.fresh(x)).handle)


def _alike(t: Trace, x: Value, y: Value) -> tuple[Value, Value]:
    """Two values in one dtype: under autocast gates are narrower than the state."""
    dtype = promote_two(x.type.dtype, y.type.dtype)
    return cast(t, x, dtype), cast(t, y, dtype)


def _weights(t: Trace, weight: Tensor, bias: Tensor | None) -> tuple[Value, Value | None]:
    """The weight and bias of a linear function, as autocast has them."""
    (weight, bias), _ = casted(t, torch.nn.functional.linear, (weight, bias), {})
    return t.read(t.lift(weight)), _value(t, bias)


def _gates(t: Trace, x: Tensor, weight: Tensor, bias: Tensor | None) -> Value:
    """x·weightᵀ + bias, as autocast has it."""
    given, _ = casted(t, torch.nn.functional.linear, (x, weight, bias), {})
    return t.read(linear(t, *given).handle)


def _simple(name: str) -> Cell:
    """h' = f(input's + h's)."""

    def cell(t: Trace, of_input: Value, of_state: Value, state: State) -> State:
        return (_applied(t, name, t.b.add(of_state, of_input)),)

    return cell


def _lstm(t: Trace, of_input: Value, of_state: Value, state: State) -> State:
    """c' = σ(f)·c + σ(i)·tanh(g), h' = σ(o)·tanh(c'), the gates in the order i, f, g, o."""
    b = t.b
    i, f, g, o = _parts(t, b.add(of_state, of_input), 1, 4)
    i, f, o = (_applied(t, "sigmoid", x) for x in (i, f, o))
    kept = b.mul(*_alike(t, f, state[1]))
    c = b.add(*_alike(t, kept, b.mul(i, _applied(t, "tanh", g))))
    return b.mul(*_alike(t, o, _applied(t, "tanh", c))), c


def _gru(t: Trace, of_input: Value, of_state: Value, state: State) -> State:
    """n = tanh(n_input + σ(r)·n_state), h' = (h - n)·σ(z) + n, the gates in the order r, z, n."""
    b = t.b
    r_input, z_input, n_input = _parts(t, of_input, 1, 3)
    r_state, z_state, n_state = _parts(t, of_state, 1, 3)
    r = _applied(t, "sigmoid", b.add(r_state, r_input))
    z = _applied(t, "sigmoid", b.add(z_state, z_input))
    n = _applied(t, "tanh", b.add(n_input, b.mul(n_state, r)))
    change = b.mul(*_alike(t, b.sub(*_alike(t, state[0], n)), z))
    return (b.add(*_alike(t, change, n)),)


CELLS: dict[str, tuple[Cell, int]] = {  # and how many gates it has
    "rnn_tanh": (_simple("tanh"), 1),
    "rnn_relu": (_simple("relu"), 1),
    "lstm": (_lstm, 4),
    "gru": (_gru, 3),
}


def _parts(t: Trace, x: Value, axis: int, count: int) -> State:
    """Equal parts along an axis; their derivatives, joined, are that of the whole."""
    size = x.type.shape[axis] // count
    with t.untaped():
        parts = tuple(part(t.b, x, axis, k * size, size) for k in range(count))
    if t.grad_on:
        t.tape.add(Entry((x,), parts, lambda b, cts, need: (_joined(t, cts, axis),), "split"))
    return parts


def _unbound(t: Trace, x: Value) -> list[Value]:
    """x[0], x[1], …"""
    return [t.b.reshape(p, shape=x.type.shape[1:]) for p in _parts(t, x, 0, x.type.shape[0])]


def _joined(t: Trace, pieces: Sequence[Value], axis: int) -> Value:
    """Pieces along an axis. Each element of a join looks at every piece: many go in groups."""
    while len(pieces) > _TOGETHER:
        groups = range(0, len(pieces), _TOGETHER)
        pieces = [joined(t, pieces[k : k + _TOGETHER], axis) for k in groups]
    return joined(t, pieces, axis)


def _stacked(t: Trace, xs: Sequence[Value]) -> Value:
    """Values of one shape along a new first axis."""
    return _joined(t, [t.b.reshape(x, shape=(1, *x.type.shape)) for x in xs], 0)


# ---- a sequence


class _Product:
    """x·weightᵀ + bias at each step, with one product of all steps for the weight's derivative.

    Each result depends on a stand-in for weight and bias. All stand-ins come from one entry of the
    tape, before the steps: its formula is emitted when the cotangents of all results are known.
    """

    def __init__(self, t: Trace, weight: Value, bias: Value | None, steps: int, rows: int) -> None:
        self.t, self.weight, self.bias = t, weight, bias
        self.given: dict[int, Value] = {}  # x by step
        kind, outputs = weight.type, (rows, weight.type.shape[0])
        with t.untaped():
            zero = t.b.full(0.0, shape=outputs, dtype=kind.dtype, device=kind.device)
            self.stand_ins = tuple(t.b.alias(zero) for _ in range(steps))
        if t.grad_on:
            inputs = (weight,) if bias is None else (weight, bias)
            t.tape.add(Entry(inputs, self.stand_ins, self._derivative, "linear"))

    def _derivative(self, b, cts, need):
        def as_rows(xs: Sequence[Value]) -> Value:
            whole = _stacked(self.t, xs)
            steps, rows, columns = whole.type.shape
            return b.reshape(whole, shape=(steps * rows, columns))

        g = as_rows(cts)
        xs = [self.given[k] for k in range(len(cts))]
        yield b.matmul(b.permute(g, axes=(1, 0)), as_rows(xs)) if need[0] else None
        if self.bias is not None:
            yield b.reduce_sum(g, axes=(0,)) if need[1] else None

    def __call__(self, step: int, x: Value) -> Value:
        b, weight = self.t.b, self.weight
        if torch._C._is_any_autocast_enabled():
            x = cast(self.t, x, weight.type.dtype)
        self.given[step] = x
        with self.t.untaped():
            y = b.matmul(x, b.permute(weight, axes=(1, 0)))
            if self.bias is not None:
                y = b.add(y, expand(self.t, self.bias, y.type.shape))
        return self.t.derive(
            "linear",
            (x, self.stand_ins[step]),
            y,
            lambda b, cts, need: (b.matmul(cts[0], weight) if need[0] else None, cts[0]),
        )


def _layer(
    t: Trace,
    cell: Cell,
    x: Tensor,
    state: State,
    params: Params,
    back: bool,
    of: Batches | None,
) -> tuple[Value, State]:
    """One layer in one direction over x [steps, rows, features]: its outputs and last state. Of
    packed sequences, a row that a step does not have keeps its state."""
    w_input, w_state, b_input, b_state, w_out = params
    of_input = _gates(t, x, w_input, b_input)
    pairs = (w_state, b_state), *(() if w_out is None else [(w_out, None)])
    weights = [_weights(t, w, bias) for w, bias in pairs]

    def step(
        t: Trace, of_input: Value, products: Sequence[Product], before: State, *marks: Value
    ) -> State:
        state = cell(t, of_input, products[0](before[0]), before)
        for projected in products[1:]:
            state = projected(state[0]), *state[1:]
        for marked in marks:
            state = tuple(
                _marked(t, marked, *_alike(t, *pair)) for pair in zip(state, before, strict=True)
            )
        return state

    marks = () if of is None else (of.marks(t, of_input),)

    def unrolled(of_input: Value, state: State, weights: Sequence[Weight]) -> tuple[Value, State]:
        steps, rows = of_input.type.shape[:2]
        products = [_Product(t, *pair, steps, rows) for pair in weights]
        gates, outputs = _unbound(t, of_input), {}
        marked = [_unbound(t, m) for m in marks]
        for k in reversed(range(steps)) if back else range(steps):
            of_step = [partial(product, k) for product in products]
            state = step(t, gates[k], of_step, state, *(m[k] for m in marked))
            outputs[k] = state[0]
        return _stacked(t, [outputs[k] for k in range(steps)]), state

    rolled = None
    if of_input.type.shape[0] >= ROLLED:
        rolled = roll(t, step, unrolled, of_input, state, weights, back, marks)
    return rolled or unrolled(of_input, state, weights)


def _marked(t: Trace, marks: Value, new: Value, old: Value) -> Value:
    """Rows of one value where their mark is 1, and of another where it is 0."""

    def chosen(b: Builder, x: Arg, y: Arg) -> Value:
        return b.where(b.gt(expand(t, marks, new.type.shape), 0.5), x, y)

    def derivative(b, cts, need):
        (g,) = cts
        yield chosen(b, g, 0.0) if need[0] else None
        yield chosen(b, 0.0, g) if need[1] else None

    with t.untaped():
        out = chosen(t.b, new, old)
    return t.derive("where", (new, old), out, derivative)


def _value(t: Trace, x: Tensor | None) -> Value | None:
    return None if x is None else t.read(t.lift(x))


def _sequence(name: str) -> Callable:
    """The rule of torch.rnn_tanh, rnn_relu, lstm or gru."""
    cell, gates = CELLS[name]

    def states_of(t: Trace, hx: Tensor | Sequence[Tensor]) -> list[Handle]:
        states = [t.lift(x) for x in (hx if name == "lstm" else (hx,))]
        if name == "lstm" and len(states) != 2:
            raise t.shape_error("lstm expects two hidden states")
        return states

    def run(
        t: Trace,
        x: Tensor,
        states: Sequence[Handle],
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        of: Batches | None = None,
    ) -> tuple[Tensor, list[TracedTensor]]:
        """The outputs [steps, rows, features] of x like that, and the last states."""
        directions = 2 if bidirectional else 1
        layers = _by_layer(t, params, has_biases, projected=states[0].shape != states[-1].shape)
        _check(t, t.lift(x).shape, [s.shape for s in states], len(layers), num_layers * directions)
        for layer in layers:
            _check_params(t, layer, gates, states[0].shape[-1], states[-1].shape[-1])
        begins = [
            tuple(_value(t, select(t, s.tensor, 0, k)) for s in states) for k in range(len(layers))
        ]
        ends: list[State] = []
        for first in range(0, len(layers), directions):
            if first and of is not None:
                x = dropped(t, of, x, dropout, train)
            elif first:
                x = drop(t, x, dropout, train)
            outputs = []
            for k in range(first, first + directions):
                found, end = _layer(t, cell, x, begins[k], layers[k], k > first, of)
                outputs.append(found)
                ends.append(end)
            x = t.fresh(joined(t, outputs, 2) if bidirectional else outputs[0])
        return x, [t.fresh(_stacked(t, of_layers)) for of_layers in zip(*ends, strict=True)]

    def sequence(
        t: Trace,
        input: Tensor,
        hx: Tensor | Sequence[Tensor],
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[TracedTensor, ...]:
        states = states_of(t, hx)
        x = transpose(t, input, 0, 1) if batch_first else input
        more = has_biases, num_layers, dropout, train, bidirectional
        x, ends = run(t, x, states, params, *more)
        return transpose(t, x, 0, 1) if batch_first else x, *ends

    def of_packed(
        t: Trace,
        data: Tensor,
        batch_sizes: Tensor,
        hx: Tensor | Sequence[Tensor],
        params: Sequence[Tensor],
        *more: object,
        **named: object,
    ) -> tuple[TracedTensor, ...]:
        states = states_of(t, hx)
        of = batches(t, batch_sizes, states[0].shape[1] if len(states[0].shape) == 3 else None)
        x = t.fresh(padded_of(t, of, data))
        x, ends = run(t, x, states, params, *more, **named, of=of)
        return rows_of(t, of, t.read(t.lift(x)), t.peek(data)), *ends

    def either(t: Trace, *args: object, **kwargs: object) -> tuple[TracedTensor, ...]:
        packed = "batch_sizes" in kwargs or (len(args) > 3 and isinstance(args[3], (tuple, list)))
        return (of_packed if packed else sequence)(t, *args, **kwargs)

    return either


def _by_layer(
    t: Trace, params: Sequence[Tensor], has_biases: bool, *, projected: bool
) -> list[Params]:
    """The parameters of each layer and direction, in the order of `_layer`."""
    size = 2 + 2 * has_biases + projected
    if len(params) % size:
        raise t.shape_error("got an incorrect number of RNN parameters")
    groups = [tuple(params[k : k + size]) for k in range(0, len(params), size)]
    biases = (None, None)
    return [
        (*g[:2], *(g[2:4] if has_biases else biases), g[-1] if projected else None) for g in groups
    ]


def _check(t: Trace, x: Ints, states: Sequence[Ints], given: int, count: int) -> None:
    """Shapes that eager rejects: of the input [steps, rows, features], of the hidden states."""
    if len(x) != 3:
        raise t.unsupported("Give the input 3 dimensions: steps, batch, features")
    if not x[0]:
        raise t.shape_error("Expected sequence length to be larger than 0 in RNN")
    if given != count:
        raise t.shape_error(f"Expected weights of {count} layers and directions, got {given}")
    for shape in states:
        if shape[:-1] != (count, x[1]):
            raise t.shape_error(
                f"Expected hidden states of shape [{count}, {x[1]}, hidden], got {list(shape)}"
            )


def _check_params(t: Trace, params: Params, gates: int, out: int, hidden: int) -> None:
    """Shapes of parameters; how many features the input has is checked where it is used."""
    shapes = [None if p is None else t.lift(p).shape for p in params]
    features = shapes[0][-1] if shapes[0] else 0
    rows = gates * hidden
    expected = ((rows, features), (rows, out), (rows,), (rows,), (out, hidden))
    for shape, right in zip(shapes, expected, strict=True):
        if shape not in (None, right):
            raise t.shape_error(
                f"Expected a parameter of shape {list(right)} ({gates} gates, hidden size "
                f"{hidden}), got {list(shape)}"
            )


def _of_cell(name: str) -> Callable:
    """The rule of torch.rnn_tanh_cell, rnn_relu_cell, lstm_cell or gru_cell."""
    cell, gates = CELLS[name]

    def step(
        t: Trace,
        input: Tensor,
        hx: Tensor | Sequence[Tensor],
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> TracedTensor | tuple[TracedTensor, ...]:
        states = [t.lift(x) for x in (hx if name == "lstm" else (hx,))]
        if name == "lstm" and len(states) != 2:
            raise t.shape_error("lstm_cell expects two hidden states")
        _check_cell(t, t.lift(input).shape, [s.shape for s in states], t.lift(w_hh).shape)
        _check_params(t, (w_ih, w_hh, b_ih, b_hh, None), gates, *states[0].shape[-1:] * 2)
        if t.lift(input).dtype is b1:
            raise t.not_implemented("addmm_impl_cpu_", b1)
        if name in ("lstm", "gru") and not t.lift(input).dtype.is_float:
            raise t.shape_error("result type Float can't be cast to the desired output type Long")
        of_input = _gates(t, input, w_ih, b_ih)
        of_state = _gates(t, states[0].tensor, w_hh, b_hh)
        after = cell(t, of_input, of_state, tuple(t.read(s) for s in states))
        if name == "lstm":
            return tuple(t.fresh(x) for x in after)
        shape, strides = states[0].shape, contiguous_strides(states[0].shape)
        if name == "gru":  # the first operand of its last operations is the state
            strides = elementwise_strides(shape, [(shape, states[0].strides), (shape, strides)])
        return t.fresh(after[0], strides)

    return step


def _check_cell(t: Trace, x: Ints, states: Sequence[Ints], weight: Ints) -> None:
    """Shapes that eager rejects and broadcasting would let pass."""
    if len(x) != 2:
        raise AxisError(where=location.full(), reason=f"a cell's input is a matrix, not {list(x)}")
    for k, shape in enumerate(states):
        if shape != (x[0], weight[-1]):
            raise t.shape_error(
                f"Expected hidden{k} of shape [{x[0]}, {weight[-1]}] (rows of the input, hidden "
                f"size), got {list(shape)}"
            )


for _name in CELLS:
    rule(getattr(torch, _name))(_sequence(_name))
    rule(getattr(torch, f"{_name}_cell"))(_of_cell(_name))
