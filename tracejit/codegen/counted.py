"""What is printed of a Triton kernel, counted: loads, stores and operations by dims of the tile."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import field, replace

from tracejit.codegen.language import Line
from tracejit.codegen.statements import all_statements
from tracejit.codegen.triton_body import Body, Dims
from tracejit.codegen.triton_text import Dim
from tracejit.ir.ops import OPS
from tracejit.records import dataclass
from tracejit.schedule.cpu.access import axes_of, extents_of, has_value, variables
from tracejit.schedule.kernel import (
    Axis,
    Compute,
    Kernel,
    Load,
    Mask,
    Reduce,
    Statement,
    Store,
    Var,
)
from tracejit.schedule.sizes import substitute
from tracejit.schedule.traffic import ENUMERATED, points_inside

PER_ONLINE = 6  # operations besides the exponential that take a value into a sum of such
_SCALAR_BYTES = 8  # of a runtime scalar in the table


@dataclass(frozen=True)
class Work:
    """What the programs of one kernel issue together.

    loaded, stored: bytes, those of runtime scalars and of a reduction's partials included.
    operations: of element-wise work and reductions; an addition is 1, others as their Op says.
    products: multiplications and additions of a contraction, 2 for each product of whole tiles.
    operands: the dtype of the contraction's operands, "" without one.
    steps:    how often the longest program waits for memory, one time after another: the trips of
        its loops, each as often as the place of a load depends on what was loaded.
    waiting:  bytes that a program waits for at a time, on average.
    ahead:    how many trips of a loop may be loaded at a time, if the hardware copies by itself.
    """

    form: str
    programs: int
    loaded: int = 0
    stored: int = 0
    operations: int = 0
    products: int = 0
    operands: str = ""
    steps: int = 0
    waiting: float = 0.0
    ahead: int = 1

    @property
    def issued(self) -> int:
        """Bytes loaded and stored."""
        return self.loaded + self.stored


@dataclass(frozen=True)
class Blocks:
    """A dim of a tile: its elements, in how many blocks they are walked, elements of a block."""

    elements: int
    count: int
    block: int


@dataclass
class Section:
    """What was printed while the tile had these dims; `block` is that of the last one."""

    dims: Mapping[str, Sequence[Axis]]
    block: str = ""
    loads: list[tuple[int, Dims, Mask]] = field(default_factory=list)  # bytes of an element, …
    stores: list[tuple[int, Dims]] = field(default_factory=list)
    operations: Counter[Dims] = field(default_factory=Counter)
    depth: int = 0  # how many loads wait one for another


class Count(Body):
    """Prints statements as a Body does, and keeps what was printed over which dims."""

    def __init__(self, kernel: Kernel, sizes: Mapping[str, int]):
        super().__init__(kernel)
        self._section = Section({})
        self.sections = [self._section]
        self._depths: dict[int, int] = {}  # of the loads that a value is made of
        plain = substitute(kernel, sizes)
        self.extents = extents_of(plain)
        here, there = map(_loads, (kernel, plain))
        self._masks = {id(s): t.mask for s, t in zip(here, there, strict=True)}

    @property
    def scalar_bytes(self) -> int:
        """Of the runtime scalars that the function reads."""
        return _SCALAR_BYTES * len(self.used_scalars)

    def enter(self, *dims: Dim) -> None:
        super().enter(*dims)
        self._begin()

    def leave(self, dim: Dim, mark: tuple | None = None) -> None:
        super().leave(dim, mark)
        self._begin()

    def _begin(self) -> None:
        dims = {name: dim.axes for name, dim in self.dims.items()}
        self._section = Section(dims, next((d.block for d in reversed(self.dims.values())), ""))
        if all(dim.counted for dim in self.dims.values()):
            self.sections.append(self._section)

    def lines_of(self, s: Statement) -> list[Line]:
        if not isinstance(s, Store):
            self._depths[s.out.id] = self._depth(s) + isinstance(s, Load)
        return super().lines_of(s)

    def given(self, out: Var) -> None:
        self._depths.pop(out.id, None)
        super().given(out)

    def _depth(self, s: Statement) -> int:
        return max((self._depths.get(v.id, 0) for v in variables(s)), default=0)

    def load_text(self, s: Load, zero_outside: bool = False) -> tuple[list[Line], str]:
        size = self.buffers[s.buffer].itemsize
        self._section.loads.append((size, self.load_dims(s), self._masks[id(s)]))
        self._section.depth = max(self._section.depth, self._depth(s) + 1)
        return super().load_text(s, zero_outside)

    def store(self, s: Store) -> list[Line]:
        size, dims = self.buffers[s.buffer].itemsize, frozenset(self.dims)
        self._section.stores.append((size, dims))
        if s.fold:
            self._section.loads.append((size, dims, ()))
            there = self._depth(replace(s, value=0))  # it waits for its place, not for the value
            self._section.depth = max(self._section.depth, there + 1)
        return super().store(s)

    def compute(self, s: Compute) -> list[Line]:
        lines = super().compute(s)
        if lines:  # else it has a name already
            self._section.operations[self.value_dims(s.out)] += s.op.cost
        return lines

    def reduced_value(self, reduce: Reduce, over: Dims) -> str:
        self._section.operations[frozenset(self.dims)] += 1
        return super().reduced_value(reduce, over)

    def online(self, most: str, total: str, value: str) -> str:
        self._section.operations[frozenset(self.dims)] += OPS["exp"].cost + PER_ONLINE
        return super().online(most, total, value)


def _loads(kernel: Kernel) -> list[Load]:
    return [s for s in all_statements(kernel) if isinstance(s, Load)]


@dataclass
class Total:
    """Bytes and operations of all programs, steps of one."""

    loaded: int = 0
    stored: int = 0
    operations: int = 0
    steps: int = 0

    def waiting(self, programs: int) -> float:
        """Bytes that a program waits for at a time."""
        return self.loaded / programs / max(1, self.steps)

    def work(self, form: str, programs: int, waiting: float) -> Work:
        """All of it, without a contraction's products."""
        return Work(
            form,
            programs,
            self.loaded,
            self.stored,
            self.operations,
            steps=self.steps,
            waiting=waiting,
        )

    def add(
        self, body: Count, section: Section, blocks: Mapping[str, Blocks], tiles: int, trips: int
    ) -> None:
        """Add a section of which so many tiles are computed, by so many trips of a program."""

        def elements(dims: Dims) -> int:
            """All that exist, over all tiles, of what varies over some dims."""
            others = tiles // math.prod(blocks[d].count for d in dims)
            return others * math.prod(blocks[d].elements for d in dims)

        for size, dims, mask in section.loads:
            self.loaded += size * inside(elements(dims), mask, body.extents)
        for size, dims in section.stores:
            self.stored += size * elements(dims)
        for dims, cost in section.operations.items():
            self.operations += cost * tiles * math.prod(blocks[d].block for d in dims)
        self.steps += trips * section.depth


def inside(points: int, mask: Mask, extents: Mapping[str, int]) -> int:
    """Those of some points where a mask holds; all, where values decide or there are too many."""
    bounds = tuple(b for b in mask if not has_value(b.index))
    axes = tuple(Axis(n, extents[n]) for n in sorted({n for b in bounds for n in axes_of(b.index)}))
    total = math.prod(a.extent for a in axes)
    if not bounds or not 0 < total <= ENUMERATED:
        return points
    return points * points_inside(bounds, axes) // total


def numel(axes: Sequence[Axis], sizes: Mapping[str, int]) -> int:
    return math.prod(sizes.get(a.extent, a.extent) for a in axes)
