"""What the numpy executor does with arrays: blocks, positions and masks, narrow floats, reductions.

Positions and masks are index arrays over a stage's axes. Small ones that depend on no value are
made once and kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from tracejit.ir.types import (
    DType,
    bf16,
    bits_to_float,
    contiguous_strides,
    f16,
    round_to,
)
from tracejit.records import dataclass
from tracejit.schedule.kernel import (
    Axis,
    Compute,
    FloorDiv,
    InBounds,
    Index,
    Load,
    Mask,
    Position,
    Reduce,
    Statement,
    Store,
    Var,
)
from tracejit.schedule.plan import PlanBuffer

BLOCK = 1 << 16  # elements of a block: a float32 temporary is then 256 KiB
CACHED = 1 << 20  # index arrays up to this many elements are kept; larger ones are made per block

At = Callable[[list, int, int], np.ndarray]  # (slots, first, last): an array of positions or bools
Values = Mapping[Var, np.ndarray]  # of the variables that stand in indices
Dims = tuple[Axis, ...]


@dataclass(frozen=True, slots=True)
class View:
    """A strided view of a buffer: how to make it from the buffer's memory."""

    slot: int
    buffer: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


def block_of(extent: int, row: int) -> int:
    """How many points of the leading axis make a block."""
    step = max(1, BLOCK // max(row, 1))
    return extent if step * 2 > extent else step


def span(buffer: PlanBuffer) -> int:
    """Bytes from element 0 of a buffer to the end of its last element."""
    shape, strides = buffer.type.shape, buffer.strides
    if strides is None:
        strides = contiguous_strides(shape)
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if buffer.type.numel else 0
    return (last + 1) * buffer.type.dtype.itemsize


def stored(dtype: DType) -> np.dtype:
    """The numpy dtype of values in memory."""
    if dtype is bf16:
        return np.dtype(np.uint16)
    return np.dtype(np.float16) if dtype is f16 else dtype.compute


def decoder(dtype: DType) -> Callable | None:
    """Memory to compute dtype; None where they are the same."""
    if dtype is bf16:
        return bits_to_float
    if dtype is f16:
        return lambda halves: halves.astype(np.float32)
    return None


def spread(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return value if np.shape(value) == shape else np.broadcast_to(value, shape)


def reduce_block(s: Reduce, value: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Reduce one block; float32 sums are pairwise where memory order allows, else in float64."""
    if s.op.name == "reduce_max":
        return np.max(value, axis=axes)
    if s.op.name == "reduce_min":
        return np.min(value, axis=axes)
    wide = value.dtype
    if value.dtype.kind == "f" and not (len(axes) <= 1 and value.strides[-1:] == (4,)):
        wide = np.float64
    return np.sum(value, axis=axes, dtype=wide)


def fold(s: Reduce, partials: list) -> np.ndarray:
    """Combine the blocks' reductions."""
    array = np.asarray(partials)
    if s.op.name == "reduce_max":
        array = np.max(array)
    elif s.op.name == "reduce_min":
        array = np.min(array)
    else:
        array = np.sum(array, dtype=np.float64 if array.dtype.kind == "f" else array.dtype)
    return round_to(np.asarray(array), s.out.dtype)


def copied(body: tuple[Statement, ...]) -> set[str]:
    """Buffers whose loads must be copied: a view of them is used after they are stored to."""
    loads: dict[int, set[str]] = {}  # buffers that a variable may be a view of
    stored: set[str] = set()
    copied: set[str] = set()
    for s in body:
        args = s.args if isinstance(s, Compute) else (getattr(s, "value", None), *places(s))
        below: set[str] = set()
        for arg in args:
            if isinstance(arg, Var):
                below |= loads.get(arg.id, set())
        copied |= below & stored
        if isinstance(s, Load):
            loads[s.out.id] = {s.buffer}
        elif isinstance(s, Compute) and s.op.name in ("alias", "cast"):
            loads[s.out.id] = below
        elif isinstance(s, Store):
            stored.add(s.buffer)
    return copied


def index_array(index: Index, dims: Dims, first: int, last: int, values: Values) -> np.ndarray:
    """The index at all points of a block, with extent 1 along the axes it does not use."""
    total = np.full((1,) * len(dims), index.offset, np.int64)
    for atom, c in index.terms:
        if isinstance(atom, str):
            k = next(i for i, a in enumerate(dims) if a.name == atom)
            row = np.arange(first, last) if k == 0 else np.arange(dims[k].extent)
            part = row.reshape([-1 if i == k else 1 for i in range(len(dims))])
        elif isinstance(atom, Var):
            part = values[atom]
        else:
            below = index_array(atom.index, dims, first, last, values)
            part = below // atom.by if isinstance(atom, FloorDiv) else below % atom.by
        total = total + part * c
    return total


def mask_array(mask: Mask, dims: Dims, first: int, last: int, values: Values) -> np.ndarray:
    """Whether all bounds hold at the points of a block."""
    inside = np.ones((1,) * len(dims), np.bool_)
    for bound in mask:
        index = index_array(bound.index, dims, first, last, values)
        inside = inside & (index >= 0) & (index < bound.high) & (index % bound.step == 0)
    return inside


def remembered(
    make: Callable[[int, int], np.ndarray], dims: Dims
) -> Callable[[int, int], np.ndarray]:
    """`make(first, last)`, computed once for the whole domain where that is small."""
    extent = dims[0].extent if dims else 1
    if math.prod(a.extent for a in dims) > CACHED:
        return make
    whole = make(0, extent)
    if not dims or whole.shape[0] == 1:
        return lambda first, last: whole
    return lambda first, last: whole[first:last]


def per_block(
    make: Callable[[int, int, Values], np.ndarray], dims: Dims, slots_of: Mapping[Var, int]
) -> At:
    """`make`, kept where no variable takes part in it."""
    if not slots_of:
        kept = remembered(lambda first, last: make(first, last, {}), dims)
        return lambda slots, first, last: kept(first, last)
    pairs = tuple(slots_of.items())
    return lambda slots, first, last: make(first, last, {var: slots[at] for var, at in pairs})


def places(s: Statement) -> list[Var]:
    """The variables that stand in the indices of a statement."""
    indices = [s.index] if isinstance(s, Load | Store | Position) else []
    if isinstance(s, Load | Store | InBounds):
        indices += [bound.index for bound in s.mask]
    found: list[Var] = []
    while indices:
        for atom, _ in indices.pop().terms:
            if isinstance(atom, Var):
                found.append(atom)
            elif not isinstance(atom, str):
                indices.append(atom.index)
    return found
