"""Running products and extrema, and integrals along an axis: cumprod, cummax, trapezoid, …

On a CPU a scan is a primitive that goes in order. On a GPU it goes in log2(n) steps over the whole
axis: each element takes in what stands 1, 2, 4, … before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tracejit.capture.functions.common import cast, in_place_along, normal_axis, register
from tracejit.capture.functions.composites import composed
from tracejit.capture.functions.derived import derived, require_float, widen
from tracejit.capture.functions.patterns import position
from tracejit.capture.functions.unary import is_infinite
from tracejit.capture.trace.table import RULES, rule
from tracejit.capture.trace.tensor import TO_IR, TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Builder, Value
from tracejit.ir.ops.movement import part
from tracejit.ir.ops.running import places
from tracejit.ir.types import b1, i64, u8

Tensor = torch.Tensor
Values = tuple[Value, ...]


def _before(t: Trace, x: Value, axis: int, by: int, fill: float | int) -> Value:
    """What stands `by` places before each element along an axis, `fill` where there is nothing."""
    rank, n = len(x.type.shape), x.type.shape[axis]
    kept = part(t.b, x, axis, 0, n - by)
    low = tuple(by if k == axis else 0 for k in range(rank))
    return t.b.pad(kept, low=low, high=(0,) * rank, interior=(0,) * rank, value=fill)


def _steps(n: int) -> list[int]:
    """1, 2, 4, … below n."""
    return [1 << k for k in range(max(n - 1, 0).bit_length())]


def _scanned(t: Trace, xs: Values, axis: int, both: Callable, fill: Sequence) -> Values:
    """All results of `both`, an associative function of what is earlier and what is later, along an
    axis. `fill` changes nothing as the earlier of the two."""
    for by in _steps(xs[0].type.shape[axis]):
        earlier = tuple(_before(t, x, axis, by, f) for x, f in zip(xs, fill, strict=True))
        xs = both(earlier, xs)
    return xs


def cumprod(t: Trace, input: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> TracedTensor:
    """Products of products, whose gradients know about zeros."""
    h = t.lift(input)
    into = TO_IR[dtype] if dtype is not None else h.dtype if h.dtype.is_float else i64
    axis = normal_axis(t, dim, len(h.shape))
    x = cast(t, t.read(h), into)
    if not h.shape or h.shape[axis] < 2 or not h.numel:
        return t.fresh(t.b.alias(x))
    y = widen(t, x) if into.narrow else x
    if h.device == "cpu":
        y = cast(t, t.b.accumulate(y, axis=axis, combine="mul"), into)
        return t.fresh(t.saves(y, x, y))
    one = 1.0 if into.is_float else 1
    (y,) = _scanned(t, (y,), axis, lambda x, y: (t.b.mul(x[0], y[0]),), (one,))
    y = cast(t, y, into)
    return t.fresh(t.saves(y, x, y))


rule(Tensor.cumprod_)(in_place_along(cumprod))


def _running(name: str) -> Callable:
    """cummax and cummin: the last of equal ones, and NaN from the first on."""
    related = "ge" if name == "cummax" else "le"

    def rule(t: Trace, input: Tensor, dim: int) -> object:
        h = t.lift(input)
        axis = normal_axis(t, dim, len(h.shape))
        made = getattr(torch.return_types, name)
        if not h.shape or not h.numel:
            zeros = t.b.full(0, shape=h.shape, dtype=i64, device=h.device)
            return made((t.fresh(t.b.alias(t.read(h))), t.fresh(zeros)))
        b, n = t.b, h.shape[axis]
        if h.device == "cpu":
            return made(_in_order(t, t.read(h), axis, name[3:]))
        with t.untaped():
            best = t.read(h)
            best = cast(t, best, u8) if h.dtype is b1 else best
            place = position(t, axis, h.shape, h.device)

            def both(earlier: Values, later: Values) -> Values:
                (one, at), (other, place) = earlier, later
                own = getattr(b, related)(other, one)
                if h.dtype.is_float:
                    own = b.or_(b.and_(own, b.eq(one, one)), b.ne(other, other))
                own = b.or_(own, b.lt(at, 0))  # there is nothing earlier
                return b.where(own, other, one), b.where(own, place, at)

            nothing = (0.0 if h.dtype.is_float else 0, -1)
            best, place = _scanned(t, (best, place), axis, both, nothing)
        t.ranges[place] = 0, n - 1
        index = t.fresh(place)
        return made((RULES[torch.gather].run(t, input, axis, index), index))

    return rule


def _in_order(t: Trace, x: Value, axis: int, combine: str) -> tuple[TracedTensor, TracedTensor]:
    """Running extrema and where they stand, in two passes."""
    b, kind = t.b, x.type
    with t.untaped():
        wide = cast(t, x, u8) if kind.dtype is b1 else x
        best = b.accumulate(wide, axis=axis, combine=combine)
        at = places(b, best, wide, axis)
        best = cast(t, best, kind.dtype)
    t.ranges[at] = 0, kind.shape[axis] - 1
    index = t.fresh(at)

    def vjp(b: Builder, cts: tuple, need: tuple) -> tuple:
        zeros = b.full(0, shape=kind.shape, dtype=kind.dtype, device=kind.device)
        return (b.scatter(zeros, at, cts[0], axis=axis, combine="add"),)

    if kind.dtype.is_float:
        best = t.derive(f"cum{combine}", (x,), best, vjp)
    return t.fresh(best), index


def logcumsumexp(t: Trace, input: Tensor, dim: int) -> TracedTensor:
    """log(exp(x_0) + … + exp(x_i)), the larger taken out of each sum."""
    h = t.lift(input)
    axis = normal_axis(t, dim, len(h.shape))
    x = t.read(h)
    require_float(t, "logcumsumexp", x)
    if not h.shape or not h.numel or h.shape[axis] == 1:
        return t.fresh(t.b.alias(x))
    b = t.b
    if h.device == "cpu":
        wide = b.accumulate(widen(t, x), axis=axis, combine="logaddexp")
        y = cast(t, wide, h.dtype)
        return t.fresh(t.saves(y, x, y))

    def both(x: Value, y: Value) -> Value:
        most, least = b.maximum(x, y), b.minimum(x, y)
        sum_ = b.add(most, b.log1p(b.exp(b.sub(least, most))))
        return b.where(b.eq(least, most), b.where(is_infinite(t, most), most, sum_), sum_)

    def forward(x: Value) -> Value:
        return _scanned(t, (x,), axis, lambda x, y: (both(y[0], x[0]),), (float("-inf"),))[0]

    def backward(g: Value, y: Value, x: Value) -> Value:
        """The sum over i >= j of g_i·exp(x_j - y_i): with s_j = g_j + exp(y_j - y_j+1)·s_j+1 it is
        s_j·exp(x_j - y_j), where no exponential is of a positive number."""
        g, last = (b.flip(v, axes=(axis,)) for v in (g, y))
        later = _before(t, last, axis, 1, 0.0)
        alike = b.or_(is_infinite(t, last), b.lt(position(t, axis, h.shape, h.device), 1))
        factor = b.where(alike, 1.0, b.exp(b.where(alike, 0.0, b.sub(last, later))))

        def step(x: Values, y: Values) -> Values:
            return b.mul(x[0], y[0]), b.add(b.mul(y[0], x[1]), y[1])

        _, total = _scanned(t, (factor, g), axis, step, (1.0, 0.0))
        return b.mul(b.flip(total, axes=(axis,)), b.exp(b.sub(x, y)))

    return t.fresh(derived(t, "logcumsumexp", (x,), forward, (backward,)))


# --- integrals and slopes ----------------------------------------------------------------------


def _widths(t: Trace, y: Tensor, x: Tensor, axis: int, name: str) -> Tensor:
    """The steps between sample points, that stand next to the values of y."""
    rank, n = len(t.lift(y).shape), t.lift(y).shape[axis]
    shape = t.lift(x).shape
    if len(shape) == 1:
        if shape[0] != n:
            raise t.shape_error(f"{name}: There must be one `x` value for each sample point")
        x = x.reshape(tuple(n if k == axis else 1 for k in range(rank)))
    elif len(shape) < rank:
        x = x.reshape((1,) * (rank - len(shape)) + shape)
    size = t.lift(x).shape[axis]
    return x.narrow(axis, 1, size - 1) - x.narrow(axis, 0, size - 1)


def _integral(name: str) -> Callable:
    def rule(
        t: Trace, y: Tensor, x: Tensor | None = None, *, dx: float = 1, dim: int = -1
    ) -> Tensor:
        h = t.lift(y)
        if b1 in (h.dtype, None if x is None else t.lift(x).dtype):
            raise t.shape_error(f"{name}: received a bool input for `x` or `y`")
        axis = normal_axis(t, dim, len(h.shape))
        n = h.shape[axis] if h.shape else 0
        if not h.shape or not n:
            raise t.unsupported(f"{name} of no values has no rule")
        width = dx if x is None else _widths(t, y, x, axis, name)
        left, right = y.narrow(axis, 0, n - 1), y.narrow(axis, 1, n - 1)
        if name == "cumulative_trapezoid":
            if x is not None:
                return ((left + right) * width).cumsum(axis) / 2.0
            return (width / 2.0 * (left + right)).cumsum(axis)
        if x is not None:
            return ((left + right) * width).sum(axis) / 2.0
        ends = y.select(axis, 0) + y.select(axis, -1)
        return (y.sum(axis) - ends * 0.5) * width

    return rule


composed(torch.trapezoid, torch.trapz)(_integral("trapezoid"))
composed(torch.cumulative_trapezoid)(_integral("cumulative_trapezoid"))


@composed(torch.gradient)
def gradient(
    t: Trace,
    input: Tensor,
    *,
    spacing: object = None,
    dim: object = None,
    edge_order: int = 1,
) -> tuple[Tensor, ...]:
    """Central differences along each dim, and one-sided ones of the first or second order at the
    ends; `spacing` is a number, or one number or vector of places for each dim."""
    shape = t.lift(input).shape
    if input.dtype is torch.uint8:
        raise t.shape_error("torch.gradient does not support uint8 input.")
    if dim is None:
        dim = range(len(shape))
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    axes = [normal_axis(t, k, len(shape)) for k in dims]
    if len(set(axes)) < len(axes):
        raise t.shape_error("dim appears multiple times in the list of dims")
    if edge_order not in (1, 2):
        raise t.shape_error("torch.gradient only supports edge_order=1 and edge_order=2")
    if isinstance(spacing, (tuple, list)):
        steps = list(spacing)
    elif isinstance(spacing, Tensor):
        steps = [spacing]
    else:
        steps = [1 if spacing is None else spacing] * len(axes)
    if len(steps) != len(axes):
        raise t.shape_error(
            f"torch.gradient expected spacing to be unspecified, a scalar or a list of length "
            f"equal to the number of dims {len(axes)}, but got {len(steps)}"
        )
    for axis, step in zip(axes, steps, strict=True):
        if shape[axis] < edge_order + 1:
            raise t.shape_error(
                "torch.gradient expected each dimension size to be at least edge_order+1"
            )
        if isinstance(step, Tensor) and t.lift(step).shape != (shape[axis],):
            raise t.shape_error("torch.gradient expected each vector of places to fit its dim")
    pairs = zip(axes, steps, strict=True)
    return tuple(_slopes(input, k, step, edge_order, shape) for k, step in pairs)


def _slopes(x: Tensor, axis: int, step: object, order: int, shape: Sequence[int]) -> Tensor:
    n = shape[axis]

    def at(start: int, length: int) -> Tensor:
        return x.narrow(axis, start % n, length)

    if not isinstance(step, Tensor):
        center = (at(2, n - 2) - at(0, n - 2)) / (2 * step)
        if order == 1:
            first, last = (at(1, 1) - at(0, 1)) / step, (at(-1, 1) - at(-2, 1)) / step
        else:
            first = (-1.5 * at(0, 1) + 2 * at(1, 1) - 0.5 * at(2, 1)) / step
            last = (0.5 * at(-3, 1) - 2 * at(-2, 1) + 1.5 * at(-1, 1)) / step
        return torch.cat([first, center, last], axis)
    width = (step[1:] - step[:-1]).reshape([-1 if k == axis else 1 for k in range(len(shape))])

    def gap(start: int, length: int) -> Tensor:
        return width.narrow(axis, start % (n - 1), length)

    one, two = gap(0, n - 2), gap(1, n - 2)
    low, mid = -two / (one * (one + two)), (two - one) / (one * two)
    center = low * at(0, n - 2) + mid * at(1, n - 2) + one / (two * (one + two)) * at(2, n - 2)
    if order == 1:
        first = (at(1, 1) - at(0, 1)) / gap(0, 1)
        last = (at(-1, 1) - at(-2, 1)) / gap(-1, 1)
    else:
        first = _edge(gap(0, 1), gap(1, 1), at(0, 1), at(1, 1), at(2, 1))
        last = -_edge(gap(-1, 1), gap(-2, 1), at(-1, 1), at(-2, 1), at(-3, 1))
    return torch.cat([first, center, last], axis)


def _edge(one: Tensor, two: Tensor, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """The slope at an end of the parabola through three places, by the gaps between them."""
    near = -(2 * one + two) / (one * (one + two))
    return near * x + (one + two) / (one * two) * y - one / (two * (one + two)) * z


for _name, _implementation in (
    ("cumprod", cumprod),
    ("cummax", _running("cummax")),
    ("cummin", _running("cummin")),
    ("logcumsumexp", logcumsumexp),
):
    register((_name,), _implementation, inplace=False)
