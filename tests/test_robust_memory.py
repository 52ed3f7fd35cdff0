"""Too little memory: a call raises, everything is as before it, and the next one is right. And
calls by the hundred thousand, which leave nothing behind."""

from __future__ import annotations

import gc
import os
import resource
import threading
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

import tracejit
from support.children import forked
from support.scope import WHOLE
from support.small_training import Training, near, states_of_eager
from tracejit.programs import MAX_PROGRAMS
from tracejit.runtime.numpy_kernel import Run

# ---- allocations that fail


class Failing:
    """Lets the n-th of some calls fail."""

    def __init__(self, n: int):
        self.n, self.count = n, 0

    def allocations(self, patch: pytest.MonkeyPatch) -> None:
        """Of those that allocate tensors and arrays."""
        for owner, name in (
            *((torch, x) for x in ("empty", "empty_strided", "empty_like", "zeros", "ones")),
            *((np, x) for x in ("empty", "empty_like", "zeros", "ones", "full")),
        ):
            patch.setattr(owner, name, self.counting(getattr(owner, name)))

    def counting(self, inner: Callable) -> Callable:
        def allocate(*args: object, **kwargs: object) -> object:
            self.count += 1
            if self.count == self.n:
                raise MemoryError("planted")
            return inner(*args, **kwargs)

        return allocate

    def statements(self, patch: pytest.MonkeyPatch) -> None:
        """Of what numpy does in a launch, statement by statement and block by block."""
        inner = Run.__call__

        def counted(step: Callable, *given: object) -> None:
            self.count += 1
            if self.count == self.n:
                raise MemoryError("planted")
            step(*given)

        def launch(run: Run, *given: object) -> None:
            with patch.context() as during:
                for stage in run.stages:
                    during.setattr(stage, "steps", [partial(counted, x) for x in stage.steps])
                    during.setattr(stage, "before", [partial(counted, x) for x in stage.before])
                inner(run, *given)

        patch.setattr(Run, "__call__", launch)


@pytest.mark.parametrize("calls", [0, 1, 6])
@pytest.mark.parametrize("backend", ["c", "numpy"])
def test_each_allocation_in_turn_fails(backend, calls, monkeypatch):
    """Of a first call, of the second, of a replay whose last results somebody holds."""
    check_each(backend, calls, Failing.allocations, 1 if WHOLE or calls > 1 else 5, monkeypatch)


@pytest.mark.parametrize("calls", [0, 1, 6])
def test_each_statement_of_numpy_in_turn_fails(calls, monkeypatch):
    """numpy works in memory of its own, which it may not get in the middle of a plan: what was
    written by then is put back."""
    check_each("numpy", calls, Failing.statements, 3 if WHOLE else 17, monkeypatch)


def test_an_allocation_of_a_verified_call_fails(monkeypatch):
    """Of the compiled call, after which all is as before; where eager's fails, or that of a copy of
    what is compared, the call is made without it."""
    check_each("c", 0, Failing.allocations, 3 if WHOLE else 11, monkeypatch, verify=2)


def check_each(
    backend: str,
    calls: int,
    plant: Callable,
    every: int,
    monkeypatch: pytest.MonkeyPatch,
    **more: object,
) -> None:
    """Let each of some calls fail in turn, after so many calls of the step."""

    def make() -> Training:
        return Training(dropout=0.5, rate=True)

    done, n, failures = False, 0, 0
    while not done:
        n += every
        training = make()
        options = {"backend": backend, "on_unsupported": "raise", **more}
        step = tracejit.compile(training.step, **options)
        held = [step() for _ in range(calls)]
        held += [p.grad for p in training.model.parameters()]
        before, numbers = training.state()[1:], torch.get_rng_state()
        with monkeypatch.context() as patch:
            failing, failed = Failing(n), False
            plant(failing, patch)
            try:
                held.append(step())
            except MemoryError as error:
                assert "planted" in str(error)
                failures, failed = failures + 1, True
        done = failing.count < n
        if failed:
            assert training.state()[1:] == before, n
            assert torch.equal(torch.get_rng_state(), numbers), n
            step()
        step()
        state = training.state()[1:-64]
        twin = make()
        for _ in range(calls + 2):
            twin.step()
        assert near(state, twin.state()[1:-64]), n
    assert failures >= (1 if calls or more else 2), failures


def test_the_limit_of_the_address_space():
    """Of a child: what torch says when the system gives no more."""

    def child() -> tuple[bool, bool, str]:
        w = torch.zeros(1 << 20)

        def step(x: torch.Tensor) -> torch.Tensor:
            w.add_(1.0)
            return x * 2 + 1

        compiled = tracejit.compile(step, backend="c", on_unsupported="raise")
        small, large = torch.ones(4), torch.ones(1).expand(1 << 29)
        kept = [compiled(small) for _ in range(4)]
        compiled(torch.ones(1 << 10, 1 << 10).expand(1 << 10, 1 << 10))
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), hard))
        before = w[0].item()
        try:
            compiled(large)
            said = ""
        except (RuntimeError, MemoryError) as error:
            said = str(error)
        unchanged = w.eq(before).all().item()
        again = compiled(small)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        return unchanged, torch.equal(again, kept[0]) and w.eq(before + 1).all().item(), said

    unchanged, right, said = forked(child).result()
    assert unchanged and right
    assert "memory" in said, said


def test_no_more_threads_can_be_started(monkeypatch, tmp_path):
    """Compilers run side by side in threads, if there are any: otherwise the call raises as it
    began, and the next one is right."""
    monkeypatch.setenv("TRACEJIT_CACHE", str(tmp_path))
    training = Training()
    step = tracejit.compile(training.step, backend="c", on_unsupported="raise")
    before = training.state()

    def refuses(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuses)
        with pytest.raises(RuntimeError, match="new thread"):
            step()
    assert training.state()[1:] == before[1:]
    training.calls = 0
    for _ in range(4):
        step()
    assert near(training.state(), states_of_eager(4)[-1])


# ---- many calls


def measured() -> dict[str, int]:
    """What a process holds: bytes in memory, descriptors, threads, objects, mappings."""
    gc.collect()
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * resource.getpagesize()
    with open("/proc/self/maps") as file:
        maps = len(file.readlines())
    return {
        "resident": resident,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "objects": len(gc.get_objects()),
        "mappings": maps,
    }


@pytest.mark.parametrize("calls", [10_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_replays_leave_nothing_behind(calls):
    """In a process of its own, after a tenth of the calls."""

    def child() -> tuple[dict, dict, int]:
        training = Training(dropout=0.5)
        step = tracejit.compile(training.step, backend="c", on_unsupported="raise")
        for _ in range(calls // 10):
            step()
        before, replays = measured(), step.stats.replays
        for _ in range(calls - calls // 10):
            step()
        return before, measured(), step.stats.replays - replays

    before, after, replays = forked(child, deadline=3600).result()
    print(f"{calls} calls: {before} -> {after}")
    assert replays == calls - calls // 10
    assert after["resident"] - before["resident"] <= 2 << 20
    for name in ("descriptors", "threads"):
        assert after[name] == before[name]
    assert abs(after["mappings"] - before["mappings"]) <= 4
    assert after["objects"] - before["objects"] <= 50


@pytest.mark.parametrize("calls", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_misses_of_guards_keep_a_bounded_number_of_plans(calls):
    """Each call has another shape, dtype or number of its own: plans, replays, and what a step
    remembers of its traces stay few; what is kept works."""

    def child() -> tuple[dict, dict, dict]:
        scale = {"by": 1}

        def step(x: torch.Tensor) -> torch.Tensor:
            return (x * 2 + len(x) + scale["by"]).sum()

        compiled = tracejit.compile(step, backend="numpy", on_unsupported="raise")

        def call(i: int) -> None:
            scale["by"] = i // 3
            x = torch.ones(1 + i % 211, dtype=(torch.float32, torch.float64)[i % 2])
            assert compiled(x).item() == len(x) * (2.0 + len(x) + i // 3)

        for i in range(calls // 2):
            call(i)
        before = measured()
        for i in range(calls // 2, calls):
            call(i)
        kept = {
            "plans": len(compiled._programs._kept),
            "replays": len(compiled._replays),
            "traces": compiled.stats.traces,
        }
        return before, measured(), kept

    before, after, kept = forked(child, deadline=3600).result()
    print(f"{calls} calls: {kept} {before} -> {after}")
    assert kept["traces"] >= calls // 2
    assert kept["plans"] <= MAX_PROGRAMS and kept["replays"] <= MAX_PROGRAMS
    assert after["descriptors"] == before["descriptors"]
    assert after["threads"] == before["threads"]
    assert after["objects"] <= 1.3 * before["objects"]
    assert after["resident"] - before["resident"] <= 24 << 20
