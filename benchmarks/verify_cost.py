"""What `verify` costs once its calls are over: a replay with it beside one without.

    python -m benchmarks.verify_cost [--json FILE]

A small training step (64 × 64, SGD) is compiled without `verify`, with `verify=3`, and with
`verify="sample:0.001"`, which verifies a call in a thousand. Microseconds of a replay, medians of
rounds in which the steps take turns; the last one includes its verified calls. The goal is that
`verify=3` is within 3 % of none: nothing is left in the way.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import tracejit
from benchmarks.machine import machine, write

ROUNDS, CALLS = 15, 1000
GOAL = 1.03
ASKED: dict[str, int | str] = {"none": 0, "verify=3": 3, "sample:0.001": "sample:0.001"}


def training(asked: int | str) -> tracejit.CompiledStep:
    """A step of its own, which replays, and whose first calls are verified."""
    torch.manual_seed(0)
    w = torch.randn(64, 64, requires_grad=True)
    x, y = torch.randn(64, 64), torch.randn(64, 64)
    opt = torch.optim.SGD([w], lr=1e-3)

    def step() -> torch.Tensor:
        opt.zero_grad()
        loss = (torch.tanh(x @ w) - y).square().mean()
        loss.backward()
        opt.step()
        return loss.detach()

    compiled = tracejit.compile(step, verify=asked, on_unsupported="raise")
    for _ in range(12):
        compiled()
    assert compiled.stats.replays >= 6, compiled.explain_mode()
    certificate = compiled.certificate()
    assert bool(asked) == bool(certificate.verified) and not certificate.withdrawn
    return compiled


def measured(rounds: int = ROUNDS, calls: int = CALLS) -> dict[str, float]:
    """Microseconds of a call, by what was asked for."""
    steps = {name: training(asked) for name, asked in ASKED.items()}
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            for _ in range(calls):
                step()
            spent[name].append((time.perf_counter() - began) / calls * 1e6)
    return {name: statistics.median(times) for name, times in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measured()
    for name, spent in found.items():
        print(f"{name:14} {spent:7.2f} µs a call, {spent / found['none']:.3f} of none")
    if options.json:
        write(options.json, {"machine": machine(), "microseconds": found, "goal": GOAL})


if __name__ == "__main__":
    main()
