"""From the armed replays of a compiled step to a SavedStep: what a file keeps of it.

In: a step's replays, as it would make them now. Out: pure data, with tensors as they are, not
copied. Each replay is asked, by its guard and a call like the one that it was armed in, whether it
would still be made, and from where it would take its inputs. Tensors of that call are arguments of
the saved step, all others its state, by the names that the user's code has for them.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import CellType

import torch

from tracejit.capture.effects.captured import OPAQUE, Captured
from tracejit.capture.effects.effects import (
    Call,
    Given,
    HostSlot,
    Mapped,
    Sequenced,
    Slot,
    Store,
    Tree,
    is_named,
)
from tracejit.capture.effects.variables import identity
from tracejit.capture.names import Names
from tracejit.capture.signature import (
    Left,
    Standing,
    leaves,
    standing,
)
from tracejit.capture.trace.draws import Called, default_generator
from tracejit.capture.trace.scalars import Path
from tracejit.errors import OF_EAGER, CannotSave, TracejitError
from tracejit.ir.ops.host import host_format
from tracejit.ir.torch_types import TO_IR
from tracejit.run import Replay
from tracejit.saved.archive import Damaged
from tracejit.saved.arguments import TakenArguments
from tracejit.saved.plans import check_text
from tracejit.saved.rates import AskedRates, is_read
from tracejit.saved.record import (
    LISTS,
    NUMBERS,
    TENSORS,
    Place,
    SavedGenerator,
    SavedPlan,
    SavedStep,
    Spec,
)
from tracejit.saved.saving import Saving
from tracejit.saved.schedules import SavedCallback, Taken, Unknown
from tracejit.saved.searches import search_json
from tracejit.saved.soundness import check_step

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.Size, torch.device)
_SCHEDULER = (
    "it steps a learning-rate scheduler that no file can keep: {what}",
    "Step the scheduler outside, and give the loaded step its rate, as loaded(…, lr=…)",
)
_LOOKS = (
    "it appends to a list of yours ({what}) and looks at what there is in it",
    "Return what it appends, and append that where the step is called",
)
_UNKNOWN_RATE = (
    "it reads {what} after a scheduler that no file can keep has stepped",
    "Step the scheduler at the end of the step, or outside",
)
_RANKS = (
    "it communicates ({name} of {ranks} ranks), and would be run in another world",
    "Compile it in each world: the caches on the disk keep its kernels",
)
_OBJECT = (
    "it stores something in an object of yours ({what}) that is neither a number nor a tensor",
    "Return it, and store it outside",
)
_ARGUMENT = (
    "it assigns to a field of its argument ({what})",
    "Return it, and assign it where the step is called",
)
_FLAGGED = (
    "it changes the requires_grad of a tensor from outside ({name})",
    "Do that outside of the step",
)


def saved_step(
    saving: Saving, replays: Sequence[Replay], options: dict, why_not: Callable[[], str]
) -> SavedStep:
    """What a file keeps of a step: the plans of these replays, the one that ran last first.

    why_not: says why the step has none. Raises CannotSave.
    """
    if not replays:
        raise saving.refuse(
            (
                f"it is not replayed ({why_not()}), and a file keeps no Python",
                "Call it until it is replayed (two or three times for each shape), or change what "
                "keeps it from that",
            )
        )
    plans: dict[tuple, SavedPlan] = {}
    texts: dict[str, str] = {}
    failed, rates = "", AskedRates(replays)
    for replay in replays:
        _refuse_left(saving, replay)
        call, found = _asked(replay)
        if type(found) is str:
            failed = failed or found
            continue
        plan = _Planned(saving, replay, call, found, rates).plan()
        if _kind(plan) in plans:  # an earlier one took such calls
            continue
        shown = f"plans/{len(plans)}"
        program = replay.compiled.program
        texts[f"{shown}/plan.txt"] = str(program.plan)
        for i, source in enumerate(program.loaded.sources):
            texts[f"{shown}/kernels/{i}{source.suffix}"] = source.text
        plans[_kind(plan)] = plan
    if not plans:
        raise saving.refuse(
            (
                f"no plan that it has would be replayed now: {failed}",
                "Save it in the state, and under the modes, that it is called in",
            )
        )
    for at, (name, _) in saving.lists.items():
        if at in saving.looked_at:
            raise saving.refuse(_LOOKS, what=name)
    gradients = {
        name: saving.tensor(tensor.grad, f"{name}.grad")
        for name, tensor in tuple(saving.tensors.items())
        if tensor.is_leaf and tensor.grad is not None
    }
    step = SavedStep(
        name=saving.name,
        options=options,
        numbers=saving.numbers,
        tensors=saving.tensors,
        gradients=gradients,
        generators=tuple(map(_saved_generator, saving.generators)),
        plans=tuple(plans.values()),
        texts=texts,
        lists=tuple(name for name, _ in saving.lists.values()),
        asked=saving.asked,
        **({} if saving.schedules is None else {"schedules": saving.schedules.schedules()}),
    )
    try:
        check_step(step)
        for plan in step.plans:
            check_text(plan)
    except (Damaged, TracejitError, TypeError, ValueError) as error:
        why = f"what it does fits no file ({error})"
        raise saving.refuse((why, "Please report this")) from error
    return step


def _refuse_left(saving: Saving, replay: Replay) -> None:
    """Raise an error where an argument was a container of which nothing was kept."""
    for tree in (*replay.signature.args, *replay.signature.kwargs.values()):
        for left in leaves(tree):
            if isinstance(left, Left):
                remedy = "Pass its tensors, or a tuple, list or dict of at most 1000 items"
                raise saving.refuse((f"an argument of it is a {left.what}", remedy))


def _saved_generator(generator: torch.Generator) -> SavedGenerator:
    device = str(generator.device)
    own = generator is not default_generator(device)
    return SavedGenerator(device, generator.get_state() if own else None)


def _asked(replay: Replay) -> tuple[Standing, tuple | str]:
    """A call like the replay's, and what its guard says of it, whatever the numbers are now that it
    decides by: they are the loaded step's to look at. So are gradients that are there or not, and
    it does the same in either grad mode."""
    call = standing(replay.signature)
    on = torch.is_grad_enabled()

    def found() -> tuple | str:
        return replay.guard(call.args, call.kwargs, deciding=False)

    said = first = found()
    if type(said) is str:
        with replay.signature.gradients_as_they_were():
            said = found()
            if type(said) is str:
                with torch.set_grad_enabled(not on):
                    said = found()
    return call, first if type(said) is str else said


def _kind(plan: SavedPlan) -> tuple:
    """What calls a plan takes; two alike could not be told apart."""
    given = tuple(spec for place, spec in plan.tensors if place.kind == "argument")
    c = plan.captured
    counts = tuple(cut.count for cut in c.cuts)
    return repr(plan.arguments), given, repr(c.predicates), c.grads_read, counts


class _Planned:
    """One replay on its way to a SavedPlan."""

    def __init__(
        self, saving: Saving, replay: Replay, call: Standing, found: tuple, rates: AskedRates
    ):
        self.saving, self.replay = saving, replay
        self.captured: Captured = replay.captured
        self.standing, self.rates = call, rates
        self.reals, self.numbers, _, self.holders = found
        self.call = Call(self.reals, self.numbers, self.holders)
        self.names = Names(saving.function, call.args, call.kwargs)
        self._refuse()
        self.places = self._tensors()
        self._ask()
        self.callbacks = self._callbacks()  # with their positions in the replay
        self.given = TakenArguments(saving, replay, call, self.reals, self.holders)

    def _refuse(self) -> None:
        """Raise an error for what a file cannot keep."""
        c, effects = self.captured, self.captured.effects
        refuse = self.saving.refuse
        if any(x.is_complex() for x in self.reals) or effects.has_complex:
            remedy = "Give it and return torch.view_as_real of them"
            raise refuse(("it reads or returns complex tensors", remedy))
        for cut in c.cuts:
            if cut.search is not None and search_json(cut.search) is None:
                why = f"what it computes depends on which elements it finds at {cut.where}"
                remedy = cut.search.remedy or "Draw outside of the step"
                raise refuse((why, remedy))
        for event in c.draws:
            if isinstance(event, Called):
                why = f"it draws a number by {event.function} of random or numpy.random"
                raise refuse((why, "Draw it outside and pass it as an argument"))
        if any(node.op is host_format for node in c.host_nodes):
            remedy = "Return the number, and make text of it after the call"
            raise refuse(("it makes text of a number", remedy))
        if effects.flags:
            index = effects.flags[0][0]
            raise refuse(_FLAGGED, name=self.names.tensors.get(id(self.reals[index])))
        for error in (*(b.error for b in c.bounds), *(c.checks.errors if c.checks else ())):
            if type(error) not in OF_EAGER:
                raise refuse((f"it may raise {type(error).__name__}", "Check that outside"))
        for x in c.given:
            if isinstance(x, type):
                continue  # of what is returned
            if x is OPAQUE or type(x) not in _PLAIN:
                raise self._class(type(x))

    # ---- tensors

    def _tensors(self) -> tuple[tuple[Place, Spec], ...]:
        grad_of = {grad: i for i, grad in self.captured.grads_read if grad not in (None, -1)}
        found = []
        for k, tensor in enumerate(self.reals):
            name = self.names.tensors.get(id(tensor))
            if id(tensor) in self.standing.of:
                place = Place("argument", name or f"tensor {k}")
            elif k in grad_of:
                place = Place("grad", grad_of[k])
            else:
                place = Place("state", self.saving.tensor(tensor, name))
            geometry = tuple(tensor.shape), tensor.stride()
            kind = str(tensor.device), tensor.requires_grad
            found.append((place, Spec(TO_IR[tensor.dtype], *geometry, *kind)))
        return tuple(found)

    # ---- numbers

    def _scalar(self, k: int, path: Path) -> Place:
        """Where a runtime scalar comes from."""
        now = self.numbers[k]
        match path:
            case _ if k in self.given.scalars:
                return Place("argument", self.names.scalar(path, self.call) or f"number {k}")
            case "item", index:
                return Place("item", index)
            case "cut", index:
                return Place("cut", index)
            case "after", n, ("entry", holder, *key):
                return self._after(k, n, holder, key, path)
            case _ if now is None:  # nothing is computed of it
                return Place("constant", 0.0)
            case "held", _:
                return Place("constant", now)
            case "entry", holder, *key:
                return Place("number", self._number_of(holder, key, path, now))
            case (("cell" | "global" | "default" | "kwdefault"), *_):
                place = path
            case _:
                why = f"a number of it comes from where no file can read it: {path}"
                raise self.saving.refuse((why, "Pass the number as an argument"))
        name = self.names.scalar(path, self.call)
        return Place("number", self.saving.number(place, name, now))

    def _after(self, k: int, n: int, holder: int, key: list, path: Path) -> Place:
        """A number as a scheduler has left it."""
        if len(self.callbacks) == len(self.replay.call.callbacks) or n in self.callbacks:
            at = [*self.callbacks].index(n)
            groups = (g for x in self.rates.optimizers.values() for g in x.param_groups)
            if not any(self.holders[holder] is group for group in groups):
                number = self._number_of(holder, key, path[2], self.numbers[k])
                return Place("after", (at, number))
        if is_read(self.captured, k):
            raise self.saving.refuse(_UNKNOWN_RATE, what=self.names.scalar(path[2], self.call))
        return Place("constant", 0.0)

    def _number_of(self, holder: int, key: list, path: Path, now: float) -> str:
        """The name of a number that one of the step's holders has."""
        place = id(self.holders[holder]), *key
        self.saving.looked_at.add(place[0])
        return self.saving.number(place, self.names.scalar(path, self.call), now)

    # ---- schedulers

    def _ask(self) -> None:
        """The rates that a call has to be given, in the order of the param groups."""
        for at, optimizer in self.rates.optimizers.items():
            for group in getattr(optimizer, "param_groups", ()):
                if type(group["lr"]) in (int, float):
                    name = self._of_group(group, ("lr",), group["lr"])
                    self.saving.asked[name] = self.rates.kinds[at]

    def _callbacks(self) -> dict[int, SavedCallback]:
        """The calls of schedulers that a file can keep, by their positions."""
        found = {}
        for n, callback in enumerate(self.replay.call.callbacks):
            scheduler = callback.function.__self__
            if callback.function.__func__ is not type(scheduler).step:
                raise self.saving.refuse(_SCHEDULER, what=f"{type(scheduler).__name__}.step")
            if self.saving.schedules is None:
                self.saving.schedules = Taken(self._of_group)
            try:
                if self.rates.takes(scheduler):
                    continue
                at = self.saving.schedules.scheduler(scheduler)
            except Unknown as unknown:
                raise self.saving.refuse(_SCHEDULER, what=unknown) from unknown
            given = (*callback.args, *callback.kwargs.values())
            if any(type(x) not in (int, float, bool, type(None)) for x in given):
                raise self.saving.refuse(_SCHEDULER, what=f"{given} are arguments of its step")
            found[n] = SavedCallback(at, tuple(callback.args), dict(callback.kwargs))
        return found

    def _of_group(self, group: dict, key: tuple, now: int | float) -> str:
        """The name of a number of a param group."""
        name = self.names.entry(group, key[0])
        name = name and name + "".join(f"[{k}]" for k in key[1:])
        return self.saving.number((id(group), *key), name, now)

    # ---- effects

    def _store(self, store: Store, objects: list[object]) -> Store | None:
        """A store as one to a name; None where it changes nothing."""
        holder, key, tree = store
        place = 0 if key is ... else key
        name = self.names.entry(self.holders[holder], place)
        if identity(self.holders[holder], key)[0] in self.given.holders:
            raise self.saving.refuse(_ARGUMENT, what=name or key)
        if key is ...:
            at = self.saving.list(self.holders[holder], name and name.removesuffix("[0]"))
            return LISTS + at, ..., self._returned(tree, objects)
        now = entry_of(self.holders[holder], key)
        name = self.names.scalar(("entry", holder, key), self.call)
        match tree:
            case HostSlot() if type(now) in (int, float):
                place = id(self.holders[holder]), key
                return NUMBERS, self.saving.number(place, name, now), tree
            case Slot(index) if isinstance(now, torch.Tensor):
                made = self.captured.effects.made[index]
                if made.kind == "real" and self.reals[made.index] is now:
                    return None
                if any(real is now for real in self.reals):
                    return TENSORS, self.saving.tensor(now, self.names.tensors.get(id(now))), tree
            case Given(index):
                x = self.captured.given[index]
                if type(x) is type(now) and x == now:
                    return None
        raise self.saving.refuse(_OBJECT, what=name or key)

    # ---- what is returned

    def _returned(self, tree: Tree, given: list[object]) -> Tree:
        """What is returned, with tuples with names in place of objects of attributes."""
        match tree:
            case Given(index) if isinstance(given[index], type):
                raise self._class(given[index])
            case Sequenced(Given(index), (Mapped(pairs),)) if not is_named(given[index]):
                kind = self.captured.given[index]
                names = [name for name, _ in pairs]
                try:
                    given[index] = namedtuple(kind.__name__, names)
                except ValueError as error:
                    raise self._class(kind) from error
                items = tuple(self._returned(x, given) for _, x in pairs)
                return Sequenced(Given(index), items)
            case Sequenced(kind, items):
                return Sequenced(kind, tuple(self._returned(x, given) for x in items))
            case Mapped(pairs):
                return Mapped(tuple((key, self._returned(x, given)) for key, x in pairs))
        return tree

    def _class(self, kind: type) -> CannotSave:
        remedy = "Return tensors and plain values in tuples (with names or not), lists, dicts"
        why = f"it returns an object of a class of its own, {kind.__name__}"
        return self.saving.refuse((why, remedy))

    # ---- all of it

    def plan(self) -> SavedPlan:
        """The plan."""
        c = self.captured
        for node in c.graph.nodes:
            if node.is_ordered:
                raise self.saving.refuse(_RANKS, name=node.op.name, ranks=node.attr("ranks"))
        scalars = tuple(self._scalar(k, path) for k, path in enumerate(c.paths))
        objects = list(c.given)
        stores = tuple(filter(None, (self._store(x, objects) for x in c.effects.stores)))
        generators = tuple(map(self.saving.generator, self.replay.call.generators))
        returned = self._returned(c.effects.returned, objects)
        calls = tuple(c.effects.callbacks[n] for n in self.callbacks)
        effects = replace(c.effects, stores=stores, returned=returned, callbacks=calls)
        captured = replace(c, effects=effects, given=tuple(objects), paths=())
        given = self.given.arguments, self.places, scalars, generators
        return SavedPlan(captured, *given, tuple(self.callbacks.values()))


def entry_of(holder: object, key: object) -> object:
    """What a place holds; None where there is none."""
    if isinstance(holder, CellType):
        return holder.cell_contents
    try:
        return holder[key]
    except (LookupError, TypeError):
        return None
