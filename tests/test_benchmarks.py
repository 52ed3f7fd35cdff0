"""The benchmarks run: every case in tiny sizes, and the judgement over made-up figures."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import benchmarks
from benchmarks import (
    convolutions,
    data_parallel,
    gpu,
    isolated,
    launch_cost,
    machine,
    products,
    run,
    scaling,
    verify_cost,
    worker,
)
from benchmarks.cases import ALL, CASES, LARGE, TELLING, arrays_of, cases_of
from benchmarks.image_steps import resnet
from benchmarks.numpy_steps import STEPS as NUMPY_STEPS
from benchmarks.worker import CALLS, build_arrays, build_torch

TORCH_CONTENDERS = ("eager", "eager fused", "eager channels_last", "tracejit")


def first_calls(contender) -> tuple[list, list[np.ndarray]]:
    numbers = [contender.number(contender.step()) for _ in range(CALLS)]
    return numbers, contender.state()


def start_of(name: str) -> list:
    return run.started(name, small=True)[1]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sweep(8)
def test_contenders_agree(name, tmp_path):
    numbers, state = first_calls(build_torch(name, "eager", "cpu", small=True))
    start = start_of(name)
    assert any(np.linalg.norm(b - a) > 0 for a, b in zip(start, state, strict=True))
    for contender in TORCH_CONTENDERS[1:]:
        if run.available(name, contender, "cpu", {}):
            ours = first_calls(build_torch(name, contender, "cpu", small=True))
            run.compare(*ours, numbers, state, start)
    if name in NUMPY_STEPS:
        step, _ = run.started(name, small=True)
        np.savez(tmp_path / "start.npz", **arrays_of(step))
        ours = first_calls(build_arrays(name, "numpy", tmp_path / "start.npz"))
        run.compare(*ours, numbers, state, start)


IN_JAX = """
import sys
import numpy as np
from pathlib import Path
from benchmarks.worker import CALLS, build_arrays
for name in sys.argv[2:]:
    folder = Path(sys.argv[1]) / name
    contender = build_arrays(name, "jax", folder / "start.npz")
    numbers = [contender.number(contender.step()) for _ in range(CALLS)]
    np.savez(folder / "state.npz", *contender.state(), numbers=np.array(numbers, float))
    print(name)
"""


@pytest.fixture(scope="module")
def in_jax(tmp_path_factory) -> Path:
    """A folder for each case with what its version in JAX came to, in a process of its own."""
    if importlib.util.find_spec("jax") is None:
        pytest.skip("JAX is not installed")
    folder, names = tmp_path_factory.mktemp("jax"), [n for n, case in CASES.items() if case.jax]
    for name in names:
        (folder / name).mkdir()
        np.savez(folder / name / "start.npz", **arrays_of(run.started(name, small=True)[0]))
    command = [sys.executable, "-c", IN_JAX, str(folder), *names]
    done = subprocess.run(command, cwd=run.ROOT, capture_output=True, text=True)
    assert done.stdout.split() == names, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.jax])
def test_jax_agrees(name, in_jax):
    numbers, state = first_calls(build_torch(name, "eager", "cpu", small=True))
    with np.load(in_jax / name / "state.npz") as found:
        ours = [None if np.isnan(x) else x for x in found["numbers"]]
        run.compare(
            ours, [found[f"arr_{i}"] for i in range(len(state))], numbers, state, start_of(name)
        )


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


# ---- on a GPU: what can be known of it without one


def test_there_are_larger_cases_for_a_gpu():
    assert set(TELLING) <= ALL.keys() and cases_of("cpu") == tuple(CASES)
    assert sorted(cases_of("cuda")) == sorted(ALL)
    for name, case in LARGE.items():
        assert case.like in CASES and (case.gemms or case.bytes), name
        step, start = run.started(name, small=True)
        assert start and callable(step)


@pytest.mark.parametrize("form", ["NN", "TN", "NT", "TT"])
def test_products_of_both_contenders(form):
    """Ours compares itself with numpy's before it is timed."""
    for batch, updates in ((1, False), (1, True), (3, False)):
        shape = products.Shape("small", 5, 7, 9, form, batch, updates)
        for contender in products.CONTENDERS.values():
            assert contender(shape, "float64")() > 0


def test_what_has_a_version_in_jax():
    """By its source: it may not be installed here."""
    names = []
    for module in worker.ARRAYS["jax"]:
        tree = ast.parse((Path(benchmarks.__path__[0]) / f"{module}.py").read_text())
        (table,) = [n.value for n in tree.body if isinstance(n, ast.AnnAssign)]
        names += [k.value for k in table.keys]
    assert sorted(names) == sorted(name for name, case in CASES.items() if case.jax)


def contenders_of(case: str, device: str) -> set[str]:
    pythons = {"jax": "python"}
    return {c for c in run.CONTENDERS if run.available(case, c, device, pythons)}


def test_who_contends():
    everywhere = {"eager", "torch.compile", "torch.compile traced", "tracejit"}
    assert contenders_of("loss_item", "cpu") == everywhere | {"eager fused"}
    of_gpus = {"torch.compile reduce-overhead", "torch.compile max-autotune", "tracejit launches"}
    fused = {"eager fused", "eager graph", "eager fused graph"}
    assert contenders_of("nn_adam_4k", "cuda") == everywhere | of_gpus | fused | {"jax"}
    assert contenders_of("dynamic_net", "cuda") == everywhere | of_gpus
    assert contenders_of("chain_64m", "cuda") == everywhere | of_gpus | {"jax", "eager graph"}
    assert contenders_of("chain_4m", "cpu") == everywhere | {"jax", "numpy"}
    images = everywhere | {"eager channels_last", "jax"}
    assert contenders_of("conv_block", "cpu") == images
    assert contenders_of("unet", "cpu") == images | {"eager fused"}
    for case in ALL:
        assert contenders_of(case, "cuda") <= {*worker.COMPILERS, *worker.ARRAYS}


@pytest.mark.parametrize(
    "contender, fused, capturable",
    [
        ("eager", None, False),
        ("eager fused", True, False),
        ("eager graph", None, True),
        ("eager fused graph", True, True),
        ("tracejit", None, False),
    ],
)
def test_options_of_optimizers(contender, fused, capturable):
    for name in ("nn_adam", "mlp", "adam_200"):
        step, _ = ALL[name].made("cpu", contender, small=True)
        defaults = inspect.getclosurevars(step).nonlocals["optimizer"].defaults
        assert defaults["fused"] is fused
        assert defaults.get("capturable", capturable) is capturable


class Graphs:
    """Stands for torch's graphs on the CPU, for one step: what is captured does not run, and a
    replay runs the step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step, tensors):
        self.log: list[str] = []
        stream = SimpleNamespace(wait_stream=lambda other: self.log.append("wait"))

        @contextlib.contextmanager
        def on(stream):
            self.log.append("side")
            yield

        @contextlib.contextmanager
        def captured(graph):
            before = [t.detach().clone() for t in tensors]
            yield
            with torch.no_grad():
                for t, b in zip(tensors, before, strict=True):
                    t.copy_(b)
            self.log.append("capture")

        def replay(graph=None):
            step()
            self.log.append("replay")

        graph = SimpleNamespace(replay=replay)
        for name, value in {
            "Stream": lambda: stream,
            "stream": on,
            "current_stream": lambda: stream,
            "CUDAGraph": lambda: graph,
            "graph": captured,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_a_whole_step_in_a_graph(monkeypatch):
    """Each call counts once: the first ones run, the capture does not, replays do."""
    plain, wanted = CASES["transformer_block"].made("cpu", small=True)
    for _ in range(CALLS):
        plain()
    step, tensors = CASES["transformer_block"].made("cpu", small=True)
    graphs = Graphs(monkeypatch, step, tensors)
    graphed = worker.COMPILERS["eager graph"](step)
    for _ in range(CALLS):
        graphed()
    later = CALLS - worker.WARM_UP
    assert graphs.log == ["wait", "side", "wait"] * worker.WARM_UP + [
        "capture",
        *["replay"] * later,
    ]
    for a, b in zip(tensors, wanted, strict=True):
        assert torch.equal(a, b)


def test_torch_compile_in_its_modes(monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda step, mode=None: modes.append(mode) or step)
    for name in worker.COMPILERS:
        if name.startswith("torch.compile") and "traced" not in name:
            worker.COMPILERS[name](len)
    assert modes == [None, "reduce-overhead", "max-autotune"]


def test_large_tensors_are_compared_by_a_part(monkeypatch):
    monkeypatch.setattr(worker, "COMPARED", 10)
    assert (
        worker.sampled(np.zeros((4, 6))).shape == (8,) and len(worker.sampled(np.zeros(10))) == 10
    )
    assert torch.equal(worker.sampled(torch.arange(25)), torch.arange(0, 25, 3))
    assert worker.sampled(np.zeros((0, 3))).shape == (0,)


def test_no_device_is_said(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for main in (run.main, gpu.main):
        with pytest.raises(SystemExit) as exit:
            main(["--device", "cuda"])
        assert exit.value.code == 2 and "there is no CUDA device" in capsys.readouterr().err


def test_what_a_gpu_is(monkeypatch):
    found = SimpleNamespace(name="a GPU", major=9, minor=0, total_memory=2**37)
    found.multi_processor_count = 132
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: found)
    monkeypatch.setenv("PATH", "")
    told = machine.machine("cuda")
    assert (told["device"], told["arch"], told["memory_gib"]) == ("a GPU", "sm_90", 128.0)
    assert told["driver"].startswith("not known") and told["versions"]["torch"]
    assert "arch" not in machine.machine()


# ---- workers that do not do well


def script(tmp_path: Path, text: str) -> str:
    """A program that stands for Python with the worker."""
    path = tmp_path / "worker.sh"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return str(path)


@pytest.mark.parametrize(
    "text, said",
    [
        ("exec sleep 60", "failed: no answer in 0 s"),
        ("echo 'launch 3 of x: CudaError: no' >&2; exit 3", "failed: launch 3 of x: CudaError: no"),
        ("kill -9 $$", "failed: no message"),
    ],
)
def test_a_worker_that_fails_is_told(text, said, tmp_path):
    process = run.Process(
        script(tmp_path, text), [], tmp_path, "x", 0.3 if "sl" in text else 20, {}
    )
    with pytest.raises(run.Failed, match=said):
        process.receive()
    process.close()
    assert process.process.returncode is not None


def test_a_worker_that_fails_in_its_turn_stops_no_other(monkeypatch):
    monkeypatch.setattr(run, "PAUSE", 0)

    class Worker:
        def __init__(self, *answers):
            self.answers = [*answers]

        def ask(self):
            answer = self.answers.pop(0)
            if answer is None:
                raise run.Failed("failed: it died")
            return answer

    workers = {"a": Worker(1.0, 2.0, 3.0), "b": Worker(1.0, None), "c": Worker(4.0, 5.0, 6.0)}
    times, errors = run.turns(workers, 3)
    assert times == {"a": [1.0, 2.0, 3.0], "c": [4.0, 5.0, 6.0]} and [*errors] == ["b"]


@pytest.mark.slow
def test_a_wrong_tracejit_is_a_row_and_an_exit_status(monkeypatch, tmp_path, capsys):
    real, seen = run.compare, []

    def compare(*given):
        seen.append(given)
        if len(seen) > 1:
            raise run.Failed("wrong: planted")
        real(*given)

    monkeypatch.setattr(run, "compare", compare)
    output = tmp_path / "found.json"
    given = ["--small", "--rounds", "1", "--case", "softmax", "--contender", "tracejit"]
    report = run.main([*given, "--output", str(output)])
    assert report["failed"] == ["softmax: tracejit wrong: planted"]
    row = json.loads(output.read_text())["cases"]["softmax"]["contenders"]["tracejit"]
    assert row["note"] == "wrong: planted" and "said" in row
    assert "softmax: tracejit wrong: planted" in capsys.readouterr().out


# ---- items in processes that may die

CHILD = """
import os, sys, time
sys.path.insert(0, {root!r})
from benchmarks.isolated import Lines, fatal
lines = Lines()
blocking = os.environ.get("CUDA_LAUNCH_BLOCKING") == "1"
for item in sys.argv[1:]:
    lines.begin(item)
    if item == "hangs":
        time.sleep(60)
    if item == "crashes":
        print("kernel k3 of net.py:7", flush=True)
        os.abort()
    text = {{"fails": "ValueError", "fatal": "CUDA error"}}.get(item, "")
    text += " at net.py:9" if blocking and text else ""
    lines.end(item, "failed" if text else "passed", text)
    if fatal(text):
        break
"""


def results(tmp_path: Path, *items: str, limit: float = 5.0, seconds: float = 60.0) -> dict:
    path, found = tmp_path / "child.py", {}
    path.write_text(CHILD.format(root=str(isolated.ROOT)))

    def child(items):
        return [sys.executable, str(path), *items]

    deadline = time.monotonic() + seconds
    isolated.run_items(items, child, found.__setitem__, deadline=deadline, limit=limit)
    return found


def test_what_fails_stops_no_other(tmp_path):
    items = ["first", "fails", "second", "fatal", "third", "crashes", "fourth", "hangs", "last"]
    found = results(tmp_path, *items, limit=4.0)
    assert [*found] == items
    statuses = {item: x["status"] for item, x in found.items()}
    assert {statuses[x] for x in ("first", "second", "third", "fourth", "last")} == {"passed"}
    assert statuses["fails"] == statuses["fatal"] == "failed"
    assert found["fatal"]["blocking"]["text"] == "CUDA error at net.py:9"
    assert "blocking" not in found["fails"]
    assert statuses["crashes"] == "crashed" and "kernel k3 of net.py:7" in found["crashes"]["text"]
    assert "exit status -6" in found["crashes"]["text"]
    assert statuses["hangs"] == "hung" and "more than 4 s" in found["hangs"]["text"]


def test_items_end_with_the_time(tmp_path):
    found = results(tmp_path, "hangs", "never", seconds=2.0, limit=30.0)
    assert [x["status"] for x in found.values()] == ["not finished", "not begun"]
    assert results(tmp_path, "a", seconds=-1.0) == {"a": {"status": "not begun"}}


def test_a_child_that_begins_nothing_comes_to_an_end(tmp_path):
    found = {}

    def child(items):
        return [sys.executable, "-c", "raise SystemExit('no module')"]

    deadline = time.monotonic() + 60
    isolated.run_items(["a", "b"], child, found.__setitem__, deadline=deadline, limit=30.0)
    assert [x["status"] for x in found.values()] == ["failed", "failed"]
    assert "did not begin it\nno module" in found["a"]["text"]


TESTS = """
import os, pytest
pytestmark = pytest.mark.gpu
def test_good(): pass
def test_bad():
    x = 41
    assert x == 42
@pytest.mark.skip(reason="not here")
def test_skipped(): pass
def test_fatal(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
@pytest.mark.parametrize("n", [1, 2])
def test_after(n): pass
"""


@pytest.mark.slow
def test_gpu_tests_are_told_one_by_one(tmp_path):
    path, items = tmp_path / "test_some.py", {}
    path.write_text(TESTS)
    run_it = gpu.tests([path.name], tmp_path)
    result = run_it(time.monotonic() + 120, items.__setitem__)
    assert result == {"status": "failed", "passed": 3, "failed": 2, "skipped": 1}
    names = {item.rpartition("::")[2]: x for item, x in items.items()}
    assert "assert 41 == 42" in names["test_bad"]["text"]
    assert "blocking" in names["test_fatal"] and names["test_after[2]"]["status"] == "passed"
    path.write_text("raise ImportError('no torch')")
    result = run_it(time.monotonic() + 120, items.__setitem__)
    assert result["status"] == "failed" and "no torch" in result["text"]


@pytest.mark.slow
def test_the_gpu_tests_are_found(monkeypatch):
    """All of them, in `tests`: here the marker leaves them out."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    items = {}
    result = gpu.tests(["tests/test_gpu.py"])(time.monotonic() + 120, items.__setitem__)
    assert result == {"status": "passed", "skipped": len(items)} and len(items) > 50
    assert "tests/test_gpu.py::test_a_step_joins_a_graph" in items


# ---- the whole run


def part(name: str, run_it, limit: float = 60.0) -> gpu.Part:
    return gpu.Part(name, limit, run_it)


def slept(deadline: float, note) -> dict:
    return gpu.command(["sh", "-c", "echo begun; sleep 60 & wait"], deadline)


def raises(deadline: float, note) -> dict:
    note("item", {"status": "passed"})
    raise RuntimeError("planted")


def test_parts_keep_to_the_budget_and_apart(tmp_path, capsys):
    path = tmp_path / "found.json"
    seen = []

    def looks(deadline: float, note) -> dict:
        seen.append(json.loads(path.read_text()))
        return {"status": "passed"}

    parts = [part("sleeps", slept, 1.0), part("raises", raises), part("looks", looks)]
    report = gpu.Report(path, {"device": "none"})
    begun = time.monotonic()
    gpu.run_parts(parts, report, 60.0)
    assert time.monotonic() - begun < 30
    found = json.loads(path.read_text())["parts"]
    assert found["sleeps"]["status"] == "out of time" and found["sleeps"]["text"] == "begun\n"
    assert found["raises"]["status"] == "failed" and "planted" in found["raises"]["text"]
    assert found["raises"]["items"] == {"item": {"status": "passed"}}
    assert seen[0]["device"] == "none" and [*seen[0]["parts"]] == ["sleeps", "raises"]
    assert "looks: passed" in capsys.readouterr().out


def test_a_run_goes_on_where_it_stopped(tmp_path):
    path, ran = tmp_path / "found.json", []

    def counted(name: str) -> gpu.Part:
        return part(name, lambda deadline, note: ran.append(name) or {"status": "passed"})

    first = gpu.Report(path, {"commit": "a"})
    gpu.run_parts([counted("one"), part("sleeps", slept, 0.1)], first, 60.0)
    gpu.run_parts([counted("late")], first, gpu.LEAST - 1)
    assert first.found["parts"]["late"]["status"] == "not begun" and ran == ["one"]
    again = gpu.Report(path, {"commit": "b"}, resume=True)
    gpu.run_parts([counted("one"), counted("sleeps"), counted("late")], again, 60.0)
    assert ran == ["one", "sleeps", "late"] and again.found["commit"] == "b"
    assert {p["status"] for p in again.found["parts"].values()} == {"passed"}
    assert gpu.Report(path, {}).found["parts"] == {}


def test_the_sanitizer(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_SANITIZERS", ())
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    check = gpu.sanitizer("cuda", "memcheck", ["mlp"])
    assert check(time.monotonic() + 9, None)["status"] == "absent"
    tool = script(tmp_path, 'echo "Invalid __global__ read in k3"; echo "$@"; exit 9')
    monkeypatch.setattr(gpu.shutil, "which", lambda name: tool)
    found = check(time.monotonic() + 9, None)
    assert (found["status"], found["exit"]) == ("failed", 9)
    assert (
        "read in k3" in found["text"] and "-m benchmarks.smoke --device cuda mlp" in found["text"]
    )


def test_the_parts_of_a_run(capsys):
    names = [p.name for p in gpu.parts_of("cuda")]
    assert len(names) == len({*names})
    assert names[0] == "smoke" and names.index("tests") < 6
    assert all(f"table: {case}" in names for case in ALL)
    first = sum(p.limit for p in gpu.parts_of("cuda")[: names.index("memcheck") + 1])
    assert first < 60 * gpu.MINUTES
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--only", "typo"])
    assert "no part begins with typo; there are smoke, table: " in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_on_the_cpu(tmp_path):
    output = tmp_path / "found.json"
    only = ["--only", "smoke", "--only", "table: chain_64m", "--output", str(output)]
    found = gpu.main(["--device", "cpu", "--small", *only])
    assert found == json.loads(output.read_text()) and found["versions"]["triton"]
    parts = found["parts"]
    assert parts["smoke"]["passed"] == len(CASES) and parts["smoke"]["status"] == "passed"
    row = parts["table: chain_64m"]["contenders"]["tracejit"]
    check_row(row)


@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch without gloo",
)
@pytest.mark.slow
def test_two_processes():
    """Losses are compared, and what is hidden of the reduction is measured on each rank."""
    found = data_parallel.together("ddp_mlp", ("eager", "tracejit"), 1, 2)
    assert found["seconds"].keys() == {"eager", "tracejit"} and not found["refused"]
    assert min(found["seconds"].values()) > 0 and len(found["hidden"]) == data_parallel.RANKS
    for x in found["hidden"]:
        assert 0 <= x["share"] <= 1 and x["alone"] > 0 and x["waited"] > 0
    with pytest.raises(AssertionError, match="tracejit has a loss of 2.0, and eager of 1.0"):
        data_parallel._compare({"eager": [1.0], "tracejit": [2.0]})


@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch without gloo",
)
@pytest.mark.slow
def test_scaling_beside_what_is_measured():
    """What is predicted for one process and for two, from launches and a link that are measured."""
    one, two = scaling.table("ddp_mlp", 1, 2, (1, 2))
    assert one["waited"] == 0 and one["predicted"] == pytest.approx(one["seconds"])
    assert two["processes"] == 2 and 0 <= two["hidden"] <= 1 and two["bandwidth"] > 0
    assert two["predicted"] >= two["launches"] + two["waited"] >= two["launches"] > 0


def test_convolutions_of_a_net():
    """Equal ones once, with the work of the definition; one of them measured alone."""
    small = {"batch": 2, "side": 8, "widths": (4, 8), "blocks": 2}
    found = convolutions.convolutions(lambda: resnet(**small))
    kinds = [(s.image, s.differentiated, times) for s, (_, _, times) in found.items()]
    assert kinds == [
        ((2, 3, 8, 8), False, 1),
        ((2, 4, 8, 8), True, 4),
        ((2, 4, 8, 8), True, 1),
        ((2, 8, 4, 4), True, 3),
        ((2, 4, 8, 8), True, 1),
    ]
    works = [work for _, work, _ in found.values()]
    assert works[:2] == [2 * 2 * (2 * 64 * 4) * 27, 3 * 2 * (2 * 64 * 4) * 36]
    shape, (module, _, _) = next(iter(found.items()))
    ours, eager = convolutions.measure(module, shape, rounds=1)
    assert ours > 0
    assert eager > 0
    assert convolutions.peak(1) > 1e8


def test_what_verify_costs_is_timed_on_steps_that_are_the_same_afterwards():
    """Of `verify=3` nothing is left: the function of a call is the one it would have been."""
    steps = {name: verify_cost.training(asked) for name, asked in verify_cost.ASKED.items()}
    texts = {name: step._replays[0].run.text for name, step in steps.items()}
    assert texts["verify=3"] == texts["none"]
    function = steps["verify=3"]._replays[0].run.function
    assert function.__code__.co_filename == "<tracejit run>"
    found = verify_cost.measured(rounds=1, calls=3)
    assert found.keys() == verify_cost.ASKED.keys() and min(found.values()) > 0
