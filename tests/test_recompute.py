"""Values that kernels compute again instead of storing them for each other."""

from __future__ import annotations

import pytest
import torch

import tracejit
from support.graph_texts import normalized, weight_gradients
from support.plan_checks import both, check
from support.random_graphs import RandomProgram
from tracejit.ir.graph import Graph
from tracejit.ir.text import parse
from tracejit.schedule import bytes_moved, recompute, schedule


def arena(text: str) -> int:
    return schedule(parse(text)).arena_bytes


@pytest.mark.parametrize(("rows", "columns"), [(300, 200), (257, 129)])
def test_column_sums_of_a_row_kernels_product_read_the_rows_again(rows, columns):
    text = weight_gradients(rows, columns)
    plan, apart = both(text)
    assert plan.arena_bytes <= 4096 < apart.arena_bytes  # a number per row
    kernels = [one for launch in plan.launches for one in launch.alone()]
    assert len(kernels) == 2  # both columns' sums in one, as they read the same
    inputs = 2 * rows * columns * 4
    assert sum(bytes_moved(plan)) < 2 * inputs + 16 * (rows + columns)


def test_nothing_is_computed_again_if_it_is_not_wanted():
    """remat="none" stores the product of the rows, and does the same."""
    graph = parse(weight_gradients(300, 200))
    auto, none = schedule(graph), schedule(graph, again=False)
    assert none.arena_bytes >= 300 * 200 * 4 > auto.arena_bytes
    check(graph, none)


def test_the_option_of_a_step():
    torch.manual_seed(0)
    norm, x, y = torch.nn.LayerNorm(200), torch.randn(300, 200), torch.randn(300, 200)

    def step():
        norm.zero_grad()
        loss = (norm(x) * y).sum()
        loss.backward()
        return loss.detach(), norm.weight.grad, norm.bias.grad

    eager = [t.clone() for t in step()]
    peaks = []
    for remat in ("auto", "none"):
        compiled = tracejit.compile(step, remat=remat)
        for _ in range(4):
            found = compiled()
        torch.testing.assert_close([*found], eager, rtol=1e-4, atol=1e-4)
        peaks.append(compiled.explain(measure=False).memory.peak)
    assert peaks[0] < peaks[1]
    with pytest.raises(ValueError, match="remat is one of"):
        tracejit.compile(step, remat="all")


def test_what_is_small_is_stored():
    rows, columns = 64, 100
    assert arena(weight_gradients(rows, columns)) == rows * columns * 4


def test_what_costs_as_many_bytes_is_stored():
    """Two large operands read once more are no better than a store and a load."""
    kind = "f32[300,200]"
    text = f"""
    step(%0: {kind}, %1: {kind}) {{
      %2: {kind} = mul(%0, %1)
      %3: f32[300] = reduce_sum(%2, axes=(1,))
      %4: f32[200] = reduce_sum(%2, axes=(0,))
      return %3, %4
    }}"""
    both(text)
    assert arena(text) == 300 * 200 * 4


def test_what_is_slow_is_stored():
    """Three exponentials for each element."""
    kind = "f32[300,200]"
    text = normalized(
        300,
        200,
        f"""
      %14: {kind} = exp(%9)
      %15: {kind} = exp(%14)
      %10: {kind} = exp(%15)
      %11: f32[300] = reduce_sum(%10, axes=(1,))
      %12: f32[200] = reduce_sum(%10, axes=(0,))
      return %11, %12""",
    )
    assert arena(text) >= 300 * 200 * 4


def test_a_result_is_read_where_it_lies():
    text = normalized(
        300,
        200,
        """
      %11: f32[300] = reduce_sum(%9, axes=(1,))
      %12: f32[200] = reduce_sum(%9, axes=(0,))
      return %9, %11, %12""",
    )
    plan, _ = both(text)
    assert plan.arena_bytes == 0
    loads = [b.access for b in plan.launches[-1].kernel.buffers]
    assert loads == ["r", "w"]


def test_an_input_is_overwritten_after_it_was_read_again():
    """The row kernel could write %0 itself, if the columns' sums did not need the old value."""
    kind = "f32[300,200]"
    text = normalized(
        300,
        200,
        f"""
      %10: {kind} = mul(%2, %9)
      %11: f32[300] = reduce_sum(%10, axes=(1,))
      %12: f32[200] = reduce_sum(%10, axes=(0,))
      %13: {kind} = mul(%0, 2.0)
      return %11, %12
      write %0 <- %13""",
    )
    plan, _ = both(text)
    readers = [i for i, launch in enumerate(plan.launches) if "t0" in launch.buffers]
    last = plan.launches[readers[-1]]
    written = [
        b.access for b, m in zip(last.kernel.buffers, last.buffers, strict=True) if m == "t0"
    ]
    assert "rw" in written


@pytest.mark.slow
def test_random_programs_with_everything_recomputed(monkeypatch):
    """Even where it does not pay, what is computed is the same."""
    applied = []
    apply = recompute._apply

    def counted(candidate, groups):
        applied.append(candidate)
        return apply(candidate, groups)

    monkeypatch.setattr(recompute, "_apply", counted)
    monkeypatch.setattr(recompute, "_chosen", lambda found, *_: found)
    for seed in range(1000):
        graph: Graph = RandomProgram(seed).graph()
        try:
            check(graph, schedule(graph), seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}:\n{graph}") from error
    assert len(applied) > 5  # the test is about something
