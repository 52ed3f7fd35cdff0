"""The classic two-layer program over numpy arrays: numpy itself against `tracejit.compile`.

Prints the medians of 60 runs of 5 calls, in turn. OMP_NUM_THREADS and OPENBLAS_NUM_THREADS say how
many threads either has.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

import tracejit

RUNS, CALLS = 60, 5
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


def seconds(step: Callable, arrays: list[np.ndarray]) -> float:
    """The time of a call, over some calls."""
    started = time.perf_counter()
    for _ in range(CALLS):
        step(*arrays, 1e-6)
    return (time.perf_counter() - started) / CALLS


def main() -> None:
    for dtype in (np.float64, np.float32):
        r = np.random.default_rng(0)
        arrays = [r.standard_normal(shape).astype(dtype) for shape in SHAPES]
        steps = two_layer, tracejit.compile(two_layer)
        worlds = [(step, [x.copy() for x in arrays]) for step in steps]
        for world in worlds * 4:
            seconds(*world)
        times = [[seconds(*world) for world in worlds] for _ in range(RUNS)]
        theirs, ours = (statistics.median(x) for x in zip(*times, strict=True))
        text = f"numpy {theirs * 1e3:.2f} ms, tracejit {ours * 1e3:.2f} ms"
        print(f"{dtype.__name__}: {text}, {theirs / ours:.2f} x")


if __name__ == "__main__":
    main()
