"""Functions that write where integers say: scatter, scatter_add, index_add.

Where several indices name a place, they count in their order: no atomics, so the same bits every
time.
"""

from __future__ import annotations

import torch

from tracejit.capture.functions.common import (
    check_range,
    expand,
    literal,
    normal_axis,
    operand,
    register,
)
from tracejit.capture.functions.derived import underived
from tracejit.capture.functions.movement import reshape
from tracejit.capture.functions.patterns import scattered
from tracejit.capture.trace import location
from tracejit.capture.trace.bounds import within
from tracejit.capture.trace.ranges import limits
from tracejit.capture.trace.tensor import Handle, Ints, TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.errors import AxisError
from tracejit.ir.graph import Builder, Value
from tracejit.ir.types import b1, i32, i64, u8

Tensor = torch.Tensor


class _Places:
    """The places along an axis of a tensor that the integers of an index tensor name."""

    def __init__(self, t: Trace, h: Handle, dim: int, index: Tensor, name: str):
        self.t, self.shape = t, h.shape or (1,)
        self.axis = normal_axis(t, dim, len(h.shape))
        i = t.lift(index)
        if i.dtype not in (i64, i32):
            raise t.shape_error(f"{name}(): Expected dtype int32/int64 for index")
        if len(i.shape or (1,)) != len(self.shape):
            raise t.shape_error(
                "Index tensor must have the same number of dimensions as self tensor"
            )
        n = self.shape[self.axis]
        reason = f"index {{value}} is out of bounds for dimension {self.axis} with size {n}"
        within(t, index, 0, n, t.shape_error(reason))
        at = t.b.reshape(t.read(i), shape=i.shape or (1,))
        self.at = at if at.type.dtype is i64 else t.b.cast(at, dtype=i64)
        mine, its = (s[: self.axis] + s[self.axis + 1 :] for s in (self.shape, at.type.shape))
        if any(a < b for a, b in zip(mine, its, strict=True)):
            raise t.shape_error(
                f"Expected index {list(i.shape)} to be no larger than self {list(h.shape)} apart "
                f"from dimension {self.axis}"
            )
        stops = tuple(
            n if k == self.axis else m
            for k, (n, m) in enumerate(zip(self.shape, at.type.shape, strict=True))
        )
        self.part = None if mine == its else stops  # of the tensor that the index is about

    @property
    def none(self) -> bool:
        """Whether no place is named."""
        return not self.at.type.numel

    def put(self, b: Builder, x: Value, rows: Value, combine: str = "last") -> Value:
        """`x` with what belongs to the indices at the places that they name: of several for one
        place the last, or all combined with what is there."""
        new = scattered(b, self._parted(b, x), self.at, rows, self.axis, combine)
        if self.part is None:
            return new
        room = tuple(n - m for n, m in zip(self.shape, self.part, strict=True))
        none = (0,) * len(room)
        new, inside = b.pad(new, low=none, high=room, interior=none, value=0), None
        for k in (k for k, n in enumerate(room) if n):
            here = b.iota(axis=k, shape=self.shape, dtype=i64, device=x.type.device)
            within_it = b.lt(here, self.part[k])
            inside = within_it if inside is None else b.and_(inside, within_it)
        return b.where(inside, new, x)

    def read(self, b: Builder, x: Value) -> Value:
        """What `x` has at the places that are named."""
        if self.none:
            return b.full(0, shape=self.at.type.shape, dtype=x.type.dtype, device=x.type.device)
        return b.gather(self._parted(b, x), self.at, axis=self.axis)

    def _parted(self, b: Builder, x: Value) -> Value:
        """The part of `x` that the index is about."""
        if self.part is None:
            return x
        n = len(self.part)
        return b.slice(x, starts=(0,) * n, stops=self.part, steps=(1,) * n)

    def source(self, src: Tensor, name: str, dtype: object) -> Value:
        """What belongs to the indices: the part of `src` that is as large as they are."""
        t, s, shape = self.t, self.t.lift(src), self.at.type.shape
        if s.dtype is not dtype:
            raise t.shape_error(f"{name}(): Expected self.dtype to be equal to src.dtype")
        given = s.shape or (1,)
        if len(given) != len(shape) or any(a < b for a, b in zip(given, shape, strict=True)):
            raise t.shape_error(
                f"Expected index {list(shape)} to be no larger than src {list(s.shape)}"
            )
        x = t.b.reshape(t.read(s), shape=given)
        if given == shape:
            return x
        if t.grad_on and t.requires_grad(s):
            raise t.unsupported(
                "Eager has no gradient of a source that is larger than the index; slice it first"
            )
        zeros, ones = (0,) * len(shape), (1,) * len(shape)
        return t.b.slice(x, starts=zeros, stops=shape, steps=ones)


_COMBINED = {"add": "add", "multiply": "mul"}


def scatter(
    t: Trace,
    input: Tensor,
    dim: int,
    index: Tensor,
    src: object = None,
    value: object = None,
    *,
    reduce: str | None = None,
) -> TracedTensor:
    """`src` where an index says; where several say the same, the last one counts, or by `reduce`
    all of them and what was there are added or multiplied."""
    if reduce is not None and reduce not in _COMBINED:
        raise t.shape_error(f"reduce argument must be either add or multiply, got {reduce}")
    h = t.lift(input)
    places = _Places(t, h, dim, index, "scatter")
    x = t.b.reshape(t.read(h), shape=places.shape)
    src = value if src is None else src
    is_given = isinstance(src, Tensor)
    if is_given:
        rows = places.source(src, "scatter", h.dtype)
    else:
        check_range(t, operand(t, src).number, h.dtype)
        number = literal(operand(t, src).number, h.dtype)
        rows = t.b.full(number, shape=places.at.type.shape, dtype=h.dtype, device=h.device)
    if places.none:
        return _made(t, h, t.unread(t.b.alias(x), rows) if is_given else t.b.alias(x))
    inputs = (x, rows) if is_given else (x,)
    if reduce is not None:
        if h.dtype is b1:
            raise t.unsupported("scatter of bools with reduce= has no rule")
        with t.untaped():
            out = places.put(t.b, x, rows, _COMBINED[reduce])
        return _made(t, h, underived(t, "scatter", inputs, out))
    with t.untaped():
        out = places.put(t.b, x, rows)

    def vjp(b: Builder, cts: tuple, need: tuple) -> tuple:
        (g,) = cts
        zeros = b.full(0, shape=rows.type.shape, dtype=g.type.dtype, device=h.device)
        kept = places.put(b, g, zeros) if need[0] else None
        taken = places.read(b, g) if len(need) > 1 and need[1] else None
        return (kept, taken)[: len(need)]

    return _made(t, h, t.derive("scatter", inputs, out, vjp))


def _made(t: Trace, h: Handle, out: Value) -> TracedTensor:
    return t.fresh(t.b.reshape(out, shape=h.shape))


def _added(t: Trace, h: Handle, places: _Places, rows: Value, name: str) -> TracedTensor:
    x = t.b.reshape(t.read(h), shape=places.shape)
    with t.untaped():
        out = t.b.alias(x) if places.none else places.put(t.b, x, rows, "add")

    def vjp(b: Builder, cts: tuple, need: tuple) -> tuple:
        (g,) = cts
        return g, places.read(b, g) if need[1] else None

    return _made(t, h, t.derive(name, (x, rows), out, vjp))


def scatter_add(t: Trace, input: Tensor, dim: int, index: Tensor, src: Tensor) -> TracedTensor:
    h = t.lift(input)
    places = _Places(t, h, dim, index, "scatter_add")
    return _added(t, h, places, places.source(src, "scatter_add", h.dtype), "scatter_add")


def index_add(
    t: Trace, input: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: object = 1
) -> TracedTensor:
    """Slices of `source` added where a vector of indices says."""
    if not t.lift(input).shape and not t.lift(source).shape:
        x, given = (reshape(t, x, 1) for x in (input, source))
        return _made(
            t, t.lift(input), t.read(index_add(t, x, dim, index, given, alpha=alpha).handle)
        )
    h, s, i = t.lift(input), t.lift(source), t.lift(index)
    if isinstance(alpha, (int, float)):
        check_range(t, alpha, h.dtype)
        if h.dtype is u8 and alpha < 0:
            raise t.shape_error("value cannot be converted to type uint8_t without overflow")
    axis = normal_axis(t, dim, len(h.shape))
    if len(i.shape) > 1:
        raise AxisError(
            where=location.full(), reason="index_add_(): Index is supposed to be a vector"
        )
    if not h.shape or not s.shape:
        raise t.shape_error(
            f"index_add_(): source of shape {list(s.shape)} does not fit self {list(h.shape)}"
        )
    shape = (*h.shape[:axis], i.numel, *h.shape[axis + 1 :])
    if s.shape != shape:
        raise t.shape_error(
            f"index_add_(): source of shape {list(s.shape)} does not fit self {list(h.shape)} and "
            f"{i.numel} indices along dimension {axis}"
        )
    with t.untaped():
        thin = tuple(n if k == axis else 1 for k, n in enumerate(shape))
        wide = t.fresh(expand(t, t.b.reshape(t.read(i), shape=thin), shape))
    within(t, index, 0, h.shape[axis], t.shape_error("index out of range in self"))
    places = _Places(t, h, axis, wide, "index_add")
    rows = places.source(source, "index_add", h.dtype)
    if alpha != 1:
        rows = t.b.mul(rows, literal(operand(t, alpha).number, h.dtype))
    return _added(t, h, places, rows, "index_add")


_REDUCED = {"sum": "add", "prod": "mul", "mean": "add", "amax": "max", "amin": "min"}


def scatter_reduce(
    t: Trace,
    input: Tensor,
    dim: int,
    index: Tensor,
    src: Tensor,
    reduce: str,
    *,
    include_self: bool = True,
) -> TracedTensor:
    """At each place the sum, product, mean, largest or smallest of what belongs to the indices that
    name it, with what was there before among them if `include_self`."""
    h = t.lift(input)
    if reduce not in _REDUCED:
        raise t.shape_error(
            "reduce argument must be either sum, prod, mean, amax or amin, got " + str(reduce)
        )
    places = _Places(t, h, dim, index, "scatter_reduce")
    rows, taken = places.source(src, "scatter_reduce", h.dtype), places.at.type.shape
    x, b = t.b.reshape(t.read(h), shape=places.shape), t.b
    if places.none:
        return _made(t, h, t.unread(b.alias(x), rows))
    if h.dtype is b1:
        raise t.unsupported("scatter_reduce of bools has no rule")

    def filled(number: float, shape: Ints) -> Value:
        return b.full(literal(number, h.dtype), shape=shape, dtype=h.dtype, device=h.device)

    combine = _REDUCED[reduce]
    larger = (t.lift(src).shape or (1,)) != taken
    if larger and combine != "add" and t.grad_on and t.requires_grad(h):
        raise t.unsupported(
            "Eager has no gradient of an extremum with a source that is larger than the index; "
            "slice it first"
        )
    if not include_self:
        neutral = 1 if combine == "mul" else 0
        if combine in ("max", "min"):
            lowest, highest = limits(h.dtype)
            neutral = lowest if combine == "max" else highest
        x = places.put(b, x, filled(neutral, taken))
    out = places.put(b, x, rows, combine)
    if reduce == "mean":
        with t.untaped():
            ones, before = filled(1, taken), filled(1, places.shape)
            if not include_self:
                before = places.put(b, before, filled(0, taken))
            count = places.put(b, before, ones, "add")
        out = b.div(out, count) if h.dtype.is_float else b.floordiv(out, count)
    return _made(t, h, out)


for _implementation in (scatter, scatter_add, index_add, scatter_reduce):
    register((_implementation.__name__,), _implementation)
