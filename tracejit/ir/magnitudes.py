"""How rounding errors grow through a graph, to first order: what the bound of equality allows.

In: a graph and its inputs. Out: for every value what it is with all its terms taken by absolute
value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tracejit.ir.graph import Arg, Graph, Value
from tracejit.ir.interp import runnable
from tracejit.ir.ops import OPS
from tracejit.ir.ops.attention import GRADIENTS, scores_of
from tracejit.ir.types import round_to

_ROUNDING = 2.0**-19  # of a float32 value, beside its magnitude

_SLOPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "exp": lambda x, y: np.abs(y),
    "log": lambda x, y: 1.0 / np.abs(x),
    "expm1": lambda x, y: np.abs(y + 1.0),
    "log1p": lambda x, y: 1.0 / np.abs(x + 1.0),
    "erf": lambda x, y: np.exp(-x * x) * 1.13,
    "sqrt": lambda x, y: 0.5 / y,
    "tanh": lambda x, y: 1.0 - y * y,
    "sin": lambda x, y: np.abs(np.cos(x)),
    "cos": lambda x, y: np.abs(np.sin(x)),
}


def magnitudes(
    graph: Graph, inputs: Sequence, *, first_order: bool = False
) -> dict[Value, np.ndarray]:
    """For every value, what it is when all its terms are taken by absolute value.

    Sums add magnitudes, products multiply them, and a function f(x) counts |f(x)| + |f'(x)|·m(x):
    the first-order bound of how rounding errors grow, up to the factor eps. An infinity is exact:
    what is masked with one adds nothing. Products of products may overflow in a deep network. By
    `first_order` that of x and y counts |x|·m(y) + |y|·m(x), which grows less.
    """
    return _grown(graph, inputs, [_of_finite(x, np.abs(x)) for x in inputs], first_order)[1]


def _grown(
    graph: Graph, inputs: Sequence, sizes_of_inputs: Sequence, first_order: bool
) -> tuple[dict[Value, object], dict[Value, np.ndarray]]:
    """Every value, and its magnitude."""
    params = [p.value for p in graph.params]
    values: dict[Value, object] = dict(zip(params, inputs, strict=True))
    sizes: dict[Value, np.ndarray] = dict(zip(params, sizes_of_inputs, strict=True))

    def value(a: Arg) -> object:
        return values[a] if isinstance(a, Value) else a

    def size(a: Arg) -> object:
        return sizes[a] if isinstance(a, Value) else _of_finite(a, abs(a))

    with np.errstate(all="ignore"):
        for node in graph.nodes:
            args = [value(a) for a in node.args]
            out = node.op.eval(*args, **runnable(dict(node.attrs)))
            out = out if node.out.type.is_host else round_to(out, node.out.type.dtype)
            values[node.out] = out
            if node.out.type.is_host or not node.out.type.dtype.is_float:
                sizes[node.out] = np.abs(np.asarray(out, np.float64))
                continue
            sized = [size(a) for a in node.args]
            if node.op.family == "loop":
                found = _size_of_loop(node, args, sized, first_order)
            elif first_order and node.op.name in ("mul", "matmul"):
                (x, y), (m, n) = map(np.abs, args), sized
                found = node.op.eval(x, n) + node.op.eval(m, y)
            elif first_order and node.op.name in ("recurrence", "accumulate"):
                found = _first_order_of_running(node, args, sized, out)
            else:
                found = _size(node.op.name, node, args, sized, out)
            sizes[node.out] = _of_finite(out, found)
    return values, sizes


def _of_finite(x: object, size: np.ndarray) -> np.ndarray:
    """The magnitudes of what is finite; 0 of infinities."""
    return np.where(np.isinf(x), 0.0, size)


def _size_of_loop(node, args: list, m: list, first_order: bool) -> np.ndarray:
    """The loop over values and magnitudes in pairs."""
    graph = node.attr("body")

    def body(pairs: list[np.ndarray]) -> list[np.ndarray]:
        inputs, given = ([x[..., k] for x in pairs] for k in (0, 1))
        values, sizes = _grown(graph, inputs, given, first_order)
        return [np.stack([values[r.value], sizes[r.value]], -1) for r in graph.results]

    pairs = [np.stack(pair, -1) for pair in zip(args, m, strict=True)]
    return node.op.eval(*pairs, **dict(node.attrs) | {"body": body}).reshape(-1, 2)[:, 1]


def _size(name: str, node, args: list, m: list, out: np.ndarray) -> np.ndarray:
    if name in ("add", "sub"):
        return np.asarray(m[0] + m[1], np.float64)
    if name == "mul":
        return np.asarray(m[0] * np.asarray(m[1], np.float64))
    if name == "div":
        return m[0] / np.abs(args[1]) + np.abs(out) * m[1] / np.abs(args[1])
    if name in ("maximum", "minimum"):
        return np.maximum(_near(args[0], m[0], out), _near(args[1], m[1], out))
    if name in ("reduce_max", "reduce_min"):
        axes = dict(node.attrs)["axes"]
        return np.max(_near(args[0], m[0], np.expand_dims(out, axes)), axis=axes)
    if name == "pow":
        slope = np.abs(args[1] * out / args[0])
        return np.abs(out) + np.where(np.isfinite(slope), slope, 0.0) * m[0]
    if name in _SLOPES:
        return np.abs(out) + np.abs(_SLOPES[name](args[0], out)) * m[0]
    if name == "where":
        return np.where(args[0], m[1], m[2])
    if name == "cast":
        return np.asarray(m[0], np.float64)
    if name in ("neg", "abs", "alias", "after"):
        return m[0]
    if node.op.family == "elementwise" or name in ("full", "iota"):
        return np.abs(np.asarray(out, np.float64))
    if name in ("gather", "scatter"):  # which take places
        return node.op.eval(m[0], args[1], *m[2:], **dict(node.attrs))
    if name == "accumulate" and node.attr("combine") != "mul":
        return _running_size(args[0], m[0], out, **dict(node.attrs))
    if node.op.family == "matrices":
        return _matrix_size(out, m)
    if node.op.family == "attention":
        return _attention_size(name, args, m, **dict(node.attrs))
    return node.op.eval(*m, **dict(node.attrs))


def _first_order_of_running(node, args: list, m: list, out: np.ndarray) -> np.ndarray:
    """Of what multiplies along an axis: each step's magnitude, and what came before it."""
    product = node.op.name == "accumulate"
    if product and node.attr("combine") != "mul":
        return _size(node.op.name, node, args, m, out)
    axis = node.attr("axis")
    before = np.roll(np.abs(out), 1, axis)
    before[(slice(None),) * axis + (slice(0, 1),)] = float(product)
    term = m[0] * before if product else m[1] + m[0] * before
    return OPS["recurrence"].eval(np.abs(args[0]), term, axis=axis)


def _running_size(x: np.ndarray, m: np.ndarray, out: np.ndarray, axis: int, combine: str):
    """Of running extrema the magnitude of what is chosen; of running log-sums their own, and those
    of the elements by their weights."""
    if combine == "logaddexp":
        with np.errstate(all="ignore"):
            sums = np.logaddexp.accumulate(x.astype(np.float64) + np.log(m), axis)
            found = np.exp(sums - out.astype(np.float64))
        return np.abs(out) + np.where(np.isfinite(found), found, 0.0)
    places = np.arange(x.shape[axis]).reshape([-1 if k == axis else 1 for k in range(x.ndim)])
    chosen = np.maximum.accumulate(np.where(x == out, places, 0), axis)
    return np.take_along_axis(m, chosen, axis)


def _matrix_size(out: np.ndarray, m: list) -> np.ndarray:
    """Of decompositions or solutions: each element may have an error of the largest number among
    operands and results, as often as there are rows."""
    largest = np.max(np.abs(out)) + sum(float(np.max(x)) for x in m)
    return np.full(out.shape, largest * m[-1].shape[-2], np.float64)


def _near(x: np.ndarray, size: np.ndarray, extremum: np.ndarray) -> np.ndarray:
    """The magnitudes of what may be the extremum, by rounding; 0 of the rest."""
    near = np.abs(x - extremum) <= _ROUNDING * size
    return np.where(near | (x == extremum), size, 0)


def _attention_size(name: str, args: list, m: list, *, causal: bool, scale: float) -> np.ndarray:
    """As of the written-out formula: an error of a score is a relative one of its weight."""
    q, k, bias = args[0], args[1], args[2 if name == "attention_lse" else 3]
    scores = scores_of(q, k, bias, causal, scale)
    known = name in GRADIENTS
    lse = args[4] if known else OPS["attention_lse"].eval(q, k, bias, causal=causal, scale=scale)
    far = np.abs(np.where(np.isfinite(bias), bias, 0.0)) + abs(scale) * (
        m[0] @ m[1].swapaxes(-1, -2)
    )
    weights = np.exp(scores - lse[..., None]) * (1 + far)
    if name == "attention_lse":
        return np.abs(lse) + np.sum(weights, axis=-1)
    if not known:
        return weights @ m[2]
    if name == "attention_dv":
        return weights.swapaxes(-1, -2) @ m[6]
    slopes = weights * (m[6] @ m[2].swapaxes(-1, -2) + m[5][..., None]) * abs(scale)
    return slopes @ m[1] if name == "attention_dq" else slopes.swapaxes(-1, -2) @ m[0]
