"""The inner part of a contraction: micro-kernels that keep a block of the result in registers.

A micro-kernel reads A element by element, whatever its strides, and B by whole vectors, from a
packed strip or from where it lies. It may fuse a product and a sum into one rounding: the order of
a contraction's sums is not eager's either.
"""

from __future__ import annotations

from tracejit.codegen.c_contraction import Contraction
from tracejit.codegen.c_pack import pack_panel, pack_rows
from tracejit.codegen.c_text import block
from tracejit.codegen.c_vectors import vector_type
from tracejit.codegen.language import Line
from tracejit.records import dataclass
from tracejit.schedule.cpu.registers import accumulators, keeps_b, vectors_of
from tracejit.schedule.cpu.tiles import PANEL_DEPTH


@dataclass(frozen=True)
class Operand:
    """Where an operand starts, and its steps along its own axis and along k; `first_step`, along
    its own axis from one micro-kernel to the next, where that differs; `by_table` where tables say
    both."""

    text: str
    step: int
    k_step: int
    first_step: int | None = None
    by_table: bool = False


@dataclass(frozen=True)
class Strips:
    """Strips of one kind: which ones (a C condition), the lanes of their vectors, and their B."""

    condition: str
    vectors: tuple[int, ...]
    b: Operand


def tile(c: Contraction) -> tuple[list[list[Line]], list[Line]]:
    """The micro-kernels' functions, and the lines that compute one tile."""
    micros: dict[str, list[Line]] = {}
    a, kinds = _a(c), _strips(c)
    inner: list[Line] = []
    for number, kind in enumerate(kinds):
        panels = _panels(c, micros, a, kind)
        if len(kinds) == 1:
            inner = panels
        elif number + 1 < len(kinds):
            inner += block(f"{'else ' if number else ''}if ({kind.condition})", panels)
        else:
            inner += block("else", panels)
    lines = block(f"for (int64_t strip = 0; strip < columns; strip += {c.strip})", inner)
    if c.passes:
        (first, last), most = _passes(c), c.depth
        deep = Line(f"const int64_t deep = tj_least({most}, {last} - depth);")
        packing = [*(pack_panel(c) if c.panels else []), *(pack_rows(c) if _own_rows(c) else [])]
        lines = [deep, *packing, *lines]
        lines = block(f"for (int64_t depth = {first}; depth < {last}; depth += {most})", lines)
    return list(micros.values()), lines


def _passes(c: Contraction) -> tuple[str, str]:
    """From where to where of k the passes of a tile go."""
    return ("low", "high") if c.tiling.way == "slices" else ("0", str(c.k.extent))


def _own_rows(c: Contraction) -> bool:
    """Whether each pass packs its own part of A."""
    return c.slices_of_panels and c.a_load is None


def _a(c: Contraction) -> Operand:
    m, k = c.m, c.k
    if _own_rows(c):
        return Operand("rows_of_a", PANEL_DEPTH, 1)
    if c.windows is not None:
        return Operand("windows", 1, 1, by_table=True)
    if c.a_load is None:
        steps = (c.a_step, 1) if c.tiling.a == "rows" else (1, c.tiling.rows)
        return Operand(f"packed{c.slot}", *steps, first_step=c.a_step)
    step = dict(c.a_load.index.terms)
    fixed = c.body.index(c.a_load.index, {m.name: "0", k.name: "0"})
    return Operand(f"{c.a_load.buffer} + {fixed}", step.get(m.name, 0), step.get(k.name, 0))


def _strips(c: Contraction) -> list[Strips]:
    """Whole strips read directly, whole strips from packed memory (all, or the ragged last one),
    and a last strip of fewer vectors."""
    place = "column + strip"
    if c.panels:
        from_panel = Operand(f"panel + strip * {PANEL_DEPTH}", 1, c.strip)
        return strip_kinds(c, place, from_panel, from_panel)
    number = f"(({place}) / {c.strip} - {c.tiling.packed_from})"
    address = f"packed + {c.a_elements}{c.slot} + {number} * {c.strip * c.k.extent}"
    packed = direct = Operand(address, 1, c.strip)
    if c.b_load is not None:
        fixed = c.body.index(c.b_load.index, {c.n.name: "0", c.k.name: "0"})
        k_step = dict(c.b_load.index.terms).get(c.k.name, 0)
        direct = Operand(f"{c.b_load.buffer} + {fixed} + {place}", 1, k_step)
    return strip_kinds(c, place, packed, direct)


def strip_kinds(
    c: Contraction, place: str, packed: Operand, direct: Operand | None = None
) -> list[Strips]:
    """The strips whose first column is `place`, by kind: those of B where it lies, packed ones, the
    last one."""
    vectors = (c.lanes,) * c.tiling.vectors
    whole, rest = divmod(c.n.extent, c.strip)
    last_vectors = vectors_of(rest, c.lanes, c.size)
    if last_vectors == vectors:
        whole, rest = whole + 1, 0
    unpacked = min(c.tiling.packed_from, whole)
    kinds = []
    if unpacked:
        kinds.append(Strips(f"{place} < {unpacked * c.strip}", vectors, direct))
    if whole > unpacked:
        kinds.append(Strips(f"{place} < {whole * c.strip}", vectors, packed))
    if rest:
        last = packed if c.tiling.packed_from < c.strips else direct
        kinds.append(Strips(f"{place} == {whole * c.strip}", last_vectors, last))
    return kinds


def _panels(c: Contraction, micros: dict[str, list[Line]], a: Operand, kind: Strips) -> list[Line]:
    """All rows of a tile under one strip."""
    rows, extent = c.tiling.rows, c.m.extent
    partial = c.passes or c.tiling.way == "slices"  # of k
    depth = "deep" if partial else str(c.k.extent)
    add = f"depth > {_passes(c)[0]}" if c.passes else "false"
    within = partial and not c.panels  # the panel starts where the pass does
    b_from = f"{kind.b.text} + depth * {kind.b.k_step}" if within else kind.b.text
    step = a.step if a.first_step is None else a.first_step
    a_from = f"{a.text} + (row + r) * {step}" + (
        f" + depth * {a.k_step}" if partial and not _own_rows(c) else ""
    )
    if a.by_table:
        a_from = f"{a.text}, row_places + row + r, k_places + depth"
    lines = [Line(f"const {c.type} *const b = {b_from};"), Line("int64_t r = 0;")]

    def call(count: int) -> str:
        micro = micro_of(c, count, kind.vectors, a, kind.b)
        to = f"tile + r * {c.tiling.tile_columns} + strip"
        return called(micro, micros, depth, a_from, "b", to, add)

    # where strips are narrow, registers hold the sums of several blocks of rows
    room = accumulators(c.tiling.vector_bytes) // len(kind.vectors) // rows
    whole = a.first_step is None and not a.by_table and c.few_registers
    tall = rows * room if whole else rows
    if tall > rows and extent >= tall:
        lines += block(f"for (; r + {tall} <= rows; r += {tall})", [Line(call(tall))])
    if extent >= rows:
        lines += block(f"for (; r + {rows} <= rows; r += {rows})", [Line(call(rows))])
    if extent % rows:
        lines.append(Line(f"if (r < rows) {call(extent % rows)}"))
    return lines


def micro_of(c: Contraction, rows: int, vectors: tuple[int, ...], a: Operand, b: Operand) -> Micro:
    """The micro-kernel of a contraction for `rows` rows and such vectors."""
    to_step, adds = c.tiling.tile_columns, c.passes
    return Micro(c.type, c.size, c.tiling.vector_bytes, rows, vectors, a, b, to_step, adds)


@dataclass(frozen=True)
class Micro:
    """A micro-kernel: the C type of its numbers and their bytes, rows, the lanes of its vectors,
    its operands, from one row of the result to the next, whether it may add to what is there."""

    type: str
    size: int
    vector_bytes: int
    rows: int
    vectors: tuple[int, ...]
    a: Operand
    b: Operand
    to_step: int
    adds: bool

    @property
    def name(self) -> str:
        """Of its function, which all kernels of a unit share: of what the function's text depends
        on. Steps along k and of the result are arguments."""
        block = "x".join(map(str, (self.rows, *self.vectors)))
        of_a = "table" if self.a.by_table else str(self.a.step).replace("-", "back")
        return f"tj_micro_{self.type}_{block}_{of_a}{'_adds' if self.adds else ''}"


def called(
    m: Micro, functions: dict[str, list[Line]], depth: str, a: str, b: str, to: str, add: str
) -> str:
    """The call of a micro-kernel, whose function is among `functions` then; `a`: where it lies, and
    its tables."""
    if m.name not in functions:
        functions[m.name] = micro_kernel(m)
    of_a = a if m.a.by_table else f"{a}, {m.a.k_step}"
    of_sum = f", {add}" if m.adds else ""
    return f"{m.name}({depth}, {of_a}, {b}, {m.b.k_step}, {to}, {m.to_step}{of_sum});"


def micro_kernel(m: Micro) -> list[Line]:
    """The function of a micro-kernel: sums over `depth` of the products of A and B."""
    rows, vectors, a = m.rows, m.vectors, m.a
    kinds = [vector_type(m.type, lanes * m.size) for lanes in vectors]
    starts = [sum(vectors[:j]) for j in range(len(vectors))]
    sums = [[f"c{r}_{j}" for j in range(len(vectors))] for r in range(rows)]
    lines = [
        Line(" ".join(f"{kind} {x} = {{0}};" for kind, x in zip(kinds, row, strict=True)))
        for row in sums
    ]
    inner = [
        Line(f"{kind} b{j} = *(const {kind} *)(b + {start});")
        for j, (kind, start) in enumerate(zip(kinds, starts, strict=True))
    ]
    most = accumulators(m.vector_bytes)
    if keeps_b(rows, len(kinds), most) and m.type != "int64_t":
        inner += [Line(f"TJ_KEEP(b{j});") for j in range(len(kinds))]
    for r, row in enumerate(sums):
        element = f"a{r}[place]" if a.by_table else f"a[{r * a.step}]"
        inner.append(Line(" ".join(f"{x} += {element} * b{j};" for j, x in enumerate(row))))
    if a.by_table:
        lines += [Line(f"const {m.type} *const a{r} = a + row_places[{r}];") for r in range(rows)]
        inner.insert(0, Line("const int64_t place = k_places[k];"))
    steps = "b += b_step" if a.by_table else "a += a_step, b += b_step"
    lines += block(f"for (int64_t k = 0; k < depth; k++, {steps})", inner)
    places = {
        x: f"*({kinds[j]} *)(c{f' + {r} * c_step' if r else ''} + {starts[j]})"
        for r, row in enumerate(sums)
        for j, x in enumerate(row)
    }
    if m.adds:
        lines += block("if (add)", [Line(f"{x} += {place};") for x, place in places.items()])
    lines += [Line(f"{place} = {x};") for x, place in places.items()]
    of_a = f"const {m.type} *a, int64_t a_step"
    if a.by_table:
        of_a = f"const {m.type} *a, const int32_t *row_places, const int32_t *k_places"
    head = (
        f"TJ_FUSED void {m.name}(int64_t depth, {of_a}, const {m.type} *b, int64_t b_step,"
        f" {m.type} *c, int64_t c_step{', bool add' if m.adds else ''})"
    )
    return block(head, lines)
