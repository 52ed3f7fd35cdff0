"""The static check of plans' memory: what it finds, and that sound plans pass."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

import tracejit
from support.faults import FAULTS, STEPS
from support.random_graphs import RandomProgram
from tracejit.errors import InvalidGraph
from tracejit.ir.text import parse
from tracejit.schedule import schedule
from tracejit.schedule.cpu.lower import lower
from tracejit.schedule.cpu.sound import check_cpu_plan
from tracejit.schedule.memory import layout_of
from tracejit.schedule.plan import Plan
from tracejit.schedule.sound import check_kernel, check_plan

VECTOR = 32

CHAIN = """
step(%0: f32[48,96], %1: f32[96,96]) {
  %2: f32[48,96] = matmul(%0, %1)
  %3: f32[48,96] = matmul(%2, %1)
  %4: f32[48,96] = matmul(%3, %1)
  %5: f32[48,96] = matmul(%4, %1)
  %6: f32[48,96] = add(%5, %2)
  %7: f32[48,96] = matmul(%6, %1)
  return %7
}"""


# The result is too small to work in.
SMALL = CHAIN.replace(
    "%7: f32[48,96] = matmul(%6, %1)\n  return %7",
    """%7: f32[96,48] = permute(%6, axes=(1, 0))
  %8: f32[96,96] = matmul(%7, %4)
  %9: f32[96,96] = matmul(%8, %1)
  %10: f32[96] = reduce_sum(%9, axes=(1,))
  return %10""",
)
PACKED = """
step(%0: f32[48,96], %1: f32[96,96]) {
  %2: f32[48,96] = exp(%0)
  %3: f32[96,96] = permute(%1, axes=(1, 0))
  %4: f32[48,96] = matmul(%2, %3)
  %5: f32[96,48] = permute(%4, axes=(1, 0))
  %6: f32[96,96] = matmul(%5, %4)
  %7: f32[96] = reduce_sum(%6, axes=(1,))
  return %7
}"""


def moved(plan: Plan, offsets: dict[str, int]) -> Plan:
    """The plan with pieces of the arena at other places."""
    buffers = tuple(
        replace(b, offset=offsets[b.name]) if b.name in offsets else b for b in plan.buffers
    )
    ends = [b.offset + b.type.nbytes for b in buffers if b.kind == "arena"]
    return replace(plan, buffers=buffers, arena_bytes=max(ends, default=0))


def overlap(plan: Plan) -> bool:
    """Whether two pieces share a byte at one time, by their first and last launches."""
    spans: dict[str, list[int]] = {}
    for number, launch in enumerate(plan.launches):
        for name in launch.buffers:
            spans.setdefault(name, []).append(number)
    arena = [b for b in plan.buffers if b.kind == "arena"]
    return any(
        spans[a.name][0] <= spans[b.name][-1]
        and spans[b.name][0] <= spans[a.name][-1]
        and a.offset < b.offset + b.type.nbytes
        and b.offset < a.offset + a.type.nbytes
        for i, a in enumerate(arena)
        for b in arena[:i]
    )


def is_sound(plan: Plan) -> bool:
    try:
        check_plan(plan, layout_of(plan))
    except InvalidGraph:
        return False
    return True


def test_it_says_no_where_lives_meet_and_only_there():
    """Random plans, whose pieces lie at random places."""
    rng = random.Random(0)
    met = apart = 0
    for seed in range(80):
        plan = schedule(RandomProgram(seed).graph(), fuse=rng.random() < 0.25)
        assert is_sound(plan), plan
        arena = [b for b in plan.buffers if b.kind == "arena"]
        for _ in range(8 if len(arena) > 1 else 0):
            a, b = rng.sample(arena, 2)
            other = moved(plan, {a.name: b.offset + rng.choice((0, 0, 128, -128)) * (b.offset > 0)})
            assert is_sound(other) == (not overlap(other)), other
            met, apart = met + overlap(other), apart + (not overlap(other))
    assert met > 20 and apart > 20


def test_the_layout_of_the_cpu_is_checked_too():
    plan = schedule(parse(CHAIN))
    cpu_plan = lower(plan, VECTOR)
    check_cpu_plan(plan, cpu_plan)
    assert any(p.room for p in cpu_plan.places)  # in the output, until that is written
    first, *others = cpu_plan.places  # the first value lives almost to the end
    for other in others:
        for a, b in ((first, other), (other, first)):
            places = [replace(b, memory=p.memory) if p is a else p for p in cpu_plan.places]
            with pytest.raises(InvalidGraph, match=r"in its place|works on"):
                check_cpu_plan(plan, replace(cpu_plan, places=tuple(places)))
    for offset in (cpu_plan.arena_bytes, -128):
        wrong = replace(first, room="", offset=offset), *others
        with pytest.raises(InvalidGraph, match="reaches beyond"):
            check_cpu_plan(plan, replace(cpu_plan, places=wrong))
    without = replace(cpu_plan, calls=cpu_plan.calls[1:])
    with pytest.raises(InvalidGraph, match="nothing has been stored there"):
        check_cpu_plan(plan, without)
    with pytest.raises(InvalidGraph, match="nothing stores it"):
        check_cpu_plan(plan, replace(cpu_plan, calls=cpu_plan.calls[:-1]))


def test_what_kernels_work_in_lies_apart():
    """Packed operands, in the place of what their kernel stores."""
    plan = schedule(parse(PACKED))
    cpu_plan = lower(plan, VECTOR)
    check_cpu_plan(plan, cpu_plan)
    call = next(c for c in cpu_plan.calls if c.working)
    at = next(p for p in cpu_plan.places if p.memory in call.buffers)
    at = replace(
        at, offset=min(at.offset, cpu_plan.arena_bytes - dict(cpu_plan.working)[call.working])
    )
    wrong = [
        replace(at, memory=p.memory) if p.memory == call.working else p for p in cpu_plan.places
    ]
    with pytest.raises(InvalidGraph, match="works on"):
        check_cpu_plan(plan, replace(cpu_plan, places=tuple(wrong)))


def test_memory_that_ends_too_early_is_found_on_the_cpu_too():
    plan = schedule(parse(SMALL))
    check_cpu_plan(plan, lower(plan, VECTOR))
    (short,) = (f for f in FAULTS if f.name == "memory ends a launch too early")
    with short.plant(), pytest.raises(InvalidGraph, match="works on"):
        check_cpu_plan(plan, lower(plan, VECTOR))


@pytest.mark.parametrize("backend", ["numpy", "c"])
@pytest.mark.parametrize("fault", [f for f in FAULTS if f.step == "chain"], ids=lambda f: f.name)
def test_faults_of_memory_are_found_before_anything_runs(fault, backend, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACEJIT_CACHE", str(tmp_path))
    step, args, *_ = STEPS[fault.step]()
    with fault.plant():
        compiled = tracejit.compile(step, backend=backend)
        with pytest.raises(InvalidGraph):
            compiled(*args)
    assert torch.isfinite(tracejit.compile(step, backend=backend)(*args))


def test_kernels_that_read_what_they_store():
    from tracejit.schedule.kernel_text import parse_kernel

    product = """
    kernel(b0: f32 rw, b1: f32 r) over () {
      stage (i0: 4, i1: 4) {
        dot v2: f32 over (k: 4) {
          v0: f32 = load b0[i0 * 4 + k]
          |
          v1: f32 = load b1[i1 + k * 4]
        } v0, v1
        store b0[i0 * 4 + i1] <- v2
      }
    }"""
    with pytest.raises(InvalidGraph, match="a product reads b0"):
        check_kernel(parse_kernel(product))
    check_kernel(
        parse_kernel(
            product.replace("store b0", "store b1").replace(
                "v1: f32 = load b1", "v1: f32 = load b0"
            )
        )
    )
    twice = """
    kernel(b0: f32 r, b1: f32 w) over () {
      stage (i0: 4) {
        v0: f32 = load b0[i0]
        v1: f32 = neg(v0)
        store b1[i0] <- v0
        store b1[i0] <- v1
      }
    }"""
    with pytest.raises(InvalidGraph, match="stored twice"):
        check_kernel(parse_kernel(twice))
    check_kernel(parse_kernel(twice.replace("store b1[i0] <- v0", "store b0[i0] <- v0")))
    check_kernel(
        parse_kernel("kernel(b0: bf16 w) over () {\n  stage () {\n    store b0[0] <- nan\n  }\n}")
    )
