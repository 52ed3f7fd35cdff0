"""Ejected steps: one file without tracejit, which gives the step's bits."""

from __future__ import annotations

import importlib.util
import math
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import tracejit
from examples import transformer_block, two_layer_autograd
from tracejit.errors import CannotEject, CannotSave
from tracejit.export import eject_c
from tracejit.runtime import c_executor, c_kernels

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


class Batch(NamedTuple):
    x: torch.Tensor
    labels: torch.Tensor


class Outcome(NamedTuple):
    loss: float
    best: object


def noisy() -> tuple[Callable, Calls]:
    """Dropout, once more as it was in a checkpoint, and noise of other kinds."""
    model = nn.Sequential(nn.Linear(20, 32), nn.Dropout(0.2), nn.ReLU(), nn.Linear(32, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(batch, scale):
        optimizer.zero_grad()
        order = torch.randperm(8)
        h = batch.x[order] + torch.randn(8, 20) * scale
        logits = checkpoint(model, h, use_reentrant=False) + torch.empty(8, 5).uniform_(-0.1, scale)
        loss = F.cross_entropy(logits, batch.labels[order])
        loss.backward()
        optimizer.step()
        return Outcome(loss.item(), logits.max(1))

    give = lambda n: (Batch(torch.randn(8, 20), torch.randint(0, 5, (8,))), 0.1 + n)  # noqa: E731
    return step, give


def skipping() -> tuple[Callable, Calls]:
    """It computes with a norm that Python reads, draws after it, and skips what is not finite."""
    w = nn.Parameter(torch.randn(6, 3))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.Adam([w], lr=0.1)

    def step(x, labels):
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ w, labels + 1)
        if not torch.isfinite(loss):
            return None
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = w.grad.norm().item()
        noise = torch.rand(6, 3)
        w.grad.add_(noise, alpha=0.01 / (1 + norm))
        scaler.step(optimizer)
        scaler.update()
        return loss.item(), norm, scaler.get_scale()

    return step, lambda n: (torch.randn(5, 6), torch.randint(0, 2, (5,)))


PROGRAMS: Programs = {
    "noisy": noisy,
    "skipping": skipping,
    "classifier": classifier,
    "images": images,
    "recurrent": recurrent,
    "accumulated": accumulated,
    "two_layers": two_layers,
    "transformer": transformer,
}


def ejected(
    name: str, folder: Path, calls: int = 4, **options: str
) -> tuple[Callable, Calls, Path]:
    """A program in replay, and its file."""
    torch.manual_seed(0)
    step, arguments = PROGRAMS[name]()
    step = tracejit.compile(step, on_unsupported="raise", **options)
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


@pytest.mark.parametrize(
    "name, options", [*((name, {}) for name in PROGRAMS), ("noisy", {"randomness": "fast"})]
)
@pytest.mark.sweep(1)
def test_the_bits_are_the_step_s(name, options, tmp_path):
    step, arguments, path = ejected(name, tmp_path, **options)
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
        torch.manual_seed(n)
        ours = leaves(step(*args))
        torch.manual_seed(n)
        found = leaves(other(*args))
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


ALONE = ["classifier", "recurrent", "two_layers", "accumulated", "noisy", "skipping"]


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.sweep(0.34)
def test_the_file_runs_alone_and_is_clean(name, tmp_path):
    _, _, path = ejected(name, tmp_path)
    hidden = "import sys; sys.modules['tracejit'] = None; sys.argv = ['x']\n"
    hidden += f"import runpy; runpy.run_path({str(path)!r}, run_name='__main__')"
    found = subprocess.run(
        [sys.executable, "-c", hidden], capture_output=True, text=True, cwd=tmp_path
    )
    assert found.returncode == 0 and len(found.stdout.splitlines()) >= 3, found.stderr
    numbers = [float(x) for x in re.findall(r"\d+\.\d+", found.stdout)]
    assert any(x > 0 for x in numbers) and "nan" not in found.stdout
    clean = [sys.executable, "-m", "ruff", "check", "--isolated", str(path)]
    if importlib.util.find_spec("ruff") is not None:
        found = subprocess.run(clean, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout


def test_values_that_are_read_and_refused(tmp_path):
    """The file goes the way that the step went; nothing is changed where it would not."""
    step, arguments, path = ejected("skipping", tmp_path)
    module = imported(path)
    other = module.Step(module.made_up_state())
    x, labels = arguments(0)
    other(x, labels)
    before = {key: tensor.clone() for key, tensor in other.state.items()}
    with pytest.raises(AssertionError, match="this file is for read0"):
        other(x * torch.nan, labels)
    assert all(torch.equal(before[key], tensor) for key, tensor in other.state.items())
    step, arguments, path = ejected("noisy", tmp_path)
    module = imported(path)
    other = module.Step(module.made_up_state())
    before = {key: tensor.clone() for key, tensor in other.state.items()}
    batch, scale = arguments(0)
    with pytest.raises(IndexError, match="Target 7 is out of bounds"):
        other(batch._replace(labels=torch.full((8,), 7)), scale)
    assert all(torch.equal(before[key], tensor) for key, tensor in other.state.items())


def test_it_runs_on_a_state_in_a_file(tmp_path):
    step, arguments, path = ejected("classifier", tmp_path)
    step.save(tmp_path / "a.step")
    state = tracejit.load(tmp_path / "a.step").state_dict()
    torch.save(state, tmp_path / "state.pt")
    command = [sys.executable, str(path), str(tmp_path / "state.pt")]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    module = imported(path)
    torch.manual_seed(0)
    other = module.Step(torch.load(tmp_path / "state.pt"))
    assert found.stdout.splitlines()[0] == str(other(**module.made_up()))


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


OWN = torch.Generator()
RATE = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)
SCHEDULE = torch.optim.lr_scheduler.StepLR(RATE, 2)


def drawn(x):
    return x + torch.rand(4, 4, generator=OWN)


def selected(x):
    return x[x > 0].sum()


def scheduled(x):
    x = x * RATE.param_groups[0]["lr"]
    SCHEDULE.step()
    return x


def factored(x):
    return torch.linalg.qr(x)[1]


@pytest.mark.parametrize(
    "step, error, said",
    [
        (drawn, CannotEject, "a generator of yours"),
        (selected, CannotEject, r"how many elements it finds at .*test_eject.py"),
        (scheduled, CannotEject, "learning-rate scheduler.*lr=…"),
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


@pytest.mark.parametrize(
    "name", ["two_layers", pytest.param("transformer", marks=pytest.mark.slow)]
)
def test_golden_ejected(golden, name, tmp_path, monkeypatch):
    """The Python of the file; the C is that of the executor. Packed operands are those for vectors
    of 16 bytes, which all processors have, so that the text is the same everywhere."""
    for module in (c_executor, c_kernels, eject_c):
        monkeypatch.setattr(module, "vector_bytes", lambda: 16)
    step, _, path = ejected(name, tmp_path)
    step.save(tmp_path / "a.step")
    state = tracejit.load(tmp_path / "a.step").state_dict()
    assert torch.equal(imported(path).Step(state)(), step())
    text = re.sub(r'SOURCE = r""".*?\n"""', 'SOURCE = r"""…"""', path.read_text(), flags=re.DOTALL)
    text = re.sub(r"FLAGS = \[.*?\]", "FLAGS = […]", text, flags=re.DOTALL)
    golden(f"ejected_{name}", text)


def of_any_name(self, torch, state, numbers, h0, out0, i, launch, work, check, float, *xs, **more):
    """Arguments of names that an ejected file has uses for."""
    first = self * h0 + state.mm(numbers) - out0 * i + launch / work + torch + check * float
    return first * xs[0] + xs[1] * more["class"] + more["a b"] + more["result0"], float


def test_arguments_of_any_name(tmp_path, monkeypatch):
    def arguments(n):
        torch.manual_seed(n)
        given = [torch.randn(4, 4) for _ in range(9)]
        named = {"class": torch.randn(4), "a b": torch.randn(4), "result0": 2.0 + n}
        return [*given, 1.5, 0.5 * n, torch.randn(4), torch.randn(4)], named

    step = tracejit.compile(of_any_name, on_unsupported="raise")
    for n in range(4):
        args, named = arguments(n)
        step(*args, **named)
    step.eject(tmp_path / "a.py")
    other = imported(tmp_path / "a.py").Step({})
    for n in range(4, 6):
        args, named = arguments(n)
        ours, number = step(*args, **named)
        found = other(*args, _class=named["class"], a_b=named["a b"], result0=named["result0"])
        assert torch.equal(found[0], ours) and found[1] == number
    monkeypatch.setattr(sys, "argv", ["a.py"])
    runpy.run_path(str(tmp_path / "a.py"), run_name="__main__")


def test_state_and_numbers_of_any_name(tmp_path):
    """Tensors and numbers of a closure, called like each other and like parts of the file."""
    torch.manual_seed(0)
    state, launch, check, h0, lr = (torch.randn(3).requires_grad_() for _ in range(5))
    numbers, torch_, low = 0.5, torch, -math.inf
    settings = {"lr": 0.1, "check": 2.0}

    def step(x):
        loss = (x * state + launch * check - h0 * lr * numbers).clamp(min=low).square().sum()
        loss.backward()
        with torch_.no_grad():
            for w in (state, launch, check, h0, lr):
                w -= settings["lr"] * settings["check"] * w.grad
                w.grad = None
        return loss.detach()

    compiled = tracejit.compile(step, on_unsupported="raise")
    for _ in range(3):
        compiled(torch.ones(3))
    compiled.eject(tmp_path / "a.py")
    compiled.save(tmp_path / "a.step")
    other = imported(tmp_path / "a.py").Step(tracejit.load(tmp_path / "a.step").state_dict())
    for n in range(3):
        x = torch.full((3,), 0.1 * n)
        assert torch.equal(other(x), compiled(x))


def test_the_state_of_a_saved_step_is_a_state(tmp_path):
    """With gradients, which accumulate here."""
    step, arguments, path = ejected("accumulated", tmp_path)
    step.save(tmp_path / "a.step")
    other = imported(path).Step(tracejit.load(tmp_path / "a.step").state_dict())
    for n in range(4, 7):
        args = arguments(n)
        ours, found = leaves(step(*args)), leaves(other(*args))
        assert torch.equal(ours[0], found[0]) and ours[1] == found[1]
