"""Numbers in tensors of one element that Python may ask for: an optimizer's step counters.

`host_value` follows how a value was computed in the trace. If that was arithmetic on numbers and on
single-element tensors from outside, it is repeated on the host. Then `.item()` returns a runtime
scalar: a float with its true value and a record of its origin. Any other number is known only when
the plan has run.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from tracejit.capture.trace.scalars import RELATIONS, TracedFloat
from tracejit.capture.trace.tensor import Handle, Storage
from tracejit.capture.trace.trace import Trace
from tracejit.ir import host_memory
from tracejit.ir.graph import Arg, Graph, Node, Value
from tracejit.ir.hostcode import arithmetic
from tracejit.ir.ops import OPS
from tracejit.ir.types import DType, Type


def is_single(kind: Type) -> bool:
    """Whether this is the type of one floating-point number."""
    return kind.dtype.is_float and not kind.is_host and all(n == 1 for n in kind.shape)


def item(t: Trace, handle: Handle) -> float | None:
    """The number that a tensor holds now, or None where only the plan can tell."""
    t.asked.add(handle.storage)
    return host_value(t, t.read(handle))


def truth(t: Trace, handle: Handle) -> bool | None:
    """Whether a tensor of one element is true: a comparison of such numbers, or a number not 0."""
    node = t.producers.get(t.read(handle))
    if node is None or node.op.name not in RELATIONS:
        number = item(t, handle)
        return None if number is None else number != 0
    sides = [host_value(t, a) if isinstance(a, Value) else float(a) for a in node.args]
    return None if any(x is None for x in sides) else RELATIONS[node.op.name](*sides)


def host_value(t: Trace, value: Value) -> float | None:
    """The number that a value of one element is, or None where only the plan can tell."""
    if value.type.is_host:
        return t.scalars.traced(t.scalars.numbers[value], value)
    if value in t.hosted:
        return t.hosted[value]
    if not is_single(value.type):
        return _integer(t, value)
    pending = [value]
    while pending:
        node = t.producers.get(pending[-1])
        operands = () if node is None else node.inputs
        later = [v for v in operands if is_single(v.type) and v not in t.hosted]
        if later and node.op.host is not None:
            pending += later
        else:
            current = pending.pop()
            t.hosted[current] = _outside(t, current) if node is None else _computed(t, node)
    return t.hosted[value]


def _integer(t: Trace, value: Value) -> float | None:
    """The number of an integer constant, `torch.tensor(1)`, or one that is known besides."""
    node = t.producers.get(value)
    while node is not None and node.op.name in ("reshape", "alias", "slice"):
        if any(dict(node.attrs).get("starts", ())):
            return None
        (of,) = node.inputs
        if value.type.numel == 1 and of in t.firsts:
            return float(t.firsts[of])
        node = t.producers.get(of)
    constant = node is not None and node.op is OPS["full"] and not isinstance(node.args[0], Value)
    return float(node.args[0]) if constant and value.type.shape == () else None


def _outside(t: Trace, param: Value) -> float | None:
    """The element of a tensor from outside: a runtime scalar."""
    for s in t.inputs.storages:
        if s.param is param:
            if s.real.is_meta:  # which poses to be on a GPU
                return None
            index = t.inputs.position(s.real)
            with torch._C.DisableTorchFunction():
                return t.scalar(host_memory.read(s.real), ("item", index))
    return None


def _computed(t: Trace, node: Node) -> float | None:
    if node.op.host is None:
        return None
    operands = [host_value(t, a) if isinstance(a, Value) else float(a) for a in node.args]
    if any(x is None for x in operands):
        return None
    try:
        with t.untaped():
            result = arithmetic(node.op)(*operands)
    except (ZeroDivisionError, OverflowError):  # where tensors give inf
        return None
    return rounded(t, result, node.out.type.dtype) if isinstance(result, float) else None


def settled(t: Trace, storage: Storage, mixed: bool) -> float | None:
    """The number that CPU memory holds at last, if the host computes it instead of the plan.

    It does for the counters that the step asked for by `.item()`; and where the step runs on a GPU,
    for all numbers on the CPU that it can compute.
    """
    value = storage.value
    if value in t.tape.tracked or not is_single(value.type) or value.type.device != "cpu":
        return None
    if not mixed and storage not in t.asked:
        return None
    with t.resumed():  # record arithmetic though the user's code is over
        return host_value(t, value)


def mixed_devices(t: Trace) -> bool:
    """Whether tensors of another device than the CPU take part."""
    used = {s.param.type.device for s in t.inputs.storages}
    used |= {node.outs[0].type.device for node in t.b.nodes}
    return bool(used - {"cpu", "host"})


def for_the_plan(graph: Graph) -> Graph:
    """The graph without what the host does: arithmetic and numbers on the CPU that no tensor needs.
    Collectives stay, whoever needs their results.

    Runtime scalars that no tensor needs are no inputs of it.
    """
    needed = set(graph.outputs())
    values = [*(p.value for p in graph.params), *(node.outs[0] for node in graph.nodes)]
    kinds = {id(v.type): v.type for v in values}
    idle = {  # the ids of types of what need not be computed
        i for i, kind in kinds.items() if kind.is_host or (kind.device == "cpu" and is_single(kind))
    }
    nodes = []
    for node in reversed(graph.nodes):
        out = node.outs[0]
        if id(out.type) not in idle or out in needed or node.is_ordered:
            needed.update([a for a in node.args if a.__class__ is Value and id(a.type) in idle])
            nodes.append(node)
    needed |= {w.target for w in graph.writes}
    params = tuple(p for p in graph.params if id(p.value.type) not in idle or p.value in needed)
    return replace(graph, params=params, nodes=tuple(reversed(nodes)))


def rounded(t: Trace, x: float, dtype: DType) -> float:
    """A number as a tensor of this dtype holds it."""
    if dtype.name == "f64":
        return x
    op = OPS[f"host_{dtype.name}"]
    if not isinstance(x, TracedFloat):
        return op.eval(x)
    arg: Arg = x.value
    return TracedFloat.make(op.eval(float.__pos__(x)), t.scalars, t.b.emit(op, arg))
