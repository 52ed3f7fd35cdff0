"""What `make demo` runs: the two-layer net trained in eager and compiled, side by side.

    python -m examples.demo
"""

from __future__ import annotations

import statistics
import time

import torch

import tracejit
from examples.two_layer_autograd import make_step
from tracejit.testing import losses_agree


def main(steps: int = 500) -> bool:
    """Train both for `steps` steps; returns whether every loss agreed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    eager, _ = make_step(device=device)
    plain, _ = make_step(device=device)
    compiled = tracejit.compile(plain)

    def timed(step) -> tuple[float, float]:
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        loss = step()
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.item(), time.perf_counter() - started

    print(f"two-layer net, float32, {steps} steps on {device}, torch {torch.__version__}")
    print(f"{'step':>5s} {'eager loss':>14s} {'compiled loss':>14s}")
    agree, first = True, None
    times: dict[str, list[float]] = {"eager": [], "compiled": []}
    for t in range(steps):
        a, eager_seconds = timed(eager)
        b, compiled_seconds = timed(compiled)
        first = a if first is None else first
        agree = agree and losses_agree(b, a, first)
        times["eager"].append(eager_seconds)
        times["compiled"].append(compiled_seconds)
        if t % 50 == 0 or t == steps - 1:
            print(f"{t:5d} {a:14.6g} {b:14.6g}")
    eager_us = statistics.median(times["eager"][steps // 10 :]) * 1e6
    compiled_us = statistics.median(times["compiled"][steps // 10 :]) * 1e6
    print(f"\nall {steps} losses agree (|Δ| ≤ 1e-3·|loss| + 1e-9·first): {agree}")
    print(f"mode: {compiled.explain_mode()}")
    print(f"launches per step: {len(compiled.kernels)}")
    print(f"first call: {times['compiled'][0]:.3f} s")
    print(
        f"step: eager {eager_us:.0f} µs, compiled {compiled_us:.0f} µs, "
        f"ratio {eager_us / compiled_us:.2f} (medians)"
    )
    print("\nthe kernel generated for y_pred, the loss and its gradient:\n")
    print(next(k for k in compiled.kernels if "reduce" in k))
    return agree


if __name__ == "__main__":
    raise SystemExit(0 if main() else 1)
