"""Programs 1–3 on the interpret backend: the generated Triton itself, grids > 1, masked tails."""

from __future__ import annotations

import pytest
import torch

import tracejit
from examples import fused_chain, two_layer_autograd, two_layer_manual
from tracejit.testing import assert_equal_to_eager

pytestmark = pytest.mark.interpret

SIZES = {"n": 37, "d_in": 70, "h": 45, "d_out": 33}  # several tiles a side, none full


@pytest.mark.parametrize("variant", ["zero_", "none", "data", "grad"])
def test_two_layer_autograd(variant):
    step, _ = two_layer_autograd.make_step(variant, **SIZES)
    compiled = assert_equal_to_eager(step, calls=3, backend="interpret")
    assert len(compiled.kernels) == 4
    assert all("@triton.jit" in text for text in compiled.kernels)


def test_two_layer_manual():
    step, _ = two_layer_manual.make_step(**SIZES)
    assert_equal_to_eager(step, calls=3, backend="interpret")


def test_fused_chain():
    step, _ = fused_chain.make_step(40_001)
    compiled = assert_equal_to_eager(step, calls=3, backend="interpret")
    assert len(compiled.kernels) == 1


def test_without_fusion():
    step, _ = two_layer_autograd.make_step(**SIZES)
    assert_equal_to_eager(step, calls=3, backend="interpret", fuse=False)


def test_kernels_common_to_two_plans_are_loaded_once():
    from tracejit.runtime.triton_executor import COUNTERS

    @tracejit.compile(backend="interpret")
    def step(x, y):
        return ((x * 7 - y).clamp(min=0.125) * 3).sum()

    before = COUNTERS.compiles
    for n in (1000, 2000, 1000, 2000):
        x, y = torch.randn(n), torch.randn(n)
        expected = ((x * 7 - y).clamp(min=0.125) * 3).sum()
        torch.testing.assert_close(step(x, y), expected)
    assert step.stats.compiles == 2
    assert COUNTERS.compiles - before == 1
