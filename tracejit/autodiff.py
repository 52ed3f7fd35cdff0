"""Reverse mode on the IR: a Tape of what was computed, and `backward`, which emits gradients.

The tape stands beside the Graph under construction. Each entry names its input and output Values
and knows how to emit cotangents with a Builder: by the primitives' own rules, or by the derivative
formula of the torch function that was called. Gradients are ordinary nodes: when they are recorded
too (create_graph), higher derivatives follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import field

from tracejit.ir.graph import Builder, Node, Value
from tracejit.ir.ops import NO_GRAD
from tracejit.records import dataclass

# vjp(b, cotangents of the outputs, needed) -> one cotangent (or None) per input
Vjp = Callable[[Builder, tuple[Value | None, ...], tuple[bool, ...]], Sequence[Value | None]]


@dataclass(eq=False, slots=True)
class Entry:
    """One differentiable step. `freed` once a backward without retain_graph went through it.

    `saved`: what torch keeps for the formula that ours does not read (a number: no values).
    `held`: what hooks hold of what torch saves for it (`capture/python/saved_hooks.py`)."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    vjp: Vjp
    name: str
    freed: bool = False
    saved: tuple[Value, ...] | None = None
    held: object | None = None


@dataclass(eq=False)
class Tape:
    """What was computed under grad mode, in order. Only floating-point values are tracked."""

    entries: list[Entry] = field(default_factory=list)
    tracked: set[Value] = field(default_factory=set)

    def watch(self, value: Value) -> None:
        """Make a value a root of differentiation (a leaf)."""
        self.tracked.add(value)

    def record(self, node: Node) -> None:
        """Record a primitive, if an input is tracked and its result can carry a gradient."""
        kind, inputs = node.outs[0].type, node.inputs
        if kind.dtype.is_float and not kind.is_host and not self.tracked.isdisjoint(inputs):
            self.add(Entry(inputs, node.outs, _node_vjp(node), node.op.name))

    def add(self, entry: Entry) -> None:
        """Record an entry; its floating-point outputs become tracked."""
        if not self.tracked.isdisjoint(entry.inputs):
            self.entries.append(entry)
            self.tracked.update(v for v in entry.outputs if v.type.dtype.is_float)


def _node_vjp(node: Node) -> Vjp:
    attrs = dict(node.attrs)

    def vjp(b: Builder, cotangents: tuple[Value | None, ...], needed: tuple[bool, ...]):
        (g,) = cotangents
        wanted = iter(needed)
        for arg, rule in zip(node.args, node.op.rules(len(node.args)), strict=True):
            if not isinstance(arg, Value):
                continue
            if not next(wanted):
                yield None
            elif rule is NO_GRAD:
                yield zeros(b, arg)
            else:
                yield rule(b, g, node.out, *node.args, **attrs)

    return vjp


def zeros(b: Builder, like: Value) -> Value:
    """A zero of a value's type."""
    t = like.type
    return b.full(0.0, shape=t.shape, dtype=t.dtype, device=t.device)


def reaches(tape: Tape, sources: Iterable[Value]) -> set[Value]:
    """The tracked values that depend on `sources`, those included."""
    reached = set(sources)
    for entry in tape.entries:
        if any(v in reached for v in entry.inputs):
            reached.update(entry.outputs)
    return reached


@dataclass(frozen=True, slots=True)
class Arrival:
    """What happens when the cotangent of a tensor is complete.

    `values` are all that stand for the tensor. `run(cotangent)` may return another cotangent. That
    of a leaf runs at once, and of one of its values with the sum over all; that of an intermediate
    just before the entry that made it, and the entry gets what `run` returned.
    """

    values: tuple[Value, ...]
    run: Callable[[Value], Value]
    leaf: bool


class _Arrivals:
    """The arrivals of one backward, by the entry next to which they happen."""

    def __init__(self, entries: Sequence[Entry], roots: Iterable[Value], given: Iterable[Arrival]):
        self.of_value: dict[Value, Arrival] = {}  # intermediates
        self._after: dict[Entry | None, list[Arrival]] = {}  # leaves
        leaves = []
        for arrival in given:
            if arrival.leaf:
                leaves.append(arrival)
            else:
                self.of_value.update(dict.fromkeys(arrival.values, arrival))
        if not leaves:
            return
        last: dict[Value, Entry | None] = dict.fromkeys(roots)  # that passes a cotangent to it
        for entry in reversed(entries):
            if any(v in last for v in entry.outputs):
                last.update(dict.fromkeys(entry.inputs, entry))
        order = {entry: i for i, entry in enumerate(entries)}
        order[None] = len(entries)
        for leaf in leaves:
            found = [last[v] for v in leaf.values if v in last]
            if found:
                self._after.setdefault(min(found, key=order.__getitem__), []).append(leaf)
        for entry, ready in self._after.items():
            if entry is not None:  # in the order of its inputs, as eager's engine
                at = {v: i for i, v in enumerate(entry.inputs)}
                ready.sort(key=lambda a: min(at.get(v, len(at)) for v in a.values))

    def leaves(self, b: Builder, found: dict[Value, Value], entry: Entry | None) -> None:
        """Run those of the leaves that are complete after an entry (None: at the start)."""
        for arrival in self._after.get(entry, ()):
            total = total_of(b, found, arrival.values)
            if total is not None:
                arrival.run(total)


def total_of(b: Builder, found: dict[Value, Value], values: Iterable[Value]) -> Value | None:
    """The sum of the cotangents of values that stand for one tensor; None if none has arrived."""
    parts = [found[v] for v in values if v in found]
    if not parts:
        return None
    total = parts[0]
    for part in parts[1:]:
        total = b.add(total, part)
    return total


def backward(
    tape: Tape,
    b: Builder,
    roots: Sequence[tuple[Value, Value]],
    wanted: Iterable[Value],
    *,
    retain_graph: bool,
    enter: Callable[[Entry, frozenset[Value]], None],
    arrivals: Sequence[Arrival] = (),
) -> dict[Value, Value]:
    """Emit the cotangents of `wanted` values given `roots` (value, cotangent).

    Returns those that the roots depend on. `enter(entry, cotangents)` is called before an entry's
    formula is emitted and added to the cotangents of its inputs, so that the caller can check what
    the formula reads. `arrivals` say what else is done with cotangents on the way.
    """
    wanted = set(wanted)
    needed = reaches(tape, wanted)
    found: dict[Value, Value] = {}

    def accumulate(value: Value, cotangent: Value) -> None:
        found[value] = b.add(found[value], cotangent) if value in found else cotangent

    for value, cotangent in roots:
        accumulate(value, cotangent)
    entries = tuple(tape.entries)
    arriving = _Arrivals(entries, found, arrivals)
    arriving.leaves(b, found, None)
    for at, entry in enumerate(reversed(entries)):
        if at:
            arriving.leaves(b, found, entries[-at])
        for v in entry.outputs if arriving.of_value else ():
            if v in found and v in arriving.of_value and v in needed:
                found[v] = arriving.of_value[v].run(found[v])
        cotangents = tuple(found.get(v) for v in entry.outputs)
        flags = tuple(v in needed for v in entry.inputs)
        if not any(flags) or all(c is None for c in cotangents):
            continue
        arrived = (found.get(v) for v in (*entry.outputs, *entry.inputs))
        enter(entry, frozenset(c for c in arrived if c is not None))
        cotangents = tuple(
            zeros(b, v) if c is None else c for v, c in zip(entry.outputs, cotangents, strict=True)
        )
        given = entry.vjp(b, cotangents, flags)
        for value, flag, cotangent in zip(entry.inputs, flags, given, strict=True):
            if flag and cotangent is not None:
                accumulate(value, cotangent)
        entry.freed = entry.freed or not retain_graph
    if entries:
        arriving.leaves(b, found, entries[0])
    return {v: found[v] for v in wanted if v in found}
