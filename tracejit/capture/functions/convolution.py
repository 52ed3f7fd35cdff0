"""Convolution and its transpose in one to three dimensions.

All three products of a convolution (of images and weights, the gradient of the images, that of the
weights) are one contraction over sliding windows; each is linear in both operands, and the other
two are its derivatives, so that second derivatives follow.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from tracejit.capture.functions.common import cast, expand
from tracejit.capture.functions.derived import underived, widen
from tracejit.capture.functions.layouts import image_strides
from tracejit.capture.functions.windows import (
    Windows,
    in_turn,
    ints_of,
    phases,
    placed,
    readers,
    taps,
)
from tracejit.capture.trace.table import RULES, Rule, family_of
from tracejit.capture.trace.tensor import TO_TORCH, Handle, Ints, TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Value
from tracejit.ir.types import b1, i64
from tracejit.records import dataclass

Tensor = torch.Tensor

MOST_PHASES = 16  # of strided windows, whose images' gradients are products of their own


@dataclass(frozen=True, slots=True)
class Convolution:
    """x[N, C, *length], w[O, C / groups, *size] → y[N, O, *count]."""

    windows: Windows
    groups: int

    def product(self, t: Trace, x: Value, w: Value) -> Value:
        """y, the images x through the weights w."""

        def vjp(b, cts, need):
            (g,) = cts
            yield self.of_images(t, g, w) if need[0] else None
            yield self.of_weights(t, g, x) if need[1] else None

        with t.untaped():
            a, b = self._weights(t, w), self._grouped(t, taps(t, x, self.windows, 0))
            rank = self.windows.rank
            found = _contract(t, a, _taps_first(t, b, rank), 1 + rank)
            y = self._images(t, found)
        t.product("images", (x, w), y, self)
        return t.derive("convolution", (x, w), y, vjp)

    def of_images(self, t: Trace, g: Value, w: Value) -> Value:
        """The gradient of x, given that of y: also the transposed convolution of g."""

        def vjp(b, cts, need):
            (h,) = cts
            yield self.product(t, h, w) if need[0] else None
            yield self.of_weights(t, g, h) if need[1] else None

        with t.untaped():
            x = self._of_apart(t, g, w) if self.windows.apart else self._of_images(t, g, w)
        t.product("gradient of images", (g, w), x, self)
        return t.derive("convolution_backward", (g, w), x, vjp)

    def of_weights(self, t: Trace, g: Value, x: Value) -> Value:
        """The gradient of w, given that of y."""

        def vjp(b, cts, need):
            (h,) = cts
            yield self.product(t, x, h) if need[0] else None
            yield self.of_images(t, g, h) if need[1] else None

        with t.untaped():
            a, b = self._grouped(t, g), self._grouped(t, taps(t, x, self.windows, 0))
            rank = self.windows.rank
            a = t.b.permute(a, axes=(1, 2, 0, *range(3, 3 + rank)))
            b = t.b.permute(b, axes=(1, 0, *range(3, 3 + rank), 2, *range(3 + rank, 3 + 2 * rank)))
            w = _contract(t, a, b, 1 + rank)
            shape = w.type.shape
            w = t.b.reshape(w, shape=(shape[0] * shape[1], *shape[2:]))
        t.product("gradient of weights", (g, x), w, self)
        return t.derive("convolution_backward", (g, x), w, vjp)

    def _weights(self, t: Trace, w: Value) -> Value:
        """w[groups, O / groups, C / groups, *size]"""
        out, *rest = w.type.shape
        return t.b.reshape(w, shape=(self.groups, out // self.groups, *rest))

    def _grouped(self, t: Trace, x: Value) -> Value:
        """x[N, groups, channels of a group, …]"""
        n, channels, *rest = x.type.shape
        return t.b.reshape(x, shape=(n, self.groups, channels // self.groups, *rest))

    def _images(self, t: Trace, y: Value) -> Value:
        """[groups, channels of a group, N, …] → [N, channels, …]"""
        groups, channels, n, *rest = y.type.shape
        y = t.b.permute(y, axes=(2, 0, 1, *range(3, len(y.type.shape))))
        return t.b.reshape(y, shape=(n, groups * channels, *rest))

    def _of_images(self, t: Trace, g: Value, w: Value) -> Value:
        """`of_images` from the windows that read each element: for the elements at each remainder
        of the stride apart, since other taps read them."""
        w, strides = self._weights(t, w), math.prod(self.windows.stride)
        if strides == 1 or strides > MOST_PHASES:
            return self._of_readers(t, g, w, self.windows)
        parts = []
        for phase in phases(self.windows):
            stops, one = w.type.shape[:3], (1,) * 3
            starts, steps = (0, 0, 0, *phase.starts), (*one, *phase.steps)
            taken = t.b.slice(w, starts=starts, stops=(*stops, *phase.stops), steps=steps)
            parts.append((phase, self._of_readers(t, g, taken, phase.windows)))
        return in_turn(t, parts, self.windows)

    def _of_readers(self, t: Trace, g: Value, w: Value, windows: Windows) -> Value:
        """The gradient of what windows read, from the weights of their taps."""
        rank = windows.rank
        a = t.b.permute(w, axes=(0, 2, 1, *range(3, 3 + rank)))
        b = self._grouped(t, readers(t, g, windows))
        return self._images(t, _contract(t, a, _taps_first(t, b, rank), 1 + rank))

    def _of_apart(self, t: Trace, g: Value, w: Value) -> Value:
        """`of_images` for windows that do not meet: one product for each tap, put where it reads;
        nothing is multiplied by zeros."""
        rank, size = self.windows.rank, self.windows.size
        groups, out, channels, *_ = (a := self._weights(t, w)).type.shape
        a = t.b.permute(a, axes=(0, 2, *range(3, 3 + rank), 1))
        a = t.b.reshape(a, shape=(groups, channels * math.prod(size), out))
        b = t.b.permute(self._grouped(t, g), axes=(1, 2, 0, *range(3, 3 + rank)))
        x = _contract(t, a, b, 1)
        n, *places = b.type.shape[2:]
        x = t.b.reshape(x, shape=(groups, channels, *size, n, *places))
        of_taps, of_places = range(2, 2 + rank), range(3 + rank, 3 + 2 * rank)
        x = t.b.permute(x, axes=(2 + rank, 0, 1, *of_places, *of_taps))
        x = t.b.reshape(x, shape=(n, groups * channels, *places, *size))
        return placed(t, x, self.windows)


def _taps_first(t: Trace, x: Value, rank: int) -> Value:
    """x[N, groups, channels, *places, *taps] → [groups, channels, *taps, N, *places]"""
    places, of_taps = range(3, 3 + rank), range(3 + rank, 3 + 2 * rank)
    return t.b.permute(x, axes=(1, 2, *of_taps, 0, *places))


def _contract(t: Trace, a: Value, b: Value, over: int) -> Value:
    """a[groups, m, *k], b[groups, *k, *n] → [groups, m, *n], summed over the `over` axes k.

    A vector times a matrix is a product and a sum: no panel of a matrix product would be full.
    """
    groups, m, *k = a.type.shape
    n = b.type.shape[1 + over :]
    if m == 1 and a.type.dtype.is_float:
        dtype, axes = a.type.dtype, tuple(range(1, 1 + over))
        a, b = widen(t, a), widen(t, b)
        a = t.b.reshape(a, shape=(groups, *k, *(1,) * len(n)))
        found = t.b.reduce_sum(t.b.mul(expand(t, a, b.type.shape), b), axes=axes)
        return cast(t, t.b.reshape(found, shape=(groups, 1, *n)), dtype)
    depth = math.prod(k)
    a = t.b.reshape(a, shape=(groups, m, depth))
    b = t.b.reshape(b, shape=(groups, depth, math.prod(n)))
    return t.b.reshape(t.b.matmul(a, b), shape=(groups, m, *n))


# ---- torch's functions


def _conv(rank: int):
    """torch.conv1d, conv2d, conv3d."""

    def rule(
        t: Trace,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: object = 1,
        padding: object = 0,
        dilation: object = 1,
        groups: int = 1,
    ) -> TracedTensor:
        x, w = t.lift(input), t.lift(weight)
        _check(t, rank, x, w, bias, groups)
        image = x.shape[-rank:]
        size = w.shape[2:]
        stride = _positive(t, stride, rank, "stride")
        dilation = _positive(t, dilation, rank, "dilation")
        low, high = _padding(t, padding, size, stride, dilation)
        if x.shape[-rank - 1] != w.shape[1] * groups or w.shape[0] % groups:
            raise t.shape_error(
                f"Given groups={groups}, weight of size {list(w.shape)}, expected input "
                f"{list(x.shape)} to have {w.shape[1] * groups} channels"
            )
        _check_bias(t, bias, w.shape[0])
        spans = [d * (k - 1) + 1 for d, k in zip(dilation, size, strict=True)]
        padded = [n + a + b for n, a, b in zip(image, low, high, strict=True)]
        if any(n < k for n, k in zip(padded, spans, strict=True)):
            raise t.shape_error(
                f"Calculated padded input size per channel: {padded}. Kernel size: {list(size)}. "
                "Kernel size can't be greater than actual input size"
            )
        count = tuple((n - k) // s + 1 for n, k, s in zip(padded, spans, stride, strict=True))
        c = Convolution(Windows(size, stride, low, dilation, image, count), groups)
        return _finished(t, c.product, x, w, bias, rank)

    return rule


def _conv_transpose(rank: int):
    """torch.conv_transpose1d, 2d, 3d: what a convolution does to the gradient of its images."""

    def rule(
        t: Trace,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: object = 1,
        padding: object = 0,
        output_padding: object = 0,
        groups: int = 1,
        dilation: object = 1,
    ) -> TracedTensor:
        x, w = t.lift(input), t.lift(weight)
        _check(t, rank, x, w, bias, groups)
        if not x.dtype.is_float and x.dtype is not i64:
            raise t.not_implemented(f"slow_conv_transpose{rank}d", x.dtype)
        if x.shape[-rank - 1] != w.shape[0] or w.shape[0] % groups:
            raise t.shape_error(
                f"Given transposed=1, weight of size {list(w.shape)}, expected input "
                f"{list(x.shape)} to have {w.shape[0]} channels"
            )
        _check_bias(t, bias, w.shape[1] * groups)
        size = w.shape[2:]
        stride = _positive(t, stride, rank, "stride")
        dilation = _positive(t, dilation, rank, "dilation")
        low = _positive(t, padding, rank, "padding", least=0)
        more = _positive(t, output_padding, rank, "output_padding", least=0)
        rows = zip(more, stride, dilation, strict=True)
        if any(n >= s and n >= d for n, s, d in rows):
            raise t.shape_error("output padding must be smaller than either stride or dilation")
        count = x.shape[-rank:]
        rows = zip(count, stride, dilation, size, low, more, strict=True)
        length = tuple((n - 1) * s + d * (k - 1) + 1 - 2 * p + m for n, s, d, k, p, m in rows)
        if any(n < 0 for n in length):
            raise t.shape_error(
                f"Given input size per channel: {list(count)}. Calculated output size per channel: "
                f"{list(length)}. Output size is too small"
            )
        if 0 in length:
            raise t.unsupported(
                "Whether a transposed convolution without a result is an error depends on the "
                "library that torch takes for it"
            )
        c = Convolution(Windows(size, stride, low, dilation, length, count), groups)
        return _finished(t, c.of_images, x, w, bias, rank)

    return rule


def _finished(
    t: Trace, product: object, x: Handle, w: Handle, bias: Tensor | None, rank: int
) -> TracedTensor:
    """The product of a batch or of one image, with the bias of its channels."""
    alone = len(x.shape) == rank + 1
    images = t.read(x)
    if alone:
        images = t.b.reshape(images, shape=(1, *x.shape))
    y = product(t, images, t.read(w))
    if bias is not None:
        value = t.read(t.lift(bias))
        value = t.b.reshape(value, shape=(1, value.type.numel, *(1,) * rank))
        y = t.b.add(y, expand(t, value, y.type.shape))
    shape = y.type.shape
    given = x.strides if not alone else (x.strides[0] * x.shape[0], *x.strides)
    sources = [((1, *x.shape) if alone else x.shape, given), (w.shape, w.strides)]
    strides = image_strides(shape, sources) if rank > 1 else None
    if alone:
        y = t.b.reshape(y, shape=shape[1:])
        strides = None if strides is None else strides[1:]
    return t.fresh(y, strides)


def _check(t: Trace, rank: int, x: Handle, w: Handle, bias: Tensor | None, groups: int) -> None:
    if len(w.shape) != rank + 2 or len(x.shape) not in (rank + 1, rank + 2):
        raise t.shape_error(
            f"Expected {rank + 1}D (unbatched) or {rank + 2}D (batched) input to conv{rank}d, and "
            f"a weight of {rank + 2} dimensions, but got input of size: {list(x.shape)} and weight "
            f"of size: {list(w.shape)}"
        )
    _check_alike(t, [x, w] if bias is None else [x, w, t.lift(bias)])
    if x.dtype is b1:
        raise t.not_implemented("convolution", b1)
    if groups <= 0:
        raise t.shape_error("non-positive groups is not supported")
    if 0 in w.shape or 0 in x.shape[-rank:] or 0 in x.shape[-rank - 1 : -rank]:
        raise t.unsupported("A convolution of no channels or no elements has no rule")


def _check_alike(t: Trace, handles: list[Handle]) -> None:
    if len({h.dtype for h in handles}) > 1:
        names = ", ".join(str(TO_TORCH[h.dtype]) for h in handles)
        raise t.shape_error(f"Input, weight and bias should have one type, but got {names}")
    if len({h.device for h in handles}) > 1:
        raise t.shape_error("Expected input, weight and bias to be on the same device")


def _check_bias(t: Trace, bias: Tensor | None, channels: int) -> None:
    if bias is not None and t.lift(bias).shape != (channels,):
        raise t.shape_error(
            f"expected bias to be 1-dimensional with {channels} elements, but got bias of size "
            f"{list(t.lift(bias).shape)}"
        )


def _positive(t: Trace, given: object, rank: int, name: str, *, least: int = 1) -> Ints:
    found = ints_of(t, given, rank, name)
    if any(n < least for n in found):
        raise t.shape_error(f"{name} of {list(found)} is not supported")
    return found


def _padding(
    t: Trace, padding: object, size: Ints, stride: Ints, dilation: Ints
) -> tuple[Ints, Ints]:
    """The padding before and after; "same" puts what is odd after."""
    if padding == "valid":
        return (0,) * len(size), (0,) * len(size)
    if padding == "same":
        if set(stride) != {1}:
            raise t.shape_error("padding='same' is not supported for strided convolutions")
        total = [d * (k - 1) for d, k in zip(dilation, size, strict=True)]
        return tuple(n // 2 for n in total), tuple(n - n // 2 for n in total)
    if isinstance(padding, str):
        raise t.shape_error(f"Invalid padding string: {padding!r}")
    both = _positive(t, padding, len(size), "padding", least=0)
    return both, both


def _convolution(
    t: Trace,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: object,
    padding: object,
    dilation: object,
    transposed: bool,
    output_padding: object,
    groups: int,
) -> TracedTensor:
    """torch.convolution: one of the six, by the dimensions of the weight; of batches alone."""
    x, w = t.lift(input), t.lift(weight)
    rank = len(w.shape) - 2
    if rank not in _PLAIN or len(x.shape) != rank + 2:
        raise t.shape_error(
            f"Expected {rank + 2}-dimensional input for {rank + 2}-dimensional weight "
            f"{list(w.shape)}, but got {len(x.shape)}-dimensional input of size {list(x.shape)} "
            "instead"
        )
    given = (stride, padding, dilation, output_padding)
    if not all(isinstance(ints, (tuple, list)) for ints in given):
        raise TypeError("stride, padding, dilation and output_padding must be tuples of ints")
    if transposed:
        rule = _TRANSPOSED[rank]
        return rule(t, input, weight, bias, stride, padding, output_padding, groups, dilation)
    plain = partial(_PLAIN[rank], t, input, weight, bias, stride, padding, dilation, groups)
    if not any(more := _positive(t, output_padding, rank, "output_padding", least=0)):
        return plain()
    with t.untaped():  # eager takes it and ignores it, until a backward comes
        y = t.lift(plain())
    reason = "output_padding is not supported for non-transposed convolutions; got: "
    reason += " ".join(map(str, more))
    inputs = [t.read(t.lift(x)) for x in (input, weight, bias) if x is not None]
    return t.fresh(underived(t, "convolution", inputs, t.read(y), reason), y.strides)


def _conv_tbc(t: Trace, input: Tensor, weight: Tensor, bias: Tensor, pad: int = 0) -> TracedTensor:
    """torch.conv_tbc: x[time, batch, channels], w[size, channels, out], b[out] →
    y[time + 2 pad - size + 1, batch, out]. A negative pad leaves out what is at the ends."""
    x, w, b = t.lift(input), t.lift(weight), t.lift(bias)
    if len(x.shape) != 3 or len(w.shape) != 3:
        raise t.shape_error(
            "Input must have 3 dims: time, batch, in_channel; weight 3: size, in_channel, "
            f"out_channel; but got {list(x.shape)} and {list(w.shape)}"
        )
    _check_alike(t, [x, w, b])
    if x.shape[2] != w.shape[1]:
        raise t.shape_error(
            f"Input dim 2 (input channels, {x.shape[2]}) is not == dim 1 in the weight tensor "
            f"({w.shape[1]})"
        )
    if b.shape != (w.shape[2],):
        raise t.shape_error(
            f"Bias size must equal dim 2 in the weight tensor (output channels, {w.shape[2]}), "
            f"but got {list(b.shape)}"
        )
    if 1 not in x.shape[:2] and x.strides[0] != x.shape[1] * x.strides[1]:
        raise t.unsupported("torch views steps and sequences as one axis: make them contiguous")
    length, size, pad = x.shape[0], w.shape[0], ints_of(t, pad, 1, "pad")[0]
    count = length + 2 * pad - size + 1
    if count < 0:
        raise t.shape_error(f"Trying to create tensor with negative dimension {count}")
    if 0 in x.shape or 0 in w.shape or count == 0:
        raise t.unsupported("A convolution of no elements has no rule")
    c = Convolution(Windows((size,), (1,), (pad,), (1,), (length,), (count,)), 1)
    images = t.b.permute(t.read(x), axes=(1, 2, 0))
    y = c.product(t, images, t.b.permute(t.read(w), axes=(2, 1, 0)))
    y = t.b.permute(y, axes=(2, 0, 1))
    return t.fresh(t.b.add(y, expand(t, t.read(b), y.type.shape)))


_PLAIN = {rank: _conv(rank) for rank in (1, 2, 3)}
_TRANSPOSED = {rank: _conv_transpose(rank) for rank in (1, 2, 3)}

for _name, _rules in (("conv", _PLAIN), ("conv_transpose", _TRANSPOSED)):
    for _rank, _rule in _rules.items():
        RULES[getattr(torch, f"{_name}{_rank}d")] = Rule(_rule, family_of(_rule))
RULES[torch.convolution] = Rule(_convolution, family_of(_convolution))
RULES[torch.conv_tbc] = Rule(_conv_tbc, family_of(_conv_tbc))
