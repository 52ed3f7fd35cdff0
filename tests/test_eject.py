"""Ejected steps: one file without tracejit, which gives the step's bits."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tracejit
from examples import transformer_block, two_layer_autograd
from tracejit.errors import CannotEject, CannotSave
from tracejit.runtime.c_compiler import vector_bytes

Calls = Callable[[int], tuple]  # the arguments of the n-th call
Programs = dict[str, Callable[[], tuple[Callable, Calls]]]


def classifier() -> tuple[Callable, Calls]:
    model = nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def step(x, y):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item(), {"norm": norm}

    return step, lambda n: (torch.randn(64, 20), torch.randint(0, 5, (64,)))


def images() -> tuple[Callable, Calls]:
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 5)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step(x, y):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step, lambda n: (torch.randn(4, 3, 16, 16), torch.randint(0, 5, (4,)))


def recurrent() -> tuple[Callable, Calls]:
    model, head = nn.LSTM(8, 16), nn.Linear(16, 1)
    parameters = [*model.parameters(), *head.parameters()]

    def step(x, rate):
        loss = head(model(x)[0][-1]).square().mean()
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p.sub_(g, alpha=rate)
        return loss.detach()

    return step, lambda n: (torch.randn(40, 2, 8), 0.1 / (1 + n))


def accumulated() -> tuple[Callable, Calls]:
    """Gradients that are added to, a counter, a moving average, and arguments in a dict."""
    w, seen = nn.Parameter(torch.randn(6, 3)), {"calls": 0}
    mean = torch.zeros(3)

    def step(batch, scale):
        seen["calls"] += 1
        y = batch["x"] @ w
        (y.square().mean() * scale / seen["calls"]).backward()
        mean.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
        return y.detach()[1:], seen["calls"]

    return step, lambda n: ({"x": torch.randn(5, 6)}, 2.0 + n)


def two_layers() -> tuple[Callable, Calls]:
    step, *_ = two_layer_autograd.make_step()
    return step, lambda n: ()


def transformer() -> tuple[Callable, Calls]:
    step, *_ = transformer_block.make_step()
    return step, lambda n: ()


PROGRAMS: Programs = {
    "classifier": classifier,
    "images": images,
    "recurrent": recurrent,
    "accumulated": accumulated,
    "two_layers": two_layers,
    "transformer": transformer,
}


def ejected(name: str, folder: Path, calls: int = 4) -> tuple[Callable, Calls, Path]:
    """A program in replay, and its file."""
    torch.manual_seed(0)
    step, arguments = PROGRAMS[name]()
    step = tracejit.compile(step, on_unsupported="raise")
    for n in range(calls):
        step(*arguments(n))
    step.eject(folder / f"{name}_step.py")
    return step, arguments, folder / f"{name}_step.py"


def imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def leaves(x: object) -> list[object]:
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, list | tuple):
        return [leaf for item in x for leaf in leaves(item)]
    return [x]


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_bits_are_the_step_s(name, tmp_path):
    step, arguments, path = ejected(name, tmp_path)
    step.save(tmp_path / "a.step")
    saved = tracejit.load(tmp_path / "a.step").state_dict()
    module = imported(path)
    state = {}
    for key, (_, _, *grad) in module.STATE.items():
        state[key] = saved[key].clone().requires_grad_(bool(grad))
        if f"{key}.grad" in saved:
            state[key].grad = saved[f"{key}.grad"].clone()
    other = module.Step(state)
    for n in range(4, 10):
        args = arguments(n)
        ours, found = leaves(step(*args)), leaves(other(*args))
        assert len(ours) == len(found)
        for a, b in zip(ours, found, strict=True):
            same = (
                torch.equal(a, b) if isinstance(a, torch.Tensor) else (type(a), a) == (type(b), b)
            )
            assert same
    step.save(tmp_path / "b.step")
    for key, tensor in tracejit.load(tmp_path / "b.step").state_dict().items():
        owner, _, grad = key.rpartition(".")
        mine = other.state[owner].grad if grad == "grad" else other.state[key]
        assert torch.equal(mine, tensor), key


@pytest.mark.parametrize("name", ["classifier", "recurrent", "two_layers", "accumulated"])
def test_the_file_runs_alone_and_is_clean(name, tmp_path):
    _, _, path = ejected(name, tmp_path)
    hidden = "import sys; sys.modules['tracejit'] = None; sys.argv = ['x']\n"
    hidden += f"import runpy; runpy.run_path({str(path)!r}, run_name='__main__')"
    found = subprocess.run(
        [sys.executable, "-c", hidden], capture_output=True, text=True, cwd=tmp_path
    )
    assert found.returncode == 0 and len(found.stdout.splitlines()) >= 3, found.stderr
    clean = [sys.executable, "-m", "ruff", "check", "--isolated", str(path)]
    if importlib.util.find_spec("ruff") is not None:
        found = subprocess.run(clean, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout


def test_what_it_is_not_for_is_refused(tmp_path):
    _, _, path = ejected("classifier", tmp_path)
    module = imported(path)
    state = {
        key: torch.zeros(shape, dtype=dtype).requires_grad_(bool(grad))
        for key, (shape, dtype, *grad) in module.STATE.items()
    }
    step = module.Step(state)
    x, y = torch.randn(64, 20), torch.randint(0, 5, (64,))
    before = {key: tensor.clone() for key, tensor in state.items()}
    with pytest.raises(AssertionError, match=r"x has shape \(63, 20\), not \(64, 20\)"):
        step(x[1:], y)
    with pytest.raises(AssertionError, match="y is torch.int32"):
        step(x, y.int())
    with pytest.raises(AssertionError, match="x has strides"):
        step(torch.randn(20, 64).t(), y)
    with pytest.raises(IndexError, match="Target 7 is out of bounds"):
        step(x, torch.full((64,), 7))
    assert all(torch.equal(before[key], tensor) for key, tensor in state.items())
    with pytest.raises(AssertionError, match="model.0.bias"):
        module.Step({key: t for key, t in state.items() if key != "model.0.bias"})
    step(x, y, lr=0.0)
    unchanged = [key for key in state if key.startswith("model") and "weight" in key]
    assert all(torch.equal(before[key], state[key]) for key in unchanged)


def drawn(x):
    return F.dropout(x, 0.5)


def decided(x):
    return x * 2 if x.sum() > 0 else x


def factored(x):
    return torch.linalg.qr(x)[1]


@pytest.mark.parametrize(
    "step, error, said",
    [
        (drawn, CannotEject, "draws random numbers"),
        (decided, CannotEject, r"a value that Python reads at .*test_eject.py"),
        (factored, CannotEject, "LAPACK"),
        (lambda x: print(x.sum()), CannotSave, "is not replayed"),
    ],
)
def test_what_it_cannot_say(step, error, said, tmp_path):
    torch.manual_seed(0)
    compiled = tracejit.compile(step)
    x = torch.rand(4, 4)
    for _ in range(4):
        compiled(x)
    with pytest.raises(error, match=said):
        compiled.eject(tmp_path / "a.py")
    assert not (tmp_path / "a.py").exists()


@pytest.mark.skipif(vector_bytes() != 64, reason="packed operands are of other sizes")
@pytest.mark.parametrize("name", ["two_layers", "transformer"])
def test_golden_ejected(golden, name, tmp_path):
    """The Python of the file; the C is that of the executor."""
    _, _, path = ejected(name, tmp_path)
    text = re.sub(r'SOURCE = r""".*?\n"""', 'SOURCE = r"""…"""', path.read_text(), flags=re.DOTALL)
    text = re.sub(r"FLAGS = \[.*?\]", "FLAGS = […]", text, flags=re.DOTALL)
    golden(f"ejected_{name}", text)
