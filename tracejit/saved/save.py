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
from tracejit.capture.names import Names, names_of_arguments
from tracejit.capture.signature import (
    Fielded,
    Keyed,
    Left,
    Listed,
    Standing,
    TensorLike,
    Thing,
    leaves,
    standing,
)
from tracejit.capture.trace.draws import default_generator
from tracejit.capture.trace.scalars import Path
from tracejit.errors import OF_EAGER, CannotSave, TracejitError
from tracejit.ir.ops.host import host_format
from tracejit.ir.torch_types import TO_IR
from tracejit.run import Replay
from tracejit.saved.archive import Damaged
from tracejit.saved.plans import check_text
from tracejit.saved.record import (
    NUMBERS,
    TENSORS,
    Argument,
    GivenNumber,
    GivenTensor,
    GivenValue,
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
_GROWS = (
    "it appends to a list of yours ({what})",
    "Return what it appends, and append that where the step is called",
)
_RANKS = (
    "it communicates ({name} of {ranks} ranks), and would be run in another world",
    "Compile it in each world: the caches on the disk keep its kernels",
)
_OBJECT = (
    "it stores something in an object of yours ({what}) that is neither a number nor a tensor",
    "Return it, and store it outside",
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
    failed = ""
    for replay in replays:
        _refuse_left(saving, replay)
        call, found = _asked(replay)
        if type(found) is str:
            failed = failed or found
            continue
        plan = _Planned(saving, replay, call, found).plan()
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

    def __init__(self, saving: Saving, replay: Replay, call: Standing, found: tuple):
        self.saving, self.replay, self.given = saving, replay, call
        self.captured: Captured = replay.captured
        self.reals, self.numbers, _, self.holders = found
        self.call = Call(self.reals, self.numbers, self.holders)
        self.names = Names(saving.function, call.args, call.kwargs)
        self._refuse()
        self.places = self._tensors()
        self.of_arguments: set[int] = set()  # the runtime scalars that they give
        self.listed: set[TensorLike] = set()
        self.arguments = self._arguments()

    def _refuse(self) -> None:
        """Raise an error for what a file cannot keep."""
        c, effects = self.captured, self.captured.effects
        refuse = self.saving.refuse
        for cut in c.cuts:
            if cut.search is not None and search_json(cut.search) is None:
                why = f"what it computes depends on which elements it finds at {cut.where}"
                remedy = cut.search.remedy or "Draw outside of the step"
                raise refuse((why, remedy))
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
            if id(tensor) in self.given.of:
                place = Place("argument", name or f"tensor {k}")
            elif k in grad_of:
                place = Place("grad", grad_of[k])
            else:
                place = Place("state", self.saving.tensor(tensor, name))
            geometry = tuple(tensor.shape), tensor.stride()
            kind = str(tensor.device), tensor.requires_grad
            found.append((place, Spec(TO_IR[tensor.dtype], *geometry, *kind)))
        return tuple(found)

    # ---- arguments

    def _arguments(self) -> tuple[Argument, ...]:
        """The arguments of a call of the loaded step, in the order of the step's parameters."""
        signature, function = self.replay.signature, self.saving.function
        names = names_of_arguments(function, self.given.args, self.given.kwargs)
        code = function.__code__
        order = {name: k for k, name in enumerate(code.co_varnames[: code.co_argcount])}
        by_name = code.co_posonlyargcount
        listed: list[tuple[tuple, Argument]] = []
        scalars = {path: k for k, path in enumerate(self.captured.paths)}
        trees: list[tuple[Path, str, object]] = []
        for i, tree in enumerate(signature.args):
            trees.append((("arg", i), names["arg", i], tree))
        for key, tree in signature.kwargs.items():
            trees.append((("kwarg", key), key, tree))
        given = {name for _, name, _ in trees}  # what is left out ends those by place
        for path, name, tree in trees:
            if self._is_object(tree, name):
                continue
            positional = path[0] == "arg" or order.get(name, -1) >= by_name
            positional &= all(
                other in given for other, k in order.items() if k < order.get(name, 0)
            )
            where = order.get(name, len(order) + len(listed))
            argument = Argument(name, positional, self._tree(tree, path, scalars))
            listed.append(((not positional, where), argument))
        listed.sort(key=lambda pair: pair[0])
        return tuple(argument for _, argument in listed)

    def _is_object(self, tree: object, name: str) -> bool:
        """Whether an argument is an object of the user's, which a loaded step needs none of."""
        found = list(leaves(tree))
        things = [x for x in found if isinstance(x, Thing)]
        if things and len(things) < len(found):
            remedy = "Pass them as two arguments"
            raise self.saving.refuse(
                (f"its argument {name} has objects of yours beside other things", remedy)
            )
        return bool(things)

    def _tree(self, tree: object, path: Path, scalars: dict[Path, int]) -> object:
        """An argument as a tree of what is given in it."""
        match tree:
            case TensorLike():
                tensor = self.given.tensors[tree]
                if tree in self.listed:
                    why = "one tensor is two arguments of it, which the plan takes for one"
                    raise self.saving.refuse((why, "Pass it once, or pass a clone"))
                self.listed.add(tree)
                index = next((k for k, real in enumerate(self.reals) if real is tensor), None)
                return GivenTensor(index)
            case Listed(kind, items):
                return Listed(
                    kind, tuple(self._tree(x, (*path, i), scalars) for i, x in enumerate(items))
                )
            case Keyed(items):
                return Keyed(tuple((k, self._tree(x, (*path, k), scalars)) for k, x in items))
            case Fielded(kind, items, listed):
                keys = range(len(items)) if listed else [f".{name}" for name, _ in items]
                fields = tuple(
                    (name, self._tree(x, (*path, key), scalars))
                    for key, (name, x) in zip(keys, items, strict=True)
                )
                return Fielded(kind.__name__, fields, listed)
        if path in scalars:
            self.of_arguments.add(scalars[path])
            return GivenNumber(scalars[path], type(tree) is int)
        return GivenValue(tree)

    # ---- numbers

    def _scalar(self, k: int, path: Path) -> Place:
        """Where a runtime scalar comes from."""
        now = self.numbers[k]
        match path:
            case _ if k in self.of_arguments:
                return Place("argument", self.names.scalar(path, self.call) or f"number {k}")
            case "item", index:
                return Place("item", index)
            case "cut", index:
                return Place("cut", index)
            case "after", n, ("entry", holder, *key):
                return Place("after", (n, self._number_of(holder, key, path[2], now)))
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

    def _number_of(self, holder: int, key: list, path: Path, now: float) -> str:
        """The name of a number that one of the step's holders has."""
        place = id(self.holders[holder]), *key
        return self.saving.number(place, self.names.scalar(path, self.call), now)

    # ---- schedulers

    def _callbacks(self) -> tuple[SavedCallback, ...]:
        """The calls of schedulers."""
        found = []
        for callback in self.replay.call.callbacks:
            if self.saving.schedules is None:
                self.saving.schedules = Taken(self._of_group)
            scheduler = callback.function.__self__
            if callback.function.__func__ is not type(scheduler).step:
                raise self.saving.refuse(_SCHEDULER, what=f"{type(scheduler).__name__}.step")
            try:
                at = self.saving.schedules.scheduler(scheduler)
            except Unknown as unknown:
                raise self.saving.refuse(_SCHEDULER, what=unknown) from unknown
            given = (*callback.args, *callback.kwargs.values())
            if any(type(x) not in (int, float, bool, type(None)) for x in given):
                raise self.saving.refuse(_SCHEDULER, what=f"{given} are arguments of its step")
            found.append(SavedCallback(at, tuple(callback.args), dict(callback.kwargs)))
        return tuple(found)

    def _of_group(self, group: dict, key: tuple, now: int | float) -> str:
        """The name of a number of a param group."""
        name = self.names.entry(group, key[0])
        name = name and name + "".join(f"[{k}]" for k in key[1:])
        return self.saving.number((id(group), *key), name, now)

    # ---- effects

    def _store(self, store: Store) -> Store | None:
        """A store as one to a name; None where it changes nothing."""
        holder, key, tree = store
        if key is ...:
            name = self.names.entry(self.holders[holder], 0) or "one that no name was found for"
            raise self.saving.refuse(_GROWS, what=name.removesuffix("[0]"))
        now = entry_of(self.holders[holder], key)
        path = ("entry", holder, key)
        name = self.names.scalar(path, self.call)
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
        stores = tuple(filter(None, map(self._store, c.effects.stores)))
        generators = tuple(map(self.saving.generator, self.replay.call.generators))
        objects = list(c.given)
        returned = self._returned(c.effects.returned, objects)
        effects = replace(c.effects, stores=stores, returned=returned)
        captured = replace(c, effects=effects, given=tuple(objects), paths=())
        given = self.arguments, self.places, scalars, generators
        return SavedPlan(captured, *given, self._callbacks())


def entry_of(holder: object, key: object) -> object:
    """What a place holds; None where there is none."""
    if isinstance(holder, CellType):
        return holder.cell_contents
    try:
        return holder[key]
    except (LookupError, TypeError):
        return None
