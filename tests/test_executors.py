"""The executors of the CPU against the evaluator: plans over raw memory."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tracejit.ir.text import parse
from tracejit.schedule import schedule

SHAPES = [(), (1,), (5,), (123,), (0,), (3, 0), (5, 1, 7), (1, 1), (4, 123)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16", "f16"])
@pytest.mark.sweep(2)
def test_pointwise_and_full_reduction(shape, dtype, plans):
    kind = f"{dtype}[{','.join(map(str, shape))}]"
    flat = f"{dtype}[{math.prod(shape)}]"
    plans.both(f"""
    step(%0: {kind}, %1: {kind}) {{
      %2: {kind} = mul(%0, %1)
      %3: {kind} = add(%2, 0.3)
      %4: {dtype}[] = reduce_sum(%3, axes={tuple(range(len(shape)))})
      %5: {flat} = reshape(%3, shape=({math.prod(shape)},))
      return %3, %4, %5
    }}""")


def test_matmul(plans):
    plans.both("""
    step(%0: f32[3,5,7], %1: f32[3,9,7], %2: f32[3,5,9]) {
      %3: f32[3,7,9] = permute(%1, axes=(0,2,1))
      %4: f32[3,5,7] = maximum(%0, 0.0)
      %5: f32[3,5,9] = matmul(%4, %3)
      %6: f32[3,5,9] = add(%5, %2)
      %7: f32[3,9,5] = permute(%6, axes=(0,2,1))
      return %6, %7
    }""")


def test_movement_reads_from_the_right_places(plans):
    plans.both("""
    step(%0: f32[3,4,5]) {
      %1: f32[3,4,5] = mul(%0, 2.0)
      %2: f32[3,4,5] = flip(%1, axes=(0,2))
      %3: f32[5,3,4] = permute(%1, axes=(2,0,1))
      %4: f32[2,2,2] = slice(%1, starts=(1,0,1), stops=(3,4,5), steps=(1,2,2))
      return %2, %3, %4
    }""")


def test_large_domain_in_blocks(plans):
    plans.both("""
    step(%0: f32[300,1001], %1: f32[1001]) {
      %2: f32[1,1001] = reshape(%1, shape=(1,1001))
      %3: f32[300,1001] = expand(%2, shape=(300,1001))
      %4: f32[300,1001] = mul(%0, %3)
      %5: f32[] = reduce_sum(%4, axes=(0,1))
      %6: f32[] = reduce_max(%4, axes=(0,1))
      %7: f32[300] = reduce_sum(%4, axes=(1,))
      %8: f32[1001] = reduce_sum(%4, axes=(0,))
      return %4, %5, %6, %7, %8
    }""")


@pytest.mark.parametrize("fill", [0.0, -0.0])
def test_padding_keeps_the_sign_of_zero(fill, plans):
    text = f"""
    f(%0: f32[3]) {{
      %1: f32[6] = pad(%0, low=(1,), high=(2,), interior=(0,), value={fill})
      return %1
    }}"""
    graph = parse(text)
    x = np.array([1.0, 2.0, 3.0], np.float32)
    (out,), _ = plans.run(schedule(graph), graph, [x])
    assert np.array_equal(np.signbit(out), np.signbit(np.array([fill, 1, 2, 3, fill, fill])))
