"""Normalization: layer, rms, group, instance and batch norm.

All are y = (x - mean) / sqrt(var + eps) · weight + bias over some axes; they differ in the axes and
in where weight and bias stand. The variance is that of the differences from the mean, in two passes
over a row that stays on chip.
"""

from __future__ import annotations

import math

import torch

from tracejit.capture.functions.arithmetic import div, mul
from tracejit.capture.functions.common import cast, expand, literal
from tracejit.capture.functions.derived import (
    argument_error,
    derived,
    no_derivative,
    require_float,
    spread,
    widen,
)
from tracejit.capture.functions.layouts import like
from tracejit.capture.functions.statistics import vector_norm
from tracejit.capture.trace import location
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import TO_TORCH, Ints, TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.errors import AxisError
from tracejit.ir import types
from tracejit.ir.graph import Arg, Value

Tensor = torch.Tensor
functional = torch.nn.functional


def _mean(t: Trace, x: Value, axes: Ints) -> Value:
    """The mean over axes, spread over them again."""
    return spread(t, mean_of(t, x, axes), x.type.shape, axes)


def mean_of(t: Trace, x: Value, axes: Ints) -> Value:
    count = math.prod(x.type.shape[a] for a in axes)
    return t.b.div(t.b.reduce_sum(x, axes=axes), float(count))


def _scale(t: Trace, x: Value, axes: Ints, eps: Arg) -> Value:
    """1 / sqrt(mean(x²) + eps), spread over the axes."""
    b = t.b
    scale = b.div(1.0, b.sqrt(b.add(mean_of(t, b.mul(x, x), axes), eps)))
    return spread(t, scale, x.type.shape, axes)


def normalized(
    t: Trace,
    name: str,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    axes: Ints,
    param_shape: Ints,
    eps: Arg,
    *,
    centered: bool = True,
) -> Value:
    """x normalized over `axes`; weight and bias broadcast from `param_shape`, of x's rank.

    With n = (x - mean)·r, r = 1/sqrt(var + eps) and h = g·weight, the gradients are
    r·(h - mean(h) - n·mean(h·n)), sum(g·n) and sum(g). Without centering, mean and mean(h) are 0.
    """
    b, shape = t.b, x.type.shape
    summed = tuple(i for i, n in enumerate(param_shape) if n == 1 and shape[i] != 1)

    def over(p: Value) -> Value:
        return expand(t, b.reshape(p, shape=param_shape), shape)

    def parts(x: Value) -> tuple[Value, Value]:
        centred = b.sub(x, _mean(t, x, axes)) if centered else x
        scale = _scale(t, centred, axes, eps)
        return b.mul(centred, scale), scale

    def forward(x: Value, *params: Value) -> Value:
        given = iter(params)
        y, _ = parts(x)
        if weight is not None:
            y = b.mul(y, over(next(given)))
        return y if bias is None else b.add(y, over(next(given)))

    def d_input(g: Value, y: Value, x: Value, *params: Value) -> Value:
        h = g if weight is None else b.mul(g, over(params[0]))
        n, scale = parts(x)
        dx = b.sub(h, b.mul(n, _mean(t, b.mul(h, n), axes)))
        if centered:
            dx = b.sub(dx, _mean(t, h, axes))
        return b.mul(dx, scale)

    def total(v: Value, like: Value) -> Value:
        v = b.reduce_sum(v, axes=summed) if summed else v
        return b.reshape(v, shape=like.type.shape)

    def d_weight(g: Value, y: Value, x: Value, *params: Value) -> Value:
        return total(b.mul(g, parts(x)[0]), params[0])

    def d_bias(g: Value, y: Value, x: Value, *params: Value) -> Value:
        return total(g, params[-1])

    inputs, backward = [x], [d_input]
    if weight is not None:
        inputs, backward = [*inputs, weight], [*backward, d_weight]
    if bias is not None:
        inputs, backward = [*inputs, bias], [*backward, d_bias]
    require_float(t, name, *inputs)
    return derived(t, name, inputs, forward, backward)


def _optional(t: Trace, x: Tensor | None) -> Value | None:
    return None if x is None else t.read(t.lift(x))


def _eps(t: Trace, eps: float, x: Value) -> Arg:
    return literal(eps, widen(t, x).type.dtype)


def _trailing(t: Trace, x: Value, normalized_shape: object, *params: Value | None) -> Ints:
    """The axes of the normalized shape, which must be the input's last ones and the parameters'."""
    sizes = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    rank = len(x.type.shape)
    if not sizes or x.type.shape[rank - len(sizes) :] != sizes:
        raise t.shape_error(
            f"Given normalized_shape={list(sizes)}, expected input with shape ending in it, but "
            f"got input of size{list(x.type.shape)}"
        )
    for p in params:
        if p is not None and p.type.shape != sizes:
            raise t.shape_error(
                f"Expected weight and bias to be of the same shape as normalized_shape, but got "
                f"{list(p.type.shape)} and normalized_shape = {list(sizes)}"
            )
    return tuple(range(rank - len(sizes), rank))


@rule(functional.layer_norm, torch.layer_norm)
def layer_norm(
    t: Trace,
    input: Tensor,
    normalized_shape: object,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-05,
    cudnn_enable: bool = True,
) -> TracedTensor:
    x, w, b = t.read(t.lift(input)), _optional(t, weight), _optional(t, bias)
    axes = _trailing(t, x, normalized_shape, w, b)
    _check_dtypes(t, x, w, b)
    shape = _kept(x, axes)
    return t.fresh(normalized(t, "layer_norm", x, w, b, axes, shape, _eps(t, eps, x)))


@rule(functional.rms_norm, torch.rms_norm)
def rms_norm(
    t: Trace,
    input: Tensor,
    normalized_shape: object,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> TracedTensor:
    """x / sqrt(mean(x²) + eps) · weight; eps is the dtype's own if not given."""
    x, w = t.read(t.lift(input)), _optional(t, weight)
    axes = _trailing(t, x, normalized_shape, w)
    require_float(t, "rms_norm", x)
    eps = torch.finfo(TO_TORCH[widen(t, x).type.dtype]).eps if eps is None else eps
    y = normalized(t, "rms_norm", x, w, None, axes, _kept(x, axes), _eps(t, eps, x), centered=False)
    return t.fresh(y)


def _kept(x: Value, axes: Ints) -> Ints:
    """x's shape at `axes`, 1 elsewhere."""
    return tuple(n if i in axes else 1 for i, n in enumerate(x.type.shape))


@rule(functional.group_norm, torch.group_norm)
def group_norm(
    t: Trace,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-05,
    cudnn_enabled: bool = True,
) -> TracedTensor:
    """Normalized over the channels of a group and all positions; parameters are per channel."""
    h, w, b = t.lift(input), _optional(t, weight), _optional(t, bias)
    x = t.read(h)
    shape = x.type.shape
    if len(shape) < 2 or num_groups <= 0 or shape[1] % num_groups:
        raise t.shape_error(
            "Expected number of channels in input to be divisible by num_groups, but got input of "
            f"shape {list(shape)} and num_groups={num_groups}"
        )
    _check_channels(t, shape[1], w, b)
    _check_dtypes(t, x, w, b)
    grouped = (shape[0], num_groups, shape[1] // num_groups, math.prod(shape[2:]))
    y = normalized(
        t,
        "group_norm",
        t.b.reshape(x, shape=grouped),
        w,
        b,
        (2, 3),
        (1, *grouped[1:3], 1),
        _eps(t, eps, x),
    )
    strides = like(h, shape) if h.device == "cpu" else None  # CUDA's result is row-major
    return t.fresh(t.b.reshape(y, shape=shape), strides)


def _check_channels(t: Trace, channels: int, *params: Value | None) -> None:
    for p in params:
        if p is not None and p.type.shape != (channels,):
            raise t.shape_error(
                f"expected weight, bias and running statistics to be vectors of {channels} "
                f"channels, but got shape {list(p.type.shape)}"
            )


def _check_dtypes(t: Trace, x: Value, *params: Value | None) -> None:
    """Weight, bias and running statistics have the input's dtype; or all are float32, where the
    input has 16 bits."""
    dtype, given = x.type.dtype, {p.type.dtype for p in params if p is not None}
    if given <= {dtype} or (dtype in (types.f16, types.bf16) and given == {types.f32}):
        return
    raise t.shape_error(
        f"expected weight, bias and running statistics of dtype {TO_TORCH[dtype]}, as the input, "
        f"but got {', '.join(sorted(str(TO_TORCH[d]) for d in given))}",
    )


def _update(t: Trace, running: Tensor | None, now: Value, momentum: float) -> None:
    """running = (1 - momentum)·running + momentum·now, in place."""
    if running is None:
        return
    h, b = t.lift(running), t.b
    with t.untaped():
        old, factor = widen(t, t.read(h)), literal(momentum, now.type.dtype)
        rest = literal(1.0 - momentum, now.type.dtype)
        new = b.add(b.mul(cast(t, old, now.type.dtype), rest), b.mul(now, factor))
        new = cast(t, new, h.dtype)
    t.write(h, new)


def _track(
    t: Trace,
    x: Value,
    axes: Ints,
    across: Ints,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
) -> None:
    """Update running statistics: mean and unbiased variance over `axes`, averaged `across`."""
    b, count = t.b, math.prod(x.type.shape[a] for a in axes)
    if running_mean is None and running_var is None or not count:  # torch leaves them then
        return
    with t.untaped():
        wide = widen(t, x)
        centred = b.sub(wide, _mean(t, wide, axes))
        squares = b.reduce_sum(b.mul(centred, centred), axes=axes)
        variance = b.div(squares, float(count - 1)) if count > 1 else b.div(squares, 0.0)
        mean = mean_of(t, wide, axes)
        if across:
            mean, variance = mean_of(t, mean, across), mean_of(t, variance, across)
    _update(t, running_mean, mean, momentum)
    _update(t, running_var, variance, momentum)


def _with_running(
    t: Trace,
    name: str,
    x: Value,
    running_mean: Tensor,
    running_var: Tensor,
    w: Value | None,
    b: Value | None,
    eps: Arg,
) -> Value:
    """(x - running mean) / sqrt(running variance + eps) · weight + bias, per channel (axis 1)."""
    shape, bd = x.type.shape, t.b
    param_shape = _kept(x, (1,))
    summed = tuple(i for i in range(len(shape)) if i != 1)

    def over(p: Value) -> Value:
        return expand(t, bd.reshape(p, shape=param_shape), shape)

    def scale(var: Value) -> Value:
        return over(bd.div(1.0, bd.sqrt(bd.add(var, eps))))

    def forward(x: Value, mean: Value, var: Value, *params: Value) -> Value:
        given = iter(params)
        y = bd.mul(bd.sub(x, over(mean)), scale(var))
        if w is not None:
            y = bd.mul(y, over(next(given)))
        return y if b is None else bd.add(y, over(next(given)))

    def d_input(g: Value, y: Value, x: Value, mean: Value, var: Value, *params: Value) -> Value:
        g = g if w is None else bd.mul(g, over(params[0]))
        return bd.mul(g, scale(var))

    def d_weight(g: Value, y: Value, x: Value, mean: Value, var: Value, *params: Value) -> Value:
        n = bd.mul(bd.sub(x, over(mean)), scale(var))
        return bd.reduce_sum(bd.mul(g, n), axes=summed)

    def d_bias(g: Value, y: Value, *rest: Value) -> Value:
        return bd.reduce_sum(g, axes=summed)

    mean, var = _optional(t, running_mean), _optional(t, running_var)
    inputs = [x, mean, var]
    backward = [d_input, no_derivative(t, name, "mean"), no_derivative(t, name, "var")]
    if w is not None:
        inputs, backward = [*inputs, w], [*backward, d_weight]
    if b is not None:
        inputs, backward = [*inputs, b], [*backward, d_bias]
    require_float(t, name, *inputs)
    return derived(t, name, inputs, forward, backward)


@rule(functional.batch_norm)
def batch_norm(
    t: Trace,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-05,
) -> TracedTensor:
    """Normalized over all axes but the channels, or by the running statistics."""
    h = t.lift(input)
    x, w, b = t.read(h), _optional(t, weight), _optional(t, bias)
    shape = x.type.shape
    if len(shape) < 2:
        raise AxisError(
            where=location.full(),
            reason=f"batch_norm needs an input of rank 2 or more, not {list(shape)}",
        )
    running = _optional(t, running_mean), _optional(t, running_var)
    _check_channels(t, shape[1], w, b, *running)
    _check_dtypes(t, x, w, b, *running)
    axes = tuple(i for i in range(len(shape)) if i != 1)
    if not training:
        if running_mean is None or running_var is None:
            raise t.shape_error("Expected running_mean and running_var to be defined in evaluation")
        y = _with_running(t, "batch_norm", x, running_mean, running_var, w, b, _eps(t, eps, x))
        return t.fresh(y, like(h, shape))
    if math.prod(shape[a] for a in axes) == 1:
        raise argument_error(
            t, f"Expected more than 1 value per channel when training, got input size {list(shape)}"
        )
    y = normalized(t, "batch_norm", x, w, b, axes, _kept(x, (1,)), _eps(t, eps, x))
    _track(t, x, axes, (), running_mean, running_var, momentum)
    return t.fresh(y, like(h, shape))


@rule(torch.batch_norm)
def _batch_norm_builtin(
    t: Trace,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> TracedTensor:
    return batch_norm(t, input, running_mean, running_var, weight, bias, training, momentum, eps)


@rule(functional.instance_norm)
def instance_norm(
    t: Trace,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-05,
) -> TracedTensor:
    """Normalized over the positions of each channel of each sample."""
    x, w, b = t.read(t.lift(input)), _optional(t, weight), _optional(t, bias)
    shape = x.type.shape
    if len(shape) < 2:
        raise t.shape_error(f"instance_norm needs an input of rank 2 or more, not {list(shape)}")
    running = _optional(t, running_mean), _optional(t, running_var)
    _check_channels(t, shape[1], w, b, *running)
    _check_dtypes(t, x, w, b)
    if not use_input_stats:
        if running_mean is None or running_var is None:
            raise t.shape_error(
                "Expected running_mean and running_var to be defined when use_input_stats is false"
            )
        y = _with_running(t, "instance_norm", x, running_mean, running_var, w, b, _eps(t, eps, x))
        return t.fresh(y)
    axes = tuple(range(2, len(shape)))
    if math.prod(shape[2:]) == 1:
        raise argument_error(
            t, f"Expected more than 1 spatial element when training, got input size {list(shape)}"
        )
    y = normalized(t, "instance_norm", x, w, b, axes, _kept(x, (1,)), _eps(t, eps, x))
    _track(t, x, axes, (0,), running_mean, running_var, momentum)
    return t.fresh(y)


@rule(torch.instance_norm)
def _instance_norm_builtin(
    t: Trace,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> TracedTensor:
    return instance_norm(
        t, input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )


@rule(torch._weight_norm)
def weight_norm(t: Trace, v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """v · g / ‖v‖, the norm over all axes but `dim` (over all, if it is -1)."""
    axes = [a for a in range(len(t.lift(v).shape)) if a != dim]
    norm = vector_norm(t, v, 2, axes, True)
    return mul(t, v, div(t, g, norm))
