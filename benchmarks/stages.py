"""What each stage of compilation costs per IR node, and what a replay costs on the host.

"generate" is the function of a call (`run.py`), which is made once per captured step and program.

python -m benchmarks.stages
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import tracejit
from benchmarks.clock import microseconds
from examples import two_layer_autograd
from tracejit.capture.bind import unwrap
from tracejit.capture.capture import capture_call
from tracejit.capture.effects.collect import Finished
from tracejit.codegen.triton import emit
from tracejit.passes import optimize
from tracejit.run import Hooks, generate
from tracejit.runtime.program import Program
from tracejit.runtime.select import executor_for
from tracejit.schedule import schedule


def deep_net(layers: int = 24, width: int = 16) -> Callable[[], torch.Tensor]:
    """A step of several hundred nodes: a deep tanh net with its gradient and update."""
    x = torch.randn(8, width)
    weights = tuple(torch.randn(width, width).requires_grad_() for _ in range(layers))

    def step() -> torch.Tensor:
        h = x
        for w in weights:
            h = torch.tanh(h @ w)
        loss = (h * h).mean()
        loss.backward()
        with torch.no_grad():
            for w in weights:
                w -= 0.01 * w.grad
                w.grad = None
        return loss

    return step


def capture(step: Callable) -> Finished:
    """One trace."""
    function, bound_to = unwrap(step)
    return capture_call(function, bound_to, {})


def main() -> None:
    stages = ("capture", "passes", "schedule", "emit", "generate")
    print(f"{'step':12s} {'nodes':>6s} " + " ".join(f"{s:>9s}" for s in stages))
    for name, step in (("two_layer", two_layer_autograd.make_step()[0]), ("deep_net", deep_net())):
        captured = capture(step).captured
        graph = captured.graph
        nodes = len(graph.nodes)
        final = optimize(graph)
        plan = schedule(final)
        program = Program(plan, executor_for("auto", "cpu"))
        costs = (
            microseconds(lambda step=step: capture(step)),
            microseconds(lambda graph=graph: optimize(graph)),
            microseconds(lambda final=final: schedule(final)),
            microseconds(lambda plan=plan: [emit(launch.kernel) for launch in plan.launches]),
            microseconds(lambda what=(captured, program, final): generate(*what, [], Hooks())),
        )
        print(f"{name:12s} {nodes:6d} " + " ".join(f"{c / nodes:6.1f} µs" for c in costs))
    step = tracejit.compile(two_layer_autograd.make_step(n=1, d_in=1, h=1, d_out=1)[0])
    for _ in range(3):
        step()
    print(f"replay of a step of 1 x 1 tensors: {microseconds(step, 300):.1f} µs on the host")


if __name__ == "__main__":
    main()
