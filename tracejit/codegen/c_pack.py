"""Packing of a contraction's operands into scratch memory, their prologues evaluated on the way.

A keeps the order of its memory. B becomes strips of whole vectors, [strip][k][columns], padded with
zeros; where it lies along k, it is turned in small squares.
"""

from __future__ import annotations

from tracejit.codegen.c_body import opened
from tracejit.codegen.c_contraction import Contraction
from tracejit.codegen.c_loops import Task, chunk_range
from tracejit.codegen.c_text import block
from tracejit.codegen.language import Line
from tracejit.schedule.cpu.access import contiguity
from tracejit.schedule.cpu.tiles import PACKED_DEPTH, PACKED_ROWS, plain

ACROSS = 64  # of k that are turned from rows to columns at a time


def pack_task(c: Contraction) -> Task:
    """The task that packs the operands of all batches of a round."""
    a_units, b_units = c.a_units, c.b_units
    each = a_units + b_units
    lines = [*opened(c.kernel, (*c.dot.a, *c.dot.b), c.name)]
    lines.append(Line(f"{c.type} *const packed = at->packed;"))
    inner = c.batch_of("unit", each)
    inner.append(Line(f"const int64_t part = unit % {each};"))
    if b_units:
        head = f"if (part < {b_units})" if a_units else ""
        packing = _packed_part(c, c.k_parts)
        inner += block(head, packing) if head else packing
    if a_units:
        rows, rest = (c.m, c.k) if c.tiling.a == "rows" else (c.k, c.m)
        first = f"(part - {b_units}) * {PACKED_ROWS}" if b_units else f"part * {PACKED_ROWS}"
        last = f"tj_least(start + {PACKED_ROWS}, {rows.extent})"
        packing = [
            Line(f"const int64_t start = {first};"),
            *pack_a(
                c,
                f"start; {rows.name} < {last}",
                f"0; {rest.name} < {rest.extent}",
            ),
        ]
        inner += block(f"if (part >= {b_units})", packing) if b_units else packing
    lines += chunk_range(c.round * each, c.tiling.pack_chunks)
    lines += block("for (int64_t unit = first; unit < last; unit++)", inner)
    return Task(f"{c.name}_pack", c.tiling.pack_chunks, lines)


def pack_a(c: Contraction, rows: str, columns: str) -> list[Line]:
    """Some rows of A, evaluated in the order of its memory; `rows` and `columns` are the limits
    of the two loops."""
    outer, inner = (c.m, c.k) if c.tiling.a == "rows" else (c.k, c.m)
    target = f"packed[{outer.name} * {inner.extent} + {inner.name}{c.slot}]"
    lines = [
        *c.body.lines(c.dot.a),
        Line(f"{target} = {c.body.operand(c.dot.a_value, c.dot.out.dtype)};"),
    ]
    loop = block(f"for (int64_t {inner.name} = {columns}; {inner.name}++)", lines)
    simd = Line("#pragma omp simd")
    return block(f"for (int64_t {outer.name} = {rows}; {outer.name}++)", [simd, *loop])


def _packed_part(c: Contraction, k_parts: int) -> list[Line]:
    """The strip of B, and the rows of it, that a unit of packing says."""
    if k_parts == 1:
        return pack_b(c, "part", "0", str(c.k.extent))
    return [
        Line(f"const int64_t low = part % {k_parts} * {PACKED_DEPTH};"),
        Line(f"const int64_t high = tj_least(low + {PACKED_DEPTH}, {c.k.extent});"),
        *pack_b(c, f"part / {k_parts}", "low", "high"),
    ]


def pack_b(c: Contraction, number: str, low: str, high: str) -> list[Line]:
    """The rows `low` … `high` of the strip of B of a number, counted from the first packed."""
    k, n, width = c.k.name, c.n.name, c.strip
    lines = [
        Line(
            f"{c.type} *const strip = packed + {c.a_elements}{c.slot}"
            f" + {number} * {width * c.k.extent};"
        ),
        Line(f"const int64_t start = ({number} + {c.tiling.packed_from}) * {width};"),
        Line(f"const int64_t columns = tj_least({width}, {c.n.extent} - start);"),
    ]
    along_k = f"for (int64_t {k} = {low}; {k} < {high}; {k}++)"
    value = c.body.operand(c.dot.b_value, c.dot.out.dtype)
    inner = [*c.body.lines(c.dot.b)]
    if contiguity(c.n, c.dot.b) >= contiguity(c.k, c.dot.b):
        inner = [Line(f"const int64_t {n} = start + j;"), *inner]
        inner.append(Line(f"strip[{k} * {width} + j] = {value};"))
        loop = [
            Line("#pragma omp simd"),
            *block("for (int64_t j = 0; j < columns; j++)", inner),
            Line(f"for (int64_t j = columns; j < {width}; j++) strip[{k} * {width} + j] = 0;"),
        ]
        return lines + block(along_k, loop)
    # B lies along k: small squares are transposed, straight from memory if B is a plain load
    lanes, load, lines_of = c.lanes, plain(c.dot.b, c.dot.b_value, c.acc, k), []
    if load is not None:
        source = f"{load.buffer} + {c.body.index(load.index, {n: 'start', k: 'from'})}"
        step = dict(load.index.terms).get(n, 0)
    else:
        source, step = "rows", ACROSS
        inner.append(Line(f"rows[j * {ACROSS} + {k} - from] = {value};"))
        fill = [
            Line(f"const int64_t {n} = start + j;"),
            Line("#pragma omp simd"),
            *block(f"for (int64_t {k} = from; {k} < from + deep; {k}++)", inner),
        ]
        lines.append(Line(f"{c.type} rows[{width} * {ACROSS}];"))
        lines_of = block("for (int64_t j = 0; j < columns; j++)", fill)
    squares = [Line("int64_t i = 0;")]
    if c.type == "float":
        head = f"if (j + {lanes} <= columns) for (; i + {lanes} <= deep; i += {lanes})"
        to = f"strip + (from + i) * {width} + j"
        squares.append(Line(f"{head} tj_turn({to}, {width}, source + j * {step} + i, {step});"))
    one = f"strip[(from + i) * {width} + to] = to < columns ? source[to * {step} + i] : 0;"
    rest = f"for (; i < deep; i++) for (int64_t to = j; to < j + {lanes}; to++) {one}"
    body = [
        Line(f"const int64_t deep = tj_least({ACROSS}, {high} - from);"),
        *lines_of,
        Line(f"const {c.type} *const source = {source};"),
        *block(f"for (int64_t j = 0; j < {width}; j += {lanes})", [*squares, Line(rest)]),
    ]
    return lines + block(f"for (int64_t from = {low}; from < {high}; from += {ACROSS})", body)
