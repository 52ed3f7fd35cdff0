"""The end of a trace that went as an earlier one: what was captured then, with no rule run."""

from __future__ import annotations

from collections import Counter

import torch

from tracejit.capture.effects.collect import undoing
from tracejit.capture.effects.effects import Call, Joined, Slot, Store, Tree, rebuilt
from tracejit.capture.effects.structure import Structure
from tracejit.capture.follow.events import New
from tracejit.capture.follow.recall import End
from tracejit.capture.follow.trail import Trail
from tracejit.capture.python.references import ALONE, IN_ITEM, count
from tracejit.capture.trace.scalars import TracedFloat, TracedInt, TracedText, is_traced
from tracejit.capture.trace.trace import Trace
from tracejit.garbage import uncollected
from tracejit.ir import host_memory
from tracejit.records import dataclass


class _Unlike(Exception):
    """Something that the earlier trace did not make."""


class _Positions(Structure):
    """Finds what the earlier trace made for the tensors and numbers of this one."""

    def __init__(self, trail: Trail, end: End):
        super().__init__(trail.t.scalars.texts)
        self.trail, self.end = trail, end
        self.numbers: dict[
            int, TracedFloat | TracedInt | TracedText
        ] = {}  # by their position among the host results

    def tensor(self, tensor: torch.Tensor) -> int:
        index = self.end.made.get(self.trail.ids.get(id(tensor)))
        if index is None:
            raise _Unlike
        return index

    def host_result(self, number: float | TracedText) -> int:
        results = self.end.captured.effects.host
        made = is_traced(number) or type(number) is TracedText
        if not made or number.value not in results:
            raise _Unlike
        index = results.index(number.value)
        self.numbers[index] = number
        return index

    def is_mine(self, number: TracedFloat | TracedInt) -> bool:
        return number.scalars is self.trail.t.scalars


@dataclass(slots=True)
class _Fit:
    """An end whose effects are this trace's too."""

    end: End
    tree: Tree
    stores: tuple[Store, ...]
    found: _Positions


@dataclass(frozen=True, slots=True)
class Followed:
    """The end that a trace came to, and the call that it was."""

    end: End
    call: Call


def followed(t: Trace, trail: Trail, returned: list[object], young: uncollected) -> Followed | None:
    """What `finish` would give, for a trace that stayed on the path of an earlier one; None for any
    other, which is an ordinary trace then. `returned` is emptied if an end is given."""
    if not trail.following:
        return None
    try:
        return _followed(t, trail, returned, young)
    except BaseException:
        t.forget()
        t.hyperparameters.abort()
        t.draws.undo()
        raise


def _followed(
    t: Trace, trail: Trail, returned: list[object], young: uncollected
) -> Followed | None:
    fits = _fitting(t, trail, returned)
    if not fits:
        trail.leave()
        return None
    tree, stores, found = fits[0].tree, fits[0].stores, fits[0].found
    returned.clear()
    t.hyperparameters.stores = []
    news = fits[0].end.news  # the way's, whatever the end
    held = _held(trail, news)
    if all(held != fit.end.holding for fit in fits):
        young.collect_young()
        held = _held(trail, news)
    alike = ((fit, _numbers(t, trail, fit.end)) for fit in fits if fit.end.holding == held)
    fit, numbers = next((x for x in alike if x[1] is not None), (None, None))
    if fit is None:
        objects = {index: trail.objects[at] for at, index in fits[0].end.made.items()}
        made = objects, found.numbers, found.given
        returned.append(rebuilt(tree, *made))
        t.hyperparameters.stores = [
            (i, rebuilt(key, *made) if isinstance(key, (Slot, Joined)) else key, rebuilt(x, *made))
            for i, key, x in stores
        ]
        trail.leave()
        return None
    end, hyper = fit.end, t.hyperparameters
    trail.recall.kept += 1
    trail.keep_numbers()
    t.forget()
    trail.keep_spares(end.news, end.holding)
    objects = trail.objects
    escaped = [objects[at] for at, _ in end.escaped]
    call = Call(
        reals=[objects[at] for at in end.reals],
        scalars=[*trail.scalars, *numbers],
        holders=hyper.holders,
        given=fit.found.given,
        escaped=escaped,
        callbacks=tuple(hyper.callbacks),
        found=trail.found,
        drawn=t.draws.given,
        generators=t.draws.generators,
        undo=undoing(t, hyper.undo, escaped),
    )
    return Followed(end, call)


def _fitting(t: Trace, trail: Trail, returned: list[object]) -> list[_Fit]:
    """The ends at which the same structure is returned and stored. `returned` keeps its item."""
    hyper, fits = t.hyperparameters, []
    for end in trail.point.ends:
        effects, found = end.captured.effects, _Positions(trail, end)
        try:
            tree = found.tree(returned[0], IN_ITEM)  # which `returned` holds
            stores = tuple(found.store(*store) for store in hyper.stores)
            callbacks = tuple(map(found.operands, hyper.operands))
        except _Unlike:
            continue
        made = tree == effects.returned and stores == effects.stores
        if made and callbacks == effects.callbacks:
            fits.append(_Fit(end, tree, stores, found))
    return fits


def _numbers(t: Trace, trail: Trail, end: End) -> list[float] | None:
    """The numbers of tensors that the end needs besides those of the way; None where it computes
    something of them that is no number now: 1 / 0 is inf in a tensor."""
    numbers = []
    for at, value in end.items:
        numbers.append(host_memory.read(trail.objects[at]))
        t.scalars.numbers[value] = numbers[-1]
    return numbers if all(map(trail.computes, end.hosted)) else None


def _held(trail: Trail, news: tuple[New, ...]) -> set[int]:
    """The positions of proxies that somebody holds besides the trail's `objects`, and contexts of
    custom functions."""
    objects = trail.objects
    held = {new.at for new in news if count(objects[new.at]) > ALONE}
    contexts = trail.t.applied
    if held and contexts:
        inside = Counter(id(x) for context in contexts for x in context.references())
        held = {at for at in held if count(objects[at]) > ALONE + inside[id(objects[at])]}
    return held
