"""Ejected steps in Triton: the interpreter gives the step's bits, and kernels compile for GPUs."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tracejit
from support.scope import WHOLE
from tracejit.aot import compile_launch
from tracejit.testing import fake_device

pytest.importorskip("triton")


def classifier() -> tuple[Callable, Callable[[], tuple]]:
    """Products, a softmax, full reductions, and Adam's numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 5))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def step(x, y):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        return loss.item()

    return step, lambda: (torch.randn(7, 20), torch.randint(0, 5, (7,)))


def sequences() -> tuple[Callable, Callable[[], tuple]]:
    """A loop, sorts and running sums."""
    torch.manual_seed(0)
    model = nn.GRU(3, 4)

    def step(x):
        y = model(x)[0].cumsum(0)
        y.square().sum().backward()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad, alpha=0.01)
                p.grad = None
        return y.detach()[-1].sort(-1).values

    return step, lambda: (torch.randn(3, 2, 3),)


def many() -> tuple[Callable, Callable[[], tuple]]:
    """An update of many parameters in one launch, which a file has one by one."""
    torch.manual_seed(0)
    parameters = [torch.randn(n, requires_grad=True) for n in range(3, 13)]
    optimizer = torch.optim.Adam(parameters, lr=0.01)

    def step():
        for p in parameters:
            p.grad = p.detach() * 2 + 1
        optimizer.step()
        return parameters[0].detach().sum()

    return step, lambda: ()


PROGRAMS = {"classifier": classifier, "sequences": sequences, "many": many}


def imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.interpret
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_bits_are_the_step_s(name, tmp_path):
    step, arguments = PROGRAMS[name]()
    step = tracejit.compile(step, backend="interpret", on_unsupported="raise")
    for _ in range(3):
        step(*arguments())
    step.eject(tmp_path / "ejected.py")
    step.save(tmp_path / "a.step")
    saved = tracejit.load(tmp_path / "a.step").state_dict()
    module = imported(tmp_path / "ejected.py")
    state = {
        key: saved[key].clone().requires_grad_(bool(grad))
        for key, (_, _, *grad) in module.STATE.items()
    }
    other = module.Step(state)
    for _ in range(2):
        args = arguments()
        ours, found = step(*args), other(*args)
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(found))
    step.save(tmp_path / "b.step")
    for key, tensor in tracejit.load(tmp_path / "b.step").state_dict().items():
        if not key.endswith(".grad"):
            assert torch.equal(other.state[key], tensor), key


@pytest.fixture(scope="module")
def ejected(tmp_path_factory) -> tuple[list, Path]:
    """The launches of a step of the fake GPU, and its file."""
    folder = tmp_path_factory.mktemp("ejected")
    step, arguments = classifier()
    with fake_device(compiled=False) as device:
        step = tracejit.compile(step, backend=device.name, on_unsupported="raise")
        for _ in range(4):
            step(*arguments())
        step.eject(folder / "ejected.py")
        launched = step._last.program.loaded.launched
    return launched, folder / "ejected.py"


def test_the_file_is_clean(ejected):
    _, path = ejected
    assert "tracejit." not in path.read_text()
    if importlib.util.find_spec("ruff") is not None:
        clean = [sys.executable, "-m", "ruff", "check", "--isolated", str(path)]
        found = subprocess.run(clean, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("target", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_kernels_compile(ejected, target):
    """As the launches of the file say."""
    launched, path = ejected
    module, text = imported(path), path.read_text()
    kinds = {"f32": "*fp32", "i64": "*i64", "b1": "*i1"}
    names = re.findall(r"^        (kernel\d+)\[", text, re.MULTILINE)
    assert len(names) == len(launched)
    found = dict(zip(names, launched, strict=True))
    for name, launch in islice(found.items(), len(found) if WHOLE else 3):
        kernel = launch.source.kernel
        function = getattr(module, name)
        types = [kinds[b.dtype.name] for b in kernel.buffers]
        types += ["*fp64"] * bool(kernel.scalars) + ["*i8"] * bool(launch.geometry.workspace)
        signature = dict(zip(function.arg_names, types, strict=False))
        facts = compile_launch(function, signature, launch.options(), target=target)
        assert facts.spills == 0, facts
