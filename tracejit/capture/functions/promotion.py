"""The dtypes of results: torch's type promotion of tensors, 0-d tensors and numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tracejit.capture.trace.tensor import TO_IR, TO_TORCH, Handle
from tracejit.ir.types import DType, b1, i64
from tracejit.records import record

Number = int | float | bool


@record
class Operand:
    """A tensor or number handed to a torch function."""

    handle: Handle | None
    number: Number | None = None


def default_dtype() -> DType:
    """The dtype of floating-point results of integers and numbers."""
    return TO_IR[torch.get_default_dtype()]


def number_dtype(x: Number) -> DType:
    """The dtype that a Python number has on its own."""
    if isinstance(x, bool):
        return b1
    return i64 if isinstance(x, int) else default_dtype()


def promote_two(a: DType, b: DType) -> DType:
    """torch.promote_types."""
    return a if a is b else TO_IR[torch.promote_types(TO_TORCH[a], TO_TORCH[b])]


def result_dtype(operands: Sequence[Operand]) -> DType:
    """torch's result type: tensors with axes count first, then 0-d tensors, then numbers."""
    ranks: list[DType | None] = [None, None, None]
    for x in operands:
        if x.handle is None:
            rank, dtype = 2, number_dtype(x.number)
        else:
            rank, dtype = (0 if x.handle.shape else 1), x.handle.dtype
        known = ranks[rank]
        ranks[rank] = dtype if known is None else promote_two(known, dtype)
    result = _combine(ranks[0], _combine(ranks[1], ranks[2]))
    assert result is not None
    return result


def _combine(higher: DType | None, lower: DType | None) -> DType | None:
    """A lower rank changes the result only when its category is higher."""
    if higher is None or lower is None:
        return higher or lower
    if higher.is_float:
        return higher
    return promote_two(higher, lower) if higher is b1 or lower.is_float else higher


def as_it_is(dtype: DType) -> DType:
    """The dtype of a function that takes all."""
    return dtype


def as_float(dtype: DType) -> DType:
    """The dtype of a function that only makes sense on floats."""
    return dtype if dtype.is_float else default_dtype()


def can_cast(source: DType, target: DType) -> bool:
    """torch.can_cast: an in-place form may not lose the fraction, nor turn numbers into bools."""
    if source.is_float and not target.is_float:
        return False
    return source is b1 or target is not b1
