"""Movement and indexing primitives as ONNX operators.

Each entry of `MOVEMENT` is a function `(w, node, *operands) -> name`: the writer, the node of the
IR, and the names of its operands, held as `writer.held` says.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tracejit.export.onnx.writer import Writer, held
from tracejit.ir.graph import Node
from tracejit.ir.ops.indexing import missing
from tracejit.ir.types import Type

_LEAST = np.iinfo(np.int64).min


def _of(node: Node, k: int = 0) -> Type:
    """The type of an operand."""
    return node.args[k].type


def _reshape(w: Writer, node: Node, x: str) -> str:
    return w.reshape(x, node.out.type.shape)


def _slice(w: Writer, node: Node, x: str) -> str:
    rows = [node.attr(name) for name in ("starts", "stops", "steps")]
    kept = [(0, n, 1) for n in _of(node).shape]
    axes = [k for k, row in enumerate(zip(*rows, strict=True)) if row != kept[k]]
    if not axes:
        return x
    starts, stops, steps = (w.ints(*(row[k] for k in axes)) for row in rows)
    return w.Slice(x, starts, stops, w.ints(*axes), steps)


def _flip(w: Writer, node: Node, x: str) -> str:
    axes = node.attr("axes")
    if not axes or not node.out.type.numel:
        return x
    back = (-1,) * len(axes)
    return w.Slice(x, w.ints(*back), w.ints(*(_LEAST for _ in axes)), w.ints(*axes), w.ints(*back))


def _padded(w: Writer, x: str, low: tuple, high: tuple, value: str) -> str:
    return w.Pad(x, w.ints(*low, *high), value) if any((*low, *high)) else x


def _pad(w: Writer, node: Node, x: str) -> str:
    """Gaps between the elements of an axis are the padding of an axis of one behind it."""
    shape = [*_of(node).shape]
    value = w.constant(node.attr("value"), held(node.out.type.dtype))
    for axis, gap in enumerate(node.attr("interior")):
        if not gap or shape[axis] < 2:
            continue
        x = w.reshape(x, (*shape[: axis + 1], 1, *shape[axis + 1 :]))
        none = (0,) * (len(shape) + 1)
        x = _padded(w, x, none, (*none[: axis + 1], gap, *none[axis + 2 :]), value)
        whole = shape[axis] * (gap + 1)
        x = w.reshape(x, (*shape[:axis], whole, *shape[axis + 1 :]))
        shape[axis] = whole - gap
        x = w.part(x, axis, 0, shape[axis])
    return _padded(w, x, node.attr("low"), node.attr("high"), value)


def _rows(w: Writer, node: Node, x: str, rows: np.ndarray, empty: bool) -> str:
    """Of the rows along the two axes of a window, those of these numbers, at their places; one past
    the last is of zeros, if `empty` says that it is read."""
    kind, axes = _of(node), node.attr("axes")
    rest = [k for k in range(len(kind.shape)) if k not in axes]
    shape = [kind.shape[k] for k in rest]
    x = w.Transpose(x, perm=(*axes, *rest))
    count = math.prod(kind.shape[a] for a in axes)
    x = w.reshape(x, (count, math.prod(shape)))
    if empty:
        x = w.Concat(x, w.filled(0, (1, math.prod(shape)), held(kind.dtype)), axis=0)
    x = w.Gather(x, w.constant(rows, np.int64), axis=0)
    x = w.reshape(x, (*rows.shape, *shape))
    order = (*axes, *rest)
    return w.Transpose(x, perm=[order.index(k) for k in range(len(order))])


def _window(w: Writer, node: Node, x: str) -> str:
    taps = np.arange(_of(node).shape[node.attr("axes")[1]])
    starts = np.arange(node.attr("count"))[:, None] * node.attr("stride")
    if not node.out.type.numel:
        return _empty(w, node)
    return _rows(w, node, x, (starts + taps * node.attr("dilation")) * len(taps) + taps, False)


def window_of_all(w: Writer, node: Node, x: str, shape: tuple) -> tuple[str, tuple]:
    """A window of what is the same for every tap: x has an axis of 1 there, and may have others.
    The result, and its shape."""
    axis, taps = node.attr("axes")
    size = _of(node).shape[taps]
    starts = np.arange(node.attr("count"))[:, None] * node.attr("stride")
    places = starts + np.arange(size) * node.attr("dilation")
    rest = [k for k in range(len(shape)) if k != taps]
    x = w.reshape(x, [shape[k] for k in rest])
    x = w.Gather(x, w.constant(places, np.int64), axis=rest.index(axis))
    order = [m for k in rest for m in ((axis, taps) if k == axis else (k,))]
    perm = [order.index(k) for k in range(len(order))]
    found = {axis: node.attr("count"), taps: size}
    shape = tuple(found.get(k, n) for k, n in enumerate(shape))
    return (x if perm == sorted(perm) else w.Transpose(x, perm=perm)), shape


def _unwindow(w: Writer, node: Node, x: str) -> str:
    """What tap k of the window that begins at (l - k·dilation) / stride gives to place l."""
    count, size = (_of(node).shape[a] for a in node.attr("axes"))
    if not node.out.type.numel or not count:
        return _zeros(w, node)
    taps = np.arange(size)
    begins = np.arange(node.attr("length"))[:, None] - taps * node.attr("dilation")
    window, off = np.divmod(begins, node.attr("stride"))
    exists = (off == 0) & (window >= 0) & (window < count)
    return _rows(w, node, x, np.where(exists, window * size + taps, count * size), True)


def _zeros(w: Writer, node: Node) -> str:
    return w.filled(0, node.out.type.shape, held(node.out.type.dtype))


def _empty(w: Writer, node: Node) -> str:
    """A result without elements."""
    return w.constant(np.zeros(node.out.type.shape), held(node.out.type.dtype))


def _inside(w: Writer, index: str, size: int) -> str:
    """Where an index names a place."""
    least = w.GreaterOrEqual(index, w.constant(0, np.int64))
    return w.And(least, w.Less(index, w.constant(size, np.int64)))


def _gather(w: Writer, node: Node, x: str, index: str) -> str:
    """What is out of range reads `missing`; in ONNX it may not stand there, or counts backward."""
    axis, kind = node.attr("axis"), node.out.type
    size, dtype = _of(node).shape[axis], held(kind.dtype)
    fill = w.constant(missing(kind.dtype), dtype)
    if not size or not kind.numel:
        return w.full(fill, kind.shape)
    inside = _inside(w, index, size)
    found = w.GatherElements(x, w.Where(inside, index, w.constant(0, np.int64)), axis=axis)
    return w.where(inside, found, w.full(fill, kind.shape) if dtype == np.bool_ else fill, dtype)


_REDUCTIONS = {"add": "add", "mul": "mul", "max": "max", "min": "min"}


def _scatter(w: Writer, node: Node, x: str, index: str, source: str) -> str:
    """Into a tensor with one more row, which takes what is out of range. ONNX leaves open which of
    several elements for one place is the last, so all but that one go there too."""
    axis, combine, kind = node.attr("axis"), node.attr("combine"), _of(node)
    size, places = kind.shape[axis], _of(node, 1)
    if not kind.numel or not places.numel:
        return x
    dtype, outside = held(kind.dtype), w.constant(size, np.int64)
    index = w.Where(_inside(w, index, size), index, outside)
    row = (*kind.shape[:axis], 1, *kind.shape[axis + 1 :])
    more = w.Concat(x, w.filled(0, row, dtype), axis=axis)
    attrs = {"axis": axis}
    if combine in _REDUCTIONS:
        attrs["reduction"] = _REDUCTIONS[combine]
    else:
        steps = w.row(np.arange(places.shape[axis]), axis, len(places.shape))
        order = w.full(steps, places.shape)
        none = w.filled(-1, (*row[:axis], size + 1, *row[axis + 1 :]), np.int64)
        last = w.ScatterElements(none, index, order, axis=axis, reduction="max")
        is_last = w.Equal(w.GatherElements(last, index, axis=axis), order)
        index = w.Where(is_last, index, outside)
    return w.part(w.ScatterElements(more, index, source, **attrs), axis, 0, size)


def _cumsum(w: Writer, node: Node, x: str) -> str:
    return w.CumSum(x, w.constant(node.attr("axis"), np.int64))


def _accumulate(w: Writer, node: Node, x: str) -> str:
    """In log2(n) steps: each element takes in what stands 1, 2, 4, … before it."""
    combine, kind = node.attr("combine"), held(node.out.type.dtype)
    if combine == "mul":
        return _scanned(w, node, (x,), (1,), lambda y, z: (w.Mul(y[0], z[0]),))[0]
    if combine == "logaddexp":
        fold, least = (lambda y, z: (_log_added(w, y[0], z[0], kind),)), -math.inf
        return _scanned(w, node, (x,), (least,), fold)[0]
    most, related = combine == "max", w.GreaterOrEqual if combine == "max" else w.LessOrEqual

    def later(y: tuple[str, ...], z: tuple[str, ...]) -> tuple[str, ...]:
        own = related(z[0], y[0])
        if kind.kind == "f":
            own = w.Or(own, w.IsNaN(z[0]))
        return (w.Where(own, z[0], y[0]),)

    if kind.kind == "f":
        least = -math.inf if most else math.inf
    else:
        least = np.iinfo(kind).min if most else np.iinfo(kind).max
    return _scanned(w, node, (x,), (least,), later)[0]


def _log_added(w: Writer, x: str, z: str, kind: np.dtype) -> str:
    """log(exp(x) + exp(z)), and an infinity of two that are alike; NaN of NaN."""
    above = w.GreaterOrEqual(x, z)
    most, least = w.Where(above, x, z), w.Where(above, z, x)
    one = w.constant(1, kind)
    total = w.Add(most, w.Log(w.Add(one, w.Exp(w.Sub(least, most)))))
    return w.Where(w.And(w.Equal(x, z), w.IsInf(x)), x, total)


def _recurrence(w: Writer, node: Node, factor: str, term: str) -> str:
    """Pairs (a, b) that stand for y -> a·y + b, one put into the other."""

    def put(y: tuple[str, ...], z: tuple[str, ...]) -> tuple[str, ...]:
        return w.Mul(y[0], z[0]), w.Add(w.Mul(z[0], y[1]), z[1])

    return _scanned(w, node, (factor, term), (1, 0), put)[1]


def _scanned(
    w: Writer, node: Node, xs: tuple[str, ...], fill: tuple[float, ...], both: Callable
) -> tuple[str, ...]:
    """All results along an axis of `both`, of what is earlier and what is later; `fill` changes
    nothing as the earlier of the two."""
    axis, shape, kind = node.attr("axis"), node.out.type.shape, held(node.out.type.dtype)
    by = 1
    while by < shape[axis]:
        start = (*shape[:axis], by, *shape[axis + 1 :])
        parts = [
            (w.filled(f, start, kind), w.part(x, axis, 0, shape[axis] - by))
            for x, f in zip(xs, fill, strict=True)
        ]
        xs = both(tuple(w.Concat(*pair, axis=axis) for pair in parts), xs)
        by *= 2
    return xs


def _argsort(w: Writer, node: Node, x: str) -> str:
    """TopK, in which equal elements keep their order. NaN is the largest: sorted as infinity first,
    and then by what is NaN."""
    axis, count, kind = node.attr("axis"), node.attr("count"), _of(node)
    if not node.out.type.numel:
        return w.constant(np.zeros(node.out.type.shape), np.int64)
    order = {"axis": axis, "largest": int(node.attr("descending")), "sorted": 1}
    whole = w.ints(kind.shape[axis])
    if not kind.dtype.is_float:
        x = x if held(kind.dtype) != np.bool_ else w.cast(x, np.int32)
        return w.several("TopK", [x, w.ints(count)], 2, **order)[1]
    missing_ = w.IsNaN(x)
    x = w.Where(missing_, w.constant(math.inf, held(kind.dtype)), x)
    first = w.several("TopK", [x, whole], 2, **order)[1]
    flags = w.GatherElements(w.cast(missing_, np.int32), first, axis=axis)
    second = w.several("TopK", [flags, w.ints(count)], 2, **order)[1]
    return w.GatherElements(first, second, axis=axis)


MOVEMENT: dict[str, Callable[..., str]] = {
    **{"reshape": _reshape, "slice": _slice, "flip": _flip, "pad": _pad},
    **{"window": _window, "unwindow": _unwindow},
    **{"gather": _gather, "scatter": _scatter, "cumsum": _cumsum, "argsort": _argsort},
    **{"accumulate": _accumulate, "recurrence": _recurrence},
}
