"""Torch functions that ONNX has an operator of: what a trace knows of them, how they are written.

The IR has primitives only. So the trace is heard: of each call of such a function, a `Composite`
keeps the values that went in and the one that came out. Where a model needs that value, it is
written as the operator, and its primitives are left out unless something else reads them, as a
derivative may.

Only float32 and float64 are, and only what onnxruntime computes as eager does: the rest stays in
primitives, whose meaning is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import field
from functools import partial
from inspect import signature

import numpy as np
import torch
import torch.nn.functional as F

from tracejit.capture.functions.convolution import Convolution
from tracejit.capture.trace.trace import Trace
from tracejit.export.onnx.writer import Writer, held
from tracejit.ir.graph import Value
from tracejit.ir.types import f32, f64
from tracejit.records import dataclass

Tensor = torch.Tensor


@dataclass(frozen=True)
class Composite:
    """A call of a torch function: the operator, its operands in ONNX's order, and attributes."""

    kind: str
    out: Value
    operands: tuple[Value | None, ...]
    attrs: dict[str, object] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[Value, ...]:
        return tuple(x for x in self.operands if x is not None)


Found = tuple[str, tuple[Tensor | None, ...], dict[str, object]]


# ---- which calls are operators


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Found | None:
    return ("Gemm", (input, weight, bias), {}) if weight.dim() == 2 <= input.dim() else None


def _of_axis(kind: str) -> Callable:
    def found(input: Tensor, dim=None, _stacklevel=3, dtype=None) -> Found | None:
        if not isinstance(dim, int) or not input.dim() or dtype not in (None, input.dtype):
            return None
        return kind, (input,), {"axis": dim % input.dim()}

    return found


def _layer_norm(
    input: Tensor, normalized_shape, weight=None, bias=None, eps: float = 1e-5, cudnn_enable=True
) -> Found | None:
    if input.dtype is not torch.float32:  # the operator computes in float32
        return None
    return "LayerNormalization", (input, weight, bias), _norm(len(normalized_shape), eps)


def _norm(axes: int, eps: float) -> dict[str, object]:
    return {"axis": -axes, "epsilon": float(eps)}


def _gelu(input: Tensor, *, approximate: str = "none") -> Found | None:
    return (
        ("Gelu", (input,), {"approximate": approximate}) if input.dtype is torch.float32 else None
    )


def _unary(kind: str) -> Callable:
    def found(input: Tensor, inplace: bool = False) -> Found | None:
        return kind, (input,), {}

    return found


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx=None,
    max_norm=None,
    norm_type=2.0,
    scale_grad_by_freq=False,
    sparse=False,
) -> Found | None:
    return ("Gather", (weight, input), {"axis": 0}) if max_norm is None else None


def _several(x: object, rank: int) -> list[int]:
    found = [*x] if isinstance(x, (tuple, list)) else [x]
    return found * rank if len(found) == 1 else found


def _convolution(rank: int) -> Callable:
    def found(
        input: Tensor, weight: Tensor, bias=None, stride=1, padding=0, dilation=1, groups=1
    ) -> Found | None:
        if input.dim() != rank + 2 or input.dtype is not torch.float32 or not input.numel():
            return None
        dilation = _several(dilation, rank)
        size = weight.shape[2:]
        if padding == "valid":
            pads = [0] * (2 * rank)
        elif padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, size, strict=True)]
            pads = [n // 2 for n in total] + [n - n // 2 for n in total]
        else:
            pads = _several(padding, rank) * 2
        attrs = {"strides": _several(stride, rank), "pads": pads, "dilations": dilation}
        attrs |= {"group": groups, "kernel_shape": [*size]}
        return "Conv", (input, weight, bias), attrs

    return found


def _images(c: Convolution) -> dict[str, object] | None:
    """The attributes of Conv for the product of images and weights."""
    w, pads = c.windows, _reach(c)
    rows = zip(w.length, w.low, pads, w.dilation, w.size, w.stride, w.count, strict=True)
    fits = all((n + p + h - d * (k - 1) - 1) // s + 1 == o for n, p, h, d, k, s, o in rows)
    attrs = {"strides": w.stride, "dilations": w.dilation, "pads": (*w.low, *pads)}
    return attrs | {"group": c.groups, "kernel_shape": w.size} if fits else None


def _of_images(c: Convolution) -> dict[str, object] | None:
    """The attributes of ConvTranspose for the gradient of images, where there are such."""
    w, pads = c.windows, _reach(c)
    rows = zip(w.length, w.low, w.span, strict=True)
    beyond = [max(n + p - span, 0) for n, p, span in rows]
    attrs = {"strides": w.stride, "dilations": w.dilation, "pads": (*w.low, *pads)}
    attrs |= {"group": c.groups, "kernel_shape": w.size, "output_padding": beyond}
    return attrs if all(n < s for n, s in zip(beyond, w.stride, strict=True)) else None


def _of_weights(c: Convolution) -> dict[str, object] | None:
    """The attributes of Conv for the gradient of weights: what was the step from window to window
    is now that from tap to tap."""
    w = c.windows
    attrs = {"strides": w.dilation, "dilations": w.stride, "pads": (*w.low, *_reach(c))}
    return attrs | {"group": c.groups, "kernel_shape": w.count}


def _reach(c: Convolution) -> tuple[int, ...]:
    """How far windows reach beyond the last element."""
    rows = zip(c.windows.span, c.windows.low, c.windows.length, strict=True)
    return tuple(max(span - low - n, 0) for span, low, n in rows)


_PRODUCTS = {
    **{"images": _images, "gradient of images": _of_images},
    "gradient of weights": _of_weights,
}


def _batch_norm(
    input: Tensor,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    cudnn_enabled=True,
) -> Found | None:
    if training or running_mean is None or running_var is None or input.dim() < 2:
        return None
    operands = input, weight, bias, running_mean, running_var
    return "BatchNormalization", operands, {"epsilon": float(eps)}


def _max_pool(rank: int) -> Callable:
    def found(
        input: Tensor,
        kernel_size,
        stride=None,
        padding=0,
        dilation=1,
        ceil_mode=False,
        return_indices=False,
    ) -> Found | None:
        if input.dim() != rank + 2 or ceil_mode or return_indices:
            return None
        attrs = _pooled(rank, kernel_size, stride, padding)
        return "MaxPool", (input,), attrs | {"dilations": _several(dilation, rank)}

    return found


def _avg_pool(rank: int) -> Callable:
    def found(
        input: Tensor,
        kernel_size,
        stride=None,
        padding=0,
        ceil_mode=False,
        count_include_pad=True,
        divisor_override=None,
    ) -> Found | None:
        if input.dim() != rank + 2 or ceil_mode or divisor_override is not None:
            return None
        if input.dtype is not torch.float32:
            return None
        attrs = _pooled(rank, kernel_size, stride, padding)
        return "AveragePool", (input,), attrs | {"count_include_pad": int(count_include_pad)}

    return found


def _pooled(rank: int, size: object, stride: object, padding: object) -> dict[str, object]:
    sizes = _several(size, rank)
    steps = sizes if stride is None or stride in ((), []) else _several(stride, rank)
    return {"kernel_shape": sizes, "strides": steps, "pads": _several(padding, rank) * 2}


COMPOSITES: dict[Callable, Callable[..., Found | None]] = {
    **{F.linear: _linear, F.softmax: _of_axis("Softmax"), F.gelu: _gelu},
    **{torch.softmax: _of_axis("Softmax"), Tensor.softmax: _of_axis("Softmax")},
    **{F.log_softmax: _of_axis("LogSoftmax"), torch.log_softmax: _of_axis("LogSoftmax")},
    Tensor.log_softmax: _of_axis("LogSoftmax"),
    **{F.layer_norm: _layer_norm, torch.layer_norm: _layer_norm},
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu, Tensor.relu_, F.relu_), _unary("Relu")),
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid, F.sigmoid), _unary("Sigmoid")),
    **{F.embedding: _embedding, F.batch_norm: _batch_norm, torch.batch_norm: _batch_norm},
    **{torch.conv1d: _convolution(1), torch.conv2d: _convolution(2)},
    torch.conv3d: _convolution(3),
    **{F.max_pool1d: _max_pool(1), F.max_pool2d: _max_pool(2), F.max_pool3d: _max_pool(3)},
    **{torch.max_pool1d: _max_pool(1), torch.max_pool2d: _max_pool(2)},
    **{torch.max_pool3d: _max_pool(3), F.avg_pool1d: _avg_pool(1)},
    **{F.avg_pool2d: _avg_pool(2), F.avg_pool3d: _avg_pool(3)},
}


# ---- hearing them


class Listener:
    """Hears the torch calls of one trace, and the products of its convolutions."""

    def __init__(self) -> None:
        self.found: dict[Value, Composite] = {}

    def of(self, t: Trace) -> None:
        """Have the trace tell of its calls."""
        self.trace = t
        t.on_call, t.on_product = partial(self._called, t), self._multiplied

    def _called(self, t: Trace, func: Callable, args: tuple, kwargs: dict) -> Callable | None:
        rule = COMPOSITES.get(func)
        if rule is None:
            return None
        try:
            signature(rule).bind(*args, **kwargs)
        except TypeError:
            return None
        known = rule(*args, **kwargs)
        if known is None:
            return None
        kind, operands, attrs = known
        given = (*args, *kwargs.values())
        if not all(x is None or any(x is y for y in given) for x in operands):
            return None
        values = tuple(None if x is None else t.read(t.lift(x)) for x in operands)
        return lambda result: self._note(kind, t.read(t.lift(result)), values, attrs)

    def _multiplied(self, name: str, out: Value, operands: tuple, convolution: Convolution) -> None:
        attrs = _PRODUCTS[name](convolution)
        if attrs is not None and out.type.dtype is f32:
            self._note(name, out, operands, attrs)

    def _note(
        self, kind: str, out: Value, operands: tuple[Value | None, ...], attrs: dict[str, object]
    ) -> None:
        index = operands[1] if kind == "Gather" else None
        kinds = {x.type.dtype for x in (out, *operands) if x is not None and x is not index}
        if kinds in ({f32}, {f64}) and out.type.numel and out not in operands:
            self.found[out] = Composite(kind, out, operands, attrs)


# ---- writing them


def written(w: Writer, composite: Composite, names: Sequence[str | None]) -> str:
    """The operator of a composite, of these operands."""
    kind, attrs = composite.kind, composite.attrs
    x, *rest = composite.operands
    if kind == "Gemm":
        return _written_linear(w, composite, names)
    if kind in _PRODUCTS:
        return _written_product(w, composite, names)
    if kind == "MaxPool":
        return _written_max_pool(w, names[0], held(x.type.dtype), attrs)
    given = [*names]
    if kind in ("LayerNormalization", "BatchNormalization"):
        axes = x.type.shape[attrs["axis"] :] if "axis" in attrs else x.type.shape[1:2]
        for k, value in ((1, 1), (2, 0)):  # the scale and the shift
            if given[k] is None and (k == 1 or kind == "BatchNormalization"):
                given[k] = w.constant([value] * math.prod(axes), held(x.type.dtype))
                given[k] = w.reshape(given[k], axes)
    while given[-1] is None:
        given.pop()
    return getattr(w, kind)(*given, **attrs)


def _written_linear(w: Writer, composite: Composite, names: Sequence[str | None]) -> str:
    """Gemm of a matrix; MatMul of what has more axes."""
    x, weight, bias = names
    shape = composite.out.type.shape
    if len(shape) == 2:
        return w.Gemm(x, weight, *([] if bias is None else [bias]), transB=1)
    found = w.MatMul(x, w.Transpose(weight, perm=[1, 0]))
    return found if bias is None else w.Add(found, bias)


def _written_max_pool(w: Writer, x: str, dtype: np.dtype, attrs: dict[str, object]) -> str:
    """MaxPool, and what onnxruntime's drops: NaN, and -inf where there is nothing else."""

    def any_of(flags: str) -> str:
        pooled = w.MaxPool(w.cast(flags, dtype), **attrs)
        return w.Greater(pooled, w.constant(0, dtype))

    missing = w.IsNaN(x)
    finite = any_of(w.Not(w.Or(missing, w.IsInf(x, detect_positive=0))))
    found = w.Where(finite, w.MaxPool(x, **attrs), w.constant(-np.inf, dtype))
    return w.Where(any_of(missing), w.constant(np.nan, dtype), found)


def _written_product(w: Writer, composite: Composite, names: Sequence[str]) -> str:
    """Conv and ConvTranspose. The gradient of weights is a Conv of images whose channels are those
    of the batch, with the gradient as weights."""
    attrs = composite.attrs
    if composite.kind != "gradient of weights":
        operator = w.Conv if composite.kind == "images" else w.ConvTranspose
        return operator(*names, **attrs)
    g, x = names
    images, groups = composite.operands[1].type.shape, attrs["group"]
    batch, channels, *length = images
    rank = len(length)
    rest, of_group = range(3, 3 + rank), channels // groups
    x = w.reshape(x, (batch, groups, of_group, *length))
    x = w.reshape(w.Transpose(x, perm=(2, 1, 0, *rest)), (of_group, groups * batch, *length))
    g = w.Transpose(g, perm=(1, 0, *range(2, 2 + rank)))
    found = w.Transpose(w.Conv(x, g, **attrs), perm=(1, 0, *range(2, 2 + rank)))
    size = composite.out.type.shape[2:]
    axes = w.ints(*range(2, 2 + rank))
    return w.Slice(found, w.ints(*(0,) * rank), w.ints(*size), axes)
