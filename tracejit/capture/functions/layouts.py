"""Layouts of images: row-major or channels-last, as torch tells them from strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tracejit.capture.trace.tensor import Handle, Ints
from tracejit.capture.trace.trace import Trace
from tracejit.ir.types import contiguous_strides

_RANKS = {torch.channels_last: 4, torch.channels_last_3d: 5}


def is_channels_last(shape: Ints, strides: Ints) -> bool:
    """Whether torch takes an image for channels-last (`suggest_memory_format`)."""
    rank = len(shape)
    if rank not in (4, 5) or strides[1] == 0:
        return False
    least = 0
    for axis in (1, *range(rank - 1, 1, -1), 0):
        if shape[axis] == 0 or strides[axis] < least:
            return False
        if axis == 0 and least == strides[1]:  # N111 is row-major
            return False
        least = strides[axis] * max(shape[axis], 1)
    return True


def channels_last(shape: Ints) -> Ints:
    """The strides of an image whose channels lie side by side."""
    rank = len(shape)
    order = (0, *range(2, rank), 1)
    inner = dict(zip(order, contiguous_strides(tuple(shape[a] for a in order)), strict=True))
    return tuple(inner[a] for a in range(rank))


def image_strides(shape: Ints, sources: Sequence[tuple[Ints, Ints]]) -> Ints | None:
    """The strides of a result: channels last if one of its sources is, else row-major."""
    return channels_last(shape) if any(is_channels_last(*s) for s in sources) else None


def like(h: Handle, shape: Ints) -> Ints | None:
    """The strides of a result that keeps the format of its image."""
    return image_strides(shape, [(h.shape, h.strides)])


def like_image(h: Handle, shape: Ints) -> Ints | None:
    """The strides of what pooling makes of h. Eager takes a line for an image one element high."""
    if len(h.shape) != 3:
        return like(h, shape)
    (n, c, width), (of_n, of_c, step) = h.shape, h.strides
    found = image_strides(
        (*shape[:2], 1, shape[2]), [((n, c, 1, width), (of_n, of_c, width * step, step))]
    )
    return None if found is None else (*found[:2], found[3])


def strides_in(t: Trace, h: Handle, memory_format: torch.memory_format) -> Ints:
    """The strides of a tensor of this shape in a memory format."""
    if memory_format is torch.contiguous_format:
        return contiguous_strides(h.shape)
    if memory_format not in _RANKS:
        raise t.unsupported(f"The memory format {memory_format} has no rule")
    if len(h.shape) != _RANKS[memory_format]:
        raise t.shape_error(f"required rank {_RANKS[memory_format]} tensor to use {memory_format}")
    return channels_last(h.shape)


def lies_in(t: Trace, h: Handle, memory_format: torch.memory_format) -> bool:
    """Whether a tensor is contiguous in a memory format."""
    if memory_format is torch.contiguous_format:
        return h.is_contiguous
    if memory_format in _RANKS and len(h.shape) != _RANKS[memory_format]:
        return False
    rows = zip(h.shape, h.strides, strides_in(t, h, memory_format), strict=True)
    return not h.numel or all(n == 1 or mine == its for n, mine, its in rows)
