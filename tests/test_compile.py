"""The driver: modes, counters, plans, signatures, aborts, threads, the debugging ladder."""

from __future__ import annotations

import inspect
import itertools
import os
import subprocess
import sys
import threading
import warnings
import weakref

import pytest
import torch

import tracejit
from tracejit.errors import (
    BackendUnavailable,
    ReplayNotArmed,
    ShapeError,
    SideEffectError,
    TracejitError,
    UnsupportedOperation,
)
from tracejit.runtime import select


def two_parameters():
    torch.manual_seed(0)
    return torch.randn(5, 3), torch.randn(3, 4, requires_grad=True)


# ---- forms


def test_bare_decorator_keeps_name_doc_and_signature():
    @tracejit.compile
    def train(x, y=1, *, z=2):
        """Trains."""
        return x * y + z

    assert train.__name__ == "train" and train.__doc__ == "Trains."
    assert str(inspect.signature(train)) == "(x, y=1, *, z=2)"
    assert torch.equal(train(torch.ones(3)), torch.full((3,), 3.0))


def test_decorator_with_options_and_plain_call():
    @tracejit.compile(mode="rerun")
    def double(x):
        return x * 2

    assert torch.equal(double(torch.ones(2)), torch.full((2,), 2.0))
    plain = tracejit.compile(lambda x: x + 1, fuse=False)
    assert torch.equal(plain(torch.ones(2)), torch.full((2,), 2.0))


def test_bound_method_and_decorated_method():
    class Model:
        def __init__(self):
            self.w = torch.full((3,), 2.0)

        def forward(self, x):
            return x * self.w

        @tracejit.compile
        def decorated(self, x):
            return x + self.w

    model = Model()
    compiled = tracejit.compile(model.forward)
    for _ in range(3):
        assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))
        assert torch.equal(model.decorated(torch.ones(3)), torch.full((3,), 3.0))
    model.w = torch.full((3,), 5.0)
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 5.0))
    assert compiled.stats.replays == 2 and compiled.explain_mode().startswith("replay")


@pytest.mark.parametrize("bad", [{"mode": "fast"}, {"backend": "cuda"}])
def test_unknown_options_are_rejected(bad):
    with pytest.raises(ValueError, match="is one of"):
        tracejit.compile(lambda: None, **bad)


def test_only_functions_compile():
    with pytest.raises(TypeError, match="takes a"):
        tracejit.compile(3)
    with pytest.raises(TypeError, match="takes a Python function"):
        tracejit.compile(torch.relu)


def test_import_keeps_triton_and_dynamo_out_of_a_numpy_run():
    code = (
        "import sys, torch, tracejit\n"
        "f = tracejit.compile(lambda x: (x * 2).sum())\n"
        "for _ in range(3): f(torch.ones(3))\n"
        "assert f.kernels\n"
        "bad = {'triton', 'torch._dynamo', 'torch._inductor', 'sympy'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))


# ---- counters


def test_the_body_runs_twice_and_never_once_armed():
    numbers = itertools.count()
    x, w = two_parameters()

    def body():
        return (x @ w).sum()

    counted = tracejit.compile(body)
    for _ in range(10):
        counted()
    assert counted.stats.traces == 2
    assert counted.stats.replays == 8
    assert counted.stats.compiles == 1

    @tracejit.compile
    def visible():
        next(numbers)
        return (x @ w).sum()

    for _ in range(5):
        visible()
    assert next(numbers) == 5 and visible.stats.replays == 0  # a side effect keeps it in rerun
    assert "numbers" in visible.explain_mode()


def test_python_body_counter_by_profile():
    x, w = two_parameters()

    def body():
        return (x @ w).sum()

    calls = []

    def profile(frame, event, arg):
        if event == "call" and frame.f_code is body.__code__:
            calls.append(1)

    step = tracejit.compile(body)
    sys.setprofile(profile)
    try:
        for _ in range(20):
            step()
    finally:
        sys.setprofile(None)
    assert len(calls) == 2


def test_new_shape_dtype_or_requires_grad_makes_a_plan_and_the_first_is_found_again():
    @tracejit.compile
    def step(x):
        return (x * 3).sum()

    inputs = [
        torch.ones(4),
        torch.ones(5),
        torch.ones(4, dtype=torch.float64),
        torch.ones(4, requires_grad=True),
        torch.ones(8)[::2],
    ]
    for _ in range(2):
        for x in inputs:
            step(x)
    compiles, traces = step.stats.compiles, step.stats.traces
    assert compiles == 5 and traces == 10
    for x in inputs:
        assert step(x).item() == 3 * x.numel()
    assert (step.stats.compiles, step.stats.traces) == (compiles, traces)


def test_reset_forgets():
    step = tracejit.compile(lambda x: x + 1)
    for _ in range(3):
        step(torch.ones(2))
    step.reset()
    assert step.plans == [] and step.graph is None and step.kernels == []
    assert step.stats.traces == 0
    assert torch.equal(step(torch.ones(2)), torch.full((2,), 2.0))


def test_plans_are_bounded():
    step = tracejit.compile(lambda x: x + 1, backend="numpy")
    for n in range(1, 80):
        step(torch.ones(n))
    assert len(step.plans) <= 64


def test_introspection():
    x, w = two_parameters()

    def step():
        loss = (x @ w).relu().sum()
        loss.backward()
        return loss

    compiled = tracejit.compile(step)
    assert compiled.explain_mode() == "rerun: it has not been called"
    compiled()
    assert "two traces" in compiled.explain_mode()
    assert "matmul" in str(compiled.graph) and "test_compile.py" in str(compiled.graph)
    assert compiled.kernels and all("void kernel" in text for text in compiled.kernels)
    assert set(compiled.stats.seconds) == {"capture", "passes", "schedule", "load"}


# ---- modes


def test_mode_replay_arms_at_the_first_call():
    step = tracejit.compile(lambda x: x * 2, mode="replay")
    step(torch.ones(3))
    step(torch.ones(3))
    assert step.stats.traces == 1 and step.stats.replays == 1


def test_mode_replay_refuses_what_it_cannot_prove():
    seen = itertools.count()

    def step(x):
        return x * next(seen)

    with pytest.raises(ReplayNotArmed, match="seen"):
        tracejit.compile(step, mode="replay")(torch.ones(3))


def test_mode_rerun_always_runs_python():
    step = tracejit.compile(lambda x: x * 2, mode="rerun")
    for _ in range(5):
        step(torch.ones(3))
    assert step.stats.traces == 5 and step.stats.compiles == 1
    assert "was asked for" in step.explain_mode()


# ---- outputs


def test_returned_tensors_are_the_callers_to_keep():
    step = tracejit.compile(lambda x: x * 2)
    kept = [step(torch.full((3,), float(i))) for i in range(6)]
    assert [t[0].item() for t in kept] == [0, 2, 4, 6, 8, 10]


def test_nothing_keeps_arguments_alive():
    step = tracejit.compile(lambda x: x * 2)
    for _ in range(3):
        step(torch.ones(3))
    x = torch.ones(3)
    gone = weakref.ref(x)
    step(x)
    del x
    assert gone() is None


def test_backward_after_the_step_raises_and_loses_nothing():
    x, w = two_parameters()

    def step():
        loss = (x @ w).sum()
        loss.backward()
        return loss

    compiled = tracejit.compile(step)
    for _ in range(4):
        loss = compiled()
        assert loss.requires_grad and not loss.is_leaf
        with pytest.raises(RuntimeError, match="compiled step"):
            loss.backward()


def test_version_counters_move_with_writes():
    w = torch.ones(3)

    @tracejit.compile
    def step():
        w.add_(1.0)

    versions = []
    for _ in range(4):
        step()
        versions.append(w._version)
    assert versions == sorted(set(versions))
    assert torch.equal(w, torch.full((3,), 5.0))


def test_writes_through_data_leave_the_version_as_in_eager():
    w = torch.ones(3)

    @tracejit.compile
    def step():
        w.data.add_(1.0)

    for _ in range(4):
        step()
    assert w._version == 0 and torch.equal(w, torch.full((3,), 5.0))


# ---- bad input


def failing_steps():
    x, w = two_parameters()

    def wrong_shape():
        w.data.mul_(2.0)
        return x @ w.t()

    def value_read():
        w.data.mul_(2.0)
        if w.sum() > -1e9:
            raise KeyError("after a decision")

    def unsupported():
        w.data.mul_(2.0)
        return torch.linalg.eig(x)

    def user_error():
        w.data.mul_(2.0)
        (x @ w).sum().backward()
        raise KeyError("the user's own")

    def leaf_in_place():
        w.data.mul_(2.0)
        w.add_(1)

    return (
        x,
        w,
        {
            wrong_shape: ShapeError,
            value_read: KeyError,
            unsupported: UnsupportedOperation,
            user_error: KeyError,
            leaf_in_place: RuntimeError,
        },
    )


@pytest.mark.parametrize("index", range(5))
def test_a_failing_trace_changes_nothing_and_the_next_call_works(index):
    x, w, cases = failing_steps()
    step, error = list(cases.items())[index]
    before, version = w.detach().clone(), w._version
    with pytest.raises(error) as caught:
        tracejit.compile(step)()
    assert torch.equal(w.detach(), before) and w._version == version and w.grad is None
    if isinstance(caught.value, TracejitError):
        assert "test_compile.py:" in str(caught.value)

    def fine():
        (x @ w).sum().backward()

    compiled = tracejit.compile(fine)
    compiled()
    assert w.grad is not None


def test_wrong_shape_after_arming_raises_and_recovers():
    _, w = two_parameters()
    step = tracejit.compile(lambda x: (x @ w).sum())
    for _ in range(3):
        step(torch.ones(5, 3))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        step(torch.ones(5, 4))
    assert step(torch.ones(5, 3)).item() == pytest.approx((torch.ones(5, 3) @ w).sum().item())


def test_a_failing_compilation_changes_nothing(monkeypatch):
    x, w = two_parameters()

    def step():
        (x @ w).sum().backward()
        with torch.no_grad():
            w.sub_(w.grad)

    driver = sys.modules["tracejit.pipeline"]
    before = w.detach().clone()
    compiled = tracejit.compile(step)
    with monkeypatch.context() as patch:
        patch.setattr(driver, "schedule", lambda *a, **k: 1 / 0)
        patch.setenv("TRACEJIT_CACHE", "/nonexistent/nowhere")
        with pytest.raises(ZeroDivisionError):
            compiled()
    assert torch.equal(w.detach(), before) and w.grad is None
    compiled()
    assert w.grad is not None


def test_grad_mode_left_changed_is_refused_and_restored():
    def step(x):
        torch.set_grad_enabled(False)
        return x * 2

    with pytest.raises(SideEffectError, match="grad mode"):
        tracejit.compile(step)(torch.ones(3))
    assert torch.is_grad_enabled()


def test_without_a_compiler_steps_run_on_numpy_with_one_warning(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    select._on_cpu.cache_clear()
    try:
        with pytest.warns(UserWarning, match="numpy"):
            step = tracejit.compile(lambda x: x * 2)
            assert torch.equal(step(torch.ones(3)), torch.full((3,), 2.0))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step(torch.ones(4))
        with pytest.raises(BackendUnavailable, match="no C compiler"):
            tracejit.compile(lambda x: x * 2, backend="c")(torch.ones(3))
    finally:
        select._on_cpu.cache_clear()


def test_backend_for_the_wrong_device():
    with pytest.raises(BackendUnavailable, match="cpu"):
        tracejit.compile(lambda x: x + 1, backend="triton")(torch.ones(2))


# ---- threads


def test_two_threads_share_a_step():
    w = torch.zeros(100)

    @tracejit.compile
    def step():
        w.add_(1.0)
        return w.sum()

    threads = [threading.Thread(target=lambda: [step() for _ in range(50)]) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert torch.equal(w, torch.full((100,), 100.0))


def test_a_nested_compiled_step_is_inlined():
    inner = tracejit.compile(lambda x: x * 2)
    outer = tracejit.compile(lambda x: inner(x) + 1)
    for _ in range(3):
        assert torch.equal(outer(torch.ones(2)), torch.full((2,), 3.0))
    assert inner.stats.traces == 0


# ---- caches and the ladder


def test_the_disk_cache_serves_a_second_process_and_survives_damage(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACEJIT_CACHE", str(tmp_path / "cache"))

    def fresh():
        return tracejit.compile(lambda x: (x * 2 + 1).sum())

    first = fresh()
    first(torch.ones(10))
    assert first.stats.cache_hits == 0
    second = fresh()
    second(torch.ones(10))
    assert second.stats.cache_hits == 1
    for entry in (tmp_path / "cache").rglob("*"):
        if entry.is_file():
            entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    third = fresh()
    assert third(torch.ones(10)).item() == 30
    assert third.stats.cache_hits == 0


@pytest.mark.parametrize("backend, suffix", [("c", ".c"), ("numpy", ".txt")])
def test_dump_saves_every_stage(tmp_path, monkeypatch, backend, suffix):
    monkeypatch.setenv("TRACEJIT_DUMP", str(tmp_path))

    @tracejit.compile(backend=backend)
    def step(x):
        return (x * 2).sum()

    step(torch.ones(5))
    names = sorted(p.name for p in (tmp_path / "step_1").iterdir())
    assert names[:3] == ["0_captured.txt", "1_final.txt", "2_plan.txt"]
    assert names[3].startswith("3_kernel_0") and names[3].endswith(suffix)
    text = (tmp_path / "step_1" / names[3]).read_text()
    assert text == step.kernels[0] and "reduce_sum" in text


@pytest.mark.parametrize(
    "level, expected",
    [(1, "compiled"), (2, "GB/s"), (3, "reduce_sum"), (4, "TJ_TASK k0_"), (5, "# after")],
)
def test_debugging_ladder(level, expected, monkeypatch, capsys):
    monkeypatch.setenv("TRACEJIT_DEBUG", str(level))

    @tracejit.compile
    def step(x):
        return (x * level + 0.5).sum()

    step(torch.ones(4097))
    assert expected in capsys.readouterr().out


def test_stats_of_an_empty_step():
    step = tracejit.compile(lambda: None)
    for _ in range(4):
        assert step() is None
    empty = tracejit.compile(lambda x: (x * 2, x.sum()))
    for _ in range(4):
        doubled, total = empty(torch.ones(0))
        assert doubled.shape == (0,) and total.item() == 0.0


def test_the_plan_that_ran_last_stands_at_the_end():
    step = tracejit.compile(lambda x: x * 2)
    for n in (10, 10, 20, 20, 10):
        step(torch.ones(n))
        assert step.plans[-1].buffers[0].type.shape == (n,)
    assert step.stats.replays == 1


def test_a_class_whose_module_is_no_name():
    class Schedule:
        __module__ = property(lambda self: "mine")

        def rate(self, n: int) -> float:
            return 0.5 * n

    schedule, x = Schedule(), torch.ones(3)

    def step(x):
        return x * schedule.rate(3)

    compiled = tracejit.compile(step)
    for _ in range(5):
        assert torch.equal(compiled(x), step(x))
    assert compiled.explain_mode().startswith("replay")
