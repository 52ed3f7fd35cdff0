"""Pooling in one to three dimensions: the largest or the mean of every window.

The largest goes to the first element that attains it, in the order of the window, as does its
gradient; of several NaN the last one counts, as in eager.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch

from tracejit.capture.functions.common import cast, expand, literal
from tracejit.capture.functions.derived import derived
from tracejit.capture.functions.layouts import like, like_image
from tracejit.capture.functions.patterns import position
from tracejit.capture.functions.reduction import attains
from tracejit.capture.functions.windows import Windows, ints_of, readers, taps
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import TO_TORCH, Handle, Ints, TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Value
from tracejit.ir.types import DType, b1

Tensor = torch.Tensor
functional = torch.nn.functional
builtin = torch._C._nn


def _windows(
    t: Trace,
    h: Handle,
    rank: int,
    size: object,
    stride: object,
    padding: object,
    dilation: object,
    ceil_mode: bool,
) -> Windows:
    """The windows of a pooling, checked as eager checks them."""
    size = ints_of(t, size, rank, "kernel_size")
    no_stride = stride is None or (isinstance(stride, (tuple, list)) and not stride)
    stride = size if no_stride else ints_of(t, stride, rank, "stride")
    padding = ints_of(t, padding, rank, "padding")
    dilation = ints_of(t, dilation, rank, "dilation")
    _check_image(t, h, rank)
    if any(n <= 0 for n in (*size, *stride, *dilation)):
        raise t.shape_error("kernel size, stride and dilation should be greater than zero")
    rows = zip(padding, size, dilation, strict=True)
    if any(p < 0 or p > ((k - 1) * d + 1) // 2 for p, k, d in rows):
        raise t.shape_error("pad should be at most half of effective kernel size")
    count = []
    length = h.shape[-rank:]
    for n, k, s, p, d in zip(length, size, stride, padding, dilation, strict=True):
        left = n + 2 * p - d * (k - 1) - 1 + (s - 1 if ceil_mode else 0)
        windows = left // s + 1
        if ceil_mode and (windows - 1) * s >= n + p:
            windows -= 1
        count.append(windows)
    if any(n < 1 for n in count):
        raise t.shape_error(
            f"Given input size: {list(h.shape[-rank - 1 :])}. Calculated output size: {count}. "
            "Output size is too small"
        )
    return Windows(size, stride, padding, dilation, length, tuple(count))


def _check_image(t: Trace, h: Handle, rank: int) -> None:
    if len(h.shape) not in (rank + 1, rank + 2):
        raise t.shape_error(
            f"Expected {rank + 1}D or {rank + 2}D (batch mode) tensor, but got {list(h.shape)}"
        )
    if 0 in h.shape[-rank - 1 :]:
        raise t.shape_error(
            f"Expected input with optional 0 dim batch size, but got {list(h.shape)}"
        )


# ---- maxima


def _read(t: Trace, v: Value, w: Windows) -> Value:
    """What the windows hold that read each element, on further axes if there may be several."""
    x = readers(t, v, w)
    return t.b.reshape(x, shape=x.type.shape[: -w.rank]) if w.apart else x


def _lowest(dtype: DType) -> float | int:
    if dtype.is_float:
        return -math.inf
    return 0 if dtype.kind == "u" else -(1 << (dtype.itemsize * 8 - 1))


def _flat_places(t: Trace, length: Ints, device: str) -> Value:
    """The number of each element of an image, counted in row-major order."""
    flat = position(t, 0, (math.prod(length),), device)
    return t.b.reshape(flat, shape=length)


def _largest(t: Trace, x: Value, places: Value, rank: int) -> tuple[Value, Value]:
    """x[…, *windows, *taps] → the largest of each window, and its place."""
    b, shape = t.b, x.type.shape
    axes = tuple(range(len(shape) - rank, len(shape)))
    top = b.reduce_max(x, axes=axes)
    kept = (*top.type.shape, *(1,) * rank)
    hit = attains(t, x, expand(t, b.reshape(top, shape=kept), shape))
    places = expand(t, places, shape)
    if x.type.dtype.is_float:  # the last NaN is the least
        places = b.where(b.eq(x, x), places, b.neg(places))
    first = b.reduce_min(b.where(hit, places, _FAR), axes=axes)
    return top, b.abs(first) if x.type.dtype.is_float else first


_FAR = 1 << 62  # no place


def _max_of(
    t: Trace,
    name: str,
    h: Handle,
    cut: Callable,
    back: Callable,
    rank: int,
    *,
    dense: bool = False,
) -> tuple[TracedTensor, TracedTensor]:
    """The largest of windows, and the place of each in its image; row-major, if `dense`.

    `cut(x, fill)` are the elements of each window; `back(value)` gives, for each element, that of
    the windows which read it, on further axes.
    """
    x, length = t.read(h), h.shape[-rank:]
    if h.dtype is b1:
        raise t.not_implemented(name, b1)
    with t.untaped():
        places = _flat_places(t, length, h.device)
        top, first = _largest(t, cut(x, _lowest(h.dtype)), cut(places, _FAR), rank)
    t.ranges[first] = 0, math.prod(length) - 1

    def vjp(b, cts, need):
        g, chosen = back(cts[0]), back(first)
        more = len(g.type.shape) - len(h.shape)
        here = b.reshape(places, shape=(*length, *(1,) * more))
        here = expand(t, here, g.type.shape)
        given = b.where(b.eq(chosen, here), g, 0.0)
        axes = tuple(range(len(h.shape), len(g.type.shape)))
        return (t.unread(b.reduce_sum(given, axes=axes) if axes else given, x),)

    y = t.saves(t.derive(name, (x,), top, vjp), x)
    strides = None if dense else _like(h, y.type.shape, rank)
    return t.fresh(y, strides), t.fresh(first, strides)


def _like(h: Handle, shape: Ints, rank: int) -> Ints | None:
    """The strides of what pooling along the last `rank` axes makes of h."""
    return (like_image if rank == 1 else like)(h, shape)


def _max_pool(rank: int, form: str):
    """max_pool, which returns the places too if `form` is "both", or if it is asked to."""

    def both(
        t: Trace,
        input: Tensor,
        kernel_size: object,
        stride: object = None,
        padding: object = 0,
        dilation: object = 1,
        ceil_mode: bool = False,
        *,
        dense: bool = False,
    ) -> tuple[TracedTensor, TracedTensor]:
        h = t.lift(input)
        if rank == 1 and form != "both" and not h.dtype.is_float:
            raise t.not_implemented("max_pool1d_impl", h.dtype)
        w = _windows(t, h, rank, kernel_size, stride, padding, dilation, ceil_mode)

        def cut(x: Value, fill: float) -> Value:
            return taps(t, x, w, fill)

        back = partial(_read, t, w=w)
        return _max_of(t, f"max_pool{rank}d", h, cut, back, rank, dense=dense)

    def largest(
        t: Trace, input: Tensor, *args: object, return_indices: bool = False, **kwargs: object
    ) -> object:
        places = return_indices or (len(args) > 5 and args[5])
        # eager has a function of its own for lines, where only values are asked for
        dense = rank == 1 and not places and not (t.grad_on and t.requires_grad(t.lift(input)))
        found = both(t, input, *args[:5], dense=dense, **kwargs)
        return found if places else found[0]

    def with_places(
        t: Trace, input: Tensor, *args: object, return_indices: bool = True, **kwargs: object
    ) -> tuple[TracedTensor, TracedTensor]:
        return both(t, input, *args[:5], **kwargs)

    return with_places if form == "both" else largest


def _ends(t: Trace, axis: int, w: Ints, into: Ints, device: str) -> tuple[Value, Value]:
    """Where the adaptive windows along an axis start and end, as vectors."""
    b, n, m = t.b, w[axis], into[axis]
    q = position(t, 0, (m,), device)
    start = b.floordiv(b.mul(q, n), m)
    end = b.floordiv(b.add(b.mul(b.add(q, 1), n), m - 1), m)
    return start, end


def _inside(t: Trace, length: Ints, into: Ints, device: str) -> Value:
    """Whether an element is in an adaptive window: bool[*into, *length]."""
    b, rank, shape = t.b, len(length), (*into, *length)
    found = None
    for axis in range(rank):
        start, end = (
            expand(t, b.reshape(v, shape=_on_axis(v, axis, 2 * rank)), shape)
            for v in _ends(t, axis, length, into, device)
        )
        here = position(t, rank + axis, shape, device)
        both = b.and_(b.ge(here, start), b.lt(here, end))
        found = both if found is None else b.and_(found, both)
    return found


def _on_axis(v: Value, axis: int, rank: int) -> Ints:
    return tuple(v.type.numel if k == axis else 1 for k in range(rank))


def _adaptive(t: Trace, h: Handle, output_size: object, rank: int) -> tuple[Ints, Windows | None]:
    """The result's size, and its windows where all are equal."""
    _check_image(t, h, rank)
    length = h.shape[-rank:]
    if isinstance(output_size, (tuple, list)):
        if len(output_size) not in (1, rank):
            raise t.shape_error(f"adaptive pooling: output_size must have {rank} elements")
        given = tuple(output_size) * (rank if len(output_size) == 1 else 1)
    else:
        given = (output_size,) * rank
    into = tuple(n if m is None else int(m) for m, n in zip(given, length, strict=True))
    if any(m < 0 for m in into):
        raise t.shape_error("adaptive pooling: elements of output_size must not be negative")
    if 0 in into:
        raise t.unsupported("Adaptive pooling to an empty image has no rule")
    if any(n % m for n, m in zip(length, into, strict=True)):
        return into, None
    size = tuple(n // m for n, m in zip(length, into, strict=True))
    return into, Windows(size, size, (0,) * rank, (1,) * rank, length, into)


def _spread_out(t: Trace, x: Value, into: Ints) -> Value:
    """x[…, *length] → x[…, *into, *length]"""
    shape, rank = x.type.shape, len(into)
    front, length = shape[:-rank], shape[-rank:]
    thin = t.b.reshape(x, shape=(*front, *(1,) * rank, *length))
    return expand(t, thin, (*front, *into, *length))


def _adaptive_max(rank: int, form: str):
    def both(t: Trace, input: Tensor, output_size: object) -> tuple[TracedTensor, TracedTensor]:
        h = t.lift(input)
        if not h.dtype.is_float:
            raise t.not_implemented(f"adaptive_max_pool{rank}d", h.dtype)
        into, w = _adaptive(t, h, output_size, rank)
        length = h.shape[-rank:]

        def cut(x: Value, fill: float) -> Value:
            if w is not None:
                return taps(t, x, w, fill)
            x = _spread_out(t, x, into)
            inside = expand(t, _inside(t, length, into, h.device), x.type.shape)
            return t.b.where(inside, x, literal(fill, x.type.dtype))

        def back(v: Value) -> Value:
            return _read(t, v, w) if w is not None else _spread_out(t, v, length)

        return _max_of(t, f"adaptive_max_pool{rank}d", h, cut, back, rank, dense=rank == 3)

    def largest(
        t: Trace, input: Tensor, output_size: object, return_indices: bool = False
    ) -> object:
        found = both(t, input, output_size)
        return found if return_indices else found[0]

    def with_places(
        t: Trace, input: Tensor, output_size: object, return_indices: bool = True
    ) -> tuple[TracedTensor, TracedTensor]:
        return both(t, input, output_size)

    return with_places if form == "both" else largest


# ---- means


def _counts(t: Trace, w: Windows, axis: int, padded: bool, like: Value) -> Value | float:
    """How many elements each window along an axis counts: a number where all have as many."""
    n, k, s, p = w.length[axis], w.size[axis], w.stride[axis], w.low[axis]
    first, last = (-p, n + p) if padded else (0, n)
    starts = [q * s - p for q in range(w.count[axis])]
    found = {min(a + k, last) - max(a, first) for a in starts}
    if len(found) == 1:
        return float(found.pop())
    b = t.b
    start = position(t, 0, (w.count[axis],), like.type.device)
    start = b.sub(b.mul(start, s), p)
    count = b.sub(b.minimum(b.add(start, k), last), b.maximum(start, first))
    count = b.reshape(cast(t, count, like.type.dtype), shape=_on_axis(start, axis, w.rank))
    return expand(t, count, like.type.shape)


def _mean(
    t: Trace,
    name: str,
    h: Handle,
    cut: Callable,
    back: Callable,
    divided: Callable,
    rank: int,
    *,
    flat: bool = True,
    dense: bool = False,
) -> TracedTensor:
    """The sums of windows, `divided`; row-major, if `dense`. `cut` and `back` are as those of the
    largest."""
    x, axes = t.read(h), len(h.shape)
    if not h.dtype.is_float:
        raise t.unsupported(f"{name} of {TO_TORCH[h.dtype]} has no rule")

    def forward(x: Value) -> Value:
        return divided(_total(t, cut(x), axes))

    def slope(g: Value, y: Value, x: Value) -> Value:
        return _total(t, back(divided(g)), axes)

    y = derived(t, name, (x,), forward, (slope,), flat=flat)
    return t.fresh(y, None if dense else _like(h, y.type.shape, rank))


def _total(t: Trace, x: Value, rank: int) -> Value:
    """x summed over all axes but the first ones."""
    axes = tuple(range(rank, len(x.type.shape)))
    return t.b.reduce_sum(x, axes=axes) if axes else x


def _avg_pool(rank: int):
    def rule(
        t: Trace,
        input: Tensor,
        kernel_size: object,
        stride: object = None,
        padding: object = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> TracedTensor:
        h = t.lift(input)
        if rank == 3 and h.dtype.narrow and h.device == "cpu":
            raise t.not_implemented("avg_pool3d_out_frame", h.dtype)
        w = _windows(t, h, rank, kernel_size, stride, padding, 1, ceil_mode)
        if divisor_override == 0:
            raise t.shape_error("divisor must be not zero")

        def divided(x: Value) -> Value:
            if divisor_override is not None:
                return t.b.div(x, float(divisor_override))
            whole = 1.0
            for axis in range(rank):
                count = _counts(t, w, axis, count_include_pad, x)
                if isinstance(count, float):
                    whole *= count
                else:
                    x = t.b.div(x, count)
            return x if whole == 1.0 else t.b.div(x, whole)

        return _mean(
            t,
            f"avg_pool{rank}d",
            h,
            lambda x: taps(t, x, w, 0),
            lambda g: _read(t, g, w),
            divided,
            rank,
            dense=rank == 3,
        )

    return rule


def _adaptive_avg(rank: int):
    def rule(t: Trace, input: Tensor, output_size: object) -> TracedTensor:
        h = t.lift(input)
        into, w = _adaptive(t, h, output_size, rank)
        length = h.shape[-rank:]

        def inside(x: Value, axes: tuple[int, ...]) -> Value:
            found = t.b.permute(_inside(t, length, into, h.device), axes=axes)
            return t.b.where(expand(t, found, x.type.shape), x, 0.0)

        def cut(x: Value) -> Value:
            if w is not None:
                return taps(t, x, w, 0)
            return inside(_spread_out(t, x, into), tuple(range(2 * rank)))

        def back(g: Value) -> Value:
            if w is not None:
                return _read(t, g, w)
            return inside(_spread_out(t, g, length), (*range(rank, 2 * rank), *range(rank)))

        def divided(x: Value) -> Value:
            if w is not None:
                return t.b.div(x, float(math.prod(w.size)))
            for axis in range(rank):
                start, end = _ends(t, axis, length, into, h.device)
                count = cast(t, t.b.sub(end, start), x.type.dtype)
                count = t.b.reshape(count, shape=_on_axis(count, axis, rank))
                x = t.b.div(x, expand(t, count, x.type.shape))
            return x

        flat = set(into) != {1}  # torch takes a mean
        dense = rank == 3 and set(into) != {1}  # a mean of the whole keeps the layout
        name = f"adaptive_avg_pool{rank}d"
        return _mean(t, name, h, cut, back, divided, rank, flat=flat, dense=dense)

    return rule


# ---- torch's functions

for _rank in (1, 2, 3):
    _names = f"max_pool{_rank}d", f"max_pool{_rank}d_with_indices"
    _largest_rule, _both_rule = _max_pool(_rank, "largest"), _max_pool(_rank, "both")
    rule(getattr(functional, _names[0]), getattr(torch, _names[0]))(_largest_rule)
    _where = torch if _rank == 1 else builtin
    rule(getattr(functional, _names[1]), getattr(_where, _names[1]))(_both_rule)

    _name = f"avg_pool{_rank}d"
    rule(getattr(torch if _rank == 1 else builtin, _name))(_avg_pool(_rank))

    _name = f"adaptive_avg_pool{_rank}d"
    _spelled = {getattr(functional, _name), getattr(torch if _rank == 1 else builtin, _name)}
    rule(*_spelled)(_adaptive_avg(_rank))

    _name = f"adaptive_max_pool{_rank}d"
    rule(getattr(functional, _name))(_adaptive_max(_rank, "largest"))
    _both_adaptive = _adaptive_max(_rank, "both")
    rule(
        getattr(functional, f"{_name}_with_indices"),
        getattr(torch if _rank == 1 else builtin, _name),
    )(_both_adaptive)
