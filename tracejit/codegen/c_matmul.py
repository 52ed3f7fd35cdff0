"""A contraction as C: tiles of the result, and the rest of the stage's body over each while hot.

Six ways: tiles dealt to threads, after a task that packs the operands where that is needed; tiles
that pack their own part of B; tiles that read A through windows; convolutions by transforms; slices
of k dealt to threads, for results much smaller than the operands; and one loop along k per result,
for products with a vector. The reductions of the body go along.
"""

from __future__ import annotations

from collections.abc import Sequence

from tracejit.codegen.c_body import Body, opened
from tracejit.codegen.c_contraction import Contraction
from tracejit.codegen.c_loops import (
    Part,
    Task,
    chunk_range,
    combined,
    is_independent,
    nested,
    partial_fields,
    under,
    vector_loop,
)
from tracejit.codegen.c_micro import tile
from tracejit.codegen.c_pack import pack_a, pack_b, pack_task
from tracejit.codegen.c_reduce import Fold, fold_of, lanes_of
from tracejit.codegen.c_runs import all_digits, in_runs
from tracejit.codegen.c_text import block, rounded, value_type
from tracejit.codegen.c_windows import source, table_task, tables, turn_tile
from tracejit.codegen.c_winograd import winograd_tasks
from tracejit.codegen.language import Line
from tracejit.ir.ops import OPS
from tracejit.ir.types import f32, f64
from tracejit.schedule.cpu.access import fixed_and_moving
from tracejit.schedule.cpu.loops import BLOCK, split
from tracejit.schedule.cpu.tiles import PANEL_DEPTH
from tracejit.schedule.kernel import Axis, Compute, Reduce, Statement, Store, Var


def contraction_parts(c: Contraction) -> tuple[list[Part], list[Line], list[list[Line]]]:
    """(the parts, the struct's fields, the functions of the micro-kernels)."""
    folds = [fold_of(s) for s in c.stage.body if isinstance(s, Reduce)]
    tiles = c.row_tiles * c.column_tiles
    way = c.tiling.way
    chunks = c.tiling.chunks if way != "dots" else 1  # of what reduces
    fields, after = [], []
    for f in folds:
        fields += partial_fields(f, chunks)
        after += combined(f, chunks)
    if not c.batches * tiles:  # an empty result: nothing but the reductions' neutral values
        for f in folds:
            after.insert(0, Line(f"at->p{f.name}[0] = {f.neutral};"))
        return [Part(None, after)], fields, []
    if way == "dots":
        fields.append(Line(f"{c.type} *packed;"))
        return _dots(c, folds, after), fields, []
    if way == "winograd":
        fields.append(Line(f"{c.type} *packed;"))
        tasks, micros = winograd_tasks(c, folds, _epilogue(c, folds))
        packs = [pack_task(c)] if c.a_units + c.b_units else []
        parts = [Part(task, []) for task in (*packs, *tasks)]
        parts[-1].after += after
        return parts, fields, micros
    micros, tile_lines = tile(c)
    if way == "slices":
        fields.append(Line(f"{c.type} *packed;"))
        return _sliced(c, folds, tile_lines, after), fields, micros
    tile_lines += _epilogue(c, folds)
    tile_task = Task(f"{c.name}_tiles", chunks, _tiles_head(c, chunks, folds, tile_lines))
    parts = []
    if c.per_batch:
        fields.append(Line(f"{c.type} *packed;"))
        if c.windows is not None:
            parts.append(Part(table_task(c), []))
        parts.append(Part(pack_task(c), []))
    parts.append(Part(tile_task, after))
    if c.rounds > 1:
        fields.append(Line("int64_t round;"))
    return parts, fields, micros


def _sliced(c: Contraction, folds: list, tile_lines: list[Line], after: list[Line]) -> list[Part]:
    """The parts where k is dealt to threads: the sums of all slices, then the epilogue."""
    k, b = c.k.extent, c.tiling
    size = b.tile_rows * b.tile_columns
    statements = (*c.dot.a, *c.dot.b)
    lines = [
        *opened(c.kernel, statements, c.name),
        Line(f"{c.type} *const packed = at->packed;"),
        Line(f"{c.type} *const tile = packed + {c.per_batch} + chunk * {size};"),
        Line(f"const int64_t low = chunk * {k} / {c.tiling.slices};"),
        Line(f"const int64_t high = (chunk + 1) * {k} / {c.tiling.slices};"),
    ]
    if c.slices_of_panels:
        aligned = f"__attribute__((aligned({b.vector_bytes})))"
        wide = c.strips * c.strip
        lines.append(Line(f"{c.type} panel[{PANEL_DEPTH} * {wide}] {aligned};"))
        lines.append(Line(f"{c.type} rows_of_a[{c.m.extent} * {PANEL_DEPTH}];"))
    elif c.tiling.packed_from < c.strips:
        count = c.strips - c.tiling.packed_from
        packing = pack_b(c, "part", "low", "high")
        lines += block(f"for (int64_t part = 0; part < {count}; part++)", packing)
    if c.a_elements:
        m, of_k = ("0", str(c.m.extent)), ("low", "high")
        lines += pack_a(c, m, of_k)
    lines += [
        Line(f"const int64_t row = 0, column = 0, rows = {c.m.extent};"),
        Line(f"const int64_t columns = {c.n.extent};"),
        *([] if c.passes else [Line("const int64_t depth = low, deep = high - low;")]),
        *tile_lines,
    ]
    slices = Part(Task(f"{c.name}_slices", c.tiling.slices, lines), [])
    return [slices, _rest(c, folds, after, c.per_batch)]


def _rest(c: Contraction, folds: list, after: list[Line], place: int) -> Part:
    """The epilogue over the whole result, which lies in scratch memory from `place` on."""
    chunks = c.tiling.chunks if c.tiling.way == "slices" else 1
    dealt, whole = (c.n, c.m) if c.turned else (c.m, c.n)
    names = ("column", "row") if c.turned else ("row", "column")
    extent, step = dealt.extent, 1 if c.turned else c.tiling.tile_columns
    last = f"(chunk + 1) * {extent} / {chunks}" if chunks > 1 else str(extent)
    inner = [
        *opened(c.kernel, c.stage.body, c.name),
        Line(
            f"const int64_t {names[0]} = {f'chunk * {extent} / {chunks}' if chunks > 1 else '0'},"
            f" {names[0]}s = {last} - {names[0]};"
        ),
        Line(f"const int64_t {names[1]} = 0, {names[1]}s = {whole.extent};"),
        Line(f"{c.type} *const tile = at->packed + {place} + {names[0]} * {step};"),
        *(_summed(c, -(-extent // chunks)) if c.turned else []),
        *(Line(f"{f.total} r{f.name} = {f.neutral};") for f in folds),
        *_epilogue(c, folds),
        *(Line(f"at->p{f.name}[chunk] = r{f.name};") for f in folds),
    ]
    return Part(Task(f"{c.name}_rest", chunks, inner), after)


def _summed(c: Contraction, columns: int) -> list[Line]:
    """The sums of all slices in the tile of the first one, and room for a tile that is turned."""
    b, place = c.tiling, f"r * {c.tiling.tile_columns} + j"
    others = [f"tile[{place} + {i * b.tile_rows * b.tile_columns}]" for i in range(1, b.slices)]
    inner = [Line(f"for (int64_t j = 0; j < columns; j++) tile[{place}] += {' + '.join(others)};")]
    return [
        *block("for (int64_t r = 0; r < rows; r++)", inner),
        Line(f"{c.type} turned[{-(-columns // c.lanes) * c.lanes * c.turned_step}];"),
    ]


def _dots(c: Contraction, folds: list, after: list[Line]) -> list[Part]:
    """The parts where each result is a sum along k, in vector lanes."""
    m, n, count = c.m, c.n, c.m.extent * c.n.extent
    statements, folded = _products(c)
    loop = [Line(f"{folded.total} r{folded.name} = {folded.neutral};")]
    inner = vector_loop(c.body, statements, c.k, BLOCK, [folded])
    loop += nested(split([c.k], c.k, BLOCK), inner)
    loop.append(Line(f"at->packed[unit] = r{folded.name};"))
    axes = [Line(f"const int64_t {m.name} = {'0' if m.extent == 1 else 'unit'};")]
    axes.append(Line(f"const int64_t {n.name} = {'unit' if m.extent == 1 else '0'};"))
    chunks = c.tiling.chunks
    lines = [
        *opened(c.kernel, statements, c.name),
        *chunk_range(count, chunks),
        *block("for (int64_t unit = first; unit < last; unit++)", axes + loop),
    ]
    return [Part(Task(f"{c.name}_dots", chunks, lines), []), _rest(c, folds, after, 0)]


def _products(c: Contraction) -> tuple[list[Statement], Fold]:
    """Both prologues and the product of their values, and its sum."""
    dot, wide = c.dot, f64 if c.type == "double" else f32
    product, total = Var(1_000_000, wide), Var(1_000_001, wide)
    statements = [
        *dot.a,
        *dot.b,
        Compute(product, OPS["mul"], (dot.a_value, dot.b_value), (), dot.where),
    ]
    return statements, fold_of(Reduce(total, OPS["reduce_sum"], product, dot.where))


def _tiles_head(c: Contraction, chunks: int, folds: list, tile_lines: list[Line]) -> list[Line]:
    """The body of the task over tiles."""
    tiles = c.row_tiles * c.column_tiles
    loads = [load for load in (c.a_load, c.b_load) if load is not None]
    if c.panels:
        loads += c.dot.b
    if c.windows is not None and c.tiling.a == "direct":
        loads += c.dot.a
    lines = [*opened(c.kernel, [*loads, *c.stage.body], c.name)]
    if c.per_batch:
        lines.append(Line(f"const {c.type} *const packed = at->packed;"))
    lines += chunk_range(c.round * tiles, chunks)
    several = c.round < c.batches
    for f in folds:
        start = f"at->round ? at->p{f.name}[chunk] : {f.neutral}" if several else f.neutral
        lines.append(Line(f"{f.total} r{f.name} = {start};"))
    b = c.tiling
    aligned = f"__attribute__((aligned({c.tiling.vector_bytes})))"
    if c.windows is not None:
        lines += [source(c), *tables(c)]
    rows = c.turned_step if c.turned else b.tile_rows
    lines.append(Line(f"{c.type} tile[{rows} * {b.tile_columns}] {aligned};"))
    if c.turned:
        lines.append(Line(f"{c.type} turned[{b.tile_columns} * {rows}] {aligned};"))
    if c.panels:
        lines.append(Line(f"{c.type} panel[{PANEL_DEPTH} * {b.tile_columns}] {aligned};"))
    inner = c.batch_of("unit", tiles)
    place = "unit" if c.row_tiles == 1 and not c.batch else f"unit % {tiles}"
    if c.column_tiles == 1:
        inner.append(Line(f"const int64_t row = {place} * {b.tile_rows}, column = 0;"))
    else:
        # columns are the outer loop: a thread keeps its own part of B in its cache
        inner.append(
            Line(
                f"const int64_t row = {place} % {c.row_tiles} * {b.tile_rows},"
                f" column = {place} / {c.row_tiles} * {b.tile_columns};"
            )
        )
    inner.append(Line(f"const int64_t rows = tj_least({b.tile_rows}, {c.m.extent} - row);"))
    inner.append(
        Line(f"const int64_t columns = tj_least({b.tile_columns}, {c.n.extent} - column);")
    )
    lines += block("for (int64_t unit = first; unit < last; unit++)", inner + tile_lines)
    lines += [Line(f"at->p{f.name}[chunk] = r{f.name};") for f in folds]
    return lines


def _epilogue(c: Contraction, folds: list) -> list[Line]:
    """The rest of the stage's body over a finished tile, row by row, or column by column of a tile
    that is turned."""
    b, dot = c.tiling, c.dot
    across, along, first, start = c.m, c.n, "row", "column"
    name, step, counts = "tile", b.tile_columns, ("rows", "columns")
    if c.turned:
        across, along, first, start = c.n, c.m, "column", "row"
        name, step, counts = "turned", c.turned_step, ("columns", "rows")
    kind = value_type(dot.out.dtype)

    def value(place: str) -> Line:
        places = [f"r * {step} + {place}"]
        for i in range(1, b.slices if not c.turned else 1):
            places.append(f"r * {step} + {place} + {i * b.tile_rows * b.tile_columns}")
        text = " + ".join(f"{name}[{place}]" for place in places)
        text = f"({text})" if len(places) > 1 else text
        if c.type != kind:
            text = f"({kind}){text}"
        return Line(f"const {kind} {dot.out!r} = {rounded(text, dot.out.dtype)};", dot.where)

    def loop(body: Body, statements: Sequence[Statement], head: str, inner: list[Line], axis: Axis):
        fixed, statements = fixed_and_moving(statements, axis, [dot.out])
        inner += body.lines(s for s in statements if not isinstance(s, Store))
        lanes = lanes_of(folds, body)
        inner += lanes.steps
        inner += body.lines(s for s in statements if isinstance(s, Store))
        pragma = []
        if is_independent(statements, axis.name):
            pragma = [Line(" ".join(["#pragma omp simd", *lanes.clauses]))]
        lines = [*lanes.before, *pragma, *block(head, inner), *lanes.after]
        return under(body.lines(fixed), lines)

    lines = [Line(f"const int64_t {across.name} = {first} + r;")]
    apart = c.apart((across, along), c.stage.body)
    if apart is None:
        inner = [Line(f"const int64_t {along.name} = {start} + c;"), value("c")]
        head = f"for (int64_t c = 0; c < {counts[1]}; c++)"
        lines += loop(c.body, c.stage.body, head, inner, along)
    else:
        of_across, of_along = apart.axes

        def run(at: str, begin: str) -> list[Line]:
            fastest = of_along.digits[0]
            inner = [
                Line(f"const int64_t {fastest.name} = {begin} + j;"),
                value(f"({at} - {start}) + j"),
            ]
            head = "for (int64_t j = 0; j < run; j++)"
            axis = Axis(fastest.name, fastest.extent)
            return loop(apart.body, apart.statements, head, inner, axis)

        lines += all_digits(of_across, across.name)
        lines += in_runs(of_along, start, f"{start} + {counts[1]}", run)
    lines = block(f"for (int64_t r = 0; r < {counts[0]}; r++)", lines)
    return [*(turn_tile(c) if c.turned else []), *lines]
