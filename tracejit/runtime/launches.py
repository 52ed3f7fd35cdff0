"""The launches of a plan with their arguments, which are built once and patched by address."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import add, itemgetter
from struct import Struct

import numpy as np
import torch

from tracejit.records import dataclass

STREAM = 3  # where the stream is among the arguments of a launch
COPY, GRAPH, MANY = -1, -2, -3  # instead of the number of a launch that has failed

Place = tuple[int, int]  # which of a plan's bases, and bytes from there
# gives what to raise where a launch has failed: (its number, the error) -> the error; weakly
Failed = Callable[[], Callable[[int, Exception], Exception]]


@dataclass(frozen=True)
class Launches:
    """What is launched, in order, for bases that are aligned in some way.

    runs:      the launchers.
    arguments: their arguments; the stream and all pointers are missing.
    uses:      per base (launch, position, bytes from the base) of each argument that points there;
               at the end those of the counters and partials, of the table, and of what stays.
    indirect:  the places whose addresses the kernels load from the table, where they stand before
               the scalars.
    constant:  what stays the same and kernels read, in pinned memory: the chunks of a foreach.
    place:     brings that to new memory of the device, in the order of the current stream.
    """

    runs: tuple[Callable[..., None], ...]
    arguments: tuple[list, ...]
    uses: tuple[list[tuple[int, int, int]], ...]
    indirect: tuple[Place, ...] = ()
    constant: torch.Tensor | None = None
    place: Callable[[torch.Tensor], torch.Tensor] | None = None


class Table:
    """What the table of a stream is to hold: `table(words, bases)` puts addresses before the words
    of scalars, None if there are neither."""

    __slots__ = ("bases", "_addresses", "_offsets", "_pack", "_head")

    def __init__(self, places: Sequence[Place]):
        self.bases: tuple[int, ...] | None = None  # whose addresses are packed
        self._head = b""
        self._addresses = picking([base for base, _ in places])
        offsets = [offset for _, offset in places]
        self._offsets = offsets if any(offsets) else None
        self._pack = Struct(f"{len(offsets)}Q").pack

    def __call__(self, words: bytes | None, bases: tuple[int, ...]) -> bytes | None:
        if bases is not self.bases:
            if bases != self.bases:
                self.bases = None
                addresses = self._addresses(bases)
                if self._offsets is not None:
                    addresses = map(add, addresses, self._offsets)
                self._head = self._pack(*addresses)
            self.bases = bases
        return self._head + words if words is not None else self._head or None


class StreamState:
    """What the launches of a plan work with on one stream."""

    __slots__ = ("stream", "kept", "work", "table", "words", "calls", "_memory", "_copy")

    def __init__(
        self,
        stream: int,
        memory: Sequence[torch.Tensor | None],
        copy: Callable[[torch.Tensor, bytes], None] | None,
        *,
        kept: bool = True,
    ):
        self.stream, self.kept = stream, kept
        self._memory, self._copy = memory, copy
        work, table = memory
        self.work = 0 if work is None else work.data_ptr()
        self.table = 0 if table is None else table.data_ptr()
        self.words: bytes | None = None  # what the table holds
        self.calls: dict[object, object] = {}  # by launcher

    def upload(self, words: bytes) -> None:
        """Bring words to the table, behind what was launched so far."""
        self.words = None
        self._copy(self._memory[1], words)
        self.words = words


class Calls:
    """All launches on one stream: `calls(state, words, bases)` brings the scalars over, if they
    have changed, patches the arguments where an address has, and launches."""

    __slots__ = ("bases", "_arguments", "_launches", "_failed", "_mark", "_table", "_constant")

    def __init__(
        self,
        launches: Launches,
        state: StreamState,
        failed: Failed,
        mark: Callable[[], None] | None = None,  # called before the first and behind each
        table: Table | None = None,  # else the words of a call have the addresses in them
    ):
        self.bases: tuple[int, ...] = ()  # where they are
        self._launches, self._failed, self._mark = launches, failed, mark
        self._arguments = [[*given] for given in launches.arguments]
        for given in self._arguments:
            given[STREAM] = state.stream
        self._table, self._constant = table, None
        constant = 0
        if launches.constant is not None:
            self._constant = launches.place(launches.constant)
            constant = self._constant.data_ptr()
        own = state.work, state.table, constant
        for base, uses in zip(own, launches.uses[-3:], strict=True):
            self._point(base, uses)

    def __call__(self, state: StreamState, words: bytes | None, bases: tuple[int, ...]) -> None:
        n, mark = COPY, self._mark
        try:
            if self._table is not None:
                words = self._table(words, bases)
            if words != state.words:
                state.upload(words)
            if bases is not self.bases and bases != self.bases:
                self._move(bases)
            if mark is not None:
                mark()
            for run, given in zip(self._launches.runs, self._arguments):  # noqa: B905  faster
                n += 1
                run(*given)
                if mark is not None:
                    mark()
        except Exception as error:
            raise self._failed()(n, error) from error

    def some(self, first: int, last: int, bases: tuple[int, ...]) -> None:
        """A stretch of the launches, whose scalars are there."""
        if bases is not self.bases and bases != self.bases:
            self._move(bases)
        for n in range(first, last):
            try:
                self._launches.runs[n](*self._arguments[n])
            except Exception as error:
                raise self._failed()(n, error) from error

    def _move(self, bases: tuple[int, ...]) -> None:
        """The bases are at these addresses now."""
        before = self.bases or (None,) * len(bases)
        for old, new, uses in zip(before, bases, self._launches.uses, strict=False):
            if old != new:
                self._point(new, uses)
        self.bases = bases

    def _point(self, base: int, uses: Sequence[tuple[int, int, int]]) -> None:
        for number, position, offset in uses:
            self._arguments[number][position] = base + offset


def packing(expressions: Sequence[str]) -> Callable[..., bytes]:
    """A function that puts numbers in a row: it is given each expression's once."""
    once = {x: n for n, x in enumerate(dict.fromkeys(expressions))}
    pack = Struct(f"{len(once)}d").pack
    if len(once) == len(expressions):
        return pack
    order = np.array([once[x] for x in expressions])
    return lambda *numbers: np.frombuffer(pack(*numbers)).take(order).tobytes()


class Picked:
    """Some elements of a list, as a tuple: the same one for the same list, which nobody changes."""

    __slots__ = ("_get", "_last")

    def __init__(self, indices: Sequence[int]):
        self._get = picking(indices)
        self._last: tuple[list | None, tuple] = (None, ())

    def __call__(self, items: list) -> tuple:
        last = self._last
        if items is not last[0]:
            last = self._last = (items, self._get(items))  # at once: another call may come between
        return last[1]


def picking(indices: Sequence[int]) -> Callable[[Sequence], tuple]:
    """A function that takes some elements of a sequence."""
    if len(indices) > 1:
        return itemgetter(*indices)
    if indices:
        only = indices[0]
        return lambda items: (items[only],)
    return lambda items: ()
