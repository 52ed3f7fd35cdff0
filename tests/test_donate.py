"""Arena memory that one value hands on to the next within a kernel."""

from __future__ import annotations

import pytest

from support.plan_checks import both
from tracejit.schedule.kernel import Store
from tracejit.schedule.plan import Plan

ONE = 64 * 80 * 4  # bytes of an activation


def gradient(cotangent: str, factor: str = "neg(%4)") -> str:
    """An activation %4 that a product reads, and after it another one's epilogue."""
    return f"""
    step(%0: f32[64,100], %1: f32[100,80], %2: f32[80,60], %3: f32[64,60]) {{
      %4: f32[64,80] = matmul(%0, %1)
      %5: f32[64,60] = matmul(%4, %2)
      %7: f32[60,80] = permute(%2, axes=(1, 0))
      %8: f32[64,80] = matmul({cotangent}, %7)
      %20: f32[64,80] = {factor}
      %9: f32[64,80] = mul(%8, %20)
      %10: f32[80,100] = permute(%1, axes=(1, 0))
      %11: f32[64,100] = matmul(%9, %10)
      return %5, %11
    }}"""


def in_place(plan: Plan) -> int:
    """How many kernels write over arena memory that they read."""
    arena = {b.name for b in plan.buffers if b.kind == "arena"}
    return sum(
        buffer.access == "rw" and memory in arena
        for launch in plan.launches
        for buffer, memory in zip(launch.kernel.buffers, launch.buffers, strict=True)
    )


def test_a_gradient_takes_the_place_of_its_activation():
    plan, _ = both(gradient("%5"))
    assert in_place(plan) == 1 and plan.arena_bytes == ONE


def test_an_activation_that_another_kernel_may_still_read_stays():
    """The first product need not run before the second."""
    plan, _ = both(gradient("%3"))
    assert in_place(plan) == 0 and plan.arena_bytes == 2 * ONE


@pytest.mark.parametrize(
    "elsewhere",
    [
        "slice(%21, starts=(0, 0), stops=(64, 80), steps=(1, 1))",
        "slice(%21, starts=(0, 1), stops=(64, 81), steps=(1, 1))",
    ],
)
def test_an_activation_read_at_other_elements_stays(elsewhere):
    """Where a pad's mask, or a shift, decides what is read."""
    pad = "%21: f32[64,82] = pad(%4, low=(0, 0), high=(0, 2), interior=(0, 0), value=0)"
    text = gradient("%5", elsewhere)
    text = text.replace("%20: f32[64,80] =", f"{pad}\n      %20: f32[64,80] =")
    plan, _ = both(text)
    shifted = "(0, 1)" in elsewhere
    assert in_place(plan) == (not shifted)


def test_rows_are_written_after_their_last_reader():
    """The softmax of a product, in its place; all stages read it."""
    plan, _ = both("""
    step(%0: f32[64,100], %1: f32[100,80], %2: f32[80,60]) {
      %4: f32[64,80] = matmul(%0, %1)
      %5: f32[64] = reduce_max(%4, axes=(1,))
      %6: f32[64,1] = reshape(%5, shape=(64, 1))
      %7: f32[64,80] = expand(%6, shape=(64, 80))
      %8: f32[64,80] = sub(%4, %7)
      %9: f32[64,80] = exp(%8)
      %10: f32[64] = reduce_sum(%9, axes=(1,))
      %11: f32[64,1] = reshape(%10, shape=(64, 1))
      %12: f32[64,80] = expand(%11, shape=(64, 80))
      %13: f32[64,80] = div(%9, %12)
      %14: f32[64,60] = matmul(%13, %2)
      return %14
    }""")
    assert in_place(plan) == 1 and plan.arena_bytes == ONE
    stages = plan.launches[1].kernel.stages
    assert [any(isinstance(s, Store) for s in stage.body) for stage in stages] == [0, 0, 1]
