"""Indices out of range, which eager refuses: looked for before a plan runs.

A plan reads NaN (or 0) where an index points outside. Where the index tensor comes from outside the
step, as class targets and token ids do, `Bound` looks at its values first, so that the call raises
as eager does and nothing is changed. That needs the values on the host: on a GPU it is not done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tracejit.capture.trace.trace import Trace
from tracejit.errors import TracejitError


@dataclass(frozen=True, eq=False)
class Bound:
    """The values of a view of the `index`-th outside tensor lie in [low, high) or are `ignore`."""

    index: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int  # in elements, from the first one of the outside tensor
    low: int
    high: int
    ignore: int | None
    error: TracejitError  # raised otherwise; its `reason` may show {value}

    def check(self, reals: Sequence[torch.Tensor]) -> None:
        """Raise the error unless the values lie within."""
        tensor = reals[self.index]
        if (self.shape, self.strides, self.offset) != (tuple(tensor.shape), tensor.stride(), 0):
            start = tensor.storage_offset() + self.offset
            tensor = tensor.as_strided(self.shape, self.strides, start)
        values = tensor.numpy()
        if values.size == 0:
            return
        if self.low == 0:  # one look: as unsigned numbers, negative ones are large
            unsigned = values.view(f"u{values.itemsize}")
            if np.maximum.reduce(unsigned, axis=None) < self.high:
                return
        elif values.min() >= self.low and values.max() < self.high:
            return
        outside = (values < self.low) | (values >= self.high)
        if self.ignore is not None:
            outside &= values != self.ignore
        if outside.any():
            fields = dict(self.error.fields)
            value = int(values[np.nonzero(outside)][0]) if values.ndim else int(values)
            fields["reason"] = fields["reason"].format(value=value)
            raise type(self.error)(**fields)


def within(
    t: Trace,
    tensor: torch.Tensor,
    low: int,
    high: int,
    error: TracejitError,
    ignore: int | None = None,
) -> None:
    """Have every call check that the integers of a tensor lie in [low, high), if they are known."""
    handle = t.lift(tensor)
    storage = handle.storage
    real = storage.real
    if real is None or storage.value is not storage.param or real.device.type != "cpu":
        return
    index = t.inputs.position(real)
    offset = handle.offset - t.inputs.handles[index].offset
    t.bounds.append(Bound(index, handle.shape, handle.strides, offset, low, high, ignore, error))
