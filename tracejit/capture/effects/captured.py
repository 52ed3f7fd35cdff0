"""A captured step: the raw Graph, where its inputs come from, and its Effects. Pure data."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tracejit.capture.effects.eager import EagerCost
from tracejit.capture.effects.effects import Effects
from tracejit.capture.effects.late import among, behind_callbacks, cuts_behind
from tracejit.capture.trace.bounds import Bound
from tracejit.capture.trace.cuts import Cut, Source
from tracejit.capture.trace.draws import Event
from tracejit.capture.trace.scalars import Path, Predicate
from tracejit.errors import TracejitError
from tracejit.ir.graph import Arg, Graph, Node, Value
from tracejit.records import dataclass


class Opaque:
    """Stands for an object that was given and is no plain value."""

    def __repr__(self) -> str:
        return "<object>"


OPAQUE = Opaque()


@dataclass(frozen=True, slots=True, eq=False)
class Checks:
    """What must not hold of the values that a step computes.

    The graph's results: whether any check fails; then of each whether it does, and an integer that
    is to blame if there is one. It reads the outside tensors and runtime scalars that `sources`
    names, and writes nothing.
    """

    graph: Graph
    sources: tuple[tuple[str, int], ...]
    shown: tuple[bool, ...]  # per check: whether there is an integer
    errors: tuple[TracejitError, ...]  # per check; its `reason` may show {value}

    def refusal(
        self, results: Sequence[torch.Tensor], errors: Sequence[TracejitError]
    ) -> TracejitError:
        """The error of the first check that fails; one does. `errors` are those of the call."""
        _, *found = [result.item() for result in results]
        for shown, error in zip(self.shown, errors, strict=True):
            bad, value = found.pop(0), found.pop(0) if shown else None
            if bad:
                reason = error.fields["reason"].format(value=value)
                return type(error)(**{**error.fields, "reason": reason})
        raise AssertionError("a check fails that no check names")


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """One traced step, without anything of the user's."""

    graph: Graph
    sources: tuple[Source, ...]  # per param
    paths: tuple[Path, ...]  # where each runtime scalar comes from
    scalars: tuple[Value, ...]  # the runtime scalars
    host_nodes: tuple[Node, ...]  # the arithmetic on them
    predicates: tuple[Predicate, ...]  # the decisions on them
    bounds: tuple[Bound, ...]  # what the values of index tensors must be
    checks: Checks | None  # what values that the step computes must not be
    grads_read: tuple[tuple[int, int | None], ...]  # (outside tensor, the one that its .grad is,
    # None where it has none, -1 where it was only looked at)
    given: tuple[object, ...]  # the plain values that the step returned or stored, or OPAQUE
    effects: Effects
    key: Key
    cuts: tuple[Cut, ...] = ()  # values that Python read in the middle
    late: tuple[int, ...] = ()  # cuts that only results depend on: the last results of the graph
    draws: tuple[Event, ...] = ()  # what it does with random generators, in order
    opaque: tuple[str, ...] = ()  # what Python did that no replay can follow
    eager: EagerCost = EagerCost()  # what the same takes in eager

    @property
    def early(self) -> list[int]:
        """The cuts whose values are needed before the rest of the step."""
        return [k for k in range(len(self.cuts)) if k not in self.late]

    @property
    def operands(self) -> list[list[Arg]]:
        """Per callback, the host values among its arguments."""
        return [[self.effects.host[i] for _, i in x] for x in self.effects.callbacks]

    @property
    def decides(self) -> tuple[Predicate, ...]:
        """The decisions that depend on cuts, or on what callbacks leave."""
        behind = cuts_behind(self.scalars, self.paths, self.host_nodes)
        on_callbacks = self.decides_by_callbacks
        return tuple(
            p for p in self.predicates if p in on_callbacks or among(behind, (p.left, p.right))
        )

    @property
    def decides_by_callbacks(self) -> tuple[Predicate, ...]:
        """The decisions that depend on what callbacks leave."""
        behind = behind_callbacks(self.scalars, self.paths, self.host_nodes)
        return tuple(p for p in self.predicates if not behind.isdisjoint((p.left, p.right)))

    @property
    def branches(self) -> bool:
        """Whether values lead to other plans: by a decision, or by a count."""
        return bool(self.decides) or any(cut.count is not None for cut in self.cuts)


def cut_key(cut: Cut) -> tuple:
    """A hashable identity of what a cut computes, and of how much it has found there."""
    return graph_key(cut.graph), cut.search, cut.count


@dataclass(frozen=True, slots=True)
class Key:
    """Equal keys: the same graph, the same effects, and the same plain values given."""

    graph: tuple
    effects: tuple
    given: tuple


def graph_key(graph: Graph) -> tuple:
    """A hashable identity of what a graph computes, its user's lines included.

    It tells 1, 1.0 and True, and 0.0 and -0.0, apart.
    """
    number = {p.value.id: k for k, p in enumerate(graph.params)}
    lines = []
    for node in graph.nodes:
        args = [number[a.id] if a.__class__ is Value else repr(a) for a in node.args]
        attrs = repr(node.attrs) if node.attrs else ""
        lines.append((node.op.name, *args, attrs, node.where))
        for out in node.outs:
            number[out.id] = len(number)
    return (
        tuple((str(p.value.type), p.strides) for p in graph.params),
        tuple(lines),
        tuple((number[r.value.id], r.strides) for r in graph.results),
        tuple((number[w.target.id], number[w.value.id]) for w in graph.writes),
    )
