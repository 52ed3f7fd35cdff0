"""Where the outside tensors of a replay lie, and the numbers that are the one element of some.

In: the tensors of the trace. Out: guard lines that ask whether the inputs are aligned as before and
overlap only as before, and that read the numbers of CPU tensors where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch

from tracejit.capture.effects.effects import Call
from tracejit.capture.proof.heap import Walk
from tracejit.capture.proof.many import guard_place
from tracejit.capture.python.counters import Elements
from tracejit.capture.python.memory import MANY
from tracejit.capture.trace.scalars import Path
from tracejit.capture.trace.tensor import extent
from tracejit.ir import host_memory


def guard_places(w: Walk, call: Call, places: Places) -> None:
    """The inputs lie in memory as they did: aligned as before, and overlapping only as before."""
    at = [w.tensors[id(t)] for t in call.reals]
    if places.shared:
        names = ", ".join(f"{x}.untyped_storage()._cdata" for x in at)
        w.names["pattern_of"] = _pattern
        pattern = _pattern(places.storages)
        guard_place(w, f"pattern_of(({names},)) == {pattern}", "inputs share memory otherwise")
    asked = w.wanted is None or not w.wanted.isdisjoint(("storage_offset", "as_strided"))
    if places.shared or asked:
        offsets = ", ".join(f"{x}.storage_offset()" for x in at)
        expected = [t.storage_offset() for t in call.reals]
        why = "an input starts elsewhere in its memory"
        guard_place(w, f"[{offsets}] == {expected}", why)
    w.names["places"] = places
    w.lines += [
        "if addresses is places.good: pass",
        "elif addresses == places.good: addresses = places.good",  # the same list: see launches.py
        "elif why := places.against(addresses): return why",
    ]


def read_elements(w: Walk, paths: Sequence[Path], call: Call, places: Places) -> dict[Path, str]:
    """Expressions of the numbers that are elements of tensors; one of many in a row, whose others
    have none of their own."""

    def kind(path: Path) -> type | None:
        return places.kind(path[1]) if path[0] == "item" else None

    found: dict[Path, str] = {}
    for of, row in groupby(paths, kind):
        row = [path for path in row if path[0] == "item"]
        if len({*row}) == len(row) >= MANY and Elements.known(of):
            found |= dict.fromkeys(row, "")
            found[row[0]] = f"*elements[{places.many([path[1] for path in row])}].read()"
            continue
        for path in row:
            cell = places.cell(path[1])
            at = w.tensors[id(call.reals[path[1]])]
            found[path] = f"item({at})" if cell is None else f"cells[{cell}].value"
    w.names["item"] = host_memory.read
    for name in ("cells", "elements"):
        if any(f"{name}[" in x for x in found.values()):
            w.lines.append(f"{name} = places.{name}")
    return found


class Places:
    """Where the outside tensors lie: aligned as when traced and apart from each other; and the
    cells, which read and write the one element of some of them, and elements, of many."""

    def __init__(self, reals: Sequence[torch.Tensor]):
        self.storages = [t.untyped_storage()._cdata for t in reals]
        self.shared = len({*self.storages}) < len(reals)  # which is checked apart
        self.groups = _pattern(self.storages)  # of inputs that may overlap
        self.sizes = [  # a meta tensor lies nowhere
            0 if t.is_meta else extent(t.shape, t.stride()) * t.element_size() for t in reals
        ]
        self._sizes = np.array(self.sizes, np.int64)
        self.aligned = [t.data_ptr() % 16 == 0 for t in reals]
        self.good: list[int] | None = None  # the latest addresses that were found to be right
        self.elements: list[Elements] = []  # at these addresses
        self._cells: list | None = None
        self._types = [host_memory.cell_type(t) for t in reals]
        self._with_cells: list[int] = []
        self._many: list[list[int]] = []

    def kind(self, index: int) -> type | None:
        """The type of the `index`-th tensor's cell, if it can have one: it tells its dtype."""
        return self._types[index]

    def cell(self, index: int) -> int | None:
        """The position in `cells` of the `index`-th tensor's; None if it cannot have one."""
        if self._types[index] is None:
            return None
        if index not in self._with_cells:
            self._with_cells.append(index)
            self.good = None
        return self._with_cells.index(index)

    @property
    def cells(self) -> list:
        """The cells, at the good addresses."""
        if self._cells is None:
            self._cells = [self._types[i].from_address(self.good[i]) for i in self._with_cells]
        return self._cells

    def many(self, indices: Sequence[int]) -> int | None:
        """The position in `elements` of those of these tensors; None if they cannot have them."""
        kinds = {self._types[i] for i in indices}
        if len(kinds) > 1 or not Elements.known(kinds.pop()):
            return None
        if indices not in self._many:
            self._many.append([*indices])
            self.good = None
        return self._many.index([*indices])

    def against(self, addresses: list[int]) -> str:
        """Why a replay is wrong for inputs at these addresses; empty if it is right."""
        at = np.array(addresses, np.int64) if len(addresses) >= MANY else None
        aligned = [a % 16 == 0 for a in addresses] if at is None else (at % 16 == 0).tolist()
        if aligned != self.aligned:
            return "the alignment of an input changed"
        if at is None or not self._apart(at):
            end = owner = -1
            for start, size, group in sorted(zip(addresses, self.sizes, self.groups, strict=True)):
                if size and start < end and group != owner:
                    return "two inputs share memory now"
                if start + size > end:
                    end, owner = start + size, group
        self._cells = None
        self.elements = [
            Elements(np.array([addresses[i] for i in row]), self._types[row[0]])
            for row in self._many
        ]
        self.good = addresses
        return ""

    def _apart(self, starts: np.ndarray) -> bool:
        """Whether no two inputs share memory, of one group or not."""
        order = np.argsort(starts)
        ends = starts + self._sizes
        return bool((ends[order[:-1]] <= starts[order[1:]]).all())


def _pattern(storages: Sequence[int]) -> tuple[int, ...]:
    first: dict[int, int] = {}
    return tuple(first.setdefault(s, len(first)) for s in storages)
