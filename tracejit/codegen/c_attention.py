"""Attention as C: blocks of scores, made, used and forgotten while they are in a cache.

In: a CpuKernel with Blocks. Out: its one task and the functions of its products. Operands are
packed in memory of the chunk's, their statements evaluated on the way: keys turned, so that a
product of rows goes along vectors of keys. Scale, bias and hidden keys are one loop over a row of
scores. Ragged blocks are filled up with zeros.
"""

from __future__ import annotations

from tracejit.codegen.c_body import Body, opened
from tracejit.codegen.c_loops import Part, Task, chunk_range, unravelled
from tracejit.codegen.c_micro import Micro, Operand, called
from tracejit.codegen.c_text import block, literal, rounded, value_type
from tracejit.codegen.language import Line
from tracejit.ir.types import f64
from tracejit.records import dataclass
from tracejit.schedule.cpu import attention
from tracejit.schedule.cpu.access import extents_of
from tracejit.schedule.cpu.attention import VECTORS
from tracejit.schedule.cpu.loops import Loop
from tracejit.schedule.cpu.plan import CpuKernel
from tracejit.schedule.kernel import Axis


def attention_parts(
    lowered: CpuKernel, name: str
) -> tuple[list[Part], list[Line], list[list[Line]]]:
    """(the parts, the struct's fields, the functions of the products)."""
    a = Attention(lowered, name)
    lines = a.forward() if a.attend.is_forward else a.gradients()
    statements = [*a.stage.body, *(s for side in a.attend.sides for s in side.body)]
    arrays, offset = [Line(f"{a.type} *const working = at->working + chunk * {a.per_chunk};")], 0
    for array, size in a.arrays.items():
        arrays.append(Line(f"{a.type} *restrict const {array} = working + {offset};"))
        offset += size
    chunks = a.blocks.chunks
    body = [
        *opened(a.kernel, statements, name),
        *arrays,
        *chunk_range(a.units, chunks),
        *lines,
    ]
    task = Task(f"{name}_attention", chunks, body)
    return [Part(task, [])], [Line(f"{a.type} *working;")], list(a.functions.values())


def each(name: str, first: str, last: str, body: list[Line], *, simd: str = "") -> list[Line]:
    """A loop, with the clauses of a vector loop if they are given."""
    pragma = [Line(f"#pragma omp simd {simd}".rstrip())] if simd else []
    return [*pragma, *block(f"for (int64_t {name} = {first}; {name} < {last}; {name}++)", body)]


@dataclass
class _Product:
    """rows × width results over `depth`, which is a C expression; a: (step, k_step)."""

    rows: int
    width: int
    a: tuple[int, int]
    b_step: int
    to_step: int


class Attention(attention.Attention):
    """Attention that is printed; `functions` are those that it calls."""

    def __init__(self, lowered: CpuKernel, name: str):
        super().__init__(lowered.kernel, lowered.blocks)
        self.name = name
        self.type = value_type(self.acc)
        self.f = "" if self.acc is f64 else "f"
        self.body = Body(self.kernel, extents_of(self.kernel))
        self.functions: dict[str, list[Line]] = {}
        self.scale = literal(self.attend.scale, self.acc)

    # --- the two walks

    def forward(self) -> list[Line]:
        """Of blocks of queries."""
        m, n = self.blocks.m, self.blocks.n
        mixes = self.wants("attention")
        walk = [
            Line(f"const int64_t columns = tj_least({n}, {self.n.extent} - column);"),
            self.product(
                _Product(m, n, (self.wide_c, 1), n, n),
                str(self.c.extent),
                "some_q",
                f"turned_k + column * {self.c.extent}",
                "scores",
            ),
            *self._softened(mixes),
        ]
        if mixes:
            of = _Product(m, self.wide_d, (n, 1), self.wide_d, self.wide_d)
            v = f"all_v + column * {self.wide_d}"
            walk.append(self.product(of, "columns", "scores", v, "mix", add=True))
        unit = [
            *self.batch_axes("unit", self.row_blocks),
            Line(f"const int64_t row = unit % {self.row_blocks} * {m};"),
            Line(f"const int64_t rows = tj_least({m}, {self.m.extent} - row);"),
            *block("if (slot != packed)", [*self.keys(), Line("packed = slot;")]),
            *self.rows_of("q", "some_q", self.c, self.wide_c, "row", "rows", m),
            *each("r", "0", str(m), [Line("tops[r] = -INFINITY, sums[r] = 0;")]),
        ]
        if mixes:
            unit.append(Line(f"__builtin_memset(mix, 0, {m * self.wide_d} * sizeof(*mix));"))
        seen = self._columns_seen("row + rows")
        unit += block(f"for (int64_t column = 0; column < {seen}; column += {n})", walk)
        unit += each("r", "0", "rows", self._finished())
        return [
            Line("int64_t packed = -1;"),
            *block("for (int64_t unit = first; unit < last; unit++)", unit),
        ]

    def gradients(self) -> list[Line]:
        """Of whole batches: blocks of keys, and for each the blocks of queries that see it."""
        m, n = self.blocks.m, self.blocks.n
        slopes = "slopes" in self.arrays
        all_rows = self.all_rows
        pair = [
            Line(f"const int64_t rows = tj_least({m}, {self.m.extent} - row);"),
            self.product(
                _Product(m, n, (self.wide_c, 1), n, n),
                str(self.c.extent),
                f"all_q + row * {self.wide_c}",
                "turned_k",
                "scores",
            ),
        ]
        g = f"all_g + row * {self.wide_d}"
        if slopes:
            of = _Product(m, n, (self.wide_d, 1), n, n)
            pair.append(self.product(of, str(self.d.extent), g, "turned_v", "slopes"))
        pair += self._sloped(slopes)
        if self.wants("attention_dv"):
            of = _Product(n, self.wide_d, (1, n), self.wide_d, self.wide_d)
            pair.append(self.product(of, "rows", "scores", g, "dv", add=True))
        if self.wants("attention_dk"):
            of = _Product(n, self.wide_c, (1, n), self.wide_c, self.wide_c)
            q = f"all_q + row * {self.wide_c}"
            pair.append(self.product(of, "rows", "slopes", q, "dk", add=True))
        if self.wants("attention_dq"):
            of = _Product(m, self.wide_c, (n, 1), self.wide_c, self.wide_c)
            to = f"all_dq + row * {self.wide_c}"
            pair.append(self.product(of, "columns", "slopes", "some_k", to, add=True))
        keys = [
            Line(f"const int64_t columns = tj_least({n}, {self.n.extent} - column);"),
            *self.turned("k", "turned_k", self.c, "column", "columns"),
        ]
        if slopes:
            keys += self.turned("v", "turned_v", self.d, "column", "columns")
        if self.wants("attention_dq"):
            keys += self.rows_of("k", "some_k", self.c, self.wide_c, "column", "columns", n)
        for name, width in (("dv", self.wide_d), ("dk", self.wide_c)):
            if name in self.arrays:
                keys.append(Line(f"__builtin_memset({name}, 0, {n * width} * sizeof(*{name}));"))
        start = f"column / {m} * {m}" if self.attend.causal else "0"
        keys += block(f"for (int64_t row = {start}; row < {self.m.extent}; row += {m})", pair)
        for name, axis, width in (("dk", self.c, self.wide_c), ("dv", self.d, self.wide_d)):
            if name in self.arrays:
                line = [
                    Line(f"const int64_t {self.n.name} = column + j;"),
                    *self.stored(f"attention_{name}", axis, f"{name}[j * {width} + {{}}]"),
                ]
                keys += each("j", "0", "columns", line)
        whole = str(self.m.extent)
        unit = [
            *self.batch_axes("unit", 1),
            *self.rows_of("q", "all_q", self.c, self.wide_c, "0", whole, all_rows),
            *self.rows_of("g", "all_g", self.d, self.wide_d, "0", whole, all_rows),
            *self.numbers("lse", "all_lse"),
            *(self.numbers("delta", "all_delta") if slopes else []),
        ]
        if self.wants("attention_dq"):
            size = all_rows * self.wide_c
            unit.append(Line(f"__builtin_memset(all_dq, 0, {size} * sizeof(*all_dq));"))
        unit += block(f"for (int64_t column = 0; column < {self.n.extent}; column += {n})", keys)
        if self.wants("attention_dq"):
            place = f"all_dq[{self.m.name} * {self.wide_c} + {{}}]"
            unit += each(self.m.name, "0", whole, self.stored("attention_dq", self.c, place))
        return block("for (int64_t unit = first; unit < last; unit++)", unit)

    # --- rows of scores

    def _columns_seen(self, rows: str) -> str:
        """How many keys the queries before `rows` see."""
        return f"tj_least({rows}, {self.n.extent})" if self.attend.causal else str(self.n.extent)

    def _row_of_scores(self) -> list[Line]:
        """What a row has of a block: `s`, and how many keys it sees."""
        lines = [
            Line(f"const int64_t {self.m.name} = row + r;"),
            Line(f"{self.type} *const s = scores + r * {self.blocks.n};"),
        ]
        if not self.attend.causal:
            return [*lines, Line("const int64_t seen = columns;")]
        last = f"{self.m.name} - column + 1"
        return [
            *lines,
            Line(f"const int64_t seen = {last} < 0 ? 0 : tj_least(columns, {last});"),
        ]

    def _left(self, to: str) -> list[Line]:
        """What noise leaves of the weight `p`, in a scope of its own."""
        if not self.attend.is_noisy:
            return [Line(f"{to} = p;")]
        noise = self.attend.side("noise")
        text = self.body.operand(noise.value, self.acc)
        return block(
            "",
            [
                Line(f"const int64_t {self.n.name} = column + j;"),
                *self.body.lines(noise.body),
                Line(f"{to} = p * {text};"),
            ],
        )

    def _score(self, to: str) -> list[Line]:
        """The score of query r and key j, scaled and with its bias."""
        bias = self.attend.side("bias")
        text, lines = f"s[j] * {self.scale}", []
        if bias.body or bias.value != 0:
            lines = [
                Line(f"const int64_t {self.n.name} = column + j;"),
                *self.body.lines(bias.body),
            ]
            text = f"{text} + {self.body.operand(bias.value, self.acc)}"
        return [*lines, Line(f"const {self.type} {to} = {text};")]

    def _softened(self, mixes: bool) -> list[Line]:
        """scores ← exp(scores - the rows' maxima so far); what is summed so far is scaled to these.
        A NaN is no maximum, but each power of the row."""
        n, exp = self.blocks.n, f"tj_exp{self.f}"
        row = [
            *self._row_of_scores(),
            Line(f"{self.type} top = -INFINITY, sum = 0;"),
            *each(
                "j",
                "0",
                "seen",
                [*self._score("x"), Line("s[j] = x;"), Line("top = x > top ? x : top;")],
                simd="reduction(max:top)",
            ),
            Line("top = top > tops[r] ? top : tops[r];"),
            Line(f"const {self.type} base = top == -INFINITY ? 0 : top;"),
            *each(
                "j",
                "0",
                "seen",
                [
                    Line(f"const {self.type} p = {exp}(s[j] - base);"),
                    *(self._left("s[j]") if mixes else [Line("s[j] = p;")]),
                    Line("sum += p;"),
                ],
                simd="reduction(+:sum)",
            ),
            *each("j", "seen", str(n), [Line("s[j] = 0;")]),
            Line(f"const {self.type} less = {exp}(tops[r] - base);"),
            Line("sums[r] = sums[r] * less + sum, tops[r] = top;"),
        ]
        if mixes:
            line = f"{self.type} *const to = mix + r * {self.wide_d};"
            scaled = each("j", "0", str(self.wide_d), [Line("to[j] *= less;")], simd=" ")
            row += block("if (less != 1)", [Line(line), *scaled])
        return each("r", "0", "rows", row)

    def _finished(self) -> list[Line]:
        """The results of a row."""
        lines = [
            Line(f"const int64_t {self.m.name} = row + r;"),
            Line(f"const {self.type} total = sums[r] == 0 ? 1 : sums[r];"),
        ]
        if self.wants("attention"):
            place = f"mix[r * {self.wide_d} + {{}}] / total"
            lines += self.stored("attention", self.d, place)
        if self.wants("attention_lse"):
            text = f"(tops[r] == -INFINITY ? 0 : tops[r]) + tj_log{self.f}(total)"
            lines += self.stored("attention_lse", None, text)
        return lines

    def _sloped(self, slopes: bool) -> list[Line]:
        """scores ← the weights, and slopes ← the cotangents of the products of q and k."""
        n = self.blocks.n
        inner = [
            *self._score("x"),
            Line(f"const {self.type} p = tj_exp{self.f}(x - lse);"),
            *self._left("s[j]"),
        ]
        row = [
            *self._row_of_scores(),
            Line(f"const {self.type} lse = all_lse[{self.m.name}];"),
        ]
        rest = [Line("s[j] = 0;")]
        if slopes:
            row += [
                Line(f"{self.type} *const t = slopes + r * {n};"),
                Line(f"const {self.type} delta = all_delta[{self.m.name}];"),
            ]
            slope = "(s[j] * t[j] - p * delta)" if self.attend.is_noisy else "p * (t[j] - delta)"
            inner.append(Line(f"t[j] = {slope} * {self.scale};"))
            rest.append(Line("t[j] = 0;"))
        row += each("j", "0", "seen", inner, simd=" ")
        row += each("j", "seen", str(n), rest)
        return each("r", "0", "rows", row)

    # --- operands and results

    def batch_axes(self, unit: str, each: int) -> list[Line]:
        """`slot`, the batch of a unit, and its axes."""
        slot = unit if each == 1 else f"{unit} / {each}"
        loops = [Loop(axis) for axis in self.batch]
        return [Line(f"const int64_t slot = {slot};"), *unravelled(loops, "slot")]

    def keys(self) -> list[Line]:
        """All keys, turned block by block, and all values."""
        n = self.blocks.n
        start = f"turned_k + start * {self.c.extent}"
        count = f"tj_least({n}, {self.n.extent} - start)"
        turned = [
            Line(f"const int64_t count = {count};"),
            Line(f"{self.type} *const to = {start};"),
            *self.turned("k", "to", self.c, "start", "count"),
        ]
        lines = block(f"for (int64_t start = 0; start < {self.n.extent}; start += {n})", turned)
        if self.wants("attention"):
            whole = str(self.n.extent)
            lines += self.rows_of("v", "all_v", self.d, self.wide_d, "0", whole, self.all_columns)
        return lines

    def _line(self, name: str, along: Axis, to: str) -> list[Line]:
        """`to[…]` = a row of an operand."""
        side = self.attend.side(name)
        value = self.body.operand(side.value, self.acc)
        inner = [*self.body.lines(side.body), Line(f"{to}[{along.name}] = {value};")]
        return each(along.name, "0", str(along.extent), inner, simd=" ")

    def _of(self, name: str) -> Axis:
        return self.m if name in ("q", "g") else self.n

    def rows_of(
        self, name: str, to: str, along: Axis, width: int, first: str, count: str, filled: int
    ) -> list[Line]:
        """Rows of an operand, each of whole vectors, with zeros behind them."""
        of = self._of(name).name
        row = [
            Line(f"const int64_t {of} = {first} + i;"),
            Line(f"{self.type} *const row_of_{name} = {to} + i * {width};"),
            *self._line(name, along, f"row_of_{name}"),
        ]
        if width > along.extent:
            row += each("z", str(along.extent), str(width), [Line(f"row_of_{name}[z] = 0;")])
        rest = Line(f"{to}[z] = 0;")
        zeros = each("z", f"({count}) * {width}", str(filled * width), [rest])
        return [*each("i", "0", count, row), *zeros]

    def turned(self, name: str, to: str, along: Axis, first: str, count: str) -> list[Line]:
        """Rows of an operand as columns, as many as a block has."""
        of, n = self._of(name).name, self.blocks.n
        row = [
            Line(f"const int64_t {of} = {first} + i;"),
            Line(f"{self.type} line[{along.extent}];"),
            *self._line(name, along, "line"),
            *each("z", "0", str(along.extent), [Line(f"{to}[z * {n} + i] = line[z];")]),
        ]
        zeros = each("z", "0", str(along.extent), [Line(f"{to}[z * {n} + i] = 0;")])
        return [*each("i", "0", count, row), *each("i", count, str(n), zeros)]

    def numbers(self, name: str, to: str) -> list[Line]:
        """A number of each query."""
        side = self.attend.side(name)
        value = self.body.operand(side.value, self.acc)
        inner = [*self.body.lines(side.body), Line(f"{to}[{self.m.name}] = {value};")]
        return each(self.m.name, "0", str(self.m.extent), inner)

    def stored(self, name: str, along: Axis | None, text: str) -> list[Line]:
        """The stores of a result along an axis, where `text` has its place as {}."""
        var = self.attend.result(name)
        value = rounded(text.format(along.name if along else ""), var.dtype)
        stores = [s for s in self.stage.body if s.value == var]
        lines = [
            Line(f"const {value_type(var.dtype)} {var!r} = {value};", self.attend.where),
            *self.body.lines(stores),
        ]
        if along is None:
            return block("", lines)
        return each(along.name, "0", str(along.extent), lines, simd=" ")

    # --- products

    def product(
        self, p: _Product, depth: str, a: str, b: str, to: str, *, add: bool = False
    ) -> Line:
        """The call of the function of a product, which it defines."""
        steps = "_".join(map(str, (*p.a, p.b_step, p.to_step, min(self.blocks.rows, p.rows))))
        name = f"tj_product_{self.type}_{p.rows}x{p.width}_{steps}"
        if name not in self.functions:
            self.functions[name] = self._function(name, p)
        return Line(f"{name}({depth}, {a}, {b}, {to}, {'true' if add else 'false'});")

    def _function(self, name: str, p: _Product) -> list[Line]:
        lines, wide, start = [], p.width // self.lanes, 0
        while wide:
            vectors = min(VECTORS, wide)
            calls, rows = [Line("int64_t r = 0;")], min(self.blocks.rows, p.rows)
            for count in (rows, p.rows % rows):
                if count:
                    micro = self._micro(p, count, (self.lanes,) * vectors)
                    places = f"a + r * {p.a[0]}", f"b + {start}", f"c + r * {p.to_step} + {start}"
                    call = called(micro, self.functions, "depth", *places, "add")
                    head = f"for (; r + {count} <= {p.rows}; r += {count})"
                    calls += block(head, [Line(call)])
            lines += block("", calls)
            start, wide = start + vectors * self.lanes, wide - vectors
        kind = self.type
        head = (
            f"static void {name}(int64_t depth, const {kind} *a, const {kind} *b, {kind} *c,"
            " bool add)"
        )
        return block(head, lines)

    def _micro(self, p: _Product, rows: int, vectors: tuple[int, ...]) -> Micro:
        a, b = Operand("a", *p.a), Operand("b", 1, p.b_step)
        size, nbytes = self.acc.itemsize, self.blocks.vector_bytes
        return Micro(self.type, size, nbytes, rows, vectors, a, b, p.to_step, True)
