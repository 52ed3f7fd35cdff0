"""x[i] with tensors i of no axes: in eager a view, whose place depends on a value.

Here it is a copy, which nothing tells from a view as long as neither of the two is written to and
the copy stays in the step: `copied` of the trace has it, and what refuses these asks there.
"""

from __future__ import annotations

import torch

from tracejit.capture.functions import movement
from tracejit.capture.functions.common import cast, expand
from tracejit.capture.trace import location
from tracejit.capture.trace.bounds import within
from tracejit.capture.trace.scalars import TracedInt
from tracejit.capture.trace.tensor import TracedTensor, is_contiguous
from tracejit.capture.trace.trace import Trace
from tracejit.errors import AxisError
from tracejit.ir.types import i32, i64

Tensor = torch.Tensor


def is_place(t: Trace, index: object) -> bool:
    """Whether an index consists of ints and integer tensors of no axes."""
    items = index if isinstance(index, tuple) else (index,)
    return all(
        type(x) in (int, TracedInt)
        or (isinstance(x, Tensor) and not t.lift(x).shape and t.lift(x).dtype in (i64, i32))
        for x in items
    )


def at_place(t: Trace, input: Tensor, index: object) -> Tensor:
    """x[i, …], one index after another."""
    items = index if isinstance(index, tuple) else (index,)
    if len(items) > len(t.lift(input).shape):
        rank = len(t.lift(input).shape)
        raise AxisError(
            where=location.full(), reason=f"too many indices for tensor of dimension {rank}"
        )
    out = input
    for item in items:
        plain = not isinstance(item, Tensor)
        out = movement.getitem(t, out, item) if plain else _taken(t, out, item)
    return out


def _taken(t: Trace, x: Tensor, i: Tensor) -> TracedTensor:
    h = t.lift(x)
    n, rest = h.shape[0], h.shape[1:]
    if not is_contiguous(rest, h.strides[1:]):
        raise t.unsupported("x[i] of a tensor that is not contiguous has no rule; use x[int(i)]")
    reason = f"index {{value}} is out of bounds for dimension 0 with size {n}"
    within(t, i, -n, n, AxisError(where=location.full(), reason=reason))
    at = cast(t, t.read(t.lift(i)), i64)
    at = t.b.mod(at, n) if n else at
    at = expand(t, t.b.reshape(at, shape=(1,) * len(h.shape)), (1, *rest))
    out = t.fresh(t.b.reshape(t.b.gather(t.read(h), at, axis=0), shape=rest))
    t.copied[out.handle.storage] = {h.storage, *t.copied.get(h.storage, ())}
    return out
