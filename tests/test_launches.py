"""Packing: how many launches a step takes, what may share one, and that it computes the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import tracejit
from examples import classifier, modules, transformer_block, two_layer_autograd
from support.graph_texts import SIDE_BY_SIDE
from support.plan_checks import both, check
from tracejit.ir.text import parse
from tracejit.schedule import bytes_moved, schedule
from tracejit.schedule.kernel_text import parse_kernel
from tracejit.schedule.plan import Launch, Plan
from tracejit.schedule.plan_text import parse_plan

torch.manual_seed(0)


def forward_and_backward(function: Callable, *shape: int, parameters: int = 0) -> Callable:
    """A step: a function of one tensor (and vectors of its last dimension) and its gradients."""
    x = torch.randn(*shape, requires_grad=True)
    leaves = [x, *(torch.randn(shape[-1], requires_grad=True) for _ in range(parameters))]
    g = torch.randn(function(*leaves).shape)

    def step() -> torch.Tensor:
        for leaf in leaves:
            leaf.grad = None
        y = function(*leaves)
        y.backward(g)
        return y.detach()

    return step


def layer_norm(x: torch.Tensor, *affine: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], *affine)


def cross_entropy(x: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(x, torch.arange(x.shape[0]))


softmax = partial(torch.softmax, dim=-1)

# The limits are those that users are promised; the counts are those that are.
STEPS = {
    "softmax": (lambda: forward_and_backward(softmax, 64, 1000), 1, 2),
    "softmax of one row": (lambda: forward_and_backward(softmax, 1000), 1, 2),
    "layer norm": (lambda: forward_and_backward(layer_norm, 64, 1000, parameters=2), 2, 3),
    "cross-entropy": (lambda: forward_and_backward(cross_entropy, 64, 1000), 3, 3),
    "gelu": (lambda: forward_and_backward(F.gelu, 64, 1000), 1, 1),
    "program 2": (lambda: two_layer_autograd.make_step("zero_")[0], 4, 6),
    "program 5": (lambda: modules.make_step("sgd")[0], 4, 6),
    "program 7": (lambda: classifier.make_step()[0], 7, 10),
    "program 9": (lambda: transformer_block.make_step()[0], 19, 40),
}


def plan_of(step: Callable) -> Plan:
    compiled = tracejit.compile(step)
    for _ in range(2):
        compiled()
    return compiled.plans[-1]


@pytest.mark.parametrize("name", STEPS)
def test_launches(name):
    make, count, limit = STEPS[name]
    assert len(plan_of(make()).launches) == count <= limit


def kernels(plan: Plan) -> list[Launch]:
    return [alone for launch in plan.launches for alone in launch.alone()]


def test_cross_entropy_and_its_gradient_are_one_pass_over_the_logits():
    plan = plan_of(STEPS["cross-entropy"][0]())
    assert max(bytes_moved(plan)) <= 2 * 4 * 64 * 1000 + 64 * (8 + 4) + 8


def test_a_bias_gradient_runs_beside_the_matmul_of_its_weights():
    last = plan_of(modules.make_step("sgd")[0]).launches[-1]
    first, second, bias = (one.kernel for one in last.alone())
    assert first.stages[0].dot and second.stages[0].dot  # both weights' gradients
    assert bias.axes and not bias.stages[0].dot


def test_kernels_of_every_form_share_a_launch():
    plan, unfused = both(SIDE_BY_SIDE)
    assert len(plan.launches) == 1 and len(kernels(plan)) == 6
    assert not any(launch.kernel.parts for launch in unfused.launches)
    assert parse_plan(str(plan)) == plan
    kernel = plan.launches[0].kernel
    assert parse_kernel(str(kernel)) == kernel


def chain(rows: int, columns: int, k: int) -> str:
    """A weight's gradient and a bias's, over the same operand."""
    return f"""
    step(%0: f32[{k},{rows}], %1: f32[{k},{columns}]) {{
      %2: f32[{rows},{k}] = permute(%0, axes=(1, 0))
      %3: f32[{rows},{columns}] = matmul(%2, %1)
      %4: f32[{columns}] = reduce_sum(%1, axes=(0,))
      return %3, %4
    }}"""


@pytest.mark.parametrize(
    ("shape", "launches"),
    [((64, 64, 64), 1), ((2048, 2048, 64), 1), ((64, 4096, 8192), 2)],
    ids=["small", "large matmul", "large operand"],
)
def test_a_large_stream_stays_alone(shape, launches):
    assert len(schedule(parse(chain(*shape))).launches) == launches


def test_two_large_matmuls_stay_apart():
    assert len(schedule(parse(pair(2048))).launches) == 2
    assert len(schedule(parse(pair(512))).launches) == 1


def pair(n: int) -> str:
    kind = f"f32[{n},{n}]"
    return f"""
    step(%0: {kind}, %1: {kind}) {{
      %2: {kind} = matmul(%0, %1)
      %3: {kind} = matmul(%1, %0)
      return %2, %3
    }}"""


def test_what_overwrites_waits_for_what_reads():
    plan, _ = both("""
    step(%0: f32[6,6], %1: f32[6,6], %2: f32[6]) {
      %3: f32[6,6] = matmul(%0, %1)
      %4: f32[6] = reduce_sum(%0, axes=(0,))
      %5: f32[6] = add(%4, %2)
      %6: f32[6,6] = matmul(%1, %1)
      return %3, %5
      write %0 <- %6
    }""")
    assert len(plan.launches) == 2
    target = next(b.name for b in plan.buffers if b.kind == "input" and b.index == 0)
    assert target in plan.launches[1].buffers and len(plan.launches[1].alone()) == 1


def test_arena_buffers_of_one_launch_do_not_overlap():
    text = """
    step(%0: f32[40,40], %1: f32[40,40]) {
      %2: f32[40,40] = matmul(%0, %1)
      %3: f32[40,40] = matmul(%2, %1)
      %4: f32[40,40] = matmul(%2, %0)
      %5: f32[40,40] = matmul(%3, %4)
      return %5
    }"""
    plan, _ = both(text)
    assert [len(launch.alone()) for launch in plan.launches] == [1, 2, 1]
    for launch in plan.launches:
        arena = [b for b in plan.buffers if b.kind == "arena" and b.name in launch.buffers]
        spans = sorted((b.offset, b.offset + b.type.nbytes) for b in arena)
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))


def test_a_total_does_not_wait_for_what_it_does_not_need():
    """The count is ready in the first launch, though it is divided by much later."""
    plan, _ = both("""
    step(%0: f32[64,64], %1: f32[64], %2: f32[9000]) {
      %3: f32[64,64] = matmul(%0, %0)
      %4: f32[] = reduce_sum(%3, axes=(0, 1))
      %5: f32[] = reduce_sum(%2, axes=(0,))
      %6: f32[] = div(%4, %5)
      %7: f32[1] = reshape(%5, shape=(1,))
      %8: f32[64] = expand(%7, shape=(64,))
      %9: f32[64] = mul(%1, %8)
      return %6, %9
    }""")
    assert len(plan.launches) == 2


@pytest.mark.parametrize("n", [7, 4096, 4097])
def test_a_short_vector_is_normalised_in_one_program(n):
    text = f"""
    step(%0: f32[{n}], %1: f32[{n}]) {{
      %2: f32[{n}] = mul(%0, %0)
      %3: f32[] = reduce_sum(%2, axes=(0,))
      %4: f32[1] = reshape(%3, shape=(1,))
      %5: f32[{n}] = expand(%4, shape=({n},))
      %6: f32[{n}] = div(%0, %5)
      return %6, %3
      write %1 <- %6
    }}"""
    graph = parse(text)
    plan = schedule(graph)
    check(graph, plan)
    assert len(plan.launches) == (1 if n <= 4096 else 2)


def test_what_is_gone_over_twice_is_no_epilogue():
    plan, _ = both("""
    step(%0: f32[20,24], %1: f32[20,30], %2: f32[30,24]) {
      %3: f32[] = reduce_sum(%0, axes=(0, 1))
      %4: f32[1,1] = reshape(%3, shape=(1, 1))
      %5: f32[20,24] = expand(%4, shape=(20, 24))
      %6: f32[20,24] = sub(%0, %5)
      %7: f32[20,24] = tanh(%6)
      %8: f32[20,24] = exp(%7)
      %9: f32[20,24] = tanh(%8)
      %10: f32[20,24] = matmul(%1, %2)
      %11: f32[20,24] = add(%10, %9)
      return %11
    }""")
    assert len(plan.launches) == 2
