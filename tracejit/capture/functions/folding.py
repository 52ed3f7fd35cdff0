"""Windows as columns and back, and channels traded for pixels: all of it moves elements only."""

from __future__ import annotations

import math

import torch

from tracejit.capture.functions.common import cast, normal_axis
from tracejit.capture.functions.derived import widen
from tracejit.capture.functions.layouts import like
from tracejit.capture.functions.windows import Windows, ints_of, summed, taps
from tracejit.capture.trace import location
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import Handle, Ints, Step, TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.errors import AxisError
from tracejit.ir.types import b1

Tensor = torch.Tensor
builtin = torch._C._nn

# ---- columns


def _windows(
    t: Trace, length: Ints, kernel_size: object, dilation: object, padding: object, stride: object
) -> Windows:
    """The windows of an image of this size, checked as eager checks them."""
    size, dilation, padding, stride = (
        ints_of(t, x, 2, name)
        for x, name in (
            (kernel_size, "kernel_size"),
            (dilation, "dilation"),
            (padding, "padding"),
            (stride, "stride"),
        )
    )
    if min(*size, *dilation, *stride) <= 0:
        raise t.shape_error("kernel size, dilation and stride should be greater than zero")
    if min(padding) < 0:
        raise t.shape_error(f"padding should be non-negative, but got {list(padding)}")
    rows = zip(length, size, dilation, padding, stride, strict=True)
    count = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, d, p, s in rows)
    if min(count) < 1:
        raise t.shape_error(
            f"Given input with spatial size {length}, kernel_size={size}, dilation={dilation}, "
            f"padding={padding}, calculated shape of the array of sliding blocks as {count}"
        )
    return Windows(size, stride, padding, dilation, length, count)


def _batched(t: Trace, h: Handle, rank: int) -> Ints:
    """The shape with a batch in front; what eager refuses raises."""
    if len(h.shape) < rank:
        raise AxisError(where=location.full(), reason="Dimension out of range")
    if len(h.shape) > rank + 1 or 0 in h.shape[-rank:]:
        raise t.shape_error(
            f"Expected {rank}D or {rank + 1}D (batch mode) tensor with possibly 0 batch size and "
            f"other non-zero dimensions for input, but got: {list(h.shape)}"
        )
    if not h.dtype.is_float and h.dtype is not b1:
        raise t.not_implemented("im2col", h.dtype)
    return h.shape if len(h.shape) > rank else (1, *h.shape)


@rule(builtin.im2col)
def im2col(
    t: Trace, input: Tensor, kernel_size: object, dilation: object, padding: object, stride: object
) -> TracedTensor:
    """x[N, C, *length] → [N, C * size of a window, number of windows]"""
    h = t.lift(input)
    n, channels, *length = _batched(t, h, 3)
    w = _windows(t, tuple(length), kernel_size, dilation, padding, stride)
    x = t.b.reshape(t.read(h), shape=(n, channels, *length))
    x = taps(t, x, w, False if h.dtype is b1 else 0)
    x = t.b.permute(x, axes=(0, 1, 4, 5, 2, 3))
    front = h.shape[:-3]
    shape = (*front, channels * math.prod(w.size), math.prod(w.count))
    return t.fresh(t.b.reshape(x, shape=shape))


@rule(builtin.col2im)
def col2im(
    t: Trace,
    input: Tensor,
    output_size: object,
    kernel_size: object,
    dilation: object,
    padding: object,
    stride: object,
) -> TracedTensor:
    """[N, C * size of a window, number of windows] → x[N, C, *output_size], sums where windows
    meet."""
    h = t.lift(input)
    n, rows, columns = _batched(t, h, 2)
    if h.dtype is b1:
        raise t.unsupported("Sums of bools have no rule here")
    length = ints_of(t, output_size, 2, "output_size")
    w = _windows(t, length, kernel_size, dilation, padding, stride)
    taken = math.prod(w.size)
    if rows % taken:
        raise t.shape_error(
            "Expected size of input's dimension 1 to be divisible by the product of kernel_size, "
            f"but got input.size(1)={rows} and kernel_size={w.size}"
        )
    if columns != math.prod(w.count):
        raise t.shape_error(
            f"Given output_size={length}, kernel_size={w.size}, expected size of input's dimension "
            f"2 to match the calculated number of sliding blocks {math.prod(w.count)}, but got "
            f"{columns}"
        )
    x = t.b.reshape(widen(t, t.read(h)), shape=(n, rows // taken, *w.size, *w.count))
    x = cast(t, summed(t, t.b.permute(x, axes=(0, 1, 4, 5, 2, 3)), w), h.dtype)
    return t.fresh(t.b.reshape(x, shape=(*h.shape[:-2], rows // taken, *length)))


@rule(Tensor.unfold)
def unfold(t: Trace, self: Tensor, dimension: int, size: int, step: int) -> TracedTensor:
    """A view of the windows along an axis, which becomes their number; their elements come last."""
    h = t.lift(self)
    axis = normal_axis(t, dimension, len(h.shape))
    n = h.shape[axis] if h.shape else 1
    if size < 0:
        raise t.shape_error(f"size is {size} but must be >= 0")
    if size > n:
        raise t.shape_error(
            f"maximum size for tensor at dimension {axis} is {n} but size is {size}"
        )
    if step <= 0:
        raise t.shape_error(f"step is {step} but must be > 0")
    if not h.shape or not size:
        raise t.unsupported("Windows of no elements, or of a tensor of no axes, have no rule")
    count, rank = (n - size) // step + 1, len(h.shape)
    shape = (*h.shape[:axis], count, *h.shape[axis + 1 :], size)
    strides = (*h.strides[:axis], h.strides[axis] * step, *h.strides[axis + 1 :], h.strides[axis])
    if size <= step and count * step <= n:  # they do not meet, and can be written to
        steps = (
            *_cut(h.shape, axis, count, step, size),
            ("permute", (("axes", _last(axis, rank)),)),
        )
    else:
        apart = (("axes", (axis, rank)), ("stride", step), ("dilation", 1), ("count", count))
        steps = (
            ("reshape", (("shape", (*h.shape, 1)),)),
            ("expand", (("shape", (*h.shape, size)),)),
            ("window", apart),
        )
    return t.view(h, steps, shape, strides, h.offset)


def _cut(shape: Ints, axis: int, count: int, step: int, size: int) -> tuple[Step, ...]:
    """The axis as windows and their elements, from windows that do not meet."""
    front, rest = shape[:axis], shape[axis + 1 :]
    wide, pairs, cut = (
        (*front, *n, *rest) for n in ((count * step,), (count, step), (count, size))
    )

    def first(stops: Ints) -> Step:
        ends = (("starts", (0,) * len(stops)), ("stops", stops), ("steps", (1,) * len(stops)))
        return "slice", ends

    return first(wide), ("reshape", (("shape", pairs),)), first(cut)


def _last(axis: int, rank: int) -> Ints:
    """The axis behind `axis` moved to the end."""
    return (*range(axis + 1), *range(axis + 2, rank + 1), axis + 1)


# ---- channels and pixels


def _per_pixel(t: Trace, h: Handle, factor: int, name: str) -> None:
    if len(h.shape) < 3:
        raise t.shape_error(
            f"{name} expects input to have at least 3 dimensions, but got {len(h.shape)}"
        )
    if factor <= 0:
        raise t.shape_error(f"{name} expects a positive factor, but got {factor}")
    _refuse_empty(t, h)


def _refuse_empty(t: Trace, h: Handle) -> None:
    """Eager returns such a tensor as it is, and has no gradient for it."""
    if not h.numel:
        raise t.unsupported("A tensor of no elements has no rule here")


@rule(torch.pixel_shuffle)
def pixel_shuffle(t: Trace, input: Tensor, upscale_factor: int) -> TracedTensor:
    """x[…, C * r * r, H, W] → […, C, H * r, W * r]"""
    h, r = t.lift(input), int(upscale_factor)
    _per_pixel(t, h, r, "pixel_shuffle")
    *front, channels, rows, columns = h.shape
    if channels % (r * r):
        raise t.shape_error(
            "pixel_shuffle expects its input's 'channel' dimension to be divisible by the square "
            f"of upscale_factor, but input.size(-3)={channels} is not divisible by {r * r}"
        )
    k = len(front)
    x = t.b.reshape(t.read(h), shape=(*front, channels // (r * r), r, r, rows, columns))
    x = t.b.permute(x, axes=(*range(k + 1), k + 3, k + 1, k + 4, k + 2))
    shape = (*front, channels // (r * r), rows * r, columns * r)
    return t.fresh(t.b.alias(t.b.reshape(x, shape=shape)), like(h, shape))


@rule(torch.pixel_unshuffle)
def pixel_unshuffle(t: Trace, input: Tensor, downscale_factor: int) -> TracedTensor:
    """x[…, C, H * r, W * r] → […, C * r * r, H, W]"""
    h, r = t.lift(input), int(downscale_factor)
    _per_pixel(t, h, r, "pixel_unshuffle")
    *front, channels, rows, columns = h.shape
    if rows % r or columns % r:
        raise t.shape_error(
            f"pixel_unshuffle expects height and width to be divisible by downscale_factor, but "
            f"{rows} × {columns} is not divisible by {r}"
        )
    k = len(front)
    x = t.b.reshape(t.read(h), shape=(*front, channels, rows // r, r, columns // r, r))
    x = t.b.permute(x, axes=(*range(k + 1), k + 2, k + 4, k + 1, k + 3))
    shape = (*front, channels * r * r, rows // r, columns // r)
    return t.fresh(t.b.alias(t.b.reshape(x, shape=shape)), like(h, shape))


@rule(torch.channel_shuffle)
def channel_shuffle(t: Trace, input: Tensor, groups: int) -> TracedTensor:
    """The first channel of each group, then the second of each, …"""
    h, groups = t.lift(input), int(groups)
    if len(h.shape) < 3:
        raise t.shape_error(f"channel_shuffle expects input with > 2 dims, not {list(h.shape)}")
    if groups <= 0:
        raise t.shape_error(f"Number of groups to divide channels in must be positive: {groups}")
    n, channels, *rest = h.shape
    if channels % groups:
        raise t.shape_error(
            "Number of channels must be divisible by groups. "
            f"Got {channels} channels and {groups} groups."
        )
    _refuse_empty(t, h)
    x = t.b.reshape(t.read(h), shape=(n, groups, channels // groups, *rest))
    x = t.b.permute(x, axes=(0, 2, 1, *range(3, len(x.type.shape))))
    return t.fresh(t.b.alias(t.b.reshape(x, shape=h.shape)), like(h, h.shape))
