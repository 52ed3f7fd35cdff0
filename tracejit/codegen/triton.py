"""Kernel → the source of a Python module with one Triton kernel, and how to launch it.

The text depends only on the Kernel, the matmul precision, and what `variants` finds in the sizes,
which are named constants of the generated function.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from tracejit.codegen import (
    triton_attention,
    triton_foreach,
    triton_forms,
    triton_matmul,
    triton_rows,
    triton_scan,
    triton_scatter,
    triton_sort,
)
from tracejit.codegen.geometry import MAX_TILE, Geometry, geometry, variants
from tracejit.codegen.language import Line
from tracejit.codegen.triton_text import TRITON, fold_of
from tracejit.kernels.costs import SMS
from tracejit.records import dataclass
from tracejit.schedule.foreach import columns_of
from tracejit.schedule.kernel import Axis, Kernel, Reduce
from tracejit.schedule.kernel_text import canonical


@dataclass(frozen=True)
class Source:
    """A generated module. `name` is its kernel: the form, and the hash of the Kernel's text.
    `variants` is what `variants` found."""

    suffix: ClassVar[str] = ".py"
    name: str
    text: str
    kernel: Kernel
    precision: str
    variants: tuple[str, ...]
    sms: int = SMS  # of the GPU

    def geometry(self, sizes: Sequence[int], max_tile: int = MAX_TILE) -> Geometry:
        """How to launch for these sizes. The kernel's arguments are its buffers, then the scalar
        table (`has_scalars`), the workspace (`Geometry.workspace` bytes, zeroed once), the sizes
        by name, and `Geometry.constants`."""
        return geometry(self.kernel, sizes, self.precision, self.variants, max_tile, self.sms)

    @property
    def has_scalars(self) -> bool:
        return bool(self.kernel.scalars)


@dataclass(frozen=True)
class Printed:
    """A kernel's functions, its own last; its constants besides its sizes; its imports from
    kernels/reduce.py, and what else it calls of kernels/ ("scan.running_sum")."""

    blocks: list[str]
    constants: tuple[str, ...]
    imports: frozenset[str]
    others: frozenset[str]
    works: bool = False  # in a workspace


def emit(
    kernel: Kernel,
    sizes: Sequence[int] | None = None,
    *,
    precision: str = "ieee",
    max_tile: int = MAX_TILE,
    sms: int = SMS,
) -> Source:
    """Print a kernel. `sizes` decide only its variants (if not given, the simplest); `precision`
    of fp32 contractions is "ieee", "tf32" or "tf32x3"; `sms` are those of the GPU."""
    form = triton_forms.form_of(kernel)
    if kernel.foreach:
        found = ("",)
    elif sizes is None:
        kernels = [part.kernel for part in kernel.parts] or [kernel]
        found = tuple(
            "looped" * (triton_forms.form_of(k) == "rows" and not triton_forms.can_persist(k))
            for k in kernels
        )
    else:
        found = variants(kernel, sizes, max_tile, precision, sms)
    content = columns_of(kernel).text if kernel.foreach else str(canonical(kernel))
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    name = "_".join([form, *(v for v in found if v and not kernel.parts), digest])
    if kernel.foreach:
        printed = _foreach(kernel, name)
    elif kernel.parts:
        printed = _side_by_side(kernel, name, precision, found)
    else:
        printed = alone(kernel, name, precision, found[0])
    return Source(name, module_text(printed), kernel, precision, found, sms)


def module_text(printed: Printed) -> str:
    """The text of a module with these functions."""
    code = "\n\n\n".join(printed.blocks)
    imports = ["import triton", "import triton.language as tl", ""]
    if "tj." in code:
        imports.append("from tracejit.kernels import device as tj")
    if " matmul(" in code:
        imports.append("from tracejit.kernels.matmul import matmul")
    for called in ("attend_forward", "attend_gradients"):
        if f" {called}(" in code:
            imports.append(f"from tracejit.kernels.attention import {called}")
    rooms = {"reduce": sorted(printed.imports)}
    for room, _, called in sorted(name.partition(".") for name in printed.others):
        rooms.setdefault(room, []).append(called)
    for room, called in rooms.items():
        if called:
            imports.append(f"from tracejit.kernels.{room} import {', '.join(called)}")
    header = "\n".join(imports).rstrip()
    return f"{header}\n\n\n{code}\n"


def alone(
    kernel: Kernel,
    name: str,
    precision: str,
    variant: str,
    part: str = "",
    variables: Sequence[str] = (),
) -> Printed:
    """The function of a kernel that is no other's company, or of a part of a launch. Of its
    constants these are `variables`."""
    form = triton_forms.form_of(kernel)
    helpers: list[str] = []
    if form == "matmul":
        function, helpers = triton_matmul.matmul(kernel, precision, variant, part)
    elif form == "attention":
        function, helpers = triton_attention.attention(kernel, precision, part)
    else:
        printer = {
            "pointwise": triton_forms.pointwise,
            "reduce": triton_forms.reduce,
            "rows": triton_rows.rows,
            "scatter": triton_scatter.scatter,
            "scan": triton_scan.scan,
            "sort": triton_sort.sort,
        }[form]
        function = printer(kernel, variant, part)
    constants = (*(["FIRST"] if part else []), *function.constants)
    text = function_text(
        kernel,
        name,
        function.works,
        [*kernel.sizes, *constants],
        describe(kernel, form),
        function.lines,
        variables,
    )
    names = frozenset(function.imports), frozenset(function.calls)
    return Printed([*helpers, text], constants, *names, function.works)


def _side_by_side(kernel: Kernel, name: str, precision: str, found: Sequence[str]) -> Printed:
    """The function of a launch of several kernels: each program runs one of them.

    The programs of the first kernel come first. What is a constant of the second alone has its
    number here: BLOCK_1; FIRST_1 is its first program, WORKSPACE_1 where its workspace starts.
    """
    printed, calls = calls_of_parts(kernel, precision, found)
    lines = [Line("program = tl.program_id(0)"), *choice(calls)]
    text = function_text(
        kernel,
        name,
        printed.works,
        [*kernel.sizes, *printed.constants],
        describe(kernel, "joint"),
        lines,
    )
    return replace(printed, blocks=[*printed.blocks, text])


def calls_of_parts(
    kernel: Kernel,
    precision: str,
    found: Sequence[str],
    first: str = "FIRST_{}",
    variables: Sequence[str] = (),
) -> tuple[Printed, list[list[Line]]]:
    """The functions of a kernel's parts, and a call of each; `first` is what is handed over as the
    number of the first program of the part {}."""
    blocks: list[str] = []
    constants: list[str] = []
    imports: frozenset[str] = frozenset()
    others: frozenset[str] = frozenset()
    works = False
    calls: list[list[Line]] = []
    scalar = 0
    known: dict[tuple[Kernel, str], tuple[str, Printed]] = {}
    for i, part in enumerate(kernel.parts):
        key = canonical(part.kernel), found[i]
        if key not in known:  # parts that differ in sizes and the user's lines only share one
            name = f"part_{i}"
            printed = alone(part.kernel, name, precision, found[i], f"_{i}", variables)
            known[key] = name, printed
            blocks += printed.blocks
        function, printed = known[key]
        pointers = [*part.buffers]
        if part.scalars:
            pointers.append(f"scalars + {scalar}" if scalar else "scalars")
        if printed.works:
            pointers.append(f"workspace + WORKSPACE_{i}")
            constants.append(f"WORKSPACE_{i}")
        own = [f"{constant}_{i}" for constant in printed.constants]
        given = [first.format(i), *own[1:]]
        rows = (", ".join(names) for names in (pointers, part.sizes, given) if names)
        calls.append(
            [Line(f"{function}("), *TRITON.indent(Line(f"{row},") for row in rows), Line(")")]
        )
        scalar += len(part.scalars)
        constants += own
        imports |= printed.imports
        works |= printed.works
        others |= printed.others
    return Printed(blocks, tuple(constants), imports, others, works), calls


def _foreach(kernel: Kernel, name: str) -> Printed:
    """The function of a launch whose kernels are one over other memory."""
    function, inner = triton_foreach.foreach(kernel), columns_of(kernel).kernel
    summary = describe(inner, triton_forms.form_of(inner))
    summary[0] = f"For each row of a table: {summary[0]}"
    uses, pointers = function.works, ["addresses", "chunks"]
    lines, constants = function.lines, function.constants
    text = function_text(inner, name, uses, constants, summary, lines, pointers=pointers)
    return Printed([text], constants, frozenset(function.imports), frozenset())


def choice(calls: Sequence[Sequence[Line]], before: int = 0) -> list[Line]:
    """Of the calls of parts, the first of which is number `before`, the one that `program` belongs
    to."""
    lines: list[Line] = []
    for i, call in enumerate(calls):
        if i + 1 < len(calls):
            lines.append(Line(f"{'elif' if i else 'if'} program < FIRST_{before + i + 1}:"))
        else:
            lines.append(Line("else:"))
        lines += TRITON.indent(call)
    return lines if len(calls) > 1 else [*calls[0]]


def function_text(
    kernel: Kernel,
    name: str,
    has_workspace: bool,
    constants: Sequence[str],
    summary: Sequence[str],
    lines: Sequence[Line],
    variables: Sequence[str] = (),
    pointers: Sequence[str] | None = None,  # by default its buffers
) -> str:
    """A jit function of a kernel's parameters, with its docstring."""
    documented = [*map(Line, [f'"""{summary[0]}', *summary[1:]]), *lines]
    if len(summary) == 1:
        documented[0] = Line(documented[0].text + '"""')
    else:
        documented.insert(len(summary), Line('"""'))
    parameters = [
        *([b.name for b in kernel.buffers] if pointers is None else pointers),
        *(["scalars"] if kernel.scalars else []),
        *(["workspace"] if has_workspace else []),
        *(x if x in variables else f"{x}: tl.constexpr" for x in constants),
    ]
    body = TRITON.render(TRITON.indent(documented))
    return f"@triton.jit\n{signature(name, parameters)}\n{body}"


def signature(name: str, parameters: Sequence[str]) -> str:
    """`def name(parameters):`, one parameter a line where they do not fit one."""
    line = f"def {name}({', '.join(parameters)}):"
    if len(line) <= 100:
        return line
    return "\n".join([f"def {name}(", *(f"    {p}," for p in parameters), "):"])


def describe(kernel: Kernel, form: str) -> list[str]:
    """What a kernel does, as the lines of a docstring."""
    inner = next((stage.axes for stage in kernel.stages if stage.axes), ())
    if form == "pointwise":
        first = f"Element-wise over {domain(kernel.axes)}."
    elif form == "reduce":
        first = f"One pass over {domain(inner)}; the last program finishes."
    elif form == "joint":
        first = f"{len(kernel.parts)} kernels side by side, each program one of them."
    elif form == "matmul":
        dot = kernel.stages[0].dot
        first = f"{dot.out!r} over {domain(inner)}: a matmul summed over {domain([dot.k])}."
    elif form == "attention":
        attend = kernel.stages[0].attend
        results = ", ".join(f"{var!r} = {op.name}" for op, var in attend.results)
        m, n, *_ = attend.axes
        first = f"{results}: for each of {domain(inner)}, queries and keys {domain([m, n])}."
    elif form in ("scatter", "scan"):
        first = f"For each of {domain(kernel.axes)}: {domain(kernel.stages[-1].axes)} in order."
    elif form == "sort":
        first = f"For each of {domain(kernel.axes)}: the order of {domain(inner)}."
    else:
        first = f"For each of {domain(kernel.axes)}: passes over {domain(inner)}."
    details = []
    reads = ", ".join(b.name for b in kernel.buffers if "r" in b.access)
    writes = ", ".join(b.name for b in kernel.buffers if "w" in b.access)
    if reads:
        details.append(f"Reads {reads}.")
    if writes:
        details.append(f"Writes {writes}.")
    reductions = [s for stage in kernel.stages for s in stage.body if isinstance(s, Reduce)]
    if reductions:
        text = ", ".join(f"{r.out!r} = {fold_of(r).kind} of {r.value!r}" for r in reductions)
        details.append(f"Reduces {text}.")
    line = " ".join([first, *details])
    return [line] if len(line) <= 88 else [first, "", *details]


def domain(axes: Sequence[Axis]) -> str:
    """`(i0: n0, i1: n1)`, or `one point` without axes."""
    return f"({', '.join(f'{a.name}: {a.extent}' for a in axes)})" if axes else "one point"
