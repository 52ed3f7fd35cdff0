"""Steps built for a GPU that is not here: what a run finds in the caches, and that nothing changed.

The run is that of the fake device in another process, on tensors that pose to be on a GPU.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, so it needs a process without the interpreter", allow_module_level=True)

import tracejit
from support.build_steps import STEPS, network
from support.command_line import status
from tracejit.build import MOST_CALLS, Built
from tracejit.capture.trace.posing import posing
from tracejit.errors import SideEffectError, TargetError, UnsupportedOperation, ValueDependentError
from tracejit.report import ARCHES
from tracejit.runtime import triton_executor
from tracejit.runtime.target_device import TARGETS

ROOT = Path(__file__).parents[1]


def steps(how: str, caches: Path, *names: str) -> dict[str, list]:
    """What `support/build_steps.py` says of steps, in a process with these caches."""
    places = {"TRACEJIT_CACHE": "tracejit", "TRITON_CACHE_DIR": "triton"}
    done = subprocess.run(
        [sys.executable, "-m", "support.build_steps", how, *names],
        env=os.environ | {name: str(caches / folder) for name, folder in places.items()},
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {k: v for line in done.stdout.splitlines() for k, v in json.loads(line).items()}


@pytest.mark.slow
@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_what_is_built_is_not_compiled_again(place, tmp_path):
    """Neither by Triton nor by the scheduler, in another order, up to armed replays. What was not
    built is compiled: so it would show."""
    last = "decides" if place == "cpu" else "selects"
    names = (
        [n for n in STEPS if n != last] if place == "cpu" else ["batches", "outside", "unaligned"]
    )
    options = ["--meta"] * (place == "meta")
    built = steps("build", tmp_path, *names, *options)
    assert all(compiled for compiled, _, _ in built.values())
    assert all(mode.startswith("replay") for _, _, mode in built.values())
    ran = steps("run", tmp_path, *reversed(names), last)
    compiled, scheduled, _ = ran.pop(last)
    assert compiled and len(scheduled) >= 2
    assert ran == {name: [[], [], built[name][2]] for name in names}


def test_a_step_is_built_and_run(tmp_path):
    """The same for one small step, in `make test` too."""
    (built,) = steps("build", tmp_path, "unaligned").values()
    assert len(built[0]) == 2  # both kernels side by side, for either alignment
    (ran,) = steps("run", tmp_path, "unaligned").values()
    assert ran == [[], [], built[2]]


def test_many_parameters_are_built_and_run(tmp_path):
    """Both kernels of a foreach: for what is aligned, and for what is not."""
    (built,) = steps("build", tmp_path, "many").values()
    assert sum(name.startswith("foreach") for name in built[0]) >= 3
    (ran,) = steps("run", tmp_path, "many").values()
    assert ran == [[], [], built[2]]


def built_with_cache(monkeypatch, tmp_path, step, *args, target="sm_90", **options) -> Built:
    monkeypatch.setenv("TRACEJIT_CACHE", str(tmp_path / "tracejit"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    return tracejit.compile(step, target=target, **options).build(*args)


def test_what_a_build_says(monkeypatch, tmp_path):
    x = torch.randn(1000)

    def step(scale: float) -> torch.Tensor:
        return (x * scale).sum()

    first = built_with_cache(monkeypatch, tmp_path, step, 2.0, target="sm_80")
    (plan,) = first.plans
    assert (first.target, plan.device, first.kernels) == ("sm_80", "cuda:0", 1)
    assert len(first.compiled) == 1 and first.mode.startswith("replay")
    said = str(first)
    assert said.startswith("step for sm_80: 1 plan(s) of 1 launch(es), 1 kernel(s), of which 1 ")
    again = built_with_cache(monkeypatch, tmp_path, step, 3.0, target="sm_80")
    assert again.compiled == () and again.plans == first.plans
    other = built_with_cache(monkeypatch, tmp_path, step, 3.0, target="sm_100")
    assert len(other.compiled) == 1  # machine code of its own


def test_lines_and_earlier_steps_cost_no_compilation(monkeypatch, tmp_path):
    """The same kernel from another line, and printed for another step first, in another process."""
    x = torch.randn(1000)

    def first() -> torch.Tensor:
        return (x * 2).sum()

    def second() -> torch.Tensor:
        unused = x.exp()  # values have other numbers
        del unused
        return (x * 2).sum()

    one = built_with_cache(monkeypatch, tmp_path, first)
    triton_executor._kernels.clear()  # as in another process
    two = built_with_cache(monkeypatch, tmp_path, second)
    assert len(one.compiled) == 1 and two.compiled == ()
    assert str(one.plans[0]) != str(two.plans[0])


def test_the_targets_are_those_of_the_report():
    assert {int(name.removeprefix("sm_")) for name in TARGETS} == ARCHES.keys()
    for name, (_, shared) in TARGETS.items():
        assert shared == ARCHES[int(name.removeprefix("sm_"))].shared_per_block


# ---- where tensors are said to be


def test_a_posing_tensor_is_a_gpus_for_the_step():
    seen = []

    def step(x: torch.Tensor) -> torch.Tensor:
        seen.append((x.device, x.is_cuda, x.is_cpu, torch.zeros(3, device="cuda").device))
        return x + torch.ones_like(x) + torch.zeros(x.shape, device="cuda")

    x = torch.randn(3)
    with posing(lambda t: "cuda:0"):
        captured = tracejit.capture(step, x)
    gpu = torch.device("cuda:0")
    assert seen == [(gpu, True, False, gpu)]
    assert {v.type.device for v in captured.graph.outputs()} == {"cuda:0"}
    assert {v.type.device for v in tracejit.capture(torch_double, x).graph.outputs()} == {"cpu"}


def torch_double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@pytest.mark.slow
def test_optimizers_take_the_path_that_they_take_on_a_gpu():
    """There `foreach` is the default, which adds up in another order; counters stay on the CPU."""
    plain, *_ = plans_of(STEPS["adam"]("cpu"))
    assert not any("@cpu" in line for line in str(plain).splitlines())
    model, x, y = network()
    for foreach, same in ((True, True), (False, False)):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05, foreach=foreach)

        def step(optimizer=optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = (model(x) - y).pow(2).mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        first, *_ = plans_of(step)
        assert (kernels_of(first) == kernels_of(plain)) == same


def plans_of(step) -> tuple:
    return tracejit.compile(step, target="sm_90").build().plans


def kernels_of(plan) -> list[str]:
    """Without the user's lines."""
    return [line.partition("  # ")[0] for line in str(plan).splitlines()]


# ---- nothing has changed


class Trainer:
    """All that a step may change, and a picture of it."""

    def __init__(self) -> None:
        self.model, self.x, self.y = network()
        self.optimizer = torch.optim.NAdam(self.model.parameters(), lr=0.05)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.calls, self.losses, self.last = 0, [], {"loss": None}
        self.average = [p.detach().clone() for p in self.model.parameters()]

    def step(self) -> torch.Tensor:
        self.calls += 1
        self.optimizer.zero_grad()
        loss = (self.model(self.x) - self.y).pow(2).mean() / self.calls
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())
        self.last["loss"] = loss.detach()
        for a, p in zip(self.average, self.model.parameters(), strict=True):
            a.mul_(0.9).add_(p.detach(), alpha=0.1)
        return loss

    def tensors(self) -> list[torch.Tensor]:
        states = [t for s in self.optimizer.state.values() for t in s.values()]
        return [*self.model.parameters(), self.x, self.y, *self.average, *states]

    def picture(self) -> list:
        found = [
            (id(t), t._version, t.data_ptr(), t.requires_grad, id(t.grad), bits(t))
            for t in self.tensors()
        ]
        numbers = [g["lr"] for g in self.optimizer.param_groups], self.schedule.last_epoch
        random_ones = random.getstate(), bits(torch.get_rng_state()), np.random.get_state()[2]
        return [found, numbers, self.calls, [*self.losses], {**self.last}, random_ones]


def bits(t: torch.Tensor) -> bytes:
    return t.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("calls", [0, 3])
@pytest.mark.slow
def test_all_is_as_before(calls):
    """Of a step that has not run yet, and of one that has."""
    trainer = Trainer()
    for _ in range(calls):
        trainer.step()
    for p in trainer.model.parameters():
        if p.grad is not None:
            p.grad = p.grad.clone()
    before = trainer.picture()
    built = tracejit.compile(trainer.step, target="sm_90").build()
    assert built.plans and trainer.picture() == before
    assert len(trainer.optimizer.state) == (4 if calls else 0)
    trainer.step()
    assert trainer.picture() != before


def test_all_is_as_before_where_building_fails():
    trainer = Trainer()
    before = trainer.picture()

    def step() -> torch.Tensor:
        trainer.step()
        return torch.fft.fft(trainer.x).abs()

    with pytest.raises(UnsupportedOperation, match=r"test_build.py:\d+: .*fft"):
        tracejit.compile(step, target="sm_90").build()
    assert trainer.picture() == before


def test_a_graph_of_eager_survives():
    """A build between forward and backward: versions of saved tensors are as before."""
    model, x, y = network()
    loss = (model(x) - y).pow(2).mean()

    def update() -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.9)

    tracejit.compile(update, target="sm_90").build()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_nothing_runs_on_tensors():
    """A step over more memory than there is."""
    with torch.device("meta"):
        model = torch.nn.Linear(1 << 20, 1 << 22, bias=False)
        x = torch.empty(16, 1 << 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).sum()
        loss.backward()
        optimizer.step()
        return loss.detach()

    built = tracejit.compile(step, target="sm_90").build()
    assert len(built.plans) == 2 and model.weight.grad is None


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.slow
def test_generators_are_as_before(device):
    """What torch would draw on the GPU is drawn on the CPU."""
    before = torch.get_rng_state()
    built = tracejit.compile(STEPS["drops"](device), target="sm_90")
    state = torch.get_rng_state()
    assert built.build().plans and torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(before)


# ---- what is refused


def test_a_step_with_a_target_is_not_called():
    step = tracejit.compile(lambda x: x * 2, target="sm_90")
    with pytest.raises(TargetError, match="compiled for sm_90, which is not run here. Call its `b"):
        step(torch.ones(3))


@pytest.mark.parametrize(
    "options, said",
    [
        ({"target": "sm_91"}, r"target is one of \('sm_80', 'sm_90', 'sm_100'\), not 'sm_91'"),
        ({"target": 90}, "not 90"),
        ({"target": "sm_90", "backend": "c"}, 'backend is "auto" or "triton", not \'c\''),
        ({"target": "sm_90", "mode": "fast"}, "mode is one of"),
    ],
)
def test_options(options, said):
    with pytest.raises(ValueError, match=said):
        tracejit.compile(lambda: None, **options)


def test_meta_tensors_have_no_values():
    step = tracejit.compile(STEPS["decides"]("meta"), target="sm_90")
    with pytest.raises(ValueDependentError, match=r"build_steps.py:\d+: .*tensors on the CPU"):
        step.build()


def test_what_cannot_be_put_back_is_said():
    numbers = (n for n in range(30))

    def step(x: torch.Tensor) -> torch.Tensor:
        return x * next(numbers)

    said = "test_build.py:.* has changed what cannot be put back .*: it advances a generator"
    with pytest.raises(SideEffectError, match=said):
        tracejit.compile(step, target="sm_90").build(torch.ones(3))


def test_methods_and_decorators():
    class Net:
        def __init__(self) -> None:
            self.w = torch.randn(5, 5)

        @tracejit.compile(target="sm_90")
        def step(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.w

    built = Net().step.build(torch.randn(3, 5))
    assert built.plans[-1].name == "step" and Net.step.target == "sm_90"


def test_a_step_that_makes_a_plan_in_each_call_comes_to_an_end():
    counts = [0]

    def step(x: torch.Tensor) -> torch.Tensor:
        counts[0] += 1
        return x[: random.choice(range(1, 500))] * 2

    built = tracejit.compile(step, target="sm_90").build(torch.randn(500))
    assert len(built.plans) <= MOST_CALLS and counts == [0]


# ---- the command line


PROGRAM = """
import torch, tracejit

x = torch.randn(1000)

@tracejit.compile
def compiled():
    print("noise")
    return (x * 2).sum()

@tracejit.compile(target="sm_80")
def targeted():
    return (x * 3).sum()

def make_step():
    return targeted, x

def fails():
    raise RuntimeError("of its own")

def refused():
    return torch.fft.fft(x).abs()
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "steps.py"
    path.write_text(PROGRAM)
    return path


@pytest.mark.parametrize("name", ["compiled", "targeted", "make_step"])
def test_the_command_builds_for_several_targets(file, name, capsys):
    assert status("build", f"{file}:{name}", "--target", "sm_80,sm_90") == 0
    captured = capsys.readouterr()
    first, second, last = captured.out.splitlines()
    assert " for sm_80: 1 plan(s)" in first and " for sm_90: 1 plan(s)" in second
    assert os.environ["TRACEJIT_CACHE"] in last and os.environ["TRITON_CACHE_DIR"] in last
    assert ("noise" in captured.err) == (name == "compiled")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["{file}:compiled", "--target", "sm_90,sm_91"], "sm_91 is not one of sm_80, sm_90"),
        (["{file}:typo"], "has no typo; it defines"),
        (["{file}:fails"], "RuntimeError: of its own"),
        (["{file}:refused"], "fft_fft is not supported"),
    ],
)
def test_what_the_command_refuses(file, arguments, said, capsys):
    assert status("build", *(a.format(file=file) for a in arguments)) == 2
    captured = capsys.readouterr()
    assert said in captured.err and not captured.out


def test_a_targeted_step_is_reported_like_any(file, capsys):
    assert status("report", f"{file}:targeted") == 0
    assert capsys.readouterr().out.startswith("targeted for sm_90")
