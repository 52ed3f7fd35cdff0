"""Collectives: what the ranks of a process group compute together, through torch.distributed.

A node of this family does something besides its result: all ranks of the group must come to it, in
the same order. So it is never dropped, merged with an equal one or computed twice; `number` counts
the collectives of a step, and they start in that order. Each has one result, flat:

    all_reduce      of its operands, one after another: each element reduced over the ranks
    broadcast       the same, as the rank `root` of the group has it
    reduce_to       the same as all_reduce on `root`; elsewhere what the engine leaves there
    all_gather      the operands of all ranks, in the order of the ranks
    reduce_scatter  the part of this rank of the operand reduced over the ranks
    all_to_all      parts of the operand are `sent` to the ranks, in elements; others `received`
    gather_ranks    as all_gather on `root`, which is `here`; elsewhere the operand
    scatter_ranks   on `root` the operand has a part for each rank; elsewhere it is not looked at
    barrier         nothing; one number of no meaning

`group` is the name of the process group, which has `ranks` ranks. `by` is torch's name of the
reduction. A `root` of -1 or -2 is the last rank that has not joined, see `process_groups.joins`.
`of` says which of a module's gradients they are, so that ranks can compare that as well.
Derivatives are those of torch.distributed.nn.functional: who emits a node knows them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from tracejit.errors import InvalidGraph
from tracejit.ir import process_groups
from tracejit.ir.ops.record import ULPS, Op, require, require_tensor
from tracejit.ir.types import Type, b1, f32, f64, i8, i16, i32, i64, u8

FAMILY = "collective"
_DTYPES = (f32, f64, i64, i32, i16, i8, u8, b1)


def underived(b, g, y, *operands, **attrs):
    """The derivative of a collective, which who emits it has to know."""
    raise InvalidGraph(reason="a collective has no derivative of its own")


def _of_one_kind(name: str, xs: tuple[Type, ...]) -> Type:
    require(len(xs) > 0, f"{name} of nothing")
    for x in xs:
        require_tensor(name, x)
        same = (x.dtype, x.device) == (xs[0].dtype, xs[0].device)
        require(same, f"{name} of {xs[0]} and {x}")
    return xs[0]


def _flat(x: Type, count: int) -> Type:
    return Type(x.dtype, (count,), x.device)


def _infer_all_reduce(
    *xs: Type, by: str, group: str, ranks: int, number: int, of: str = ""
) -> Type:
    return _flat(_of_one_kind("all_reduce", xs), sum(x.numel for x in xs))


def _infer_broadcast(*xs: Type, root: int, group: str, ranks: int, number: int) -> Type:
    require(-2 <= root < ranks, f"broadcast from rank {root} of {ranks}")
    return _flat(_of_one_kind("broadcast", xs), sum(x.numel for x in xs))


def _infer_reduce(*xs: Type, by: str, root: int, group: str, ranks: int, number: int) -> Type:
    require(0 <= root < ranks, f"reduce to rank {root} of {ranks}")
    return _flat(_of_one_kind("reduce_to", xs), sum(x.numel for x in xs))


def _infer_all_gather(x: Type, *, group: str, ranks: int, number: int) -> Type:
    return _flat(_of_one_kind("all_gather", (x,)), x.numel * ranks)


def _infer_reduce_scatter(x: Type, *, by: str, group: str, ranks: int, number: int) -> Type:
    _of_one_kind("reduce_scatter", (x,))
    require(x.numel % ranks == 0, f"reduce_scatter of {x} over {ranks} ranks")
    return _flat(x, x.numel // ranks)


def _parts(text: str, ranks: int) -> list[int]:
    parts = [int(n) for n in text.split(",")]
    require(len(parts) == ranks and min(parts) >= 0, f"parts {text!r} for {ranks} ranks")
    return parts


def _infer_all_to_all(
    x: Type, *, sent: str, received: str, group: str, ranks: int, number: int
) -> Type:
    _of_one_kind("all_to_all", (x,))
    require(sum(_parts(sent, ranks)) == x.numel, f"parts {sent} of {x}")
    return _flat(x, sum(_parts(received, ranks)))


def _infer_gather(x: Type, *, root: int, here: bool, group: str, ranks: int, number: int) -> Type:
    _of_one_kind("gather_ranks", (x,))
    return _flat(x, x.numel * ranks if here else x.numel)


def _infer_scatter(x: Type, *, root: int, here: bool, group: str, ranks: int, number: int) -> Type:
    _of_one_kind("scatter_ranks", (x,))
    require(not here or x.numel % ranks == 0, f"scatter_ranks of {x} to {ranks} ranks")
    return _flat(x, x.numel // ranks if here else x.numel)


def _infer_barrier(*, group: str, ranks: int, number: int) -> Type:
    return Type(u8, (1,), "cpu")


def _eval(name: str, infer: Callable) -> Callable:
    """The engine itself, on arrays: all ranks must evaluate it."""

    def evaluate(*operands: np.ndarray, **attrs: object) -> np.ndarray:
        if name == "barrier":
            process_groups.start(name, attrs, torch.uint8, (), (0, 0)).wait()
            return np.zeros(1, np.uint8)
        arrays = [np.ascontiguousarray(x) for x in operands]
        types = [Type(_dtype_of(x), x.shape, "cpu") for x in arrays]
        result = np.empty(infer(*types, **attrs).shape, arrays[0].dtype)
        memory = [(x.ctypes.data, x.nbytes) for x in arrays]
        dtype = torch.from_numpy(result).dtype
        process_groups.start(name, attrs, dtype, memory, (result.ctypes.data, result.nbytes)).wait()
        return result

    return evaluate


def _dtype_of(x: np.ndarray) -> object:
    return next(t for t in _DTYPES if np.dtype(t.compute) == x.dtype)


def _op(name: str, infer: Callable, *vjp: object) -> Op:
    return Op(
        name, FAMILY, infer, _eval(name, infer), vjp, cost=1, exact=ULPS, rounds=True, host=None
    )


all_reduce = _op("all_reduce", _infer_all_reduce, underived, ...)
broadcast = _op("broadcast", _infer_broadcast, underived, ...)
reduce_to = _op("reduce_to", _infer_reduce, underived, ...)
all_gather = _op("all_gather", _infer_all_gather, underived)
reduce_scatter = _op("reduce_scatter", _infer_reduce_scatter, underived)
all_to_all = _op("all_to_all", _infer_all_to_all, underived)
gather_ranks = _op("gather_ranks", _infer_gather, underived)
scatter_ranks = _op("scatter_ranks", _infer_scatter, underived)
barrier = _op("barrier", _infer_barrier)
