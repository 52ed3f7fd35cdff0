"""Results that are as long as values say: unique, bincount, repeat_interleave by a tensor.

What is distinct is found on the host in the middle of the step (`trace/cuts.py`); how much it is is
part of the step, so another number leads to another plan.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from tracejit.capture.functions.arrangement import each_as_often
from tracejit.capture.functions.common import cast, expand, normal_axis, register
from tracejit.capture.functions.derived import underived
from tracejit.capture.functions.indexing import index_select
from tracejit.capture.functions.movement import reshape
from tracejit.capture.trace import location
from tracejit.capture.trace.cuts import searched
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import Ints, TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.errors import AxisError
from tracejit.ir.graph import Value
from tracejit.ir.ops.indexing import gather as gather_op
from tracejit.ir.types import f32, f64, i32, i64
from tracejit.records import dataclass

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Distinct:
    """The search of `unique` and its kind: the distinct elements or slices, along the first axis;
    then which of them each is, and how often each is there, if these are asked for."""

    name: str
    options: tuple[tuple[str, object], ...]
    dim: int | None
    remedy: ClassVar[str] = (
        "Use a number of classes that does not vary: torch.nn.functional.one_hot(labels, classes), "
        "or torch.bincount with a `minlength` that is enough"
    )

    def __call__(self, value: Tensor) -> tuple[Tensor, ...]:
        """The tensors, as torch finds them."""
        function = getattr(torch, self.name)
        found = function(value, dim=self.dim, **dict(self.options))
        first, *rest = found if isinstance(found, tuple) else (found,)
        if self.dim is not None:
            first = first.movedim(self.dim, 0)
        return first.contiguous(), *rest


def _distinct(
    t: Trace, input: Tensor, name: str, dim: int | None, options: dict[str, bool]
) -> object:
    h = t.lift(input)
    if dim is not None and not h.shape:
        raise AxisError(
            where=location.full(), reason="Dimension specified as 0 but tensor has no dimensions"
        )
    axis = None if dim is None else normal_axis(t, dim, len(h.shape))
    if axis is not None and 0 in _without(h.shape, axis):
        raise t.shape_error(
            "There are 0 sized dimensions, and they aren't selected, so unique cannot be applied"
        )
    x = t.read(h)
    with t.untaped():
        first, *rest = searched(t, x, Distinct(name, tuple(options.items()), axis))
    if options["return_inverse"]:
        t.ranges[rest[0]] = 0, max(first.type.shape[0] - 1, 0)
    values = underived(t, name, (x,), first) if h.dtype.is_float else t.b.alias(first)
    made = [t.fresh(_back(t, values, axis or 0), _moved(values, axis or 0))]
    made += [t.fresh(t.b.alias(v)) for v in rest]
    return tuple(made) if len(made) > 1 else made[0]


def _without(shape: Ints, axis: int) -> Ints:
    return shape[:axis] + shape[axis + 1 :]


def _back(t: Trace, x: Value, axis: int) -> Value:
    """The first axis at another place."""
    order = [*range(1, len(x.type.shape))]
    order.insert(axis, 0)
    return t.b.permute(x, axes=tuple(order)) if axis else x


def _moved(x: Value, axis: int) -> tuple[int, ...] | None:
    """Strides of what torch moves there: slices are rows of memory."""
    if not axis or not x.type.numel:
        return None
    rest = x.type.shape[1:]
    strides = [math.prod(rest[k + 1 :]) for k in range(len(rest))]
    strides.insert(axis, math.prod(rest))
    return tuple(strides)


@rule(torch.unique, Tensor.unique)
def unique(
    t: Trace,
    input: Tensor,
    sorted: bool = True,
    return_inverse: bool = False,
    return_counts: bool = False,
    dim: int | None = None,
) -> object:
    asked = {"return_inverse": return_inverse, "return_counts": return_counts}
    return _distinct(t, input, "unique", dim, {"sorted": sorted, **asked})


@rule(torch.unique_consecutive, Tensor.unique_consecutive)
def unique_consecutive(
    t: Trace,
    input: Tensor,
    return_inverse: bool = False,
    return_counts: bool = False,
    dim: int | None = None,
) -> object:
    asked = {"return_inverse": return_inverse, "return_counts": return_counts}
    return _distinct(t, input, "unique_consecutive", dim, asked)


# ---- repeats


@dataclass(frozen=True, slots=True)
class Repeats:
    """The search of `repeat_interleave`: which element each of the result is."""

    total: int | None
    remedy: ClassVar[str] = "Repeat by a number, or weight the elements by how often each is there"

    def __call__(self, value: Tensor) -> tuple[Tensor]:
        """The one tensor."""
        return (torch.repeat_interleave(value, output_size=self.total),)


def _which(t: Trace, times: Value, total: int | None) -> Tensor:
    if times.type.dtype not in (i32, i64):
        raise t.not_implemented("repeat_interleave", times.type.dtype)
    with t.untaped():
        (found,) = searched(t, times, Repeats(total))
        t.ranges[found] = 0, max(times.type.numel - 1, 0)
        return t.fresh(t.b.alias(found))


def repeat_interleave(
    t: Trace,
    input: Tensor,
    repeats: object = None,
    dim: int | None = None,
    *,
    output_size: int | None = None,
) -> Tensor:
    """Each element several times in a row; a tensor says how often each."""
    if isinstance(repeats, int):
        return each_as_often(t, input, repeats, dim)
    h = t.lift(input)
    if repeats is None:
        if len(h.shape) != 1:
            raise t.shape_error("repeat_interleave only accept 1D vector as repeat")
        return _which(t, t.read(h), output_size)
    n = t.lift(repeats)
    if len(n.shape) > 1:
        raise t.shape_error("repeats must be 0-dim or 1-dim tensor")
    x = input if dim is not None and h.shape else reshape(t, input, -1)
    axis = normal_axis(t, dim or 0, len(t.lift(x).shape))
    size = t.lift(x).shape[axis]
    if n.numel not in (1, size):
        raise t.shape_error(
            f"repeats must have the same size as input along dim, but got repeats.size(0) = "
            f"{n.numel} and input.size({axis}) = {size}"
        )
    with t.untaped():
        times = expand(t, t.b.reshape(t.read(n), shape=(n.numel,)), (size,))
    return index_select(t, x, axis, _which(t, times, output_size))


# ---- counts


@dataclass(frozen=True, slots=True)
class Counted:
    """The search of `bincount`: how often each number is there."""

    minlength: int
    remedy: ClassVar[str] = "Pass a `minlength` that is larger than all numbers"

    def __call__(self, value: Tensor) -> tuple[Tensor]:
        """The one tensor."""
        return (torch.bincount(value, minlength=self.minlength),)


@rule(torch.bincount, Tensor.bincount)
def bincount(
    t: Trace, input: Tensor, weights: Tensor | None = None, minlength: int = 0
) -> TracedTensor:
    h = t.lift(input)
    if h.dtype.kind not in "iu":
        raise t.not_implemented("bincount_cpu", h.dtype)
    if len(h.shape) != 1:
        raise t.shape_error("bincount only supports 1-d non-negative integral inputs.")
    x = t.read(h)
    (counts,) = searched(t, x, Counted(minlength))
    if weights is None:
        return t.fresh(t.b.alias(counts))
    w = t.lift(weights)
    if w.shape != h.shape:
        raise t.shape_error("weights should be 1-d and have the same length as input")
    if not h.numel:  # torch counts nothing then, and forgets the weights
        return t.fresh(t.b.alias(counts))
    with t.untaped():
        dtype = w.dtype if w.dtype is f32 else f64
        bins = t.b.full(0.0, shape=counts.type.shape, dtype=dtype, device=h.device)
        terms, at = cast(t, t.read(w), dtype), cast(t, x, i64)
        out = gather_op.vjp[0](t.b, terms, terms, bins, at, axis=0)
    return t.fresh(underived(t, "bincount", (t.read(w),), out))


register(("repeat_interleave",), repeat_interleave, inplace=False)
