"""Loops (`scan`) in all stages: text, evaluation, plans on every executor, and recurrent layers,
whose programs do not grow with their steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import tracejit
from support.capture_checks import randn, same
from support.fake import warm
from support.plan_checks import ON_NUMPY, make_inputs
from tracejit.errors import InvalidGraph
from tracejit.ir.graph import verify
from tracejit.ir.interp import evaluate
from tracejit.ir.text import parse
from tracejit.passes import optimize
from tracejit.schedule import schedule
from tracejit.schedule.cpu.lower import lower
from tracejit.schedule.cpu.text import parse_cpu_plan
from tracejit.schedule.plan import by_launch, unrolled
from tracejit.schedule.plan_text import parse_plan
from tracejit.schedule.traffic import bytes_moved, operations
from tracejit.testing import assert_trains_like_eager, fake_device


def recurrence(steps: int = 5, reverse: bool = False, dtype: str = "f32") -> str:
    """A layer of tanh whose input and weight are computed, and which another loop reads in place,
    the other way round: row by row, whole, and as its first value."""
    h, n = f"{dtype}[2,4]", steps
    attrs = f"carried=1, sliced=1, steps={steps}"
    return f"""
    step(%0: {h}, %1: {dtype}[{n},2,4], %2: {dtype}[4,4]) {{
      %3: {dtype}[{n},2,4] = mul(%1, 0.5)
      %4: {dtype}[4,4] = permute(%2, axes=(1, 0))
      %5: {dtype}[{16 * n + 8}] = scan(%0, %3, %4, body=body0, {attrs}, reverse={reverse})
      %6: {dtype}[{8 * n}] = slice(%5, starts=(8,), stops=({8 * n + 8},), steps=(1,))
      %7: {dtype}[{n},2,4] = reshape(%6, shape=({n}, 2, 4))
      %8: {dtype}[8] = slice(%5, starts=(8,), stops=(16,), steps=(1,))
      %9: {h} = reshape(%8, shape=(2, 4))
      %10: {dtype}[{8 * n + 8}] = scan(%9, %7, %9, body=body1, {attrs}, reverse={not reverse})
      %11: {dtype}[{n},2,4] = mul(%7, 2.0)
      return %10, %11
      body body0(%0: {h}, %1: {h}, %2: {dtype}[4,4]) {{
        %3: {h} = matmul(%0, %2)
        %4: {h} = add(%3, %1)
        %5: {h} = tanh(%4)
        %6: {h} = mul(%5, 0.25)
        return %5, %6
      }}
      body body1(%0: {h}, %1: {h}, %2: {h}) {{
        %3: {h} = mul(%0, 0.5)
        %4: {h} = add(%3, %1)
        %5: {h} = mul(%4, %2)
        return %5
      }}
    }}"""


# ---- the primitive


@pytest.mark.parametrize("reverse", [False, True])
def test_texts(reverse):
    """Of the graph, of its plan, and of what the C executor runs."""
    graph = parse(recurrence(reverse=reverse))
    verify(graph)
    assert parse(str(graph)) == graph
    plan = schedule(optimize(graph))
    assert parse_plan(str(plan)) == plan and plan.loops == (5, 5)
    cpu = lower(plan, 32)
    assert str(parse_cpu_plan(str(cpu))) == str(cpu) and cpu.loops == (5, 5)


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("steps=5", "steps=4", "4 steps over rows"),
        ("%2: f32[4,4]) {\n        %3", "%2: f32[4,2]) {\n        %3", "takes"),
        ("return %5, %6", "return %6", "has types|is f32|results|infer"),
        ("carried=1", "carried=4", "nothing"),
    ],
)
def test_malformed_loops_are_refused(old, new, what):
    text = recurrence()
    assert old in text
    with pytest.raises(InvalidGraph, match=what):
        verify(parse(text.replace(old, new, 1)))


def test_a_loop_in_a_loop_is_read_and_refused_by_the_scheduler():
    graph = parse("""
    step(%0: f32[2]) {
      %1: f32[8] = scan(%0, body=body0, carried=1, sliced=0, steps=3, reverse=False)
      return %1
      body body0(%0: f32[2]) {
        %1: f32[6] = scan(%0, body=body0, carried=1, sliced=0, steps=2, reverse=False)
        %2: f32[2] = slice(%1, starts=(4,), stops=(6,), steps=(1,))
        return %2
        body body0(%0: f32[2]) {
          %1: f32[2] = mul(%0, 2.0)
          return %1
        }
      }
    }""")
    assert parse(str(graph)) == graph
    ((found,), _) = evaluate(graph, [np.array([1.0, -1.0], np.float32)])
    assert found.tolist() == [1, -1, 4, -4, 16, -16, 64, -64]
    with pytest.raises(InvalidGraph, match="a loop in a loop"):
        schedule(graph)


def test_bodies_are_optimized():
    graph = parse(recurrence().replace("mul(%5, 0.25)", "mul(%5, 1.0)"))
    body = next(n.attr("body") for n in optimize(graph).nodes if n.op.name == "scan")
    assert [n.op.name for n in body.nodes] == ["matmul", "add", "tanh"]


@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16", "f16"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.sweep(3)
def test_plans(dtype, reverse, steps, plans):
    fused, apart = plans.both(recurrence(steps, reverse, dtype))
    assert fused.loops == apart.loops == (steps, steps)


def test_nothing_is_copied_per_step():
    """A step of the layer is one kernel; the second loop reads the first one's result in place."""
    plan = schedule(optimize(parse(recurrence())))
    assert [sum(x.loop == loop for x in plan.launches) for loop in (0, 1)] == [1, 1]
    largest = max(b.type.nbytes for b in plan.buffers if b.kind == "arena")
    assert [b.type.nbytes for b in plan.buffers if b.kind == "arena"].count(largest) == 1


def sums(dtype: str = "f32") -> str:
    """Products of the rows of one operand with all of another, and what is summed of them: as it
    is, turned, and by columns. The second operand is an input that the step overwrites."""
    x, y, rows = f"{dtype}[2,4]", f"{dtype}[4,3]", f"{dtype}[5,2,4]"
    attrs = "carried=0, sliced=1, steps=5, reverse=False, summed=3"
    return f"""
    step(%0: {rows}, %1: {y}) {{
      %2: {dtype}[{5 * 2 * 3 + 6 + 12 + 3}] = scan(%0, %1, body=body0, {attrs})
      %3: {dtype}[12] = slice(%2, starts=(36,), stops=(48,), steps=(1,))
      %4: {y} = reshape(%3, shape=(4, 3))
      %5: {y} = sub(%1, %4)
      return %2
      write %1 <- %5
      body body0(%0: {x}, %1: {y}) {{
        %2: {dtype}[2,3] = matmul(%0, %1)
        %3: {dtype}[2,3] = tanh(%2)
        %4: {dtype}[3,4] = permute(%1, axes=(1, 0))
        %5: {dtype}[4,2] = permute(%0, axes=(1, 0))
        %6: {y} = matmul(%5, %3)
        %7: {dtype}[3] = reduce_sum(%3, axes=(0,))
        return %3, %2, %6, %7
      }}
    }}"""


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_plans_of_sums(dtype, plans):
    """An input is read where it lies, and overwritten when the loop is over."""
    fused, _ = plans.both(sums(dtype))
    assert fused.loops == (5,)
    graph = parse(sums(dtype))
    verify(graph)
    assert parse(str(graph)) == graph and parse_plan(str(fused)) == fused
    moved = [b for b in fused.buffers if b.kind == "arena" and b.type.shape == (4, 3)]
    assert not moved  # nor is a sum computed elsewhere and added then
    ON_NUMPY.check(graph, unrolled(fused))


def test_a_copy_of_a_write_is_no_sum_of_a_loop(plans):
    """Two inputs are written with each other's values, one of which is kept in a value that the
    schedule makes: its number is none that a loop's sums have."""
    fused, _ = plans.both("""
    step(%0: f32[5,2], %1: f32[2], %2: f32[2]) {
      %3: f32[12] = scan(%0, body=body0, carried=0, sliced=1, steps=5, reverse=False, summed=1)
      %4: f32[10] = slice(%3, starts=(0,), stops=(10,), steps=(1,))
      %5: f32[2] = slice(%3, starts=(10,), stops=(12,), steps=(1,))
      %6: f32[2] = neg(%1)
      %7: f32[2] = neg(%2)
      return %4, %5
      write %1 <- %7
      write %2 <- %6
      body body0(%0: f32[2]) {
        %1: f32[2] = exp(%0)
        return %1, %1
      }
    }""")
    assert fused.loops == (5,)


def test_malformed_sums_are_refused():
    with pytest.raises(InvalidGraph, match="wide dtype"):
        verify(parse(sums("bf16")))
    with pytest.raises(InvalidGraph, match="scan of nothing"):
        verify(parse(sums().replace("summed=3", "summed=5")))


@pytest.mark.parametrize("reverse", [False, True])
def test_unrolled_plans_do_the_same(reverse):
    graph = parse(recurrence(reverse=reverse))
    plan = unrolled(schedule(graph))
    assert not plan.loops and not any(b.kind == "row" for b in plan.buffers)
    ON_NUMPY.check(graph, plan)


def test_times_are_taken_of_what_is_computed(plans):
    """`timed` runs the plan, with as many times as it has sources."""
    graph = parse(recurrence())
    inputs = make_inputs(graph)
    (expected, *_), _ = evaluate(graph, inputs)

    class Timed:
        def load(self, plan):
            loaded = plans.executor.load(plan)

            class Run:
                layout = plans.layout(loaded, plan)

                def __call__(self, addresses, scalars):
                    seconds = loaded.timed(addresses, scalars)
                    assert len(seconds) == len(loaded.sources) == len(loaded.bytes_moved())

            return Run()

    (found, *_), _ = replace(plans, executor=Timed()).run(schedule(graph), graph, inputs)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# ---- recurrent layers

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "RNN": lambda: nn.RNN(6, 4, nonlinearity="relu"),
    "LSTM": lambda: nn.LSTM(6, 4, num_layers=2),
    "LSTM, projected": lambda: nn.LSTM(6, 4, proj_size=2, bidirectional=True),
    "GRU": lambda: nn.GRU(6, 4, bidirectional=True, batch_first=True),
}
projections = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")


def training(make: Callable[[], nn.Module], steps: int) -> Callable:
    torch.manual_seed(0)
    model = make()
    x = randn(3, steps, 6) if model.batch_first else randn(steps, 3, 6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def step():
        optimizer.zero_grad()
        loss = model(x)[0].pow(2).mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    step.parameters = list(model.parameters())
    return step


@projections
@pytest.mark.parametrize("name", LAYERS)
def test_programs_do_not_grow(name):
    """Nodes, launches and kernels are the same for 8 steps and for 64."""

    def size(steps: int) -> tuple[int, ...]:
        step = training(LAYERS[name], steps)
        graph = optimize(tracejit.capture(step).graph)
        plan = schedule(graph)
        assert set(plan.loops) == {steps}
        return len(graph.nodes), len(plan.launches), len({x.kernel for x in plan.launches})

    assert size(8) == size(64)


@projections
@pytest.mark.parametrize("name", LAYERS)
def test_layers_train_like_eager(name):
    def make_step():
        step = training(LAYERS[name], 9)
        return step, step.parameters

    assert_trains_like_eager(make_step, calls=4)


def test_only_the_last_state_is_used():
    """And what is not differentiated keeps nothing of its steps."""
    model, x, h = nn.GRU(6, 4), randn(8, 3, 6), randn(1, 3, 4).requires_grad_()

    def step():
        model.zero_grad()
        _, last = model(x, h)
        last.square().sum().backward()
        return last.detach(), *(p.grad for p in model.parameters()), h.grad

    eager = [t.clone() for t in step()]
    h.grad = None
    torch.testing.assert_close([*tracejit.compile(step)()], eager)
    with torch.no_grad():
        graph = optimize(tracejit.capture(lambda: model(x, h)[0]).graph)
    (scan,) = (n for n in graph.nodes if n.op.name == "scan")
    assert len(scan.attr("body").results) == 1


def test_second_derivatives_of_many_steps():
    def step(x, *params):
        out, *_ = torch.lstm(
            x, [torch.zeros(1, 2, 3).double()] * 2, params, True, 1, 0.0, True, False, False
        )
        grads = torch.autograd.grad(out.sum(), [x, *params], create_graph=True)
        sum(g.pow(2).sum() for g in grads).backward()
        return grads[0].detach()

    params = [randn(12, 4), randn(12, 3), randn(12), randn(12)]
    same(step, *(p.double().requires_grad_() for p in (randn(8, 2, 4), *params)))


def test_on_the_fake_device():
    """There loops are launched step by step."""
    step = training(lambda: nn.LSTM(6, 4), 7)
    losses = [float(step()) for _ in range(7)]
    with fake_device(compiled=False):
        again = warm(training(lambda: nn.LSTM(6, 4), 7), calls=6)
        assert again.plans[-1].loops == (7, 7)
        assert float(again()) == pytest.approx(losses[-1], rel=1e-4)


def test_the_ledger_counts_each_step():
    step = tracejit.compile(training(lambda: nn.LSTM(6, 4), 7))
    for _ in range(3):
        step()
    found = step.explain(measure=False)
    plan = step.plans[-1]
    assert found.launched == sum(plan.times(x) for x in plan.launches) > 7 * 4
    assert [x.times for x in found.launches] == [plan.times(x) for x in plan.launches]
    assert f"{found.launched}; " in str(found) and "7 × " in str(found)
    assert by_launch(plan, [1.0] * len(unrolled(plan).launches)) == [
        x.times for x in found.launches
    ]
    assert operations(plan) == operations(unrolled(plan))
    assert sum(bytes_moved(plan)) == sum(bytes_moved(unrolled(plan)))
