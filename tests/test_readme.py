"""README.md: its example runs as it stands there, and so do the three lines for each export."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tracejit
from support.command_line import status
from tracejit.errors import BackendUnavailable
from tracejit.runtime.c_compiler import find_compiler

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What the snippets are about: a step that somebody has, its arguments, a loader.
TRAIN = """
import torch, tracejit

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
x, y = torch.randn(8, 20), torch.arange(8) % 5

@tracejit.compile
def step(x, y):
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()

def make_step():
    return lambda: step.__wrapped__(x, y), [*model.parameters()]
"""


def section(title: str) -> list[tuple[str, str]]:
    """The blocks of a section: what language, and the text."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## )", README, re.MULTILINE | re.DOTALL)
    return BLOCK.findall(found[1])


def snippet(said: str) -> str:
    """The one block of the exports with something in it."""
    (found,) = [text for _, text in section("Take it with you") if said in text]
    return found


def test_each_export_is_three_lines():
    blocks = section("Take it with you")
    assert len(blocks) == 8
    for _, text in blocks:
        assert len([line for line in text.splitlines() if line]) <= 3, text


def test_the_example(capsys):
    """Both of its blocks: 500 steps, and what is printed of them."""
    (_, example), (_, shown) = section("An example")
    names: dict[str, object] = {}
    torch.manual_seed(0)
    exec(example, names)
    losses = names["loss"].item(), names["step"]().item()
    assert losses[1] < losses[0] < 2e4  # it was about 3e7
    if "C on the CPU" in shown:
        _needs_c()
    exec(shown, names)
    printed = capsys.readouterr().out
    assert "replay: 1 plan(s) armed" in printed and "test_readme" not in printed
    step = names["step"]
    assert step.plans[-1].launches and len(step.plans[-1].launches) == 4
    assert str(step.graph).count("= matmul(") == 5


def _needs_c() -> None:
    try:
        find_compiler()
    except BackendUnavailable:
        pytest.skip("it tells of kernels in C")


@pytest.fixture
def ready(tmp_path, monkeypatch) -> dict[str, object]:
    """The names that the snippets use, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names: dict[str, object] = {}
    exec(compile(TRAIN, "train.py", "exec"), names)
    for _ in range(3):
        names["step"](names["x"], names["y"])
    return names


def test_save_and_eject(ready, tmp_path):
    saved, ejected = snippet("tracejit.load"), snippet("step.eject")
    rate = ready["optimizer"].param_groups[0]
    exec(saved, ready)
    rate["lr"] = 0.01
    assert torch.allclose(ready["loss"], ready["step"](ready["x"], ready["y"]))
    rate["lr"] = 0.1
    _needs_c()
    try:
        exec(ejected, ready)
    finally:
        sys.modules.pop("classifier_step", None)
    assert torch.equal(ready["loss"], ready["step"](ready["x"], ready["y"]))
    assert "tracejit" not in re.findall(r"^(?:import|from) (\w+)", _text("classifier_step.py"))


def _text(path: str) -> str:
    return Path(path).read_text()


def test_onnx(ready):
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    exec(snippet("to_onnx"), ready)
    expected = ready["step"](ready["x"], ready["y"]).item()
    assert ready["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_pictures(ready):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    exec(snippet("step.draw"), ready)
    assert "<html" in _text("step.html") and "<svg" in _text("step.svg")
    (events,) = Path("runs/step").iterdir()
    assert events.name.startswith("events.out.tfevents") and events.stat().st_size > 1000


def test_a_static_graph():
    names = {"tracejit": tracejit, "torch": torch}
    exec(snippet("tracejit.Graph"), names)
    run = names["graph"].compile(names["loss"])
    a = torch.randn(8, 4)
    losses = [run(a=a).item() for _ in range(5)]
    w = torch.ones(4, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.1)
    for found in losses:
        optimizer.zero_grad()
        loss = (a @ w).square().mean()
        loss.backward()
        optimizer.step()
        assert found == pytest.approx(loss.item(), rel=1e-5)


def test_numpy():
    text = snippet("x.T.dot")
    compiled, plain = {"tracejit": tracejit}, {}
    exec(text, compiled)
    exec(text.replace("@tracejit.compile\n", ""), plain)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((20, 4)), rng.standard_normal((20, 2))
    ours, theirs = np.zeros((4, 2)), np.zeros((4, 2))
    for _ in range(6):
        compiled["fit"](x, y, ours, 0.01)
        plain["fit"](x, y, theirs, 0.01)
    assert np.allclose(ours, theirs, rtol=1e-12) and ours.any()
    assert compiled["fit"].stats.replays


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_prefetch(device, ready):
    """On a GPU where there is one; the fake device's is in test_prefetch.py."""
    text = snippet("prefetch")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    if device == "cuda":
        ready["model"].to("cuda")
    ready["loader"] = [(torch.randn(8, 20), ready["y"]) for _ in range(4)]
    exec(text.replace('"cuda"', repr(device)), ready)
    x, y = ready["loader"][-1]
    assert ready["loss"].shape == () and torch.equal(ready["x"].cpu(), x)
    assert torch.equal(ready["y"].cpu(), y)


@pytest.mark.parametrize("command", ["save", "eject", "onnx", "draw", "cache"])
def test_the_command_line(command, ready, tmp_path, monkeypatch, capsys):
    """Its lines as they stand; `eject` and `onnx` with the names of the first."""
    (text,) = [text for language, text in section("Take it with you") if language == "sh"]
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    assert all(line.startswith("python -m tracejit ") for line in lines)
    by_name = {line.split()[3]: line for line in lines}
    like = by_name.get(command) or by_name["save"].replace(" save ", f" {command} ")
    if command == "onnx":
        pytest.importorskip("onnx", reason="the extra onnx is not installed")
    monkeypatch.setenv("TRACEJIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "train.py").write_text(TRAIN)
    words = shlex.split(like)[3:]
    if command in ("save", "eject"):
        _needs_c()
    assert status(*words) == 0, capsys.readouterr().err
    if "-o" in words:
        assert Path(words[words.index("-o") + 1]).stat().st_size > 1000
    else:
        assert "removed 0.00 MiB" in capsys.readouterr().out
