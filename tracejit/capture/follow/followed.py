"""The end of a trace that went as an earlier one: its Captured step without running a rule."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tracejit.capture.effects.captured import Captured, rebuild, slots
from tracejit.capture.effects.collect import Collector
from tracejit.capture.effects.hyperparameters import Held
from tracejit.capture.follow.events import New
from tracejit.capture.follow.recall import End
from tracejit.capture.follow.trail import Trail
from tracejit.capture.python.garbage import uncollected
from tracejit.capture.python.references import ALONE, count
from tracejit.capture.trace.scalars import TracedFloat
from tracejit.capture.trace.trace import Trace
from tracejit.capture.tracer import Tracer
from tracejit.ir import host_memory


class _Unlike(Exception):
    """Something that the earlier trace did not make."""


class _Positions(Collector):
    """Finds what the earlier trace made for the tensors and numbers of this one."""

    def __init__(self, t: Trace, trail: Trail, end: End):
        self.t, self.trail, self.end = t, trail, end
        self.floats: dict[int, TracedFloat] = {}  # by their position among the host results

    def tensor(self, tensor: torch.Tensor) -> int:
        index = self.end.made.get(self.trail.ids.get(id(tensor)))
        if index is None:
            raise _Unlike
        return index

    def host_result(self, number: float) -> int:
        results = self.end.captured.host_results
        if not isinstance(number, TracedFloat) or number.value not in results:
            raise _Unlike
        index = results.index(number.value)
        self.floats[index] = number
        return index


@dataclass(slots=True)
class Followed:
    """The end that a trace came to, and what is this trace's own."""

    end: End
    reals: list[torch.Tensor]
    scalars: list[float]
    tree: object
    stores: tuple
    escaped: tuple
    tracer: Tracer

    def captured(self) -> Captured:
        """What `finish` would give."""
        return replace(
            self.end.captured,
            reals=self.reals,
            scalars=tuple(self.scalars),
            tree=self.tree,
            stores=self.stores,
            callbacks=tuple(self.tracer.trace.hyperparameters.callbacks),
            escaped=self.escaped,
            undo=self.tracer.trace.hyperparameters.undo,
            end=self.end,
        )


def followed(tracer: Tracer, returned: list[object], young: uncollected) -> Followed | None:
    """What `finish` would give, for a trace that stayed on the path of an earlier one; None for any
    other, which is an ordinary trace then. `returned` is emptied if a step is given."""
    trail = tracer.trail
    if not trail.following:
        return None
    try:
        return _followed(tracer, trail, returned, young)
    except BaseException:
        tracer.trace.forget()
        tracer.trace.hyperparameters.undo()
        raise


def _followed(
    tracer: Tracer, trail: Trail, returned: list[object], young: uncollected
) -> Followed | None:
    x, hyper = returned.pop(), tracer.trace.hyperparameters
    alike = []
    for end in trail.point.ends:
        collect = _Positions(tracer.trace, trail, end)
        try:
            tree = collect.tree(x, 3)  # `x` here too
            stores = tuple(
                (Held(d), key, collect.tree(v)) for d, key, v in tracer.trace.hyperparameters.stores
            )
        except _Unlike:
            continue
        callbacks = len(hyper.callbacks)
        if frozenset(slots(tree)) == end.returned and callbacks == end.callbacks:
            alike.append((end, tree, stores, collect.floats))
    if not alike:
        returned.append(x)
        trail.leave()
        return None
    del x
    news = alike[0][0].news  # the way's, whatever the end
    held = _held(trail, news)
    if all(held != end.holding for end, *_ in alike):
        young.collect_young()
        held = _held(trail, news)
    fitting = ((a, _numbers(tracer, a[0])) for a in alike if a[0].holding == held)
    found = next((x for x in fitting if x[1] is not None), None)
    if found is None:
        end, tree, _, floats = alike[0]
        objects = {index: trail.objects[at] for at, index in end.made.items()}
        returned.append(rebuild(tree, objects, floats))
        trail.leave()
        return None
    (end, tree, stores, _), numbers = found
    trail.recall.kept += 1
    tracer.trace.forget()
    trail.lay_aside(end.news)
    objects = trail.objects
    reals = [objects[at] for at in end.reals]
    escaped = tuple([(objects[at], index) for at, index in end.escaped])
    return Followed(end, reals, [*trail.scalars, *numbers], tree, stores, escaped, tracer)


def _numbers(tracer: Tracer, end: End) -> list[float] | None:
    """The numbers of tensors that the end needs besides those of the way; None where it computes
    something of them that is no number now: 1 / 0 is inf in a tensor."""
    numbers = []
    for at, value in end.items:
        numbers.append(host_memory.read(tracer.trail.objects[at]))
        tracer.trace.scalars.numbers[value] = numbers[-1]
    return numbers if all(map(tracer.trail.computes, end.hosted)) else None


def _held(trail: Trail, news: tuple[New, ...]) -> set[int]:
    """The positions of proxies that somebody holds besides the trail's `objects`."""
    objects = trail.objects
    return {new.at for new in news if count(objects[new.at]) > ALONE}
