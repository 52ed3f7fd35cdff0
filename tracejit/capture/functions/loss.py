"""Losses of differences and of probabilities, with their reductions none, mean and sum.

Those that torch computes element by element are a row each.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from types import FrameType

import torch

from tracejit.capture.functions.activation import log_sigmoid
from tracejit.capture.functions.arithmetic import div, mul, sub
from tracejit.capture.functions.common import operand, pointwise, result_dtype
from tracejit.capture.functions.derived import argument_error, require_float
from tracejit.capture.functions.reduction import mean, sum_
from tracejit.capture.functions.rows import emitted, function_of, undefined
from tracejit.capture.functions.unary import FUNCTIONS, sigmoid, square
from tracejit.capture.trace.bounds import between
from tracejit.capture.trace.table import BY_CALLER, Formula, Row, rule
from tracejit.capture.trace.tensor import TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Arg, Value

Tensor = torch.Tensor
functional = torch.nn.functional


def loss(function: Callable) -> Callable[[Callable], Callable]:
    """Register a rule of a loss: it gets the arguments by name, and `how` to reduce the losses.

    The old flags `size_average` and `reduce` decide that when they are given, else `reduction`.
    """
    signature = inspect.signature(function)
    known = ("none", "mean", "sum", *(("batchmean",) * (function is functional.kl_div)))

    def register(implementation: Callable) -> Callable:
        @rule(function)
        @wraps(implementation)
        def head(t: Trace, *args: object, **kwargs: object) -> TracedTensor:
            given = signature.bind(*args, **kwargs).arguments
            how = given.pop("reduction", "mean")
            flags = [given.pop(name, None) for name in ("size_average", "reduce")]
            if flags != [None, None]:
                average, any_ = (flag in (None, True) for flag in flags)
                how = "none" if not any_ else "mean" if average else "sum"
            if how not in known:
                raise argument_error(t, f"{how} is not a valid value for reduction")
            return implementation(t, how=how, **given)

        return implementation

    return register


def reduced(t: Trace, losses: TracedTensor, reduction: str) -> TracedTensor:
    """The losses themselves, their mean or their sum."""
    if reduction == "none":
        return losses
    return mean(t, losses) if reduction == "mean" else sum_(t, losses)


def _weighted(t: Trace, losses: TracedTensor, weight: Tensor | None) -> TracedTensor:
    return losses if weight is None else mul(t, losses, weight)


def constant_weight(
    t: Trace, name: str, weight: Tensor | None, argument: str = "weight"
) -> Tensor | None:
    """A weight, or another argument without a derivative, refused where it requires grad."""
    if weight is not None and t.grad_on and t.requires_grad(t.lift(weight)):
        raise t.autograd_error(
            f"The function '{name}' is not differentiable with respect to argument '{argument}'. "
            "This input cannot have requires_grad True."
        )
    return weight


# --- differences -------------------------------------------------------------------------------


def _negated(t: Trace, x: Arg) -> Arg:
    """-x of a number or a runtime scalar."""
    return t.b.host_neg(x) if isinstance(x, Value) else -x


def _half(t: Trace, x: Arg) -> Arg:
    return t.b.host_mul(x, 0.5) if isinstance(x, Value) else x * 0.5


def _d_smooth_l1(t: Trace, g: Value, y: Value, x: Value, z: Value, beta: Arg) -> Value:
    """g·d/β with d = x - z clamped to -β … β."""
    b, d = t.b, t.b.sub(x, z)
    clamped = b.where(b.gt(d, beta), 1.0, b.where(b.lt(d, _negated(t, beta)), -1.0, b.div(d, beta)))
    return b.mul(g, clamped)


def _smooth_l1(t: Trace, x: Value, z: Value, beta: Arg) -> Value:
    """d²/2β, and |d| - β/2 where |d| >= β."""
    b, d = t.b, t.b.abs(t.b.sub(x, z))
    square = b.div(b.mul(b.mul(d, d), 0.5), beta)
    return b.where(b.lt(d, beta), square, b.sub(d, _half(t, beta)))


def _huber(t: Trace, x: Value, z: Value, delta: Arg) -> Value:
    """d²/2, and δ·(|d| - δ/2) where |d| > δ."""
    b, d = t.b, t.b.abs(t.b.sub(x, z))
    linear = b.mul(b.sub(d, _half(t, delta)), delta)
    return b.where(b.le(d, delta), b.mul(b.mul(d, d), 0.5), linear)


def _d_huber(t: Trace, g: Value, y: Value, x: Value, z: Value, delta: Arg) -> Value:
    b, d = t.b, t.b.sub(x, z)
    inside = b.where(b.lt(d, _negated(t, delta)), b.neg(b.mul(g, delta)), b.mul(g, d))
    return b.where(b.gt(d, delta), b.mul(g, delta), inside)


def _soft_margin(t: Trace, x: Value, z: Value) -> Value:
    """log(1 + exp(-z·x))."""
    b = t.b
    return b.log1p(b.exp(b.neg(b.mul(z, x))))


def _d_soft_margin(t: Trace, g: Value, y: Value, x: Value, z: Value) -> Value:
    b = t.b
    return b.neg(b.mul(g, b.mul(z, sigmoid(t, b.neg(b.mul(z, x))))))


def _pair(name: str, value: Formula, slope: Formula) -> Callable[..., TracedTensor]:
    """A loss of differences with one number: the target's slope is the input's, negated."""

    def d_target(t: Trace, *args: Arg) -> Value:
        return t.b.neg(slope(t, *args))

    row = Row(
        name, value, (slope, d_target), numbers=lambda number: (number,), arity=2, dtypes="floats"
    )
    return function_of(row, __name__)


_smooth_l1_losses = _pair("smooth_l1_loss", _smooth_l1, _d_smooth_l1)
_huber_losses = _pair("huber_loss", _huber, _d_huber)
_soft_margin_losses = function_of(
    Row(
        "soft_margin_loss",
        _soft_margin,
        (_d_soft_margin, undefined("soft_margin_loss", "target")),
        arity=2,
        dtypes="floats",
    ),
    __name__,
)


@loss(functional.mse_loss)
def mse_loss(
    t: Trace,
    input: Tensor,
    target: Tensor,
    how: str,
    weight: Tensor | None = None,
) -> TracedTensor:
    """(input - target)²; its gradient is 2·(input - target)·g (·1/n)."""
    dtype = result_dtype([operand(t, x) for x in (input, target)])
    if not dtype.is_float:
        raise t.not_implemented("mse_cpu", dtype)
    squared = square(t, sub(t, input, target))
    return _finish(t, squared, weight, how)


def _finish(t: Trace, losses: TracedTensor, weight: Tensor | None, how: str) -> TracedTensor:
    """The weighted losses, reduced; the weighted mean divides by the sum of the weights."""
    if weight is not None and t.lift(weight).shape != losses.handle.shape:
        raise argument_error(t, "Weights and input must have the same size.")
    if weight is None or how != "mean":
        return reduced(t, _weighted(t, losses, weight), how)
    return div(t, sum_(t, mul(t, losses, weight)), sum_(t, weight))


@loss(functional.l1_loss)
def l1_loss(
    t: Trace,
    input: Tensor,
    target: Tensor,
    how: str,
    weight: Tensor | None = None,
) -> TracedTensor:
    """|input - target|."""
    return _finish(t, FUNCTIONS["abs"](t, sub(t, input, target)), weight, how)


def _unpassed_weight(frame: FrameType | None) -> dict[str, object]:
    """The weight of the l1_loss call under way, which torch 2.13 does not hand to its overrides.

    Without this, test_values[torch.nn.functional.l1_loss] fails.
    """
    while frame is not None and frame.f_code is not functional.l1_loss.__code__:
        frame = frame.f_back
    weight = None if frame is None else frame.f_locals.get("weight")
    return {} if weight is None else {"weight": weight}


BY_CALLER[functional.l1_loss] = _unpassed_weight


@loss(functional.smooth_l1_loss)
def smooth_l1_loss(
    t: Trace,
    input: Tensor,
    target: Tensor,
    how: str,
    beta: float = 1.0,
) -> TracedTensor:
    if beta < 0:
        raise t.shape_error("smooth_l1_loss does not support negative values for beta.")
    if beta == 0:
        return l1_loss(t, input, target, how)
    return reduced(t, _smooth_l1_losses(t, input, target, beta), how)


@loss(functional.huber_loss)
def huber_loss(
    t: Trace,
    input: Tensor,
    target: Tensor,
    how: str,
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> TracedTensor:
    if delta <= 0:
        raise t.shape_error("huber_loss does not support non-positive values for delta.")
    return _finish(t, _huber_losses(t, input, target, delta), weight, how)


@loss(functional.soft_margin_loss)
def soft_margin_loss(
    t: Trace,
    input: Tensor,
    target: Tensor,
    how: str,
) -> TracedTensor:
    """log(1 + exp(-z·x))."""
    return reduced(t, _soft_margin_losses(t, input, target), how)


# --- probabilities -----------------------------------------------------------------------------


def _logs(t: Trace, x: Value) -> tuple[Value, Value]:
    """log(x) and log(1 - x), not below -100."""
    b = t.b
    return b.maximum(b.log(x), -100.0), b.maximum(b.log1p(b.neg(x)), -100.0)


def _bce(t: Trace, x: Value, z: Value) -> Value:
    b, (on, off) = t.b, _logs(t, x)
    return b.sub(b.mul(b.sub(z, 1.0), off), b.mul(z, on))


def _d_bce(t: Trace, g: Value, y: Value, x: Value, z: Value) -> Value:
    b = t.b
    variance = b.maximum(b.mul(b.sub(1.0, x), x), 1e-12)
    return b.div(b.mul(g, b.sub(x, z)), variance)


def _d_bce_target(t: Trace, g: Value, y: Value, x: Value, z: Value) -> Value:
    on, off = _logs(t, x)
    return t.b.mul(g, t.b.sub(off, on))


_bce_losses = function_of(
    Row("binary_cross_entropy", _bce, (_d_bce, _d_bce_target), arity=2, dtypes="floats"), __name__
)


@loss(functional.binary_cross_entropy)
def binary_cross_entropy(
    t: Trace,
    input: Tensor,
    target: Tensor,
    how: str,
    weight: Tensor | None = None,
) -> TracedTensor:
    """-(z·log(x) + (1 - z)·log(1 - x)), logarithms not below -100.

    Its gradient is g·(x - z) / max((1 - x)·x, 1e-12).
    """
    x, z = operand(t, input).handle, operand(t, target).handle
    if x.shape != z.shape:
        raise argument_error(
            t, f"target size {list(z.shape)} differs from input size {list(x.shape)}"
        )
    if x.dtype is not z.dtype:
        raise t.shape_error(f"Found dtype {z.dtype} but expected {x.dtype}")
    for role, tensor in (("input", input), ("target", target)):
        reason = f"all elements of {role} should be between 0 and 1"
        between(t, tensor, 0.0, 1.0, t.shape_error(reason))
    losses = _bce_losses(t, input, target)
    return reduced(t, _weighted(t, losses, constant_weight(t, "binary_cross_entropy", weight)), how)


def _scale(t: Trace, z: Value, p: Value) -> Value:
    """1 + (p - 1)·z."""
    return t.b.add(t.b.mul(t.b.sub(p, 1.0), z), 1.0)


def _logits(t: Trace, x: Value, z: Value, *p: Value) -> Value:
    b, log = t.b, log_sigmoid(t, x)
    return b.sub(b.mul(b.sub(1.0, z), x), b.mul(_scale(t, z, *p), log) if p else log)


def _d_logits(t: Trace, g: Value, y: Value, x: Value, z: Value, *p: Value) -> Value:
    b, s = t.b, sigmoid(t, x)
    if not p:
        return b.mul(g, b.sub(s, z))
    positive = b.mul(p[0], z)
    return b.mul(g, b.sub(b.mul(b.sub(b.add(positive, 1.0), z), s), positive))


def _d_logits_target(t: Trace, g: Value, y: Value, x: Value, z: Value, *p: Value) -> Value:
    b = t.b
    if not p:
        return b.neg(b.mul(g, x))
    negative = log_sigmoid(t, b.neg(x))
    return b.mul(g, b.sub(negative, b.mul(p[0], log_sigmoid(t, x))))


def _d_logits_positive(t: Trace, g: Value, y: Value, x: Value, z: Value, p: Value) -> Value:
    return t.b.neg(t.b.mul(g, t.b.mul(z, log_sigmoid(t, x))))


_LOGITS = Row(
    "binary_cross_entropy_with_logits",
    _logits,
    (_d_logits, _d_logits_target),
    arity=2,
    dtypes="floats",
)
_logits_losses = function_of(_LOGITS, __name__)
_weighted_logits_losses = function_of(
    replace(_LOGITS, slopes=(*_LOGITS.slopes, _d_logits_positive), arity=3), __name__
)


@loss(functional.binary_cross_entropy_with_logits)
def binary_cross_entropy_with_logits(
    t: Trace,
    input: Tensor,
    target: Tensor,
    how: str,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
) -> TracedTensor:
    """(1 - z)·x - (1 + (p - 1)·z)·log(sigmoid(x)), p the weight of the positive class.

    Its gradient is g·((p·z + 1 - z)·sigmoid(x) - p·z).
    """
    if operand(t, input).handle.shape != operand(t, target).handle.shape:
        raise argument_error(t, "Target size must be the same as input size")
    weight = constant_weight(t, _LOGITS.name, weight)
    if pos_weight is None:
        losses = _logits_losses(t, input, target)
    else:
        losses = _weighted_logits_losses(t, input, target, pos_weight)
    return reduced(t, _weighted(t, losses, weight), how)


def _ratio(t: Trace, g: Value, z: Value) -> Value:
    return t.b.div(t.b.mul(g, z), z)


def _d_entropy(t: Trace, g: Value, y: Value, z: Value) -> Value:
    b = t.b
    return b.add(b.where(b.eq(z, 0.0), 0.0, b.mul(g, b.log(z))), _ratio(t, g, z))


_ENTROPY = Row(  # z·log(z), 0 at 0
    "xlogy",
    lambda t, z: t.b.where(t.b.eq(z, 0.0), 0.0, t.b.mul(z, t.b.log(z))),
    (_d_entropy,),
)


@loss(functional.kl_div)
def kl_div(
    t: Trace,
    input: Tensor,
    target: Tensor,
    how: str,
    log_target: bool = False,
) -> TracedTensor:
    """z·(log(z) - x), or exp(z)·(z - x) where the target holds logarithms."""
    b = t.b

    def emit(x: Value, z: Value) -> Value:
        require_float(t, "kl_div", x, z, checked=True)
        if log_target:
            return b.mul(b.exp(z), b.sub(z, x))
        return b.sub(emitted(t, _ENTROPY, (z,)), b.mul(z, x))

    shape = operand(t, input).handle.shape
    batch = how == "batchmean"
    losses = reduced(t, pointwise(t, emit, (input, target)), "sum" if batch else how)
    return div(t, losses, shape[0]) if batch and shape else losses
