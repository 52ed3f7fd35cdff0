"""A plan's kernels in phases, step after step, as one Triton kernel: several steps in one launch.

Programs go round: in each phase a program takes every so many of those that the phase's kernels
would have alone. Between phases all wait for each other. Buffers and scalars of each step are found
in a row of a table in device memory:

    table:  int32 counter of the barrier | int64 steps | int64 first phase | int64 last phase + 1
    row:    the address of each buffer of the kernel, in order | its scalars | padding to 16 bytes

A launch of one phase of one step has no barrier: phases can be run one by one where programs do not
run at the same time, as in Triton's interpreter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from tracejit.codegen.geometry import MAX_TILE, variants
from tracejit.codegen.language import Line
from tracejit.codegen.triton import Printed, Source, calls_of_parts, choice, module_text, signature
from tracejit.codegen.triton_text import MEMORY_TYPE, TRITON
from tracejit.schedule.kernel import Kernel
from tracejit.schedule.kernel_text import canonical
from tracejit.schedule.phases import Phases

HEADER = 4  # words of a table before its rows
_MOVING = "tl.program_id(0) - program + FIRST_{}"  # so that a part sees `program` as its own


def words_of_row(kernel: Kernel) -> int:
    """8-byte words of a step's row; an even number."""
    count = len(kernel.buffers) + len(kernel.scalars)
    return count + count % 2


def emit_phases(
    phases: Phases, aligned: Sequence[bool], *, precision: str, max_tile: int = MAX_TILE
) -> Source:
    """Print the kernel. `aligned`: which buffers lie at multiples of 16 bytes in every step.

    Its arguments are the table, the workspace if a kernel has one, sizes, constants, and TOTAL,
    the number of the programs of all phases.
    """
    kernel = canonical(phases.launch.kernel)
    found = variants(kernel, phases.launch.sizes, max_tile, precision)
    printed, calls = calls_of_parts(kernel, precision, found, _MOVING, ("FIRST",))
    constants = [*printed.constants, "TOTAL"]
    inner: list[Line] = []
    for i, buffer in enumerate(kernel.buffers):
        pointer = f"tl.load(row + {i}).to(tl.pointer_type({MEMORY_TYPE[buffer.dtype.name]}))"
        if aligned[i]:
            pointer = f"tl.multiple_of({pointer}, 16)"
        inner.append(Line(f"{buffer.name} = {pointer}"))
    if kernel.scalars:
        start = f"row + {len(kernel.buffers)}"
        inner.append(Line(f"scalars = ({start}).to(tl.pointer_type(tl.float64))"))
    begin = 0
    for number, count in enumerate(phases.counts):
        end = begin + count
        last = "TOTAL" if end == len(calls) else f"FIRST_{end}"
        every = f"range(FIRST_{begin} + tl.program_id(0), {last}, tl.num_programs(0))"
        inner += [
            Line(f"if (first <= {number}) & (last > {number}):"),
            *TRITON.indent(
                [
                    Line(f"for program in {every}:"),
                    *TRITON.indent(choice(calls[begin:end], begin)),
                    Line("if barriers:"),
                    *TRITON.indent(
                        [
                            Line("target += tl.num_programs(0)"),
                            Line("wait_for_all(counter, target)"),
                        ]
                    ),
                ]
            ),
        ]
        begin = end
    lines = [
        Line(
            f'"""Steps of {len(phases.counts)} phases each, every one of {len(calls)} kernels."""'
        ),
        Line("counter = table.to(tl.pointer_type(tl.int32))"),
        Line("steps = tl.load(table + 1)"),
        Line("first = tl.load(table + 2)"),
        Line("last = tl.load(table + 3)"),
        Line("barriers = (steps > 1) | (last - first > 1)"),
        Line("target = 0"),
        Line("for step in range(steps):"),
        *TRITON.indent([Line(f"row = table + {HEADER} + step * {words_of_row(kernel)}"), *inner]),
    ]
    digest = hashlib.sha256(
        repr((str(kernel), phases.counts, [*aligned], found)).encode()
    ).hexdigest()[:8]
    name = f"phases_{digest}"
    parameters = ["table", *(["workspace"] if printed.works else [])]
    parameters += [f"{x}: tl.constexpr" for x in (*kernel.sizes, *constants)]
    body = TRITON.render(TRITON.indent(lines))
    text = f"@triton.jit\n{signature(name, parameters)}\n{body}"
    others = printed.others | {"phases.wait_for_all"}
    whole = Printed([*printed.blocks, text], tuple(constants), printed.imports, others)
    return Source(name, module_text(whole), kernel, precision, found)
