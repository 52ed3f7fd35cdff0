"""The arguments of a replay as those of a loaded step: what a call is given, and where.

In: the signature of a replay, and a call like it. Out: `Argument`s, and which runtime scalars of
the replay they give.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType

import torch

from tracejit.capture.effects.fields import attributes_of, holder_of
from tracejit.capture.effects.variables import Holder, identity
from tracejit.capture.names import names_of_arguments
from tracejit.capture.signature import (
    Fielded,
    Keyed,
    Listed,
    Signature,
    Standing,
    TensorLike,
    Thing,
    leaves,
)
from tracejit.capture.trace.scalars import Path
from tracejit.run import Replay
from tracejit.saved.record import Argument, GivenNumber, GivenTensor, GivenValue
from tracejit.saved.saving import Saving


class TakenArguments:
    """The arguments of a loaded step. Raises CannotSave.

    arguments: in the order of the step's parameters.
    scalars:   the runtime scalars of the replay that they give.
    holders:   the ids of the containers and objects among them.
    """

    def __init__(
        self,
        saving: Saving,
        replay: Replay,
        call: Standing,
        reals: Sequence[torch.Tensor],
        holders: Sequence[object],
    ):
        self._saving, self._call, self._reals = saving, call, reals
        self._listed: set[TensorLike] = set()
        self._places: dict[tuple, int] = {}  # of runtime scalars; of fields by what holds them
        for k, path in enumerate(replay.captured.paths):
            if path[0] == "entry":
                path = "entry", *identity(holders[path[1]], path[2]), *path[3:]
            self._places[path] = k
        self.scalars: set[int] = set()
        self.holders: set[int] = set()
        self.arguments = self._found(saving.function, replay.signature)

    def _found(self, function: FunctionType, signature: Signature) -> tuple[Argument, ...]:
        """In the order of the step's parameters."""
        names = names_of_arguments(function, self._call.args, self._call.kwargs)
        code = function.__code__
        order = {name: k for k, name in enumerate(code.co_varnames[: code.co_argcount])}
        by_name = code.co_posonlyargcount
        listed: list[tuple[tuple, Argument]] = []
        trees: list[tuple[Path, str, object, object]] = []
        for i, tree in enumerate(signature.args):
            trees.append((("arg", i), names["arg", i], tree, self._call.args[i]))
        for key, tree in signature.kwargs.items():
            trees.append((("kwarg", key), key, tree, self._call.kwargs[key]))
        given = {name for _, name, _, _ in trees}  # what is left out ends those by place
        for path, name, tree, x in trees:
            if self._is_object(tree, name):
                continue
            positional = path[0] == "arg" or order.get(name, -1) >= by_name
            positional &= all(
                other in given for other, k in order.items() if k < order.get(name, 0)
            )
            where = order.get(name, len(order) + len(listed))
            argument = Argument(name, positional, self._tree(tree, path, x))
            listed.append(((not positional, where), argument))
        listed.sort(key=lambda pair: pair[0])
        return tuple(argument for _, argument in listed)

    def _is_object(self, tree: object, name: str) -> bool:
        """Whether an argument is an object of the user's, which a loaded step needs none of."""
        found = list(leaves(tree))
        things = [x for x in found if isinstance(x, Thing)]
        if things and len(things) < len(found):
            remedy = "Pass them as two arguments"
            raise self._saving.refuse(
                (f"its argument {name} has objects of yours beside other things", remedy)
            )
        return bool(things)

    def _tree(self, tree: object, path: tuple, x: object) -> object:
        """An argument as a tree of what is given in it. path: where the runtime scalar in its place
        would come from; x: what stands for it."""
        match tree:
            case TensorLike():
                tensor = self._call.tensors[tree]
                if tree in self._listed:
                    why = "one tensor is two arguments of it, which the plan takes for one"
                    raise self._saving.refuse((why, "Pass it once, or pass a clone"))
                self._listed.add(tree)
                index = next((k for k, real in enumerate(self._reals) if real is tensor), None)
                return GivenTensor(index)
            case Listed(kind, items):
                parts = zip(items, x, strict=True)
                if kind is tuple:
                    return Listed(
                        kind, tuple(self._tree(a, (*path, i), b) for i, (a, b) in enumerate(parts))
                    )
                return Listed(
                    kind, tuple(self._field(a, x, i, b) for i, (a, b) in enumerate(parts))
                )
            case Keyed(items):
                return Keyed(tuple((k, self._field(a, x, k, x[k])) for k, a in items))
            case Fielded(kind, items, True):
                parts = enumerate(zip(items, x, strict=True))
                fields = [(name, self._tree(a, (*path, i), b)) for i, ((name, a), b) in parts]
                return Fielded(kind.__name__, tuple(fields), True)
            case Fielded(kind, items, listed):
                have = attributes_of(x)
                fields = [
                    (name, self._field(a, holder_of(x, name), name, have[name]))
                    for name, a in items
                ]
                return Fielded(kind.__name__, tuple(fields), listed)
        if path in self._places:
            k = self._places[path]
            self.scalars.add(k)
            return GivenNumber(k, type(tree) is int)
        return GivenValue(tree)

    def _field(self, tree: object, holder: Holder, key: object, x: object) -> object:
        """What is given in a field of an argument."""
        place = identity(holder, key)
        self.holders.add(place[0])
        return self._tree(tree, ("entry", *place), x)
