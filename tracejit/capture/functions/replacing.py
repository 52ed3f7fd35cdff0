"""Tensors made of others by position: rot90, select_scatter, block_diag, tril_indices, …"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from tracejit.autodiff import zeros
from tracejit.capture.functions.common import cast, normal_axis
from tracejit.capture.functions.composites import composed
from tracejit.capture.trace.tensor import TO_IR, Ints, is_dense
from tracejit.capture.trace.trace import Trace
from tracejit.capture.trace.views import places
from tracejit.ir.graph import Builder, Value

Tensor = torch.Tensor
_C = torch._C._VariableFunctions


@composed(torch.rot90, Tensor.rot90)
def rot90(t: Trace, input: Tensor, k: int = 1, dims: Sequence[int] = (0, 1)) -> Tensor:
    rank = len(t.lift(input).shape)
    if len(dims) != 2:
        raise t.shape_error(f"expected total rotation dims == 2, but got dims = {len(dims)}")
    if rank < 2:
        raise t.shape_error(f"expected total dims >= 2, but got total dims = {rank}")
    a, b = (normal_axis(t, d, rank) for d in dims)
    if a == b:
        raise t.shape_error(f"expected rotation dims to be different, but got {list(dims)}")
    turns = k % 4
    if turns == 0:
        return input.clone(memory_format=torch.contiguous_format)
    if turns == 2:
        return input.flip((a, b))
    return input.flip((b if turns == 1 else a,)).transpose(a, b)


@composed(torch.narrow_copy, Tensor.narrow_copy)
def narrow_copy(t: Trace, input: Tensor, dim: int, start: int, length: int) -> Tensor:
    return input.narrow(dim, start, length).clone(memory_format=torch.contiguous_format)


# --- a part of a tensor replaced ---------------------------------------------------------------


def _replaced(t: Trace, input: Tensor, src: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
    h = t.lift(input)
    if not (is_dense(h.shape, h.strides) or 0 in h.strides):
        raise t.unsupported("Replacing a part of a tensor with gaps in memory has no rule")
    name = t.calling.__name__
    out = input.clone()
    into = part(out)
    if t.lift(into).shape != t.lift(src).shape:
        raise t.shape_error(
            f"{name}: expected src to have a size equal to the slice of self. src size = "
            f"{list(t.lift(src).shape)}, slice size = {list(t.lift(into).shape)}"
        )
    into.copy_(src)
    return out


@composed(torch.select_scatter, Tensor.select_scatter)
def select_scatter(t: Trace, input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    return _replaced(t, input, src, lambda x: x.select(dim, index))


@composed(torch.diagonal_scatter, Tensor.diagonal_scatter)
def diagonal_scatter(
    t: Trace, input: Tensor, src: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> Tensor:
    return _replaced(t, input, src, lambda x: x.diagonal(offset, dim1, dim2))


@composed(torch.slice_scatter, Tensor.slice_scatter)
def slice_scatter(
    t: Trace,
    input: Tensor,
    src: Tensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Tensor:
    axis = normal_axis(t, dim, len(t.lift(input).shape))
    if step <= 0:
        raise t.shape_error("slice step must be positive")
    index = (*(slice(None),) * axis, slice(start, end, step))
    return _replaced(t, input, src, lambda x: x[index])


@composed(torch.as_strided_scatter, Tensor.as_strided_scatter)
def as_strided_scatter(
    t: Trace,
    input: Tensor,
    src: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
) -> Tensor:
    """torch's derivative by `input` is that of the elements that are replaced, none of the rest."""
    h, shape = t.lift(input), tuple(map(int, size))
    if h.offset:
        raise t.unsupported("as_strided_scatter into a part of a tensor has no rule; clone it")
    if t.grad_on and t.requires_grad(h) and not h.is_contiguous:
        raise t.shape_error("as_strided_scatter: a tensor that requires grad must be contiguous")
    with torch.no_grad():
        out = _replaced(t, input, src, lambda x: x.as_strided(shape, stride, storage_offset))
    x, given, made = t.read(h), t.read(t.lift(src)), t.lift(out)
    start, strides = int(storage_offset or 0), tuple(map(int, stride))

    def vjp(b: Builder, cts: Sequence[Value], need: Sequence[bool]) -> list[Value | None]:
        row = b.reshape(cts[0], shape=(h.numel,))
        index = places(t, row, shape=shape, strides=strides, start=start)
        part = b.gather(row, index, axis=0)
        of_input = b.scatter(zeros(b, row), index, part, axis=0, combine="last")
        of_src = cast(t, b.reshape(part, shape=shape), given.type.dtype)
        return [b.reshape(of_input, shape=h.shape), of_src]

    with t.untaped():
        value = t.b.alias(t.read(made))
    return t.fresh(t.derive("as_strided_scatter", (x, given), value, vjp), made.strides)


@composed(Tensor.fill_diagonal_)
def fill_diagonal_(t: Trace, self: Tensor, fill_value: float, wrap: bool = False) -> Tensor:
    """`wrap`: in a tall matrix the diagonal goes on, one row below its end."""
    shape = t.lift(self).shape
    if len(shape) < 2:
        raise t.shape_error("dimensions must larger than 1")
    if len(shape) > 2 and len(set(shape)) > 1:
        raise t.shape_error("all dimensions of input must be of equal length")
    device = self.device
    places = [
        torch.arange(n, device=device).reshape([-1 if i == k else 1 for i in range(len(shape))])
        for k, n in enumerate(shape)
    ]
    if wrap and len(shape) == 2:
        hit = (places[0] * shape[1] + places[1]) % (shape[1] + 1) == 0
    else:
        hit = places[0] == places[1]
        for place in places[2:]:
            hit = hit & (places[0] == place)
    return self.masked_fill_(hit, fill_value)


# --- several put together ----------------------------------------------------------------------


@composed(_C.block_diag)
def block_diag(t: Trace, tensors: Sequence[Tensor]) -> Tensor:
    """Matrices along the diagonal of a larger one, zero elsewhere."""
    if any(len(t.lift(x).shape) > 2 for x in tensors):
        raise t.shape_error("torch.block_diag: Input tensors must have 2 or fewer dimensions")
    if not tensors:
        return torch.empty(1, 0)
    blocks = [torch.atleast_2d(x) for x in tensors]
    widths = [t.lift(x).shape[1] for x in blocks]
    rows, before = [], 0
    for block, width in zip(blocks, widths, strict=True):
        rows.append(torch.nn.functional.pad(block, (before, sum(widths) - before - width)))
        before += width
    return torch.cat(rows)


@composed(_C.cartesian_prod)
def cartesian_prod(t: Trace, tensors: Sequence[Tensor]) -> Tensor:
    if any(len(t.lift(x).shape) != 1 for x in tensors):
        raise t.shape_error("Expect a 1D vector")
    if len(tensors) == 1:
        return tensors[0]
    grids = torch.meshgrid(*tensors, indexing="ij")
    return torch.stack([g.flatten() for g in grids], 1)


@composed(torch.combinations)
def combinations(t: Trace, input: Tensor, r: int = 2, with_replacement: bool = False) -> Tensor:
    """All choices of r elements, in order: those of a grid of r axes whose places increase."""
    shape = t.lift(input).shape
    if len(shape) != 1:
        raise t.shape_error(f"Expect a 1D vector, but got shape {list(shape)}")
    if r < 0:
        raise t.shape_error(f"Expect a non-negative number, but got {r}")
    if r == 0:
        return input.new_empty(0)
    n = shape[0]
    count = math.comb(n + r - 1, r) if with_replacement and n else math.comb(n, r)
    if not count:
        none = t.lift(input.new_zeros((0, r)))
        depends = none.dtype.is_float and t.requires_grad(t.lift(input))
        return t.fresh(t.unread(t.read(none), t.read(t.lift(input)))) if depends else none.tensor
    number = torch.arange(n, device=input.device)
    grids = [g.flatten() for g in torch.meshgrid(*[number] * r, indexing="ij")]
    chosen = torch.ones(n**r, dtype=torch.bool, device=input.device)
    for one, next_ in zip(grids, grids[1:], strict=False):
        chosen = chosen & (one <= next_ if with_replacement else one < next_)
    order = chosen.argsort(descending=True, stable=True)[:count]
    return torch.stack([input[g[order]] for g in grids], 1)


# --- places of triangles -----------------------------------------------------------------------


def _runs(row: int, col: int, offset: int, *, lower: bool) -> list[Ints]:
    """The rows of a triangle: the first row, how many, the length of its part and how that grows,
    and the first column and how that grows; (first, rows, length, longer, column, further)."""
    if lower:
        ramp = max(0, -offset), min(row, max(0, col - offset - 1))
        runs = [(ramp[0], max(ramp[1] - ramp[0], 0), max(ramp[0] + offset + 1, 0), 1, 0, 0)]
        full = max(ramp[0], ramp[1])
        runs.append((full, max(row - full, 0), col, 0, 0, 0))
    else:
        full = min(row, max(0, 1 - offset))
        runs = [(0, full, col, 0, 0, 0)]
        last = min(row, max(full, col - offset))
        runs.append((full, last - full, col - full - offset, -1, full + offset, 1))
    return [run for run in runs if run[1] > 0 and run[2] > 0]


def _triangle(name: str, *, lower: bool) -> Callable:
    def rule(
        t: Trace,
        row: int,
        col: int,
        offset: int = 0,
        *,
        dtype: torch.dtype | None = torch.long,
        device: object = None,
        layout: torch.layout | None = torch.strided,
        pin_memory: bool | None = False,
    ) -> Tensor:
        """Rows and columns of the elements of a triangle, row by row."""
        if row < 0 or col < 0:
            raise t.shape_error(f"{name}: row and col must be non-negative, got {row} and {col}")
        dtype = dtype or torch.long
        if dtype not in (torch.int32, torch.int64):
            raise t.not_implemented(name, TO_IR[dtype])
        parts = [_places(*run, device=device) for run in _runs(row, col, int(offset), lower=lower)]
        if not parts:
            return torch.zeros((2, 0), dtype=dtype, device=device)
        return torch.cat(parts, 1).to(dtype)

    return rule


def _places(
    first: int, rows: int, length: int, longer: int, column: int, further: int, *, device: object
) -> Tensor:
    """The k-th place is in the last row before which at most k places stand: by the root of a
    square in float64, put right by comparing integers."""
    total = rows * length + longer * rows * (rows - 1) // 2
    k = torch.arange(total, device=device)
    if not longer:
        row = k // length
        start = row * length
    else:
        half = length - longer / 2
        root = (half * half + 2.0 * longer * k.double()).clamp_min(0).sqrt()
        row = ((root - half) / longer).long().clamp(0, rows - 1)
        row = row - (_start(row, length, longer) > k).long()
        row = row + (_start(row + 1, length, longer) <= k).long()
        start = _start(row, length, longer)
    return torch.stack([row + first, k - start + column + further * row])


def _start(row: Tensor, length: int, longer: int) -> Tensor:
    return row * length + row * (row - 1) // 2 * longer


for _name in ("tril_indices", "triu_indices"):
    composed(getattr(torch, _name))(_triangle(_name, lower=_name[:4] == "tril"))
