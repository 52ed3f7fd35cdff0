"""The fuzzer itself: shards, runs that go on where they were stopped, and what it stores."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from support import fuzz
from support.fuzz import FIRST, KINDS, kind_of, lines_of, run_seed, summary, text_of

# A process that does what its environment says at one seed, and nothing of its own at the others.
CHILD = """
import os, sys, time
from types import SimpleNamespace
from support import fuzz

if "differs" not in os.environ.get("AT", ""):  # there the text of the program is compared
    fuzz.text_of = str
    sys.modules["torch"] = SimpleNamespace(set_num_threads=lambda n: None)  # takes seconds
    sys.modules["support.c_flags"] = SimpleNamespace(optimize=lambda patch, flag: None)

def run_seed(seed, verify):
    what = os.environ.get("AT", "").partition(" ")
    if what[0] == str(seed):
        if what[2] == "dies":
            os._exit(3)
        if what[2] == "hangs":
            time.sleep(600)
        raise AssertionError("call 1: tensor 0 differs")
    return "equal"

fuzz.run_seed = run_seed
sys.exit(fuzz.main())
"""


@pytest.fixture(autouse=True)
def support_is_found(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def run(seeds, folder: Path, **how: object) -> tuple[str, list[dict]]:
    fuzz.fuzz(seeds, folder, run=(sys.executable, "-c", CHILD), **how)
    return summary(folder)


def test_a_run_goes_on_where_it_was(tmp_path):
    text, wrong = run(range(100, 105), tmp_path, shard_of=3, processes=2)
    assert text.startswith("5 programs, 0 mismatches") and not wrong
    run(range(100, 107), tmp_path)
    begun = [line["seed"] for line in lines_of(tmp_path / "begun.jsonl")]
    assert sorted(begun) == list(range(100, 107))  # each once
    assert not list(tmp_path.glob("cache-*"))


@pytest.mark.parametrize("what", ["differs", "dies", pytest.param("hangs", marks=pytest.mark.slow)])
def test_a_mismatch_is_stored_and_the_others_run(what, tmp_path, monkeypatch):
    monkeypatch.setenv("AT", f"101 {what}")
    hung = 15.0 if what == "hangs" else fuzz.HUNG  # a process takes some seconds to start
    text, (wrong,) = run(range(100, 104), tmp_path, hung=hung)
    assert text.startswith("4 programs, 1 mismatches")
    outcome = {"differs": "mismatch", "dies": "died", "hangs": "hung"}[what]
    assert (wrong["seed"], wrong["outcome"]) == (101, outcome)
    assert wrong["program"] == text_of(101) and "def step(" in wrong["program"]
    assert f"seed 101 ({kind_of(101)}, {outcome})" in text
    assert what != "differs" or "tensor 0 differs" in wrong["error"]


def test_stored_mismatches_run_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AT", "101 fails")
    run(range(100, 104), tmp_path)
    monkeypatch.delenv("AT")
    own = fuzz.fuzz
    child = (sys.executable, "-c", CHILD)
    monkeypatch.setattr(fuzz, "fuzz", lambda *args, **kwargs: own(*args, run=child, **kwargs))
    assert fuzz.main(["--again", "--folder", str(tmp_path)]) == 0
    assert "4 programs, 0 mismatches" in capsys.readouterr().out
    assert json.loads((tmp_path / "mismatches.json").read_text()) == []


def test_a_line_that_was_cut_off_is_run_again(tmp_path):
    (tmp_path / "done.jsonl").write_text('{"seed": 100, "kind": "steps", "outc')
    with (tmp_path / "done.jsonl").open("a") as file:
        file.write("\n")
    text, _ = run(range(100, 101), tmp_path)
    assert text.startswith("1 programs, 0 mismatches")


@pytest.mark.parametrize("kind", dict.fromkeys(KINDS))
def test_each_kind_of_program_runs(kind, monkeypatch):
    """In this process, verified."""
    monkeypatch.setitem(os.environ, "TRACEJIT_ON_UNSUPPORTED", "raise")
    seed = next(s for s in range(FIRST, FIRST + len(KINDS)) if kind_of(s) == kind)
    assert run_seed(seed, verify=2) in ("equal", "refused", "raises", "diverges", "invalid")


@pytest.mark.parametrize("verify", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_fault_is_found_and_shrunk(verify):
    """tanh's derivative is wrong; with verify it says so itself."""
    from support.faults import FAULTS

    fault = next(f for f in FAULTS if f.name.startswith("tanh's"))
    text = next(
        said
        for s in range(2000)
        if kind_of(s) == "steps"
        and "tanh" in text_of(s)
        and "backward()" in text_of(s)
        and (said := _said(s, fault, verify))
    )
    assert "tanh" in text and "def step(" in text
    assert ("WrongResult" in text) == bool(verify)


def _said(seed: int, fault, verify: int) -> str:
    """What differs, with the shrunk program, while the fault is there; "" if nothing does."""
    with fault.plant():
        try:
            run_seed(seed, verify)
        except AssertionError as error:
            return str(error)
    return ""
