"""One contender of one case in a process of its own; run.py talks to it.

    python -m benchmarks.worker CASE CONTENDER DEVICE FILES [--small] [--memory]

FILES is a folder: `start.npz` holds the arrays that contenders without torch start from, and
`CONTENDER.npz` is written here: the tensors that the case changes, after the first CALLS calls.
stdout carries JSON lines: first {"numbers", "first_call_s"}, then a time per call in seconds for
each line on stdin. With --memory there is one line instead: {"rss_bytes", "allocated_bytes",
"library_bytes"}.

first_call_s starts before the contender's compiler is imported and ends when the first result is a
number. The timed calls are preceded by one that is not timed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import os
import sys
import time
from collections import ChainMap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CALLS = 12  # compared with eager; a compiler's warm-up lies within
SECONDS_PER_ROUND = 0.3
WARM_UP = 3  # calls before a whole step is captured
COMPARED = 1 << 20  # elements of each tensor


@dataclass
class Contender:
    """A step ready to be called.

    state: the results of the calls so far, as arrays.
    number: what a call returned as a float, or None; waits for it.
    sync: waits until a call's work is done.
    """

    step: Callable[[], object]
    state: Callable[[], list[np.ndarray]]
    number: Callable[[object], float | None]
    sync: Callable[[object], object]


def tracejit(step: Callable) -> Callable:
    import tracejit

    return tracejit.compile(step, on_unsupported="raise")


def torch_compile(mode: str | None = None) -> Callable[[Callable], Callable]:
    """torch.compile of the step as users write it, in a mode."""

    def compile_step(step: Callable) -> Callable:
        import torch
        import torch._inductor.config as inductor

        inductor.fallback_random = True  # else it draws other numbers than eager
        return torch.compile(step, mode=mode)

    return compile_step


def torch_compile_traced(step: Callable) -> Callable:
    import torch

    torch._dynamo.config.trace_autograd_ops = True
    return torch.compile(step)


def whole_graph(step: Callable) -> Callable:
    """The whole step in one CUDA graph, by hand, as torch's documentation has it: first calls on a
    side stream, a capture, and replays of it. Its results lie where the first ones lie."""
    import torch

    side, graphs, results = torch.cuda.Stream(), [], []

    def call() -> object:
        if len(results) < WARM_UP:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                results.append(step())
            torch.cuda.current_stream().wait_stream(side)
            return results[-1]
        if not graphs:
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[0]):  # which runs nothing
                results[:] = [step()] * WARM_UP
        graphs[0].replay()
        return results[0]

    return call


COMPILERS: dict[str, Callable[[Callable], Callable]] = {
    "eager": lambda step: step,
    "eager fused": lambda step: step,
    "eager channels_last": lambda step: step,
    "eager graph": whole_graph,
    "eager fused graph": whole_graph,
    "torch.compile": torch_compile(),
    "torch.compile traced": torch_compile_traced,
    "torch.compile reduce-overhead": torch_compile("reduce-overhead"),
    "torch.compile max-autotune": torch_compile("max-autotune"),
    "tracejit": tracejit,
    "tracejit launches": tracejit,
}
ARRAYS = {"jax": ("jax_steps", "jax_images"), "numpy": ("numpy_steps",)}


def build_torch(case_name: str, contender: str, device: str, small: bool) -> Contender:
    """A contender that runs the torch step."""
    import torch

    from benchmarks.cases import ALL

    case = ALL[case_name]
    plain, tensors = case.made(device, contender, small=small)
    compiled: list[Callable] = []

    def step() -> object:  # the first call is the one that compiles
        if not compiled:
            compiled.append(COMPILERS[contender](plain))
        return compiled[0]()

    def state() -> list[np.ndarray]:
        found = [t.grad if case.grads else t for t in tensors]
        if any(t is None for t in found):
            raise RuntimeError("a gradient is missing")
        return [sampled(t.detach()).cpu().numpy() for t in found]

    def sync(out: object) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def number(out: torch.Tensor | float | None) -> float | None:
        if out is None:
            return sync(out)
        if isinstance(out, float):  # which the step itself has waited for
            return out
        return (out if out.numel() == 1 else out.pow(2).mean()).item()

    return Contender(step, state, number, sync)


def sampled(tensor):
    """At most COMPARED elements of a tensor or array, evenly: what contenders are compared by."""
    flat = tensor.reshape(-1)
    return flat[:: -(-len(flat) // COMPARED) or 1]


def build_arrays(case_name: str, contender: str, start: Path) -> Contender:
    """A contender that has the step written for itself."""
    from benchmarks.cases import ALL

    like = ALL[case_name].like or case_name
    with np.load(start) as file:
        arrays = dict(file)
    made: list[tuple] = []

    def step() -> object:
        if not made:
            modules = [importlib.import_module(f"benchmarks.{m}") for m in ARRAYS[contender]]
            made.append(ChainMap(*(m.STEPS for m in modules))[like](arrays))
        return made[0][0]()

    def sync(out: object) -> None:
        if contender == "jax":
            sys.modules["jax"].block_until_ready(out)

    def number(out: object) -> float | None:
        if out is None or isinstance(out, (tuple, list)):
            return sync(out)
        out = np.asarray(out)
        return float(out if out.size == 1 else np.square(out).mean())

    return Contender(step, lambda: [sampled(x) for x in made[0][1]()], number, sync)


def serve(contender: Contender, state_file: Path, answer: Callable[[object], None]) -> None:
    """First calls, then a round for each line on stdin."""
    begun = time.perf_counter()
    numbers = [contender.number(contender.step())]
    first_call = time.perf_counter() - begun
    numbers += [contender.number(contender.step()) for _ in range(CALLS - 1)]
    np.savez(state_file, *contender.state())

    def timed(count: int) -> float:
        out = contender.step()
        contender.sync(out)
        begun = time.perf_counter()
        for _ in range(count):
            out = contender.step()
        contender.sync(out)
        return (time.perf_counter() - begun) / count

    count = max(1, int(SECONDS_PER_ROUND / timed(3)))
    answer({"numbers": numbers, "first_call_s": first_call})
    for _ in sys.stdin:
        answer(timed(count))


def peak_memory(build: Callable[[bool], Contender], device: str) -> dict[str, int | None]:
    """What a warm step needs beyond the tensors that exist before its first call.

    build: small -> a fresh contender. The small one loads libraries, so that they do not count.
    allocated_bytes counts what kernels work in: all that torch's allocator gave, which has all
    memory of a compiled step, and in eager the buffers in which MKL packs operands of matmuls.
    library_bytes is MKL's part. rss_bytes is the peak of resident memory, to some hundred KiB; it
    includes what compilation left behind. None on a GPU.
    """
    import torch

    if device == "cuda":
        measured = build(False)
        before = torch.cuda.memory_allocated()
        for _ in range(CALLS):
            measured.step()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(CALLS):
            measured.step()
        peak = torch.cuda.max_memory_allocated() - before
        return {"rss_bytes": None, "allocated_bytes": peak, "library_bytes": None}

    def settle() -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)

    library = _mkl_peak()
    warm, measured = build(True), build(False)
    for _ in range(3):
        warm.step()
    settle()
    before = _status("VmRSS")
    for _ in range(CALLS):
        measured.step()
    settle()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    for _ in range(CALLS):
        measured.step()
    rss = _status("VmHWM") - before
    packed = library()
    del warm, measured
    gc.collect()  # memory that steps share counts for the next one
    allocated = allocated_peak(build(False).step, CALLS)
    return {
        "rss_bytes": rss,
        "allocated_bytes": allocated + packed,
        "library_bytes": packed,
    }


def _mkl_peak() -> Callable[[], int]:
    """Starts to count the bytes of MKL's own buffers; gives the most that they were so far. MKL is
    linked into torch; where it is not, nothing is counted."""
    import torch

    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    try:
        peak = library.mkl_serv_peak_mem_usage  # of mkl_service.h: 1 enables, 2 reads
    except AttributeError:
        return lambda: 0
    peak.restype = ctypes.c_longlong
    peak(1)
    return lambda: max(0, peak(2))


def allocated_peak(step: Callable[[], object], calls: int) -> int:
    """The most bytes that torch's CPU allocator holds during a warm call, of those asked for since
    before the first: `calls` calls are made first, then as many are measured."""
    import torch

    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        for _ in range(calls):
            step()
        with torch.profiler.record_function("warm"):
            pass
        for _ in range(calls):
            step()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    total = peak = 0
    for event in events:
        if event.name() == "warm":
            peak = total
        elif event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


def _status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("case")
    parser.add_argument("contender", choices=[*COMPILERS, *ARRAYS])
    parser.add_argument("device")
    parser.add_argument("files", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    line = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else prints must not get between the answers

    def answer(value: object) -> None:
        line.write(json.dumps(value) + "\n")

    def build(small: bool) -> Contender:
        if options.contender in ARRAYS:
            return build_arrays(options.case, options.contender, options.files / "start.npz")
        small |= options.small
        return build_torch(options.case, options.contender, options.device, small)

    if options.memory:
        answer(peak_memory(build, options.device))
    else:
        state_file = options.files / f"{options.contender}.npz"
        serve(build(False), state_file, answer)


if __name__ == "__main__":
    main()
