"""Padding: with a constant, or with elements of the tensor itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tracejit.capture.functions.assembly import joined
from tracejit.capture.functions.common import expand, literal, register
from tracejit.capture.functions.derived import derived
from tracejit.capture.functions.layouts import like
from tracejit.capture.trace.scalars import is_runtime
from tracejit.capture.trace.tensor import Ints, TracedTensor, elementwise_strides
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Value
from tracejit.ir.ops.movement import part
from tracejit.ir.types import b1

Tensor = torch.Tensor


def pad(
    t: Trace, input: Tensor, pad: Sequence[int], mode: str = "constant", value: object = None
) -> TracedTensor:
    """F.pad; with a constant, negative widths cut off."""
    if mode != "constant":
        return _padded(t, input, tuple(map(int, pad)), mode)
    h = t.lift(input)
    if len(pad) % 2 or len(pad) // 2 > len(h.shape):
        raise t.shape_error(f"Padding {list(pad)} does not fit a tensor of {len(h.shape)} axes")
    rank = len(h.shape)
    low, high = [0] * rank, [0] * rank
    for k in range(len(pad) // 2):
        low[rank - 1 - k], high[rank - 1 - k] = int(pad[2 * k]), int(pad[2 * k + 1])
    if any(n + a + b < 0 for n, a, b in zip(h.shape, low, high, strict=True)):
        raise t.shape_error(f"Padding {list(pad)} results in a negative output size")
    x = _cut(t, t.read(h), low, high)
    if max(*low, *high, 0) == 0:  # torch clones what is left
        shape = x.type.shape
        return t.fresh(x, elementwise_strides(shape, [(shape, h.strides)]))
    widths = {
        "low": tuple(max(n, 0) for n in low),
        "high": tuple(max(n, 0) for n in high),
        "interior": (0,) * rank,
    }
    value = 0 if value is None else value
    if not is_runtime(value):
        padded = t.b.pad(x, **widths, value=literal(value, h.dtype))
        return t.fresh(padded, like(h, padded.type.shape))
    inside = t.b.full(True, shape=x.type.shape, dtype=b1, device=h.device)
    inside = t.b.pad(inside, **widths, value=False)
    x = t.b.pad(x, **widths, value=literal(0, h.dtype))
    number = literal(value, h.dtype)
    fill = t.b.full(number, shape=x.type.shape, dtype=h.dtype, device=h.device)
    return t.fresh(t.b.where(inside, x, fill), like(h, x.type.shape))


def _cut(t: Trace, x: Value, low: list[int], high: list[int]) -> Value:
    if all(n >= 0 for n in (*low, *high)):
        return x
    starts = tuple(max(-n, 0) for n in low)
    stops = tuple(n - max(-m, 0) for n, m in zip(x.type.shape, high, strict=True))
    stops = tuple(map(max, starts, stops))
    return t.b.slice(x, starts=starts, stops=stops, steps=(1,) * len(starts))


def constant_pad_nd(
    t: Trace, input: Tensor, pad_: Sequence[int], value: object = 0
) -> TracedTensor:
    return pad(t, input, pad_, "constant", value)


def _padded(t: Trace, input: Tensor, pad: Ints, mode: str) -> TracedTensor:
    """The last axes made longer by elements of the tensor: mirrored ("reflect"), the outermost
    ("replicate"), or those of the other end ("circular")."""
    h = t.lift(input)
    rank = len(pad) // 2
    if mode not in ("reflect", "replicate", "circular"):
        raise t.shape_error(f"Unrecognised padding mode {mode}")
    if len(pad) % 2 or not 1 <= rank <= 3 or len(h.shape) not in (rank + 1, rank + 2):
        raise t.shape_error(
            f"Padding size {len(pad)} is not supported for {len(h.shape)}D input tensor."
        )
    if min(pad) < 0:
        return _cropped(t, input, pad, mode)
    x = t.read(h)
    widths = [(len(h.shape) - 1 - k, pad[2 * k], pad[2 * k + 1]) for k in range(rank)]
    for axis, low, high in widths:
        _check(t, x, axis, max(low, high), mode)

    def forward(x: Value) -> Value:
        for axis, low, high in widths:
            x = _along(t, x, axis, low, high, mode)
        return t.b.alias(x)

    def slope(g: Value, y: Value, x: Value) -> Value:
        for axis, low, high in reversed(widths):
            g = _added_back(t, g, axis, low, high, mode)
        return g

    y = derived(t, "pad", (x,), forward, (slope,), flat=mode != "circular")
    return t.fresh(y, None if mode == "circular" else like(h, y.type.shape))


def _cropped(t: Trace, input: Tensor, widths: Ints, mode: str) -> TracedTensor:
    """Negative widths cut off: what goes around before it is padded, else afterwards."""
    shape = t.lift(input).shape
    for k in range(len(widths) // 2):
        n = shape[-1 - k] + widths[2 * k] + widths[2 * k + 1]
        if n < 1 and mode != "circular":
            raise t.shape_error(f"input {list(shape)} is too small. Calculated output: {n}")
    wide, narrow = (tuple(f(n, 0) for n in widths) for f in (max, min))
    if mode == "circular":
        return _padded(t, pad(t, input, narrow), wide, mode)
    return pad(t, _padded(t, input, wide, mode), narrow)


def _check(t: Trace, x: Value, axis: int, width: int, mode: str) -> None:
    n = x.type.shape[axis]
    most = {"reflect": n - 1, "circular": n, "replicate": width if n else -1}[mode]
    if width > most:
        raise t.shape_error(
            f"Padding size should be at most {most} for mode {mode!r}, but got {width} at "
            f"dimension {axis} of input {list(x.type.shape)}"
        )


def _sources(n: int, low: int, high: int, mode: str) -> tuple[tuple[int, int, int], ...]:
    """Of the padding before and after n elements: its width, where the elements start that it
    takes, and how many they are."""
    if mode == "circular":
        return (low, n - low, low), (high, 0, high)
    if mode == "reflect":
        return (low, 1, low), (high, n - 1 - high, high)
    return (low, 0, 1), (high, n - 1, 1)


def _along(t: Trace, x: Value, axis: int, low: int, high: int, mode: str) -> Value:
    shape, pieces = x.type.shape, []
    for width, start, length in _sources(shape[axis], low, high, mode):
        piece = part(t.b, x, axis, start, length)
        if mode == "reflect":
            piece = t.b.flip(piece, axes=(axis,))
        pieces.append(expand(t, piece, (*shape[:axis], width, *shape[axis + 1 :])))
    pieces = [pieces[0]] * (low > 0) + [x] + [pieces[1]] * (high > 0)
    return joined(t, pieces, axis) if len(pieces) > 1 else x


def _added_back(t: Trace, g: Value, axis: int, low: int, high: int, mode: str) -> Value:
    """The gradient along an axis: that of the padding goes to the elements that it took."""
    b, rank = t.b, len(g.type.shape)
    n = g.type.shape[axis] - low - high
    total, before = part(b, g, axis, low, n), 0
    for width, start, length in _sources(n, low, high, mode):
        if width:
            piece = part(b, g, axis, before, width)
            if mode == "reflect":
                piece = b.flip(piece, axes=(axis,))
            elif mode == "replicate":
                kept = tuple(1 if k == axis else m for k, m in enumerate(piece.type.shape))
                piece = b.reshape(b.reduce_sum(piece, axes=(axis,)), shape=kept)
            ends = start, n - start - length
            first, last = (tuple(m if k == axis else 0 for k in range(rank)) for m in ends)
            piece = b.pad(piece, low=first, high=last, interior=(0,) * rank, value=0)
            total = b.add(total, piece)
        before = low + n
    return total


register(("pad",), pad, inplace=False)
register(("constant_pad_nd",), constant_pad_nd, inplace=False)
