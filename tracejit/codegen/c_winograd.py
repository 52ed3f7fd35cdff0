"""Convolutions of 3 × 3 taps by transforms, as tasks: 16 products of matrices between them.

The operands are packed as for any contraction that reads through windows: planes of the image with
its edges, and strips of B. Forward, a task packs and transforms the kernels, and nothing else reads
them; each unit, some pairs of lines
of the images, transforms its pieces, multiplies, and transforms back into a tile of pixels by
channels, over which the rest of the stage's body goes. For weight gradients a unit is some
channels: it transforms pieces of the image and of the results' gradients, adds up their products,
and transforms back into a tile of taps by channels. Formulas and sizes: schedule/cpu/winograd.py.
"""

from __future__ import annotations

from collections.abc import Callable

from tracejit.codegen.c_body import opened
from tracejit.codegen.c_contraction import Contraction
from tracejit.codegen.c_loops import Task, chunk_range
from tracejit.codegen.c_micro import Operand, called, micro_of, strip_kinds
from tracejit.codegen.c_pack import pack_b
from tracejit.codegen.c_runs import digit_lines
from tracejit.codegen.c_text import block
from tracejit.codegen.c_vectors import FOUR, both_ways, of_pieces
from tracejit.codegen.c_windows import source
from tracejit.codegen.language import Line
from tracejit.schedule.cpu.digits import Digit
from tracejit.schedule.cpu.tiles import PANEL_DEPTH
from tracejit.schedule.kernel import Load

PACKED = 16  # channels of kernels that are packed at a time


def winograd_tasks(
    c: Contraction, folds: list, epilogue: list[Line]
) -> tuple[list[Task], list[list[Line]]]:
    """The tasks that follow the packing, and the functions of the micro-kernels."""
    micros: dict[str, list[Line]] = {}
    inner = (_results if c.winograd.in_k else _gradients)(c, micros, epilogue)
    tasks = [_kernels(c)] if c.winograd.in_k else []
    tasks.append(Task(f"{c.name}_tiles", c.winograd.chunks, _units(c, folds, inner)))
    return tasks, list(micros.values())


# --- tasks


def _kernels(c: Contraction) -> Task:
    """The task that transforms the kernels: some channels of a strip of B at a time, which are
    packed for that and stay in the cache."""
    w, strip = c.winograd, c.strip
    blocks = -(-w.channels // PACKED)
    plane, of = w.kernel_plane(c.strips * strip), f"kernels + {_tap(c, 0, 0) * strip}"
    call = f"tj_kernels(to, {plane}, {of}, {strip}, high - low, {_tap_steps(c, strip)});"
    inner = [
        Line(f"const int64_t number = unit / {blocks}, low = unit % {blocks} * {PACKED};"),
        Line(f"const int64_t high = tj_least(low + {PACKED}, {w.channels});"),
        Line("const int64_t first_tap = low * 9, last_tap = high * 9;"),
        *block("", pack_b(c, "number", "first_tap", "last_tap", "kernels")),
        Line(
            f"{c.type} *const to = packed + {c.per_batch}"
            f" + (number * {w.channels} + low) * {strip};"
        ),
        Line(call),
    ]
    chunks = min(c.strips * blocks, w.chunks)
    aligned = f"__attribute__((aligned({c.tiling.vector_bytes})))"
    task = [
        *opened(c.kernel, c.dot.b, c.name),
        Line(f"{c.type} *const packed = at->packed;"),
        Line(f"{c.type} kernels[{PACKED * 9 * strip}] {aligned};"),
        *chunk_range(c.strips * blocks, chunks),
        *block("for (int64_t unit = first; unit < last; unit++)", inner),
    ]
    return Task(f"{c.name}_kernels", chunks, task)


def _units(c: Contraction, folds: list, inner: list[Line]) -> list[Line]:
    """The body of the task over units."""
    w, aligned = c.winograd, f"__attribute__((aligned({c.tiling.vector_bytes})))"
    loads = [s for s in c.dot.a if isinstance(s, Load)] if c.tiling.a == "direct" else []
    start = c.per_batch + w.shared_elements(c.strips, c.strip)
    room = w.chunk_elements(c.strips, c.strip)
    rows = c.turned_step if c.turned else c.tiling.tile_rows
    lines = [
        *opened(c.kernel, [*loads, *c.stage.body], c.name),
        Line(f"{c.type} *const packed = at->packed;"),
        source(c),
        *chunk_range(w.units, w.chunks),
        *(Line(f"{f.total} r{f.name} = {f.neutral};") for f in folds),
        Line(f"{c.type} *const pieces = packed + {start} + chunk * {room};"),
        Line(f"{c.type} tile[{rows} * {c.tiling.tile_columns}] {aligned};"),
    ]
    if c.turned:
        lines.append(Line(f"{c.type} turned[{c.tiling.tile_columns} * {rows}] {aligned};"))
    lines += block("for (int64_t unit = first; unit < last; unit++)", inner)
    return lines + [Line(f"at->p{f.name}[chunk] = r{f.name};") for f in folds]


def _results(c: Contraction, micros: dict[str, list[Line]], epilogue: list[Line]) -> list[Line]:
    """A unit of results: pairs of lines of the images, strip by strip."""
    w, strip = c.winograd, c.strip
    products = f"pieces + {16 * w.piece_plane}"
    of_strip = [
        *_strip_range(c),
        Line(f"{c.type} *const products = {products};"),
        *_multiplied(c, micros),
        *_back_to_pixels(c),
        *epilogue,
    ]
    return [
        Line(f"const int64_t pair = unit * {w.pairs_at_once};"),
        Line(f"const int64_t pairs = tj_least({w.pairs_at_once}, {w.pairs} - pair);"),
        Line(f"const int64_t row = {_line_at(c, 'pair')};"),
        Line(f"const int64_t rows = {_line_at(c, '(pair + pairs)')} - row;"),
        Line(f"const int64_t count = pairs * {w.across};"),
        Line(f"const int64_t start = 0, channels = {w.channels};"),
        *_pieces(c),
        *block(f"for (int64_t column = 0; column < {c.n.extent}; column += {strip})", of_strip),
    ]


def _gradients(c: Contraction, micros: dict[str, list[Line]], epilogue: list[Line]) -> list[Line]:
    """A unit of weight gradients: some channels, over all images."""
    w, strip = c.winograd, c.strip
    results = f"pieces + {16 * w.piece_plane}"
    products = f"pieces + {16 * (w.piece_plane + w.result_plane(strip))}"
    step = 16 * w.product_plane(strip)
    of_strip = [
        Line(f"{c.type} *const products = {products} + column / {strip} * {step};"),
        *_result_pieces(c),
        *_multiplied(c, micros),
    ]
    of_pairs = [
        Line(f"const int64_t pairs = tj_least({w.pairs_at_once}, {w.pairs} - pair);"),
        Line(f"const int64_t count = pairs * {w.across};"),
        *_pieces(c),
        Line(f"{c.type} *const results = {results};"),
        *block(f"for (int64_t column = 0; column < {c.n.extent}; column += {strip})", of_strip),
    ]
    back = [
        *_strip_range(c),
        Line(f"const {c.type} *const products = {products} + column / {strip} * {step};"),
        *_back_to_taps(c),
        *epilogue,
    ]
    at_once = w.channels_at_once
    return [
        Line(f"const int64_t start = unit * {at_once};"),
        Line(f"const int64_t channels = tj_least({at_once}, {w.channels} - start);"),
        Line("const int64_t row = start * 9, rows = channels * 9;"),
        *block(f"for (int64_t pair = 0; pair < {w.pairs}; pair += {w.pairs_at_once})", of_pairs),
        *block(f"for (int64_t column = 0; column < {c.n.extent}; column += {strip})", back),
    ]


def _strip_range(c: Contraction) -> list[Line]:
    return [Line(f"const int64_t columns = tj_least({c.strip}, {c.n.extent} - column);")]


def _line_at(c: Contraction, pair: str) -> str:
    """The first pixel of a pair of lines."""
    w = c.winograd
    if w.height % 2 == 0:
        return f"{pair} * {2 * w.width}"
    down, size = w.down, w.width * w.height
    return f"({pair} / {down} * {size} + {pair} % {down} * {2 * w.width})"


def _each_piece(c: Contraction, of_pieces: Callable[[int, int, str], Line]) -> list[Line]:
    """The lines of the pieces of a pair of lines, `of_pieces` some of them: the first, how many,
    whether they have a second column. The last one of an odd width has none."""
    whole, odd = divmod(c.winograd.width, 2)
    lines = [of_pieces(0, whole, "true")] if whole else []
    return lines + ([of_pieces(whole, 1, "false")] if odd else [])


def _below(c: Contraction) -> list[Line]:
    """`below`: whether a pair of lines has a second one."""
    w = c.winograd
    inside = f"(pair + p) % {w.down} < {w.down - 1}" if w.height % 2 else "true"
    return [Line(f"const bool below = {inside};")]


# --- pieces of images


def _channels_inside(c: Contraction) -> bool:
    """Whether channels lie side by side in memory, rather than pixels."""
    return c.winograd.steps[0] != 1


def _pieces(c: Contraction) -> list[Line]:
    """The transformed pieces of `pairs` pairs of lines from `pair`, of `channels` channels from
    `start`: [16][channels][pieces], or [16][pieces][channels] where these lie side by side."""
    w = c.winograd
    plane = w.piece_plane
    digits = [Digit(d.name, d.unit // 9, d.extent) for d in w.taps.digits[2:]]
    of_channel = digit_lines(digits, "channel")
    per_image = w.width * w.height
    of_image = [Digit(d.name, d.unit // per_image, d.extent) for d in w.image.digits[2:]]
    of_line = [
        Line(f"const int64_t image = (pair + p) / {w.down}, y = (pair + p) % {w.down};"),
        *digit_lines(of_image, "image"),
    ]
    corner = [
        Line(f"const {c.type} *const d0 = windows + {_corner(c)};"),
        Line(f"const {c.type} *const d3 = {_last_line(c)};"),
    ]
    whole, odd = divmod(w.width, 2)
    if not _channels_inside(c):
        to = f"pieces + (channel - start) * {w.pieces} + p * {w.across}"
        flag = "true" if odd else "false"
        call = f"tj_pieces({to}, {plane}, d0, {w.steps[1]}, d3, {whole}, {flag});"
        inner = block("for (int64_t p = 0; p < pairs; p++)", [*of_line, *corner, Line(call)])
        each = "for (int64_t channel = start; channel < start + channels; channel++)"
        return block(each, [*of_channel, *inner])

    lines = [Line(f"const {c.type} *const d{r} = d0 + {r * w.steps[1]};") for r in (1, 2)]

    def transformed(last: bool) -> list[Line]:
        def element(r: int, column: int) -> str:
            outside = last and column == 3
            return "0.0f" if outside else f"d{r}[x * {2 * w.steps[0]} + {column * w.steps[0]}]"

        sums, value = both_ways("h", element, 4, 4, of_pieces)
        stores = [
            Line(f"to[{(a * 4 + b) * plane} + channel] = {value(a, b)};")
            for a in FOUR
            for b in FOUR
        ]
        return [*sums, *stores]

    def over_channels(last: bool) -> list[Line]:
        each = "for (int64_t channel = start; channel < start + channels; channel++)"
        to = f"pieces + (p * {w.across} + x) * {w.channels_at_once} - start"
        return [
            Line(f"{c.type} *const to = {to};"),
            Line("#pragma omp simd"),
            *block(each, [*of_channel, *corner, *lines, *transformed(last)]),
        ]

    inner = [*of_line, *block(f"for (int64_t x = 0; x < {whole}; x++)", over_channels(False))]
    if odd:
        inner += block("", [Line(f"const int64_t x = {whole};"), *over_channels(True)])
    return block("for (int64_t p = 0; p < pairs; p++)", inner)


def _corner(c: Contraction) -> str:
    """Where the piece of column 0 of a pair of lines starts."""
    w = c.winograd
    index = c.windows.apart[0].index if c.tiling.a == "direct" else c.windows.place
    taps = {d.name for d in w.taps.digits[:2]}
    of_x, of_y = (d.name for d in w.image.digits[:2])
    known = {of_x: "0", of_y: "2 * y", **dict.fromkeys(taps, "0")}
    back = sum(2 * step for step, flip in zip(w.steps, w.flipped, strict=True) if flip)
    terms = [f"{known.get(str(name), str(name))} * {step}" for name, step in index.terms]
    terms = [t for t in terms if not t.startswith("0 *")]
    return " + ".join([*terms, f"({index.offset - back})"])


def _last_line(c: Contraction) -> str:
    """The last line of a piece: another one where an odd image ends before it. What it gives
    belongs to no result."""
    w = c.winograd
    step = w.steps[1]
    if w.height % 2 == 0:
        return f"d0 + {3 * step}"
    return f"d0 + (y == {w.down - 1} ? {2 * step} : {3 * step})"


def _result_pieces(c: Contraction) -> list[Line]:
    """The transformed pieces of the results' gradients, [16][pieces][strip], out of the packed
    strip of B at `column`."""
    w, strip = c.winograd, c.strip
    plane = w.result_plane(strip)
    lines = [
        Line(f"const {c.type} *const g = from + {_line_at(c, '(pair + p)')} * {strip};"),
        Line(f"{c.type} *const to = results + p * {w.across * strip};"),
        *_below(c),
    ]

    def of_pieces(x: int, count: int, beside: str) -> Line:
        to, of = (f"{name} + {n * strip}" if n else name for name, n in (("to", x), ("g", 2 * x)))
        sizes = f"{w.width * strip}, {strip}, {count}"
        return Line(f"tj_results({to}, {plane}, {of}, {sizes}, below, {beside});")

    lines += _each_piece(c, of_pieces)
    start = f"packed + {c.a_elements} + column * {c.k.extent}"
    return [
        Line(f"const {c.type} *const from = {start};"),
        *block("for (int64_t p = 0; p < pairs; p++)", lines),
    ]


# --- products, and back


def _multiplied(c: Contraction, micros: dict[str, list[Line]]) -> list[Line]:
    """`products`, [16][rows][strip], of the pieces and the transformed B of a strip. Those of
    weight gradients are added up over the pieces."""
    w, strip = c.winograd, c.strip
    gradients = not w.in_k
    # a: one step from a row to the next, one along the depth
    of_pieces = (w.channels_at_once, 1) if _channels_inside(c) else (1, w.pieces)
    steps = of_pieces[::-1] if gradients else of_pieces
    a = Operand("pieces", *steps)
    b = Operand("", 1, strip)
    if gradients:
        b_from = f"results + part * {w.result_plane(strip)}"
        deep, first, add = "count", "0", "pair > 0"
        extents = {min(w.channels_at_once, w.channels), w.channels % w.channels_at_once}
        there = "channels"
    else:
        plane = w.kernel_plane(c.strips * strip)
        place = f"part * {plane} + (column / {strip} * {w.channels} + depth) * {strip}"
        b_from = f"packed + {c.per_batch} + {place}"
        deep, first, add = "deep", "depth", "depth > 0"
        extents = {w.pieces, w.pairs % w.pairs_at_once * w.across}
        there = "count"
    a_from = f"pieces + part * {w.piece_plane} + r * {steps[0]} + {first} * {steps[1]}"
    most = c.tiling.rows
    kinds = strip_kinds(c, "column", b)

    def panels(vectors: tuple[int, ...]) -> list[Line]:
        def call(count: int) -> str:
            micro = micro_of(c, count, vectors, a, b)
            to = f"products + part * {w.product_plane(strip)} + r * {strip}"
            return called(micro, micros, deep, a_from, "b", to, add)

        found = [Line("int64_t r = 0;")]
        if max(extents) >= most:
            found += block(f"for (; r + {most} <= {there}; r += {most})", [Line(call(most))])
        rests = sorted({extent % most for extent in extents} - {0})
        for rest in rests:
            found.append(Line(f"if ({there} - r == {rest}) {call(rest)}"))
        return found

    inner = [Line(f"const {c.type} *const b = {b_from};")]
    for number_of, kind in enumerate(kinds):
        if len(kinds) == 1:
            inner += panels(kind.vectors)
        else:
            head = "else" if number_of else f"if ({kind.condition})"
            inner += block(head, panels(kind.vectors))
    lines = block("for (int64_t part = 0; part < 16; part++)", inner)
    if gradients:
        return lines
    if w.channels <= PANEL_DEPTH:
        return [Line(f"const int64_t depth = 0, deep = {w.channels};"), *lines]
    deep = Line(f"const int64_t deep = tj_least({PANEL_DEPTH}, {w.channels} - depth);")
    head = f"for (int64_t depth = 0; depth < {w.channels}; depth += {PANEL_DEPTH})"
    return block(head, [deep, *lines])


def _back_to_pixels(c: Contraction) -> list[Line]:
    """The tile of pixels by channels, out of the products of their pieces."""
    w, strip = c.winograd, c.strip
    step = c.tiling.tile_columns
    plane = w.product_plane(strip)

    def of_pieces(x: int, count: int, beside: str) -> Line:
        to = f"to + {x * 2 * step}" if x else "to"
        of = f"of + {x * strip}" if x else "of"
        sizes = f"{plane}, {strip}, {count}"
        return Line(f"tj_pixels({to}, {step}, {w.width * step}, {of}, {sizes}, below, {beside});")

    inner = [
        Line(f"{c.type} *const to = tile + ({_line_at(c, '(pair + p)')} - row) * {step};"),
        Line(f"const {c.type} *const of = products + p * {w.across * strip};"),
        *_below(c),
        *_each_piece(c, of_pieces),
    ]
    return block("for (int64_t p = 0; p < pairs; p++)", inner)


def _back_to_taps(c: Contraction) -> list[Line]:
    """The tile of taps by channels, out of the sums of products."""
    w, strip = c.winograd, c.strip
    step = c.tiling.tile_columns
    plane, to = w.product_plane(strip), f"tile + {_tap(c, 0, 0) * step}"
    steps = _tap_steps(c, step)
    return [Line(f"tj_taps({to}, {step}, products, {plane}, {strip}, channels, {steps});")]


def _tap(c: Contraction, y: int, x: int) -> int:
    """The number of the tap at a line and a column of a piece."""
    flip_x, flip_y = c.winograd.flipped
    return (2 - y if flip_y else y) * 3 + (2 - x if flip_x else x)


def _tap_steps(c: Contraction, step: int) -> str:
    """From one tap to the one below and the one beside, where taps are `step` apart."""
    first = _tap(c, 0, 0)
    return ", ".join(str((tap - first) * step) for tap in (_tap(c, 1, 0), _tap(c, 0, 1)))
