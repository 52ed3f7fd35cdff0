"""What the user's code sees of a call while it is traced: an Array for each tensor.

In: tensors, alone or in tuples, lists and dicts. Out: the same with Arrays in their place, in new
containers where there are such inside.
"""

from __future__ import annotations

from collections.abc import Collection
from types import CellType

import torch

from tracejit.capture.python.bytecode import contents
from tracejit.numpy_front.array import Array
from tracejit.numpy_front.core import Root, refuse
from tracejit.numpy_front.structure import READ_ONLY, SCALAR, Given


class Seen:
    """What the user's code sees of the tensors of a call: an Array for each."""

    def __init__(self, given: Given, holders: Collection[int]):
        self._given = given
        self._holders = holders  # the ids of containers in which Arrays stand themselves
        self._arrays: dict[int, Array] = {}
        self.containers: list[tuple[object, object]] = []  # and copies of them
        self._copies: dict[int, object] = {}  # by the identity of a list or dict of tensors

    def of(self, x: object) -> object:
        """The same with Arrays in place of tensors."""
        kind = type(x)
        if kind is torch.Tensor:
            found = self._arrays.get(id(x))
            if found is None:
                found = self._arrays[id(x)] = self._array(x)
            return found
        if id(x) in self._holders:
            return x
        if id(x) in self._copies:
            return self._copies[id(x)]
        if kind in (tuple, list, dict) and x:
            items = [*x.values()] if kind is dict else x
            found = [self.of(item) for item in items]
            if any(a is not b for a, b in zip(found, items, strict=True)):
                made = dict(zip(x, found, strict=True)) if kind is dict else kind(found)
                if kind is not tuple:
                    self.containers.append((made, made.copy()))
                    self._copies[id(x)] = made
                return made
        return x

    def _array(self, x: torch.Tensor) -> Array:
        given, kind = self._given.arrays.get(id(x), (None, ""))
        if given is None:
            raise refuse("a tensor of torch's", "pass numpy arrays alone")
        if kind is SCALAR:
            return Array(x, scalar=True)
        return Array(x, Root(READ_ONLY if kind is READ_ONLY else "", outside=True))


def same_or_new(seen: Seen, cell: CellType) -> CellType:
    """A closure variable, or another one where the code sees something else in it."""
    value = contents(cell)
    found = seen.of(value)
    return cell if found is value else CellType(found)
