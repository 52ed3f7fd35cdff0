"""What eager would take for a trace: operations, bytes, and what it would keep for its backward.

A torch call is an operation if anything is computed in it, and so is each derivative formula. It
reads what others have made, and writes what others, or the step's results, are made of; in between
nothing reaches memory. So fused kernels of torch count as one, however many primitives they are.
"""

from __future__ import annotations

from collections.abc import Iterable

from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Node, Value
from tracejit.records import dataclass


@dataclass(frozen=True, slots=True)
class EagerCost:
    """Operations and bytes of eager; bytes of intermediates that it keeps for its backward, and of
    those in checkpointed regions, which it computes again instead."""

    operations: int = 0
    bytes: int = 0
    saved_bytes: int = 0
    again_bytes: int = 0


def eager_cost(t: Trace, outputs: Iterable[Value]) -> EagerCost:
    """The cost of a trace that is over, whose step leaves these values behind."""
    read: dict[int, set[Value]] = {}  # by group
    made: dict[Value, int] = {}
    bases: dict[Value, Value | None] = {}  # of views and constants: what they are of, or None
    for node in t.b.nodes:
        op = node.op
        if op.family == "movement" or op.name == "alias":
            of = node.args[0]
            bases[node.outs[0]] = bases.get(of, of)
        elif op.family == "source":
            bases[node.outs[0]] = None
        elif op.family != "host":
            (out,) = node.outs
            made[out] = group = t.group_of[out]
            found = read.get(group)
            if found is None:
                found = read[group] = set()
            for value in node.args:
                if value.__class__ is Value:
                    of = bases.get(value, value)
                    if of is not None and made.get(of) != group and not of.type.is_host:
                        found.add(of)
    needed = {bases.get(v, v) for v in outputs}.union(*read.values())
    moved = sum([v.type.nbytes for found in read.values() for v in found])
    moved += sum([v.type.nbytes for v in made.keys() & needed])
    again = sum(v.type.nbytes for v in t.again if not _is_free(t.producers[v]))
    return EagerCost(len(read), moved, _saved_bytes(t), again)


def _saved_bytes(t: Trace) -> int:
    """Of the intermediates that derivative formulas have read. A view keeps what it is a view of;
    constants and tensors from outside are there anyway."""
    found: dict[object, int] = {}
    for value in t.saved:
        if value in t.origin:
            _, count, storage, _ = t.origin[value]
            if storage.real is None:
                found[storage, count] = storage.value.type.nbytes
            continue
        base, maker = _base(t, value)
        if maker is not None and maker.op.family != "source":
            found[base] = base.type.nbytes
    return sum(found.values())


def _is_free(node: Node) -> bool:
    """Whether eager computes nothing for a node: it makes a view, a constant, a number."""
    return node.op.family in ("movement", "source", "host") or node.op.name == "alias"


def _base(t: Trace, value: Value) -> tuple[Value, Node | None]:
    """What a value is a view of, and the node that has made that; None if it is from outside."""
    node = t.producers.get(value)
    while node is not None and (node.op.family == "movement" or node.op.name == "alias"):
        value = node.args[0]
        node = t.producers.get(value)
    return value, node
