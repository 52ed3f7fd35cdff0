"""A plan's kernels → C functions, and C units that export them.

    void kernel0(const struct tj_run *run, void *scratch, void *const *buffers,
                 const double *scalars)

`run` says how a task is run on all threads, `scratch` is memory for packed operands, `buffers` and
`scalars` are what the kernel lists, in its order. Each kernel is a struct of its pointers, scalars
and reduced values, functions that compute a chunk of a stage, and a function that runs the stages
one after another. Sizes are plain numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tracejit.codegen.c_blocking import Contraction, Target
from tracejit.codegen.c_body import pointers
from tracejit.codegen.c_loops import Part, full_stage
from tracejit.codegen.c_matmul import contraction_parts
from tracejit.codegen.c_micro import vector_types
from tracejit.codegen.c_outer import parts_of
from tracejit.codegen.c_ride import Ride, ride_parts, with_rides
from tracejit.codegen.c_text import Line, block, comment, render
from tracejit.ir.ops.c_prelude import prelude_for
from tracejit.schedule.kernel import Kernel
from tracejit.schedule.kernel_text import canonical
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
class Piece:
    """What is compiled as one function: a kernel with plain numbers as sizes, and what rides along.
    `launch` binds it, but for the sizes."""

    launch: Launch
    ride: Ride | None

    @property
    def identity(self) -> str:
        """A text that pieces share if they differ in names and the users' lines only."""
        kernel, ride = self.launch.kernel, self.ride
        if ride is None:
            return str(canonical(kernel))
        together = replace(kernel, stages=(*kernel.stages, ride.stage))
        return f"{canonical(together)}\n{canonical(ride.columns)}"


@dataclass(frozen=True)
class CKernel:
    """A generated kernel: the exported function `symbol` of a unit that has its text; `scratch`
    bytes of memory, 64-byte aligned, go with each call."""

    symbol: str
    text: str
    scratch: int


def pieces(plan: Plan) -> list[Piece]:
    """What a plan runs, in its order."""
    alone = [_concrete(one) for together in plan.launches for one in together.alone()]
    return [Piece(launch, ride) for launch, ride in with_rides(alone)]


def _concrete(launch: Launch) -> Launch:
    """The launch of a kernel with plain numbers as sizes."""
    sizes = dict(zip(launch.kernel.sizes, launch.sizes, strict=True))
    return replace(launch, kernel=substitute(launch.kernel, sizes), sizes=())


def emit_kernel(piece: Piece, target: Target | None = None, number: int = 0) -> CKernel:
    """Print a piece for a machine with such vectors; `number` names it in a unit."""
    kernel = piece.launch.kernel
    text, scratch = _kernel(kernel, piece.ride, f"k{number}", target or Target())
    bound = [f".{b.name} = buffers[{i}]" for i, b in enumerate(kernel.buffers)]
    bound += [f".{s} = scalars[{i}]" for i, s in enumerate(kernel.scalars)]
    entry = block(
        f"void kernel{number}(const struct tj_run *run, void *scratch, void *const *buffers,"
        " const double *scalars)",
        [
            Line("(void)buffers, (void)scalars;"),
            Line(f"k{number}(run, scratch, &(struct k{number}){{{', '.join(bound)}}});"),
        ],
    )
    return CKernel(f"kernel{number}", f"{text}\n\n{render(entry)}\n", scratch)


def unit(kernels: Sequence[CKernel], target: Target | None = None) -> str:
    """The C program of kernels of different numbers."""
    body = "\n".join(kernel.text for kernel in kernels)
    vectors = vector_types((target or Target()).vector_bytes, body)
    return f"{prelude_for(body)}{_RUN}{vectors}\n{body}"


def _kernel(kernel: Kernel, ride: Ride | None, name: str, target: Target) -> tuple[str, int]:
    """The struct and functions of a kernel, and the scratch bytes that it needs."""
    micros: list[list[Line]] = []
    scratch, rounds = 0, 1
    own = kernel  # with buffers of its own in scratch memory
    if kernel.stages and kernel.stages[0].dot is not None:
        contraction = Contraction(kernel, name, target)
        parts, fields, micros = contraction_parts(contraction)
        scratch, rounds = contraction.scratch_bytes, contraction.rounds
        rest: list[Part] = []
        for number, stage in enumerate(kernel.stages[1:], 1):
            part, more = full_stage(kernel, stage, f"{name}_stage{number}", name)
            rest.append(part)
            fields += more
    elif ride is not None:
        parts, fields, rest = ride_parts(ride, name), [], []
        own = replace(kernel, buffers=(*kernel.buffers, *ride.parts))
    else:
        parts, fields = parts_of(kernel, name, name)
        rest = []
    struct = block(f"struct {name}", [*pointers(own), *fields])
    struct[-1] = Line("};")
    described = _described(kernel)
    if ride is not None:
        described += _described(replace(kernel, stages=(ride.stage,)))
    blocks = [[*described, *struct], *micros]
    for part in (*parts, *rest):
        if part.task is not None:
            head = f"TJ_TASK {part.task.name}(void *arguments, int64_t chunk)"
            blocks.append(block(head, [Line("(void)chunk;"), *part.task.lines]))
    main = [Line("(void)run, (void)scratch;")]
    if scratch:
        main.append(Line("at->packed = scratch;"))
    for part in ride.parts if ride is not None else ():
        main.append(Line(f"at->{part.name} = (void *)((char *)scratch + {scratch});"))
        scratch += -(-ride.part_elements * part.dtype.itemsize // 64) * 64
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
    rows = str(_without_lines(kernel)).splitlines()
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
