"""Kernels that do the same to other memory, as one launch: an update of hundreds of parameters.

In: lowered kernels in an order in which they may run, and who must run before whom. Out: the same,
where those that are alike are one `Foreach`. Its kernel has a *row* for each of them: where that
one's buffers lie, its number of elements, and its scalars. Alike are element-wise kernels and full
reductions over one axis whose texts differ in nothing but names of variables.

What all rows share (the coefficient of a clipped norm, a learning rate) stands once, before the
rows: `Columns` says where. A GPU deals the elements of all rows to programs in equal *chunks*, and
finds addresses in a table. Who runs kernels one by one takes the launch apart as any other.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from tracejit.errors import InvalidGraph
from tracejit.records import dataclass
from tracejit.schedule.kernel import (
    Axis,
    Buffer,
    Compute,
    Index,
    Kernel,
    Load,
    Part,
    Reduce,
    Store,
)
from tracejit.schedule.kernel_text import canonical
from tracejit.schedule.loops import Loop
from tracejit.schedule.lower import Lowered
from tracejit.schedule.sizes import parametrize

MIN_ROWS = 8  # fewer are a launch side by side, whose kernels know their sizes
ROUNDS = 8  # in which launches are put where all of their kernels may run


@dataclass(frozen=True, slots=True)
class Foreach:
    """Lowered kernels that are alike: `rows[0].kernel` is that of all, up to the axis's extent."""

    rows: tuple[Lowered, ...]

    @property
    def buffers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for row in self.rows for name in row.buffers))

    @property
    def scalars(self) -> tuple:
        shared, varying = _split([[v.id for v in row.scalars] for row in self.rows])
        first = self.rows[0].scalars
        return (*(first[j] for j in shared), *(r.scalars[j] for r in self.rows for j in varying))


@dataclass(frozen=True)
class Columns:
    """Where the operands of a row stand: `buffers` and `scalars` have, for each of the row's
    kernel, its place among the shared ones, or (None, its place in the row). Rows come behind the
    shared ones."""

    kernel: Kernel
    buffers: tuple[int | tuple[None, int], ...]
    scalars: tuple[int | tuple[None, int], ...]
    rows: int
    flat: tuple[bool, ...]  # which buffers have an element for each point of the axis; others one

    @property
    def words(self) -> int:
        """Addresses of all rows."""
        return self._shared(self.buffers) + self.rows * self._varying(self.buffers)

    def place(self, columns: Sequence[int | tuple[None, int]], j: int, row: object) -> object:
        """Where operand j of a row stands: a number, or an expression where `row` is a name."""
        at = columns[j]
        if isinstance(at, int):
            return at
        first, step = self._shared(columns) + at[1], self._varying(columns)
        if isinstance(row, int):
            return first + row * step
        moved = row if step == 1 else f"{row} * {step}"
        return f"{moved} + {first}" if first else moved

    @staticmethod
    def _shared(columns: Sequence[int | tuple[None, int]]) -> int:
        return sum(isinstance(at, int) for at in columns)

    @staticmethod
    def _varying(columns: Sequence[int | tuple[None, int]]) -> int:
        return sum(not isinstance(at, int) for at in columns)

    @property
    def text(self) -> str:
        """What code depends on: not on how many rows there are, nor on the user's lines."""
        return f"{self.buffers} {self.scalars}\n{canonical(self.kernel)}"


@dataclass(frozen=True, eq=False)
class Same:
    """A kernel as the key of a cache, by identity: to hash one of hundreds of parts takes 20 ms."""

    kernel: Kernel

    def __hash__(self) -> int:
        return id(self.kernel)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.kernel is self.kernel


def columns_of(kernel: Kernel) -> Columns:
    """The columns of a foreach."""
    return _columns(Same(kernel))


@lru_cache(maxsize=256)
def _columns(same: Same) -> Columns:
    kernel = same.kernel
    places = []
    for lists in ([p.buffers for p in kernel.parts], [p.scalars for p in kernel.parts]):
        shared, varying = _split(lists)
        at = {j: i for i, j in enumerate(shared)} | {j: (None, i) for i, j in enumerate(varying)}
        places.append(tuple(at[j] for j in range(len(at))))
    inner = kernel.parts[0].kernel
    walked = {s.buffer for s in inner.statements if isinstance(s, Load | Store) and s.index.terms}
    flat = tuple(b.name in walked for b in inner.buffers)
    found = Columns(inner, *places, len(kernel.parts), flat)
    for row, part in enumerate(kernel.parts):
        own = [kernel.scalars[found.place(found.scalars, j, row)] for j in range(len(part.scalars))]
        if own != [*part.scalars]:
            raise InvalidGraph(reason=f"the scalars of row {row} of a foreach do not lie in order")
    return found


def rows_of(kernel: Kernel, sizes: Sequence[int]) -> list[int]:
    """The elements of each row of a foreach."""
    values = dict(zip(kernel.sizes, sizes, strict=True))
    return [values[part.sizes[0]] for part in kernel.parts]


def gathered(
    kernels: Sequence[Lowered | Loop], before: Sequence[set[int]]
) -> tuple[list[Lowered | Loop | Foreach], list[set[int]]]:
    """Put kernels that are alike together, where none of them waits for another one, and say anew
    who runs before whom. Raises nothing: what does not fit stays as it is."""
    groups = _groups(kernels, before)
    if not groups:
        return [*kernels], [*before]
    item = {i: g for g, group in enumerate(groups) for i in group}
    alone = [i for i in range(len(kernels)) if i not in item]
    members = [*groups, *([i] for i in alone)]
    item |= {i: len(groups) + n for n, i in enumerate(alone)}
    waits = [{item[j] for i in group for j in before[i]} for group in members]
    order = _ordered(waits, [group[-1] for group in members])
    at = {n: position for position, n in enumerate(order)}
    found = [
        _together([kernels[i] for i in members[n]]) if n < len(groups) else kernels[members[n][0]]
        for n in order
    ]
    return found, [{at[j] for j in waits[n]} for n in order]


def lowered_foreach(one: Foreach) -> tuple[Lowered, tuple[int, ...]]:
    """The Lowered whose kernel has a part for each row, and the values of its sizes."""
    kernel, _ = parametrize(one.rows[0].kernel)
    shared, varying = _split([[v.id for v in row.scalars] for row in one.rows])
    names: dict[str, str] = {}
    declared: dict[str, Buffer] = {}
    parts: list[Part] = []
    for number, row in enumerate(one.rows):
        own = []
        for buffer, memory in zip(kernel.buffers, row.buffers, strict=True):
            name = names.setdefault(memory, f"b{len(names)}")
            known = declared.get(name, replace(buffer, name=name))
            access = known.access if known.access == buffer.access else "rw"
            declared[name] = replace(known, access=access)
            own.append(name)
        first = len(shared) + number * len(varying)
        at = {j: i for i, j in enumerate(shared)} | {j: first + i for i, j in enumerate(varying)}
        scalars = tuple(f"s{at[j]}" for j in range(len(at)))
        parts.append(Part(kernel, tuple(own), (f"n0_{number}",), scalars))
    together = Kernel(
        buffers=tuple(declared.values()),
        sizes=tuple(part.sizes[0] for part in parts),
        scalars=tuple(f"s{i}" for i in range(len(one.scalars))),
        axes=(),
        stages=(),
        index64=any(row.kernel.index64 for row in one.rows),
        parts=tuple(parts),
        foreach=True,
    )
    extents = tuple(_axis(row.kernel).extent for row in one.rows)
    return Lowered(together, tuple(names), one.scalars), extents


# --- which kernels are alike ------------------------------------------------------------------


def _groups(kernels: Sequence[Lowered | Loop], before: Sequence[set[int]]) -> list[list[int]]:
    """The positions of kernels that are to be one launch."""
    alike: dict[str, list[int]] = {}
    single: dict[str, list[int]] = {}  # element-wise kernels of one element, which have no axis
    for i, one in enumerate(kernels):
        if not isinstance(one, Lowered):
            continue
        if key := _key(one.kernel):
            alike.setdefault(key, []).append(i)
        elif one.kernel.stages and not any(s.axes for s in (one.kernel, *one.kernel.stages)):
            single.setdefault(_text(one.kernel), []).append(i)
    for group in alike.values() if single else ():
        at_one = single.pop(_text(_at_one(kernels[group[0]].kernel)), [])
        group[:] = sorted([*group, *at_one])
    wanted = [group for group in alike.values() if len(group) >= MIN_ROWS]
    found: list[list[int]] = []
    while wanted:
        group = wanted.pop(0)
        if _levels(before, [*found, group]) is not None:
            found.append(group)
            continue
        levels = _levels(before, found)
        at_once: dict[int, list[int]] = {}
        for i in group:
            at_once.setdefault(levels[i], []).append(i)
        if len(at_once) > 1:
            wanted += [some for some in at_once.values() if len(some) >= MIN_ROWS]
    return found


def _key(kernel: Kernel) -> str:
    """Equal for kernels that are alike; "" for one that no foreach has."""
    if _axis(kernel) is None:
        return ""
    named, _ = parametrize(kernel)
    plain = all(
        not (isinstance(s, Load | Store) and (s.mask or not _is_flat(s.index)))
        and isinstance(s, Load | Store | Compute | Reduce)
        and not getattr(s, "fold", "")
        for s in kernel.statements
    )
    if named.sizes != ("n0",) or not plain or any(s.in_order for s in kernel.stages):
        return ""
    places = {(s.buffer, s.index) for s in kernel.statements if isinstance(s, Load | Store)}
    if len(places) > len(kernel.buffers):
        return ""  # it reads one buffer both at the axis and at 0
    return _text(named)


def _text(kernel: Kernel) -> str:
    """Equal for kernels that differ in the names of variables."""
    return f"{canonical(kernel)}\n{kernel.lines}"


def _at_one(kernel: Kernel) -> Kernel:
    """An element-wise kernel as it is lowered for one element."""
    stages = []
    for stage in kernel.stages:
        body = [replace(s, index=Index()) if isinstance(s, Load | Store) else s for s in stage.body]
        stages.append(replace(stage, axes=(), body=tuple(body)))
    return replace(kernel, axes=(), stages=tuple(stages))


def _together(rows: Sequence[Lowered]) -> Foreach:
    """One launch of kernels that are alike, those of one element with an axis like all others."""
    kernel = next(row.kernel for row in rows if _axis(row.kernel) is not None)
    if kernel.axes:
        one = replace(kernel, axes=(replace(kernel.axes[0], extent=1),))
        rows = [row if _axis(row.kernel) else replace(row, kernel=one) for row in rows]
    return Foreach(tuple(rows))


def _axis(kernel: Kernel) -> Axis | None:
    """The only axis of an element-wise kernel, or of a full reduction."""
    if kernel.call is not None or kernel.parts:
        return None
    first, *rest = kernel.stages
    if first.dot is not None or first.attend is not None or any(s.axes for s in rest):
        return None
    if len(kernel.axes) == 1 and not first.axes:
        return kernel.axes[0]
    reduced = not kernel.axes and len(first.axes) == 1
    return first.axes[0] if reduced and any(isinstance(s, Reduce) for s in first.body) else None


def _is_flat(index: Index) -> bool:
    """Whether an index is the axis, or 0."""
    terms = index.terms
    one = not terms or (len(terms) == 1 and isinstance(terms[0][0], str) and terms[0][1] == 1)
    return one and index.offset == 0


def _split(rows: Sequence[Sequence[object]]) -> tuple[list[int], list[int]]:
    """The columns that are the same in all rows, and the others."""
    columns = list(zip(*rows, strict=True))
    shared = [j for j, column in enumerate(columns) if len(set(column)) == 1]
    return shared, [j for j in range(len(columns)) if j not in shared]


# --- in which order ---------------------------------------------------------------------------


def _levels(before: Sequence[set[int]], groups: Sequence[Sequence[int]]) -> list[int] | None:
    """How many others each kernel waits for, one after another, if each group runs at once; None
    where a group would wait for itself, or no levels are found in some rounds."""
    pins: dict[int, int] = {}
    for _ in range(ROUNDS):
        levels: list[int] = []
        for i, others in enumerate(before):
            after = max((levels[j] + 1 for j in others), default=0)
            levels.append(max(after, pins.get(i, 0)))
        late = [(group, max(levels[i] for i in group)) for group in groups]
        if all(levels[i] == level for group, level in late for i in group):
            return levels
        pins = {i: level for group, level in late for i in group}
    return None


def _ordered(waits: Sequence[set[int]], position: Sequence[int]) -> list[int]:
    """Items so that each comes behind those that it waits for, else by their positions."""
    left = [set(others) for others in waits]
    readers: dict[int, list[int]] = {}
    for n, others in enumerate(waits):
        for other in others:
            readers.setdefault(other, []).append(n)
    ready = [(position[n], n) for n, others in enumerate(left) if not others]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        _, n = heapq.heappop(ready)
        order.append(n)
        for reader in readers.get(n, ()):
            left[reader].discard(n)
            if not left[reader]:
                heapq.heappush(ready, (position[reader], reader))
    return order
