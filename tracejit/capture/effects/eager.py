"""What eager would take for a trace: operations, bytes, and what it would keep for its backward.

A torch call is an operation if anything is computed in it, and so is each derivative formula. It
reads what others have made, and writes what others, or the step's results, are made of; in between
nothing reaches memory. So fused kernels of torch count as one, however many primitives they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType

from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Node, Value


class EagerCost:
    """Operations and bytes of eager; bytes of intermediates that it keeps for its backward, and of
    those in checkpointed regions, which it computes again instead."""

    def __init__(
        self,
        nodes: Sequence[Node] = (),
        group_of: Mapping[int, int] = MappingProxyType({}),
        outputs: Collection[Value] = (),
        saved_bytes: int = 0,
        again_bytes: int = 0,
    ):
        """Of the nodes of a trace, the calls that values belong to by their ids, and what its step
        leaves."""
        self._of = nodes, group_of, outputs
        self.saved_bytes, self.again_bytes = saved_bytes, again_bytes

    @property
    def operations(self) -> int:
        return self._counted[0]

    @property
    def bytes(self) -> int:
        return self._counted[1]

    @cached_property
    def _counted(self) -> tuple[int, int]:
        """Operations and bytes, counted when somebody asks: each trace has them, few are told."""
        nodes, group_of, outputs = self._of
        read: dict[int, set[Value]] = {}  # by group
        made: dict[Value, int] = {}
        bases: dict[Value, Value | None] = {}  # of views and constants: what they are of, or None
        for node in nodes:
            op = node.op
            if op.family == "movement" or op.name == "alias":
                of = node.args[0]
                bases[node.outs[0]] = bases.get(of, of)
            elif op.family == "source":
                bases[node.outs[0]] = None
            elif op.family != "host":
                group = group_of[node.outs[0].id]
                made.update(dict.fromkeys(node.outs, group))
                found = read.setdefault(group, set())
                for value in node.inputs:
                    of = bases.get(value, value)
                    if of is not None and made.get(of) != group and not of.type.is_host:
                        found.add(of)
        needed = set().union(*read.values(), (bases.get(v, v) for v in outputs))
        moved = sum(v.type.nbytes for found in read.values() for v in found)
        moved += sum(v.type.nbytes for v in made if v in needed)
        return len(read), moved


def eager_cost(t: Trace, outputs: Iterable[Value]) -> EagerCost:
    """The cost of a trace that is over, whose step leaves these values behind."""
    again = sum(v.type.nbytes for v in t.again if not _is_free(t.producers[v]))
    return EagerCost(tuple(t.b.nodes), t.group_of, tuple(outputs), _saved_bytes(t), again)


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
