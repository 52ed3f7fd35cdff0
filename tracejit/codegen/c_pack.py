"""Packing of a contraction's operands into scratch memory, their prologues evaluated on the way.

A keeps the order of its memory where that is along k; else it becomes strips of a micro-kernel's
rows, [strip][k][rows]. B becomes strips of whole vectors, [strip][k][columns], padded with zeros;
where it lies along k, it is turned in small squares.
"""

from __future__ import annotations

from collections.abc import Callable

from tracejit.codegen.c_body import opened
from tracejit.codegen.c_contraction import Apart, Contraction
from tracejit.codegen.c_loops import Task, chunk_range
from tracejit.codegen.c_runs import all_digits, in_runs, values_of_run
from tracejit.codegen.c_text import block
from tracejit.codegen.c_windows import copy_windows
from tracejit.codegen.language import Line
from tracejit.schedule.cpu.access import contiguity
from tracejit.schedule.cpu.digits import Digits, run_score
from tracejit.schedule.cpu.tiles import PACKED_DEPTH, PACKED_ROWS, PANEL_DEPTH, plain
from tracejit.schedule.kernel import Axis

ACROSS = 64  # of k that are turned from rows to columns at a time
STRIPS_WIDTH = 256  # rows of A that are dealt to strips at a time


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
        at_once, count = PACKED_ROWS, rows.extent
        if c.windows is not None:
            at_once, count = c.lines_at_once, c.copied_lines
        first = f"(part - {b_units}) * {at_once}" if b_units else f"part * {at_once}"
        last = f"tj_least(start + {at_once}, {count})"
        if c.windows is not None:
            packing = copy_windows(c, "start", last)
        else:
            some, whole = ("start", last), ("0", str(rest.extent))
            packing = pack_a(c, *((some, whole) if c.tiling.a == "rows" else (whole, some)))
        packing = [Line(f"const int64_t start = {first};"), *packing]
        inner += block(f"if (part >= {b_units})", packing) if b_units else packing
    lines += chunk_range(c.round * each, c.tiling.pack_chunks)
    lines += block("for (int64_t unit = first; unit < last; unit++)", inner)
    return Task(f"{c.name}_pack", c.tiling.pack_chunks, lines)


def pack_a(c: Contraction, rows: tuple[str, str], depths: tuple[str, str]) -> list[Line]:
    """Some rows of A at some of k, evaluated in the order of its memory; in strips all rows."""
    if c.tiling.a == "strips":
        return _pack_strips(c, *depths)
    start = f"packed + {c.m.name} * {c.a_step}{c.slot}"
    line = _line_of_a(c, c.m, c.k, depths, lambda place: f"{start} + {place}")
    return block(_each(c.m.name, *rows), line)


def _pack_strips(c: Contraction, first: str, last: str) -> list[Line]:
    """The strips of A at `first` … `last` of k. Lines of memory are read first, and dealt to strips
    from where they lie side by side: strips are far apart, and would drive each other out of a
    cache."""
    k, rows = c.k, c.tiling.rows
    wide = rows * max(1, STRIPS_WIDTH // rows)
    ends = ("start_row", f"tj_least(start_row + {wide}, {c.m.extent})")
    start = f"lines + ({k.name} - from) * {wide}"
    line = _line_of_a(c, k, c.m, ends, lambda place: f"{start} + ({place} - start_row)")
    deal = [
        Line(
            f"{c.type} *const to = packed + (start_row + r) * {k.extent} + from * {rows}{c.slot};"
        ),
        Line(
            f"for (int64_t i = 0; i < end - from; i++)"
            f" __builtin_memcpy(to + i * {rows}, lines + i * {wide} + r, {rows * c.size});"
        ),
    ]
    within = f"r < {wide} && start_row + r < {c.m.extent}"
    of_block = [
        *block(_each(k.name, "from", "end"), line),
        *block(f"for (int64_t r = 0; {within}; r += {rows})", deal),
    ]
    of_k = [
        Line(f"const int64_t end = tj_least(from + {PACKED_ROWS}, {last});"),
        *block(
            f"for (int64_t start_row = 0; start_row < {c.m.extent}; start_row += {wide})", of_block
        ),
    ]
    return [
        Line(f"{c.type} lines[{PACKED_ROWS * wide}];"),
        *block(f"for (int64_t from = {first}; from < {last}; from += {PACKED_ROWS})", of_k),
    ]


def _line_of_a(
    c: Contraction, outer: Axis, inner: Axis, ends: tuple[str, str], to: Callable[[str], str]
) -> list[Line]:
    """*to(i) = A at each place i between `ends` of the inner axis."""
    value = c.body.operand(c.dot.a_value, c.dot.out.dtype)
    apart = c.apart((outer, inner), c.dot.a)
    if apart is not None:
        of_outer, of_inner = apart.axes

        def run(at: str, start: str) -> list[Line]:
            return [
                Line(f"{c.type} *const to = {to(at)};"),
                *values_of_run(
                    apart.body, of_inner, start, apart.statements, c.dot.a_value, "to", value
                ),
            ]

        return [*all_digits(of_outer, outer.name), *in_runs(of_inner, *ends, run)]
    lines = [*c.body.lines(c.dot.a), Line(f"*({to(inner.name)}) = {value};")]
    return [Line("#pragma omp simd"), *block(_each(inner.name, *ends), lines)]


def pack_rows(c: Contraction) -> list[Line]:
    """The part of all rows of A that a pass over `deep` of k from `depth` needs."""
    start = f"rows_of_a + {c.m.name} * {PANEL_DEPTH}"
    ends = ("depth", "depth + deep")
    line = _line_of_a(c, c.m, c.k, ends, lambda place: f"{start} + ({place} - depth)")
    return block(_each(c.m.name, "0", str(c.m.extent)), line)


def _each(name: str, first: str, last: str) -> str:
    return f"for (int64_t {name} = {first}; {name} < {last}; {name}++)"


def pack_panel(c: Contraction) -> list[Line]:
    """The part of B that a tile needs for `deep` of k from `depth`, in strips of `panel`."""
    apart = c.over_digits((c.n, c.k), c.dot.b)
    if _reads_across(c, apart):
        return _panel_along_n(c, apart)
    lines = [
        Line(f"{c.type} *const to = panel + strip * {PANEL_DEPTH};"),
        Line("const int64_t start = column + strip;"),
        Line(f"const int64_t count = tj_least({c.strip}, {c.n.extent} - start);"),
        *_along_k(c, apart, "depth", "depth + deep"),
    ]
    return block(f"for (int64_t strip = 0; strip < columns; strip += {c.strip})", lines)


def _panel_along_n(c: Contraction, apart: Apart) -> list[Line]:
    """Row by row: all columns of the tile in the order of memory, and then dealt to strips."""
    k, width, (of_n, of_k) = c.k.name, c.strip, apart.axes

    def run(at: str, start: str) -> list[Line]:
        return _run_of_b(c, apart, of_n, start, f"line + ({at} - column)")

    ragged = c.n.extent % width
    lines = [
        *all_digits(of_k, k),
        *in_runs(of_n, "column", "column + columns", run),
        *([Line(f"for (int64_t j = columns; j % {width}; j++) line[j] = 0;")] if ragged else []),
        Line(
            f"for (int64_t strip = 0; strip < columns; strip += {width}) __builtin_memcpy("
            f"panel + strip * {PANEL_DEPTH} + ({k} - depth) * {width}, line + strip,"
            f" {width * c.size});"
        ),
    ]
    return [
        Line(f"{c.type} line[{-(-c.tiling.tile_columns // width) * width}];"),
        *block(f"for (int64_t {k} = depth; {k} < depth + deep; {k}++)", lines),
    ]


def _reads_across(c: Contraction, apart: Apart) -> bool:
    """Whether a strip of B is read along n rather than along k."""
    (of_n, of_k), statements = apart.axes, apart.statements
    return run_score(of_n, statements, c.strip) >= run_score(of_k, statements, ACROSS)


def _run_of_b(c: Contraction, apart: Apart, axis: Digits, start: str, to: str) -> list[Line]:
    value = c.body.operand(c.dot.b_value, c.dot.out.dtype)
    return [
        Line(f"{c.type} *const row = {to};"),
        *values_of_run(apart.body, axis, start, apart.statements, c.dot.b_value, "row", value),
    ]


def _along_n(c: Contraction, apart: Apart, first: str, last: str) -> list[Line]:
    """The rows `first` … `last` of a strip, `to`, row by row."""
    k, width, (of_n, of_k) = c.k.name, c.strip, apart.axes
    each = f"for (int64_t {k} = {first}; {k} < {last}; {k}++)"

    def run(at: str, start: str) -> list[Line]:
        to = f"to + ({k} - ({first})) * {width} + ({at} - start)"
        return block(each, [*all_digits(of_k, k), *_run_of_b(c, apart, of_n, start, to)])

    zero = f"for (int64_t j = count; j < {width}; j++) to[({k} - ({first})) * {width} + j] = 0;"
    fill = block(each, [Line(zero)])
    ragged = block("if (count < " + str(width) + ")", fill) if c.n.extent % width else []
    return [*in_runs(of_n, "start", "start + count", run), *ragged]


def _along_k(c: Contraction, apart: Apart, first: str, last: str) -> list[Line]:
    """The same column by column, turned in small squares."""
    of_n, of_k = apart.axes

    def run(at: str, start: str) -> list[Line]:
        return _run_of_b(c, apart, of_k, start, f"rows + c * {ACROSS} + ({at} - from)")

    column = [
        *all_digits(of_n, "start + c"),
        *in_runs(of_k, "from", f"tj_least(from + {ACROSS}, end)", run),
    ]
    body = [
        *block("for (int64_t c = 0; c < count; c++)", column),
        Line(f"const int64_t deep = tj_least({ACROSS}, end - from);"),
        *_turned(c, f"to + (from - ({first})) * {c.strip}", "rows", str(ACROSS), "count"),
    ]
    return [
        Line(f"{c.type} rows[{c.strip} * {ACROSS}];"),
        Line(f"const int64_t end = {last};"),
        *block(f"for (int64_t from = {first}; from < end; from += {ACROSS})", body),
    ]


def _turned(c: Contraction, to: str, source: str, step: str, columns: str) -> list[Line]:
    """`deep` rows of a strip from `to` on, out of its columns, which lie `step` apart."""
    width = c.strip
    if c.type == "float":
        return [Line(f"tj_turn_strip({to}, {width}, {source}, {step}, deep, {columns});")]
    place = f"({to})[i * {width} + x]"
    one = f"{place} = x < {columns} ? {source}[x * {step} + i] : 0;"
    each = f"for (int64_t x = 0; x < {width}; x++)"
    return [Line(f"for (int64_t i = 0; i < deep; i++) {each} {one}")]


def _packed_part(c: Contraction, k_parts: int) -> list[Line]:
    """The strip of B, and the rows of it, that a unit of packing says."""
    if k_parts == 1:
        return pack_b(c, "part", "0", str(c.k.extent))
    return [
        Line(f"const int64_t low = part % {k_parts} * {PACKED_DEPTH};"),
        Line(f"const int64_t high = tj_least(low + {PACKED_DEPTH}, {c.k.extent});"),
        *pack_b(c, f"part / {k_parts}", "low", "high"),
    ]


def pack_b(c: Contraction, number: str, low: str, high: str, to: str = "") -> list[Line]:
    """The rows `low` … `high` of the strip of B of a number, counted from the first packed: in its
    place among the packed operands, or from `to` on."""
    k, n, width = c.k.name, c.n.name, c.strip
    of_strip = to or f"packed + {c.a_elements}{c.slot} + {number} * {width * c.k.extent}"
    first = low if to else "0"  # the row that lies there
    apart = c.apart((c.n, c.k), c.dot.b)
    if apart is not None:
        across = _reads_across(c, apart)
        return [
            Line(f"{c.type} *const to = {of_strip} + ({low} - {first}) * {width};"),
            Line(f"const int64_t start = ({number} + {c.tiling.packed_from}) * {width};"),
            Line(f"const int64_t count = tj_least({width}, {c.n.extent} - start);"),
            *(_along_n if across else _along_k)(c, apart, low, high),
        ]
    lines = [
        Line(f"{c.type} *const strip = {of_strip};"),
        Line(f"const int64_t start = ({number} + {c.tiling.packed_from}) * {width};"),
        Line(f"const int64_t columns = tj_least({width}, {c.n.extent} - start);"),
    ]
    along_k = f"for (int64_t {k} = {low}; {k} < {high}; {k}++)"
    value = c.body.operand(c.dot.b_value, c.dot.out.dtype)
    inner = [*c.body.lines(c.dot.b)]
    if contiguity(c.n, c.dot.b) >= contiguity(c.k, c.dot.b):
        inner = [Line(f"const int64_t {n} = start + j;"), *inner]
        inner.append(Line(f"strip[({k} - {first}) * {width} + j] = {value};"))
        loop = [
            Line("#pragma omp simd"),
            *block("for (int64_t j = 0; j < columns; j++)", inner),
            Line(
                f"for (int64_t j = columns; j < {width}; j++)"
                f" strip[({k} - {first}) * {width} + j] = 0;"
            ),
        ]
        return lines + block(along_k, loop)
    # B lies along k: small squares are transposed, straight from memory if B is a plain load
    load, lines_of = plain(c.dot.b, c.dot.b_value, c.acc, k), []
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
    body = [
        Line(f"const int64_t deep = tj_least({ACROSS}, {high} - from);"),
        *lines_of,
        Line(f"const {c.type} *const source = {source};"),
        *_turned(c, f"strip + (from - {first}) * {width}", "source", str(step), "columns"),
    ]
    return lines + block(f"for (int64_t from = {low}; from < {high}; from += {ACROSS})", body)
