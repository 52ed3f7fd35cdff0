"""Kernels of a CpuPlan → C functions, and C units that export them.

    void kernel0(const struct tj_run *run, void *scratch, void *const *buffers,
                 const double *scalars)

`run` says how a task is run on all threads, `scratch` is memory for packed operands, `buffers` and
`scalars` are what the kernel lists, in its order. Each kernel is a struct of its pointers, scalars
and reduced values, functions that compute a chunk of a stage, and a function that runs the stages
one after another. Sizes are plain numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import ClassVar

from tracejit.codegen.c_attention import attention_parts
from tracejit.codegen.c_body import pointers
from tracejit.codegen.c_contraction import Contraction
from tracejit.codegen.c_loops import Part, full_stage
from tracejit.codegen.c_matmul import contraction_parts
from tracejit.codegen.c_matrices import PARTS, call_text
from tracejit.codegen.c_outer import parts_of
from tracejit.codegen.c_prelude import C_PARTS, prelude_for
from tracejit.codegen.c_sort import sort_parts
from tracejit.codegen.c_text import C, block
from tracejit.codegen.c_vectors import declaration, defined, vector_functions, vector_types
from tracejit.codegen.language import Line, comment
from tracejit.records import dataclass
from tracejit.schedule.cpu.plan import CpuKernel

_RUN = """
/* How tasks are run on all threads; the pool of the process provides it. */
struct tj_run {
  void (*launch)(void (*task)(void *, int64_t), void *arguments, int64_t chunks, int64_t threads);
  int64_t threads;
};

static inline void tj_launch(const struct tj_run *run, void (*task)(void *, int64_t),
                             void *arguments, int64_t chunks) {
  if (chunks > 1 && run->threads > 1)
    run->launch(task, arguments, chunks, run->threads);
  else
    for (int64_t chunk = 0; chunk < chunks; chunk++) task(arguments, chunk);
}

/* Not inlined: gcc 12 forgets the vector reductions of a function that it inlines. */
#define TJ_TASK __attribute__((noinline)) static void
#ifdef __clang__
#define TJ_STRAIGHT TJ_TASK
#else
#define TJ_STRAIGHT \\
  __attribute__((noinline, optimize("no-thread-jumps", "no-tree-pre"))) static void
#endif

static inline int64_t tj_least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

/* Asks for memory that is written to soon; any address will do. */
#define tj_fetch(base, bytes) __builtin_prefetch((void *)((uintptr_t)(base) + (bytes)), 1)
"""


@dataclass(frozen=True)
class CFunction:
    """A generated kernel: the exported function `name` of a unit that has its text. `shared` are
    functions that other kernels may have too; of equal ones a library has one."""

    suffix: ClassVar[str] = ".c"
    name: str
    own: str
    shared: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return "\n\n".join((*self.shared, self.own))


def emit_kernel(lowered: CpuKernel, number: int = 0) -> CFunction:
    """Print a kernel; `number` names it in a unit."""
    kernel = lowered.kernel
    if kernel.call is not None:
        return CFunction(f"kernel{number}", call_text(kernel, number))
    bound = [f".{b.name} = buffers[{i}]" for i, b in enumerate(lowered.bound)]
    bound += [f".{s} = scalars[{i}]" for i, s in enumerate(kernel.scalars)]
    entry = block(
        f"void kernel{number}(const struct tj_run *run, void *scratch, void *const *buffers,"
        " const double *scalars)",
        [
            Line("(void)buffers, (void)scalars;"),
            Line(f"k{number}(run, scratch, &(struct k{number}){{{', '.join(bound)}}});"),
        ],
    )
    own, shared = _kernel(lowered, f"k{number}")
    return CFunction(f"kernel{number}", f"{own}\n\n{C.render(entry)}\n", shared)


@dataclass(frozen=True)
class Unit:
    """A C program, and the declarations of its functions that other units of a library may call."""

    text: str
    declared: frozenset[str]


def unit(
    functions: Sequence[CFunction], vector_bytes: int, elsewhere: Collection[str] = frozenset()
) -> Unit:
    """The C program of functions of different numbers. What they share is a part of it, but for
    what is declared `elsewhere`: by other units of the same library."""
    own = "\n".join(function.own for function in functions)
    micro = dict.fromkeys(text for function in functions for text in function.shared)
    shared = [defined(text, elsewhere) for text in micro]
    shared += vector_functions(vector_bytes, "\n".join((*shared, own)), elsewhere)
    declared = frozenset(map(declaration, shared)) - {None}
    body = "\n\n".join((*shared, own))
    text = f"{prelude_for(body, (*C_PARTS, *PARTS))}{_RUN}{vector_types(body)}\n{body}"
    return Unit(text, declared)


def _kernel(lowered: CpuKernel, name: str) -> tuple[str, tuple[str, ...]]:
    """The struct and functions of a kernel, and the functions that it shares with others."""
    kernel, shared = lowered.kernel, []
    rounds, main = 1, [Line("(void)run, (void)scratch;")]
    rest: list[Part] = []
    if lowered.blocks is not None:
        parts, fields, shared = attention_parts(lowered, name)
        main.append(Line("at->working = scratch;"))
    elif kernel.sort is not None:
        parts, fields = sort_parts(lowered, name)
        main.append(Line("at->working = scratch;"))
    elif lowered.tiling is not None:
        contraction = Contraction(kernel, name, lowered.tiling)
        parts, fields, shared = contraction_parts(contraction)
        rounds = contraction.rounds
        if contraction.scratch_bytes:
            main.append(Line("at->packed = scratch;"))
        stages = list(zip(kernel.stages, lowered.inner, strict=True))
        for number, (stage, nest) in enumerate(stages[1:], 1):
            part, more = full_stage(kernel, stage, nest, f"{name}_stage{number}", name)
            rest.append(part)
            fields += more
    else:
        parts, fields = parts_of(lowered, name, name)
    for part, offset in zip(lowered.partials, lowered.partial_offsets, strict=False):
        main.append(Line(f"at->{part} = (void *)((char *)scratch + {offset});"))
    struct = block(f"struct {name}", [*pointers(lowered.in_memory), *fields])
    struct[-1] = Line("};")
    blocks = [[*_described(lowered), *struct]]
    for part in (*parts, *rest):
        if part.task is not None:
            kind = "TJ_STRAIGHT" if part.task.straight else "TJ_TASK"
            head = f"{kind} {part.task.name}(void *arguments, int64_t chunk)"
            blocks.append(block(head, [Line("(void)chunk;"), *part.task.lines]))
    main += _sequence(parts, rounds) + _sequence(rest, 1)
    blocks.append(
        block(
            f"static void {name}(const struct tj_run *run, void *scratch, struct {name} *const at)",
            main,
        )
    )
    return "\n\n".join(C.render(b) for b in blocks), tuple(C.render(b) for b in shared)


def _sequence(parts: Sequence[Part], rounds: int) -> list[Line]:
    """The calls of parts, those of a batched contraction once per round."""
    lines = []
    for part in parts:
        if part.task is not None:
            lines.append(Line(f"tj_launch(run, {part.task.name}, at, {part.task.chunks});"))
        if rounds == 1:
            lines += part.after
    if rounds != 1:
        lines = block(f"for (at->round = 0; at->round < {rounds}; at->round++)", lines)
        for part in parts:
            lines += part.after
    return lines


def _described(lowered: CpuKernel) -> list[Line]:
    """The kernel's own text as a comment."""
    rows = str(_without_lines(lowered)).splitlines()
    return [
        Line("/* " + comment(rows[0])),
        *(Line("   " + comment(r)) for r in rows[1:-1]),
        Line("   } */"),
    ]


def _without_lines(lowered: CpuKernel) -> CpuKernel:
    def bare(body):
        return tuple(replace(s, where="") for s in body)

    stages = []
    for stage in lowered.kernel.stages:
        dot = stage.dot
        if dot is not None:
            dot = replace(dot, a=bare(dot.a), b=bare(dot.b), where="")
        attend = stage.attend
        if attend is not None:
            sides = tuple(replace(side, body=bare(side.body)) for side in attend.sides)
            attend = replace(attend, sides=sides, where="")
        stages.append(replace(stage, body=bare(stage.body), dot=dot, attend=attend))
    kernel = replace(lowered.kernel, stages=tuple(stages))
    return replace(
        lowered, kernel=kernel, columns=lowered.columns and _without_lines(lowered.columns)
    )
