"""Activation functions: one row each, with torch's formulas of value and derivative."""

from __future__ import annotations

import math

import numpy as np
import torch

from tracejit.capture.functions.arithmetic import add, div, sub
from tracejit.capture.functions.common import expand, normal_axis, register, with_inplace
from tracejit.capture.functions.derived import argument_error
from tracejit.capture.functions.rows import elementwise, emitted, function_of
from tracejit.capture.functions.selection import clamp
from tracejit.capture.functions.unary import FUNCTIONS, sigmoid
from tracejit.capture.trace.table import Formula, Row
from tracejit.capture.trace.tensor import TracedTensor, elementwise_strides, is_dense
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Arg, Value
from tracejit.ir.ops.movement import part
from tracejit.ir.types import b1

Tensor = torch.Tensor
functional = torch.nn.functional

_SELU_ALPHA = 1.6732632423543772848170429916717
_SELU_SCALE = 1.0507009873554804934193349852946
_CUBIC = 0.044715  # of gelu's tanh approximation
_GELU_SCALE = math.sqrt(2 / math.pi)
_SIXTH = float(np.float32(1 / 6))  # torch's constant, in float64 too


# --- formulas ----------------------------------------------------------------------------------


def _gelu(t: Trace, x: Value) -> Value:
    """x·Φ(x), Φ the normal distribution's cumulative function."""
    b = t.b
    return b.mul(b.mul(x, 0.5), b.add(b.erf(b.mul(x, math.sqrt(0.5))), 1.0))


def _d_gelu(t: Trace, g: Value, y: Value, x: Value) -> Value:
    """g·(Φ(x) + x·φ(x))."""
    b = t.b
    cdf = b.mul(b.add(b.erf(b.mul(x, math.sqrt(0.5))), 1.0), 0.5)
    pdf = b.mul(b.exp(b.mul(b.mul(x, x), -0.5)), 1 / math.sqrt(2 * math.pi))
    return b.mul(g, b.add(cdf, b.mul(x, pdf)))


def _gelu_inner(t: Trace, x: Value) -> Value:
    b = t.b
    return b.mul(b.add(x, b.mul(b.mul(b.mul(x, x), x), _CUBIC)), _GELU_SCALE)


def _gelu_tanh(t: Trace, x: Value) -> Value:
    """x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³)))."""
    b = t.b
    return b.mul(b.mul(x, 0.5), b.add(b.tanh(_gelu_inner(t, x)), 1.0))


def _d_gelu_tanh(t: Trace, g: Value, y: Value, x: Value) -> Value:
    b = t.b
    curve = b.tanh(_gelu_inner(t, x))
    inner = b.mul(b.add(b.mul(b.mul(x, x), 3 * _CUBIC), 1.0), _GELU_SCALE)
    right = b.mul(b.mul(b.mul(x, 0.5), b.sub(1.0, b.mul(curve, curve))), inner)
    return b.mul(g, b.add(b.mul(b.add(curve, 1.0), 0.5), right))


def _silu(t: Trace, x: Value) -> Value:
    """x·sigmoid(x)."""
    return t.b.div(x, t.b.add(t.b.exp(t.b.neg(x)), 1.0))


def _d_silu(t: Trace, g: Value, y: Value, x: Value) -> Value:
    """g·s·(1 + x·(1 - s)), s = sigmoid(x)."""
    b, s = t.b, sigmoid(t, x)
    return b.mul(b.mul(g, s), b.add(b.mul(x, b.sub(1.0, s)), 1.0))


def _leaky_relu(t: Trace, x: Value, slope: Arg) -> Value:
    return t.b.where(t.b.gt(x, 0.0), x, t.b.mul(x, slope))


def _d_leaky_relu(t: Trace, g: Value, y: Value, x: Value, slope: Arg) -> Value:
    return t.b.where(t.b.gt(x, 0.0), g, t.b.mul(g, slope))


def _elu(t: Trace, x: Value, below: Arg, above: Arg, inner: Arg) -> Value:
    """above·x, and below·(exp(inner·x) - 1) where x <= 0."""
    b = t.b
    return b.where(b.gt(x, 0.0), b.mul(x, above), b.mul(b.expm1(b.mul(x, inner)), below))


def _d_elu(t: Trace, g: Value, y: Value, x: Value, below: Arg, above: Arg, inner: Arg) -> Value:
    b = t.b
    low = b.minimum(x, 0.0)  # keeps exp finite where it is not used
    slope = b.mul(b.mul(b.mul(g, inner), below), b.exp(b.mul(low, inner)))
    return b.where(b.le(x, 0.0), slope, b.mul(g, above))


def _d_inside(t: Trace, g: Value, y: Value, x: Value, low: Arg, high: Arg) -> Value:
    """g between the bounds, 0 at them and outside."""
    b = t.b
    return b.where(b.or_(b.le(x, low), b.ge(x, high)), 0.0, g)


def _clamped(t: Trace, x: Value) -> Value:
    """min(max(x + 3, 0), 6)."""
    return t.b.minimum(t.b.maximum(t.b.add(x, 3.0), 0.0), 6.0)


def _hardsigmoid(t: Trace, x: Value) -> Value:
    return t.b.div(_clamped(t, x), 6.0)


def _d_hardsigmoid(t: Trace, g: Value, y: Value, x: Value) -> Value:
    b = t.b
    return b.where(b.and_(b.gt(x, -3.0), b.lt(x, 3.0)), b.mul(g, _SIXTH), 0.0)


def _hardswish(t: Trace, x: Value) -> Value:
    return t.b.div(t.b.mul(x, _clamped(t, x)), 6.0)


def _d_hardswish(t: Trace, g: Value, y: Value, x: Value) -> Value:
    b = t.b
    inside = b.mul(g, b.add(b.div(x, 3.0), 0.5))
    return b.where(b.le(x, -3.0), 0.0, b.where(b.lt(x, 3.0), inside, g))


def _softplus(t: Trace, x: Value, beta: Arg, threshold: Arg) -> Value:
    """log(1 + exp(β·x)) / β, and x where β·x is above the threshold."""
    b, scaled = t.b, t.b.mul(x, beta)
    return b.where(b.gt(scaled, threshold), x, b.div(b.log1p(b.exp(scaled)), beta))


def _d_softplus(t: Trace, g: Value, y: Value, x: Value, beta: Arg, threshold: Arg) -> Value:
    b, scaled = t.b, t.b.mul(x, beta)
    return b.where(b.gt(scaled, threshold), g, b.mul(g, sigmoid(t, scaled)))


def log_sigmoid(t: Trace, x: Value) -> Value:
    """min(x, 0) - log(1 + exp(-|x|))."""
    b = t.b
    return b.sub(b.minimum(x, 0.0), b.log1p(b.exp(b.neg(b.abs(x)))))


def _d_logsigmoid(t: Trace, g: Value, y: Value, x: Value) -> Value:
    """g·(1 - sigmoid(x)), from exp(-|x|)."""
    b = t.b
    z = b.exp(b.neg(b.abs(x)))
    part, below = b.div(z, b.add(z, 1.0)), b.lt(x, 0.0)
    return b.mul(g, b.where(below, b.sub(1.0, part), part))


def _mish(t: Trace, x: Value) -> Value:
    """x·tanh(log(1 + exp(x)))."""
    return t.b.mul(x, t.b.tanh(t.b.log1p(t.b.exp(x))))


def _d_mish(t: Trace, g: Value, y: Value, x: Value) -> Value:
    b = t.b
    curve = b.tanh(b.log1p(b.exp(x)))
    rest = b.mul(b.mul(x, sigmoid(t, x)), b.sub(1.0, b.mul(curve, curve)))
    return b.mul(g, b.add(curve, rest))


def _threshold(t: Trace, x: Value, threshold: Arg, value: Arg) -> Value:
    return t.b.where(t.b.le(x, threshold), value, x)


def _d_threshold(t: Trace, g: Value, y: Value, x: Value, threshold: Arg, value: Arg) -> Value:
    return t.b.where(t.b.le(x, threshold), 0.0, g)


def _hardshrink(t: Trace, x: Value, low: Arg, high: Arg) -> Value:
    b = t.b
    return b.where(b.and_(b.ge(x, low), b.le(x, high)), 0.0, x)


def _d_hardshrink(t: Trace, g: Value, y: Value, x: Value, low: Arg, high: Arg) -> Value:
    b = t.b
    return b.where(b.and_(b.ge(x, low), b.le(x, high)), 0.0, g)


def _softshrink(t: Trace, x: Value, low: Arg, high: Arg) -> Value:
    """x moved towards 0 by λ, 0 between -λ and λ."""
    b = t.b
    middle = b.where(b.ne(x, x), x, 0.0)
    return b.where(b.gt(x, high), b.sub(x, high), b.where(b.lt(x, low), b.sub(x, low), middle))


def _row(names: str, value: Formula, slope: Formula, **facts: object) -> Row:
    return Row(names, value, (slope,), dtypes="floats", **facts)


ROWS = (
    _row("silu", _silu, _d_silu),
    _row("mish", _mish, _d_mish),
    _row("hardsigmoid", _hardsigmoid, _d_hardsigmoid, flat=True),
    _row("hardswish", _hardswish, _d_hardswish),
    _row("log_sigmoid", log_sigmoid, _d_logsigmoid, row_major=True),
    _row("selu", _elu, _d_elu, numbers=lambda: (_SELU_ALPHA * _SELU_SCALE, _SELU_SCALE, 1.0)),
    _row("celu", _elu, _d_elu, numbers=lambda alpha=1.0: (alpha, 1.0, 1.0 / alpha)),
    _row(
        "elu",
        _elu,
        _d_elu,
        numbers=lambda alpha=1.0, scale=1.0, input_scale=1.0: (alpha * scale, scale, input_scale),
    ),
    _row(
        "leaky_relu",
        _leaky_relu,
        _d_leaky_relu,
        numbers=lambda negative_slope=0.01: (negative_slope,),
        flat=True,
    ),
    _row(
        "softplus",
        _softplus,
        _d_softplus,
        numbers=lambda beta=1.0, threshold=20.0: (beta, threshold),
    ),
    _row(
        "threshold",
        _threshold,
        _d_threshold,
        numbers=lambda threshold, value: (threshold, value),
        flat=True,
    ),
    _row(
        "hardshrink",
        _hardshrink,
        _d_hardshrink,
        numbers=lambda lambd=0.5: (-lambd, lambd),
        flat=True,
    ),
    _row(
        "softshrink",
        _softshrink,
        _d_hardshrink,
        numbers=lambda lambd=0.5: (-lambd, lambd),
        flat=True,
    ),
)
for _one in ROWS:
    elementwise(_one, __name__)
_GELU = {
    "none": function_of(_row("gelu", _gelu, _d_gelu), __name__),
    "tanh": function_of(_row("gelu", _gelu_tanh, _d_gelu_tanh), __name__),
}


def gelu(t: Trace, input: Tensor, *, approximate: str = "none") -> TracedTensor:
    if approximate not in _GELU:
        raise t.shape_error("approximate argument must be either none or tanh.")
    return _GELU[approximate](t, input)


def hardtanh(t: Trace, input: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> TracedTensor:
    """clamp, with gradient 0 at the bounds."""
    h = t.lift(input)
    if h.dtype is b1:
        raise t.shape_error("Bool inputs not supported for hardtanh")
    if h.dtype.kind == "u" and (min_val < 0 or max_val < 0):
        raise t.shape_error("cannot do hardtanh on an unsigned type with negative limits")
    if not h.dtype.is_float:
        return clamp(t, input, int(min_val), int(max_val))
    out = _hardtanh(t, input, min_val, max_val)
    return t.fresh(t.read(out.handle), h.strides) if is_dense(h.shape, h.strides) else out


def _checked_hardtanh(
    t: Trace, input: Tensor, min_val: float = -1.0, max_val: float = 1.0
) -> TracedTensor:
    if min_val > max_val:
        raise argument_error(t, "min_val cannot be greater than max_val")
    return hardtanh(t, input, min_val, max_val)


_hardtanh = function_of(
    _row(
        "hardtanh",
        lambda t, x, low, high: t.b.minimum(t.b.maximum(x, low), high),
        _d_inside,
        numbers=lambda low, high: (low, high),
        flat=True,
    ),
    __name__,
)


def relu6(t: Trace, input: Tensor) -> TracedTensor:
    return hardtanh(t, input, 0.0, 6.0)


def softsign(t: Trace, input: Tensor) -> TracedTensor:
    """x / (|x| + 1), as torch composes it."""
    return div(t, input, add(t, FUNCTIONS["abs"](t, input), 1))


def tanhshrink(t: Trace, input: Tensor) -> TracedTensor:
    """x - tanh(x), as torch composes it."""
    return sub(t, input, FUNCTIONS["tanh"](t, input))


_PRELU = Row(
    "prelu",
    lambda t, x, w: t.b.where(t.b.gt(x, 0.0), x, t.b.mul(x, w)),
    (
        lambda t, g, y, x, w: t.b.where(t.b.gt(x, 0.0), g, t.b.mul(g, w)),
        lambda t, g, y, x, w: t.b.where(t.b.gt(x, 0.0), 0.0, t.b.mul(g, x)),
    ),
    arity=2,
    dtypes="floats",
)


def prelu(t: Trace, input: Tensor, weight: Tensor) -> TracedTensor:
    """x, and weight·x where x <= 0; one weight, or one per channel (axis 1)."""
    x, w = t.lift(input), t.lift(weight)
    channels = x.shape[1] if len(x.shape) > 1 else 1
    if len(w.shape) > 1 or (w.numel != 1 and w.numel != channels) or x.dtype is not w.dtype:
        raise t.shape_error(
            f"prelu expects one weight or one per channel ({channels}), of the input's dtype"
        )
    kept = tuple(w.numel if i == min(1, len(x.shape) - 1) else 1 for i in range(len(x.shape)))
    factor = expand(t, t.b.reshape(t.read(w), shape=kept), x.shape)
    value = emitted(t, _PRELU, (t.read(x), factor))
    return t.fresh(value, elementwise_strides(x.shape, [(x.shape, x.strides)]))


def _d_gate(t: Trace, g: Value, y: Value, a: Value, z: Value) -> Value:
    b, s = t.b, sigmoid(t, z)
    return b.mul(b.mul(g, b.mul(b.sub(1.0, s), s)), a)


_GLU = Row(
    "glu",
    lambda t, a, z: t.b.mul(a, sigmoid(t, z)),
    (lambda t, g, y, a, z: t.b.mul(g, sigmoid(t, z)), _d_gate),
    arity=2,
    dtypes="floats",
)


def glu(t: Trace, input: Tensor, dim: int = -1) -> TracedTensor:
    """The first half along an axis times the sigmoid of the second."""
    x = t.lift(input)
    if not x.shape:
        raise t.shape_error("glu does not support 0-dimensional tensors")
    axis = normal_axis(t, dim, len(x.shape))
    size = x.shape[axis]
    if size % 2:
        raise t.shape_error(f"Halving dimension must be even, but dimension {axis} is size {size}")
    halves = [part(t.b, t.read(x), axis, k * (size // 2), size // 2) for k in (0, 1)]
    out = emitted(t, _GLU, halves)
    strides = elementwise_strides(out.type.shape, [(out.type.shape, x.strides)])
    return t.fresh(out, strides)


register(("gelu",), gelu)
register(("relu6",), relu6)
register(("hardtanh",), hardtanh, others={functional.hardtanh: with_inplace(_checked_hardtanh, 2)})
register(("softsign",), softsign, inplace=False)
register(("tanhshrink",), tanhshrink, inplace=False)
register(("prelu",), prelu, inplace=False)
register(("glu",), glu, inplace=False)
