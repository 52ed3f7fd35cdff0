"""Kernel and Plan texts parse back to equal objects."""

from __future__ import annotations

import pytest

from support.graph_texts import FRESH, PROGRAM_3, ZEROS, softmax, two_layers
from support.random_graphs import RandomProgram
from tracejit.errors import InvalidGraph
from tracejit.ir.text import parse
from tracejit.schedule import schedule
from tracejit.schedule.kernel_text import canonical, parse_kernel
from tracejit.schedule.plan_text import parse_plan

EXAMPLE = """\
kernel64(b0: f32 r, b1: bf16 rw; n0, n1, nk, b0_s0, b0_o, d0, d1; s0) over (i0: n0) {
  stage (i1: n1, i2: 7) {
    dot v4: f32 over (k: nk) {
      v1: f32 = load b0[i0 * b0_s0 + k + b0_o]  # step.py:3
      |
      v2: f32 = load b0[k // d0 + (k % d0) * 4 + (i1 + i2 * 3) // d1]
      v3: f32 = full(s0)
    } v1, v2                                    # step.py:4
    v5: f32 = load b1[0] if 0 <= i1 + -2 < d0 and 0 <= i2 < 3 step 2
    v6: b1 = inbounds 0 <= i1 < 4
    v7: f32 = where(v6, v5, -inf)
    v8: i64 = position i0 + i1 % d0
    v9: bf16 = cast(v7, dtype=bf16)
    v10: f32 = reduce_sum v7
    store b1[i0 * 2] <- v9
    store b1[i0 * 2 + 1] <- nan
  }
  stage () {
    store b1[0] <- v10                          # step.py:5
  }
}"""


def test_text_round_trip():
    assert str(parse_kernel(EXAMPLE)) == EXAMPLE


def test_canonical_drops_lines_and_numbers():
    kernel = canonical(parse_kernel(EXAMPLE))
    assert canonical(kernel) == kernel
    assert "step.py" not in str(kernel)
    assert "v0: f32 = load b0" in str(kernel)
    renamed = EXAMPLE.replace("v10", "v77").replace("step.py:5", "step.py:6")
    assert str(canonical(parse_kernel(renamed))) == str(kernel)


LOGIC = """
f(%0: b1[5], %1: b1[5]) {
  %2: b1[5] = or(%0, %1)
  %3: b1[5] = not(%2)
  %4: b1[5] = and(%3, %1)
  return %4
}"""


@pytest.mark.parametrize("text", [LOGIC, PROGRAM_3, two_layers(FRESH, ZEROS), softmax(5, 7, 0)])
def test_plans_round_trip(text):
    plan = schedule(parse(text))
    assert parse_plan(str(plan)) == plan
    assert str(parse_plan(str(plan))) == str(plan)


def test_random_plans_round_trip():
    for seed in range(60):
        graph = RandomProgram(seed).graph()
        plan = schedule(graph)
        assert parse_plan(str(plan)) == plan
        assert schedule(graph) == plan


@pytest.mark.parametrize("text", ["kernel() over () {", "kernel() over () {\n  nonsense\n}"])
def test_malformed_texts_are_refused(text):
    with pytest.raises(InvalidGraph):
        parse_kernel(text)
