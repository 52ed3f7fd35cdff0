"""A picture of a step as data: what the page, the static drawings and TensorBoard's graph show.

Nodes are in an order in which operands come first. Where a node stands is said by its lane, its
module and its user line; `grouping.py` makes trees of groups of that.
"""

from __future__ import annotations

import os

from tracejit.records import dataclass

FORWARD, BACKWARD, UPDATE = LANES = ("forward", "backward", "update")


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the user's. `file` is a path, and the text's name of the file where none is known;
    `function` its qualified name, "" where it is not known."""

    file: str
    number: int
    function: str = ""

    def __str__(self) -> str:
        return f"{os.path.basename(self.file)}:{self.number}"


@dataclass(frozen=True, slots=True)
class PictureNode:
    """An operation, or an input of the step.

    type:    of its result, as the IR prints it: `f32[64,100]`.
    shape:   of its result; `nbytes` what that takes in memory.
    lane:    one of LANES.
    module:  the way to the module that is called: ("model", "blocks", "0"), () for none.
    kind:    the class of that module, "" for none.
    kernels: those that compute it, by number; what is not computed (a view, a constant) has none.
    free:    whether it is a view or a constant, which kernels see through.
    leaves:  what becomes of its result: "returned", "writes model.0.weight".
    """

    name: str
    op: str
    type: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    lane: str
    module: tuple[str, ...] = ()
    kind: str = ""
    line: Line | None = None
    attrs: str = ""
    operands: tuple[int, ...] = ()
    kernels: tuple[int, ...] = ()
    free: bool = False
    leaves: tuple[str, ...] = ()

    @property
    def is_input(self) -> bool:
        return self.op == "input"


@dataclass(frozen=True, slots=True)
class PictureKernel:
    """A kernel that runs: its source, and figures about it as pairs of words."""

    name: str
    lines: tuple[str, ...]
    text: str
    language: str
    cost: tuple[tuple[str, str], ...]
    seconds: float | None = None  # as measured, else as predicted


@dataclass(frozen=True, slots=True)
class Picture:
    """A step. `summary`: what there is to say of it as a whole, as pairs of words."""

    name: str
    device: str
    home: Line | None  # where the step is defined
    summary: tuple[tuple[str, str], ...]
    nodes: tuple[PictureNode, ...]
    kernels: tuple[PictureKernel, ...]
    notes: tuple[str, ...] = ()
