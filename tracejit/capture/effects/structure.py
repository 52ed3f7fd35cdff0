"""The structure of what a step returns or stores, as a Tree of positions."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable

import torch

from tracejit.capture.effects.effects import (
    Given,
    HostSlot,
    Joined,
    Mapped,
    Sequenced,
    Slot,
    Store,
    Tree,
    is_attributes,
    is_named,
)
from tracejit.capture.python.kept import RETURNED, Joint, Kept
from tracejit.capture.python.references import IN_ITEM, IN_LOOP, IN_STORE, IN_VARIABLE, count
from tracejit.capture.trace.scalars import TracedFloat, TracedInt, TracedText, is_traced, plain

_OWNERS = (torch.nn.Module, torch.optim.Optimizer)  # what they have is theirs


class Structure:
    """Tells the structure of what a step returns or stores; tensors and numbers are a subclass's.

    given: the objects of the call in it, by their position. texts: those of runtime scalars that
    are to be found in what is returned.
    """

    def __init__(self, texts: Iterable[Kept] = ()) -> None:
        self.given: list[object] = []
        self._texts = [kept for kept in texts if kept.target == RETURNED]
        self._in_stores = False  # which come after what is returned
        self._times: Counter[int] = Counter()  # how often each was found

    def tensor(self, tensor: torch.Tensor) -> int:
        """The position of a tensor among those that are made."""
        raise NotImplementedError

    def host_result(self, number: float | TracedText) -> int:
        """The position of a number, or of a text, among the host results."""
        raise NotImplementedError

    def is_mine(self, number: TracedFloat | TracedInt) -> bool:
        """Whether a runtime scalar belongs to this trace."""
        raise NotImplementedError

    def object(self, x: object) -> Given:
        """Anything else."""
        self.given.append(x)
        return Given(len(self.given) - 1)

    def returned(self, box: list[object]) -> Tree:
        """The structure of the one item of `box`, which is emptied. A list or dict that nobody else
        holds then belongs to the call: each call makes a new one."""
        x = box.pop()
        return self.tree(x, IN_VARIABLE)

    def tree(self, x: object, holders: int) -> Tree:
        """The structure of x. A list or dict that somebody else holds too, besides `holders`, is
        returned itself."""
        if type(x) in (list, dict) and count(x) > holders:
            return self.object(x)
        if isinstance(x, torch.Tensor):
            return Slot(self.tensor(x))
        if is_traced(x):  # or kept from an earlier call
            return HostSlot(self.host_result(x)) if self.is_mine(x) else self.object(plain(x))
        if type(x) is str and self._texts and not self._in_stores:
            x = self._joint(x)
        if type(x) is Joint:
            parts = (p if type(p) is str else HostSlot(self.host_result(p)) for p in x)
            return Joined(tuple(parts))
        if type(x) in (tuple, list):
            items = tuple([self.tree(item, IN_LOOP) for item in x])
            return Sequenced(type(x).__name__, items)
        if isinstance(x, tuple) and is_named(type(x)):
            kind = self.object(type(x))
            return Sequenced(kind, tuple([self.tree(item, IN_LOOP) for item in x]))
        if type(x) is dict:
            pairs = [(self._key_of_dict(k), self.tree(x[k], IN_ITEM)) for k in x]
            return Mapped(tuple(pairs))
        if is_attributes(type(x)) and not isinstance(x, _OWNERS):
            mine = count(x) <= holders and not weakref.getweakrefcount(x)
            if mine and all(type(name) is str for name in vars(x)):
                kind, now = self.object(type(x)), vars(x)
                fields = tuple([(name, self.tree(now[name], IN_ITEM)) for name in now])
                return Sequenced(kind, (Mapped(fields),))
        return self.object(x)

    def _joint(self, x: str) -> str | Joint:
        """A text of runtime scalars, if it can be only one of those that are looked for."""
        found = {i: joint for i, kept in enumerate(self._texts) if (joint := kept.joint(x))}
        if len(found) != 1:
            return x
        ((i, joint),) = found.items()
        self._times[i] += 1
        return joint

    @property
    def lost(self) -> list[Kept]:
        """The texts that were not found, or in more than one place."""
        return [kept for i, kept in enumerate(self._texts) if self._times[i] != 1]

    def store(self, holder: int, key: object, x: object) -> Store:
        """What is stored in a holder of the call. The caller holds it in a container."""
        self._in_stores = True
        if isinstance(key, torch.Tensor):
            key = Slot(self.tensor(key))
        elif type(key) is Joint:
            key = self.tree(key, IN_STORE)
        return holder, key, self.tree(x, IN_STORE)

    def _key_of_dict(self, key: object) -> str | int | Given | Joined:
        if type(key) is str and self._texts and not self._in_stores:
            key = self._joint(key)
        return self.tree(key, IN_LOOP) if type(key) is Joint else self._key(key)

    def operands(self, numbers: dict[int | str, object]) -> tuple[tuple[int | str, int], ...]:
        """Which host results are arguments of a call, by position or name."""
        return tuple((at, self.host_result(x)) for at, x in numbers.items())

    def _key(self, key: object) -> str | int | Given:
        return key if type(key) in (str, int) else self.object(key)
