"""Dense products: the C executor's against numpy's BLAS, shape by shape.

    python -m benchmarks.products [--rounds N] [WORD …]

For each shape whose line has one of the words (all without): the least of the times of both, in
turn, the share of what the processor can multiply and add in that time, and how many times as fast
ours is. The peak is measured in the same run. Each contender has a process of its own, since the
threads of one that wait for work would disturb the other, and a pause before each turn. Ours is the
time of a plan's launches without the guards around them, numpy's that of a call with `out=`; of a
weight's gradient with its update (`w -= lr * (x.T @ g)`) both are the whole of it.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

from benchmarks.clock import PAUSE

SECONDS = 0.02  # a turn of a contender
PEAK = r"""
#include <stdint.h>
#include <time.h>
typedef float v __attribute__((vector_size(%(bytes)d)));
typedef double w __attribute__((vector_size(%(bytes)d)));
static double seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}
#define SUMS(F) F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8) F(9) F(10) F(11)
#define START(i) s##i = a * i;
#define STEP(i) s##i = s##i * a + b; __asm__ volatile("" : "+x"(s##i));
#define RATE(name, T, E) \
  __attribute__((optimize("fp-contract=fast"))) double name(int64_t n) { \
    T a = {0}, b = {0}, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11; \
    for (uint64_t i = 0; i < sizeof(T) / sizeof(E); i++) a[i] = (E)0.999, b[i] = (E)0.001; \
    SUMS(START) \
    const double from = seconds(); \
    for (int64_t i = 0; i < n; i++) { SUMS(STEP) } \
    return n * 24.0 * (sizeof(T) / sizeof(E)) / (seconds() - from); \
  }
RATE(peak_f32, v, float)
RATE(peak_f64, w, double)
"""


@dataclass(frozen=True)
class Shape:
    """A product m × k · k × n: `form` says of each operand whether it lies as it is read (N) or
    transposed (T); `batch` of them; `updates` what is there instead of making a result."""

    kind: str
    m: int
    n: int
    k: int
    form: str = "NN"
    batch: int = 1
    updates: bool = False

    def __str__(self) -> str:
        batch = f"{self.batch} × " if self.batch > 1 else ""
        text = f"{batch}{self.m} × {self.n}, k {self.k}, {self.form}"
        return f"{self.kind}: {text}{', update' if self.updates else ''}"

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.n * self.k

    def arrays(self, dtype: str) -> list[np.ndarray]:
        """A, B and the result, as they lie."""
        r, ways = np.random.default_rng(0), ((self.m, self.k), (self.k, self.n))
        shapes = [w if f == "N" else w[::-1] for w, f in zip(ways, self.form, strict=True)]
        batch = (self.batch,) if self.batch > 1 else ()
        made = [r.standard_normal((*batch, *s)).astype(dtype) for s in shapes]
        return [*made, np.zeros((*batch, self.m, self.n), dtype)]


SHAPES = (
    *(Shape("forward", m, n, k) for m in (1, 4, 16, 64) for n, k in ((100, 1000), (512, 784))),
    Shape("forward", 128, 512, 512),
    Shape("forward", 256, 512, 784),
    Shape("forward", 512, 512, 512),
    Shape("two layers", 64, 10, 100),
    Shape("two layers", 64, 100, 10, "NT"),
    Shape("two layers", 100, 10, 64, "TN"),
    Shape("two layers", 1000, 100, 64, "TN", updates=True),
    *(Shape("linear", m, n, k, "NT") for m in (8, 64, 256) for n, k in ((384, 128), (512, 784))),
    Shape("linear", 256, 10, 512, "NT"),
    Shape("linear", 256, 128, 512, "NT"),
    Shape("weights", 512, 784, 256, "TN"),
    Shape("weights", 128, 384, 256, "TN"),
    Shape("weights", 10, 512, 256, "TN"),
    Shape("weights", 512, 512, 512, "TN", updates=True),
    Shape("skinny", 512, 8, 512),
    Shape("skinny", 8, 512, 512),
    Shape("skinny", 2000, 32, 32),
    Shape("skinny", 32, 32, 4000),
    Shape("skinny", 1000, 1000, 8),
    Shape("ragged", 33, 65, 129),
    Shape("ragged", 61, 101, 307),
    Shape("ragged", 257, 259, 263),
    Shape("ragged", 127, 129, 1001, "TN"),
    Shape("ragged", 127, 129, 1001, "NT"),
    Shape("both transposed", 256, 256, 256, "TT"),
    Shape("square", 64, 64, 64),
    Shape("square", 128, 128, 128),
    Shape("square", 256, 256, 256),
    Shape("batched", 64, 64, 64, "NN", 16),
    Shape("batched", 64, 64, 32, "NT", 32),
    Shape("batched", 128, 64, 128, "NN", 8),
    Shape("batched", 17, 33, 65, "NN", 16),
)


def as_read(shape: Shape, given: Sequence[np.ndarray]) -> list[np.ndarray]:
    """A and B as the product reads them."""
    pairs = zip(given, shape.form, strict=False)
    return [x if form == "N" else x.swapaxes(-1, -2) for x, form in pairs]


def of_numpy(shape: Shape, dtype: str) -> Callable[[], float]:
    """The product by numpy's BLAS; a call says its seconds."""
    a, b, out = shape.arrays(dtype)
    a, b = as_read(shape, (a, b))
    made = np.empty_like(out)

    def product() -> float:
        started = time.perf_counter()
        if shape.updates:
            np.matmul(a, b, out=made)
            np.subtract(out, 1e-6 * made, out=out)
        else:
            np.matmul(a, b, out=out)
        return time.perf_counter() - started

    return product


def graph_of(shape: Shape, dtype: str) -> str:
    """The product as a graph: of operands as they lie, and of what it updates."""
    kind, batch = dtype.replace("float", "f"), [shape.batch] if shape.batch > 1 else []
    axes = (*range(len(batch)), len(batch) + 1, len(batch))

    def of(*sizes: int) -> str:
        return f"{kind}[{','.join(map(str, [*batch, *sizes]))}]"

    read = ((shape.m, shape.k), (shape.k, shape.n))
    lies = [s if f == "N" else s[::-1] for s, f in zip(read, shape.form, strict=True)]
    names, lines = ["%0", "%1"], []
    for i, form in enumerate(shape.form):
        if form == "T":
            names[i] = f"%{3 + i}"
            text = f"permute(%{i}, axes=({','.join(map(str, axes))}))"
            lines.append(f"{names[i]}: {of(*read[i])} = {text}")
    out = of(shape.m, shape.n)
    lines.append(f"%5: {out} = matmul({names[0]}, {names[1]})")
    if shape.updates:
        lines += [f"%6: {out} = mul(%5, 1e-06)", f"%7: {out} = sub(%2, %6)"]
    params = f"%0: {of(*lies[0])}, %1: {of(*lies[1])}, %2: {out}"
    inner = "\n".join(f"  {line}" for line in lines)
    end = "  write %2 <- %7" if shape.updates else "  return %5"
    return f"step({params}) {{\n{inner}\n{end}\n}}"


def of_tracejit(shape: Shape, dtype: str) -> Callable[[], float]:
    """The same by the C executor."""
    from tracejit.ir.text import parse
    from tracejit.runtime.c_executor import CExecutor
    from tracejit.schedule import schedule

    given = shape.arrays(dtype)
    plan = schedule(parse(graph_of(shape, dtype)))
    loaded = CExecutor().load(plan)
    memory = {b.name: given[b.index] for b in plan.buffers if b.kind == "input"}
    memory |= {b.name: given[2] for b in plan.buffers if b.kind == "output"}
    arena = np.zeros(loaded.layout.arena_bytes + 128, np.uint8)
    base = arena.ctypes.data + -arena.ctypes.data % 128
    addresses = []
    for i, name in enumerate(loaded.plan.addresses(plan.buffers)):
        place = loaded.layout.places.get(i)
        if place is None:
            addresses.append(memory[name].ctypes.data)
        else:
            addresses.append(base + place.offset if place.room is None else -1)
    for i, place in loaded.layout.places.items():
        if place.room is not None:
            addresses[i] = addresses[place.room] + place.offset
    want = np.matmul(
        *(x if f == "N" else x.swapaxes(-1, -2) for x, f in zip(given[:2], shape.form, strict=True))
    )
    scalars = [0.0] * len(plan.scalars)
    loaded.timed(addresses, scalars)
    found = given[2] / -1e-6 if shape.updates else given[2]
    error = np.abs(found - want).max() / np.abs(want).max()
    if not error < (1e-4 if dtype == "float32" else 1e-9):
        raise AssertionError(f"{shape}: {error}")

    def product(_held: tuple = (memory, arena)) -> float:
        return sum(loaded.timed(addresses, scalars))

    return product


CONTENDERS = {"numpy": of_numpy, "tracejit": of_tracejit}


def serve(pipe: Connection, contender: str) -> None:
    """A contender's process: for each (shape, dtype, seconds) the least time of a call."""
    made: dict[tuple, Callable[[], float]] = {}
    while (asked := pipe.recv()) is not None:
        *key, seconds = asked
        product = made.get(tuple(key))
        if product is None:
            product = made[tuple(key)] = CONTENDERS[contender](*key)
        product()
        best, until = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < until:
            best = min(best, product())
        pipe.send(best)


def peaks() -> dict[str, float]:
    """What all threads together multiply and add in a second."""
    from concurrent.futures import ThreadPoolExecutor

    from tracejit.runtime.c_compiler import load_library, vector_bytes

    library, threads = load_library(PEAK % {"bytes": vector_bytes()}), threads_of()
    found = {}
    for dtype in ("float32", "float64"):
        rate = library[f"peak_{dtype.replace('float', 'f')}"]
        rate.argtypes, rate.restype = [ctypes.c_int64], ctypes.c_double
        with ThreadPoolExecutor(threads) as pool:
            turns = [[*pool.map(rate, [3_000_000] * threads)] for _ in range(20)]
        found[dtype] = max(map(sum, turns))
    return found


def threads_of() -> int:
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


def measured(wanted: list[tuple[Shape, str]], rounds: int) -> list[dict[str, float]]:
    """The least seconds of each contender for each of what is wanted."""
    context, pipes = multiprocessing.get_context("spawn"), {}
    for contender in CONTENDERS:
        pipes[contender], its = context.Pipe()
        context.Process(target=serve, args=(its, contender), daemon=True).start()
        its.close()  # so that the end of a process is the end of its answers
    found: list[dict[str, float]] = [dict.fromkeys(CONTENDERS, float("inf")) for _ in wanted]
    for _ in range(rounds):
        for key, best in zip(wanted, found, strict=True):
            for contender, pipe in pipes.items():
                time.sleep(PAUSE)
                pipe.send((*key, SECONDS))
                best[contender] = min(best[contender], pipe.recv())
    for pipe in pipes.values():
        pipe.send(None)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    both = [(shape, dtype) for shape in SHAPES for dtype in ("float32", "float64")]
    words = options.words or [""]
    wanted = [key for key in both if any(word in f"{key[0]} {key[1]}" for word in words)]
    peak = peaks()
    print(", ".join(f"{dtype}: {rate / 1e9:.0f} GF/s" for dtype, rate in peak.items()))
    ratios = []
    found = measured(wanted, options.rounds)
    for (shape, dtype), best in zip(wanted, found, strict=True):
        texts = []
        for contender, seconds in best.items():
            share = shape.flops / seconds / peak[dtype]
            texts.append(f"{contender} {seconds * 1e6:7.1f} µs {100 * share:3.0f} %")
        ratios.append(best["numpy"] / best["tracejit"])
        print(f"{dtype} {str(shape):46} {'  '.join(texts)}  {ratios[-1]:.2f} x")
    behind = sum(ratio < 0.95 for ratio in ratios)
    print(f"median {statistics.median(ratios):.2f} x, {behind} of {len(ratios)} behind numpy")


if __name__ == "__main__":
    main()
