"""Tensors put together and taken apart: cat, stack, split, chunk, movedim, …

Views (split, chunk, movedim, …) are handles on the same storage, as in torch; the others
are compositions of movement primitives and `where`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tracejit.capture.functions.common import (
    Operand,
    by_rule,
    cast,
    literal,
    normal_axis,
    register,
    result_dtype,
)
from tracejit.capture.functions.layouts import channels_last, is_channels_last
from tracejit.capture.functions.movement import (
    narrow,
    permute,
    reshape,
    unsqueeze,
    view,
)
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Value
from tracejit.ir.ops.movement import part
from tracejit.ir.types import i64

Tensor = torch.Tensor
Tensors = Sequence[Tensor]


# ---- joining


def joined(t: Trace, pieces: Sequence[Value], axis: int) -> Value:
    """Values of one dtype along an axis, each where its positions begin."""
    sizes = [p.type.shape[axis] for p in pieces]
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    with t.untaped():
        value = _joined(t, pieces, starts, axis, sum(sizes))

    def vjp(b, cts, need):
        (g,) = cts
        for piece, start, wanted in zip(pieces, starts, need, strict=True):
            yield part(b, g, axis, start, piece.type.shape[axis]) if wanted else None

    return t.derive("cat", tuple(pieces), value, vjp)


def _joined(t: Trace, pieces: Sequence[Value], starts: list[int], axis: int, total: int) -> Value:
    kind = pieces[0].type
    rank = len(kind.shape)
    value = None
    for piece, start in zip(pieces, starts, strict=True):
        after = total - start - piece.type.shape[axis]
        padded = t.b.pad(
            piece,
            low=tuple(start if k == axis else 0 for k in range(rank)),
            high=tuple(after if k == axis else 0 for k in range(rank)),
            interior=(0,) * rank,
            value=literal(0, kind.dtype),
        )
        if value is None:
            value = padded
            continue
        place = t.b.iota(axis=axis, shape=padded.type.shape, dtype=i64, device=kind.device)
        value = t.b.where(t.b.lt(place, start), value, padded)
    return value


def cat(t: Trace, tensors: Tensors, dim: int = 0) -> TracedTensor:
    """torch.cat; tensors of shape (0,) are skipped, as they always were."""
    if not tensors:
        raise ValueError("torch.cat(): expected a non-empty list of Tensors")
    handles = [t.lift(x) for x in tensors]
    if any(not h.shape for h in handles):
        raise t.shape_error("zero-dimensional tensors cannot be concatenated")
    kept = [h for h in handles if h.shape != (0,)] or handles[:1]
    axis = normal_axis(t, dim, len(kept[0].shape))
    first = kept[0].shape
    for h in kept:
        same = len(h.shape) == len(first) and all(
            n == m or k == axis for k, (n, m) in enumerate(zip(h.shape, first, strict=True))
        )
        if not same:
            raise t.shape_error(
                f"Sizes of tensors must match except in dimension {axis}: got {list(h.shape)} "
                f"and {list(first)}"
            )
    dtype = result_dtype([Operand(h) for h in handles])
    value = joined(t, [cast(t, t.read(h), dtype) for h in kept], axis)
    for h in handles:
        if h not in kept and h.dtype.is_float:  # it gets a gradient, which is as empty
            value = t.unread(value, t.read(h))
    last = all(is_channels_last(h.shape, h.strides) for h in handles)
    return t.fresh(value, channels_last(value.type.shape) if last else None)


def stack(t: Trace, tensors: Tensors, dim: int = 0) -> TracedTensor:
    if not tensors:
        raise t.shape_error("stack expects a non-empty TensorList")
    first = t.lift(tensors[0]).shape
    for x in tensors:
        if t.lift(x).shape != first:
            raise t.shape_error(
                f"stack expects each tensor to be equal size, but got {list(first)} and "
                f"{list(t.lift(x).shape)}"
            )
    axis = normal_axis(t, dim, len(first) + 1)
    return cat(t, [unsqueeze(t, x, axis) for x in tensors], axis)


def at_least(t: Trace, x: Tensor, rank: int) -> Tensor:
    """atleast_1d, atleast_2d, atleast_3d of one tensor."""
    have = len(t.lift(x).shape)
    if have >= rank:
        return x
    if have == 0:
        return reshape(t, x, (1,) * rank)
    x = unsqueeze(t, x, 0) if have == 1 and rank > 1 else x
    return unsqueeze(t, x, -1) if rank == 3 else x


def _require_some(t: Trace, tensors: Tensors) -> None:
    if not tensors:
        raise t.shape_error("expected a non-empty TensorList")


def hstack(t: Trace, tensors: Tensors) -> TracedTensor:
    _require_some(t, tensors)
    tensors = [at_least(t, x, 1) for x in tensors]
    return cat(t, tensors, int(len(t.lift(tensors[0]).shape) > 1))


def vstack(t: Trace, tensors: Tensors) -> TracedTensor:
    _require_some(t, tensors)
    return cat(t, [at_least(t, x, 2) for x in tensors], 0)


def dstack(t: Trace, tensors: Tensors) -> TracedTensor:
    _require_some(t, tensors)
    return cat(t, [at_least(t, x, 3) for x in tensors], 2)


def column_stack(t: Trace, tensors: Tensors) -> TracedTensor:
    columns = [
        x if len(t.lift(x).shape) > 1 else reshape(t, x, (t.lift(x).numel, 1)) for x in tensors
    ]
    return hstack(t, columns)


# ---- taking apart


def split(t: Trace, tensor: Tensor, split_size_or_sections: object, dim: int = 0) -> tuple:
    """Views of equal size (the last may be smaller), or of the given sizes."""
    if isinstance(split_size_or_sections, (tuple, list)):
        return split_with_sizes(t, tensor, split_size_or_sections, dim)
    h, size = t.lift(tensor), int(split_size_or_sections)
    axis = normal_axis(t, dim, len(h.shape))
    if not h.shape:
        raise t.shape_error("split expects at least a 1-dimensional tensor")
    n = h.shape[axis]
    if size < 0 or (size == 0 and n):
        raise t.shape_error(f"split expects split_size be non-negative and not 0, but got {size}")
    starts = range(0, n, size) if n else (0,)
    return t.together(tuple(narrow(t, tensor, axis, s, min(size, n - s)) for s in starts))


def split_with_sizes(t: Trace, tensor: Tensor, split_sizes: Sequence[int], dim: int = 0) -> tuple:
    """Views of the given sizes."""
    return t.together(_pieces(t, tensor, split_sizes, dim))


def _pieces(t: Trace, tensor: Tensor, split_sizes: Sequence[int], dim: int) -> tuple:
    h = t.lift(tensor)
    axis, sizes = normal_axis(t, dim, len(h.shape)), [int(n) for n in split_sizes]
    if not h.shape or sum(sizes) != h.shape[axis] or any(n < 0 for n in sizes):
        raise t.shape_error(f"split_with_sizes expects sizes that sum to the extent, got {sizes}")
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return tuple(narrow(t, tensor, axis, s, n) for s, n in zip(starts, sizes, strict=True))


def chunk(t: Trace, input: Tensor, chunks: int, dim: int = 0) -> tuple:
    h = t.lift(input)
    if not h.shape:
        raise t.shape_error("chunk expects at least a 1-dimensional tensor")
    if chunks <= 0:
        raise t.shape_error(f"chunk expects `chunks` to be greater than 0, got: {chunks}")
    n = h.shape[normal_axis(t, dim, len(h.shape))]
    if n == 0:
        return split_with_sizes(t, input, [0] * chunks, dim)
    return split(t, input, -(-n // chunks), dim)


def tensor_split(
    t: Trace,
    input: Tensor,
    indices_or_sections: object = None,
    dim: int = 0,
    *,
    indices: object = None,
    sections: object = None,
) -> tuple:
    """Views between the given indices, or of nearly equal sizes."""
    given = next(x for x in (indices_or_sections, indices, sections) if x is not None)
    h = t.lift(input)
    if isinstance(given, Tensor):
        given = by_rule(t, Tensor.tolist, given)
    if not h.shape:
        raise t.shape_error("tensor_split expected at least a 1-dimensional tensor")
    axis = normal_axis(t, dim, len(h.shape))
    n = h.shape[axis]
    if isinstance(given, int):
        if given <= 0:
            raise t.shape_error(f"number of sections must be larger than 0, got {given}")
        small, more = divmod(n, given)
        sizes = [small + (k < more) for k in range(given)]
        return _pieces(t, input, sizes, axis)
    ends = [*(slice(None, int(i)).indices(n)[1] for i in given), n]
    begins = [0, *ends[:-1]]
    return tuple(
        narrow(t, input, axis, s, max(e - s, 0)) for s, e in zip(begins, ends, strict=True)
    )


def _split_along(name: str, dim: int, least: int):
    def rule(t: Trace, input: Tensor, indices_or_sections: object) -> tuple:
        rank = len(t.lift(input).shape)
        if rank < least:
            raise t.shape_error(f"torch.{name} requires a tensor with at least {least} dimension")
        axis = 0 if name == "hsplit" and rank == 1 else dim
        n = t.lift(input).shape[axis]
        if isinstance(indices_or_sections, int) and (
            indices_or_sections <= 0 or n % indices_or_sections
        ):
            raise t.shape_error(f"torch.{name}: {indices_or_sections} sections do not divide {n}")
        return tensor_split(t, input, indices_or_sections, axis)

    return rule


# ---- views


def movedim(t: Trace, input: Tensor, source: object, destination: object) -> TracedTensor:
    rank = len(t.lift(input).shape)
    source = (source,) if isinstance(source, int) else tuple(source)
    destination = (destination,) if isinstance(destination, int) else tuple(destination)
    if len(source) != len(destination):
        raise t.shape_error(f"movedim: {source} and {destination} differ in length")
    come = [normal_axis(t, a, rank) for a in source]
    go = [normal_axis(t, a, rank) for a in destination]
    if len(set(come)) != len(come) or len(set(go)) != len(go):
        raise t.shape_error(f"movedim: repeated dim in {source} or {destination}")
    if not rank:
        return permute(t, input, ())
    order: list[int | None] = [None] * rank
    for a, b in zip(come, go, strict=True):
        order[b] = a
    others = iter(a for a in range(rank) if a not in come)
    return permute(t, input, tuple(next(others) if a is None else a for a in order))


def unflatten(t: Trace, input: Tensor, dim: int, sizes: Sequence[int]) -> TracedTensor:
    h = t.lift(input)
    axis = normal_axis(t, dim, len(h.shape))
    sizes = tuple(int(n) for n in sizes)
    if not h.shape or not sizes:
        raise t.shape_error("unflatten: sizes must be non-empty, and the tensor have an axis")
    known = math.prod(n for n in sizes if n != -1)
    if -1 in sizes and known and h.shape[axis] % known == 0:
        sizes = tuple(h.shape[axis] // known if n == -1 else n for n in sizes)
    if math.prod(sizes) != h.shape[axis] or any(n < 0 for n in sizes):
        raise t.shape_error(f"unflatten: {sizes} don't multiply up to {h.shape[axis]}")
    return view(t, input, h.shape[:axis] + sizes + h.shape[axis + 1 :])


@rule(torch.atleast_1d, torch.atleast_2d, torch.atleast_3d)
def _atleast(t: Trace, *tensors: object) -> object:
    rank = int(t.calling.__name__[-2])
    given = tensors[0] if len(tensors) == 1 else tensors
    if isinstance(given, Tensor):
        return at_least(t, given, rank)
    return tuple(at_least(t, x, rank) for x in given)


for _names, _implementation in (
    (("cat", "concat", "concatenate"), cat),
    (("stack",), stack),
    (("hstack",), hstack),
    (("vstack", "row_stack"), vstack),
    (("dstack",), dstack),
    (("column_stack",), column_stack),
    (("split",), split),
    (("split_with_sizes",), split_with_sizes),
    (("chunk",), chunk),
    (("tensor_split",), tensor_split),
    (("hsplit",), _split_along("hsplit", 1, 1)),
    (("vsplit",), _split_along("vsplit", 0, 2)),
    (("dsplit",), _split_along("dsplit", 2, 3)),
    (("movedim", "moveaxis"), movedim),
    (("unflatten",), unflatten),
):
    register(_names, _implementation, inplace=False)
