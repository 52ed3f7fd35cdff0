"""A `foreach` as a Triton function: a program works on a chunk of one row.

Its first two arguments are tables of int64. `addresses` has those of all rows (`Columns` says
where), and changes when memory moves. `chunks` says for each program its row, and its first element
and the one behind its last; for reductions also where the row's partials lie, the chunk's number
within the row, and how many the row has. It depends on sizes alone, and on which rows are aligned.

Rows whose buffers all start at a multiple of 16 bytes are moved in 128-bit accesses, by chunks that
end at such a multiple: of WIDE elements, and BYTES of addresses, as Triton is told. All else is a
second launch of the same function, in which both are 1: what is left of a row then, and rows that
are not aligned. It is left out where it has no chunks. The function's text says nothing of how many
rows there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from tracejit.codegen.language import Line
from tracejit.codegen.triton_body import Body
from tracejit.codegen.triton_forms import (
    FOLD_BLOCK,
    HEADER_BYTES,
    PARTIAL_BYTES,
    Function,
    MakeBody,
    block_lines,
    form_of,
    lanes,
    without_reductions,
)
from tracejit.codegen.triton_text import MEMORY_TYPE, TRITON, Dim, fold_of
from tracejit.schedule.foreach import Columns, Same, columns_of, rows_of
from tracejit.schedule.kernel import Kernel, Reduce

ALIGNED = 16  # bytes, and those of a wide access
BLOCK = 1024  # elements of a tile: 8 for each thread of 4 warps
WARPS = 4
STEPS = 4  # tiles of a chunk, one after another, where there are many
MANY = 2048  # chunks that are enough for any GPU
WORDS, WORDS_OF_FOLD = 3, 6  # of a chunk
COUNTER_BYTES = 4  # of a row that is reduced


def foreach(kernel: Kernel, make: MakeBody = Body) -> Function:
    """The lines of the function; see above for its arguments."""
    columns = columns_of(kernel)
    inner = columns.kernel
    body = make(inner)
    body.scalar_places = {
        name: columns.place(columns.scalars, j, "row") for j, name in enumerate(inner.scalars)
    }
    reductions = [s for s in inner.stages[0].body if isinstance(s, Reduce)]
    dim = Dim("x", inner.axes or inner.stages[0].axes)
    found = _folded(body, inner, reductions, dim) if reductions else _mapped(body, inner, dim)
    inside, starts, last, imports = found
    lines = [
        *_chunk(inner, dim, bool(reductions)),
        *_pointers(columns),
        *body.scalar_lines(),
        *starts,
        Line("for step in range(STEPS):"),
        *TRITON.indent(inside),
        *last,
    ]
    return Function(tuple(lines), ("BLOCK", "STEPS", "WIDE", "BYTES"), imports)


def _mapped(body: Body, kernel: Kernel, dim: Dim) -> tuple:
    """Element-wise work: (the lines of a tile, those before and behind, what they import)."""

    def tile(dim: Dim) -> None:
        body.enter(dim)
        for stage in kernel.stages:
            without_reductions(body, stage)

    return block_lines(body, dim, f"first + step * BLOCK + {lanes(dim)}", tile), [], [], ()


def _folded(body: Body, kernel: Kernel, reductions: Sequence[Reduce], dim: Dim) -> tuple:
    """A full reduction: each chunk publishes its partials, and the last one of a row folds them in
    their order and runs the rest of the row's kernel."""
    main, *tail = kernel.stages
    totals = {r: f"{r.out!r}_{fold_of(r).kind}" for r in reductions}
    starts, last, collects = [], [], []

    def tile(dim: Dim) -> None:
        body.enter(dim)
        for r in body.emit(main.body):
            value = body.reduced_value(r, frozenset([dim.name]))
            body.lines.append(Line(fold_of(r).combine(totals[r], value), r.where))

    inside = block_lines(body, dim, f"first + step * BLOCK + {lanes(dim)}", tile)
    for position, r in enumerate(reductions):
        fold, name = fold_of(r), f"{r.out!r}_partials"
        starts.append(Line(f"{totals[r]} = tl.full([BLOCK], {fold.neutral}, {fold.type})"))
        at = f"workspace + (partials + {PARTIAL_BYTES * position} * count)"
        if not position:
            at = "workspace + partials"
        last.append(Line(f"{name} = ({at}).to(tl.pointer_type({fold.type}))"))
        last.append(Line(f"publish({name}, {fold.tile}({totals[r]}), number)"))
        total = fold.finish(f"{fold.collect}({name}, count, {FOLD_BLOCK})")
        collects.append(Line(f"{r.out!r} = {total}", r.where))
        body.define(r.out, frozenset())
    for stage in tail:
        without_reductions(body, stage)
    last.append(Line("if is_last(workspace.to(tl.pointer_type(tl.int32)) + row, count):"))
    last += TRITON.indent([*collects, *body.lines])
    body.lines = []
    collect = sorted({fold_of(r).collect for r in reductions})
    return inside, starts, last, ("is_last", "publish", *collect)


def _chunk(kernel: Kernel, dim: Dim, folds: bool) -> list[Line]:
    """The lines that read what a program works on. The axis's extent is where its chunk ends."""
    words, end = WORDS_OF_FOLD if folds else WORDS, dim.extent
    number = "" if kernel.index64 else ".to(tl.int32)"
    lines = [
        Line(f"chunk = chunks + tl.program_id(0) * {words}"),
        Line("row = tl.load(chunk).to(tl.int32)"),
        Line(f"first = tl.multiple_of(tl.load(chunk + 1){number}, WIDE)"),
        Line(f"{end} = tl.multiple_of(tl.load(chunk + 2){number}, WIDE)"),
    ]
    if folds:
        lines.append(Line("partials = tl.load(chunk + 3)"))
        lines.append(Line("number = tl.load(chunk + 4).to(tl.int32)"))
        lines.append(Line("count = tl.load(chunk + 5).to(tl.int32)"))
    return lines


def _pointers(columns: Columns) -> list[Line]:
    """The lines that read where the row's buffers lie."""
    lines = []
    for j, buffer in enumerate(columns.kernel.buffers):
        at = columns.place(columns.buffers, j, "row")
        place = "addresses" if at == 0 else f"addresses + {at}"
        pointer = f"tl.load({place}).to(tl.pointer_type({MEMORY_TYPE[buffer.dtype.name]}))"
        if not columns.flat[j]:
            lines.append(Line(f"{buffer.name} = {pointer}"))
        else:
            lines.append(Line(f"{buffer.name} = tl.multiple_of({pointer}, BYTES)"))
    return lines


# --- chunks -----------------------------------------------------------------------------------


def wide_of(kernel: Kernel) -> int:
    """Elements that take 16 bytes or more in each buffer."""
    columns = columns_of(kernel)
    flat = zip(columns.kernel.buffers, columns.flat, strict=True)
    return max(1, ALIGNED // min(b.dtype.itemsize for b, is_flat in flat if is_flat))


def words_of(kernel: Kernel) -> int:
    """How much a program reads of both tables."""
    return len(columns_of(kernel).buffers) + (WORDS_OF_FOLD if is_reduced(kernel) else WORDS)


def constants_of(kernel: Kernel, sizes: Sequence[int], wide: bool) -> dict[str, int]:
    """The constants of a launch."""
    known = {"WIDE": wide_of(kernel), "BYTES": ALIGNED} if wide else {"WIDE": 1, "BYTES": 1}
    return {"BLOCK": BLOCK, "STEPS": steps_of(kernel, sizes), **known}


def steps_of(kernel: Kernel, sizes: Sequence[int]) -> int:
    """Tiles of a chunk: more than one where a GPU has enough chunks all the same."""
    tiles, steps = sum(-(-n // BLOCK) for n in rows_of(kernel, sizes)), STEPS
    while steps > 1 and tiles < MANY * steps:
        steps //= 2
    return steps


def is_reduced(kernel: Kernel) -> bool:
    """Whether the rows of a foreach are reductions."""
    return form_of(columns_of(kernel).kernel) == "reduce"


def workspace_of(kernel: Kernel, sizes: Sequence[int]) -> int:
    """Bytes of counters and partials."""
    if not is_reduced(kernel):
        return 0
    reductions = sum(isinstance(s, Reduce) for s in columns_of(kernel).kernel.stages[0].body)
    span = BLOCK * steps_of(kernel, sizes)
    count = sum(max(1, -(-n // span)) for n in rows_of(kernel, sizes))
    return _header(kernel) + PARTIAL_BYTES * reductions * count


def _header(kernel: Kernel) -> int:
    nbytes = COUNTER_BYTES * columns_of(kernel).rows
    return -(-nbytes // HEADER_BYTES) * HEADER_BYTES


def chunks_of(
    kernel: Kernel, sizes: Sequence[int], aligned: Sequence[bool] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The chunks that are moved in wide accesses, and all others, one a line. `aligned` says it of
    each row; by default all are. A reduced row is of one kind, and has a chunk if it is empty."""
    return _chunks(Same(kernel), tuple(sizes), None if aligned is None else tuple(aligned))


@lru_cache(maxsize=64)
def _chunks(
    same: Same, sizes: tuple[int, ...], aligned: tuple[bool, ...] | None
) -> tuple[np.ndarray, np.ndarray]:
    kernel = same.kernel
    span, wide = BLOCK * steps_of(kernel, sizes), wide_of(kernel)
    reduced = is_reduced(kernel)
    reductions = sum(isinstance(s, Reduce) for s in columns_of(kernel).kernel.stages[0].body)
    found: tuple[list, list] = [], []
    partials = _header(kernel)
    for row, n in enumerate(rows_of(kernel, sizes)):
        even = n - n % wide
        if (aligned is not None and not aligned[row]) or (even < n and (reduced or n <= BLOCK)):
            even = 0  # also a row that one tile holds is not cut in two
        count = max(1, -(-n // span))
        for kind, first, end in ((0, 0, even), (1, even, n)):
            starts = np.arange(first, end, span, np.int64)
            if reduced and not n and kind:
                starts = np.zeros(1, np.int64)
            words = np.zeros((len(starts), WORDS_OF_FOLD if reduced else WORDS), np.int64)
            words[:, 0] = row
            words[:, 1] = starts
            words[:, 2] = np.minimum(starts + span, end)
            if reduced:
                words[:, 3:] = partials, 0, count
                words[:, 4] = np.arange(len(starts))
            found[kind].append(words)
        partials += PARTIAL_BYTES * reductions * count
    whole, rest = (np.concatenate(some) for some in found)
    return whole, rest
