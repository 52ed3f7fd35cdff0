"""Checkpointed regions that a backward comes to: what it reads of them is computed again.

In: the entries of the tape that one backward goes through, in turn. Out: the trace's nodes, with
copies of a region's before those of its backward. `passes/checkpoints.py` says what is copied.
"""

from __future__ import annotations

from bisect import bisect_right

import torch

from tracejit.autodiff import Entry
from tracejit.capture.trace.location import Line
from tracejit.capture.trace.state import Region, TraceState
from tracejit.ir.graph import Value
from tracejit.passes.checkpoints import Revisit, computed, computed_again

SHARE = 8  # of what is computed in a region: less than that in between is next to nothing


class Revisits:
    """The regions that one backward comes to. `roots`: the values that it begins with."""

    def __init__(self, t: TraceState, roots: tuple[Value, ...]):
        self.t, self.roots = t, roots
        self.first, self.born = len(t.b.nodes), t.b.next_id
        self._found: list[Revisit] = []
        self._open: dict[Region, Revisit | None] = {}
        self._starts, self._around = _layers(t.regions)

    def enter(self, entry: Entry, cotangents: frozenset[Value]) -> None:
        """The formula of an entry is emitted next."""
        if not self._starts:
            return
        around = self._around[bisect_right(self._starts, entry.outputs[0].id)]
        if around == tuple(self._open):
            return
        self._leave(around)
        for region in around:
            if region not in self._open:
                trigger, at = self._trigger(region, cotangents), len(self.t.b.nodes)
                revisit = None
                if trigger is not None:
                    numbers = region.first, region.stop
                    revisit = Revisit(*numbers, at, at, trigger, region.products)
                    self._found.append(revisit)
                self._open[region] = revisit

    def _leave(self, around: tuple[Region, ...]) -> None:
        for region in [r for r in self._open if r not in around]:
            revisit = self._open.pop(region)
            if revisit is not None:
                revisit.end = len(self.t.b.nodes)

    def _trigger(self, region: Region, cotangents: frozenset[Value]) -> Value | None:
        """What is there when the backward of a region begins: a cotangent that depends on what was
        computed before, or what is differentiated. None where next to nothing is computed between
        the region and its backward, or where that is in the region itself: it keeps what it has
        computed for no longer than that."""
        if self._follows(region):
            return None
        latest = sorted(cotangents, key=lambda v: -v.id)
        outside = [v for v in self.roots if not region.first <= v.id < region.stop]
        chosen = [v for v in latest if self._depends(v)] or outside
        return chosen[0] if chosen else None

    def _follows(self, region: Region) -> bool:
        """Whether the backward that begins now follows a region almost at once."""
        between = 0
        for node in reversed(self.t.b.nodes):
            if node.out.id < region.stop:
                return True
            between += computed(node)
            if between * SHARE >= region.nbytes:
                return False
        return True

    def _depends(self, value: Value) -> bool:
        """Whether a cotangent depends on what was there before the backward began."""
        pending, seen = [value], set()
        while pending:
            value = pending.pop()
            if value.id < self.born or value not in self.t.producers:
                return True
            if value not in seen:
                seen.add(value)
                pending += [v for v in self.t.producers[value].inputs if not v.type.is_host]
        return False

    def finish(self) -> None:
        """The backward is over."""
        self._leave(())
        if not self._found:
            return
        t = self.t
        nodes, copies = computed_again(t.b.nodes, self._found, _weights(t), t.b.value, _again)
        t.b.nodes[self.first :] = nodes[self.first :]
        groups: dict[int, int] = {}
        for node in nodes[self.first :]:
            t.producers[node.out] = node
            of = copies.of.get(node.out)
            if of is not None:
                group = t.group_of[of.id]
                if group not in groups:
                    groups[group] = t.groups = t.groups + 1
                t.group_of[node.out.id] = groups[group]
            else:
                t.group_of.setdefault(node.out.id, t.groups)
        for value in copies.instead:
            t.saved.pop(value, None)
        t.saved.update(copies.inputs)
        t.again.update(v for v in copies.instead if v.id < self.born)


def _layers(regions: list[Region]) -> tuple[list[int], list[tuple[Region, ...]]]:
    """The numbers of values at which regions begin or are over, and of those before the first, from
    there on, … the regions that they are made in, the outer one first."""
    starts = sorted({n for r in regions for n in (r.first, r.stop)})
    outer = sorted(regions, key=lambda r: (r.first, -r.stop))
    around = [tuple(r for r in outer if r.first <= n < r.stop) for n in starts]
    return starts, [(), *around]


def _weights(t: TraceState) -> set[Value]:
    """The params that are weights: they are there all the time anyway."""
    return {
        h.storage.param
        for h in t.inputs.handles
        if h.requires_grad_leaf or isinstance(h.tensor, torch.nn.Parameter)
    }


def _again(where: str) -> str:
    """The line of what is computed again."""
    return where.changed(phase="backward") if isinstance(where, Line) else where
