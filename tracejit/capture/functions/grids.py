"""Sampling an image where a grid of coordinates says, and the grid of an affine map.

The gradient of the image adds up, for each element, what has read it, in the order of the samples
(`scatter`). The gradient of the coordinates is that of the weights. Gradients can be differentiated
once more, which eager refuses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch

from tracejit.capture.functions.common import cast, expand
from tracejit.capture.functions.derived import widen, widened
from tracejit.capture.functions.patterns import position
from tracejit.capture.functions.resampling import CUBIC, far_weight, near_weight
from tracejit.capture.trace.autocast import casted
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import TO_TORCH, Ints, TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Value
from tracejit.ir.ops.movement import part
from tracejit.ir.types import DType, i64

Tensor = torch.Tensor

BILINEAR, NEAREST, BICUBIC = range(3)
ZEROS, BORDER, REFLECTION = range(3)


# ---- the grid of an affine map


@rule(torch.affine_grid_generator)
def affine_grid_generator(
    t: Trace, theta: Tensor, size: Sequence[int], align_corners: bool
) -> TracedTensor:
    """θ[N, d, d + 1] → grid[N, *size, d]: where the map takes the places of an image."""
    h, dtype = t.lift(theta), t.lift(theta).dtype
    length = tuple(int(n) for n in size)[2:]
    rank = len(length)
    if rank not in (2, 3) or h.shape != (int(size[0]), rank, rank + 1):
        raise t.shape_error(f"Expected a batch of affine matrices for size {list(size)}")
    if not h.dtype.is_float:
        raise t.not_implemented("affine_grid_generator", h.dtype)
    (theta,), _ = casted(t, torch.bmm, (theta,), {})  # a product with the places of the image
    narrow = t.lift(theta).dtype
    matrix = widen(t, t.read(t.lift(theta)))
    shape = (h.shape[0], *length, rank)
    total = None
    for k in range(rank + 1):
        column = part(t.b, matrix, 2, k, 1)
        column = t.b.reshape(column, shape=(h.shape[0], *(1,) * rank, rank))
        term = expand(t, column, shape)
        if k < rank:  # the coordinates count from the last axis
            axis = rank - 1 - k
            at = _coordinates(t, length[axis], dtype, h.device, bool(align_corners))
            at = cast(t, cast(t, at, narrow), matrix.type.dtype)
            thin = tuple(length[axis] if a == axis + 1 else 1 for a in range(rank + 2))
            term = t.b.mul(term, expand(t, t.b.reshape(at, shape=thin), shape))
        total = term if total is None else t.b.add(total, term)
    return t.fresh(cast(t, total, narrow))


def _coordinates(t: Trace, n: int, dtype: DType, device: str, corners: bool) -> Value:
    """n places from -1 to 1, in the dtype of the map: the corners, or the middles of pixels."""
    wide = widened(dtype)
    if n <= 1:
        if dtype.narrow:
            raise t.not_implemented("tensor_cpu", dtype)
        return t.b.full(0.0, shape=(n,), dtype=wide, device=device)
    k = position(t, 0, (n,), device, wide)
    step = 2.0 / (n - 1)
    up = t.b.sub(t.b.mul(k, step), 1.0)
    down = t.b.sub(1.0, t.b.mul(t.b.sub(float(n - 1), k), step))
    at = t.b.where(t.b.lt(k, float(n // 2)), up, down)
    at = cast(t, cast(t, at, dtype), wide)
    if not corners:
        at = t.b.mul(at, (n - 1) / n)
    return cast(t, cast(t, at, dtype), wide)


# ---- sampling


class _Axis:
    """How coordinates along one axis of an image become positions of its elements."""

    def __init__(self, t: Trace, n: int, padding: int, corners: bool):
        self.t, self.n, self.padding, self.corners = t, n, padding, corners

    def place(self, x: Value) -> Value:
        """Coordinates from -1 to 1 as places in the image."""
        b = self.t.b
        if self.corners:
            return b.mul(b.add(x, 1.0), (self.n - 1) / 2)
        return b.sub(b.mul(b.add(x, 1.0), self.n / 2), 0.5)

    def inside(self, x: Value) -> Value:
        """Places as they are, moved to the border, or mirrored."""
        if self.padding == REFLECTION:
            x = self._mirrored(x)
        return x if self.padding == ZEROS else self._clipped(x)

    def _clipped(self, x: Value) -> Value:
        b, last = self.t.b, float(self.n - 1)
        x = b.where(b.gt(x, 0.0), x, 0.0)
        return b.where(b.lt(x, last), x, last)

    def _mirrored(self, x: Value) -> Value:
        b = self.t.b
        low, span = (0.0, self.n - 1.0) if self.corners else (-0.5, float(self.n))
        if not span:
            return b.mul(x, 0.0)
        away = b.abs(b.sub(x, low))
        times = b.floor(b.div(away, span))
        rest = b.sub(away, b.mul(times, span))
        odd = b.ne(b.mul(b.floor(b.mul(times, 0.5)), 2.0), times)
        return b.add(b.where(odd, b.sub(span, rest), rest), low)

    def has(self, x: Value) -> Value:
        """Whether there is an element at a place."""
        b = self.t.b
        return b.and_(b.ge(x, 0.0), b.lt(x, float(self.n)))


class _Sampler:
    """Reads elements of x[N, C, *length] at places [N, *samples] of each axis."""

    def __init__(self, t: Trace, x: Value, axes: list[_Axis]):
        n, channels, *length = x.type.shape
        self.t, self.axes, self.length = t, axes, tuple(length)
        self.x = t.b.reshape(x, shape=(n, channels, math.prod(length)))

    def at(self, places: Sequence[Value]) -> Value:
        """The elements [N, C, *samples] at whole places; 0 where there is none."""
        t, b = self.t, self.t.b
        inside, flat = None, None
        for axis, x in zip(self.axes, places, strict=True):
            good = axis.has(x)
            inside = good if inside is None else b.and_(inside, good)
            k = b.cast(b.where(good, x, 0.0), dtype=i64)
            flat = k if flat is None else b.add(b.mul(flat, axis.n), k)
        n, channels, _ = self.x.type.shape
        samples = flat.type.shape[1:]
        index = expand(
            t,
            b.reshape(flat, shape=(n, 1, flat.type.numel // n)),
            (n, channels, flat.type.numel // n),
        )
        found = b.reshape(b.gather(self.x, index, axis=2), shape=(n, channels, *samples))
        return b.where(self.spread(inside), found, 0.0)

    def spread(self, v: Value) -> Value:
        """[N, *samples] → [N, C, *samples]"""
        n, *samples = v.type.shape
        shape = (n, self.x.type.shape[1], *samples)
        return expand(self.t, self.t.b.reshape(v, shape=(n, 1, *samples)), shape)


@rule(torch.grid_sampler)
def grid_sampler(
    t: Trace,
    input: Tensor,
    grid: Tensor,
    interpolation_mode: int,
    padding_mode: int,
    align_corners: bool,
) -> TracedTensor:
    """x[N, C, *length], grid[N, *samples, d] → [N, C, *samples]"""
    h, g = t.lift(input), t.lift(grid)
    rank = len(h.shape) - 2
    _check(t, h.shape, g.shape, rank, interpolation_mode)
    if h.dtype is not g.dtype:
        raise t.shape_error(f"expected scalar type {TO_TORCH[h.dtype]}, not {TO_TORCH[g.dtype]}")
    if not h.dtype.is_float:
        raise t.not_implemented("grid_sampler", h.dtype)
    samples = g.shape[1:-1]
    if 0 in (h.shape[0], h.shape[1], *samples):
        nothing = t.b.full(0, shape=(*h.shape[:2], *samples), dtype=h.dtype, device=h.device)
        return t.fresh(t.unread(t.unread(nothing, t.read(h)), t.read(g)))
    x, where = t.read(h), t.read(g)  # rounded at each step, as eager's places are
    axes = [_Axis(t, n, padding_mode, bool(align_corners)) for n in h.shape[2:]]
    places = []
    for k, axis in enumerate(axes):
        c = part(t.b, where, rank + 1, rank - 1 - k, 1)  # the last axis comes first
        places.append(axis.place(t.b.reshape(c, shape=(h.shape[0], *samples))))
    sampler = _Sampler(t, x, axes)
    y = _MODES[interpolation_mode](t, sampler, places)
    if interpolation_mode == NEAREST:
        y = t.unread(y, where)
    return t.fresh(t.saves(t.b.alias(y), x, where))


def _check(t: Trace, x: Ints, grid: Ints, rank: int, mode: int) -> None:
    if rank not in (2, 3) or len(grid) != len(x):
        raise t.shape_error(
            "grid_sampler(): expected 4D or 5D input and grid with same number of dimensions, but "
            f"got input with sizes {list(x)} and grid with sizes {list(grid)}"
        )
    if x[0] != grid[0]:
        raise t.shape_error(
            "grid_sampler(): expected grid and input to have same batch size, but got input with "
            f"sizes {list(x)} and grid with sizes {list(grid)}"
        )
    if grid[-1] != rank:
        raise t.shape_error(
            f"grid_sampler(): expected grid to have size {rank} in last dimension, but got grid "
            f"with sizes {list(grid)}"
        )
    if 0 in x[2:]:
        raise t.shape_error(
            "grid_sampler(): expected input to have non-empty spatial dimensions, but input has "
            f"sizes {list(x)}"
        )
    if mode == BICUBIC and rank == 3:
        raise t.shape_error("grid_sampler(): bicubic interpolation only supports 4D input")


def _linear(t: Trace, sampler: _Sampler, places: list[Value]) -> Value:
    b, total = t.b, None
    places = [axis.inside(x) for axis, x in zip(sampler.axes, places, strict=True)]
    low = [b.floor(x) for x in places]
    high = [b.add(x, 1.0) for x in low]
    below = [b.sub(x, a) for x, a in zip(places, low, strict=True)]
    above = [b.sub(a, x) for x, a in zip(places, high, strict=True)]
    for corner in itertools.product((0, 1), repeat=len(places)):
        at = [(low, high)[side][k] for k, side in enumerate(corner)]
        weights = [(above, below)[side][k] for k, side in enumerate(corner)]
        weight = _product(b.mul, weights)
        term = b.mul(sampler.at(at), sampler.spread(weight))
        total = term if total is None else b.add(total, term)
    return total


def _nearest(t: Trace, sampler: _Sampler, places: list[Value]) -> Value:
    with t.untaped():
        found = [_to_even(t, axis.inside(x)) for axis, x in zip(sampler.axes, places, strict=True)]
    return sampler.at(found)


def _to_even(t: Trace, x: Value) -> Value:
    """The nearest whole number, the even one of two."""
    b = t.b
    low = b.floor(x)
    rest = b.sub(x, low)
    odd = b.ne(b.mul(b.floor(b.mul(low, 0.5)), 2.0), low)
    up = b.or_(b.gt(rest, 0.5), b.and_(b.eq(rest, 0.5), odd))
    return b.where(up, b.add(low, 1.0), low)


def _cubic(t: Trace, sampler: _Sampler, places: list[Value]) -> Value:
    b = t.b
    low = [b.floor(x) for x in places]
    rows, columns = (
        [_cubic_weight(t, b.sub(x, a), k) for k in range(4)]
        for x, a in zip(places, low, strict=True)
    )
    down, along = sampler.axes
    total = None
    for k, row in enumerate(rows):
        y = down.inside(b.add(low[0], float(k - 1)))
        line = None
        for j, column in enumerate(columns):
            x = along.inside(b.add(low[1], float(j - 1)))
            term = b.mul(sampler.at((y, x)), sampler.spread(column))
            line = term if line is None else b.add(line, term)
        line = b.mul(line, sampler.spread(row))
        total = line if total is None else b.add(total, line)
    return total


def _cubic_weight(t: Trace, rest: Value, k: int) -> Value:
    """The weight of the k-th of four neighbours, `rest` behind the second."""
    b = t.b
    if k in (1, 2):
        return near_weight(b, rest if k == 1 else b.sub(1.0, rest), CUBIC)
    return far_weight(b, b.add(rest, 1.0) if k == 0 else b.sub(2.0, rest), CUBIC)


def _product(mul: Callable, factors: list[Value]) -> Value:
    found = factors[0]
    for x in factors[1:]:
        found = mul(found, x)
    return found


_MODES = {BILINEAR: _linear, NEAREST: _nearest, BICUBIC: _cubic}
