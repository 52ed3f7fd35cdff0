"""More element-wise functions of one tensor: erf, expm1, log1p, and those to the base 2 and 10."""

from __future__ import annotations

import math

from tracejit.capture.functions.common import as_float, pointwise, register
from tracejit.capture.functions.derived import derived
from tracejit.capture.functions.unary import FUNCTIONS
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Value


def _logarithm(base: float):
    """log(x) / log(base), with the derivative g / (x·log(base))."""
    scale = math.log(base)
    return (
        lambda b, x: b.div(b.log(x), scale),
        lambda b, g, y, x: b.div(g, b.mul(x, scale)),
    )


# name: (value, slope)
ROWS = {
    "erf": (
        lambda b, x: b.erf(x),
        lambda b, g, y, x: b.mul(b.mul(b.exp(b.neg(b.mul(x, x))), 2 / math.sqrt(math.pi)), g),
    ),
    "expm1": (lambda b, x: b.expm1(x), lambda b, g, y, x: b.mul(g, b.add(y, 1.0))),
    "log1p": (lambda b, x: b.log1p(x), lambda b, g, y, x: b.div(g, b.add(x, 1.0))),
    "log2": _logarithm(2.0),
    "log10": _logarithm(10.0),
    "exp2": (
        lambda b, x: b.pow(2.0, x),
        lambda b, g, y, x: b.mul(b.mul(g, y), math.log(2.0)),
    ),
}


def _make(name: str, value, slope):
    def function(t: Trace, input):
        def emit(x: Value) -> Value:
            return derived(
                t,
                name,
                (x,),
                lambda x: value(t.b, x),
                (lambda g, y, x: slope(t.b, g, y, x),),
            )

        return pointwise(t, emit, (input,), to=as_float)

    return function


for _name, _row in ROWS.items():
    FUNCTIONS[_name] = _make(_name, *_row)
    register((_name,), FUNCTIONS[_name])
