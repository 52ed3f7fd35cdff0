"""The primitives of attention from the schedule to the kernels: all results, on each executor."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from support.attention_graphs import CASES, Case
from support.plan_checks import TOLERANCE, PlanChecks, make_inputs
from tracejit.codegen.triton import emit
from tracejit.codegen.work import work
from tracejit.ir.graph import Builder, Graph, Result, verify
from tracejit.ir.ops.attention import GRADIENTS, row_products
from tracejit.ir.torch_types import TO_TORCH
from tracejit.ir.types import Type, bf16, f32
from tracejit.report import report
from tracejit.rows import limits
from tracejit.runtime.c_executor import CExecutor
from tracejit.schedule import schedule
from tracejit.schedule.cpu.attention import Attention
from tracejit.schedule.cpu.lower import lower
from tracejit.schedule.cpu.text import identity, parse_cpu_kernel, parse_cpu_plan
from tracejit.schedule.kernel_text import canonical, parse_kernel
from tracejit.schedule.plan_text import parse_plan
from tracejit.schedule.traffic import products

LARGE = {
    "bf16": Case((8, 8, 512, 512, 64, 64), bf16, causal=True),
    "bf16, wide, masked": Case((2, 8, 512, 512, 128, 128), bf16, bias="bool"),
    "f32": Case((8, 8, 512, 512, 64, 64), f32, causal=True),
    "f32, masked": Case((8, 8, 512, 512, 64, 64), f32, bias="bool"),
    "bf16, dropout": Case((8, 8, 512, 512, 64, 64), bf16, causal=True, noise="mask"),
    "bf16, wide, dropout of a key": Case((2, 8, 512, 512, 128, 128), bf16, noise="key"),
    "bf16, masked, dropout of a key": Case(
        (8, 8, 512, 512, 64, 64), bf16, causal=True, bias="float", noise="key"
    ),
    "widest, dropout of a key": Case((2, 8, 512, 512, 256, 256), bf16, noise="key"),
    "f32, dropout": Case((8, 8, 512, 512, 64, 64), f32, causal=True, noise="mask"),
    "f32, dropout of a key": Case((8, 8, 512, 512, 64, 64), f32, bias="bool", noise="key"),
}


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.sweep(2)
def test_plans_compute_what_the_primitives_do(name, fuse, plans):
    graph = CASES[name].graph()
    verify(graph)
    plans.check(graph, schedule(graph, fuse=fuse))


@pytest.mark.interpret
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.sweep(3)
def test_interpreted(name, fuse):
    from support.interpret_checks import check

    case = CASES[name]
    check(case.graph(), fuse=fuse, tolerance=TOLERANCE[case.dtype.name])


# ---- the schedule


def test_results_of_the_same_operands_are_one_kernel():
    plan = schedule(CASES["plain"].graph())
    found = [[op.name for op, _ in _attends(launch)] for launch in plan.launches]
    assert found == [
        ["attention", "attention_lse"],
        [],  # delta
        ["attention_dq", "attention_dk", "attention_dv"],
    ]


@pytest.mark.parametrize("fuse", [True, False])
def test_the_same_weights_of_two_values(fuse, plans):
    """The log-sums belong to both, each result to its own values."""
    b = Builder()
    q, k, v, other, g = (b.param(Type(f32, (2, n, 4))) for n in (5, 7, 7, 7, 5))
    how = {"causal": False, "scale": 0.5}
    lse = b.attention_lse(q, k, 0.0, **how)
    found = [lse]
    for values in (v, other):
        found.append(out := b.attention(q, k, values, 0.0, **how))
        given = q, k, values, 0.0, lse, row_products(b, g, out), g
        found += (getattr(b, name)(*given, **how) for name in GRADIENTS)
    graph = b.graph("step", tuple(map(Result, found)))
    verify(graph)
    plans.check(graph, schedule(graph, fuse=fuse))


def _attends(launch) -> tuple:
    attend = launch.kernel.stages[0].attend
    return () if attend is None else attend.results


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sweep(0.34)
def test_texts_parse_back(name):
    plan = schedule(CASES[name].graph())
    assert str(parse_plan(str(plan))) == str(plan)
    for launch in plan.launches:
        kernel = canonical(launch.kernel)
        assert parse_kernel(str(kernel)) == kernel == canonical(parse_kernel(str(launch.kernel)))
    on_cpu = lower(plan, 32)
    assert str(parse_cpu_plan(str(on_cpu))) == str(on_cpu)
    for kernel in on_cpu.kernels.values():
        assert identity(parse_cpu_kernel(str(kernel))) == identity(kernel)


def test_operands_are_read_where_they_lie():
    """A projection of q, k and v at once, of heads side by side, is its kernel's only input."""
    (first, *_) = schedule(CASES["one projection"].graph()).launches
    sides = first.kernel.stages[0].attend.sides
    assert {s.buffer for side in sides for s in side.body} == {"b0"}


def test_no_memory_of_the_size_of_scores():
    case = LARGE["f32"]
    batch, heads, m, n, *_ = case.sizes
    plan = schedule(case.graph())
    assert all(b.type.nbytes < batch * heads * m * n for b in plan.buffers)
    assert plan.arena_bytes <= 4 * batch * heads * m  # delta
    on_cpu = lower(plan, 32)
    assert on_cpu.arena_bytes < batch * heads * m * n  # a quarter of the scores


def test_blocks_are_dealt_to_threads():
    for kernel in lower(schedule(LARGE["f32"].graph()), 32).kernels.values():
        if kernel.blocks is not None:
            whole = Attention(kernel.kernel, kernel.blocks)
            assert 1 < kernel.blocks.chunks <= whole.units
            assert whole.scratch_bytes == kernel.blocks.chunks * whole.per_chunk * 4


@pytest.mark.parametrize("dtype", [f32, bf16])
def test_results_do_not_depend_on_threads(dtype):
    graph = Case((2, 3, 200, 200, 64, 64), dtype, causal=True).graph()
    plan, inputs = schedule(graph), make_inputs(graph)
    assert any(k.blocks and k.blocks.chunks > 1 for k in lower(plan, 32).kernels.values())
    one, four = (PlanChecks(CExecutor(n)).run(plan, graph, inputs)[0] for n in (1, 4))
    for x, y in zip(one, four, strict=True):
        np.testing.assert_array_equal(x, y)


def test_products_are_counted():
    graph, (batch, heads, m, n, c, d) = CASES["plain"].graph(), CASES["plain"].sizes
    pair = 2 * batch * heads * m * n
    assert products(schedule(graph))["f32"] == pair * (c + d) + pair * (3 * c + 2 * d)


def test_hidden_blocks_are_left_out():
    """Of a causal case the programs do half the work, but for the blocks on the diagonal."""

    def done(graph: Graph) -> int:
        launches = schedule(graph).launches
        sources = [(emit(one.kernel, one.sizes), one.sizes) for one in launches]
        found = [work(s, sizes, s.geometry(sizes)) for s, sizes in sources]
        return sum(one.products for works in found for one in works)

    sizes = (1, 2, 512, 512, 64, 64)
    assert done(Case(sizes, bf16, causal=True).graph()) < 0.66 * done(Case(sizes, bf16).graph())


# ---- machine code


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles")
@pytest.mark.parametrize("target", [80, 90, 100])
@pytest.mark.parametrize("name", LARGE)
def test_kernels_keep_the_limits(name, target):
    pytest.importorskip("triton")
    plan = schedule(LARGE[name].graph())
    found = report(plan, target=target)
    assert not limits(found)
    rows = [row for row in found.rows if row.form == "attention"]
    assert len(rows) == 2 and not sum(row.facts.spills for row in rows)
    if name.startswith("bf16"):
        tensor = {80: "mma", 90: "wgmma", 100: "wgmma"}[target]
        assert all(getattr(row.facts, tensor) for row in rows)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.sweep(0.34)
def test_on_a_gpu(name):
    """The same results as on the CPU."""
    from tracejit.testing import assert_equal_to_eager

    case = CASES[name]
    batch, heads, m, n, c, d = case.sizes

    def step(q, k, v):
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=case.causal)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), (q, k, v))]

    def arguments():
        shapes = (m, c), (n, c), (n, d)
        like = {"device": "cuda", "dtype": TO_TORCH[case.dtype], "requires_grad": True}
        return [torch.randn(batch, heads, *s, **like) for s in shapes]

    assert_equal_to_eager(step, make_args=arguments)
