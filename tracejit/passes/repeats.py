"""Where a graph repeats itself: runs of nodes that do the same again and again.

In: the nodes of a graph. Out: stretches of them that are alike with a period, the longest first.
Two nodes are alike if they apply the same primitive to operands of the same types, with the same
attributes; at which place a slice or a pad stands may differ. A window of a few nodes that was seen
before suggests a period, and it is followed as far as it holds; so the time is that of the nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tracejit.ir.graph import Node, Value
from tracejit.records import dataclass

WINDOW = 6  # nodes that suggest a period
LEAST = 8  # repetitions that are worth a loop
MULTIPLES = 4  # of a period that are tried: layers of a step may be alike but for their weights


@dataclass(frozen=True, slots=True)
class Run:
    """Nodes start … stop, each of which is like the one `period` nodes before it."""

    start: int
    stop: int
    period: int

    @property
    def times(self) -> int:
        return (self.stop - self.start) // self.period


def find_runs(nodes: Sequence[Node]) -> list[Run]:
    """The runs of at least LEAST repetitions, the longest first. They may overlap."""
    if len(nodes) < max(2 * LEAST, WINDOW):
        return []
    signs = signatures(nodes)
    seen: dict[bytes, int] = {}
    until: dict[int, int] = {}  # by period, how far it has been followed
    found = []
    width = WINDOW * signs.itemsize
    raw, size = signs.tobytes(), signs.itemsize
    for i in range(len(nodes) - WINDOW + 1):
        window = raw[i * size : i * size + width]
        before = seen.get(window)
        seen[window] = i
        if before is None:
            continue
        period = i - before
        if i < until.get(period, 0):
            continue
        run = _followed(signs, before, period)
        until[period] = run.stop
        if run.times >= LEAST:
            found.append(run)
    return sorted(found, key=lambda run: (run.start - run.stop, run.period))


def _followed(signs: np.ndarray, start: int, period: int) -> Run:
    """The whole stretch around a place in which nodes are like those a period before."""
    low, high = start, start + period
    step = max(4 * period, 64)
    while True:  # in growing blocks, so that a short one costs little
        part = signs[high : high + step] != signs[high - period : len(signs) - period][:step]
        if part.any():
            high += int(part.argmax())
            break
        high += len(part)
        if high >= len(signs):
            break
        step *= 2
    while low > 0 and signs[low - 1] == signs[low - 1 + period]:
        low -= 1
    return Run(low, high, period)


def signatures(nodes: Sequence[Node]) -> np.ndarray:
    """A number for each node; like nodes have the same."""
    numbers: dict[tuple, int] = {}
    types: dict[object, int] = {}
    by_identity: dict[int, int] = {}  # types are shared objects, mostly
    found = np.empty(len(nodes), np.int32)

    of_values: dict[int, int] = {}
    for node in nodes:
        for value in (*node.inputs, *node.outs):
            if value.id not in of_values:
                kind = value.type
                if id(kind) not in by_identity:
                    by_identity[id(kind)] = types.setdefault(kind, len(types))
                of_values[value.id] = by_identity[id(kind)]
    for i, node in enumerate(nodes):
        op = node.op
        attrs: object = node.attrs
        if op.name in _PLACED:
            attrs = tuple([repr(v) for k, v in attrs if k in _PLACED[op.name]])
        elif op.family == "loop" or node.is_ordered:
            attrs = i  # like no other
        else:
            for _, v in node.attrs:
                if v.__class__ is float:
                    attrs = repr(attrs)
                    break
        args = [of_values[a.id] if a.__class__ is Value else (repr(a),) for a in node.args]
        out = of_values[node.outs[0].id]
        found[i] = numbers.setdefault((op.name, attrs, out, *args), len(numbers))
    return found


_PLACED = {"slice": ("steps",), "pad": ("interior", "value")}


def aligned(nodes: Sequence[Node], run: Run) -> Iterator[Run]:
    """The run cut into whole repetitions at the best place: where fewest bytes pass from one
    repetition to the next. Then the same for multiples of its period."""
    for multiple in range(1, MULTIPLES + 1):
        period = run.period * multiple
        if run.times // multiple < LEAST:
            return
        start = run.start + _phase(nodes, run.start, run.stop, period)
        times = (run.stop - start) // period
        if times >= LEAST:
            yield Run(start, start + times * period, period)


def _phase(nodes: Sequence[Node], start: int, stop: int, period: int) -> int:
    middle = start + (stop - start) // period // 2 * period
    made = {nodes[i].outs[0].id: i for i in range(middle, middle + period)}
    last = dict.fromkeys(made.values(), -1)
    for i in range(middle, min(middle + 2 * period, stop)):
        for arg in nodes[i].args:
            if arg.__class__ is Value and arg.id in made:
                last[made[arg.id]] = i
    change = np.zeros(2 * period + 2, np.int64)
    for i, end in last.items():
        if end > i and end - i < period:
            size = nodes[i].outs[0].type.nbytes + 1
            change[i - middle + 1] += size
            change[end - middle + 1] -= size
    crossing = change.cumsum()[: 2 * period].reshape(2, period).sum(0)
    return int(crossing.argmin())
