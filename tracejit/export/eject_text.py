"""The text of an ejected file around what is particular to a step: C, launches, the frame."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable, Iterator, Sequence

from tracejit.codegen.c import emit_kernel, unit
from tracejit.runtime.c_compiler import find_compiler, flags_for
from tracejit.schedule.cpu.plan import CpuPlan

WIDE = 88  # columns of a line of Python

_THREADS = """
/* Chunks of a task on all threads; results do not depend on their number. */
static void on_all(void (*task)(void *, int64_t), void *arguments, int64_t chunks,
                   int64_t threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t chunk = 0; chunk < chunks; chunk++) task(arguments, chunk);
}

struct tj_run run = {on_all, 1};
"""


def kernel_text(plan: CpuPlan, vector_bytes: int) -> str:
    """The C program of a plan's kernels, and how they run on threads."""
    functions = [emit_kernel(kernel, k) for k, kernel in enumerate(plan.kernels.values())]
    text = unit(functions, vector_bytes) + _THREADS
    return "\n".join(line.rstrip() for line in text.splitlines())


def flags() -> list[str]:
    """What the C compiler is given."""
    return [f for f in flags_for(find_compiler()) if f != "-fopenmp-simd"] + ["-fopenmp"]


def quoted(text: str) -> str:
    """A string as a literal, in double quotes where it has none."""
    plain = repr(text)
    return f'"{plain[1:-1]}"' if plain[0] == "'" and '"' not in plain else plain


def local_name(name: str) -> str:
    """What a tensor is called in a call: of an optimizer's state, by parameter and kind."""
    of = re.fullmatch(r".*state\[(.+)\]\.(\w+)", name)
    return f"{of[1]}_{of[2]}" if of else name


def identifier(name: str, taken: set[str]) -> str:
    """A name as an identifier that is not taken; it is then."""
    text = re.sub(r"\W+", "_", name).strip("_") or "x"
    text = f"_{text}" if text[0].isdigit() or keyword.iskeyword(text) else text
    while text in taken:
        text += "_"
    taken.add(text)
    return text


def indented(lines: Iterable[str], by: int) -> Iterator[str]:
    """Lines further to the right."""
    for line in lines:
        yield f"{' ' * by}{line}" if line else line


def listed(head: str, rows: Sequence[str], tail: str, by: int = 4) -> str:
    """Rows between a head and a tail, one per line."""
    if not rows:
        return head + tail.strip()
    return "\n".join([head, *(f"{' ' * by}{row}" for row in rows), tail])


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


SCRIPT = '''"""<<name>>, as tracejit compiled it: its kernels in C, and the order of their calls.

    python <<module>>.py              # three calls on numbers made up here

    from <<module>> import Step
    step = Step(state)                # tensors by name, as STATE lists them; calls change them
    result = step(<<arguments>>)

It needs torch, and a C compiler ($CC, or cc). It is for the shapes that are asserted in the call.
What a call returns has no history.
"""

<<imports>>
from os import environ
from pathlib import Path

import torch

# name: (shape, dtype, whether it requires grad)
<<state>>
# those that have a gradient before a call: one of zeros where there is none
<<graded>>
# what calls read besides, and may change; those with a keyword can be given for one call
<<numbers>>

SOURCE = r"""
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
    )


def check(tensor, name, shape, dtype, strides=None):
    """A tensor must be what the kernels were made for."""
    assert tensor.shape == shape, f"{name} has shape {tuple(tensor.shape)}, not {shape}"
    assert tensor.dtype is dtype, f"{name} is {tensor.dtype}, not {dtype}"
    right = tensor.is_contiguous() if strides is None else tensor.stride() == strides
    assert right, f"{name} has strides {tensor.stride()}"


def within(tensor, low, high, ignore, error, message):
    """Indices must be in their range: kernels read nothing outside."""
    outside = (tensor < low) | (tensor >= high)
    if ignore is not None:
        outside &= tensor != ignore
    if outside.any():
        raise error(message.replace("{value}", str(tensor[outside].flatten()[0].item())))


def same(a, b):
    """Whether two numbers are the same, of one type, NaN included."""
    return repr(a) == repr(b)


class Step:
    """The step and its state: `state`, tensors by name, and `numbers`."""

    def __init__(self, state):
        assert state.keys() == STATE.keys(), sorted(state.keys() ^ STATE.keys())
        for name, (shape, dtype, *grad) in STATE.items():
            check(state[name], name, shape, dtype)
            assert state[name].requires_grad == bool(grad), f"{name}.requires_grad"
        self.state = dict(state)
        for name in WITH_GRADIENT:
            if state[name].grad is None:
                state[name].grad = torch.zeros_like(state[name])
        self.numbers = dict(NUMBERS)
        self.work = torch.empty(<<work>>, dtype=torch.uint8)  # intermediates

    @torch.no_grad()
<<signature>>
        RUN[1] = torch.get_num_threads()
<<call>>


def made_up():
    """Arguments of a call."""
<<random>>


def main():
    """Three calls on numbers made up here."""
    torch.manual_seed(0)
    state = {}
    for name, (shape, dtype, *grad) in STATE.items():
        state[name] = torch.zeros(shape, dtype=dtype)
        if dtype.is_floating_point and grad:
            state[name].normal_(0, 0.1).requires_grad_()
    step = Step(state)
    for _ in range(3):
        print(step(**made_up()))


if __name__ == "__main__":
    main()
'''
