"""The classic two-layer program over numpy arrays: numpy itself against `tracejit.compile`.

Prints the medians of 30 runs of 100 calls, in turn, and the fastest call of each. Each has a
process of its own, since the threads of one that wait for work would disturb the other; before each
turn there is a pause, until they have given up (OpenBLAS's spin for some 100 ms), and a call that
is not timed. OMP_NUM_THREADS and OPENBLAS_NUM_THREADS say how many threads they have.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np

import tracejit
from benchmarks.clock import PAUSE

RUNS, CALLS = 30, 100
SHAPES = ((64, 1000), (64, 10), (1000, 100), (100, 10))


def two_layer(x, y, w1, w2, learning_rate):
    h = x.dot(w1)
    h_relu = np.maximum(h, 0)
    y_pred = h_relu.dot(w2)
    loss = np.square(y_pred - y).sum()
    grad_y_pred = 2.0 * (y_pred - y)
    grad_w2 = h_relu.T.dot(grad_y_pred)
    grad_h_relu = grad_y_pred.dot(w2.T)
    grad_h = grad_h_relu.copy()
    grad_h[h < 0] = 0
    grad_w1 = x.T.dot(grad_h)
    w1 -= learning_rate * grad_w1
    w2 -= learning_rate * grad_w2
    return loss


def seconds(step: Callable, arrays: list[np.ndarray]) -> tuple[float, float]:
    """The mean time of some calls, and the least."""
    times = []
    for _ in range(CALLS):
        started = time.perf_counter()
        step(*arrays, 1e-6)
        times.append(time.perf_counter() - started)
    return statistics.mean(times), min(times)


def serve(pipe: Connection, dtype: str, compiled: bool) -> None:
    """A contender's process: the seconds of a run for each message."""
    r = np.random.default_rng(0)
    arrays = [r.standard_normal(shape).astype(dtype) for shape in SHAPES]
    step = tracejit.compile(two_layer) if compiled else two_layer
    for _ in range(4):
        seconds(step, arrays)
    while pipe.recv():
        step(*arrays, 1e-6)
        pipe.send(seconds(step, arrays))


def main() -> None:
    context = multiprocessing.get_context("spawn")
    for dtype in ("float64", "float32"):
        pipes = []
        for compiled in (False, True):
            mine, its = context.Pipe()
            context.Process(target=serve, args=(its, dtype, compiled), daemon=True).start()
            pipes.append(mine)
        times: list[list[tuple[float, float]]] = [[], []]
        for _ in range(RUNS):
            for pipe, found in zip(pipes, times, strict=True):
                time.sleep(PAUSE)
                pipe.send(True)
                found.append(pipe.recv())
        for pipe in pipes:
            pipe.send(False)
        for word, of in (("median", statistics.median), ("fastest", min)):
            theirs, ours = (of(x[word == "fastest"] for x in found) for found in times)
            text = f"numpy {theirs * 1e3:.3f} ms, tracejit {ours * 1e3:.3f} ms"
            print(f"{dtype}, {word}: {text}, {theirs / ours:.2f} x", flush=True)


if __name__ == "__main__":
    main()
