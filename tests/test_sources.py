"""What is shown is what ran: sources and times of loaded plans, and CPU plans in the disk cache."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import tracejit
from support.c_flags import optimize
from support.graph_texts import weight_gradients
from support.plan_checks import allocate
from tracejit.codegen import c as c_printer
from tracejit.errors import BackendUnavailable
from tracejit.ir.text import parse
from tracejit.runtime import c_compiler, c_plans
from tracejit.runtime.c_executor import CExecutor, LoadedCPlan
from tracejit.runtime.cache import DiskCache, unpack
from tracejit.runtime.executor import LoadedPlan, memory_of
from tracejit.runtime.numpy_executor import NumpyExecutor
from tracejit.runtime.profile import ProfiledPlan
from tracejit.schedule import schedule
from tracejit.schedule.cpu import lower as cpu_lowering
from tracejit.schedule.plan import Plan
from tracejit.schedule.traffic import bytes_moved


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """A C compiler with -O1, and a cache of the test's own."""
    try:
        c_compiler.find_compiler()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    monkeypatch.setenv("TRACEJIT_CACHE", str(tmp_path))
    optimize(monkeypatch, "-O1")


def planned() -> Plan:
    """A plan of a row kernel with column sums, which C fuses."""
    return schedule(parse(weight_gradients(300, 200)))


def loaded() -> LoadedCPlan:
    return CExecutor(2).load(planned())


def run(plan: Plan, ready: LoadedPlan) -> list[float]:
    """The times of a run on fresh memory."""
    layout = memory_of(ready, plan)
    memory = [allocate(b) for b in plan.buffers if b.kind != "arena"]
    arena = np.zeros(layout.arena_bytes + 64, np.uint8)
    rest = iter(memory)
    addresses = [0 if b.kind == "arena" else next(rest).address for b in plan.buffers]
    addresses += [0] * (layout.count - len(addresses))
    for i, place in layout.places.items():
        base = arena.ctypes.data if place.room is None else addresses[place.room]
        addresses[i] = base + place.offset
    return ready.timed(addresses, [0.5] * len(plan.scalars))


# --- sources and times -------------------------------------------------------------------------


def test_sources_of_c_are_what_was_compiled(monkeypatch):
    units: list[str] = []
    original = c_compiler.compile_c
    monkeypatch.setattr(
        c_compiler, "compile_c", lambda c, s, *f: units.append(s) or original(c, s, *f)
    )
    found = loaded().sources
    assert len(found) == 1 < len([one for x in planned().launches for one in x.alone()])
    for source in found:
        assert source.suffix == ".c" and "part0" in source.text
        assert any(source.text in unit for unit in units)


def test_sources_of_a_plan_from_the_cache_are_the_same():
    first = [(s.name, s.text) for s in loaded().sources]
    assert [(s.name, s.text) for s in loaded().sources] == first


def test_sources_of_numpy_are_the_kernels():
    plan = planned()
    found = NumpyExecutor().load(plan).sources
    alone = [one for x in plan.launches for one in x.alone()]
    assert len(found) == len(alone) and all(s.suffix == ".txt" for s in found)
    assert all(s.text.startswith("kernel(") and "(i0: " in s.text for s in found)


@pytest.mark.parametrize("executor", [CExecutor(2), NumpyExecutor()], ids=["c", "numpy"])
def test_each_source_is_timed(executor, capsys):
    plan = planned()
    ready = executor.load(plan)
    times = run(plan, ProfiledPlan(plan, ready))
    assert len(times) == len(ready.sources) == len(ready.bytes_moved())
    assert all(seconds > 0 for seconds in times)
    printed = capsys.readouterr().out
    for i, source in enumerate(ready.sources):
        assert f"kernel {i} ({source.name}): " in printed
    assert printed.count("of copy bandwidth") == len(times)


def test_a_fused_kernel_moves_less_than_both():
    """The rows are read once; the partial sums are no memory of the plan."""
    plan = planned()
    (fused,) = CExecutor(2).load(plan).bytes_moved()
    apart = NumpyExecutor().load(plan).bytes_moved()
    both = 2 * 300 * 200 * 4
    assert both <= fused < both + 8 * (300 + 200) * 4
    assert sum(apart) > fused
    assert sum(bytes_moved(plan)) <= sum(apart)


def test_a_profiled_step_trains_like_others(monkeypatch, capsys):
    def train() -> list[torch.Tensor]:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.LayerNorm(30))
        x = torch.randn(64, 20)

        @tracejit.compile(backend="c")
        def step():
            loss = net(x).square().mean() + net[0].weight.abs().sum()
            loss.backward()
            with torch.no_grad():
                for p in net.parameters():
                    p -= 0.1 * p.grad
                    p.grad = None

        for _ in range(4):
            step()
        return [p.detach() for p in net.parameters()]

    plain = train()
    monkeypatch.setenv("TRACEJIT_DEBUG", "2")
    for ours, right in zip(train(), plain, strict=True):
        assert torch.equal(ours, right)
    assert "GB/s" in capsys.readouterr().out


# --- CPU plans in the disk cache ---------------------------------------------------------------


def entry(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "cpu").iterdir()
    return path


def rewrite(path: Path, old: str, new: str) -> None:
    """Change an entry such that all checksums are right."""
    key = json.loads(re.search(r"^# key (.*)$", path.read_text(), re.MULTILINE)[1])
    body = unpack(path.read_bytes(), key)
    assert old in body
    DiskCache().put("cpu", key, body.replace(old, new))


def test_a_warm_start_lowers_and_parses_no_kernel(monkeypatch):
    first = loaded()
    monkeypatch.setattr(cpu_lowering, "lower", None)
    monkeypatch.setattr(c_printer, "emit_kernel", None)
    again = loaded()
    assert again.plan.calls == first.plan.calls and again.layout == first.layout
    assert again.plan.kernels._parsed == {}
    assert again.plan == first.plan


@pytest.mark.parametrize("damage", ["cut", "empty", "flip"])
def test_a_damaged_entry_is_made_again(tmp_path, damage):
    first = loaded()
    body = bytearray(entry(tmp_path).read_bytes())
    body[-100] ^= 1
    damaged = {"cut": body[: len(body) // 2], "empty": b"", "flip": body}[damage]
    entry(tmp_path).write_bytes(bytes(damaged))
    assert loaded().plan == first.plan


@pytest.mark.parametrize(
    "old, new", [("cpu plan", "gpu plan"), ("call k0", "call k7"), ("\n", " \n")]
)
def test_an_entry_that_cannot_be_read_is_made_again(tmp_path, old, new):
    first = loaded()
    rewrite(entry(tmp_path), old, new)
    assert loaded().plan == first.plan


def test_a_kernel_that_cannot_be_read_is_made_again(tmp_path):
    """Its text is looked at where its function is not in the cache."""
    first = loaded()
    rewrite(entry(tmp_path), "outer: points", "outer: dots")
    for kernel in (tmp_path / "kernel").iterdir():
        kernel.unlink()
    assert loaded().plan == first.plan


def test_vectors_of_another_width_make_another_plan(tmp_path, monkeypatch):
    loaded()
    c_plans.lowered(planned(), 16 if c_compiler.vector_bytes() != 16 else 32)
    assert len(list((tmp_path / "cpu").iterdir())) == 2
