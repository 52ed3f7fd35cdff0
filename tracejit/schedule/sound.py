"""Whether the memory of a plan is sound: what a launch reads is what was stored for it.

In: a plan, and where its pieces lie, as the plan says or as the CPU's passes have placed them. Out:
nothing, or InvalidGraph with the launch and the pieces that meet. Launches are walked in their
order, those of a loop twice; a store ends every other piece that shares a byte with its own. So a
launch that reads a piece which was ended, or was never stored, is wrong, and so is one that stores
where it, or a kernel beside it, works on another piece. Within a kernel no product reads what the
kernel stores, and no element is stored twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from tracejit.errors import InvalidGraph
from tracejit.ir.types import contiguous_strides
from tracejit.records import dataclass
from tracejit.schedule.kernel import Buffer, Kernel, Load, Statement, Store
from tracejit.schedule.memory import Layout
from tracejit.schedule.plan import Plan, PlanBuffer, runs


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes [start, end) of the output `room`, or of the arena (None)."""

    room: int | None
    start: int
    end: int

    def meets(self, other: Piece) -> bool:
        """Whether they share a byte."""
        return self.room == other.room and self.start < other.end and other.start < self.end


@dataclass(frozen=True, slots=True)
class Access:
    """What one kernel does with a piece of memory. `reads`: what is there before it stores."""

    name: str
    reads: bool
    writes: bool


@dataclass(frozen=True, slots=True)
class Step:
    """A launch: what it does, and the loop that it is part of."""

    accesses: tuple[Access, ...]
    loop: int | None = None


def check_plan(plan: Plan, layout: Layout) -> None:
    """Check a plan that works where `layout` says. Raises InvalidGraph."""
    pieces = pieces_of(plan.buffers, layout, {})
    for kernel in dict.fromkeys(one.kernel for x in plan.launches for one in x.alone()):
        check_kernel(kernel)
    steps = [
        Step(
            tuple(
                Access(name, reads_first(one.kernel, buffer), "w" in buffer.access)
                for one in launch.alone()
                for buffer, name in zip(one.kernel.buffers, one.buffers, strict=True)
            ),
            launch.loop,
        )
        for launch in plan.launches
    ]
    check(plan, pieces, steps, layout.arena_bytes)


def reads_first(kernel: Kernel, buffer: Buffer) -> bool:
    """Whether a kernel reads what is in a buffer before it. A stage that goes in order reads what
    it has stored itself, at points before."""
    if buffer.access != "rw" or kernel.call is not None:
        return "r" in buffer.access
    for stage in kernel.stages:
        here = touching(stage.body, buffer.name)
        if here and stage.in_order and any(isinstance(s, Store) and not s.fold for s in here):
            return False
        if here:
            break
    first = next(iter(touching(kernel.statements, buffer.name)), None)
    return not isinstance(first, Store) or bool(first.fold)


def touching(statements: Iterable[Statement], buffer: str) -> list[Load | Store]:
    """The loads and stores of a buffer among some statements."""
    return [s for s in statements if isinstance(s, (Load, Store)) and s.buffer == buffer]


def check_kernel(kernel: Kernel) -> None:
    """Check what a kernel does with memory that it overwrites. Raises InvalidGraph."""
    stored = {s.buffer for s in kernel.statements if isinstance(s, Store)}
    for stage in kernel.stages:
        sides = [] if stage.dot is None else [stage.dot.a, stage.dot.b]
        sides += [] if stage.attend is None else [side.body for side in stage.attend.sides]
        for load in (s for side in sides for s in side if isinstance(s, Load)):
            if load.buffer in stored:
                raise InvalidGraph(reason=f"a product reads {load.buffer}, which its kernel stores")
        there: dict[tuple, Store] = {}
        for store in (s for s in stage.body if isinstance(s, Store) and not s.fold):
            first = there.setdefault((store.buffer, store.index, store.mask), store)
            if first is not store and first.value != store.value:
                raise InvalidGraph(reason=f"an element of {store.buffer} is stored twice")


def check(plan: Plan, pieces: Mapping[str, Piece], steps: Sequence[Step], arena_bytes: int) -> None:
    """Check the launches of a plan, whose pieces lie so. Raises InvalidGraph."""
    whole = {b.name: _span(b) for b in plan.buffers if b.kind == "output"}
    position = {i: b.name for i, b in enumerate(plan.buffers)}
    for name, piece in pieces.items():
        room = arena_bytes if piece.room is None else whole[position[piece.room]]
        if not 0 <= piece.start <= piece.end <= room:
            raise InvalidGraph(reason=f"{name} reaches beyond its memory of {room} bytes: {piece}")
    rows = {b.name: b.of for b in plan.buffers if b.kind == "row"}
    given = {b.name for b in plan.buffers if b.kind == "input"}
    there: dict[str, Piece] = {}  # pieces that hold what was stored
    ended: dict[str, str] = {}  # others, and by what
    for number, step in _walked(steps):
        accesses = [Access(rows.get(a.name, a.name), a.reads, a.writes) for a in step.accesses]
        _apart(number, accesses, pieces)
        for a in accesses:
            if a.reads and a.name not in given and a.name not in there:
                why = ended.get(a.name, "nothing has been stored there")
                raise InvalidGraph(reason=f"launch {number} reads {a.name}, but {why}")
        for a in accesses:
            if a.writes and a.name in pieces:
                mine = pieces[a.name]
                for other in [n for n, at in there.items() if n != a.name and mine.meets(at)]:
                    del there[other]
                    ended[other] = f"launch {number} has stored {a.name} in its place"
                there[a.name] = mine
    for name in plan.results:
        if name not in there and whole[name]:
            why = ended.get(name, "nothing stores it")
            raise InvalidGraph(reason=f"{name} is a result, but {why}")


def _walked(steps: Sequence[Step]) -> Iterator[tuple[int, Step]]:
    """Launches in the order in which they run, those of a loop twice."""
    for together in runs(enumerate(steps), lambda item: item[1].loop):
        yield from together
        if together[0][1].loop is not None:
            yield from together


def _apart(number: int, accesses: Iterable[Access], pieces: Mapping[str, Piece]) -> None:
    """What a launch stores lies apart from all else that it works on."""
    used = [(a, pieces[a.name]) for a in accesses if a.name in pieces]
    for a, mine in used:
        for b, other in used if a.writes else ():
            if a.name != b.name and mine.meets(other):
                raise InvalidGraph(
                    reason=f"launch {number} stores {a.name} where it works on {b.name}"
                )


def pieces_of(
    buffers: Sequence[PlanBuffer], layout: Layout, more: Mapping[str, tuple[int, int]]
) -> dict[str, Piece]:
    """Where outputs lie, and what is placed: `more` has the addresses and bytes of memory that
    kernels work in."""
    found = {}
    for i, b in enumerate(buffers):
        if b.kind == "output":
            found[b.name] = Piece(i, 0, _span(b))
        elif b.kind == "arena" and i in layout.places:
            at = layout.places[i]
            found[b.name] = Piece(at.room, at.offset, at.offset + b.type.nbytes)
    for name, (i, nbytes) in more.items():
        at = layout.places[i]
        found[name] = Piece(at.room, at.offset, at.offset + nbytes)
    return found


def _span(b: PlanBuffer) -> int:
    """The bytes from a buffer's first element to its last."""
    shape = b.type.shape
    strides = b.strides or contiguous_strides(shape)
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    return 0 if 0 in shape else (last + 1) * b.type.dtype.itemsize
