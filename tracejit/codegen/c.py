"""Plan → one C translation unit with one exported function that runs the whole step.

    void step(void *const *buffers, const double *scalars, void *scratch, const struct tj_run *run)

`buffers` are the addresses of the plan's buffers in their order, `scalars` the table of runtime
scalars, `scratch` memory for packed operands (CSource.scratch_bytes), `run` says how a task is run
on all threads. Each kernel is a struct of its pointers, scalars and reduced values, functions that
compute a chunk of a stage, and a function that runs the stages one after another. Sizes are plain
numbers: a unit belongs to one plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tracejit.codegen.c_blocking import Contraction, Target
from tracejit.codegen.c_body import pointers
from tracejit.codegen.c_loops import Part, full_stage, parts_of
from tracejit.codegen.c_matmul import contraction_parts
from tracejit.codegen.c_micro import vector_types
from tracejit.codegen.c_text import Line, block, comment, render
from tracejit.ir.ops.c_prelude import prelude_for
from tracejit.schedule.kernel import Kernel
from tracejit.schedule.kernel_text import canonical, print_kernel
from tracejit.schedule.plan import Launch, Plan
from tracejit.schedule.sizes import substitute

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

static inline int64_t tj_least(int64_t a, int64_t b) {
  return a < b ? a : b;
}
"""


@dataclass(frozen=True)
class CSource:
    """A generated unit; `scratch_bytes` of memory, 64-byte aligned, go with each call."""

    text: str
    scratch_bytes: int


def emit_plan(plan: Plan, target: Target | None = None) -> CSource:
    """Print a plan as a C unit for a machine with such vectors."""
    target = target or Target()
    names: dict[Kernel, str] = {}
    functions: list[str] = []
    calls: list[Line] = []
    scratch = 0
    position = {b.name: i for i, b in enumerate(plan.buffers)}
    for launch in (alone for together in plan.launches for alone in together.alone()):
        kernel = _concrete(launch)
        key = canonical(kernel)  # kernels that differ in the users' lines only are one
        if key not in names:
            names[key] = f"k{len(names)}"
            text, needed = _kernel(kernel, names[key], target)
            functions.append(text)
            scratch = max(scratch, needed)
        calls.append(_call(launch, names[key], position))
    step = render(
        block(
            "void step(void *const *buffers, const double *scalars, void *scratch,"
            " const struct tj_run *run)",
            [Line("(void)buffers, (void)scalars, (void)scratch, (void)run;"), *calls],
        )
    )
    body = "\n\n".join([*functions, step]) + "\n"
    vectors = vector_types(target.vector_bytes) if "_vector" in body else ""
    text = f"/* The plan {comment(plan.name)}. */\n{prelude_for(body)}{_RUN}{vectors}\n{body}"
    return CSource(text, scratch)


def _concrete(launch: Launch) -> Kernel:
    return substitute(launch.kernel, dict(zip(launch.kernel.sizes, launch.sizes, strict=True)))


def _call(launch: Launch, name: str, position: dict[str, int]) -> Line:
    bound = [
        f".{b.name} = buffers[{position[memory]}]"
        for b, memory in zip(launch.kernel.buffers, launch.buffers, strict=True)
    ]
    bound += [
        f".{s} = scalars[{slot}]"
        for s, slot in zip(launch.kernel.scalars, launch.scalars, strict=True)
    ]
    return Line(f"{name}(run, scratch, &(struct {name}){{{', '.join(bound)}}});")


def _kernel(kernel: Kernel, name: str, target: Target) -> tuple[str, int]:
    """The struct and functions of a kernel, and the scratch bytes that it needs."""
    micros: list[list[Line]] = []
    scratch, rounds = 0, 1
    if kernel.stages and kernel.stages[0].dot is not None:
        contraction = Contraction(kernel, name, target)
        parts, fields, micros = contraction_parts(contraction)
        scratch, rounds = contraction.scratch_bytes, contraction.rounds
        rest: list[Part] = []
        for number, stage in enumerate(kernel.stages[1:], 1):
            part, more = full_stage(kernel, stage, f"{name}_stage{number}", name)
            rest.append(part)
            fields += more
    else:
        parts, fields = parts_of(kernel, name)
        rest = []
    struct = block(f"struct {name}", [*pointers(kernel), *fields])
    struct[-1] = Line("};")
    blocks = [[*_described(kernel), *struct], *micros]
    for part in (*parts, *rest):
        if part.task is not None:
            head = f"TJ_TASK {part.task.name}(void *arguments, int64_t chunk)"
            blocks.append(block(head, [Line("(void)chunk;"), *part.task.lines]))
    main = [Line("(void)run, (void)scratch;")]
    if scratch:
        main.append(Line("at->packed = scratch;"))
    main += _sequence(parts, rounds) + _sequence(rest, 1)
    blocks.append(
        block(
            f"static void {name}(const struct tj_run *run, void *scratch, struct {name} *const at)",
            main,
        )
    )
    return "\n\n".join(render(b) for b in blocks), scratch


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


def _described(kernel: Kernel) -> list[Line]:
    """The kernel's own text as a comment."""
    rows = print_kernel(_without_lines(kernel)).splitlines()
    return [
        Line("/* " + comment(rows[0])),
        *(Line("   " + comment(r)) for r in rows[1:-1]),
        Line("   } */"),
    ]


def _without_lines(kernel: Kernel) -> Kernel:
    def bare(body):
        return tuple(replace(s, where="") for s in body)

    stages = []
    for stage in kernel.stages:
        dot = stage.dot
        if dot is not None:
            dot = replace(dot, a=bare(dot.a), b=bare(dot.b), where="")
        stages.append(replace(stage, body=bare(stage.body), dot=dot))
    return replace(kernel, stages=tuple(stages))
