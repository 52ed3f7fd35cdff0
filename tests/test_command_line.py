"""`python -m tracejit explain`, and what the help of each command shows."""

from __future__ import annotations

import json
import re
from dataclasses import fields

import pytest

import tracejit
from support.command_line import status
from tracejit.errors import TracejitWarning
from tracejit.ledger import Ledger

PROGRAM = """
import torch
import tracejit

x = torch.randn(300, 200)
print("noise")

@tracejit.compile
def compiled():
    return x.exp().sum(0) * 2.0

def make_step():
    return compiled.__wrapped__, [x]

@tracejit.compile(on_unsupported="eager")
def eager():
    return torch.fft.rfft(x).abs()

def fails():
    raise RuntimeError("of its own")
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "steps.py"
    path.write_text(PROGRAM)
    return path


@pytest.mark.parametrize("name", ["compiled", "make_step"])
def test_the_command_prints_the_ledger(file, name, capsys):
    assert status("explain", f"{file}:{name}", "--gpu", "B200", "--eager-seconds", "0.5") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("step compiled\n") and "steps.py:10" in captured.out
    assert "on B200" in captured.out and re.search(r"eager +500 ms, as given", captured.out)
    assert "noise" in captured.err and "noise" not in captured.out


def test_the_command_prints_json(file, capsys):
    assert status("explain", f"{file}:compiled", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {f.name for f in fields(Ledger)} and found["gpu"] == "H200"
    assert sum(x["bytes"] for x in found["launches"]) == found["bytes_moved"] > 4 * 300 * 200
    assert not found["eager_given"] and found["mode"].startswith("replay: ")


def test_the_command_writes_a_page(file, tmp_path, capsys):
    path = tmp_path / "step.html"
    assert status("explain", f"{file}:compiled", "--html", path) == 0
    assert capsys.readouterr().out == f"written to {path}\n"
    assert "<h1>step compiled</h1>" in path.read_text("utf-8")
    assert status("explain", f"{file}:compiled", "--html", tmp_path / "none" / "step.html") == 2
    said = capsys.readouterr().err
    assert "the page cannot be written: " in said and "Traceback" not in said


def test_the_command_tells_of_a_step_that_runs_eagerly(file, capsys):
    with pytest.warns(TracejitWarning, match="rfft"):
        assert status("explain", f"{file}:eager") == 0
    assert "rfft is not supported" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["{file}:typo"], "has no typo; it defines compiled, make_step, eager, fails"),
        (["{file}:fails"], "RuntimeError: of its own"),
        (["{file}:compiled", "--gpu", "V100"], "invalid choice: 'V100'"),
        (["{file}:compiled", "--json", "--html", "x.html"], "not allowed with argument"),
    ],
)
def test_what_the_command_refuses(file, arguments, said, capsys):
    assert status("explain", *(a.format(file=file) for a in arguments)) == 2
    captured = capsys.readouterr()
    assert said in captured.err and not captured.out


COMMANDS = ("explain", "report", "draw", "save", "eject", "onnx", "build", "ops", "cache")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command, capsys):
    assert status(command, "--help") == 0
    example = capsys.readouterr().out.partition("example:\n  ")[2]
    assert example.startswith(f"python -m tracejit {command} ") and example.count("\n") == 1
    assert status("--help") == 0
    assert example in capsys.readouterr().out


@pytest.mark.parametrize("command, name", [("save", "a.step"), ("eject", "a.py")])
def test_steps_are_written_to_files(file, tmp_path, capsys, command, name):
    assert status(command, f"{file}:make_step", "-o", tmp_path / name) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"written to {tmp_path / name}: ") and "noise" in captured.err
    assert (tmp_path / name).stat().st_size > 1000
    if command == "save":
        assert tracejit.load(tmp_path / name)().shape == (200,)
        assert status(command, f"{file}:make_step", "--objects", "-o", tmp_path / name) == 0
        assert "may be used" in tracejit.load(tmp_path / name).objects
        capsys.readouterr()
    assert status(command, f"{file}:eager", "-o", tmp_path / "other") == 2
    assert "cannot be saved" in capsys.readouterr().err and not (tmp_path / "other").exists()
    assert status(command, f"{file}:make_step", "-o", tmp_path / "none" / name) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_cache_is_listed_and_pruned(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRACEJIT_CACHE", str(tmp_path / "cache"))
    assert status("cache") == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("0 entries")
    assert status("explain", f"{file}:make_step") == 0
    capsys.readouterr()
    assert status("cache") == 0
    found = capsys.readouterr().out
    assert "scheduled plans                 1 entries" in found and "compiled C" in found
    assert status("cache", "--prune", "100M") == 0
    assert "removed 0.00 MiB" in capsys.readouterr().out
    assert status("cache", "--prune", "0") == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("0 entries")
    assert status("cache", "--prune", "some") == 2
    assert "'some' is no size" in capsys.readouterr().err
