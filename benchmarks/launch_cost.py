"""What replays on a GPU cost on the host, the driver left out: no GPU is needed.

    python -m benchmarks.launch_cost [--json FILE]

Kernels are launched on a device that does nothing: streams and events are stubs, and the launcher
takes its arguments and returns. Reported are the launches of each step, the Python of each launch
(what launches them all, over their number), what it takes to launch them as one graph, the guard,
and the whole call where nothing changed, and where a learning rate did, with graphs and without.
In microseconds of the processor's time, which other programs disturb least: of some medians the
least.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence

import torch

import tracejit
from benchmarks.clock import microseconds
from benchmarks.machine import machine, write
from examples import classifier, fused_chain, transformer_block, two_layer_autograd
from tracejit.runtime.device import LoadedKernel, Properties
from tracejit.runtime.select import FAKES
from tracejit.runtime.triton_executor import TritonExecutor

BACKEND = "fake:still"
LAUNCH_GOAL = 1.0  # µs of Python for each launch
GRAPH_GOAL = 5.0  # µs of Python for a whole graph
MEDIANS = 3
ADAM_GOAL = 100.0  # µs of a whole call of Adam over 200 tensors


class StillDevice:
    """A device on which nothing happens."""

    name, number = BACKEND, 0

    def __init__(self) -> None:
        self.here = self.current_stream = int  # 0
        self.capturing = bool  # False
        self.launches = 0

    def properties(self) -> Properties:
        return Properties(self.name, 90, 132, 232448)

    def entered(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    pinned = allocate

    def empty_strided(self, shape: Sequence, strides: Sequence, dtype: object) -> torch.Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype)

    def upload(self, target: torch.Tensor, source: torch.Tensor) -> None: ...

    def duplicate(self, target: torch.Tensor, address: int) -> None: ...

    aside = beside = entered

    def graph_of(self, give: Callable[[], None]) -> Callable[[], None]:
        give()
        return self._launch

    def event(self) -> StillDevice:
        return self

    def record(self) -> None: ...

    def wait(self) -> None: ...

    def hold(self) -> None: ...

    def load(self, launch: object, pointers: Sequence) -> LoadedKernel:
        return LoadedKernel(self._launch, launch.source.name, None)

    def _launch(self, *given: object) -> None:
        self.launches += 1


@contextlib.contextmanager
def still() -> Iterator[StillDevice]:
    """A context in which steps run on such a device."""
    device = StillDevice()
    executor = TritonExecutor(BACKEND, device_of=lambda name: device)
    FAKES[BACKEND] = lambda precision: executor
    try:
        yield device
    finally:
        del FAKES[BACKEND]


def adam(tensors: int = 200) -> tuple[Callable, dict]:
    """An update by Adam alone, and its group."""
    parameters = [torch.zeros(64, 64, requires_grad=True) for _ in range(tensors)]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.Adam(parameters, foreach=True)

    def step() -> None:
        optimizer.step()

    return step, optimizer.param_groups[0]


def sgd(tensors: int = 200) -> tuple[Callable, dict]:
    """An update by SGD alone, and its group."""
    parameters = [torch.zeros(64, 64, requires_grad=True) for _ in range(tensors)]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.SGD(parameters, lr=0.1, foreach=True)

    def step() -> None:
        optimizer.step()

    return step, optimizer.param_groups[0]


CASES: dict[str, Callable[[], tuple]] = {
    "two-layer": lambda: (two_layer_autograd.make_step("zero_")[0], None),
    "chain": lambda: (fused_chain.make_step(10_000)[0], None),
    "classifier": lambda: (classifier.make_step()[0], None),
    "transformer": lambda: (transformer_block.make_step()[0], None),
    "SGD over 200 tensors": sgd,
    "Adam over 200 tensors": adam,
}


def processor_us(call: Callable, rounds: int, calls: int) -> float:
    """The processor's time of a call: of MEDIANS medians the least."""
    return min(microseconds(call, rounds, calls, time.thread_time) for _ in range(MEDIANS))


def costs(make: Callable[[], tuple], rounds: int = 9, calls: int = 200) -> dict[str, float]:
    """Of one step, launched kernel by kernel and as a graph."""
    return _costs(make, rounds, calls, "0") | _costs(make, rounds, calls, "1")


def _costs(make: Callable[[], tuple], rounds: int, calls: int, graphs: str) -> dict[str, float]:
    before = os.environ.get("TRACEJIT_GRAPHS", "1")
    os.environ["TRACEJIT_GRAPHS"] = graphs
    found: dict[str, float] = {}
    with still() as device:
        plain, group = make()
        step = tracejit.compile(
            plain, backend=BACKEND, on_unsupported="raise", require_graph=graphs == "1"
        )
        for _ in range(10):
            step()
        assert step.stats.replays >= 2, step.explain_mode()
        given = _given(step)
        device.launches = 0
        step()
        count, name = device.launches, ""
        run = processor_us(lambda: given[0](*given[1:]), rounds, calls)
        if graphs == "1":
            assert count == 1, "not one graph"
            found["graph"], name = run, " in a graph"
        else:
            guard = step._replays[0].guard
            found |= {"launches": count, "launch": run / count}
            found["guard"] = processor_us(lambda: guard((), {}), rounds, calls)
        found[f"call{name}"] = processor_us(step, rounds, calls)
        if group is not None:

            def changed() -> None:
                group["lr"] += 1e-9
                step()

            found[f"changed{name}"] = processor_us(changed, rounds, calls)
    os.environ["TRACEJIT_GRAPHS"] = before
    return found


def _given(step: Callable) -> tuple:
    """What a replay launches with: the function, and its arguments."""
    names, given = step._replays[0].run.function.__globals__, []
    if "together" in names:
        names = names["together"].__globals__
    fitting = names["fitting"]

    def fitted(near: tuple) -> Callable:
        launch = fitting(near)

        def launcher(*arguments: object) -> Callable:
            given[:] = launch(*arguments), *arguments
            return given[0]

        return launcher

    names["fitting"] = fitted
    step()
    names["fitting"] = fitting
    return (*given,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: costs(make) for name, make in CASES.items()}
    for name, x in found.items():
        print(
            f"{name:22} {x['launches']:3d} launches of {x['launch']:.2f} µs (goal "
            f"{LAUNCH_GOAL:.0f}), one graph {x['graph']:.2f} (goal {GRAPH_GOAL:.0f}), guard "
            f"{x['guard']:.1f}"
        )
        for how in ("", " in a graph"):
            changed = f", with another rate {x['changed' + how]:.1f}" if "changed" in x else ""
            print(f"    whole call{how} {x['call' + how]:.1f}{changed}")
    print(f"the goal of Adam over 200 tensors is {ADAM_GOAL:.0f} µs for the whole call")
    if options.json:
        write(options.json, machine() | {"us": found})


if __name__ == "__main__":
    main()
