"""What `make demo` runs: the two-layer net trained in eager and compiled, side by side.

python -m examples.demo
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

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

    def train(step: Callable, calls: int) -> tuple[list[float], list[float]]:
        """Losses and seconds of some calls in a row."""
        losses, seconds = [], []
        for _ in range(calls):
            started = time.perf_counter()
            losses.append(step().item())
            seconds.append(time.perf_counter() - started)
        return losses, seconds

    print(f"two-layer net, float32, {steps} steps on {device}, torch {torch.__version__}")
    print(f"{'step':>5s} {'eager loss':>14s} {'compiled loss':>14s}")
    losses: dict[str, list[float]] = {"eager": [], "compiled": []}
    times: dict[str, list[float]] = {"eager": [], "compiled": []}
    for t in range(0, steps, 50):  # in turns: the two disturb each other least in blocks
        for name, step in (("eager", eager), ("compiled", compiled)):
            found, seconds = train(step, min(50, steps - t))
            losses[name] += found
            times[name] += seconds
        print(f"{t:5d} {losses['eager'][t]:14.6g} {losses['compiled'][t]:14.6g}")
    print(f"{steps - 1:5d} {losses['eager'][-1]:14.6g} {losses['compiled'][-1]:14.6g}")
    pairs = list(zip(losses["compiled"], losses["eager"], strict=True))
    agree = all(losses_agree(ours, theirs, pairs[0][1]) for ours, theirs in pairs)
    eager_us = statistics.median(times["eager"][steps // 10 :]) * 1e6
    compiled_us = statistics.median(times["compiled"][steps // 10 :]) * 1e6
    print(f"\nall {steps} losses agree (|Δ| ≤ 1e-3·|loss| + 1e-9·first): {agree}")
    print(f"mode: {compiled.explain_mode()}")
    print(f"launches per step: {len(compiled.plans[-1].launches)}")
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
