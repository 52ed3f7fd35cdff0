"""Kernels without a contraction as C: those with outer axes, and those that are one loop nest each.

A kernel with outer axes is one task: for each outer point its stages one after another, over a row
that stays in the first cache; or, where the outer axis is the contiguous one, over a block of outer
points at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tracejit.codegen.c_body import Body, extents_of, is_independent, opened
from tracejit.codegen.c_keep import keep_rows
from tracejit.codegen.c_loops import (
    BLOCK,
    COLUMNS,
    RUN,
    Loop,
    Part,
    Task,
    chunk_range,
    contiguity,
    finished,
    full_stage,
    limits,
    nested,
    operands,
    parallel,
    split,
    vector_axis,
    vector_loop,
    weight,
)
from tracejit.codegen.c_reduce import Fold, fold_of
from tracejit.codegen.c_text import block, memory_type, product, value_type
from tracejit.codegen.language import Line
from tracejit.schedule.kernel import Axis, Buffer, Kernel, Reduce, Stage, Store


def parts_of(kernel: Kernel, name: str, struct: str) -> tuple[list[Part], list[Line]]:
    """The parts of a kernel without a contraction, whose tasks' names start with `name`, and the
    fields that its struct needs."""
    if kernel.axes:
        body = tuple(s for stage in kernel.stages for s in stage.body)
        task = OverOuter(kernel, f"{name}_chunk").task()
        lines = [*opened(kernel, body, struct), *task.lines, *finished(task.lines)]
        return [Part(Task(task.name, task.chunks, lines), [])], []
    parts, fields = [], []
    for number, stage in enumerate(kernel.stages):
        part, more = full_stage(kernel, stage, f"{name}_stage{number}", struct)
        parts.append(part)
        fields += more
    return parts, fields


class OverOuter:
    """A kernel with outer axes: the stages one after another, for each outer point, or for a block
    of them where the outer axis is the contiguous one."""

    def __init__(self, kernel: Kernel, name: str):
        self.kernel, self.name = kernel, name
        self.extents = extents_of(kernel)
        self.body = Body(kernel, self.extents)
        self.statements = [s for stage in kernel.stages for s in stage.body]
        self.inner = any(stage.axes for stage in kernel.stages)
        self.work = sum(
            product(a.extent for a in (*kernel.axes, *stage.axes)) * weight(stage.body)
            for stage in kernel.stages
        )

    def task(self) -> Task:
        """The task over all outer points."""
        axes, vector = self.kernel.axes, self._outer_vector()
        if vector is None:
            lines = self._row(self._kept(self.kernel).stages)
            loops = [Loop(a) for a in axes]
        else:
            size = COLUMNS if self.inner else BLOCK
            loops = split(axes, vector, size)
            lines = self._columns(vector, size)
        units, lines, chunks = parallel(loops, lines, self.work)
        return Task(self.name, chunks, [*units, *lines])

    def _outer_vector(self) -> Axis | None:
        """The outer axis to vectorise over; None where an inner one is better."""
        best = vector_axis(self.kernel.axes, self.statements)
        if not self.inner:
            return best
        inner = [a for stage in self.kernel.stages for a in stage.axes]
        most = max(contiguity(a, self.statements) for a in inner)
        return best if contiguity(best, self.statements) > most else None

    @property
    def by_rows(self) -> bool:
        """Whether the stages run one after another for each outer point, along an inner axis."""
        return self.inner and self._outer_vector() is None

    def riding(self, stage: Stage, chunks: int, parts: Sequence[Buffer]) -> Task:
        """The task over rows that does `stage` for each of them too: its reductions over the rows
        of a chunk go to that chunk's place in `parts`."""
        (row,), (across,) = self.kernel.axes, stage.axes
        width, folds = across.extent, [fold_of(s) for s in stage.body if isinstance(s, Reduce)]
        runs = [f for f in folds if f.lane != f.total and -(-row.extent // chunks) > RUN]
        together = replace(self.kernel, stages=(*self.kernel.stages, stage))
        *stages, stage = self._kept(together).stages
        each = f"for (int64_t j = 0; j < {width}; j++)"
        before, after = chunk_range(row.extent, chunks), []
        for f, part in zip(folds, parts, strict=True):
            before.append(Line(f"{f.lane} p{f.name}[{width}] __attribute__((aligned(64)));"))
            before.append(Line(f"{each} p{f.name}[j] = {f.neutral};"))
            total = f"p{f.name}[j]"
            if f in runs:
                before.append(Line(f"{f.total} r{f.name}[{width}] __attribute__((aligned(64)));"))
                before.append(Line(f"{each} r{f.name}[j] = 0;"))
                total = f"({memory_type(part.dtype)})(r{f.name}[j] + {total})"
            after.append(Line(f"{each} {part.name}[chunk * {width} + j] = {total};"))
        inner = self.body.lines(stage.body)
        for f in folds:
            value = self.body.operand(f.reduce.value, f.reduce.out.dtype)
            inner.append(Line(f.merge(f"p{f.name}[{across.name}]", value), f.reduce.where))
        first, last = limits(across, BLOCK)
        head = f"for (int64_t {across.name} = {first}; {across.name} < {last}; {across.name}++)"
        inner = [Line("#pragma omp simd"), *block(head, inner)]
        lines = self._row(stages)
        lines += nested(split(stage.axes, across, BLOCK), inner)
        if runs:
            folded = [f"{each} r{f.name}[j] += p{f.name}[j], p{f.name}[j] = 0;" for f in runs]
            lines += block(f"if ({row.name} % {RUN} == {RUN - 1})", map(Line, folded))
        loop = block(f"for (int64_t {row.name} = first; {row.name} < last; {row.name}++)", lines)
        return Task(self.name, chunks, [*before, *loop, *after])

    def _kept(self, kernel: Kernel) -> Kernel:
        """The kernel, with what its stages keep for each other in local arrays."""
        kernel, local = keep_rows(kernel)
        self.body = Body(kernel, self.extents, frozenset(b.name for b in local))
        return kernel

    def _row(self, stages: Sequence[Stage]) -> list[Line]:
        """Stages for one outer point, and the arrays of what they keep for each other."""
        size = max((a.extent for stage in stages for a in stage.axes), default=0)
        lines = [
            Line(f"{memory_type(b.dtype)} {b.name}[{size}] __attribute__((aligned(64)));")
            for b in self.body.kernel.buffers
            if b.name in self.body.local
        ]
        return lines + [line for stage in stages for line in self._row_stage(stage)]

    def _row_stage(self, stage: Stage) -> list[Line]:
        """A stage for one outer point."""
        if not stage.axes:
            lines = self.body.lines(stage.body)
            for s in stage.body:
                if isinstance(s, Reduce):  # over axes of extent 1
                    value = self.body.operand(s.value, s.out.dtype)
                    kind = value_type(s.out.dtype)
                    lines.append(Line(f"const {kind} {s.out!r} = {value};", s.where))
            return lines
        folds = [fold_of(s) for s in stage.body if isinstance(s, Reduce)]
        vector = vector_axis(stage.axes, stage.body)
        inner = vector_loop(self.body, stage.body, vector, folds)
        lines = [Line(f"{f.total} r{f.name} = {f.neutral};") for f in folds]
        lines += nested(split(stage.axes, vector, BLOCK), inner)
        for f in folds:
            value = f"const {value_type(f.reduce.out.dtype)} v{f.name}"
            lines.append(Line(f"{value} = {f.result(f'r{f.name}')};", f.reduce.where))
        return lines

    def _columns(self, vector: Axis, size: int) -> list[Line]:
        """All stages for one block of the vector axis."""
        if not self.inner:
            bodies = [stage.body for stage in self.kernel.stages]
            return [line for b in bodies for line in vector_loop(self.body, b, vector, ())]
        first, last = limits(vector, size)
        lines = [Line(f"const int64_t start = {first}, count = {last} - start;")]
        for stage in self.kernel.stages:
            lines += self._column_stage(stage, vector, size)
        return lines

    def _column_stage(self, stage: Stage, vector: Axis, size: int) -> list[Line]:
        folds = [fold_of(s) for s in stage.body if isinstance(s, Reduce)]
        lines = [Line(f"const int64_t {vector.name} = start + j;"), *self._seen(stage)]
        lines += self.body.lines(s for s in stage.body if not isinstance(s, Store))
        for f in folds:
            value = self.body.operand(f.reduce.value, f.reduce.out.dtype)
            in_runs = f.lane != f.total and stage.axes
            target = f"p{f.name}[j]" if in_runs else f"r{f.name}[j]"
            lines.append(Line(f.merge(target, value), f.reduce.where))
        lines += self.body.lines(s for s in stage.body if isinstance(s, Store))
        lines = block("for (int64_t j = 0; j < count; j++)", lines)
        if is_independent(stage.body, vector.name):
            lines.insert(0, Line("#pragma omp simd"))
        return self._column_loops(stage, folds, lines, size)

    def _column_loops(
        self, stage: Stage, folds: list[Fold], lines: list[Line], size: int
    ) -> list[Line]:
        """The loops over a stage's own axes around the vector loop; float sums in runs."""
        each = "for (int64_t j = 0; j < count; j++)"
        runs = [f for f in folds if f.lane != f.total and stage.axes]
        loops = [Loop(a) for a in stage.axes]
        if runs:
            last = loops.pop()
            extent, v = last.axis.extent, last.variable
            run = f"for (int64_t {v} = run; {v} < tj_least(run + {RUN}, {extent}); {v}++)"
            opened = [Line(f"{f.lane} p{f.name}[{size}] = {{0}};") for f in runs]
            folded = [Line(f"{each} r{f.name}[j] += p{f.name}[j];") for f in runs]
            lines = block(
                f"for (int64_t run = 0; run < {extent}; run += {RUN})",
                [*opened, *block(run, lines), *folded],
            )
        lines = nested(loops, lines)
        totals = []
        for f in folds:
            totals.append(Line(f"{f.total} r{f.name}[{size}];"))
            totals.append(Line(f"{each} r{f.name}[j] = {f.neutral};"))
        return totals + lines

    def _seen(self, stage: Stage) -> list[Line]:
        """Reduced values of earlier stages at this point of a block."""
        used = set(operands(stage.body))
        lines = []
        for other in self.kernel.stages:
            for s in other.body:
                if isinstance(s, Reduce) and s.out.id in used:
                    f = fold_of(s)
                    kind = value_type(s.out.dtype)
                    lines.append(Line(f"const {kind} {s.out!r} = {f.result(f'r{f.name}[j]')};"))
        return lines
