"""An ejected step's kernels in C: the source, its compilation through ctypes, and the launches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tracejit.codegen.c import emit_kernel, unit
from tracejit.export.eject_text import WIDE, indented, listed
from tracejit.runtime.c_compiler import find_compiler, flags_for, vector_bytes
from tracejit.runtime.program import Program
from tracejit.schedule.cpu.plan import CpuPlan
from tracejit.schedule.plan import runs

MOST_LINES = 3  # of the user's that are said of a kernel

_THREADS = """
/* Chunks of a task on all threads; results do not depend on their number. */
static void on_all(void (*task)(void *, int64_t), void *arguments, int64_t chunks,
                   int64_t threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t chunk = 0; chunk < chunks; chunk++) task(arguments, chunk);
}

struct tj_run run = {on_all, 1};
"""


def kernel_text(plans: Sequence[CpuPlan], vector_bytes: int) -> str:
    """The C program of the kernels of plans, and how they run on threads."""
    kernels = (kernel for plan in plans for kernel in plan.kernels.values())
    functions = [emit_kernel(kernel, k) for k, kernel in enumerate(kernels)]
    text = unit(functions, vector_bytes).text + _THREADS
    return "\n".join(line.rstrip() for line in text.splitlines())


def flags() -> list[str]:
    """What the C compiler is given."""
    needed = [f for f in flags_for(find_compiler()) if f != "-fopenmp-simd"]
    return [*needed, "-shared", "-fopenmp", "-w"]


_TEXT = '''SOURCE = r"""
<<source>>
"""


<<flags>>


def compiled(source):
    """The kernels as a library that is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        text, library = Path(folder, "kernels.c"), Path(folder, "kernels.so")
        text.write_text(source)
        command = [environ.get("CC", "cc"), *FLAGS, str(text), "-o", str(library), "-lm"]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(library))


LIBRARY = compiled(SOURCE)
RUN = (ctypes.c_int64 * 2).in_dll(LIBRARY, "run")  # what runs tasks; the number of threads
<<kernels>>


def launch(kernel, buffers, scalars=(), scratch=0):
    """Run a kernel on tensors and addresses, and numbers."""
    places = [b.data_ptr() if isinstance(b, torch.Tensor) else b for b in buffers]
    kernel(
        ctypes.byref(RUN),
        ctypes.c_void_p(scratch),
        (ctypes.c_void_p * len(places))(*places),
        (ctypes.c_double * len(scalars))(*scalars),
    )'''


class CKernels:
    """The kernels of programs of the C executor; see `eject_call.Kernels`."""

    needs = ", and a C compiler ($CC, or cc)"
    imports = (
        "import ctypes",
        "import subprocess",
        "import tempfile",
        "from os import environ",
        "from pathlib import Path",
    )
    others = ()
    begin = ("RUN[1] = torch.get_num_threads()",)

    def __init__(self, programs: Sequence[Program]):
        self.programs = programs
        self.plans: list[CpuPlan] = [program.loaded.plan for program in programs]
        self.nbytes = max(1, *(program.arena_bytes for program in programs))
        self._first: dict[int, int] = {}  # the number of a program's first kernel
        count = 0
        for program, plan in zip(programs, self.plans, strict=True):
            self._first[id(program)] = count
            count += len(plan.kernels)
        self.fields = (
            f"self.work = torch.empty({self.nbytes}, dtype=torch.uint8)  # intermediates",
        )

    @property
    def text(self) -> str:
        parts = {
            "<<source>>": kernel_text(self.plans, vector_bytes()),
            "<<flags>>": listed("FLAGS = [", [f'"{flag}",' for flag in flags()], "]"),
            "<<kernels>>": "\n".join(self._named()),
        }
        text = _TEXT
        for name, value in parts.items():
            text = text.replace(name, value)
        return text

    def _named(self) -> Iterator[str]:
        """A line for each kernel, with the user's lines that it computes."""
        for program, plan in zip(self.programs, self.plans, strict=True):
            lines: dict[str, list[str]] = {}
            for call, where in zip(plan.calls, program.loaded.lines(), strict=True):
                lines.setdefault(call.kernel, []).extend(where)
            for number, name in enumerate(plan.kernels, self._first[id(program)]):
                where = list(dict.fromkeys(lines.get(name, [])))
                said = ", ".join(where[:MOST_LINES]) + ", …" * (len(where) > MOST_LINES)
                yield f"kernel{number} = LIBRARY.kernel{number}{f'  # {said}' if said else ''}"

    def launches(
        self, program: Program, at: dict[str, str], scalars: Sequence[str]
    ) -> Iterator[str]:
        """The calls of a program, in their order."""
        buffers, plan = program.plan.buffers, program.loaded.plan
        names, at = plan.addresses(buffers), dict(at)
        for i, place in program.loaded.layout.places.items():
            room = "work" if place.room is None else f"{at[names[place.room]]}.data_ptr()"
            at[names[i]] = f"{room} + {place.offset}" if place.offset else room
        if any(text.startswith("work") for text in at.values()):
            yield "work = self.work.data_ptr()"
        number = {name: k for k, name in enumerate(plan.kernels, self._first[id(program)])}
        steps = {b.name: b.step for b in buffers}
        works = dict(plan.working)
        for together in runs(plan.calls, lambda call: call.loop):
            loops = {"part": plan.parts_of(together[0]), "i": plan.times(together[0])}
            loops = {name: count for name, count in loops.items() if count > 1}
            lines = []
            for call in together:
                places = [
                    _moved(at[name], {"i": steps.get(name, 0), "part": further}, loops)
                    for name, further in call.moves
                ]
                given = [scalars[slot] for slot in call.scalars]
                working = call.working
                if working:
                    working = _moved(at[working], {"part": works[working]}, loops)
                lines += call_of(number[call.kernel], places, given, working)
            for depth, (name, count) in enumerate(loops.items()):
                yield f"{'    ' * depth}for {name} in range({count}):"
            yield from indented(lines, 4 * len(loops))


def _moved(place: str, moves: Mapping[str, int], loops: Mapping[str, int]) -> str:
    """A place that lies some bytes further in each turn of loops."""
    further = [f"{name} * {step}" for name, step in moves.items() if step and name in loops]
    return " + ".join([place, *further])


def call_of(number: int, places: Sequence[str], scalars: Sequence[str], working: str) -> list[str]:
    """The launch of a kernel: on one line where it fits."""
    parts = [f"kernel{number}", f"[{', '.join(places)}]"]
    if scalars:
        parts.append(f"[{', '.join(scalars)}]")
    if working:
        parts.append(f"scratch={working}")
    line = f"launch({', '.join(parts)})"
    if len(line) + 8 <= WIDE:
        return [line]
    rows = ["launch("]
    for part in parts:
        if len(part) + 13 <= WIDE or not part.startswith("["):
            rows.append(f"    {part},")
        else:
            items = part[1:-1].split(", ")
            rows += ["    [", *(f"        {item}," for item in items), "    ],"]
    return [*rows, ")"]
