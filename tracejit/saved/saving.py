"""What several plans of a step share while it is saved: tensors, numbers and generators by name."""

from __future__ import annotations

from dataclasses import field
from types import FunctionType

import torch

from tracejit.errors import CannotSave
from tracejit.ir.torch_types import TO_IR
from tracejit.records import dataclass
from tracejit.saved.schedules import Taken
from tracejit.saved.tensors import can_lie


@dataclass
class Saving:
    """What several plans of one step share, as it is found.

    function, where: the step's, and its line.
    """

    name: str
    function: FunctionType
    numbers: dict[str, int | float] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    generators: list[torch.Generator] = field(default_factory=list)
    schedules: Taken | None = None
    asked: dict[str, str] = field(default_factory=dict)  # numbers that each call is given
    lists: dict[int, tuple[str, list]] = field(default_factory=dict)  # by id, appended to
    looked_at: set[int] = field(default_factory=set)  # ids of what numbers are entries of
    _names: dict[int, str] = field(default_factory=dict)  # by the id of a tensor
    _memories: dict[int, str] = field(default_factory=dict)  # by that of a storage
    _places: dict[tuple, str] = field(default_factory=dict)  # the names of places of numbers

    @property
    def where(self) -> str:
        code = self.function.__code__
        return f"{code.co_filename}:{code.co_firstlineno}"

    def refuse(self, why: tuple[str, str], **fields: object) -> CannotSave:
        """The error that something cannot be kept; its line is the step's, unless it has one."""
        reason = why[0].format(**fields) if fields else why[0]
        return CannotSave(step=f"{self.name} ({self.where})", reason=reason, remedy=why[1])

    def tensor(self, tensor: torch.Tensor, name: str | None) -> str:
        """The name of a tensor of the state."""
        known = self._names.get(id(tensor))
        if known is None:
            problem = _problem(tensor)
            if problem:
                shown = name or f"a tensor of shape {list(tensor.shape)}"
                raise self.refuse((f"{shown} {problem}", "Make it an argument of the step"))
            known = _unique(name or f"state_{len(self.tensors)}", self.tensors)
            self._not_shared(tensor, known)
            self._names[id(tensor)], self.tensors[known] = known, tensor
        return known

    def _not_shared(self, tensor: torch.Tensor, name: str) -> None:
        other = self._memories.setdefault(tensor.untyped_storage()._cdata, name)
        if other is not name and tensor.numel():
            why = f"{name} and {other} share memory, which two tensors of a file cannot"
            raise self.refuse((why, "Make the view inside the step, or clone one"))

    def number(self, place: tuple, name: str | None, now: int | float) -> str:
        """The name of a place that holds a number."""
        known = self._places.get(place)
        if known is None:
            known = _unique(name or f"number_{len(self.numbers)}", self.numbers)
            self._places[place], self.numbers[known] = known, now
        return known

    def list(self, items: list, name: str | None) -> int:
        """The position of a list that is appended to."""
        if id(items) not in self.lists:
            taken = {known: None for known, _ in self.lists.values()}
            self.lists[id(items)] = _unique(name or f"list_{len(taken)}", taken), items
        return [*self.lists].index(id(items))

    def generator(self, generator: torch.Generator) -> int:
        """The position of a generator."""
        for i, known in enumerate(self.generators):
            if known is generator:
                return i
        self.generators.append(generator)
        return len(self.generators) - 1


def _unique(name: str, taken: dict) -> str:
    while name in taken:
        name += "_"
    return name


def _problem(tensor: torch.Tensor) -> str:
    """What keeps a tensor from being state, if anything does."""
    if tensor.dtype not in TO_IR:
        return f"is of dtype {tensor.dtype}"
    if tensor.grad_fn is not None:
        return "was computed outside the step, with history"
    if not can_lie(tensor.shape, tensor.stride()):
        return f"has strides {tensor.stride()}, with overlaps or large gaps"
    return ""
