"""Losses of classes: nll_loss and cross_entropy, also of a linear function.

A class index picks its element by comparing it with an iota over the class axis, so that no gather
stands between a row's softmax and its loss.
"""

from __future__ import annotations

import math

import torch

from tracejit.capture.functions.arithmetic import add, div, mul
from tracejit.capture.functions.common import cast
from tracejit.capture.functions.composites import run_body
from tracejit.capture.functions.derived import (
    argument_error,
    derived,
    no_derivative,
    require_float,
    spread,
    widen,
)
from tracejit.capture.functions.loss import loss, reduced
from tracejit.capture.functions.movement import reshape
from tracejit.capture.functions.reduction import sum_
from tracejit.capture.functions.softmax import log_softmax
from tracejit.capture.functions.unary import FUNCTIONS
from tracejit.capture.trace import location
from tracejit.capture.trace.bounds import within
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.errors import AxisError
from tracejit.ir.graph import Value
from tracejit.ir.types import i64

Tensor = torch.Tensor
functional = torch.nn.functional


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
        return reduced(t, losses, how)
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
    return reshape(t, weight, *kept)


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


@rule(functional.linear_cross_entropy)
def linear_cross_entropy(
    t: Trace, *tensors: Tensor, options: object = None, **kwargs: object
) -> TracedTensor:
    """As it is written: cross_entropy of a linear function. The options, which say how torch
    computes the logits in parts, are not read: a pass decides that (`passes/vocabulary.py`)."""
    return run_body(t, functional.linear_cross_entropy, tensors, kwargs)
