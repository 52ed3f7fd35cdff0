"""Loss functions of torch.nn.functional, with their reductions none, mean and sum.

A class index picks its element by comparing it with an iota over the class axis, so that no gather
stands between a row's softmax and its loss.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from types import FrameType

import torch

from tracejit.capture.functions.activation import log_sigmoid
from tracejit.capture.functions.arithmetic import add, div, mul, sub
from tracejit.capture.functions.common import (
    cast,
    literal,
    operand,
    pointwise,
)
from tracejit.capture.functions.derived import (
    argument_error,
    derived,
    no_derivative,
    require_float,
    sigmoid,
    spread,
    widen,
)
from tracejit.capture.functions.reduction import mean, sum_
from tracejit.capture.functions.softmax import log_softmax
from tracejit.capture.functions.unary import FUNCTIONS
from tracejit.capture.trace import location
from tracejit.capture.trace.bounds import within
from tracejit.capture.trace.table import BY_CALLER, RULES, Rule, rule
from tracejit.capture.trace.tensor import TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.errors import AxisError
from tracejit.ir.graph import Arg, Value
from tracejit.ir.types import i64

Tensor = torch.Tensor
functional = torch.nn.functional


def loss(function: Callable) -> Callable[[Rule], Rule]:
    """Register a rule of a loss: it gets the arguments by name, and `how` to reduce the losses.

    The old flags `size_average` and `reduce` decide that when they are given, else `reduction`.
    """
    signature = inspect.signature(function)
    known = ("none", "mean", "sum", *(("batchmean",) * (function is functional.kl_div)))

    def register(implementation: Rule) -> Rule:
        @rule(function)
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


def _reduced(t: Trace, losses: TracedTensor, reduction: str) -> TracedTensor:
    if reduction == "none":
        return losses
    return mean(t, losses) if reduction == "mean" else sum_(t, losses)


def _weighted(t: Trace, losses: TracedTensor, weight: Tensor | None) -> TracedTensor:
    return losses if weight is None else mul(t, losses, weight)


def _constant(t: Trace, name: str, weight: Tensor | None) -> Tensor | None:
    """A weight, refused where it requires grad."""
    if weight is not None and t.grad_on and t.requires_grad(t.lift(weight)):
        raise t.autograd_error(
            f"The function '{name}' is not differentiable with respect to argument 'weight'. This "
            "input cannot have requires_grad True."
        )
    return weight


# --- differences -------------------------------------------------------------------------------


def _negated(t: Trace, x: Arg) -> Arg:
    """-x of a number or a runtime scalar."""
    return t.b.host_neg(x) if isinstance(x, Value) else -x


def _half(t: Trace, x: Arg) -> Arg:
    return t.b.host_mul(x, 0.5) if isinstance(x, Value) else x * 0.5


def _d_smooth_l1(t: Trace, g: Value, x: Value, z: Value, beta: Arg) -> Value:
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


def _d_huber(t: Trace, g: Value, x: Value, z: Value, delta: Arg) -> Value:
    b, d = t.b, t.b.sub(x, z)
    inside = b.where(b.lt(d, _negated(t, delta)), b.neg(b.mul(g, delta)), b.mul(g, d))
    return b.where(b.gt(d, delta), b.mul(g, delta), inside)


def _soft_margin(t: Trace, x: Value, z: Value) -> Value:
    """log(1 + exp(-z·x))."""
    b = t.b
    return b.log1p(b.exp(b.neg(b.mul(z, x))))


def _d_soft_margin(t: Trace, g: Value, x: Value, z: Value) -> Value:
    b = t.b
    return b.neg(b.mul(g, b.mul(z, sigmoid(t, b.neg(b.mul(z, x))))))


def _pair(
    t: Trace, name: str, value: Callable, slope: Callable, input: Tensor, target: Tensor, *numbers
) -> TracedTensor:
    """A loss of differences, element by element: the target's slope is the input's, negated."""

    def emit(x: Value, z: Value) -> Value:
        require_float(t, name, x)
        given = [literal(n, widen(t, x).type.dtype) for n in numbers]
        return derived(
            t,
            name,
            (x, z),
            lambda x, z: value(t, x, z, *given),
            (
                lambda g, y, x, z: slope(t, g, x, z, *given),
                lambda g, y, x, z: t.b.neg(slope(t, g, x, z, *given)),
            ),
        )

    return pointwise(t, emit, (input, target))


@loss(functional.mse_loss)
def mse_loss(
    t: Trace,
    input: Tensor,
    target: Tensor,
    how: str,
    weight: Tensor | None = None,
) -> TracedTensor:
    """(input - target)²; its gradient is 2·(input - target)·g (·1/n)."""
    squared = FUNCTIONS["square"](t, sub(t, input, target))
    return _finish(t, squared, weight, how)


def _finish(t: Trace, losses: TracedTensor, weight: Tensor | None, how: str) -> TracedTensor:
    """The weighted losses, reduced; the weighted mean divides by the sum of the weights."""
    if weight is not None and t.lift(weight).shape != losses.handle.shape:
        raise argument_error(t, "Weights and input must have the same size.")
    if weight is None or how != "mean":
        return _reduced(t, _weighted(t, losses, weight), how)
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
    losses = _pair(t, "smooth_l1_loss", _smooth_l1, _d_smooth_l1, input, target, beta)
    return _reduced(t, losses, how)


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
    losses = _pair(t, "huber_loss", _huber, _d_huber, input, target, delta)
    return _finish(t, losses, weight, how)


@loss(functional.soft_margin_loss)
def soft_margin_loss(
    t: Trace,
    input: Tensor,
    target: Tensor,
    how: str,
) -> TracedTensor:

    def emit(x: Value, z: Value) -> Value:
        require_float(t, "soft_margin_loss", x)
        return derived(
            t,
            "soft_margin_loss",
            (x, z),
            lambda x, z: _soft_margin(t, x, z),
            (
                lambda g, y, x, z: _d_soft_margin(t, g, x, z),
                no_derivative(t, "soft_margin_loss", "target"),
            ),
        )

    return _reduced(t, pointwise(t, emit, (input, target)), how)


# --- probabilities -----------------------------------------------------------------------------


@loss(functional.binary_cross_entropy)
def binary_cross_entropy(
    t: Trace,
    input: Tensor,
    target: Tensor,
    how: str,
    weight: Tensor | None = None,
) -> TracedTensor:
    """-(z·log(x) + (1 - z)·log(1 - x)), logarithms not below -100.

    Its gradient is g·(x - z) / max((1 - x)·x, 1e-12). Inputs outside 0 … 1 are not noticed.
    """
    b = t.b
    x, z = operand(t, input).handle, operand(t, target).handle
    if x.shape != z.shape:
        raise argument_error(
            t, f"target size {list(z.shape)} differs from input size {list(x.shape)}"
        )
    if x.dtype is not z.dtype:
        raise t.shape_error(f"Found dtype {z.dtype} but expected {x.dtype}")

    def logs(x: Value) -> tuple[Value, Value]:
        return b.maximum(b.log(x), -100.0), b.maximum(b.log1p(b.neg(x)), -100.0)

    def value(x: Value, z: Value) -> Value:
        on, off = logs(x)
        return b.sub(b.mul(b.sub(z, 1.0), off), b.mul(z, on))

    def d_input(g: Value, y: Value, x: Value, z: Value) -> Value:
        variance = b.maximum(b.mul(b.sub(1.0, x), x), 1e-12)
        return b.div(b.mul(g, b.sub(x, z)), variance)

    def d_target(g: Value, y: Value, x: Value, z: Value) -> Value:
        on, off = logs(x)
        return b.mul(g, b.sub(off, on))

    def emit(x: Value, z: Value) -> Value:
        require_float(t, "binary_cross_entropy", x, z)
        return derived(t, "binary_cross_entropy", (x, z), value, (d_input, d_target))

    losses = pointwise(t, emit, (input, target))
    return _reduced(t, _weighted(t, losses, _constant(t, "binary_cross_entropy", weight)), how)


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
    b = t.b
    if operand(t, input).handle.shape != operand(t, target).handle.shape:
        raise argument_error(t, "Target size must be the same as input size")

    def scale(z: Value, p: Value) -> Value:
        return b.add(b.mul(b.sub(p, 1.0), z), 1.0)

    def value(x: Value, z: Value, *p: Value) -> Value:
        log = log_sigmoid(t, x)
        return b.sub(b.mul(b.sub(1.0, z), x), b.mul(scale(z, *p), log) if p else log)

    def d_input(g: Value, y: Value, x: Value, z: Value, *p: Value) -> Value:
        s = sigmoid(t, x)
        if not p:
            return b.mul(g, b.sub(s, z))
        positive = b.mul(p[0], z)
        return b.mul(g, b.sub(b.mul(b.sub(b.add(positive, 1.0), z), s), positive))

    def d_target(g: Value, y: Value, x: Value, z: Value, *p: Value) -> Value:
        if not p:
            return b.neg(b.mul(g, x))
        negative = log_sigmoid(t, b.neg(x))
        return b.mul(g, b.sub(negative, b.mul(p[0], log_sigmoid(t, x))))

    def d_positive(g: Value, y: Value, x: Value, z: Value, *p: Value) -> Value:
        return b.neg(b.mul(g, b.mul(z, log_sigmoid(t, x))))

    def emit(x: Value, z: Value, *p: Value) -> Value:
        require_float(t, "binary_cross_entropy_with_logits", x)
        formulas = (d_input, d_target, d_positive)[: 2 + len(p)]
        return derived(t, "binary_cross_entropy_with_logits", (x, z, *p), value, formulas)

    xs = (input, target) if pos_weight is None else (input, target, pos_weight)
    weight = _constant(t, "binary_cross_entropy_with_logits", weight)
    return _reduced(t, _weighted(t, pointwise(t, emit, xs), weight), how)


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

    def entropy(z: Value) -> Value:
        """z·log(z), 0 at 0."""
        return derived(
            t,
            "xlogy",
            (z,),
            lambda z: b.where(b.eq(z, 0.0), 0.0, b.mul(z, b.log(z))),
            (lambda g, y, z: b.add(b.where(b.eq(z, 0.0), 0.0, b.mul(g, b.log(z))), ratio(g, z)),),
        )

    def ratio(g: Value, z: Value) -> Value:
        return b.div(b.mul(g, z), z)

    def emit(x: Value, z: Value) -> Value:
        require_float(t, "kl_div", x, z)
        if log_target:
            return b.mul(b.exp(z), b.sub(z, x))
        return b.sub(entropy(z), b.mul(z, x))

    shape = operand(t, input).handle.shape
    batch = how == "batchmean"
    losses = _reduced(t, pointwise(t, emit, (input, target)), "sum" if batch else how)
    return div(t, losses, shape[0]) if batch and shape else losses


# --- classes -----------------------------------------------------------------------------------


def _nll_value(
    t: Trace,
    x: Value,
    target: Value,
    weight: Value | None,
    ignore_index: int,
    reduction: str,
    axis: int,
) -> Value:
    """-weight[c]·x[c] with c the target along the class axis; the mean is weighted.

    A target out of range, which eager refuses, makes the loss NaN.
    """
    b, shape = t.b, x.type.shape
    classes, whole = shape[axis], tuple(range(len(target.type.shape)))
    wide = widen(t, x).type.dtype
    with t.untaped():
        target = cast(t, target, i64)
        number = b.iota(axis=axis, shape=shape, dtype=i64, device=x.type.device)
        hit = b.eq(number, spread(t, target, shape, (axis,)))
        valid = b.ne(target, ignore_index)
        outside = b.and_(valid, b.or_(b.lt(target, 0), b.ge(target, classes)))

    def chosen(row: Value) -> Value:
        return b.reduce_sum(b.where(hit, row, 0.0), axes=(axis,))

    def factors(w: Value | None) -> Value:
        """Each sample's weight, 0 where it is ignored."""
        if w is None:
            return b.cast(valid, dtype=wide)
        kept = tuple(n if i == axis else 1 for i, n in enumerate(shape))
        row = b.expand(b.reshape(w, shape=kept), shape=shape)
        return b.where(valid, chosen(row), 0.0)

    def total(v: Value) -> Value:
        return b.reduce_sum(v, axes=whole) if whole else v

    def forward(x: Value, *w: Value) -> Value:
        each = factors(*w) if w else factors(None)
        losses = b.where(valid, b.neg(b.mul(each, chosen(x))), 0.0)
        losses = b.where(outside, math.nan, losses)
        if reduction == "none":
            return losses
        return b.div(total(losses), total(each)) if reduction == "mean" else total(losses)

    def d_input(g: Value, y: Value, x: Value, *w: Value) -> Value:
        each = factors(*w) if w else factors(None)
        if reduction == "mean":
            g = b.div(g, total(each))
        if reduction != "none":
            g = spread(t, g, target.type.shape, whole)
        share = spread(t, b.where(valid, b.neg(b.mul(g, each)), 0.0), shape, (axis,))
        return b.where(hit, share, 0.0)

    inputs, backward = [x], [d_input]
    if weight is not None:
        inputs.append(weight)
        backward.append(no_derivative(t, "nll_loss", "weight"))
    return derived(t, "nll_loss", inputs, forward, backward, flat=True)


def _class_axis(t: Trace, shape: tuple[int, ...]) -> int:
    if not shape:
        raise argument_error(t, "Expected an input of 1 dimension or more")
    return 0 if len(shape) == 1 else 1


@loss(functional.nll_loss)
def nll_loss(
    t: Trace,
    input: Tensor,
    target: Tensor,
    how: str,
    weight: Tensor | None = None,
    ignore_index: int = -100,
) -> TracedTensor:
    """Negative log likelihood of the target classes: input [C], [N, C] or [N, C, d1, …]."""
    x, z = t.lift(input), t.lift(target)
    axis = _class_axis(t, x.shape)
    if z.shape != x.shape[:axis] + x.shape[axis + 1 :]:
        reason = f"Expected target of input's shape without classes, got {list(z.shape)}"
        if x.shape[:1] != z.shape[:1]:
            raise argument_error(t, reason)
        raise t.shape_error(reason)
    if z.dtype.kind not in "iu":
        raise t.shape_error(f"expected class indices of type long, but got {z.dtype}")
    w = None if weight is None else t.read(t.lift(weight))
    if w is not None and w.type.shape != (x.shape[axis],):
        raise t.shape_error(
            f"weight tensor should be defined either for all {x.shape[axis]} classes or no "
            f"classes but got weight tensor of shape: {list(w.type.shape)}"
        )
    outside = AxisError(where=location.full(), reason="Target {value} is out of bounds.")
    within(t, target, 0, x.shape[axis], outside, ignore_index)
    values = (t.read(x), t.read(z), w)
    require_float(t, "nll_loss", values[0])
    return t.fresh(_nll_value(t, *values, ignore_index, how, axis))


def _smoothed(
    t: Trace,
    logs: TracedTensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    how: str,
    axis: int,
) -> TracedTensor:
    """What label smoothing adds: -sum(weight·x) over the classes, 0 where ignored."""
    weighted = logs if weight is None else mul(t, logs, _per_class(t, weight, logs, axis))
    rows = FUNCTIONS["neg"](t, sum_(t, weighted, axis))
    with t.untaped():
        valid = t.b.ne(t.read(t.lift(target)), ignore_index)
    losses = t.fresh(t.b.where(valid, t.read(rows.handle), 0.0))
    if how != "mean":
        return _reduced(t, losses, how)
    with t.untaped():
        dtype = logs.handle.dtype
        count = cast(t, valid, dtype)
        if weight is not None:
            ones = t.b.full(1.0, shape=logs.handle.shape, dtype=dtype, device=logs.handle.device)
            picked = _nll_value(
                t, ones, t.read(t.lift(target)), t.read(t.lift(weight)), ignore_index, "none", axis
            )
            count = t.b.neg(picked)
        count = t.fresh(count)
    return div(t, sum_(t, losses), sum_(t, count))


def _per_class(t: Trace, weight: Tensor, like: TracedTensor, axis: int) -> TracedTensor:
    kept = tuple(-1 if i == axis else 1 for i in range(len(like.handle.shape)))
    return RULES[torch.reshape](t, weight, kept)


@loss(functional.cross_entropy)
def cross_entropy(
    t: Trace,
    input: Tensor,
    target: Tensor,
    how: str,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> TracedTensor:
    """nll_loss of log_softmax; the target holds class indices, or probabilities of all classes."""
    x, z = t.lift(input), t.lift(target)
    axis = _class_axis(t, x.shape)
    if not 0.0 <= label_smoothing <= 1.0:
        raise t.shape_error(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    classes = x.shape[axis]
    logs = log_softmax(t, input, axis)
    if x.shape == z.shape:
        if not z.dtype.is_float:
            raise t.shape_error("Expected floating point type for target with class probabilities")
        if label_smoothing > 0:
            target = add(t, mul(t, target, 1 - label_smoothing), label_smoothing / classes)
        product = mul(t, logs, target)
        if weight is not None:
            product = mul(t, product, _per_class(t, weight, logs, axis))
        if how == "none":
            return FUNCTIONS["neg"](t, sum_(t, product, axis))
        total = FUNCTIONS["neg"](t, sum_(t, product))
        return div(t, total, x.numel / classes) if how == "mean" else total
    picked = nll_loss(t, logs, target, how, weight, ignore_index)
    if label_smoothing == 0:
        return picked
    rest = _smoothed(t, logs, target, weight, ignore_index, how, axis)
    return add(t, mul(t, picked, 1 - label_smoothing), mul(t, rest, label_smoothing / classes))
