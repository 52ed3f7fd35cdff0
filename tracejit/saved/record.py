"""What a file keeps of a step, as data: where everything that its plans read comes from.

A `SavedStep` is a few `SavedPlan`s, and what they share: tensors and numbers by name. A plan is a
captured step as it is traced, without paths into the user's objects: its tensors and runtime
scalars come from the arguments of a call, or from the state by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field

import torch

from tracejit.capture.effects.captured import Captured
from tracejit.ir.types import DType, contiguous_strides
from tracejit.records import dataclass
from tracejit.saved.schedules import SavedCallback, SavedSchedules

VERSION = (1, 3)
# what a loaded step's call has as holders: by name, what stores go to; then each of its lists
NUMBERS, TENSORS, LISTS = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Spec:
    """What a tensor has to be like."""

    dtype: DType
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: str
    requires_grad: bool

    def __str__(self) -> str:
        text = f"{self.dtype.name}[{','.join(map(str, self.shape))}]"
        if self.strides != contiguous_strides(self.shape):
            text += f" strides {self.strides}"
        if self.device != "cpu":
            text += f" on {self.device}"
        return text + " that requires grad" * self.requires_grad


@dataclass(frozen=True, slots=True)
class Place:
    """Where an outside tensor or a runtime scalar of a plan comes from.

    A tensor: ("argument", name), for messages; ("state", name); ("grad", k): the .grad of the k-th.
    A number: ("argument", name); ("number", name); ("item", k): the element of the k-th tensor;
    ("cut", k): the plan computes it; ("constant", x); ("after", (n, name)): a number as the n-th
    call of a scheduler leaves it.
    """

    kind: str
    key: str | int | float | tuple[int, str]


@dataclass(frozen=True, slots=True)
class GivenTensor:
    """In an argument: the `index`-th outside tensor, or one that the step does not read (None)."""

    index: int | None


@dataclass(frozen=True, slots=True)
class GivenNumber:
    """In an argument: the `index`-th runtime scalar."""

    index: int
    whole: bool  # an int


@dataclass(frozen=True, slots=True)
class GivenValue:
    """In an argument: a plain value, which the plan is for."""

    value: bool | int | float | str | None


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument of a call: a tree of the above, in `Listed`, `Keyed` and `Fielded`.

    positional: whether it may be given by its place; else only by name.
    """

    name: str
    positional: bool
    tree: object


@dataclass(frozen=True, slots=True)
class SavedPlan:
    """One plan. `captured` has no paths; its numbers are those of `scalars`."""

    captured: Captured
    arguments: tuple[Argument, ...]
    tensors: tuple[tuple[Place, Spec], ...]
    scalars: tuple[Place, ...]
    generators: tuple[int, ...]  # of the step's
    callbacks: tuple[SavedCallback, ...] = ()  # the calls of schedulers


@dataclass(frozen=True, slots=True)
class SavedGenerator:
    """A random generator: the default one of a device, where there is no state."""

    device: str
    state: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class SavedStep:
    """A step as a file has it.

    texts: what is in the file for people: plans and kernels, as they were when it was saved.
    lists: what its lists are called that it appends to.
    asked: the numbers that a call has to be given, and the class of the schedule that is a function
        of whoever saved it.
    """

    name: str
    options: Mapping[str, str | bool]
    numbers: Mapping[str, int | float]
    tensors: Mapping[str, torch.Tensor]
    gradients: Mapping[str, str]  # by name of a tensor, that of its .grad among the tensors
    generators: tuple[SavedGenerator, ...]
    plans: tuple[SavedPlan, ...]
    texts: Mapping[str, str]
    schedules: SavedSchedules = SavedSchedules()
    lists: tuple[str, ...] = ()
    asked: Mapping[str, str] = field(default_factory=dict)
