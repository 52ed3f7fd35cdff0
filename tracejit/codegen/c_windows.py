"""What a contraction that reads A through windows has of its own: the copy of what they read, the
tables of places, the micro-kernels that go by them, and the turning of a tile.

The element of row r and depth k is at `windows[row_places[r] + k_places[k]]`.
"""

from __future__ import annotations

from tracejit.codegen.c_body import Body
from tracejit.codegen.c_contraction import Contraction
from tracejit.codegen.c_loops import Task, unravelled
from tracejit.codegen.c_runs import in_runs, values_of_run
from tracejit.codegen.c_text import block
from tracejit.codegen.language import Line
from tracejit.schedule.cpu.digits import Digit, Digits
from tracejit.schedule.cpu.loops import Loop
from tracejit.schedule.kernel import Axis, Index


def copy_windows(c: Contraction, first: str, last: str) -> list[Line]:
    """Lines `first` … `last` of the copy, each a stretch of the fastest plane."""
    w = c.windows
    *slower, fastest = w.planes
    axes = [Axis(p.name, p.extent) for p in slower]
    body = Body(c.kernel, {**c.body.extents, **{p.name: p.extent for p in w.planes}})
    line = Digits(Axis(fastest.name, fastest.extent), (Digit(fastest.name, 1, fastest.extent),))
    value = body.operand(c.dot.a_value, c.dot.out.dtype)
    inner = [
        *unravelled([Loop(axis) for axis in axes], "line"),
        Line(f"const int64_t run = {fastest.extent};"),
        Line(f"{c.type} *const to = packed + line * run;"),
        *values_of_run(body, line, "0", w.statements, c.dot.a_value, "to", value),
    ]
    return block(f"for (int64_t line = {first}; line < {last}; line++)", inner)


def table_task(c: Contraction) -> Task:
    """The task that fills the tables of places."""
    of_rows, of_depth = _places(c)
    lines = [
        Line(f"struct {c.name} *const at = arguments;"),
        Line(f"{c.type} *const packed = at->packed;"),
        *tables(c, ""),
        *_table(c.windows.rows, of_rows, "row_places"),
        *_table(c.windows.depth, of_depth, "k_places"),
    ]
    return Task(f"{c.name}_tables", 1, lines)


def tables(c: Contraction, const: str = "const ") -> list[Line]:
    """Locals for the tables, in scratch memory behind the packed operands."""
    start = f"packed + {c.a_elements + c.b_elements}"
    return [
        Line(f"{const}int32_t *const row_places = ({const}int32_t *)({start});"),
        Line(f"{const}int32_t *const k_places = row_places + {c.m.extent};"),
    ]


def source(c: Contraction) -> Line:
    """A local for where windows read."""
    text = "packed"
    if c.tiling.a == "direct":
        text = c.windows.apart[0].buffer
    return Line(f"const {c.type} *const windows = {text};")


def _places(c: Contraction) -> tuple[Index, Index]:
    """The parts of a place that the digits of rows and of k are."""
    w = c.windows
    index = w.apart[0].index if c.tiling.a == "direct" else w.place
    of_rows = {d.name for d in w.rows.digits}
    rows = tuple((name, step) for name, step in index.terms if name in of_rows)
    depth = tuple((name, step) for name, step in index.terms if name not in of_rows)
    return Index(rows, index.offset), Index(depth)


def _table(axis: Digits, index: Index, name: str) -> list[Line]:
    """name[i] = the index at each position of an axis."""
    fastest = axis.digits[0].name
    step = dict(index.terms).get(fastest, 0)
    rest = Index(tuple(t for t in index.terms if t[0] != fastest), index.offset)
    base = " + ".join([str(rest.offset), *(f"{d} * {step}" for d, step in rest.terms)])

    def run(at: str, start: str) -> list[Line]:
        return [
            Line(f"const int64_t base = {base} + {start} * {step};"),
            Line(f"for (int64_t j = 0; j < run; j++) {name}[{at} + j] = base + j * {step};"),
        ]

    return in_runs(axis, "0", str(axis.axis.extent), run)


def turn_tile(c: Contraction) -> list[Line]:
    """`turned`, the tile with rows and columns exchanged, along which the body goes."""
    columns, step = c.tiling.tile_columns, c.turned_step
    if c.type == "float":
        return [Line(f"tj_turn_tile(turned, {step}, tile, {columns}, rows, columns);")]
    inner = f"turned[j * {step} + r] = tile[r * {columns} + j];"
    return block(
        "for (int64_t r = 0; r < rows; r++)",
        [Line(f"for (int64_t j = 0; j < columns; j++) {inner}")],
    )
