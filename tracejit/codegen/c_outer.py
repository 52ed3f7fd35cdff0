"""Kernels without a contraction as C, with outer axes or as one loop nest.

A kernel with outer axes is one task. It runs its stages one after another for each outer point,
over a row that stays in the first cache. If the outer axis is the contiguous one, it does so for a
block of outer points at a time.
"""

from __future__ import annotations

from tracejit.codegen.c_body import Body, is_independent, opened
from tracejit.codegen.c_loops import (
    Part,
    Task,
    chunk_range,
    finished,
    full_stage,
    limits,
    named,
    nested,
    operands,
    parallel,
    vector_loop,
)
from tracejit.codegen.c_reduce import Fold, fold_of
from tracejit.codegen.c_text import block, memory_type, value_type
from tracejit.codegen.language import Line
from tracejit.schedule.cpu.access import extents_of, fixed_and_moving
from tracejit.schedule.cpu.loops import Loop, split
from tracejit.schedule.cpu.plan import CpuKernel, Nest
from tracejit.schedule.kernel import Axis, Index, Reduce, Stage, Store

RUN = 64  # values that a float32 lane adds up before it is folded into float64


def parts_of(kernel: CpuKernel, name: str, struct: str) -> tuple[list[Part], list[Line]]:
    """The parts of a kernel without a contraction, whose tasks' names start with `name`, and the
    fields that its struct needs."""
    if kernel.kernel.axes:
        task = OverOuter(kernel, f"{name}_chunk").task()
        body = [s for stage in kernel.kernel.stages for s in stage.body]
        body += [Store(part, Index(), 0) for part in kernel.partials]
        lines = [*opened(kernel.in_memory, body, struct), *task.lines, *finished(task.lines)]
        parts = [Part(Task(task.name, task.chunks, lines), [])]
        if kernel.columns is not None:
            parts += parts_of(kernel.columns, f"{name}_columns", struct)[0]
        return parts, []
    parts, fields = [], []
    for number, (stage, nest) in enumerate(zip(kernel.kernel.stages, kernel.inner, strict=True)):
        part, more = full_stage(kernel.kernel, stage, nest, f"{name}_stage{number}", struct)
        parts.append(part)
        fields += more
    return parts, fields


class OverOuter:
    """A kernel with outer axes: the stages one after another, for each outer point, or for a block
    of them where the outer axis is the contiguous one."""

    def __init__(self, kernel: CpuKernel, name: str):
        self.lowered, self.name = kernel, name
        self.kernel, self.outer = kernel.kernel, kernel.outer
        self.body = Body(self.kernel, extents_of(self.kernel), frozenset(kernel.rows))

    @property
    def _reduces_columns(self) -> bool:
        """Whether the last stage begins column sums."""
        return self.lowered.columns is not None and not self.kernel.stages[-1].in_order

    def task(self) -> Task:
        """The task over all outer points."""
        if self._reduces_columns:
            return self._with_columns()
        axes, size = self.kernel.axes, self.outer.block
        if not self.outer.vector:
            lines, loops = self._row(), [Loop(a) for a in axes]
        else:
            vector = named(axes, self.outer.vector)
            lines, loops = self._columns(vector, size), split(axes, vector, size)
        units, lines = parallel(loops, lines, self.outer.chunks)
        return Task(self.name, self.outer.chunks, [*units, *lines])

    def _with_columns(self) -> Task:
        """The task over rows whose last stage reduces over the rows: what a chunk adds up goes to
        its place in the partials."""
        stage, nest = self.kernel.stages[-1], self.lowered.inner[-1]
        (row,), (across,) = self.kernel.axes, stage.axes
        width, chunks = across.extent, self.outer.chunks
        folds = [fold_of(s) for s in stage.body if isinstance(s, Reduce)]
        runs = [f for f in folds if f.lane != f.total and -(-row.extent // chunks) > RUN]
        each = f"for (int64_t j = 0; j < {width}; j++)"
        before, after = chunk_range(row.extent, chunks), []
        for f, part in zip(folds, self.lowered.partials, strict=True):
            before.append(Line(f"{f.lane} p{f.name}[{width}] __attribute__((aligned(64)));"))
            before.append(Line(f"{each} p{f.name}[j] = {f.neutral};"))
            total = f"p{f.name}[j]"
            if f in runs:
                before.append(Line(f"{f.total} r{f.name}[{width}] __attribute__((aligned(64)));"))
                before.append(Line(f"{each} r{f.name}[j] = 0;"))
                total = f"({memory_type(self.body.buffers[part])})(r{f.name}[j] + {total})"
            after.append(Line(f"{each} {part}[chunk * {width} + j] = {total};"))
        fixed, moving = fixed_and_moving(stage.body, across)
        inner = self.body.lines(moving)
        for f in folds:
            value = self.body.operand(f.reduce.value, f.reduce.out.dtype)
            inner.append(Line(f.merge(f"p{f.name}[{across.name}]", value), f.reduce.where))
        first, last = limits(across, nest.block)
        head = f"for (int64_t {across.name} = {first}; {across.name} < {last}; {across.name}++)"
        inner = [Line("#pragma omp simd"), *block(head, inner)]
        lines = [*self._row(), *self.body.lines(fixed)]
        lines += nested(split(stage.axes, across, nest.block), inner)
        if runs:
            folded = [f"{each} r{f.name}[j] += p{f.name}[j], p{f.name}[j] = 0;" for f in runs]
            lines += block(f"if ({row.name} % {RUN} == {RUN - 1})", map(Line, folded))
        loop = block(f"for (int64_t {row.name} = first; {row.name} < last; {row.name}++)", lines)
        return Task(self.name, chunks, [*before, *loop, *after])

    def _row(self) -> list[Line]:
        """The stages for one outer point, without the one that begins column sums; and the arrays
        of cached rows."""
        stages = list(zip(self.kernel.stages, self.lowered.inner, strict=True))
        if self._reduces_columns:
            stages.pop()
        sizes = {b: self._size(b) for b in self.lowered.rows}
        lines = [
            Line(f"{memory_type(self.body.buffers[b])} {b}[{size}] __attribute__((aligned(64)));")
            for b, size in sizes.items()
        ]
        return lines + [line for stage, nest in stages for line in self._row_stage(stage, nest)]

    def _size(self, array: str) -> int:
        """The elements of a local array: up to the last one that is stored."""
        stores = (s for stage in self.kernel.stages for s in stage.body if isinstance(s, Store))
        return 1 + max(self.body.bounds(s.index)[1] for s in stores if s.buffer == array)

    def _row_stage(self, stage: Stage, nest: Nest | None) -> list[Line]:
        """A stage for one outer point."""
        if nest is None:
            lines = self.body.lines(stage.body)
            for s in stage.body:
                if isinstance(s, Reduce):  # over axes of extent 1
                    value = self.body.operand(s.value, s.out.dtype)
                    kind = value_type(s.out.dtype)
                    lines.append(Line(f"const {kind} {s.out!r} = {value};", s.where))
            return lines
        folds = [fold_of(s) for s in stage.body if isinstance(s, Reduce)]
        vector = named(stage.axes, nest.vector)
        inner = vector_loop(self.body, stage.body, vector, nest.block, folds)
        lines = [Line(f"{f.total} r{f.name} = {f.neutral};") for f in folds]
        lines += nested(split(stage.axes, vector, nest.block), inner)
        for f in folds:
            value = f"const {value_type(f.reduce.out.dtype)} v{f.name}"
            lines.append(Line(f"{value} = {f.result(f'r{f.name}')};", f.reduce.where))
        return lines

    def _columns(self, vector: Axis, size: int) -> list[Line]:
        """All stages for one block of the vector axis."""
        if not any(stage.axes for stage in self.kernel.stages):
            bodies = [stage.body for stage in self.kernel.stages]
            return [line for b in bodies for line in vector_loop(self.body, b, vector, size, ())]
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
        if stage.in_order or is_independent(stage.body, vector.name):
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
            started = [Line(f"{f.lane} p{f.name}[{size}] = {{0}};") for f in runs]
            folded = [Line(f"{each} r{f.name}[j] += p{f.name}[j];") for f in runs]
            lines = block(
                f"for (int64_t run = 0; run < {extent}; run += {RUN})",
                [*started, *block(run, lines), *folded],
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
