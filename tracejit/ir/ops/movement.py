"""Movement primitives: they move no data, they become index maps of the loads below them."""

from __future__ import annotations

import math

import numpy as np

from tracejit.ir.ops.record import BITS, Op, require, require_tensor
from tracejit.ir.types import Type

Ints = tuple[int, ...]


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
