"""What a call costs on the host: replays by the number of guarded values, and reruns.

    python -m benchmarks.replay_cost [--json FILE]

A step reads `n` integers, strings and flags of an object and adds 1 to a tensor of four
elements. Reported are its guard alone, the whole call, and what of it is neither guard nor C;
then, for a deep net that is traced anew on every call, what each torch call costs beyond the
replay, and what a step that cannot be compiled costs beyond eager. Medians, in microseconds.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable

import torch
from torch.overrides import TorchFunctionMode

import tracejit
from benchmarks.clock import microseconds
from benchmarks.machine import machine, write
from benchmarks.stages import deep_net

COUNTS = (4, 50, 500)
CALLS = 1000  # in a row
EAGER_GOAL = 5.0
GOALS = {4: 5.0, 50: 8.0, 500: 25.0}  # of the guard, in microseconds
AROUND_GOAL = 3.0


class Config:
    """Holds the values that a step reads."""


def make_step(n: int) -> Callable:
    """A step that reads n plain values, each by its own attribute."""
    config = Config()
    for i in range(n):
        setattr(config, f"v{i}", (i, f"text {i}", i % 2 == 0)[i % 3])
    reads = "\n".join(f"    config.v{i}" for i in range(n))
    source = f"def step():\n{reads}\n    x.add_(1)\n"
    namespace = {"config": config, "x": torch.zeros(4)}
    exec(source, namespace)
    return namespace["step"]


def replay(n: int) -> dict[str, float]:
    """The guard and the whole call, for n guarded values."""
    step = tracejit.compile(make_step(n), on_unsupported="raise")
    for _ in range(5):
        step()
    assert step.stats.replays >= 2, step.explain_mode()
    guard = step._replays[0].guard
    found = {
        "guard": microseconds(lambda: guard((), {}), calls=CALLS),
        "call": microseconds(step, calls=CALLS),
    }
    names = step._replays[
        0
    ].run.function.__globals__  # of the C executor: the foreign call alone is timed
    run, calls = names["run"], []
    names["run"] = lambda *call: (calls.append(call), run(*call))
    step()
    names["run"] = run
    bare = microseconds(lambda: run(*calls[0]), calls=CALLS)
    return found | {"around": found["call"] - found["guard"] - bare}


class _Counter(TorchFunctionMode):
    """Counts torch calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def rerun() -> dict[str, float]:
    """A deep net in both modes: per call, and per torch call what a rerun costs more."""
    step = deep_net()
    with _Counter() as counter:
        step()
    found = {"torch_calls": counter.calls}
    for mode in ("rerun", "replay"):
        compiled = tracejit.compile(
            step, mode="rerun" if mode == "rerun" else "auto", on_unsupported="raise"
        )
        for _ in range(5):
            compiled()
        found[mode] = microseconds(compiled, rounds=7, calls=20)
    found["per_torch_call"] = (found["rerun"] - found["replay"]) / counter.calls
    return found


def eager() -> float:
    """What a call beyond eager costs that runs eagerly at once, as it was refused before."""

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x if refused else torch.histc(y)

    refused, x = False, torch.ones(4)
    compiled = tracejit.compile(step, on_unsupported="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while compiled.stats.eager < 1024:  # so many more until the next trace
            compiled(x, x)
    refused = True
    spent = microseconds(lambda: compiled(x, x), rounds=5, calls=200)
    return spent - microseconds(lambda: step(x, x), rounds=5, calls=200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args()
    replays = {n: replay(n) for n in COUNTS}
    for n, found in replays.items():
        print(
            f"{n:4d} guarded values: guard {found['guard']:6.1f} µs (goal {GOALS[n]:.0f}), "
            f"whole call {found['call']:6.1f} µs, of it around guard and C call "
            f"{found['around']:.1f} µs (goal {AROUND_GOAL:.0f})"
        )
    reruns = rerun()
    print(
        f"deep net, {reruns['torch_calls']} torch calls: replay {reruns['replay']:.0f} µs, rerun "
        f"{reruns['rerun']:.0f} µs, {reruns['per_torch_call']:.1f} µs per torch call (goal 25)"
    )
    beyond = eager()
    print(f"a call that runs eagerly: {beyond:.1f} µs beyond eager (goal {EAGER_GOAL:.0f})")
    if options.json:
        found = {"replay_us": replays, "rerun_us": reruns, "eager_us": beyond}
        write(options.json, machine() | found)


if __name__ == "__main__":
    main()
