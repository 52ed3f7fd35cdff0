"""Element-wise functions of one tensor: one row each, with torch's own derivative where needed."""

from __future__ import annotations

import math

import torch

from tracejit.autodiff import zeros
from tracejit.capture.functions.arithmetic import power
from tracejit.capture.functions.common import register
from tracejit.capture.functions.rows import elementwise, emitted, primitive
from tracejit.capture.trace.table import Formula, Row, rule
from tracejit.capture.trace.tensor import TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.errors import InvalidGraph
from tracejit.ir.graph import Value
from tracejit.ir.types import b1


def is_infinite(t: Trace, x: Value) -> Value:
    """No integer is."""
    if not x.type.dtype.is_float:
        return t.b.ne(x, x)
    return t.b.eq(t.b.abs(x), math.inf)


def _is_finite(t: Trace, x: Value) -> Value:
    if not x.type.dtype.is_float:
        return t.b.eq(x, x)
    return t.b.lt(t.b.abs(x), math.inf)  # no comparison with NaN is true


def rounding(name: str) -> Formula:
    """Integers are whole numbers already."""

    def value(t: Trace, x: Value) -> Value:
        if x.type.dtype is b1:
            raise InvalidGraph(reason=f"{name} is not defined on b1")
        return getattr(t.b, name if x.type.dtype.is_float else "alias")(x)

    return value


def _relu(t: Trace, x: Value) -> Value:
    if x.type.dtype is b1:
        raise InvalidGraph(reason="relu is not defined on b1")
    return t.b.maximum(x, 0.0 if x.type.dtype.is_float else 0)


def _d_relu(t: Trace, g: Value, y: Value, x: Value) -> Value:
    return _threshold_backward(t, g, y)


def _threshold_backward(t: Trace, g: Value, y: Value) -> Value:
    """g where y > 0. As in torch it depends on y too, with derivative zero."""
    with t.untaped():
        out = t.b.where(t.b.le(y, 0.0), 0.0, g)
    return t.derive(
        "threshold_backward",
        (g, y),
        out,
        lambda b, cts, need: (
            _threshold_backward(t, cts[0], y),
            zeros(b, y) if need[1] else None,
        ),
    )


def _sigmoid(t: Trace, x: Value) -> Value:
    return t.b.div(1.0, t.b.add(t.b.exp(t.b.neg(x)), 1.0))


def _d_sigmoid(t: Trace, g: Value, y: Value, x: Value) -> Value:
    """g·y·(1 - y), which is finite far out."""
    return t.b.mul(g, t.b.mul(t.b.sub(1.0, y), y))


def _d_rsqrt(t: Trace, g: Value, y: Value, x: Value) -> Value:
    return t.b.mul(g, t.b.mul(t.b.mul(y, t.b.mul(y, y)), -0.5))


def _d_erf(t: Trace, g: Value, y: Value, x: Value) -> Value:
    b = t.b
    return b.mul(b.mul(b.exp(b.neg(b.mul(x, x))), 2 / math.sqrt(math.pi)), g)


def _sinc(t: Trace, x: Value) -> Value:
    """sin(πx) / πx, 1 at 0."""
    b, angle = t.b, t.b.mul(x, math.pi)
    return b.where(b.eq(x, 0.0), 1.0, b.div(b.sin(angle), angle))


def _d_sinc(t: Trace, g: Value, y: Value, x: Value) -> Value:
    """g·(πx·cos(πx) - sin(πx)) / πx², 0 at 0."""
    b, angle = t.b, t.b.mul(x, math.pi)
    square = b.mul(angle, x)
    rise = b.sub(b.mul(b.cos(angle), angle), b.sin(angle))
    return b.where(b.eq(square, 0.0), 0.0, b.mul(g, b.div(rise, square)))


def _logarithm(name: str, base: float) -> Row:
    """log(x) / log(base), with the derivative g / (x·log(base))."""
    scale = math.log(base)
    return Row(
        name,
        lambda t, x: t.b.div(t.b.log(x), scale),
        (lambda t, g, y, x: t.b.div(g, t.b.mul(x, scale)),),
        dtypes="to_float",
    )


SIGMOID = Row("sigmoid expit", _sigmoid, (_d_sigmoid,), dtypes="to_float", wide=False)
ROWS = (
    Row("neg negative __neg__", primitive("neg")),
    Row("abs absolute __abs__", primitive("abs")),
    Row("sign", primitive("sign")),
    Row("floor", rounding("floor")),
    Row("trunc fix", rounding("trunc")),
    Row("exp", primitive("exp"), dtypes="to_float"),
    Row("log", primitive("log"), dtypes="to_float"),
    Row("sqrt", primitive("sqrt"), dtypes="to_float"),
    Row("sin", primitive("sin"), dtypes="to_float"),
    Row("cos", primitive("cos"), dtypes="to_float"),
    Row("tanh", primitive("tanh"), dtypes="to_float"),
    SIGMOID,
    Row(
        "rsqrt",
        lambda t, x: t.b.div(1.0, t.b.sqrt(x)),
        (_d_rsqrt,),
        dtypes="to_float",
        wide=False,
    ),
    Row("relu", _relu, (_d_relu,), wide=False),
    Row("isnan", lambda t, x: t.b.ne(x, x)),
    Row("isinf", is_infinite),
    Row("isfinite", _is_finite),
    Row("erf", primitive("erf"), (_d_erf,), dtypes="to_float"),
    Row(
        "expm1",
        primitive("expm1"),
        (lambda t, g, y, x: t.b.mul(g, t.b.add(y, 1.0)),),
        dtypes="to_float",
    ),
    Row(
        "log1p",
        primitive("log1p"),
        (lambda t, g, y, x: t.b.div(g, t.b.add(x, 1.0)),),
        dtypes="to_float",
    ),
    _logarithm("log2", 2.0),
    _logarithm("log10", 10.0),
    Row("sinc", _sinc, (_d_sinc,), dtypes="to_float", wide=False),
    Row(
        "exp2",
        lambda t, x: t.b.pow(2.0, x),
        (lambda t, g, y, x: t.b.mul(t.b.mul(g, y), math.log(2.0)),),
        dtypes="to_float",
    ),
)
FUNCTIONS = {row.name: elementwise(row, __name__) for row in ROWS}


def sigmoid(t: Trace, x: Value) -> Value:
    """1 / (1 + exp(-x)) of a value, in another formula."""
    return emitted(t, SIGMOID, (x,))


def square(t: Trace, input: torch.Tensor) -> TracedTensor:
    return power(t, input, 2)


register(("square",), square)


@rule(torch.positive, torch.Tensor.positive, torch.Tensor.__pos__)
def positive(t: Trace, input: torch.Tensor) -> torch.Tensor:
    if t.lift(input).dtype is b1:
        raise t.shape_error("the `+` operator, on a bool tensor is not supported")
    return input
