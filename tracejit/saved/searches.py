"""What a step finds by value, the elements of a mask or the distinct ones, as a file has it.

    Search  ↔  JSON: a class that is known by its name, and its numbers

A search is torch's; how much it finds is part of a plan. `Found` is one in a loaded step: whatever
it finds, the plan gets what its graph takes, or none.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from tracejit.capture.effects.captured import Captured
from tracejit.capture.functions.distinct import Counted, Distinct, Repeats
from tracejit.capture.functions.packed import BatchSizes
from tracejit.capture.trace.cuts import Elements, Search
from tracejit.errors import CallError
from tracejit.ir.torch_types import TO_TORCH
from tracejit.ir.types import Type
from tracejit.records import dataclass
from tracejit.saved.fields import Item

_UNIQUE = {
    "unique": ("sorted", "return_inverse", "return_counts"),
    "unique_consecutive": ("return_inverse", "return_counts"),
}


def search_json(search: Search) -> list | None:
    """A search for the manifest; None for one that a file cannot keep."""
    match search:
        case Elements():
            return ["elements"]
        case Distinct(name, options, dim) if name in _UNIQUE:
            return ["distinct", name, {k: bool(x) for k, x in options}, dim]
        case Repeats(total):
            return ["repeats", total]
        case Counted(minlength):
            return ["counted", minlength]
        case BatchSizes(steps, where, function):
            return ["batch sizes", steps, where, function]
    return None


def read_search(item: Item) -> Search:
    """A search of a manifest. Raises Damaged."""
    kind, *rows = item.rows() or [item]
    match kind.value, rows:
        case "elements", []:
            return Elements()
        case "distinct", [name, options, dim]:
            allowed = _UNIQUE[name.text(*_UNIQUE)]
            given = options.items()
            if not given.keys() <= {*allowed}:
                raise options.wrong(f"a table of {', '.join(allowed)}")
            flags = tuple((key, x.flag()) for key, x in given.items())
            axis = None if dim.value is None else dim.whole(64)
            return Distinct(name.value, flags, axis)
        case "repeats", [total]:
            return Repeats(None if total.value is None else total.whole())
        case "counted", [minlength]:
            return Counted(minlength.whole())
        case "batch sizes", [steps, where, function]:
            return BatchSizes(steps.whole(), where.text(), function.text())
    raise item.wrong("a search")


@dataclass(frozen=True, slots=True)
class Found:
    """A search, and what the graph of a plan takes of what it finds; `step` is called so."""

    search: Search
    count: int  # the length of the first
    types: tuple[Type | None, ...]  # None where the graph reads none
    step: str

    def __call__(self, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors; a first one of another length is for another plan. Raises CallError."""
        found = self.search(value)
        right = len(found) == len(self.types)
        if right and len(found[0]) != self.count:
            return found
        for x, wanted in zip(found, self.types, strict=False):
            if wanted is not None:
                kind = TO_TORCH[wanted.dtype], wanted.shape, wanted.device
                right &= kind == (x.dtype, tuple(x.shape), str(x.device))
        if not right:
            raise CallError(step=self.step, reason="what it finds is not what its graph takes")
        return tuple([x.contiguous() for x in found])


def with_checks(captured: Captured, step: str) -> Captured:
    """The step with searches that look at what they find."""
    if all(cut.search is None for cut in captured.cuts):
        return captured
    types: dict[int, Type] = {}
    for of in (captured, *captured.cuts):
        for (kind, k), param in zip(of.sources, of.graph.params, strict=True):
            if kind == "found":
                types[k] = param.value.type
    cuts, at = [], 0
    for cut in captured.cuts:
        if cut.search is not None:
            wanted = tuple(types.get(at + i) for i in range(cut.found))
            cut, at = (
                replace(cut, search=Found(cut.search, cut.count, wanted, step)),
                at + cut.found,
            )
        cuts.append(cut)
    return replace(captured, cuts=tuple(cuts))
