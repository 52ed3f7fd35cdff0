"""Kernel → the source of a Python module with one Triton kernel, and how to launch it.

The text depends only on the Kernel, the matmul precision, and whether the inner elements of a
`rows` kernel fit one tile; sizes are named constants of the generated function.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from tracejit.codegen import triton_forms, triton_matmul
from tracejit.codegen.geometry import MAX_TILE, Geometry, geometry, is_looped
from tracejit.codegen.triton_text import Line, fold_of, indent, render
from tracejit.schedule.kernel import Axis, Kernel, Reduce
from tracejit.schedule.kernel_text import canonical


@dataclass(frozen=True)
class Source:
    """A generated module. `name` is its kernel: the form, and the hash of the Kernel's text."""

    name: str
    text: str
    kernel: Kernel
    precision: str
    looped: bool

    def geometry(self, sizes: Sequence[int], max_tile: int = MAX_TILE) -> Geometry:
        """How to launch for these sizes. The kernel's arguments are its buffers, then the scalar
        table (`has_scalars`), the workspace (`Geometry.workspace` bytes, zeroed once), the sizes
        by name, and `Geometry.constants`."""
        return geometry(self.kernel, sizes, self.precision, self.looped, max_tile)

    @property
    def has_scalars(self) -> bool:
        return bool(self.kernel.scalars)


def emit(
    kernel: Kernel,
    sizes: Sequence[int] | None = None,
    *,
    precision: str = "ieee",
    max_tile: int = MAX_TILE,
) -> Source:
    """Print a kernel. `sizes` decide only whether the inner elements fit one tile (they do if not
    given); `precision` of fp32 contractions is "ieee", "tf32" or "tf32x3"."""
    form = triton_forms.form_of(kernel)
    if sizes is None:
        looped = form == "rows" and not triton_forms.can_persist(kernel)
    else:
        looped = is_looped(kernel, sizes, max_tile)
    helpers: list[str] = []
    if form == "matmul":
        function, helpers = triton_matmul.matmul(kernel, precision)
    elif form == "rows":
        function = triton_forms.rows(kernel, looped)
    else:
        function = {"pointwise": triton_forms.pointwise, "reduce": triton_forms.reduce}[form](
            kernel
        )
    digest = hashlib.sha256(str(canonical(kernel)).encode()).hexdigest()[:8]
    name = f"{form}_{'looped_' if looped else ''}{digest}"
    summary = describe(kernel, form)
    lines = [*map(Line, [f'"""{summary[0]}', *summary[1:]]), *function.lines]
    if len(summary) == 1:
        lines[0] = Line(lines[0].text + '"""')
    else:
        lines.insert(len(summary), Line('"""'))
    parameters = [
        *(b.name for b in kernel.buffers),
        *(["scalars"] if kernel.scalars else []),
        *(["workspace"] if function.imports else []),
        *(f"{name}: tl.constexpr" for name in (*kernel.sizes, *function.constants)),
    ]
    body = "\n".join(render(indent(lines)))
    blocks = [*helpers, f"@triton.jit\n{signature(name, parameters)}\n{body}"]
    imports = ["import triton", "import triton.language as tl", ""]
    code = "\n\n\n".join(blocks)
    if "tj." in code:
        imports.append("from tracejit.kernels import device as tj")
    if form == "matmul":
        imports.append("from tracejit.kernels.matmul import matmul")
    if function.imports:
        imports.append(f"from tracejit.kernels.reduce import {', '.join(sorted(function.imports))}")
    header = "\n".join(imports).rstrip()
    return Source(name, f"{header}\n\n\n{code}\n", kernel, precision, looped)


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
    elif form == "matmul":
        dot = kernel.stages[0].dot
        first = f"{dot.out!r} over {domain(inner)}: a matmul summed over {domain([dot.k])}."
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
