"""The structure of first calls: what is compiled once, what is under way early, what a warm start
does not do. Times are benchmarks/run.py's."""

from __future__ import annotations

import gc
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import tracejit
from benchmarks.cases import ALL
from tracejit import programs
from tracejit.capture.bind import unwrap
from tracejit.capture.capture import capture_call
from tracejit.capture.python.memory import MANY
from tracejit.ir.interp import evaluate
from tracejit.ir.text import parse
from tracejit.ir.types import Type
from tracejit.passes import optimize
from tracejit.runtime import c_kernels
from tracejit.runtime.c_executor import CExecutor
from tracejit.runtime.program import Program
from tracejit.schedule import kernel_text, schedule
from tracejit.schedule.cpu import lower as lowering
from tracejit.schedule.cpu.lower import lower
from tracejit.schedule.cpu.plan import CpuPlan
from tracejit.schedule.cpu.text import identity
from tracejit.schedule.plan_text import Launches, communicates, parse_plan, stored_plan, text_of

CHAIN = """step(%0: f32[40,50], %1: f32[50,60], %2: f32[60,70], %3: f32[70,80]) {
  %4: f32[40,60] = matmul(%0, %1)
  %5: f32[40,70] = matmul(%4, %2)
  %6: f32[40,80] = matmul(%5, %3)
  return %4, %5, %6
}"""


def lowered(step) -> CpuPlan:
    """What the C executor runs for a step."""
    function, bound_to = unwrap(step)
    graph = capture_call(function, bound_to, {}).captured.graph
    return lower(schedule(optimize(graph)), 32)


def compiled(plan: CpuPlan) -> set[str]:
    """What is compiled: kernels that differ in variables' numbers and users' lines are one."""
    return {identity(kernel) for kernel in plan.kernels.values()}


def of_layers(count: int) -> CpuPlan:
    """A step of so many equal convolutions with batch norm, between two others."""
    torch.manual_seed(0)
    inner = [
        layer
        for _ in range(count)
        for layer in (
            torch.nn.Conv2d(32, 32, 3, padding=1, bias=False),
            torch.nn.BatchNorm2d(32),
            torch.nn.ReLU(),
        )
    ]
    ends = torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.Conv2d(32, 2, 1)
    model = torch.nn.Sequential(ends[0], *inner, ends[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(4, 3, 16, 16)

    def step():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return lowered(step)


def test_equal_layers_share_kernels():
    few, many = of_layers(4), of_layers(7)
    assert len(many.calls) > len(few.calls)
    assert len(compiled(many)) == len(compiled(few))


def test_kernels_of_resnet():
    """20 convolutions with three products each, their batch norms and updates; ten kernels make
    activations again for the gradients of weights (76 without them)."""
    step, _ = ALL["resnet"].made("cpu", "tracejit", small=False)
    plan = lowered(step)
    assert len(plan.calls) >= 125
    assert len(compiled(plan)) <= 86


def test_units_are_compiled_while_later_kernels_are_lowered(monkeypatch, tmp_path):
    monkeypatch.setenv("TRACEJIT_CACHE", str(tmp_path))
    monkeypatch.setattr(c_kernels, "EARLY", (1, 1))
    said: list[str] = []
    lower_kernel, start = lowering.lower_kernel, c_kernels.Kernels._start

    def lowers(*given):
        said.append("lowered")
        return lower_kernel(*given)

    def starts(*given):
        said.append("started")
        start(*given)

    monkeypatch.setattr(lowering, "lower_kernel", lowers)
    monkeypatch.setattr(c_kernels.Kernels, "_start", starts)
    plan = schedule(parse(CHAIN), fuse=False)
    CExecutor(1).load(plan)
    assert said == ["lowered", "started"] * 3


def test_a_small_plan_is_not_cut_for_that(monkeypatch, tmp_path):
    monkeypatch.setenv("TRACEJIT_CACHE", str(tmp_path))
    sources: list[str] = []
    load = c_kernels.load_library
    monkeypatch.setattr(
        c_kernels, "load_library", lambda source: sources.append(source) or load(source)
    )
    graph = parse(
        "step(%0: f32[5]) {\n%1: f32[5] = exp(%0)\n%2: f32[5] = sin(%1)\nreturn %2, %1\n}"
    )
    CExecutor(1).load(schedule(graph, fuse=False))
    assert len(sources) == 1


def test_a_failing_compiler_is_told_of_and_nothing_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("TRACEJIT_CACHE", str(tmp_path))
    monkeypatch.setattr(c_kernels, "EARLY", (1, 1))
    compiled, calls = c_kernels.compiled_object, []

    def second_fails(source):
        calls.append(source)
        if len(calls) == 2:
            raise RuntimeError("no room")
        return compiled(source)

    monkeypatch.setattr(c_kernels, "compiled_object", second_fails)
    plan = schedule(parse(CHAIN), fuse=False)
    with pytest.raises(RuntimeError, match="no room"):
        CExecutor(1).load(plan)
    CExecutor(1).load(plan)


FACTORS = """step(%0: f32[5,5], %1: f32[3,3]) {
  %2: f32[50] = qr(%0, complete=False)
  %3: f32[18] = qr(%1, complete=False)
  return %2, %3
}"""


@pytest.mark.parametrize(("text", "shared"), [(CHAIN, "tj_micro"), (FACTORS, "tj_lapack")])
def test_units_that_become_one_library_share_what_they_call(monkeypatch, tmp_path, text, shared):
    """Products their micro-kernels, factorizations the table of LAPACK's routines."""
    CExecutor(1).load(schedule(parse("step(%0: f32[5]) {\nreturn %0\n}")))  # the pool
    monkeypatch.setenv("TRACEJIT_CACHE", str(tmp_path))
    monkeypatch.setattr(c_kernels, "EARLY", (1, 1))
    sources: list[str] = []
    compiled = c_kernels.compiled_object
    monkeypatch.setattr(
        c_kernels, "compiled_object", lambda source: sources.append(source) or compiled(source)
    )
    graph = parse(text)
    plan = schedule(graph, fuse=False)
    inputs = [numbers(p.value.type) for p in graph.params]
    for _ in range(2):
        found = Program(plan, CExecutor(1)).function()([torch.from_numpy(x) for x in inputs])
        for ours, right in zip(found, evaluate(graph, inputs)[0], strict=True):
            np.testing.assert_allclose(ours.numpy(), right, rtol=1e-4, atol=1e-4)
        assert len(sources) == len(plan.launches)
        assert len(list((tmp_path / "c").iterdir())) == 1
    heads = [x for source in sources for x in re.findall(r"^TJ_FUSED (.*) {$", source, re.M)]
    assert len(set(heads)) == len(heads) and sum(shared in source for source in sources) > 1


def numbers(kind: Type) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(kind.shape).astype(np.float32)


# --- from disk


def test_a_stored_plan_is_the_plan():
    plan = schedule(parse(CHAIN))
    stored = stored_plan(str(plan))
    assert isinstance(stored.launches, Launches) and "_read" not in vars(stored.launches)
    assert len(stored.launches) == len(plan.launches) and not communicates(stored)
    assert text_of(stored) == str(plan) and "_read" not in vars(stored.launches)
    assert str(stored) == str(plan) and stored.launches == plan.launches
    assert hash(stored.launches) == hash(plan.launches)
    assert plan == parse_plan(str(plan)) == replace(stored, launches=tuple(stored.launches))


def test_the_text_of_a_stored_plan_that_was_changed():
    plan = schedule(parse(CHAIN))
    changed = replace(stored_plan(str(plan)), arena_bytes=4096)
    assert text_of(changed) == str(replace(plan, arena_bytes=4096))


def test_a_plan_without_launches():
    plan = schedule(parse("step(%0: f32[5]) {\nreturn %0\n}"))
    stored = stored_plan(str(plan))
    assert str(stored) == str(plan) and len(stored.launches) == len(plan.launches)


def test_a_warm_start_reads_no_kernel(monkeypatch, tmp_path):
    monkeypatch.setenv("TRACEJIT_CACHE", str(tmp_path))

    def calls() -> list[torch.Tensor]:
        torch.manual_seed(0)
        w = torch.randn(7, 5, requires_grad=True)

        @tracejit.compile(on_unsupported="raise")
        def step(x):
            loss = torch.tanh(x @ w).square().sum()
            loss.backward()
            with torch.no_grad():
                w.sub_(0.1 * w.grad)
            w.grad = None
            return loss

        return [step(torch.ones(3, 7)) for _ in range(3)]

    cold = calls()
    monkeypatch.setattr(kernel_text, "_Parser", None)
    assert all(map(torch.equal, calls(), cold))


# --- beside it


def test_no_collection_while_a_program_is_built(monkeypatch, tmp_path):
    """One of all objects takes some 0.4 s where torch is loaded."""
    monkeypatch.setenv("TRACEJIT_CACHE", str(tmp_path))
    enabled: list[bool] = []
    for module, name in ((lowering, "lower_kernel"), (c_kernels, "_cost")):
        function = getattr(module, name)

        def noted(*given, function=function):
            enabled.append(gc.isenabled())
            return function(*given)

        monkeypatch.setattr(module, name, noted)
    step = tracejit.compile(lambda x: (x @ x).exp(), on_unsupported="raise")
    step(torch.ones(3, 3))
    assert enabled and not any(enabled) and gc.isenabled()


@pytest.mark.parametrize(("count", "begun"), [(MANY - 1, 0), (MANY, 1)])
def test_words_are_loaded_beside_the_build_of_a_step_of_many_tensors(monkeypatch, count, begun):
    """Their guard needs a C program of its own, which is not waited for at the end."""
    said: list[str] = []
    monkeypatch.setattr(programs, "load_early", lambda: said.append("early"))
    tensors = [torch.ones(3) for _ in range(count)]

    def step():
        return sum(tensors)

    tracejit.compile(step, on_unsupported="raise")()
    assert len(said) == begun
