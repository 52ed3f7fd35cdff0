"""Whether what a call writes to shares memory with what it reads, and what eager says of that.

Eager compares the memory of dense tensors, where that is cheap, and raises. Of others it knows
nothing: it reads elements that it has overwritten, or not yet, by the order of its loops. That is
refused. `tests/test_overlaps.py` asks eager.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tracejit.capture.trace.scalars import plain
from tracejit.capture.trace.state import TraceState
from tracejit.capture.trace.table import RULES, function_name
from tracejit.capture.trace.tensor import Handle, extent, is_dense, tensors_of
from tracejit.ir.types import b1, u8

# These read places that they may have overwritten, so that eager takes no operand that is written.
_SCATTERED = frozenset(
    {"gather", "index_add", "index_copy", "index_fill", "index_put", "index_reduce", "index_select"}
    | {"cat", "concat", "concatenate", "masked_fill", "stack", "put", "scatter", "scatter_add"}
    | {"scatter_reduce", "take", "take_along_dim"}
)
# These too, and eager does not look.
_UNCHECKED = frozenset(
    {"addbmm", "addmm", "addmv", "baddbmm", "bmm", "dot", "masked_scatter", "matmul", "mm", "mv"}
)
# These read a tensor of no axes before they write.
_BY_NUMBER = frozenset({"fill", "index_fill", "masked_fill"})
# Of these each element depends on those at its own place.
_ELEMENTWISE = frozenset(
    {"arithmetic", "comparison", "optimizer", "rounding", "selection", "special", "transcendental"}
    | {"unary"}
)
_ON_ONE_THREAD = 32_768  # elements; source: at::internal::GRAIN_SIZE
_WORK = 10_000  # of numpy's search for an element that two tensors share


def check_copy(t: TraceState, into: Handle, source: Handle) -> None:
    """Refuse to copy to a tensor from another that shares memory with it, as eager does."""
    if source.storage is into.storage:
        _check(t, into, source, _name(t))


def check_put(t: TraceState, into: Handle, indices: object, value: object) -> None:
    """Refuse to write values where indices say, as eager does, if one shares memory with it. One
    number for all that masks select is read before."""
    places = [t.lift(x) for x in tensors_of(indices)]
    values = [t.lift(x) for x in tensors_of(value)]
    filled = all(h.dtype in (b1, u8) for h in places) and all(h.numel == 1 for h in values)
    for source in places + ([] if filled else values):
        if source.storage is into.storage:
            _check(t, into, source, "index_put")


def check_operands(t: TraceState, into: Handle, *sources: object) -> None:
    """Refuse to write a tensor by a call whose other arguments share memory with it, as eager does;
    they may stand in tuples and lists."""
    for x in tensors_of(sources):
        source = t.lift(x)
        if source.storage is into.storage:
            name = _name(t)
            if name == "index_put":
                return check_put(t, into, *sources[:2])
            _check(t, into, source, name)


def check_out(t: TraceState, into: Handle, sources: Iterable[object]) -> None:
    """Refuse to write what a call gives of others into a tensor that shares memory with them."""
    name, rule = _name(t), RULES.get(t.calling)
    known = rule is not None and (rule.row is not None or rule.family in _ELEMENTWISE)
    for x in tensors_of(tuple(sources)):
        source = t.lift(x)
        if source.storage is not into.storage:
            continue
        if known or name in _SCATTERED:
            _check(t, into, source, name)
        elif overlap(into, source) != "none":
            raise t.unsupported("out= has no rule for a tensor that overlaps an operand")


def _check(t: TraceState, into: Handle, source: Handle, name: str) -> None:
    if name in _BY_NUMBER and not source.shape:
        return
    how = overlap(into, source)
    if how == "part" and name == "__setitem__" and source.shape != into.shape:
        how = "unknown"  # eager expands it first, and it is not dense any more
    if how == "none" or (how == "same" and name not in _SCATTERED | _UNCHECKED):
        return
    if how == "unknown" and name not in _SCATTERED | _UNCHECKED and _is_ahead(into, source):
        return
    if how == "unknown" or name in _UNCHECKED:
        raise t.unsupported(
            "It writes to elements that it also reads, in an order that eager leaves open; clone "
            "what it reads"
        )
    raise t.shape_error(
        "unsupported operation: some elements of the input tensor and the written-to tensor refer "
        "to a single memory location. Please clone() the tensor before performing the operation"
    )


def _is_ahead(into: Handle, source: Handle) -> bool:
    """Whether eager reads each element before it writes there: buffer[:, :-1] = buffer[:, 1:]."""
    alike = (source.shape, source.strides) == (into.shape, into.strides)
    return alike and plain(source.offset) > plain(into.offset) and into.numel <= _ON_ONE_THREAD


def _name(t: TraceState) -> str:
    """The function that is called, without what says that it works in place or on lists."""
    name = function_name(t.calling).rpartition(".")[2] if t.calling else ""
    return name if name.endswith("__") else name.removeprefix("_foreach_").removesuffix("_")


def overlap(a: Handle, b: Handle) -> str:
    """What eager finds of two tensors of one storage: none, same, part; or unknown, where it does
    not look and they share an element."""
    first, last, strides = _bytes(a)
    other, end, more = _bytes(b)
    if first >= end or other >= last:
        return "none"
    if is_dense(a.shape, a.strides) and is_dense(b.shape, b.strides):
        return "same" if (first, last, strides) == (other, end, more) else "part"
    one, two = (
        [(n, st) for n, st in zip(h.shape, moves, strict=True) if n > 1]
        for h, moves in ((a, strides), (b, more))
    )
    if first == other and one == two:  # each element reads itself
        return "same"
    try:
        shared = np.shares_memory(_array(a), _array(b), max_work=_WORK)
    except np.exceptions.TooHardError:
        shared = True
    return "unknown" if shared else "none"


def _bytes(h: Handle) -> tuple[int, int, tuple[int, ...]]:
    """Where a tensor begins and ends in its storage, and its strides."""
    size = h.dtype.itemsize
    first = plain(h.offset) * size
    return first, first + extent(h.shape, h.strides) * size, tuple(st * size for st in h.strides)


class _Laid:
    """Memory that nobody reads, laid out as a tensor is."""

    def __init__(self, h: Handle):
        first, _, strides = _bytes(h)
        self.__array_interface__ = {
            "data": (4096 + first, False),
            "shape": h.shape,
            "strides": strides,
            "typestr": f"|V{h.dtype.itemsize}",
            "version": 3,
        }


def _array(h: Handle) -> np.ndarray:
    return np.asarray(_Laid(h))
