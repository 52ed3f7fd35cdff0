"""Fake quantization: numbers rounded to a grid of integers and back, as training for it does.

torch computes in float32, with the scale and its inverse rounded to it; of float64 the place on the
grid is found in float64, and by channels the result too. The gradient passes where the number falls
into the grid; a scale has none.
"""

from __future__ import annotations

import math

import torch

from tracejit.capture.functions.common import kept_strides, normal_axis
from tracejit.capture.functions.composites import composed
from tracejit.capture.functions.derived import derived, require_float
from tracejit.capture.functions.loss import constant_weight
from tracejit.capture.trace.bounds import within
from tracejit.capture.trace.tensor import TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Value
from tracejit.ir.types import bf16, f16, f32, i32

Tensor = torch.Tensor
_OUTSIDE = "`zero_point` must be between `quant_min` and `quant_max`."


def _on_grid(
    t: Trace,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    low: int,
    high: int,
    *,
    channels: bool = False,
) -> TracedTensor:
    """(clamp(round(x/s) + z) - z)·s of float32 scales and zero points that broadcast with x.
    Of `channels` torch makes an int64 of the place on the way, too large ones being the lowest."""
    h = t.lift(input)
    require_float(t, "fake_quantize", t.read(h))
    with torch.no_grad():
        wide = input.float() if h.dtype.narrow else input
        place = zero_point + torch.round(wide * scale.reciprocal())
        if channels:
            place = torch.where(place < 2.0**63, place, -math.inf)
        kept = (place >= low) & (place <= high)
        place = torch.fmin(torch.fmax(place, place.new_tensor(low)), place.new_tensor(high))
        steps = place - zero_point
        found = (steps if channels else steps.float()) * scale
    y, inside = t.read(t.lift(found)), t.read(t.lift(kept))

    def slope(g: Value, y: Value, x: Value) -> Value:
        return t.b.where(inside, g, 0.0)

    out = derived(t, "fake_quantize", (t.read(h),), lambda x: y, (slope,), flat=True)
    return t.fresh(out, kept_strides(h))


def _check_range(t: Trace, low: int, high: int) -> None:
    if low > high:
        raise t.shape_error("`quant_min` should be less than or equal to `quant_max`.")


@composed(torch.fake_quantize_per_tensor_affine, kernel=True)
def fake_quantize_per_tensor_affine(
    t: Trace,
    input: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
) -> TracedTensor:
    """One scale, as a number or as a tensor of one element."""
    _check_range(t, quant_min, quant_max)
    if isinstance(scale, Tensor) and isinstance(zero_point, Tensor):
        constant_weight(t, "fake_quantize_per_tensor_affine", scale, "scale")
        one = [x.reshape(()) for x in (scale, zero_point)]
        scale, zero_point = one[0].float(), one[1].long().float()
    elif isinstance(scale, Tensor) or isinstance(zero_point, Tensor):
        raise t.unsupported("Pass both the scale and the zero point as tensors, or neither")
    else:
        if not quant_min <= zero_point <= quant_max:
            raise t.shape_error(_OUTSIDE)
        scale, zero_point = (torch.tensor(x, dtype=torch.float32) for x in (scale, zero_point))
    return _on_grid(t, input, scale, zero_point, quant_min, quant_max)


@composed(torch.fake_quantize_per_channel_affine, kernel=True)
def fake_quantize_per_channel_affine(
    t: Trace,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int,
    quant_min: int,
    quant_max: int,
) -> TracedTensor:
    """A scale and a zero point for each index along an axis."""
    constant_weight(t, "fake_quantize_per_channel_affine", scale, "scale")
    _check_range(t, quant_min, quant_max)
    shape, s, z = t.lift(input).shape, t.lift(scale), t.lift(zero_point)
    if s.dtype is bf16:
        raise t.unsupported("Scales in bfloat16 have no rule; make them float32")
    if s.dtype is not f32:
        raise t.shape_error(f"Scale must be Float or BFloat16, found {scale.dtype}")
    if z.dtype in (f32, f16):
        raise t.unsupported("Zero points that are floats have no rule; make them int32")
    if z.dtype is not i32:
        raise t.shape_error(f"Zero-point must be Int32, Float or Half, found {zero_point.dtype}")
    if len(s.shape) != 1 or len(z.shape) != 1:
        raise t.shape_error("scale and zero point need to be a 1-D tensor")
    normal_axis(t, axis, len(shape))
    if axis < 0:
        raise t.shape_error("`axis` must be between 0 and number of dimensions of input")
    if s.shape != z.shape or s.shape[0] != shape[axis]:
        raise t.shape_error("dimensions of scale and zero-point are not consistent with input")
    within(t, zero_point, quant_min, quant_max + 1, t.shape_error(_OUTSIDE))
    along = [-1 if i == axis else 1 for i in range(len(shape))]
    places = [x.float().view(along) for x in (scale, zero_point)]
    return _on_grid(t, input, *places, quant_min, quant_max, channels=True)
