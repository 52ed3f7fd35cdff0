"""The programs of examples/, whole: lockstep and free run, launches, bytes, goldens."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tracejit
from examples import fused_chain, two_layer_autograd, two_layer_manual
from support.scope import sampled
from tracejit.codegen.triton import emit
from tracejit.schedule.traffic import bytes_moved
from tracejit.testing import assert_equal_to_eager, assert_trains_like_eager

VARIANTS = ("zero_", "none", "data", "grad")
STEPS = {
    "manual": two_layer_manual.make_step,
    **{v: (lambda v=v, **kw: two_layer_autograd.make_step(v, **kw)) for v in VARIANTS},
    "chain": lambda **kw: fused_chain.make_step(100_003),
}


BACKENDS = pytest.mark.parametrize("backend", ["numpy", "c"])


@BACKENDS
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.sweep(4)
def test_lockstep(name, backend):
    step, _ = STEPS[name]()
    compiled = assert_equal_to_eager(step, calls=10, backend=backend)
    assert compiled.explain_mode().startswith("replay")
    assert compiled.stats.replays >= 6


@BACKENDS
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.sweep(6)
def test_lockstep_without_fusion(name, backend):
    step, _ = STEPS[name]()
    assert_equal_to_eager(step, calls=3, fuse=False, backend=backend)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        (name, backend)
        for name in STEPS
        for backend in ("c", "numpy")
        if name != "chain" and sampled(f"{name} {backend}", of=4)
    ],
)
def test_free_run_over_500_steps(name, backend):
    assert_trains_like_eager(STEPS[name], calls=500, backend=backend)


@BACKENDS
def test_free_run_of_the_chain(backend):
    assert_trains_like_eager(lambda: fused_chain.make_step(), calls=20, backend=backend)


def _kernels_of(step):
    compiled = tracejit.compile(step)
    for _ in range(4):
        compiled()
    return compiled


def test_the_chain_is_one_kernel_of_12_bytes_an_element():
    n = fused_chain.ELEMENTS
    compiled = _kernels_of(fused_chain.make_step(n)[0])
    (launch,) = bytes_moved(compiled.plans[-1])
    assert len(compiled.kernels) == 1
    assert launch == 12 * n + 4


@pytest.mark.parametrize("name", [n for n in STEPS if n != "chain"])
def test_two_layer_steps_are_at_most_6_launches_none_elementwise(name):
    compiled = _kernels_of(STEPS[name]()[0])
    launches = compiled.plans[-1].launches
    assert len(launches) <= 6
    kernels = [alone.kernel for launch in launches for alone in launch.alone()]
    assert all(kernel.stages[0].dot is not None for kernel in kernels)


def triton_text(compiled) -> str:
    """The Triton of the plan that ran last."""
    launches = compiled.plans[-1].launches
    return "\n\n".join(emit(launch.kernel, launch.sizes).text for launch in launches)


def test_golden_sources(golden):
    golden("fused_chain.py.txt", triton_text(_kernels_of(fused_chain.make_step(1_000)[0])))
    golden("two_layer_autograd.py.txt", triton_text(_kernels_of(two_layer_autograd.make_step()[0])))


def test_golden_graph_and_plan(golden):
    compiled = _kernels_of(two_layer_autograd.make_step()[0])
    golden("two_layer_autograd.graph.txt", str(compiled.graph))
    golden("two_layer_autograd.plan.txt", str(compiled.plans[-1]))


class Dispatched(TorchDispatchMode):
    """Collects the torch kernels that run."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


ALLOWED = {"empty", "empty_strided", "detach", "as_strided", "alias"}


@BACKENDS
@pytest.mark.parametrize("name", STEPS)
def test_no_torch_kernel_computes_during_call_and_replay(name, backend):
    step, _ = STEPS[name]()
    step = tracejit.compile(step, backend=backend)
    with Dispatched() as seen:
        for _ in range(6):
            step()
    assert step.stats.replays > 0
    assert seen.names <= ALLOWED


def test_the_dispatch_check_sees_eager_compute():
    step, _ = two_layer_autograd.make_step()
    with Dispatched() as seen:
        step()
    assert "mm" in seen.names


@pytest.mark.parametrize(
    "module, arguments",
    [
        ("two_layer_manual", {"steps": 6}),
        ("two_layer_autograd", {"steps": 6}),
        ("fused_chain", {"steps": 4, "n": 10_001}),
        ("demo", {"steps": 20}),
        ("save_and_load", {"steps": 6}),
    ],
)
def test_examples_run(module, arguments, capsys):
    result = importlib.import_module(f"examples.{module}").main(**arguments)
    assert result is True or result > 0
    assert "replay" in capsys.readouterr().out


def test_kernels_are_common_to_shapes():
    """A second shape makes a second plan; the same kernel text serves both."""

    @tracejit.compile
    def step(x, y):
        return (x.clamp(min=0) - y).pow(2).sum()

    for n in (1000, 2000, 1000, 2000, 1000):
        step(torch.randn(n), torch.randn(n))
    assert step.stats.compiles == 2 and step.stats.traces == 4
    first, second = step.plans
    assert str(first.launches[0].kernel) == str(second.launches[0].kernel)
    assert emit(first.launches[0].kernel).text == emit(second.launches[0].kernel).text
