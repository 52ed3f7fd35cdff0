"""The benchmarks run: every case in tiny sizes, and the judgement over made-up figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import launch_cost, run
from benchmarks.cases import CASES, arrays_of
from benchmarks.numpy_steps import STEPS as NUMPY_STEPS
from benchmarks.worker import CALLS, build_arrays, build_torch

TORCH_CONTENDERS = ("eager", "eager fused", "tracejit")


def first_calls(contender) -> tuple[list, list[np.ndarray]]:
    numbers = [contender.number(contender.step()) for _ in range(CALLS)]
    return numbers, contender.state()


def start_of(name: str) -> list:
    case = CASES[name]
    _, tensors = case.make_step(device="cpu", **case.small)
    return [np.float64(0) if case.grads else t.detach().numpy().copy() for t in tensors]


@pytest.mark.parametrize("name", CASES)
def test_contenders_agree(name, tmp_path):
    numbers, state = first_calls(build_torch(name, "eager", "cpu", small=True))
    start = start_of(name)
    assert any(np.linalg.norm(b - a) > 0 for a, b in zip(start, state, strict=True))
    for contender in TORCH_CONTENDERS[1:]:
        if run.available(name, contender, "cpu", {}):
            ours = first_calls(build_torch(name, contender, "cpu", small=True))
            run.compare(*ours, numbers, state, start)
    if name in NUMPY_STEPS:
        case = CASES[name]
        np.savez(tmp_path / "start.npz", **arrays_of(case.make_step(**case.small)[0]))
        ours = first_calls(build_arrays(name, "numpy", tmp_path / "start.npz"))
        run.compare(*ours, numbers, state, start)


@pytest.mark.parametrize("name", sorted(NUMPY_STEPS))
def test_a_step_that_does_not_train_is_wrong(name):
    """A contender whose numbers are right but whose tensors did not move, or moved elsewhere."""
    _, wanted = first_calls(build_torch(name, "eager", "cpu", small=True))
    start = start_of(name)
    still = [np.zeros_like(b) + a for a, b in zip(start, wanted, strict=True)]
    with pytest.raises(run.Failed, match="wrong: tensor 0 is off by 1 "):
        run.compare([], still, [], wanted, start)
    with pytest.raises(run.Failed, match="wrong: tensor 0"):
        run.compare(
            [], [b + 0.1 * (b - a) for a, b in zip(start, wanted, strict=True)], [], wanted, start
        )


def test_numbers_are_compared():
    run.compare([1.0, None], [], [1.0005, None], [], [])
    with pytest.raises(run.Failed, match="call 1 returned 1, in eager 1.1"):
        run.compare([1.0, 1.0], [], [1.0, 1.1], [], [])
    with pytest.raises(run.Failed, match="nan"):
        run.compare([float("nan")], [], [1.0], [], [])


def whole_run(case: str, tmp_path: Path) -> dict[str, dict]:
    """The rows of a run in processes: first calls from both caches, memory, rounds, JSON."""
    options = ["--small", "--rounds", "2", "--case", case, "--contender", "tracejit"]
    output = tmp_path / "found.json"
    report = run.main([*options, "--contender", "numpy", "--output", str(output)])
    assert output.exists()
    return report["cases"][case]["contenders"]


def check_row(row: dict) -> None:
    assert row["p20"] <= row["p50"] <= row["p80"]


@pytest.mark.slow
def test_the_table_prints_and_a_peer_that_fails_is_a_row(monkeypatch, capsys, tmp_path):
    """A message in its place, and the others are measured."""
    monkeypatch.setitem(run.NUMPY_CASES, "softmax", None)  # offered here, missing in the worker
    rows = whole_run("softmax", tmp_path)
    assert list(rows) == ["eager", "numpy", "tracejit"] and "KeyError" in rows["numpy"]["note"]
    check_row(rows["eager"])
    check_row(rows["tracejit"])
    assert rows["tracejit"]["cached_s"] > 0 and rows["tracejit"]["allocated_bytes"] > 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("softmax ")]
    assert [line.split()[1] for line in lines] == [*rows] and "KeyError" in lines[1]


@pytest.mark.slow
def test_a_peer_without_torch_is_measured(tmp_path):
    rows = whole_run("chain_4m", tmp_path)
    assert list(rows) == ["eager", "numpy", "tracejit"]
    for row in rows.values():
        check_row(row)


def test_shortfalls():
    figures = {"p20": 9.0, "p50": 10.0, "p80": 11.0, "allocated_bytes": 100}
    ours = figures | {"cold_s": 0.5, "cached_s": 0.1}
    peers = {"eager": figures, "jax": {"note": "wrong"}}
    assert run.shortfalls("x", peers | {"tracejit": ours | {"p50": 12.0}}) == []
    late = ours | {"p50": 12.1, "cold_s": 0.7, "cached_s": 0.2, "allocated_bytes": 101}
    found = run.shortfalls("x", peers | {"tracejit": late})
    assert [text.split()[1] for text in found] == ["eager", "cold", "cached", "peak"]


def test_the_cost_of_launches_is_measured():
    found = launch_cost.costs(launch_cost.CASES["two-layer"], rounds=1, calls=2)
    assert found["launches"] == 4 and found["launch"] > 0
    changed = launch_cost.costs(lambda: launch_cost.sgd(3), rounds=1, calls=2)
    assert changed["changed"] > 0
