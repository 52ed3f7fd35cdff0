"""Stores whose places depend on values, dealt to threads by their indices.

In: a Kernel that scatters along a single row, with plain numbers as sizes: one index after another
stores somewhere in the whole result, so no two threads could share it. Out: where there are many
more indices than places, each part of the indices goes to a result of its own, and a second kernel
adds these results up in their order. How many parts there are depends on the sizes only.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tracejit.ir.ops import OPS
from tracejit.ir.types import DType
from tracejit.schedule.axes import map_indices
from tracejit.schedule.cpu.plan import CpuKernel, Nest
from tracejit.schedule.index import substitute
from tracejit.schedule.kernel import (
    Axis,
    Bound,
    Buffer,
    Compute,
    Index,
    Kernel,
    Load,
    Operand,
    Stage,
    Store,
    Var,
)

FEWEST = 1 << 15  # indices of a part: it is worth handing to a thread
MOST = 8  # parts: each costs a result that is set and read once more
COMBINED = {"add": "add", "mul": "mul", "max": "maximum", "min": "minimum"}


def deal_scattered(kernel: CpuKernel) -> CpuKernel:
    """Scatter the parts of many indices to results of their own."""
    whole, count = kernel.kernel, _parts(kernel.kernel)
    if count < 2:
        return kernel
    store = whole.stages[-1].body[-1]
    places = store.mask[0].high
    dtype = next(b.dtype for b in whole.buffers if b.name == store.buffer)
    part = Buffer("part0", dtype, "rw")
    along, across = Axis("i0", places), Axis("i2", count)
    clear = Store(
        part.name, Index(((along.name, 1), (across.name, places))), _neutral(store, dtype)
    )
    stages = (Stage((along,), (clear,)), _of_part(whole, across))
    first = replace(whole, buffers=(*whole.buffers, part), axes=(across,), stages=stages)
    ending = CpuKernel(_ending(whole, along, part, count))
    return CpuKernel(first, ending, (part.name,), outer=Nest("", 1, count))


def _parts(kernel: Kernel) -> int:
    """In how many parts the indices are dealt: a power of two, so that threads get equally many."""
    *before, stage = kernel.stages or (Stage((), ()),)
    if kernel.axes or not stage.in_order or [a.name for a in stage.axes] != ["i1"]:
        return 1
    store = stage.body[-1]
    if not isinstance(store, Store) or store.fold not in COMBINED or len(store.mask) != 1:
        return 1
    ((place, _), *others), (step,) = store.index.terms, stage.axes
    dtype = next(b.dtype for b in kernel.buffers if b.name == store.buffer)
    read = any(isinstance(s, Load) and s.buffer == store.buffer for s in stage.body)
    if dtype.narrow or read or others or not isinstance(place, Var):
        return 1
    if [[a.name for a in s.axes] for s in before] not in ([], [["i0"]]):
        return 1
    most = min(MOST, step.extent // (4 * store.mask[0].high), step.extent // FEWEST)
    return 1 << max(most, 1).bit_length() - 1


def _neutral(store: Store, dtype: DType) -> Operand:
    """What leaves every number as it is, a negative zero too."""
    if store.fold in ("add", "mul"):
        one = 1 if store.fold == "mul" else -0.0
        return float(one) if dtype.is_float else int(one)
    if dtype.is_float:
        return -np.inf if store.fold == "max" else np.inf
    bounds = np.iinfo(dtype.compute)
    return int(bounds.min if store.fold == "max" else bounds.max)


def _of_part(kernel: Kernel, across: Axis) -> Stage:
    """The stage of the indices, for those of one part."""
    stage = kernel.stages[-1]
    (step,), store = stage.axes, stage.body[-1]
    size = -(-step.extent // across.extent)
    number = Index(((step.name, 1), (across.name, size)))
    extents = {step.name: size, across.name: across.extent}
    at = (Index((("i0", 1),)), number)
    only = map_indices(replace(kernel, stages=(stage,)), lambda i: substitute(i, at, extents))
    body = list(only.stages[0].body)
    if size * across.extent != step.extent:  # the last part is shorter
        inside = Bound(number, step.extent)
        for k, s in enumerate(body):
            if isinstance(s, Load | Store):
                body[k] = replace(s, mask=(*s.mask, inside))
    ((place, _),), places = store.index.terms, store.mask[0].high
    index = Index(((across.name, places), (place, 1)))
    body[-1] = replace(body[-1], buffer="part0", index=index)
    return Stage((replace(step, extent=size),), tuple(body), in_order=True)


def _ending(kernel: Kernel, along: Axis, part: Buffer, count: int) -> Kernel:
    """The kernel that combines what was there before with the results of all parts."""
    *before, stage = kernel.stages
    store = stage.body[-1]
    ((_, step),) = store.index.terms
    target = Index(((along.name, step),), store.index.offset)
    number = 1 + max(s.out.id for s in (*stage.body, *_made(before)) if not isinstance(s, Store))
    if before:
        *body, copied = before[0].body
        total = copied.value
    else:
        total = Var(number, part.dtype)
        body, number = [Load(total, store.buffer, target, (), store.where)], number + 1
    op = OPS[COMBINED[store.fold]]
    for k in range(count):
        value, both = Var(number, part.dtype), Var(number + 1, part.dtype)
        place = Index(((along.name, 1),), k * along.extent)
        body.append(Load(value, part.name, place))
        body.append(Compute(both, op, (total, value), (), store.where))
        total, number = both, number + 2
    body.append(Store(store.buffer, target, total, store.where))
    buffers = (*kernel.buffers, part)
    return replace(kernel, buffers=buffers, axes=(along,), stages=(Stage((), tuple(body)),))


def _made(stages: list[Stage]) -> tuple:
    return tuple(s for stage in stages for s in stage.body)
