"""Values that eager refuses, such as indices out of range: looked for before a plan runs.

A plan reads NaN (or 0) where an index points outside, and 0 where an integer is divided by 0. Where
an index tensor comes from outside the step, as class targets and token ids do, `Bound` looks at its
values first. What the step computes is a `Check`: a plan of its own computes it first. Either way
the call raises as eager does, and nothing is changed. On a GPU it is not done, where eager does not
raise either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from tracejit.capture.trace.ranges import interval, limits
from tracejit.capture.trace.scalars import is_traced
from tracejit.capture.trace.trace import Trace
from tracejit.errors import TracejitError
from tracejit.ir.graph import Value
from tracejit.ir.types import b1, i64
from tracejit.records import dataclass

MANY = 1 << 16  # integers from which on it pays to look at them with all threads


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

    def check(
        self, reals: Sequence[torch.Tensor], within: Callable[..., bool] | None = None
    ) -> None:
        """Raise the error unless the values lie within. `within(address, count, itemsize, last)`
        tells it of many integers, if it is given."""
        tensor = reals[self.index]
        if (self.shape, self.strides, self.offset) != (tuple(tensor.shape), tensor.stride(), 0):
            start = tensor.storage_offset() + self.offset
            tensor = tensor.as_strided(self.shape, self.strides, start)
        values = tensor.numpy()
        if values.size == 0:
            return
        many = within is not None and values.size >= MANY and values.flags.c_contiguous
        if many and self.low == 0 < self.high and values.itemsize in (4, 8):
            last = min(self.high, 1 << 8 * values.itemsize - 1) - 1
            if within(tensor.data_ptr(), values.size, values.itemsize, last):
                return
        elif self.low == 0:  # one look: as unsigned numbers, negative ones are large
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


@dataclass(frozen=True, eq=False)
class Check:
    """A truth value that the step computes does not hold."""

    bad: Value  # one bool
    shown: Value | None  # an integer that is to blame
    error: TracejitError  # raised otherwise; its `reason` may show {value}


def require(t: Trace, bad: Value, error: TracejitError, shown: Value | None = None) -> None:
    """Have every call raise an error, before it changes anything, if any element of `bad` is true.
    The error's reason may show, as {value}, one of the elements of `shown` that are to blame."""
    if bad.type.device != "cpu" or not bad.type.numel:
        return
    axes = tuple(range(len(bad.type.shape)))
    with t.untaped(), t.unchecked():
        if shown is not None:
            wide = shown if shown.type.dtype is i64 else t.b.cast(shown, dtype=i64)
            shown = t.b.where(bad, wide, limits(i64)[0])
            shown = t.b.reduce_max(shown, axes=axes) if axes else shown
        bad = t.b.reduce_max(bad, axes=axes) if axes else bad
    t.bounds.append(Check(bad, shown, error))


def within(
    t: Trace,
    tensor: torch.Tensor,
    low: int,
    high: int,
    error: TracejitError,
    ignore: int | None = None,
) -> None:
    """Have every call check that the integers of a tensor lie in [low, high), or are `ignore`."""
    handle = t.lift(tensor)
    storage = handle.storage
    real = storage.real
    if handle.device != "cpu":
        return
    moves = is_traced(handle.offset)
    if real is not None and storage.value is storage.param and not moves:
        index = t.inputs.position(real)
        offset = handle.offset - t.inputs.handles[index].offset
        geometry = index, handle.shape, handle.strides, offset
        t.bounds.append(Bound(*geometry, low, high, ignore, error))
        return
    with t.untaped(), t.unchecked():
        x = t.read(handle)
        bad = _outside(t, x, low, high - 1)
        if bad is not None and ignore is not None:
            bad = t.b.and_(bad, t.b.ne(x, ignore))
    if bad is not None:
        require(t, bad, error, shown=x)


def between(t: Trace, tensor: torch.Tensor, low: float, high: float, error: TracejitError) -> None:
    """Have every call check that the floats of a tensor lie in [low, high]. NaN does not, but it is
    not looked for where numbers cannot lie outside, as in the result of a sigmoid."""
    with t.untaped(), t.unchecked():
        x = t.read(t.lift(tensor))
        least, most = interval(t, x)
        if least < low or most > high:
            require(t, t.b.not_(t.b.and_(t.b.ge(x, low), t.b.le(x, high))), error)


def nonzero(t: Trace, tensor: torch.Tensor, error: TracejitError) -> None:
    """Have every call check that no element of a tensor of integers or bools is 0."""
    with t.untaped(), t.unchecked():
        x = t.read(t.lift(tensor))
        least, most = interval(t, x)
        if least <= 0 <= most:
            require(t, t.b.not_(x) if x.type.dtype is b1 else t.b.eq(x, 0), error)


def _outside(t: Trace, x: Value, low: int, high: int) -> Value | None:
    """Where the integers of a value are not in [low, high]; None if they cannot be elsewhere."""
    least, most = interval(t, x)
    below = t.b.lt(x, low) if least < low <= limits(x.type.dtype)[1] else None
    above = t.b.gt(x, high) if most > high >= limits(x.type.dtype)[0] else None
    if below is None or above is None:
        return above if below is None else below
    return t.b.or_(below, above)
