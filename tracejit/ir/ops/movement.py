"""Movement primitives: they move no data, they become index maps of the loads below them."""

from __future__ import annotations

import math

import numpy as np

from tracejit.ir.ops.record import BITS, Op, require, require_tensor
from tracejit.ir.types import Type

Ints = tuple[int, ...]


def part(b, x, axis: int, start: int, length: int):
    """A stretch of a value along an axis, which may be counted from the last one."""
    shape = x.type.shape
    axis %= len(shape)
    starts = tuple(start if k == axis else 0 for k in range(len(shape)))
    stops = tuple(start + length if k == axis else n for k, n in enumerate(shape))
    return b.slice(x, starts=starts, stops=stops, steps=(1,) * len(shape))


def _movement(name: str, infer, eval, vjp, host: str | None) -> Op:
    return Op(name, "movement", infer, eval, (vjp,), cost=0, exact=BITS, rounds=False, host=host)


def _ranks(name: str, x: Type, *rows: Ints) -> None:
    require_tensor(name, x)
    fits = all(len(row) == len(x.shape) for row in rows)
    require(fits, f"{name} of {x}: {', '.join(map(str, rows))} do not match its axes")


def _infer_reshape(x: Type, *, shape: Ints) -> Type:
    require_tensor("reshape", x)
    fits = math.prod(shape) == x.numel and all(s >= 0 for s in shape)
    require(fits, f"reshape of {x} to {shape} changes the element count")
    return Type(x.dtype, shape, x.device)


def _infer_permute(x: Type, *, axes: Ints) -> Type:
    require_tensor("permute", x)
    require(sorted(axes) == list(range(len(x.shape))), f"permute of {x} by {axes}")
    return Type(x.dtype, tuple(x.shape[a] for a in axes), x.device)


def _infer_expand(x: Type, *, shape: Ints) -> Type:
    _ranks("expand", x, shape)
    fits = all(s >= 0 and a in (1, s) for a, s in zip(x.shape, shape, strict=True))
    require(fits, f"expand of {x} to {shape}")
    return Type(x.dtype, shape, x.device)


def _infer_slice(x: Type, *, starts: Ints, stops: Ints, steps: Ints) -> Type:
    _ranks("slice", x, starts, stops, steps)
    rows = list(zip(x.shape, starts, stops, steps, strict=True))
    fits = all(0 <= lo <= hi <= size and step > 0 for size, lo, hi, step in rows)
    require(fits, f"slice of {x}: starts {starts}, stops {stops}, steps {steps}")
    return Type(x.dtype, tuple(-(-(hi - lo) // step) for _, lo, hi, step in rows), x.device)


def _infer_pad(x: Type, *, low: Ints, high: Ints, interior: Ints, value: float) -> Type:
    _ranks("pad", x, low, high, interior)
    require(isinstance(value, (int, float)), f"pad of {x} with {value}, which is no literal")
    shape = []
    for size, lo, hi, gap in zip(x.shape, low, high, interior, strict=True):
        require(lo >= 0 and hi >= 0 and gap >= 0, f"pad of {x}: {low}, {high}, {interior}")
        shape.append(lo + hi + size + max(size - 1, 0) * gap)
    return Type(x.dtype, tuple(shape), x.device)


def _inner(x_shape: Ints, low: Ints, interior: Ints) -> tuple[slice, ...]:
    """Where the padded operand stands in the result."""
    return tuple(
        slice(lo, lo + (size - 1) * (gap + 1) + 1 if size else lo, gap + 1)
        for size, lo, gap in zip(x_shape, low, interior, strict=True)
    )


def _eval_pad(x: np.ndarray, *, low: Ints, high: Ints, interior: Ints, value: float) -> np.ndarray:
    shape = [
        lo + hi + s + max(s - 1, 0) * gap
        for s, lo, hi, gap in zip(x.shape, low, high, interior, strict=True)
    ]
    out = np.full(shape, value, x.dtype)
    out[_inner(x.shape, low, interior)] = x
    return out


def _infer_flip(x: Type, *, axes: Ints) -> Type:
    require_tensor("flip", x)
    fits = len(set(axes)) == len(axes) and all(0 <= a < len(x.shape) for a in axes)
    require(fits, f"flip of {x} along axes {axes}")
    return x


def _vjp_expand(b, g, y, x, *, shape: Ints):
    axes = tuple(i for i, (a, s) in enumerate(zip(x.type.shape, shape, strict=True)) if a != s)
    if not axes:
        return g
    return b.reshape(b.reduce_sum(g, axes=axes), shape=x.type.shape)


def _vjp_slice(b, g, y, x, *, starts: Ints, stops: Ints, steps: Ints):
    high = tuple(
        size - (lo + max(n - 1, 0) * step + min(n, 1))
        for size, lo, n, step in zip(x.type.shape, starts, g.type.shape, steps, strict=True)
    )
    return b.pad(g, low=starts, high=high, interior=tuple(s - 1 for s in steps), value=0)


def _vjp_pad(b, g, y, x, *, low: Ints, high: Ints, interior: Ints, value: float):
    where = _inner(x.type.shape, low, interior)
    return b.slice(
        g,
        starts=tuple(w.start for w in where),
        stops=tuple(w.stop for w in where),
        steps=tuple(w.step for w in where),
    )


def _infer_window(x: Type, *, axes: Ints, stride: int, dilation: int, count: int) -> Type:
    size = _taps("window", x, axes, stride, dilation, count)
    fits = count == 0 or (count - 1) * stride + (size - 1) * dilation < x.shape[axes[0]]
    require(fits, f"window of {x}: {count} windows of {size} do not fit axis {axes[0]}")
    return Type(x.dtype, _with(x.shape, axes[0], count), x.device)


def _infer_unwindow(x: Type, *, axes: Ints, stride: int, dilation: int, length: int) -> Type:
    size = _taps("unwindow", x, axes, stride, dilation, length)
    count = x.shape[axes[0]]
    fits = count == 0 or (count - 1) * stride + (size - 1) * dilation < length
    require(fits, f"unwindow of {x} to {length}: {count} windows of {size} do not fit")
    return Type(x.dtype, _with(x.shape, axes[0], length), x.device)


def _taps(name: str, x: Type, axes: Ints, stride: int, dilation: int, extent: int) -> int:
    """The size of the windows, which is the extent of the second axis."""
    require_tensor(name, x)
    known = len(set(axes)) == len(axes) == 2 and all(0 <= a < len(x.shape) for a in axes)
    require(known, f"{name} of {x} along axes {axes}")
    require(stride > 0 and dilation > 0 and extent >= 0, f"{name} by {stride}, {dilation}")
    require(x.shape[axes[1]] > 0, f"{name} of {x}: windows of no elements")
    return x.shape[axes[1]]


def _with(shape: Ints, axis: int, extent: int) -> Ints:
    return (*shape[:axis], extent, *shape[axis + 1 :])


def _places(taps: int, stride: int, dilation: int, count: int) -> np.ndarray:
    """count × taps: where along the axis each tap of each window is."""
    return np.arange(count)[:, None] * stride + np.arange(taps)[None, :] * dilation


def _eval_window(
    x: np.ndarray, *, axes: Ints, stride: int, dilation: int, count: int
) -> np.ndarray:
    taps = x.shape[axes[1]]
    moved = np.moveaxis(x, axes, (-2, -1))
    found = moved[..., _places(taps, stride, dilation, count), np.arange(taps)]
    return np.moveaxis(found, (-2, -1), axes)


def _eval_unwindow(
    x: np.ndarray, *, axes: Ints, stride: int, dilation: int, length: int
) -> np.ndarray:
    count, taps = (x.shape[a] for a in axes)
    moved = np.moveaxis(x, axes, (-2, -1))
    out = np.zeros((*moved.shape[:-2], length, taps), x.dtype)
    out[..., _places(taps, stride, dilation, count), np.arange(taps)] = moved
    return np.moveaxis(out, (-2, -1), axes)


reshape = _movement(
    "reshape",
    _infer_reshape,
    lambda x, *, shape: x.reshape(shape),
    lambda b, g, y, x, *, shape: b.reshape(g, shape=x.type.shape),
    host="{0}",
)
permute = _movement(
    "permute",
    _infer_permute,
    lambda x, *, axes: x.transpose(axes),
    lambda b, g, y, x, *, axes: b.permute(g, axes=tuple(int(a) for a in np.argsort(axes))),
    host="{0}",
)


def transpose(b, x):
    """Matrices, rows for columns."""
    rank = len(x.type.shape)
    return b.permute(x, axes=(*range(rank - 2), rank - 1, rank - 2))


expand = _movement(
    "expand",
    _infer_expand,
    lambda x, *, shape: np.broadcast_to(x, shape),
    _vjp_expand,
    host="{0}",
)
slice_ = _movement(
    "slice",
    _infer_slice,
    lambda x, *, starts, stops, steps: x[tuple(map(slice, starts, stops, steps))],
    _vjp_slice,
    host=None,
)
pad = _movement("pad", _infer_pad, _eval_pad, _vjp_pad, host=None)
flip = _movement(
    "flip",
    _infer_flip,
    lambda x, *, axes: np.flip(x, axes),
    lambda b, g, y, x, *, axes: b.flip(g, axes=axes),
    host=None,
)

# Sliding windows along axes (a, t): tap k of window o stands at o * stride + k * dilation of axis
# a, and every tap has a layer of its own along axis t. A tensor is cut into windows when it has
# been expanded along t. Each is the other's transpose: what `unwindow` leaves out is 0.
window = _movement(
    "window",
    _infer_window,
    _eval_window,
    lambda b, g, y, x, *, axes, stride, dilation, count: b.unwindow(
        g, axes=axes, stride=stride, dilation=dilation, length=x.type.shape[axes[0]]
    ),
    host=None,
)
unwindow = _movement(
    "unwindow",
    _infer_unwindow,
    _eval_unwindow,
    lambda b, g, y, x, *, axes, stride, dilation, length: b.window(
        g, axes=axes, stride=stride, dilation=dilation, count=x.type.shape[axes[0]]
    ),
    host=None,
)
