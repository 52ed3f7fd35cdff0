"""Stacks and concatenations of what loops give.

In: a graph in which pieces are put together one after another, each by a pad and a `where`. Out:
where the pieces are rows of a loop's result, nodes that take them all at once.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from tracejit.ir.graph import Builder, Node, Value
from tracejit.ir.types import Type, i64
from tracejit.passes.columns import World
from tracejit.passes.repeats import LEAST
from tracejit.passes.rows import Rows, all_moved

TURNS = 4  # values of a body whose rows may be put together in turn

Piece = tuple[Value, int]  # and where it begins


def stacked_ladders(
    nodes: Sequence[Node], world: World, consumed: Set[int], b: Builder
) -> dict[int, list[Node]]:
    """By the place of the last node of each ladder, what stands for it."""
    found: dict[int, list[Node]] = {}
    inner: set[int] = set()
    for i in range(len(nodes) - 1, -1, -1):
        if i in consumed or i in inner or nodes[i].op.name != "where":
            continue
        pieces, steps = _pieces(nodes, world, i)
        inner.update(steps)
        if len(pieces) < LEAST:
            continue
        begin = len(b.nodes)
        axis = _axis(nodes, world, i)
        b.line = nodes[i].where
        if _together(b, pieces, axis, nodes[i].out, world):
            found[i] = b.nodes[begin:]
        else:
            del b.nodes[begin:]
    return found


def _step(nodes: Sequence[Node], world: World, i: int) -> tuple[int, int] | None:
    """The axis and the place of a step of a ladder: where(iota < place, …, …)."""
    made = world.sources.made
    below = made.get(nodes[i].args[0].id) if isinstance(nodes[i].args[0], Value) else None
    if below is None or below.op.name != "lt" or type(below.args[1]) is not int:
        return None
    iota = made.get(below.args[0].id)
    if iota is None or iota.op.name != "iota":
        return None
    return iota.attr("axis"), below.args[1]


def _axis(nodes: Sequence[Node], world: World, i: int) -> int:
    return _step(nodes, world, i)[0]


def _pieces(nodes: Sequence[Node], world: World, i: int) -> tuple[list[Piece], list[int]]:
    """What a ladder puts together, the first piece first, and its nodes."""
    made, index = world.sources.made, world.index
    pieces: list[Piece] = []
    steps: list[int] = []
    axis = None
    while True:
        at = _step(nodes, world, i)
        if at is None or axis is not None and at[0] != axis:
            return [], steps
        axis = at[0]
        upper = _piece(made, nodes[i].args[2], axis, at[1])
        if upper is None or (pieces and at[1] + _extent(upper, axis) != pieces[-1][1]):
            return [], steps
        whole = nodes[i].out.type.shape[axis]
        if not pieces and at[1] + _extent(upper, axis) != whole:
            return [], steps
        pieces.append((upper, at[1]))
        steps.append(i)
        before = nodes[i].args[1]
        first = _piece(made, before, axis, 0)
        if first is not None:
            if _extent(first, axis) != at[1]:
                return [], steps
            pieces.append((first, 0))
            return pieces[::-1], steps
        i = index.get(before.id, -1) if isinstance(before, Value) else -1
        if i < 0 or nodes[i].op.name != "where":
            return [], steps


def _extent(x: Value, axis: int) -> int:
    return x.type.shape[axis]


def _piece(made, x: object, axis: int, at: int) -> Value | None:
    """The piece that a pad puts at a place of an axis."""
    node = made.get(x.id) if isinstance(x, Value) else None
    if node is None or node.op.name != "pad" or any(node.attr("interior")):
        return None
    low, high = node.attr("low"), node.attr("high")
    others = any(n for k, n in enumerate(low) if k != axis)
    others = others or any(n for k, n in enumerate(high) if k != axis)
    return node.args[0] if low[axis] == at and not others else None


def _together(b: Builder, pieces: Sequence[Piece], axis: int, like: Value, world: World) -> bool:
    """Emit the pieces as one value, if most of them are rows: of one value of a body, or of several
    in turn."""
    values = [world.sources.same.get(x.id, x) for x, _ in pieces]
    if len({v.type for v in values[1:-1]}) > 1:
        return False
    for turns in range(1, TURNS + 1):
        found = [world.sources.rows(values[k::turns]) for k in range(turns)]
        if None in found:
            continue
        low, high = _longest([all(ok) for ok in zip(*(rows.valid for rows in found), strict=False)])
        if high - low < LEAST or len(pieces) - turns * (high - low) > LEAST:
            continue
        parts = [_stack(b, rows.cut(low, high), axis) for rows in found]
        x = parts[0] if turns == 1 else _in_turn(b, parts, axis)
        shape = x.type.shape
        merged = (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
        x = b.reshape(x, shape=merged)
        low, high = low * turns, high * turns
        _joined(b, [*pieces[:low], (x, pieces[low][1]), *pieces[high:]], axis, like)
        return True
    return False


def _stack(b: Builder, rows: Rows, axis: int) -> Value:
    """Rows along an axis before that of the pieces."""
    x = rows.stacked(b, reverse=False)
    for op, attrs in rows.moves:
        x = all_moved(b, x, op, dict(attrs))
    rank = len(x.type.shape)
    return b.permute(x, axes=(*range(1, axis + 1), 0, *range(axis + 1, rank)))


def _in_turn(b: Builder, parts: Sequence[Value], axis: int) -> Value:
    """The first one's first row, the second one's, …: rows along an axis."""
    count = len(parts)
    shape = parts[0].type.shape
    each = [b.reshape(x, shape=(*shape[: axis + 1], 1, *shape[axis + 1 :])) for x in parts]
    wide = (*shape[: axis + 1], count, *shape[axis + 1 :])
    like = b.value(Type(parts[0].type.dtype, wide, parts[0].type.device))
    x = _joined(b, [(x, k) for k, x in enumerate(each)], axis + 1, like)
    return b.reshape(x, shape=(*shape[:axis], shape[axis] * count, *shape[axis + 1 :]))


def _longest(valid: Sequence[bool]) -> tuple[int, int]:
    best, low, found = 0, 0, (0, 0)
    for r, ok in enumerate([*valid, False]):
        if not ok:
            if r - low > best:
                best, found = r - low, (low, r)
            low = r + 1
    return found


def _joined(b: Builder, parts: Sequence[Piece], axis: int, like: Value) -> Value:
    """Parts one after another along an axis."""
    shape, found = like.type.shape, None
    for x, at in parts:
        low = tuple(at if k == axis else 0 for k in range(len(shape)))
        high = tuple(shape[k] - at - n if k == axis else 0 for k, n in enumerate(x.type.shape))
        padded = b.pad(x, low=low, high=high, interior=(0,) * len(shape), value=0)
        if found is None:
            found = padded
            continue
        place = b.iota(axis=axis, shape=shape, dtype=i64, device=like.type.device)
        found = b.where(b.lt(place, at), found, padded)
    if len(parts) == 1:
        found = b.alias(found)
    return found
