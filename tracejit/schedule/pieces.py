"""Numbers that are put together (the norms of many gradients, stacked) are stored side by side.

In: lowered kernels. Out: the same, where a kernel that chooses between many buffers of one element,
by its index, reads one buffer instead. Theirs become places in it, so nothing is copied: whoever
computes such a number stores it where it is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tracejit.ir.types import Type
from tracejit.schedule.kernel import (
    Axis,
    Buffer,
    Compute,
    InBounds,
    Index,
    Load,
    Position,
    Stage,
    Statement,
    Store,
    Var,
)
from tracejit.schedule.loops import Loop
from tracejit.schedule.lower import Lowered
from tracejit.schedule.plan import PlanBuffer
from tracejit.schedule.values import Memory

MIN_PIECES = 8


def stored_together(kernels: Sequence[Lowered | Loop], memory: Memory) -> list[Lowered | Loop]:
    """Read pieces from one buffer, which is added to `memory`, where theirs become rows of it."""
    return [_read(one, memory) if isinstance(one, Lowered) else one for one in kernels]


def _read(one: Lowered, memory: Memory) -> Lowered:
    """The kernel with its first chain of pieces read from one buffer."""
    for number, stage in enumerate(one.kernel.stages):
        axes = (*one.kernel.axes, *stage.axes)
        if len(axes) != 1 or stage.dot is not None or stage.attend is not None:
            continue
        made = {s.out.id: s for s in stage.body if isinstance(s, Load | Compute | Position)}
        for s in stage.body:
            if not isinstance(s, Compute) or s.op.name != "where":
                continue
            found = _pieces(s, made, axes[0])
            names = [dict(zip(_names(one), one.buffers, strict=True))[b] for b in found]
            if len(found) >= MIN_PIECES and _are_free(found, names, one, memory):
                return _joined(one, number, s, names, memory)
    return one


def _pieces(s: Statement, made: dict[int, Statement], axis: Axis) -> list[str]:
    """The buffers that a value is, one element of each after another; [] if it is anything else.

    Element k of `where(i < k, the elements before, load b[0] if 0 <= i - k < 1)` is b's.
    """
    found: list[str] = []
    for k in reversed(range(axis.extent)):
        piece = s
        if k:
            if not (isinstance(s, Compute) and s.op.name == "where"):
                return []
            condition, before, last = (made.get(getattr(a, "id", None)) for a in s.args)
            if not _is_before(condition, k, made, axis):
                return []
            s, piece = before, last
        if not _is_piece(piece, k, axis):
            return []
        found.append(piece.buffer)
    return found[::-1]


def _is_before(s: Statement | None, k: int, made: dict[int, Statement], axis: Axis) -> bool:
    """Whether a value is `i < k`."""
    if not isinstance(s, Compute) or s.op.name != "lt" or s.args[1] != k:
        return False
    position = made.get(getattr(s.args[0], "id", None))
    return isinstance(position, Position) and position.index == Index(((axis.name, 1),))


def _is_piece(s: Statement | None, k: int, axis: Axis) -> bool:
    """Whether a value is a buffer's one element where the axis is k."""
    if not isinstance(s, Load) or s.index != Index() or len(s.mask) != 1:
        return False
    (bound,) = s.mask
    return bound.index == Index(((axis.name, 1),), -k) and (bound.high, bound.step) == (1, 1)


def _are_free(buffers: Sequence[str], names: Sequence[str], one: Lowered, memory: Memory) -> bool:
    """Whether buffers may lie anywhere, and the kernel reads each of them once."""
    reads = [s.buffer for s in one.kernel.statements if isinstance(s, Load | Store)]
    kinds = {(memory.buffers[n].kind, memory.buffers[n].type) for n in names}
    return (
        all(reads.count(b) == 1 for b in buffers)
        and len({*names}) == len(names)
        and len(kinds) == 1
        and next(iter(kinds))[0] == "arena"
    )


def _joined(
    one: Lowered, number: int, s: Statement, names: Sequence[str], memory: Memory
) -> Lowered:
    """The kernel with a load instead of a value, from a new buffer of which `names` are rows."""
    kernel, kind = one.kernel, memory.buffers[names[0]].type
    whole = f"t{len(memory.buffers)}"
    memory.buffers[whole] = PlanBuffer(whole, "arena", Type(kind.dtype, (len(names),), kind.device))
    for k, name in enumerate(names):
        place = {"of": whole, "offset": k * kind.dtype.itemsize}
        memory.buffers[name] = PlanBuffer(name, "row", kind, **place)
    axis = (*kernel.axes, *kernel.stages[number].axes)[0]
    load = Load(s.out, whole, Index(((axis.name, 1),)), (), s.where)
    stages = list(kernel.stages)
    body = tuple(load if x is s else x for x in stages[number].body)
    stages[number] = replace(stages[number], body=body)
    alive = _without_dead(stages)
    known = dict(zip(_names(one), one.buffers, strict=True))
    used = {x.buffer for stage in alive for x in stage.body if isinstance(x, Load | Store)}
    kept = [b for b in kernel.buffers if b.name in used]
    buffers = [*kept, Buffer(whole, kind.dtype, "r")]
    new = {b.name: f"b{i}" for i, b in enumerate(buffers)}
    kernel = replace(
        kernel,
        buffers=tuple(replace(b, name=new[b.name]) for b in buffers),
        stages=tuple(_renamed(stage, new) for stage in alive),
    )
    return replace(one, kernel=kernel, buffers=(*(known[b.name] for b in kept), whole))


def _names(one: Lowered) -> list[str]:
    return [b.name for b in one.kernel.buffers]


def _without_dead(stages: Sequence[Stage]) -> list[Stage]:
    """Stages without what nobody reads any more."""
    found: list[Stage] = []
    needed: set[int] = set()
    for stage in reversed(stages):
        body: list[Statement] = []
        for s in reversed(stage.body):
            if isinstance(s, Load | Compute | Position | InBounds) and s.out.id not in needed:
                continue
            needed |= {v.id for v in _read_by(s)}
            body.append(s)
        found.append(replace(stage, body=tuple(reversed(body))))
    return found[::-1]


def _read_by(s: Statement) -> list[Var]:
    """The values that a statement computes with or finds its place by."""
    values = [*getattr(s, "args", ()), getattr(s, "value", None)]
    bounds = [b.index for b in getattr(s, "mask", ())]
    indices = [getattr(s, "index", Index()), *bounds]
    while indices:
        for atom, _ in indices.pop().terms:
            if isinstance(atom, Var):
                values.append(atom)
            elif not isinstance(atom, str):
                indices.append(atom.index)
    return [v for v in values if isinstance(v, Var)]


def _renamed(stage: Stage, new: dict[str, str]) -> Stage:
    """A stage whose buffers have other names."""
    body = [
        replace(s, buffer=new[s.buffer]) if isinstance(s, Load | Store) else s for s in stage.body
    ]
    return replace(stage, body=tuple(body))
