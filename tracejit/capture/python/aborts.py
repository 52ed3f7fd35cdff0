"""What an aborted trace leaves in the user's objects: nothing.

`remember` copies, before a trace, the containers, attributes and closures that a step can reach;
`scrub`, after a trace that failed, takes the intermediates out again: where one was put in the
place of something, that is put back. All else that the step's Python did stays, as in eager.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from types import CellType, FunctionType, MethodType, ModuleType

import torch

from tracejit.capture.python.bytecode import contents
from tracejit.capture.python.classes import module_of

_WIDE = 1000  # what has more items holds data
_NESTED = 6  # containers in each other around an intermediate


class Memory:
    """Shallow copies of lists, dicts and cells, by identity."""

    def __init__(self) -> None:
        self._copies: dict[int, tuple[object, object]] = {}

    def add(self, x: list | dict) -> None:
        """Copy one, if it is not too wide."""
        if isinstance(x, (list, dict)) and len(x) <= _WIDE:
            self._copies[id(x)] = x, x.copy()

    def add_cells(self, cells: Iterable[CellType]) -> None:
        """Copy the variables of a closure."""
        for cell in cells:
            self._copies[id(cell)] = cell, contents(cell)

    def add_module(self, module: torch.nn.Module) -> None:
        """Copy the attributes and buffers of a module and all below it."""
        pending, seen = [module], set()
        while pending:
            module = pending.pop()
            if module is None or module in seen:
                continue
            seen.add(module)
            self.add(module.__dict__)
            self.add(module._buffers)
            pending += module._modules.values()

    def knows(self, x: object) -> bool:
        """Whether there is a copy of x."""
        return id(x) in self._copies

    def of(self, x: object) -> object:
        """The copy of x."""
        return self._copies[id(x)][1]


def remember(objects: Iterable[object]) -> Memory:
    """The containers among some objects, and their attributes, as they are now."""
    memory = Memory()
    for x in objects:
        if isinstance(x, (list, dict)):
            memory.add(x)
        elif isinstance(x, FunctionType):
            memory.add_cells(x.__closure__ or ())
        elif isinstance(x, torch.nn.Module):
            memory.add_module(x)
        elif type(x).__dictoffset__ and not isinstance(x, (type, ModuleType, MethodType)):
            memory.add(x.__dict__)
    return memory


def scrub(proxies: list[torch.Tensor], memory: Memory) -> None:
    """Take intermediates of a trace out of every list, dict, attribute and closure, and with them
    what was made around them and is held in a place that `memory` knows."""
    dead = {id(p) for p in proxies}
    around: set[int] = set()  # containers that hold them and are perhaps of this trace
    pending: list[object] = list(proxies)
    keep: list[object] = []  # ids stay unique as long as the objects live
    for _ in range(_NESTED):
        if not pending:
            break
        asked, pending = pending, []
        mine = {id(proxies), id(keep), id(asked)}
        holders = gc.get_referrers(*asked)  # a walk over the whole heap
        for x in holders:
            if id(x) in mine or module_of(type(x)).startswith("tracejit"):
                continue
            if isinstance(x, CellType):
                if memory.knows(x):  # others are of frames that are still running
                    x.cell_contents = memory.of(x)
                continue
            if isinstance(x, list):
                _scrub_list(x, dead, around, memory)
            elif isinstance(x, dict):
                _scrub_dict(x, dead, around, memory)
            elif type(x) is tuple:
                dead.add(id(x))  # it cannot be changed: its holders are to let it go
            elif type(x).__dictoffset__ and not isinstance(x, (torch.Tensor, FunctionType)):
                x = x.__dict__ if memory.knows(x.__dict__) else x
                _scrub_dict(x if isinstance(x, dict) else x.__dict__, dead, around, memory)
            else:
                continue
            if not memory.knows(x) and id(x) not in around:
                around.add(id(x))
                pending.append(x)
                keep.append(x)
        del holders


def _scrub_list(x: list, dead: set[int], around: set[int], memory: Memory) -> None:
    """What was put in an item's place makes room for it again; what was appended goes."""
    known = memory.knows(x)
    old = memory.of(x) if known else []
    mine = {id(item) for item in old}
    gone = [_goes(item, dead, around, known and id(item) not in mine) for item in x]
    if any(gone):
        x[:] = [
            old[i] if gone[i] else item for i, item in enumerate(x) if i < len(old) or not gone[i]
        ]


def _scrub_dict(x: dict, dead: set[int], around: set[int], memory: Memory) -> None:
    known = memory.knows(x)
    old = memory.of(x) if known else {}
    for key, item in [*x.items()]:
        if _goes(item, dead, around, known and old.get(key) is not item):
            if key in old:
                x[key] = old[key]
            else:
                del x[key]


def _goes(item: object, dead: set[int], around: set[int], new: bool) -> bool:
    return id(item) in dead or (new and id(item) in around)
