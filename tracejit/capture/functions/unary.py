"""Element-wise functions of one tensor: one row each, with torch's own derivative where needed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tracejit.autodiff import zeros
from tracejit.capture.functions.arithmetic import power
from tracejit.capture.functions.common import as_float, pointwise, register, write_back
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.errors import InvalidGraph
from tracejit.ir.graph import Builder, Value
from tracejit.ir.types import b1

Emit = Callable[[Builder, Value], Value]
Derivative = Callable[[Builder, Value, Value, Value], Value]  # (b, g, y, x)


def _sigmoid(b: Builder, x: Value) -> Value:
    return b.div(1.0, b.add(b.exp(b.neg(x)), 1.0))


def _d_sigmoid(b: Builder, g: Value, y: Value, x: Value) -> Value:
    return b.mul(g, b.mul(b.sub(1.0, y), y))


def _rsqrt(b: Builder, x: Value) -> Value:
    return b.div(1.0, b.sqrt(x))


def _d_rsqrt(b: Builder, g: Value, y: Value, x: Value) -> Value:
    return b.mul(g, b.mul(b.mul(y, b.mul(y, y)), -0.5))


def _isnan(b: Builder, x: Value) -> Value:
    return b.ne(x, x)


def _by_name(name: str) -> Emit:
    return lambda b, x: getattr(b, name)(x)


def _rounding(name: str) -> Emit:
    def emit(b: Builder, x: Value) -> Value:
        if x.type.dtype is b1:
            raise InvalidGraph(reason=f"{name} is not defined on b1")
        return getattr(b, name if x.type.dtype.is_float else "alias")(x)

    return emit


# name: (emit, derivative or None for the primitives' own, whether integers become floats)
UNARY: dict[str, tuple[Emit, Derivative | None, bool]] = {
    "neg": (_by_name("neg"), None, False),
    "negative": (_by_name("neg"), None, False),
    "abs": (_by_name("abs"), None, False),
    "absolute": (_by_name("abs"), None, False),
    "sign": (_by_name("sign"), None, False),
    "floor": (_rounding("floor"), None, False),
    "trunc": (_rounding("trunc"), None, False),
    "exp": (_by_name("exp"), None, True),
    "log": (_by_name("log"), None, True),
    "sqrt": (_by_name("sqrt"), None, True),
    "sin": (_by_name("sin"), None, True),
    "cos": (_by_name("cos"), None, True),
    "tanh": (_by_name("tanh"), None, True),
    "sigmoid": (_sigmoid, _d_sigmoid, True),
    "rsqrt": (_rsqrt, _d_rsqrt, True),
    "isnan": (_isnan, None, False),
}


def _make(name: str, emit: Emit, derivative: Derivative | None, to_float: bool):
    def function(t: Trace, input: torch.Tensor) -> TracedTensor:
        def step(x: Value) -> Value:
            if derivative is None:
                return emit(t.b, x)
            with t.untaped():
                y = emit(t.b, x)
            return t.derive(name, (x,), y, lambda b, cts, need: (derivative(b, cts[0], y, x),))

        return pointwise(t, step, (input,), to=as_float if to_float else lambda dtype: dtype)

    return function


def _relu_function(t: Trace, input: torch.Tensor) -> TracedTensor:
    """relu; its gradient depends on the result as well, with derivative zero, as in torch."""

    def threshold(b: Builder, g: Value, y: Value) -> Value:
        with t.untaped():
            out = b.where(b.le(y, 0.0), 0.0, g)
        return t.derive(
            "threshold_backward",
            (g, y),
            out,
            lambda b, cts, need: (threshold(b, cts[0], y), zeros(b, y) if need[1] else None),
        )

    def emit(x: Value) -> Value:
        if x.type.dtype is b1:
            raise InvalidGraph(reason="relu is not defined on b1")
        with t.untaped():
            y = t.b.maximum(x, 0.0 if x.type.dtype.is_float else 0)
        return t.derive("relu", (x,), y, lambda b, cts, need: (threshold(b, cts[0], y),))

    return pointwise(t, emit, (input,))


def square(t: Trace, input: torch.Tensor) -> TracedTensor:
    return power(t, input, 2)


FUNCTIONS = {name: _make(name, *row) for name, row in UNARY.items()}
FUNCTIONS["relu"] = _relu_function
FUNCTIONS["square"] = square


def relu(t: Trace, input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    out = FUNCTIONS["relu"](t, input)
    return write_back(t, input, out) if inplace else out


for _name, _implementation in FUNCTIONS.items():
    register((_name,), _implementation, others={torch.nn.functional.relu: relu})
register(("__neg__",), FUNCTIONS["neg"], inplace=False)
register(("__abs__",), FUNCTIONS["abs"], inplace=False)


@rule(torch.positive, torch.Tensor.positive, torch.Tensor.__pos__)
def positive(t: Trace, input: torch.Tensor) -> torch.Tensor:
    if t.lift(input).dtype is b1:
        raise t.shape_error("the `+` operator, on a bool tensor is not supported")
    return input
