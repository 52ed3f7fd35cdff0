"""Kernels that sort as C: a row's items are made, sorted, and their places stored.

In: a CpuKernel whose first stage ends with a Sort. Out: its one task.
"""

from __future__ import annotations

from tracejit.codegen.c_body import Body, opened
from tracejit.codegen.c_loops import Part, Task, parallel
from tracejit.codegen.c_text import block
from tracejit.codegen.language import Line
from tracejit.ir.types import f64, i64
from tracejit.schedule.cpu.access import extents_of
from tracejit.schedule.cpu.loops import Loop
from tracejit.schedule.cpu.plan import CpuKernel
from tracejit.schedule.cpu.sorting import chunk_bytes, key_bits


def sort_parts(lowered: CpuKernel, name: str) -> tuple[list[Part], list[Line]]:
    """The parts of a kernel that sorts, and the fields that its struct needs."""
    kernel, bits = lowered.kernel, key_bits(lowered.kernel)
    values, ordered = kernel.stages
    sort, body = kernel.sort, Body(kernel, extents_of(kernel))
    (along,), count = values.axes, 1
    kind = {f64: "f64", i64: "i64"}.get(sort.value.dtype)
    kind = kind or ("f32" if sort.value.dtype.is_float else "i32")
    key = f"tj_key_{kind}({body.operand(sort.value, sort.value.dtype)})"
    make = f"items[{along.name}] = tj_make{bits}({'~' * sort.descending}{key}, {along.name});"
    lines = [Line("#pragma omp simd")]
    lines += _loop(along.name, along.extent, [*body.lines(values.body), Line(make, sort.where)])
    place = "0"
    for axis in ordered.axes:
        count, place = axis.extent, axis.name
    found = f"tj_sort{bits}(items, items + {along.extent}, {along.extent}, {count})"
    if sort.topk:
        found = f"tj_topk{bits}(items, {along.extent}, {count}, {int(sort.topk == 'sorted')})"
    lines.append(Line(f"const tj_item{bits} *const order = {found};"))
    stored = [
        Line(f"const int64_t {sort.out!r} = tj_place{bits}(order[{place}]);"),
        *body.lines(ordered.body),
    ]
    if ordered.axes:
        lines += _loop(place, count, stored)
    else:
        lines += stored
    units, lines = parallel([Loop(a) for a in kernel.axes], lines, lowered.outer.chunks)
    statements = [*values.body, *ordered.body]
    mine = f"(void *)((char *)at->working + chunk * {chunk_bytes(kernel)})"
    task = Task(
        f"{name}_sort",
        lowered.outer.chunks,
        [
            *opened(lowered.in_memory, statements, name),
            Line(f"tj_item{bits} *const items = {mine};"),
            *units,
            *lines,
        ],
    )
    return [Part(task, [])], [Line("void *working;")]


def _loop(name: str, count: int, lines: list[Line]) -> list[Line]:
    return block(f"for (int64_t {name} = 0; {name} < {count}; {name}++)", lines)
