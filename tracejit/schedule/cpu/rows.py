"""Values that several stages of a row kernel compute, kept in an array from one stage to the next.

In: a Kernel with outer axes and plain numbers as sizes. Each of its stages computes anew what it
needs. That is free on a GPU, where a row lies in registers; here a softmax would pay for each
exponential three times. Out: the same kernel with local buffers of one row. The first stage that
computes such a value stores it there, and later stages load it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

from tracejit.ir.types import f32
from tracejit.records import dataclass
from tracejit.schedule.cpu.access import places, variables
from tracejit.schedule.cpu.plan import CpuKernel
from tracejit.schedule.kernel import (
    Axis,
    Buffer,
    Compute,
    FloorDiv,
    InBounds,
    Index,
    Kernel,
    Load,
    Mod,
    Position,
    Reduce,
    Stage,
    Statement,
    Store,
    Var,
)

KEPT_BYTES = 64 << 10  # of local buffers: small beside the second cache, and on every stack
CANDIDATES = 16  # values that are tried, the dearest first

_STORE, _LOAD = 2, 1  # in units of Op.cost
_WORTH = 6  # the cost from which on a value is a candidate


def cache_rows(kernel: CpuKernel) -> CpuKernel:
    """Keep the dear values that several stages of a row kernel compute in local arrays of a row."""
    kernel = replace(kernel, columns=kernel.columns and cache_rows(kernel.columns))
    if kernel.rows or kernel.outer is None or kernel.outer.vector:
        return kernel
    changed, local = keep_rows(kernel.kernel)
    return replace(kernel, kernel=changed, rows=tuple(b.name for b in local))


def keep_rows(kernel: Kernel) -> tuple[Kernel, tuple[Buffer, ...]]:
    """The kernel with kept values as loads and stores, and the local buffers that hold them.

    The local buffers are among the kernel's, last. Kernels with more than one inner axis stay as
    they are.
    """
    inner = {stage.axes for stage in kernel.stages if stage.axes}
    in_order = any(stage.in_order for stage in kernel.stages)
    if len(inner) != 1 or len(kernel.stages) < 2 or not kernel.axes or in_order or kernel.sort:
        return kernel, ()
    (axes,) = inner
    if len(axes) != 1:
        return kernel, ()
    row = _Row(kernel, axes[0])
    chosen = row.choose()
    if not chosen:
        return kernel, ()
    return row.rewritten(chosen)


@dataclass(frozen=True)
class _Seen:
    """A value of a stage: its statement, what it is computed from, and its own cost."""

    statement: Statement
    operands: tuple[int, ...]  # numbers of values
    cost: int  # 0 where it is the same along the row


class _Row:
    """The values of all stages, numbered so that equal ones have the same number."""

    def __init__(self, kernel: Kernel, axis: Axis):
        self.kernel, self.axis = kernel, axis
        self.written: dict[str, int] = {}  # by buffer, the first stage that stores in it
        for position, stage in enumerate(kernel.stages):
            for s in stage.body:
                if isinstance(s, Store):
                    self.written.setdefault(s.buffer, position)
        self.numbers: dict[Hashable, int] = {}
        self.number_of: dict[int, int] = {}  # by variable; reduced values too
        self.varies: dict[int, bool] = {}
        self.stages: list[dict[int, _Seen]] = []
        self.first: dict[int, int] = {}  # the first stage that computes a value
        for position, stage in enumerate(kernel.stages):
            seen: dict[int, _Seen] = {}
            for s in stage.body:
                if isinstance(s, Store):
                    continue
                number = self._number(s, position)
                self.number_of[s.out.id] = number
                if isinstance(s, Reduce):
                    self.varies[number] = False
                    continue
                operands = tuple(dict.fromkeys(self.number_of[v.id] for v in variables(s)))
                self.varies[number] = self._walks(s) or any(self.varies[o] for o in operands)
                cost = s.op.cost if isinstance(s, Compute) else 1
                seen[number] = _Seen(s, operands, cost if self.varies[number] else 0)
                self.first.setdefault(number, position)
            self.stages.append(seen)

    def _number(self, s: Statement, position: int) -> int:
        """The number of a statement's value: the same for what is surely equal."""

        def same(v: object) -> object:
            return ("v", self.number_of[v.id]) if isinstance(v, Var) else (type(v), repr(v))

        key: Hashable
        if isinstance(s, Compute):
            key = s.op.name, s.out.dtype, s.attrs, tuple(map(same, s.args))
        elif isinstance(s, Load) and self._is_old(s.buffer, position) and not variables(s):
            key = "load", s.buffer, s.index, s.mask
        elif isinstance(s, Position | InBounds) and not variables(s):
            key = "at", s.out.dtype, getattr(s, "index", None), getattr(s, "mask", None)
        else:
            key = "own", position, s.out.id
        return self.numbers.setdefault(key, len(self.numbers))

    def _is_old(self, buffer: str, position: int) -> bool:
        """Whether nothing of this row has been stored in a buffer when a stage loads from it: in a
        stage, stores come last, and only this row's own elements are both loaded and stored."""
        return position <= self.written.get(buffer, position)

    def _walks(self, s: Statement) -> bool:
        """Whether a statement reads the row's axis itself."""
        return any(_uses(i, self.axis.name) for i in places(s))

    # --- the choice

    def choose(self) -> list[int]:
        """The values to keep, such that nothing is saved by one more."""
        chosen: list[int] = []
        candidates = self._candidates()
        cost = self._cost(chosen)
        while candidates and self._nbytes(chosen) < KEPT_BYTES:
            costs = {c: self._cost([*chosen, c]) for c in candidates}
            best = min(costs, key=costs.__getitem__)
            if costs[best] >= cost:
                break
            candidates.remove(best)
            if self._nbytes([*chosen, best]) <= KEPT_BYTES:
                chosen.append(best)
                cost = costs[best]
        return chosen

    def _candidates(self) -> list[int]:
        """Values that are dear and computed by more than one stage, the dearest first."""
        totals = {}
        for number, first in self.first.items():
            again = any(number in seen for seen in self.stages[first + 1 :])
            if again and self.varies[number] and not self._is_load(number):
                below = self._live(first, [number], [])
                totals[number] = sum(self.stages[first][n].cost for n in below)
        dear = sorted(totals, key=lambda n: -totals[n])
        return [n for n in dear if totals[n] >= _WORTH][:CANDIDATES]

    def _is_load(self, number: int) -> bool:
        return isinstance(self.stages[self.first[number]][number].statement, Load)

    def _nbytes(self, chosen: list[int]) -> int:
        sizes = (self._buffer(0, n).dtype.itemsize for n in chosen)
        return sum(sizes) * self.axis.extent

    def _cost(self, chosen: list[int]) -> int:
        """What a point of the row costs in all stages."""
        total = _STORE * len(chosen)
        for position, seen in enumerate(self.stages):
            for number in self._live(position, self._roots(position, chosen), chosen):
                total += _LOAD if self._is_kept(number, position, chosen) else seen[number].cost
        return total

    def _roots(self, position: int, chosen: list[int]) -> list[int]:
        """The values that a stage stores, reduces, or keeps for others."""
        found = [n for n in chosen if self.first[n] == position]
        for s in self.kernel.stages[position].body:
            if isinstance(s, Store | Reduce):
                found += [self.number_of[v.id] for v in variables(s)]
        return found

    def _live(self, position: int, roots: list[int], chosen: list[int]) -> dict[int, None]:
        """What a stage evaluates for its roots."""
        live: dict[int, None] = {}
        stack = list(roots)
        while stack:
            number = stack.pop()
            if number in live or number not in self.stages[position]:
                continue  # not there: a reduced value of an earlier stage
            live[number] = None
            if not self._is_kept(number, position, chosen):
                stack += self.stages[position][number].operands
        return live

    def _is_kept(self, number: int, position: int, chosen: list[int]) -> bool:
        return number in chosen and self.first[number] < position

    # --- the new kernel

    def _buffer(self, k: int, number: int) -> Buffer:
        dtype = self.stages[self.first[number]][number].statement.out.dtype
        return Buffer(f"row{k}", f32 if dtype.narrow else dtype, "rw")

    def rewritten(self, chosen: list[int]) -> tuple[Kernel, tuple[Buffer, ...]]:
        """The kernel that keeps these values."""
        local = {number: self._buffer(k, number) for k, number in enumerate(chosen)}
        here = Index(((self.axis.name, 1),))
        stages = []
        for position, stage in enumerate(self.kernel.stages):
            live = self._live(position, self._roots(position, chosen), chosen)
            body: list[Statement] = []
            for s in stage.body:
                number = None if isinstance(s, Store) else self.number_of[s.out.id]
                if isinstance(s, Store | Reduce):
                    body.append(s)
                elif number in live and self._is_kept(number, position, chosen):
                    body.append(Load(s.out, local[number].name, here, (), s.where))
                elif number in live:
                    body.append(s)
            for number, buffer in local.items():
                if self.first[number] == position:
                    value = self.stages[position][number].statement
                    body.append(Store(buffer.name, here, value.out, value.where))
            stages.append(Stage(stage.axes, tuple(body)))
        buffers = tuple(local.values())
        kernel = replace(
            self.kernel, stages=tuple(stages), buffers=(*self.kernel.buffers, *buffers)
        )
        return kernel, buffers


def _uses(index: Index, axis: str) -> bool:
    return any(
        atom == axis or (isinstance(atom, FloorDiv | Mod) and _uses(atom.index, axis))
        for atom, _ in index.terms
    )
