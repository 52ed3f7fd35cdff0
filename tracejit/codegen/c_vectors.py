"""C vector types, and the functions of a unit that are written in them.

The functions take sizes and steps as arguments, so that all kernels of a unit share them, and a
compiler has little to do: it need not find what is parallel. They are the turning of squares, and
the transforms of convolutions of 3 × 3 taps (formulas: schedule/cpu/winograd.py), which have 16
planes of transformed values, `plane` elements apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from functools import partial

from tracejit.codegen.c_text import C, block
from tracejit.codegen.language import Line

FOUR, THREE, TWO = range(4), range(3), range(2)
Texts = Callable[[int, int], str]  # of a row and a column


def vector_type(kind: str, nbytes: int) -> str:
    """The name of the C type of a vector of so many bytes of floats, doubles or integers."""
    return f"tj_{kind.removesuffix('_t')}_vector{nbytes}"


def declaration(function: str) -> str | None:
    """The declaration of a function that units share, out of its text; None of one that is a part
    of each function that calls it."""
    found = re.search(r"^(TJ_(?:DIRECT|FUSED) [^{]*?) \{", function, re.MULTILINE)
    return None if found is None else f"{found[1]};"


def vector_functions(vector_bytes: int, body: str, elsewhere: Collection[str]) -> list[str]:
    """The functions that `body` calls, in the order of their dependency; of those that are declared
    `elsewhere` the declarations."""
    functions: list[str] = []
    for name, made in reversed(FUNCTIONS.items()):
        if re.search(rf"\b{name}\(", "".join((body, *functions))):
            functions.insert(0, defined(made(vector_bytes), elsewhere))
    return functions


def defined(function: str, elsewhere: Collection[str]) -> str:
    """The text of a function; its declaration if it is among those of functions `elsewhere`."""
    declared = declaration(function)
    return declared if declared in elsewhere else function


def vector_types(body: str) -> str:
    """What `body` uses: the C vector types, and the marks of functions in them."""
    text = ""
    for kind, size in (("float", 4), ("double", 8), ("int64_t", 8)):
        for nbytes in (8, 16, 32, 64):
            name = vector_type(kind, nbytes)
            if f"{name} " in body:
                says = f"vector_size({nbytes}), aligned({size}), may_alias"
                text += f"typedef {kind} {name} __attribute__(({says}));\n"
    if "TJ_KEEP(" in body:
        text += _KEEP
    if re.search("TJ_(FUSED|DIRECT|WITHIN)", body):
        text += _MARKS
    return text


# A vector of B stays in its register: a compiler that loads it again for each row makes the loads
# outweigh the products.
_KEEP = """\
#if defined(__x86_64__)
#define TJ_KEEP(x) __asm__("" : "+x"(x))
#elif defined(__aarch64__)
#define TJ_KEEP(x) __asm__("" : "+w"(x))
#else
#define TJ_KEEP(x) (void)(x)
#endif
"""

# What is written in vectors needs no more than gcc's first level: the second takes twice as long,
# and finds nothing. Units that become one library share such functions, which others do not see.
_MARKS = """\
#define TJ_WITHIN __attribute__((always_inline))
#ifdef __clang__
#define TJ_DIRECT __attribute__((noinline, visibility("hidden")))
#define TJ_FUSED TJ_DIRECT
#else
#define TJ_DIRECT __attribute__((noinline, visibility("hidden"), optimize("O1")))
#define TJ_FUSED \\
  __attribute__((noinline, visibility("hidden"), \\
                 optimize("O1", "expensive-optimizations", "fp-contract=fast")))
#endif
"""


# --- the transforms, along both axes of a piece


def both_ways(
    name: str,
    texts: Texts,
    rows: int,
    columns: int,
    along: Callable[[Sequence[str]], list[str]],
    kind: str = "float",
    before: Callable[[int], list[Line]] = lambda row: [],
) -> tuple[list[Line], Texts]:
    """Lines that transform rows, then columns; `along` has the sums for the parts of one line,
    `before` what is needed of a row."""
    lines: list[Line] = []
    across: list[list[str]] = []
    for r in range(rows):
        sums = along([texts(r, column) for column in range(columns)])
        across.append([f"{name}{r}_{i}" for i in range(len(sums))])
        lines += before(r)
        lines += [
            Line(f"const {kind} {x} = {text};") for x, text in zip(across[-1], sums, strict=True)
        ]
    down = [along([line[i] for line in across]) for i in range(len(across[0]))]
    return lines, lambda r, column: down[column][r]


def of_pieces(d: Sequence[str]) -> list[str]:
    """Bᵀ d."""
    return [f"{d[0]} - {d[2]}", f"{d[1]} + {d[2]}", f"{d[2]} - {d[1]}", f"{d[1]} - {d[3]}"]


def _of_kernels(g: Sequence[str]) -> list[str]:
    """G g."""
    ends = f"({g[0]} + {g[2]})"
    return [g[0], f"0.5f * ({ends} + {g[1]})", f"0.5f * ({ends} - {g[1]})", g[2]]


def _of_products(m: Sequence[str]) -> list[str]:
    """Aᵀ m."""
    return [f"{m[0]} + ({m[1]} + {m[2]})", f"({m[1]} - {m[2]}) - {m[3]}"]


def _of_results(y: Sequence[str]) -> list[str]:
    """A y."""
    return [y[0], f"{y[0]} + {y[1]}", f"{y[0]} - {y[1]}", f"-{y[1]}"]


def _to_taps(m: Sequence[str]) -> list[str]:
    """Gᵀ m."""
    half = f"0.5f * ({m[1]} + {m[2]})"
    return [f"{m[0]} + {half}", f"0.5f * ({m[1]} - {m[2]})", f"{half} + {m[3]}"]


# --- functions


def _function(says: str, head: str, body: list[Line], kind: str = "TJ_DIRECT void") -> str:
    remark = f"/* {says} */" if len(says) < 92 else f"/* {says[:92].rpartition(' ')[0]}"
    if len(says) >= 92:
        rest = says[len(remark) - 2 :]
        remark += f"\n   {rest} */"
    return f"{remark}\n{C.render(block(f'{kind} {head}', body))}\n"


def _element(kind: str, place: str) -> str:
    return f"*(const {kind} *)({place})"


def _places(base: str, *terms: tuple[int, str]) -> str:
    """base + number * step …, without what is zero."""
    moved = (step if n == 1 else f"{n} * {step}" for n, step in terms if n)
    return " + ".join([base, *moved])


def _to_planes(kind: str, value: Texts) -> list[Line]:
    """The stores of 16 transformed values, each in a plane from `at` on. Pointers move on, as there
    are no registers for 16 places."""
    lines = [Line("float *p0 = at, *p1 = p0 + four, *p2 = p1 + four, *p3 = p2 + four;")]
    for b in FOUR:
        moves = ", ".join(f"p{a} += plane" for a in FOUR)
        lines += [Line(f"*({kind} *)p{a} = {value(a, b)};") for a in FOUR]
        lines += [Line(f"{moves};")] if b < 3 else []
    return lines


def _from_planes(kind: str, along: Callable[[Sequence[str]], list[str]]) -> tuple[list, Texts]:
    """The values that 16 products, each in a plane from `of` on, transform to."""

    def loads(a: int) -> list[Line]:
        numbers = range(4 * a, 4 * a + 4)
        return [Line(f"const {kind} q{i} = *(const {kind} *)of; of += plane;") for i in numbers]

    return both_ways("m", lambda a, b: f"q{a * 4 + b}", 4, 4, along, kind, loads)


def _turn(vector_bytes: int) -> str:
    """Rows whose numbers differ in one bit exchange the columns whose numbers differ in the same
    bit, for each bit."""
    vector, lanes = vector_type("float", vector_bytes), vector_bytes // 4
    lines = [
        Line(f"const {vector} r0_{r} = *(const {vector} *)(from + {r} * from_step);")
        for r in range(lanes)
    ]
    done, bit = 0, lanes // 2
    while bit:
        done += 1
        for r in range(lanes):
            low, high = (f"r{done - 1}_{x}" for x in (r & ~bit, r | bit))
            places = [(c & ~bit) + (r & bit) + (lanes if c & bit else 0) for c in range(lanes)]
            taken = ", ".join(map(str, places))
            shuffled = f"__builtin_shufflevector({low}, {high}, {taken})"
            lines.append(Line(f"const {vector} r{done}_{r} = {shuffled};"))
        bit //= 2
    lines += [Line(f"*({vector} *)(to + {r} * to_step) = r{done}_{r};") for r in range(lanes)]
    return _function(
        "to[c * to_step + r] = from[r * from_step + c] of a square of floats.",
        "tj_turn(float *to, int64_t to_step, const float *from, int64_t from_step)",
        lines,
        "TJ_WITHIN static inline void",
    )


def _turn_tile(vector_bytes: int) -> str:
    lanes = vector_bytes // 4
    turn = "tj_turn(to + j * to_step + r, to_step, from + r * from_step + j, from_step);"
    inner = block(f"for (int64_t j = 0; j < columns; j += {lanes})", [Line(turn)])
    return _function(
        "The same of as many squares as have the rows and columns.",
        "tj_turn_tile(float *to, int64_t to_step, const float *from, int64_t from_step,"
        " int64_t rows, int64_t columns)",
        block(f"for (int64_t r = 0; r < rows; r += {lanes})", inner),
    )


def _turn_strip(vector_bytes: int) -> str:
    lanes = vector_bytes // 4
    whole = f"if (j + {lanes} <= columns) for (; i + {lanes} <= deep; i += {lanes})"
    each = f"for (int64_t x = j; x < j + {lanes}; x++)"
    lines = [
        Line("int64_t i = 0;"),
        Line(f"{whole} tj_turn(to + i * width + j, width, from + j * step + i, step);"),
        Line("for (; i < deep; i++)"),
        Line(f"  {each} to[i * width + x] = x < columns ? from[x * step + i] : 0;"),
    ]
    return _function(
        "`deep` rows of a strip out of its columns, which lie `step` apart; zeros behind them.",
        "tj_turn_strip(float *to, int64_t width, const float *from, int64_t step, int64_t deep,"
        " int64_t columns)",
        block(f"for (int64_t j = 0; j < width; j += {lanes})", lines),
    )


def _even_and_odd(nbytes: int, r: int) -> list[Line]:
    """The elements 0, 1, 2 and 3 of each piece in line r."""
    kind, lanes, lines = vector_type("float", nbytes), nbytes // 4, []
    for start in (0, 2):
        for name, n in (("a", start), ("b", start + lanes)):
            place = f"d{r} + 2 * x + {n}"
            lines.append(Line(f"const {kind} {name}{r}_{start} = {_element(kind, place)};"))
        for odd in TWO:
            taken = ", ".join(str(2 * i + odd) for i in range(lanes))
            both = f"__builtin_shufflevector(a{r}_{start}, b{r}_{start}, {taken})"
            lines.append(Line(f"const {kind} e{r}_{start + odd} = {both};"))
    return lines


def _pieces(vector_bytes: int) -> str:
    """By vectors of pieces while there are as many; each vector is the even or the odd elements of
    two that lie side by side."""
    lines = [
        Line("const float *const d1 = d0 + line, *const d2 = d1 + line;"),
        Line("const int64_t four = 4 * plane;"),
        Line("int64_t x = 0;"),
    ]
    nbytes = vector_bytes
    while nbytes >= 8:
        kind, lanes = vector_type("float", nbytes), nbytes // 4
        sums, value = both_ways(
            "h", lambda r, c: f"e{r}_{c}", 4, 4, of_pieces, kind, partial(_even_and_odd, nbytes)
        )
        inner = [Line("float *const at = to + x;"), *sums, *_to_planes(kind, value)]
        lines += block(f"for (; x + {lanes} <= count; x += {lanes})", inner)
        nbytes //= 2
    inner = [
        Line("float *const at = to + x;"),
        Line("const bool whole = x < count;"),
        *(Line(f"const float l{r} = whole ? d{r}[2 * x + 3] : 0.0f;") for r in FOUR),
    ]

    def element(r: int, c: int) -> str:
        return f"l{r}" if c == 3 else f"d{r}[2 * x{f' + {c}' if c else ''}]"

    sums, value = both_ways("h", element, 4, 4, of_pieces)
    inner += [*sums, *_to_planes("float", value)]
    lines += block("for (; x < count + odd; x++)", inner)
    return _function(
        "Pieces side by side of 4 lines of an image, which are `line` apart but for the last one:"
        " `count`, and one whose last column is outside if the width is odd.",
        "tj_pieces(float *to, int64_t plane, const float *d0, int64_t line, const float *d3,"
        " int64_t count, bool odd)",
        lines,
    )


def _kernels(vector_bytes: int) -> str:
    kind, lanes = vector_type("float", vector_bytes), vector_bytes // 4

    def loads(y: int) -> list[Line]:
        places = [_places("g", (y, "down"), (x, "along")) for x in THREE]
        return [Line(f"const {kind} g{y}_{x} = {_element(kind, places[x])};") for x in THREE]

    sums, value = both_ways("u", lambda y, x: f"g{y}_{x}", 3, 3, _of_kernels, kind, loads)
    inner = [
        Line("const float *const g = from + i * 9 * strip + j;"),
        Line("float *const at = to + i * strip + j;"),
        *sums,
        *_to_planes(kind, value),
    ]
    lines = block(f"for (int64_t j = 0; j < strip; j += {lanes})", inner)
    return _function(
        "Kernels of some channels: [channel][tap][strip] to planes of [channel][strip].",
        "tj_kernels(float *to, int64_t plane, const float *from, int64_t strip, int64_t channels,"
        " int64_t down, int64_t along)",
        [
            Line("const int64_t four = 4 * plane;"),
            *block("for (int64_t i = 0; i < channels; i++)", lines),
        ],
    )


def _pixels(vector_bytes: int) -> str:
    kind, lanes = vector_type("float", vector_bytes), vector_bytes // 4
    lines, value = _from_planes(kind, _of_products)
    guards = {(0, 0): "", (0, 1): "if (beside) ", (1, 0): "if (below) "}
    stores = []
    for y in TWO:
        for x in TWO:
            guard = guards.get((y, x), "if (below && beside) ")
            place = _places("at", (y, "line"), (x, "step"))
            stores.append(Line(f"{guard}*({kind} *)({place}) = {value(y, x)};"))
    inner = [
        Line("const float *of = from + i * strip + j;"),
        Line("float *const at = to + i * 2 * step + j;"),
        *lines,
        *stores,
    ]
    lines = block(f"for (int64_t j = 0; j < strip; j += {lanes})", inner)
    return _function(
        "Pixels of `count` pieces side by side out of planes of [piece][strip]; whether they have a"
        " line below, and a column beside.",
        "tj_pixels(float *to, int64_t step, int64_t line, const float *from, int64_t plane,"
        " int64_t strip, int64_t count, bool below, bool beside)",
        block("for (int64_t i = 0; i < count; i++)", lines),
    )


def _results(vector_bytes: int) -> str:
    kind, lanes = vector_type("float", vector_bytes), vector_bytes // 4
    conditions = {(0, 0): "", (0, 1): "beside", (1, 0): "below"}
    loads = []
    for y in TWO:
        for x in TWO:
            text = _element(kind, _places("g", (y, "line"), (x, "strip")))
            condition = conditions.get((y, x), "below && beside")
            text = f"{condition} ? {text} : ({kind}){{0}}" if condition else text
            loads.append(Line(f"const {kind} g{y}_{x} = {text};"))
    sums, value = both_ways("h", lambda y, x: f"g{y}_{x}", 2, 2, _of_results, kind)
    inner = [
        Line("const float *const g = from + i * 2 * strip + j;"),
        Line("float *const at = to + i * strip + j;"),
        *loads,
        *sums,
        *_to_planes(kind, value),
    ]
    lines = block(f"for (int64_t j = 0; j < strip; j += {lanes})", inner)
    return _function(
        "Gradients of the results of `count` pieces side by side, to planes of [piece][strip].",
        "tj_results(float *to, int64_t plane, const float *from, int64_t line, int64_t strip,"
        " int64_t count, bool below, bool beside)",
        [
            Line("const int64_t four = 4 * plane;"),
            *block("for (int64_t i = 0; i < count; i++)", lines),
        ],
    )


def _taps(vector_bytes: int) -> str:
    kind, lanes = vector_type("float", vector_bytes), vector_bytes // 4
    lines, value = _from_planes(kind, _to_taps)
    stores = [
        Line(f"*({kind} *)({_places('at', (y, 'down'), (x, 'along'))}) = {value(y, x)};")
        for y in THREE
        for x in THREE
    ]
    inner = [
        Line("const float *of = from + i * strip + j;"),
        Line("float *const at = to + i * 9 * step + j;"),
        *lines,
        *stores,
    ]
    lines = block(f"for (int64_t j = 0; j < strip; j += {lanes})", inner)
    return _function(
        "Taps of some channels out of planes of [channel][strip], to [channel][tap][step].",
        "tj_taps(float *to, int64_t step, const float *from, int64_t plane, int64_t strip,"
        " int64_t channels, int64_t down, int64_t along)",
        block("for (int64_t i = 0; i < channels; i++)", lines),
    )


# In dependency order.
FUNCTIONS: dict[str, Callable[[int], str]] = {
    "tj_turn": _turn,
    "tj_turn_tile": _turn_tile,
    "tj_turn_strip": _turn_strip,
    "tj_pieces": _pieces,
    "tj_kernels": _kernels,
    "tj_pixels": _pixels,
    "tj_results": _results,
    "tj_taps": _taps,
}
